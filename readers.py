"""The pipes that somebody reads, by name: made, made again, drained, closed.

Strategy: whoever reads pipes hands each frame that comes to the handler of its pipe, and looks every ten seconds, or
when it stumbles over it, whether they are in place.

Rules:
- A pipe that lost its name is made again, and the old one goes on being read: others may have it open.
- One bad frame, or one pipe that cannot be made again, is logged, and never touches the others.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING or not __package__:
    import directories
    import files
    import frames
    from fifo import Reader
    from poller import Poller, guarded
else:
    from . import directories, files, frames
    from .fifo import Reader
    from .poller import Poller, guarded

_LOGGER = logging.getLogger(__name__)


class Pipes:
    """The pipes that somebody reads. Opened under their owner's lock, read and closed in the selector thread."""

    def __init__(self, directory: Path, poller: Poller, *, keep: bool = False) -> None:
        """
        :param keep: they outlive their readers.
        """
        self._directory = directory
        self._poller = poller
        self._keep = keep
        self.made_again = False
        """Whether one has been made again, which whoever has it open is to be told."""
        self._readers: dict[str, list[Reader]] = {}
        self._handlers: dict[str, tuple[Callable[[Reader, bytes], None], Callable[[], object]]] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._readers

    def open(
        self, name: str, handler: Callable[[Reader, bytes], None], prepare: Callable[[], object] = lambda: None
    ) -> bool:
        """Make a pipe that is not in place, and call `handler` in the selector thread for each frame that comes.

        :param prepare: called when frames have been read, before the first of them is handled.
        :return: whether there was none.
        :raises OSError: it cannot be made.
        """
        is_new = name not in self._readers
        if is_new or not self._readers[name][-1].is_in_place():
            self._handlers[name] = handler, prepare
            self._add(name)
        return is_new

    def _add(self, name: str) -> None:
        reader = Reader(self._poller, self._directory / name, keep=self._keep)
        before = [known for known in self._readers.get(name, []) if not known.closed]
        self._readers[name] = [*before, reader]
        self.made_again = self.made_again or bool(before)
        for known in before:
            self._poller.call(known.retire)
        self._poller.call(lambda: reader.start(lambda _: self._handle(name, reader, reader.read())))

    def _handle(self, name: str, reader: Reader, found: list[bytes]) -> None:
        handler, prepare = self._handlers[name]
        prepare()
        guarded(found, functools.partial(handler, reader))

    def drain(self, name: str) -> None:
        """Handle all frames that have come to a pipe."""
        for reader in self._readers.get(name, []):
            self._handle(name, reader, reader.drain())

    def inject(self, name: str, data: bytes) -> None:
        """Handle a frame as if it had come by a pipe."""
        for reader in self._readers.get(name, [])[-1:]:
            self._handle(name, reader, [data])

    def find_bodies(self, name: str) -> None:
        """Handle the messages that lie on the disk for a pipe, whose frames may have been lost.

        :raises OSError: it cannot be seen what lies there.
        """
        for body in files.listed(self._directory):
            if directories.body_receiver(body) == name:
                self.inject(name, frames.claim_check(body))

    def look(self) -> None:
        """Make again what has lost its name, and touch the rest, so that nobody takes it for forgotten."""
        for name, readers in list(self._readers.items()):
            try:
                if readers[-1].is_in_place():
                    os.utime(readers[-1].path)
                else:
                    _LOGGER.warning("%s had vanished, and is made again", readers[-1].path)
                    self._add(name)
            except OSError as error:
                _LOGGER.error("%s cannot be made again now: %s", readers[-1].path, error)

    def close(self, *, and_bodies: bool) -> None:
        """Close the pipes.

        :param and_bodies: remove what they were sent and have not read, too: it is still ours.
        """
        readers, self._readers = self._readers, {}
        for same in readers.values():
            for reader in same:
                reader.close()
        for name in files.listed(self._directory) if and_bodies else ():
            if directories.body_receiver(name) in readers:
                files.remove(self._directory / name)
