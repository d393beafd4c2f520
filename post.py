"""What leaves a communicator: tasks' rings, broadcasts, calls and answers.

Strategy: whatever is sent is written straight from the calling thread. A task's ring, a broadcast and a report go to
the coordinator, and calls and answers straight to whom they are for.

Rules:
- A ring may be lost: whoever comes next finds on the disk what it was for.
- A broadcast that finds no coordinator becomes a file, ``kept_{time}-{uuid}``, for the next one.
- The outcome of a task must outlive whoever sends it: what the pipe does not take at once is a body on the disk first,
  and only the doorbell waits in memory. (Of 4,000 outcomes of 1 kB in flight at once, 54 met a full pipe.)
- A reply pipe whose name is gone (``ENOENT``) may belong to somebody alive who will make it again: the answer becomes a
  body all the same. Where the pipe is there and nobody reads it (``ENXIO``), nobody waits for an answer.
- Whoever waits is answered, also when no descriptor is free, and when the answer cannot be expressed.
- An outcome that can neither be sent nor left is the caller's again, who keeps the task (``claims.py``).
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import kiwipy

if TYPE_CHECKING or not __package__:
    import bodies
    import directories
    import fifo
    import files
    import frames
    import presence
    from calls import Calls, Reply, failure
    from poller import Poller, patient
else:
    from . import bodies, directories, fifo, files, frames, presence
    from .calls import Calls, Reply, failure
    from .poller import Poller, patient

_LOGGER = logging.getLogger(__name__)
_KEPT = 1000


class Kept:
    """The broadcasts that found no coordinator, a file each. It has no state but the disk's."""

    def __init__(self, pipes: Path, ring: Callable[[frames.Message], None]) -> None:
        self._pipes = pipes
        self._ring = ring

    def add(self, text: str) -> None:
        """Keep a broadcast.

        :raises OSError: there is no room.
        """
        self._make_room(1)
        files.write_whole(self._new(time.time_ns()), text.encode())
        self._ring({"type": "kept"})  # A coordinator may have come just now.

    def add_frames(self, left: list[bytes], path: Path, since: int) -> None:
        """Keep the newest of the broadcasts that are in frames for a pipe, or in the bodies that these name.

        :param since: before what comes later, in nanoseconds since the epoch: they are older than what is kept
            meanwhile by those who send.
        """
        old, new = left[:-_KEPT], left[-_KEPT:]
        for data in old:
            bodies.discard(data, path)
        self._say_dropped(len(old))
        self._make_room(len(new))
        for index, data in enumerate(new):
            body, kept = bodies.claimed_body(data, path), self._new(since + index)
            try:
                if body is None:
                    files.write_whole(kept, frames.text(data).encode())
                else:
                    os.rename(body, kept)
            except OSError as error:
                _LOGGER.warning("A broadcast is dropped, since it could neither be sent nor kept: %s", error)
        self._ring({"type": "kept"})

    def _new(self, time_ns: int) -> Path:
        return self._pipes / f"kept_{time_ns:020d}-{uuid.uuid4().hex}"

    def _make_room(self, number: int) -> None:
        kept = sorted(name for name in files.listed(self._pipes) if name.startswith("kept_"))
        excess = max(0, len(kept) + number - _KEPT)
        old = kept[:excess] + [
            name for name in kept[excess:] if files.is_older(self._pipes / name, directories.KEPT_SECONDS)
        ]
        self._say_dropped(sum(files.remove(self._pipes / name) for name in old))

    def _say_dropped(self, count: int) -> None:
        if count:
            _LOGGER.warning("%d broadcasts are dropped: no coordinator took them", count)


