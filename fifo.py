"""Frames, the reading end, the writing end, and bodies too large for a frame.

Strategy: one write of at most ``PIPE_BUF`` bytes to a pipe is atomic, and all or nothing with ``O_NONBLOCK`` (pipe(7),
write(2)). So a frame never exceeds that, writers in any number of processes need no lock between them, and no reader
ever waits for the other half of a frame. What does not fit is written to a file, and the frame names it (the claim
check pattern); whoever receives it unlinks it.

    frame = 4 bytes: length of the text, big-endian | the text: a JSON object in UTF-8

Rules:
- JSON text holds no zero byte, and the length of a frame starts with two; so a reader that meets garbage finds the next
  frame again. It counts what it skips.
- A `Reader` keeps a writing end of its own FIFO open: otherwise its selector would report the end of the file for ever
  once the last writer went.
- A `Writer` writes from whichever thread calls it. What the pipe does not take stays in its outbox, in order and
  bounded, until the selector thread can write it.
- A `Writer` is watched for reading too: that is how poll(2) tells that the last reader has gone. One that is not
  `persistent` is closed then.
- Only the selector thread touches the selector; other threads leave it a request with `Poller.call`.

This module does not know what a message means.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import select
import selectors
import stat
import struct
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING or not __package__:
    import discovery
else:
    from . import discovery

_LOGGER = logging.getLogger(__name__)
_HEADER = struct.Struct(">I")
LARGEST_TEXT = select.PIPE_BUF - _HEADER.size
_READ_SIZE = 1 << 16
_INTAKE_SIZE = 1 << 20
_CLAIM_CHECK = b'{"body_file":'

Message = dict[str, Any]


class Garbage(ValueError):
    """A frame's text, or the file it names, is not a message."""


def encoder(default: Callable[[Any], Any] | None) -> Callable[[Any], str]:
    """Return a function that turns a message into compact JSON.

    :param default: called for what JSON cannot express, as `json.dumps` calls it.
    """
    encode = json.JSONEncoder(default=default, separators=(",", ":")).encode

    def checked(message: Any) -> str:
        """:raises TypeError: JSON cannot express the message."""
        try:
            return encode(message)
        except (ValueError, RecursionError) as error:
            raise TypeError(f"JSON cannot express the message: {error}") from error

    return checked


encode: Callable[[Any], str] = encoder(None)


def frame(text: str) -> bytes | None:
    """Put a message's text into a frame; `None` if it does not fit."""
    data = text.encode()
    return _HEADER.pack(len(data)) + data if len(data) <= LARGEST_TEXT else None


def pack(text: str, receiver: Path) -> bytes:
    """Put a message's text into a frame for `receiver`, by way of a file where it is too large.

    :raises OSError: the file cannot be written (no room, say); nothing is left of it.
    """
    return frame(text) or _claim_check(receiver, lambda body: _write_new(body, text.encode()))


def readdress(data: bytes, receiver: Path, source: Path) -> bytes:
    """Return the frame for one more receiver: the same bytes, but that a large body gets a link for each.

    :raises OSError: the body is not there, or cannot be linked.
    """
    body = claimed_body(data, source)
    return data if body is None else _claim_check(receiver, lambda new: os.link(body, new, follow_symlinks=False))


def claimed_body(data: bytes, receiver: Path) -> Path | None:
    """Return the file that a frame for `receiver` names; `None` if the message is in the frame itself."""
    if not data.startswith(_CLAIM_CHECK, _HEADER.size):
        return None
    with contextlib.suppress(ValueError, AttributeError):
        name = json.loads(data[_HEADER.size :]).get("body_file")
        if discovery.body_receiver(name) == receiver.name:
            return receiver.with_name(name)
    return None


def discard(data: bytes, receiver: Path) -> None:
    """Drop a frame that will not be delivered, and the file it names."""
    body = claimed_body(data, receiver)
    if body is not None:
        body.unlink(missing_ok=True)


