"""What an operator reads of the coordinator's log, across the files that it has been moved to meanwhile.

Strategy: the log is ``coordinator.log``, and those before it are ``coordinator.log.1`` to ``.3``. Which of them a
descriptor leads to is asked of the disk, so that whoever follows goes on in the next one.
"""

from __future__ import annotations

import contextlib
import os
import select
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING or not __package__:
    import control
    import files
    import presence
else:
    from . import control, files, presence


def last(config_path: str | os.PathLike[str], number: int) -> list[str]:
    """Return the newest lines of the log, oldest first.

    :param number: how many at most.
    :raises presence.CoordinatorError: there is no log.
    """
    return _newest(_existing(_queue(config_path)), [], number)


def follow(config_path: str | os.PathLike[str], number: int) -> Iterator[str]:
    """Yield the newest lines of the log, and each that comes from then on; for ever.

    :param number: how many of those that are there, at most.
    :raises presence.CoordinatorError: there is no log.
    """
    queue = _queue(config_path)
    log = queue / "coordinator.log"
    with contextlib.ExitStack() as stack:
        newest = _existing(queue)[-1]  # The next one may not be there yet.
        descriptor = os.open(newest, os.O_RDONLY)
        stack.callback(lambda: os.close(descriptor))
        *lines, rest = b"".join(iter(lambda: os.read(descriptor, 1 << 16), b"")).split(b"\n")
        older = [path for path in _existing(queue) if path not in (log, newest)]
        yield from _newest(older, [line.decode(errors="replace") for line in lines], number)
        while True:
            data = os.read(descriptor, 1 << 16)
            *lines, rest = (rest + data).split(b"\n")
            yield from (line.decode(errors="replace") for line in lines)
            if data:
                continue
            if files.is_in_place(log, descriptor):
                if os.fstat(descriptor).st_size < os.lseek(descriptor, 0, os.SEEK_CUR):
                    os.lseek(descriptor, 0, os.SEEK_SET)  # Somebody has copied and emptied it.
                select.select([], [], [], 1.0)  # A person watches, and no event tells of a file's growth everywhere.
                continue
            following = _after(queue, descriptor)
            if following is None:
                select.select([], [], [], 1.0)
                continue
            if os.fstat(descriptor).st_size > os.lseek(descriptor, 0, os.SEEK_CUR):
                os.close(following)
                continue  # Something was written between our last look and its being moved.
            os.dup2(following, descriptor, inheritable=False)
            os.close(following)
            rest = b""


def _queue(config_path: str | os.PathLike[str]) -> Path:
    queue = control.find(config_path).queue
    if not _existing(queue):
        raise presence.CoordinatorError(f"no coordinator has logged in {config_path}/coordinator yet")
    return queue


def _newest(paths: list[Path], lines: list[str], number: int) -> list[str]:
    for path in reversed(paths):
        if len(lines) < number:
            with contextlib.suppress(FileNotFoundError):  # It has been moved meanwhile.
                text = path.read_bytes().decode(errors="replace")
                lines = (text.removesuffix("\n").split("\n") if text else []) + lines
    return lines[-number:] if number else []


def _existing(queue: Path) -> list[Path]:
    """Return the files of the log, oldest first."""
    names = [*(f"coordinator.log.{number}" for number in (3, 2, 1)), "coordinator.log"]
    return [queue / name for name in names if (queue / name).is_file()]


def _after(queue: Path, descriptor: int) -> int | None:
    """Open the file of the log that follows the one a descriptor leads to; `None` if there is none now."""
    paths = _existing(queue)
    here = [files.is_in_place(path, descriptor) for path in paths]
    # If ours has been moved elsewhere, as logrotate does, it was the newest one.
    newest = [path for path in paths if path.name == "coordinator.log"]
    after = paths[here.index(True) + 1 :] if True in here else newest
    with contextlib.suppress(FileNotFoundError):
        return os.open(after[0], os.O_RDONLY) if after else None
    return None