class Ways:
    """The ways out of a communicator, one `fifo.Writer` for each pipe. Safe in any thread.

    `_mutex` guards the table, and nothing is sent while it is held.
    """

    def __init__(
        self,
        pipes: Path,
        poller: Poller,
        give_up: Callable[[fifo.Writer, list[bytes]], None],
        on_death: Callable[[fifo.Writer], None],
    ) -> None:
        """
        :param give_up: called in the selector thread with the way to a pipe and the frames that it has not taken.
        :param on_death: called in the selector thread with the way to a pipe that nobody reads any more.
        """
        self._pipes = pipes
        self._poller = poller
        self._give_up = give_up
        self._on_death = on_death
        self._writers: dict[str, fifo.Writer] = {}
        self._mutex = threading.RLock()
        self.closed = False
        self.disowned = False

    def to(self, name: str) -> fifo.Writer | None:
        """Return the way to a pipe; `None` if nobody reads it.

        :raises OSError: it cannot be opened now.
        """
        writer = self._writers.get(name)
        if writer is not None and not writer.dead:
            return writer
        with patient(self._mutex):
            writer = self._writers.get(name)
            if self.closed:
                return None
            if writer is None or writer.dead:
                drops_oldest = name == directories.BROADCAST_INTAKE
                try:
                    writer = fifo.Writer(self._poller, self._pipes / name, self._died, drops_oldest=drops_oldest)
                except OSError as error:
                    if error.errno in (errno.ENXIO, errno.ENOENT):
                        return None
                    raise
                known = self._writers.get(name)
                if known is not None and not known.dead:
                    self._poller.call(writer.close)  # A signal handler, or whom it held up, has opened one meanwhile.
                    return known
                self._writers[name] = writer
            return writer

    def _died(self, writer: fifo.Writer, left: list[bytes]) -> None:
        with patient(self._mutex):
            if self._writers.get(writer.path.name) is writer:
                del self._writers[writer.path.name]
        self._give_up(writer, left)
        self._on_death(writer)

    def look(self) -> None:
        """Say what was dropped. In the selector thread, now and then."""
        with patient(self._mutex):
            writers = list(self._writers.values())
        for writer in writers:
            if writer.dropped:
                count, writer.dropped = writer.dropped, 0
                _LOGGER.warning("%s is not read: %d messages to it were dropped", writer.path, count)

    def close(self) -> None:
        """Close all ways; give up what they have not taken, and say what is dropped. In the selector thread."""
        self.look()
        with patient(self._mutex):
            self.closed = True
            writers, self._writers = list(self._writers.values()), {}
        for writer in writers:
            left = writer.take_back()
            writer.close()
            if directories.is_reply_pipe(writer.path.name):
                # Its reader looks for bodies itself, so what is on the disk is not lost with its doorbell.
                left = [data for data in left if frames.claimed(data) is None]
            if left and writer.path.name != directories.BROADCAST_INTAKE:
                _LOGGER.warning("%s is not read: %d messages to it are dropped", writer.path, len(left))
            self._give_up(writer, left)

    def disown(self) -> None:
        """Lead nowhere, in a forked child."""
        self._mutex = threading.RLock()  # Another thread of the parent may have had it.
        self.closed = self.disowned = True
        self._writers.clear()


