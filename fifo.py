"""The reading end of a FIFO, and the writing end.

Strategy: any thread writes, without waiting; what a pipe does not take stays in the `Writer`'s outbox until the
selector thread can write it. What does not fit a frame is a file beside the pipe (``bodies.py``).

Rules:
- A `Reader` keeps a writing end of its own FIFO open: otherwise its selector would report the end of the file for ever
  once the last writer went. A FIFO appears under its name only when its reader holds it open.
- A `Writer` is watched for reading too: that is how poll(2) tells that the last reader has gone.
- A signal handler or a finalizer may run inside any function of a `Writer` and send by the same one. Who re-enters it
  writes if nothing waits, so that a handler may wait for an answer; otherwise it only appends, and whoever was
  interrupted sees to it. Another thread that finds the lock held for long appends too.

This module does not know what a message means.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import select
import selectors
import stat
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING or not __package__:
    import bodies
    import directories
    import files
    import frames
    from poller import HELD_UP_SECONDS, Poller, has_handlers, no_fork, patient
else:
    from . import bodies, directories, files, frames
    from .poller import HELD_UP_SECONDS, Poller, has_handlers, no_fork, patient

_LOGGER = logging.getLogger(__name__)
_READ_SIZE = 1 << 16
_INTAKE_SIZE = 1 << 20
_OUTBOX_BYTES = 1 << 26


class Reader:
    """The reading end of a FIFO, which appears under its name only once it is open. The selector thread has it."""

    def __init__(self, poller: Poller, path: Path, *, keep: bool = False) -> None:
        """Make the FIFO. In any thread.

        :param keep: it outlives its reader: read one that lies there already, with what it still holds, leave it when
            this is closed, and give it more room where the system can.
        :raises OSError: it cannot be made.
        """
        self.path = path
        self._keep = keep
        self._frames = frames.Frames()
        with contextlib.ExitStack() as undo, patient(no_fork):
            name = path
            if not (keep and path.is_fifo()):
                name = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
                os.mkfifo(name, 0o600)
                undo.callback(name.unlink, missing_ok=True)
            self._descriptor = os.open(name, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
            undo.callback(os.close, self._descriptor)
            _check_fifo(self._descriptor, path)
            self._own_end = os.open(name, os.O_WRONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
            undo.callback(os.close, self._own_end)
            if keep and hasattr(fcntl, "F_SETPIPE_SZ"):
                with contextlib.suppress(OSError):
                    fcntl.fcntl(self._descriptor, fcntl.F_SETPIPE_SZ, _INTAKE_SIZE)
            if name != path:
                name.rename(path)
            poller.descriptors.update((self._descriptor, self._own_end))
            undo.pop_all()
        self._poller = poller
        self._retired = False
        self.closed = False

    def start(self, handler: Callable[[Reader], None]) -> None:
        """Call `handler` whenever there is something to read."""
        if not self.closed:
            self._poller.watch(self._descriptor, selectors.EVENT_READ, lambda _: None if self.closed else handler(self))

    def read(self) -> list[bytes]:
        """Return frames that have come; a list that may be empty although more is there."""
        try:
            return self._fed(os.read(self._descriptor, _READ_SIZE))
        except BlockingIOError:
            return []

    def drain(self) -> list[bytes]:
        """Return all frames that have come."""
        found: list[bytes] = []
        with contextlib.suppress(BlockingIOError):
            while not self.closed:
                found += self._fed(os.read(self._descriptor, _READ_SIZE))
        return found

    def _fed(self, data: bytes) -> list[bytes]:
        if not data:
            self.close()
        before = self._frames.skipped
        found = self._frames.feed(data)
        if self._frames.skipped > before:
            _LOGGER.warning("%s: skipped %d bytes that are no frame", self.path, self._frames.skipped - before)
        return found

    def is_in_place(self) -> bool:
        """Say whether the FIFO still has its name. In any thread."""
        return not self.closed and files.is_in_place(self.path, self._descriptor)

    def retire(self) -> None:
        """Read on, although the name is another's now, as others may have it open; when the last of them goes, close.

        In the selector thread.
        """
        if not self._retired and not self.closed:
            self._retired = True
            self._poller.release(self._own_end)

    def close(self) -> None:
        """Unlink the FIFO, unless it is kept, and close it."""
        if self.closed:
            return
        self.retire()
        in_place = self.is_in_place()
        self.closed = True
        if in_place and not self._keep:
            with contextlib.suppress(OSError):
                self.path.unlink()
        self._poller.release(self._descriptor)


class Writer:
    """The writing end of a FIFO: the way to one life of its reader. `send` and `offer` are safe in any thread.

    `_lock` guards the outbox and the descriptor, and whoever writes is `_busy`. Who finds itself busy was called by a
    signal handler or a finalizer in the middle of something, and leaves in `_reentered` what it cannot write at once.
    So does another thread that cannot have the lock, as a signal handler has interrupted whoever has it; where the
    selector thread cannot, the `Writer` is `_untended` until whoever has it calls it again.
    """

    def __init__(
        self,
        poller: Poller,
        path: Path,
        on_death: Callable[[Writer, list[bytes]], None],
        *,
        limit: int = 100_000,
        drops_oldest: bool = False,
    ) -> None:
        """Open the FIFO.

        :param on_death: called in the selector thread when the last reader has gone, with the frames it did not take;
            and once more should a frame come in that very moment.
        :param limit: how many frames the outbox holds; with their bodies they have at most 64 MiB.
        :param drops_oldest: whether a full outbox drops its oldest frame, rather than refuse the newest.
        :raises OSError: ``ENXIO`` or ``ENOENT`` if nobody reads it.
        """
        self.path = path
        self.dead = False
        self.died_at = 0
        """When it was found dead, in nanoseconds since the epoch."""
        self.dropped = 0
        """How many frames the outbox had no room for."""
        self._outbox: deque[tuple[bytes, int]] = deque()
        self._bytes = 0
        self._reentered: deque[bytes] = deque()
        self._trash: deque[bytes] = deque()
        self._limit = limit
        self._drops_oldest = drops_oldest
        self._on_death = on_death
        self._poller = poller
        self._lock = threading.RLock()
        self._busy = False
        self._untended = False
        self._closed = False
        with patient(no_fork):
            self._descriptor = open_for_writing(path)
            poller.descriptors.add(self._descriptor)
        poller.writers.add(self)
        poller.call(self._tend)

    @property
    def waiting(self) -> int:
        """How many frames the pipe has not taken yet."""
        return len(self._outbox) + len(self._reentered)

    def is_in_place(self) -> bool:
        """Say whether the FIFO still has its name."""
        return not self._closed and files.is_in_place(self.path, self._descriptor)

    def send(self, data: bytes) -> None:
        """Write a frame, or put it into the outbox behind those that wait there already.

        :raises BrokenPipeError: nobody reads any more.
        :raises BufferError: the outbox is full.
        """
        self._send(data, waits=True)

    def offer(self, data: bytes) -> bool:
        """Write a frame if the pipe takes it at once; say whether it did.

        :raises BrokenPipeError: nobody reads any more.
        """
        return self._send(data, waits=False)

    def _send(self, data: bytes, *, waits: bool) -> bool:
        try:
            if has_handlers():
                with self._lock:
                    return self._send_alone(data, waits)
            if not self._lock.acquire(timeout=HELD_UP_SECONDS):
                return waits and self._reenter(data)
            try:
                return self._send_alone(data, waits)
            finally:
                self._lock.release()
        finally:
            # Once the lock is free, or whoever could not have it meanwhile would not be called again.
            if self.waiting or self._trash or self._untended:
                self._poller.call(self._tend)

    def _send_alone(self, data: bytes, waits: bool) -> bool:
        if self._busy:
            return self._write_within(data) or (waits and self._reenter(data))
        self._busy = True
        try:
            return self._write(data) or (waits and self._push(data))
        finally:
            self._busy = False

    def _write_within(self, data: bytes) -> bool:
        """Write a frame in the middle of something else, so that a signal handler may wait for what becomes of it."""
        with contextlib.suppress(OSError):
            return not (self.dead or self.waiting) and os.write(self._descriptor, data) > 0
        return False

    def _reenter(self, data: bytes) -> bool:
        self._reentered.append(data)
        return True

    def _write(self, data: bytes) -> bool:
        if self.dead:
            raise BrokenPipeError(f"nobody reads {self.path}")
        self._take_in()
        if self._outbox:
            return False
        try:
            os.write(self._descriptor, data)
            return True
        except BlockingIOError:
            return False
        except BrokenPipeError:
            self._die()
            self._poller.call(self._tend)
            raise

    def _die(self) -> None:
        self.died_at = self.died_at or time.time_ns()
        self.dead = True

    def _push(self, data: bytes) -> bool:
        cost = len(data) + bodies.size(data, self.path)
        while self._outbox and (len(self._outbox) >= self._limit or self._bytes + cost > _OUTBOX_BYTES):
            if not self._drops_oldest:
                raise BufferError(f"{len(self._outbox)} messages wait for the reader of {self.path}")
            self._trash.append(self._pop())
            self.dropped += 1
        self._outbox.append((data, cost))
        self._bytes += cost
        return True

    def _take_in(self) -> None:
        """Put what a signal handler or a finalizer has sent meanwhile behind what waits already."""
        while self._reentered:
            data = self._reentered.popleft()
            try:
                self._push(data)
            except BufferError:
                self._trash.append(data)
                self.dropped += 1

    def _pop(self) -> bytes:
        data, cost = self._outbox.popleft()
        self._bytes -= cost
        return data

    def take_back(self) -> list[bytes]:
        """Take out what the pipe has not taken."""
        with self._lock:
            return self._taken()

    def close(self) -> None:
        """Close it, and drop what is in the outbox. Only in the selector thread."""
        with self._lock:
            self.dead = True
            if self._busy:
                self._poller.call(self.close)
                return
            self._release()
            self._trash.extend(self._taken())
        self._empty_trash()

    def _release(self) -> None:
        if not self._closed:
            self._closed = True
            self._poller.writers.discard(self)
            self._poller.release(self._descriptor)

    def _taken(self) -> list[bytes]:
        left = [self._pop() for _ in range(len(self._outbox))]
        return left + [self._reentered.popleft() for _ in range(len(self._reentered))]

    def _tend(self) -> None:
        """Write what waits, see to the events that are to be watched, and tell of a death. In the selector thread."""
        self._untended = True
        if not self._lock.acquire(blocking=False):
            return  # Whoever has it asks for this once more.
        try:
            self._untended = False
            left = self._tend_alone()
        finally:
            self._lock.release()
        self._empty_trash()
        if left is not None:
            self._on_death(self, left)

    def _tend_alone(self) -> list[bytes] | None:
        """Return what nobody has read, once nobody reads; `None` if there is nothing to tell."""
        if self._busy:
            return None  # Whoever is busy asks for this once more.
        self._busy = True
        try:
            if not self.dead and not self._closed and self._flush():
                events = selectors.EVENT_READ | (selectors.EVENT_WRITE if self.waiting else 0)
                self._poller.watch(self._descriptor, events, self._ready)
            if not self.dead:
                return None
            first = not self._closed
            self._release()
            left = self._taken()
            return left if first or left else None
        finally:
            self._busy = False

    def _flush(self) -> bool:
        """Say whether somebody still reads."""
        self._take_in()
        try:
            while self._outbox:
                batch, size = 0, 0
                while batch < len(self._outbox) and size + len(self._outbox[batch][0]) <= select.PIPE_BUF:
                    size += len(self._outbox[batch][0])
                    batch += 1
                os.write(self._descriptor, b"".join(self._outbox[index][0] for index in range(batch)))
                for _ in range(batch):
                    self._pop()
        except BlockingIOError:
            pass
        except BrokenPipeError:
            self._die()
        return not self.dead

    def _ready(self, mask: int) -> None:
        if mask & selectors.EVENT_READ:
            self._die()
        self._tend()

    def _empty_trash(self) -> None:
        while self._trash:
            bodies.discard(self._trash.popleft(), self.path)


# Without a poller


def leave(text: str, layout: directories.Layout, name: str) -> None:
    """Bring a message to whoever reads a pipe so that it outlives us: in the pipe, or as a body beside it.

    :raises OSError: neither could be done. Where nobody reads the pipe, there is nothing to do.
    """
    data, receiver = frames.frame(text), layout.pipes / name
    try:
        if data is not None:
            write_once(receiver, data)
            return
    except OSError as error:
        if error.errno == errno.ENXIO:
            return
    data = leave_body(text, layout, name)
    with contextlib.suppress(OSError):
        write_once(receiver, data)  # It finds the body when it looks after itself, rung or not.


def leave_body(text: str, layout: directories.Layout, name: str) -> bytes:
    """Put a message beside a pipe that may be gone: its reader finds it once it has made the pipe again.

    :return: the frame that names it.
    :raises OSError: it cannot be written.
    """
    try:
        return bodies.pack_body(text, layout.pipes / name)
    except FileNotFoundError:
        # Somebody has removed the directory too, and nobody has looked after himself since.
        directories.remake(layout)
        return bodies.pack_body(text, layout.pipes / name)


def knock(path: Path, message: frames.Message) -> bool:
    """Send one small message from a process that has no `Poller`; say whether somebody reads the FIFO and it fitted."""
    data = frames.frame(frames.encode(message))
    with contextlib.suppress(OSError):
        write_once(path, data or b"")
        return data is not None
    return False


def write_once(path: Path, data: bytes) -> None:
    """Open a FIFO, write a frame, and close it.

    :raises OSError: nobody reads it, or the frame does not fit.
    """
    with open(open_for_writing(path), "wb", buffering=0) as file:
        os.write(file.fileno(), data)


def open_for_writing(path: Path) -> int:
    """Open the writing end of a FIFO.

    :raises OSError: ``ENXIO`` or ``ENOENT`` if nobody reads it.
    """
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EISDIR):
            raise _not_a_fifo(path) from error
        raise
    try:
        _check_fifo(descriptor, path)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _check_fifo(descriptor: int, path: Path) -> None:
    status = os.fstat(descriptor)
    if not stat.S_ISFIFO(status.st_mode) or status.st_uid != os.geteuid():
        raise _not_a_fifo(path)


def _not_a_fifo(path: Path) -> directories.DirectoryRefused:
    return directories.DirectoryRefused(f"{path} is not a FIFO of this user: remove it.")
