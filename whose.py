"""Whose a queue is, and in which format: what stands in its file ``format``.

Strategy: whoever uses a queue first writes the file, and everybody after that reads it. A profile is told from others
by its UUID where it has one, so that it keeps its queue when it is renamed, its directory with it, and one that is made
anew under its name does not get it.

Rules:
- A queue of another profile, or in another format, is refused with what to do about it.
- A communicator looks again, every ten seconds and with each task that it sends or is offered: a queue can be moved
  away, and another profile's may come in its place. (A coordinator looks at its lock, which goes with the queue.)
- Looking writes nothing. What does not say whose it is has been spoilt: it is served on, and mended by who comes next.

This module knows nothing of what else lies in a queue.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import os
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING or not __package__:
    import files
else:
    from . import files

FORMAT = 1


class DirectoryRefused(OSError):
    """A directory is not safe to use, or cannot be used; the message says what to do about it."""


@dataclass(frozen=True)
class Owner:
    """A profile, as its queue knows it."""

    profile: str
    uuid: str | None = None
    """What tells it from another one that had its name; `None` matches all."""

    def take(self, queue: Path) -> None:
        """Have a queue that is this profile's: it takes its name where it had another, and its UUID where it had none.

        :raises DirectoryRefused: it is another's, or in another format.
        :raises OSError: it cannot be read or written.
        """
        said = self._establish(queue)
        if self.uuid is not None and (said.get("profile"), said.get("uuid")) != (self.profile, self.uuid):
            files.write_whole(queue / "format", self._text(), durable=True)

    def look(self, queue: Path) -> bool:
        """Say whether it is still there.

        :raises DirectoryRefused: another profile's has come in its place.
        :raises OSError: it cannot be read.
        """
        try:
            status = os.stat(queue / "format")
        except (FileNotFoundError, NotADirectoryError):
            return False
        _check_once(self, queue, status.st_dev, status.st_ino, status.st_mtime_ns)
        return True

    def keep(self, queue: Path) -> None:
        """Have it made again where it is gone.

        :raises DirectoryRefused: another profile's has come in its place.
        :raises OSError: it cannot be read or made.
        """
        if not self.look(queue):
            files.make_directories(queue)
            self._establish(queue)

    def is_of(self, said: dict[str, Any]) -> bool:
        """Say whether a queue has this profile's name or, from before it was renamed, its UUID.

        :param said: what the queue says of itself.
        """
        return said.get("profile") == self.profile or (self.uuid is not None and said.get("uuid") == self.uuid)

    def check(self, queue: Path, said: dict[str, Any]) -> None:
        """Refuse a queue that says that it is another's, or in another format.

        :raises DirectoryRefused: that is so.
        """
        check_format(queue, said)
        name = f"{said.get('profile')!s:.200}"
        if not self.is_of(said):
            raise DirectoryRefused(
                f"{queue} belongs to the profile '{name}', not to '{self.profile}': name that profile, or another "
                "configuration directory, or, when nothing of that one runs here any more, set it aside by "
                f"'{set_aside(queue)}'."
            )
        if None not in (said.get("uuid"), self.uuid) and said["uuid"] != self.uuid:
            raise DirectoryRefused(
                f"{queue} belongs to another profile that was called '{name}' too: when nothing of that one runs any "
                f"more, set it aside by '{set_aside(queue)}', or delete it by the command 'delete'."
            )

    def _establish(self, queue: Path) -> dict[str, Any]:
        said = read(queue)
        if said is None:
            # Whose it is, is decided by this one call: it fails with EEXIST for all but one.
            draft = queue / f".format.{uuid.uuid4().hex}"
            files.write_whole(draft, self._text(), durable=True)
            try:
                with contextlib.suppress(FileExistsError):
                    os.link(draft, queue / "format")
            finally:
                draft.unlink()
            said = read(queue)
        if said is None:
            # A loss of power may leave the name of a file whose content never came to the disk.
            files.write_whole(queue / "format", self._text(), durable=True)
            said = json.loads(self._text())
        self.check(queue, said)
        return said

    def _text(self) -> bytes:
        return json.dumps({"format": FORMAT, "profile": self.profile, "uuid": self.uuid}).encode()


@functools.lru_cache(maxsize=64)  # It is asked for each task that is sent.
def _check_once(owner: Owner, queue: Path, *version: int) -> None:
    said = read(queue)
    if said is not None:
        owner.check(queue, said)


def read(queue: Path) -> dict[str, Any] | None:
    """Return what a queue says of itself; `None` if it says nothing.

    :raises OSError: it cannot be read.
    """
    try:
        said = json.loads(files.read(queue / "format"))
    except (FileNotFoundError, NotADirectoryError, ValueError, RecursionError):
        return None
    return said if isinstance(said, dict) and "format" in said else None


def check_format(queue: Path, said: dict[str, Any]) -> None:
    """Refuse a queue in another format than that of this version.

    :raises DirectoryRefused: it is; the message says what to do.
    """
    if said.get("format") != FORMAT:
        raise DirectoryRefused(
            f"{queue} has format {said.get('format')!r:.40}, and this version knows {FORMAT}: use the version that "
            f"made it, or set it aside by '{set_aside(queue)}'."
        )


def set_aside(queue: Path) -> str:
    """Return the command that makes room for a new queue."""
    import shlex  # Here, as few need it.

    names = (f"{queue}.old{number or ''}" for number in itertools.count())
    return shlex.join(["mv", str(queue), next(name for name in names if not os.path.lexists(name))])