class Post:
    """Sends what leaves a communicator. Safe in any thread."""

    def __init__(
        self,
        layout: directories.Layout,
        poller: Poller,
        codec: frames.Codec,
        on_death: Callable[[fifo.Writer], None],
    ) -> None:
        """
        :param on_death: called in the selector thread with the way to a pipe that nobody reads any more.
        """
        self._layout = layout
        self._poller = poller
        self._codec = codec
        self._kept = Kept(layout.pipes, self.ring)
        self.ways = Ways(layout.pipes, poller, self._give_up, on_death)

    def _give_up(self, writer: fifo.Writer, left: list[bytes]) -> None:
        if writer.path.name != directories.BROADCAST_INTAKE:
            for data in left:
                bodies.discard(data, writer.path)
        elif left:
            self._kept.add_frames(left, writer.path, writer.died_at or time.time_ns())

    # To the coordinator

    def ring(self, message: frames.Message) -> None:
        """Tell the coordinator something that it could also read from the disk; do not mind if it does not hear."""
        data = frames.frame(frames.encode(message))
        with contextlib.suppress(OSError, BufferError):
            for _ in range(2):
                writer = self.ways.to(directories.TASKS_INTAKE)
                if writer is not None and data is not None:
                    with contextlib.suppress(BrokenPipeError):
                        writer.send(data)
                        return

    def ring_task(self, key: str, name: str) -> None:
        """Tell the coordinator that a task waits."""
        self.ring({"type": "task", "queue": key, "name": name})

    def broadcast(self, message: frames.Message) -> None:
        """Send a broadcast to the coordinator, or keep it for the next one.

        :raises TypeError: JSON cannot express it.
        :raises OSError: it could neither be sent nor kept.
        """
        text = self._codec.encode(message)
        try:
            self._send_or_keep(text)
        except FileNotFoundError:
            directories.remake(self._layout)
            self._send_or_keep(text)
        except OSError as error:
            if error.errno not in files.NO_DESCRIPTOR:
                raise
            with self._poller.spare_descriptor():
                self._leave_broadcast(text)

    def _send_or_keep(self, text: str) -> None:
        for _ in range(2):
            writer = self.ways.to(directories.BROADCAST_INTAKE)
            if writer is None:
                break
            data = bodies.pack(text, writer.path)
            try:
                writer.send(data)
                return
            except BrokenPipeError:
                bodies.discard(data, writer.path)
        self._kept.add(text)

    def _leave_broadcast(self, text: str) -> None:
        path = self._layout.pipes / directories.BROADCAST_INTAKE
        data = bodies.pack(text, path)
        try:
            fifo.write_once(path, data)
        except OSError:
            bodies.discard(data, path)
            self._kept.add(text)

    # To others

    def call(self, calls: Calls, reply_to: str, recipient: str, body: Any) -> Reply:
        """Send a call straight to its recipient; return the future of the answer.

        :raises kiwipy.UnroutableError: nobody has the identifier.
        :raises kiwipy.CommunicatorClosed: somebody closes.
        :raises kiwipy.DeliveryFailed: its recipient does not read, and too many calls wait for it already.
        :raises TypeError: JSON cannot express the body.
        :raises OSError: it could not be sent.
        """
        route = self._layout.route(recipient)
        # A second time, since the pipe that we know may belong to a life of the recipient that is over.
        for _ in range(2):
            pipe = presence.route_target(route)
            writer = self.ways.to(pipe) if pipe else None
            if writer is None:
                break
            correlation_id, future = calls.expect(writer)
            try:
                text = self._codec.encode(
                    {"to": recipient, "body": body, "reply_to": reply_to, "correlation_id": correlation_id}
                )
                data = bodies.pack(text, writer.path)
                try:
                    writer.send(data)
                    return future
                except (BrokenPipeError, BufferError) as error:
                    bodies.discard(data, writer.path)
                    calls.forget(correlation_id)
                    if isinstance(error, BufferError):
                        raise kiwipy.DeliveryFailed(str(error)) from error
            except BaseException:
                calls.forget(correlation_id)
                raise
        if self.ways.closed:
            raise kiwipy.CommunicatorClosed
        raise kiwipy.UnroutableError(f"no RPC subscriber '{recipient}'")

    def answer(self, reply_to: object, correlation_id: object, **fields: Any) -> None:
        """Send an answer to whoever waits for it."""
        if directories.is_reply_pipe(reply_to):
            self.deliver(reply_to, correlation_id, self.express(correlation_id, fields))

    def express(self, correlation_id: object, fields: dict[str, Any]) -> str:
        """Return the text of an answer. What a user's encoder raises is the answer then.

        :raises BaseException: what is no `Exception`, in the main thread.
        """
        try:
            return self._codec.encode({**fields, "correlation_id": correlation_id})
        except Exception as error:
            return self._excuse(correlation_id, error)
        except BaseException as error:
            if threading.current_thread() is threading.main_thread():
                raise  # It may be a signal handler's, and then it is for whoever was interrupted.
            return self._excuse(correlation_id, error)

    def _excuse(self, correlation_id: object, error: BaseException) -> str:
        why = f"the result cannot be sent: {failure(error)['exception']}"
        return frames.encode({"exception": why, "correlation_id": correlation_id})

    def deliver(self, reply_to: object, correlation_id: object, text: str, *, outlives: bool = False) -> None:
        """Send the text of an answer to whoever waits for it; run no code of a user's.

        :param outlives: it is the outcome of a task: where the pipe does not take it, it goes to the disk.
        :raises OSError: an outcome could neither be sent nor left for a sender that may be there. (There is nobody who
            would send another answer again.)
        """
        if self.ways.disowned or not directories.is_reply_pipe(reply_to):
            return
        try:
            self._deliver(text, str(reply_to), outlives)
        except OSError as error:
            if outlives and not presence.is_there(directories.reply_pid(str(reply_to))):
                return  # Nobody waits.
            if outlives and frames.frame(text) is not None:
                raise  # An excuse would need as much room.
            _LOGGER.error("An answer to %s could not be sent: %s", reply_to, error)
            with contextlib.nullcontext() if outlives else contextlib.suppress(OSError):
                self._deliver(self._excuse(correlation_id, error), str(reply_to), outlives)

    def _deliver(self, text: str, name: str, outlives: bool) -> None:
        try:
            # Again where it has gone, or come back, between two looks: only one that is there and not read is dead.
            for _ in range(3):
                writer = self.ways.to(name)
                if writer is not None:
                    with contextlib.suppress(BrokenPipeError):
                        self._send(text, writer, outlives)
                        return
                elif not os.path.lexists(self._layout.pipes / name):
                    fifo.leave_body(text, self._layout, name)
                    return
        except OSError as error:
            if error.errno in files.NO_DESCRIPTOR:
                with self._poller.spare_descriptor():
                    fifo.leave(text, self._layout, name)
            elif outlives:
                fifo.leave_body(text, self._layout, name)
            else:
                raise

    def _send(self, text: str, writer: fifo.Writer, outlives: bool) -> None:
        data = frames.frame(text)
        if data is not None and writer.offer(data):
            return
        if data is None or outlives:
            data = bodies.pack_body(text, writer.path)
        try:
            writer.send(data)
        except BrokenPipeError:
            bodies.discard(data, writer.path)
            raise
        except BufferError:
            if bodies.claimed_body(data, writer.path) is None:
                bodies.pack_body(text, writer.path)  # It is found when the receiver looks for bodies itself.