def unpack(data: bytes, receiver: Path) -> Message:
    """Return the message in a frame, and unlink the file it named.

    :raises Garbage: it is no JSON object, or names a file that is not one of this receiver's.
    :raises OSError: the file it names cannot be read.
    """
    try:
        message = json.loads(str(data[_HEADER.size :], "utf-8"))
        if isinstance(message, dict) and "body_file" in message:
            body = claimed_body(data, receiver)
            if body is None:
                raise Garbage("it names a file that is not for this pipe")
            descriptor = os.open(body, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
            with open(descriptor, "rb") as file:
                if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                    raise Garbage("it names something that is not a regular file")
                text = file.read()
            body.unlink(missing_ok=True)
            message = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Garbage(str(error)) from error
    if not isinstance(message, dict):
        raise Garbage("it is not a JSON object")
    return message


def _claim_check(receiver: Path, make: Callable[[Path], None]) -> bytes:
    name = discovery.body_name(receiver.name)
    make(receiver.with_name(name))
    text = _CLAIM_CHECK + f'"{name}"}}'.encode()
    return _HEADER.pack(len(text)) + text


def _write_new(path: Path, data: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with open(descriptor, "wb") as file:
            file.write(data)
    except BaseException:
        path.unlink(missing_ok=True)
        raise


class Frames:
    """Finds the frames in a stream of bytes, and after garbage the next frame again."""

    def __init__(self) -> None:
        self.skipped = 0
        """Bytes that belonged to no frame."""
        self._rest = b""

    def feed(self, data: bytes) -> list[bytes]:
        """Take what was read; return the frames that are whole, headers included."""
        data = self._rest + data if self._rest else data
        frames, at, end = [], 0, len(data)
        while end - at >= _HEADER.size:
            (length,) = _HEADER.unpack_from(data, at)
            stop = at + _HEADER.size + length
            text = data[at + _HEADER.size : stop]
            if not 2 <= length <= LARGEST_TEXT or b"\0" in text or (text and text[0] != 0x7B):
                following = data.find(b"\0", at + 1)
                following = end if following < 0 else following
                self.skipped += following - at
                at = following
            elif stop > end:
                break
            else:
                frames.append(data[at:stop])
                at = stop
        if end - at < _HEADER.size and data[at : at + 2].strip(b"\0"):
            # Too short to be judged by its length, but no header starts like this.
            following = data.find(b"\0", at)
            following = end if following < 0 else following
            self.skipped += following - at
            at = following
        self._rest = data[at:]
        return frames


class Poller:
    """A selector, a way to wake it from other threads, and the list of what it holds open."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._wake_read, self._wake_write = os.pipe()
        self._requests: deque[Callable[[], None]] = deque()
        self._awake = False
        self.descriptors = {self._wake_read, self._wake_write}
        """What a forked child has to close."""
        self.writers: set[Writer] = set()
        for descriptor in self.descriptors:
            os.set_blocking(descriptor, False)
        self._selector.register(self._wake_read, selectors.EVENT_READ, self._woken)
        self._spare: int | None = None
        self._spare_lock = threading.Lock()
        self._fill_spare()

    def call(self, request: Callable[[], None]) -> None:
        """Have the selector thread call `request`. Safe in any thread, and in a signal handler or finalizer."""
        self._requests.append(request)
        if not self._awake:
            self._awake = True
            with contextlib.suppress(BlockingIOError, OSError):
                os.write(self._wake_write, b"\0")

    def poll(self, timeout: float | None) -> None:
        """Wait for events, for at most `timeout` seconds (`None`: as long as it takes), and handle them."""
        for key, mask in self._selector.select(timeout):
            try:
                key.data(mask)
            except Exception:
                _LOGGER.exception("An event could not be handled")

    def watch(self, descriptor: int, events: int, handler: Callable[[int], None]) -> None:
        """Call `handler` with the events that become ready; 0 events: no longer."""
        known = descriptor in self._selector.get_map()
        if not events and known:
            self._selector.unregister(descriptor)
        elif known:
            self._selector.modify(descriptor, events, handler)
        elif events:
            self._selector.register(descriptor, events, handler)

    def release(self, descriptor: int) -> None:
        """Close a descriptor. Only in the selector thread."""
        self.watch(descriptor, 0, lambda _: None)
        self.descriptors.discard(descriptor)
        os.close(descriptor)

    @contextlib.contextmanager
    def spare_descriptor(self) -> Iterator[None]:
        """Give back, for the length of a context, the descriptor that is kept for when there is no other."""
        with self._spare_lock:
            if self._spare is not None:
                self.descriptors.discard(self._spare)
                os.close(self._spare)
                self._spare = None
            try:
                yield
            finally:
                self._fill_spare()

    def _fill_spare(self) -> None:
        with contextlib.suppress(OSError):
            self._spare = os.dup(self._wake_read)
            self.descriptors.add(self._spare)

    def flush(self, seconds: float) -> None:
        """Handle events until every outbox is empty, or for so many seconds. Only in the selector thread."""
        deadline = time.monotonic() + seconds
        while any(writer.outbox for writer in list(self.writers)) and (left := deadline - time.monotonic()) > 0:
            self.poll(left)

    def close(self) -> None:
        """Close everything. Only in the selector thread, or in a forked child."""
        # A child shares the selector's kernel object with its parent. Unlike unregistering, closing leaves it alone.
        self._selector.close()
        for descriptor in self.descriptors:
            os.close(descriptor)
        self.descriptors.clear()
        self.writers.clear()

    def _woken(self, _: int) -> None:
        os.read(self._wake_read, 4096)
        self._awake = False
        while self._requests:
            self._requests.popleft()()


class Reader:
    """The reading end of a FIFO, which appears under its name only once it is open."""

    def __init__(self, poller: Poller, path: Path, *, keep: bool = False) -> None:
        """Make the FIFO.

        :param keep: read one that lies there already, with what it still holds, and give it more room where the system
            can; it is for a FIFO that outlives its reader.
        :raises OSError: it cannot be made.
        """
        self.path = path
        self._frames = Frames()
        with contextlib.ExitStack() as undo:
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
            self._inode = os.fstat(self._descriptor).st_ino
            if keep and hasattr(fcntl, "F_SETPIPE_SZ"):
                with contextlib.suppress(OSError):
                    fcntl.fcntl(self._descriptor, fcntl.F_SETPIPE_SZ, _INTAKE_SIZE)
            if name != path:
                name.rename(path)
            undo.pop_all()
        poller.descriptors.update((self._descriptor, self._own_end))
        self._poller = poller

    def start(self, handler: Callable[[Reader], None]) -> None:
        """Call `handler` whenever there is something to read. Only in the selector thread."""
        self._poller.watch(self._descriptor, selectors.EVENT_READ, lambda _: handler(self))

    def read(self) -> list[bytes]:
        """Return frames that have come; a list that may be empty although more is there."""
        try:
            return self._fed(os.read(self._descriptor, _READ_SIZE))
        except BlockingIOError:
            return []

    def drain(self) -> list[bytes]:
        """Return all frames that have come."""
        frames: list[bytes] = []
        with contextlib.suppress(BlockingIOError):
            while True:
                frames += self._fed(os.read(self._descriptor, _READ_SIZE))
        return frames

    def _fed(self, data: bytes) -> list[bytes]:
        before = self._frames.skipped
        frames = self._frames.feed(data)
        if self._frames.skipped > before:
            _LOGGER.warning("%s: skipped %d bytes that are no frame", self.path, self._frames.skipped - before)
        return frames

    def is_in_place(self) -> bool:
        """Say whether the FIFO still has its name."""
        return _is_inode(self.path, self._inode)

    def close(self) -> None:
        """Unlink the FIFO and close it. Only in the selector thread."""
        if self.is_in_place():
            self.path.unlink(missing_ok=True)
        self._poller.release(self._descriptor)
        self._poller.release(self._own_end)


class Writer:
    """The writing end of a FIFO: to one life of its reader, unless it is `persistent`."""

    def __init__(
        self,
        poller: Poller,
        path: Path,
        on_death: Callable[[Writer], None],
        *,
        frames: int = 100_000,
        drops_oldest: bool = False,
        persistent: bool = False,
    ) -> None:
        """Open the FIFO.

        :param on_death: called in the selector thread when the last reader has gone.
        :param frames: how many frames the outbox holds, each of at most ``PIPE_BUF`` bytes.
        :param drops_oldest: whether a full outbox drops its oldest frame, rather than refuse the newest.
        :param persistent: stay open when the reader dies, so that what is in the pipe is there for the next one.
        :raises OSError: ``ENXIO`` or ``ENOENT`` if nobody reads it.
        """
        self.path = path
        self.outbox: deque[bytes] = deque()
        self.dropped = 0
        """How many frames the outbox had no room for."""
        self.dead = False
        self._frames = frames
        self._drops_oldest = drops_oldest
        self._persistent = persistent
        self._on_death = on_death
        self._poller = poller
        self._lock = threading.Lock()
        self._descriptor = _open_for_writing(path)
        self._inode = os.fstat(self._descriptor).st_ino
        poller.descriptors.add(self._descriptor)
        poller.writers.add(self)
        poller.call(self._watch)

    @property
    def is_full(self) -> bool:
        """Whether the pipe did not take the last frame at once."""
        return bool(self.outbox)

    def is_in_place(self) -> bool:
        """Say whether the FIFO still has its name."""
        return _is_inode(self.path, self._inode)

    def send(self, data: bytes) -> None:
        """Write a frame, or put it into the outbox behind those that wait there already.

        :raises BrokenPipeError: nobody reads any more.
        :raises BufferError: the outbox is full.
        """
        with self._lock:
            if self.dead:
                raise BrokenPipeError(f"nobody reads {self.path}")
            was_empty = not self.outbox
            if was_empty:
                try:
                    os.write(self._descriptor, data)
                    return
                except BlockingIOError:
                    pass
                except BrokenPipeError:
                    self.dead = True
                    raise
            if len(self.outbox) >= self._frames:
                if not self._drops_oldest:
                    raise BufferError(f"{self._frames} frames wait for the reader of {self.path}")
                self.dropped += 1
                discard(self.outbox.popleft(), self.path)
            self.outbox.append(data)
            if was_empty:
                self._poller.call(self._watch)

    def close(self) -> None:
        """Close it, and drop what is in the outbox. Only in the selector thread."""
        with self._lock:
            self.dead = True
            if self in self._poller.writers:
                self._poller.writers.discard(self)
                self._poller.release(self._descriptor)
            while self.outbox:
                discard(self.outbox.popleft(), self.path)

    def _watch(self) -> None:
        if self in self._poller.writers:
            events = selectors.EVENT_READ | (selectors.EVENT_WRITE if self.outbox else 0)
            self._poller.watch(self._descriptor, events, self._ready)

    def _ready(self, mask: int) -> None:
        if self not in self._poller.writers:
            return  # Closed by the handler of another event of the same round; the number may be somebody else's now.
        if not mask & selectors.EVENT_READ:
            self._flush()
            return
        with self._lock:
            self.dead = True
        if self._persistent:
            self._poller.watch(self._descriptor, 0, self._ready)
        self._on_death(self)
        if not self._persistent:
            self.close()

    def _flush(self) -> None:
        with self._lock, contextlib.suppress(BlockingIOError, BrokenPipeError):
            while self.outbox:
                batch, size = 0, 0
                while batch < len(self.outbox) and size + len(self.outbox[batch]) <= select.PIPE_BUF:
                    size += len(self.outbox[batch])
                    batch += 1
                os.write(self._descriptor, b"".join(self.outbox[i] for i in range(batch)))
                for _ in range(batch):
                    self.outbox.popleft()
        self._watch()


def knock(path: Path, message: Message) -> bool:
    """Send one small message from a process that has no `Poller`; say whether somebody reads the FIFO and it fitted."""
    data = frame(encode(message))
    with contextlib.suppress(OSError):
        write_once(path, data or b"")
        return data is not None
    return False


def write_once(path: Path, data: bytes) -> None:
    """Open a FIFO, write a frame, and close it.

    :raises OSError: nobody reads it, or the frame does not fit.
    """
    with open(_open_for_writing(path), "wb", buffering=0) as file:
        os.write(file.fileno(), data)


def _open_for_writing(path: Path) -> int:
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


def _not_a_fifo(path: Path) -> discovery.DirectoryRefused:
    return discovery.DirectoryRefused(f"{path} is not a FIFO of this user: remove it.")


def _is_inode(path: Path, inode: int) -> bool:
    try:
        return os.lstat(path).st_ino == inode
    except OSError:
        return False
