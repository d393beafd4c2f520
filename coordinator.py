#!/usr/bin/env python3
"""`PipeCoordinator`, which shares out tasks and fans out broadcasts; and the script that runs it.

Strategy: it keeps the names of tasks in memory and never a body; all it knows can be read again from the disk, so it
may be killed at any instant. It rings a worker to say that a task waits; the worker claims the task by rename(2), and
says what became of it. Two workers rung for one task is normal, since the rename decides.

Rules:
- Who is rung for which task is for `scheduler.py` to say.
- Broadcasts are forwarded undecoded. The registrations that came before one are read before it is fanned out.
- Every ten seconds, in slices, it looks for what no event told it of: drift between memory and disk, what the
  dead left.

This module knows neither kiwipy nor AiiDA, nor what a body says; and what an operator asks is answered by `control`.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import heapq
import json
import logging
import logging.handlers
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING or not __package__:
    import discovery
    import fifo
    import scheduler
    import taskqueue
else:
    from . import discovery, fifo, scheduler, taskqueue

HOUSEKEEPING_SECONDS = 10.0
_BROADCASTS_KEPT_SECONDS = 60.0
_SLICE_SECONDS = 0.005
_REPORTS = ("claimed", "lost", "done", "rejected", "returned")
_OUTBOX_FRAMES = 10_000

_LOGGER = logging.getLogger("coordinator")


@dataclass
class _Peer:
    """A live worker, and the ways to it."""

    worker: discovery.Worker
    reply: fifo.Writer
    task: fifo.Writer | None = None
    broadcast: fifo.Writer | None = None
    members: dict[str, scheduler.Member] = field(default_factory=dict)
    logged_drops: int = 0


class _Queue:
    """One queue on the disk and, as long as it has subscribers, the scheduler that shares its tasks out."""

    def __init__(self, key: str, queue: taskqueue.TaskQueue) -> None:
        self.key = key
        self.queue = queue
        self._scheduler: scheduler.Scheduler | None = None

    def join(self, member: scheduler.Member) -> None:
        """A worker subscribes, or does so once more."""
        if self._scheduler is None:
            # Nothing is kept of a queue that is only pulled.
            self._scheduler = scheduler.Scheduler()
            for name in self.queue.names():
                self._scheduler.add(name)
        self._scheduler.join(member)

    def leave(self, member: scheduler.Member) -> None:
        """A worker unsubscribes, or is gone."""
        if self._scheduler is not None:
            self._scheduler.leave(member)
            if not self._scheduler.members:
                self._scheduler = None

    def add(self, name: str) -> None:
        """A task waits."""
        if self._scheduler is not None:
            self._scheduler.add(name)

    def report(self, member: scheduler.Member | None, kind: str, name: str) -> None:
        """A worker, a subscriber or not, says what became of a task."""
        if self._scheduler is None:
            return
        if member is None:
            (self._scheduler.add if kind in ("rejected", "returned") else self._scheduler.withdraw)(name)
        elif kind == "claimed":
            self._scheduler.claimed(member, name)
        elif kind == "done":
            self._scheduler.done(member, name)
        elif kind == "rejected":
            self._scheduler.refuse(member, name)
        elif kind == "returned":
            self._scheduler.give_back(member, name)
        elif kind == "lost" and self._scheduler.lose(member, name) and self.queue.is_waiting(name):
            self._scheduler.add(name)

    def dispatch(self) -> tuple[dict[scheduler.Member, list[str]], float | None]:
        """Return whom to ring for what, and when to look again though nothing happens."""
        return self._scheduler.dispatch(time.monotonic()) if self._scheduler is not None else ({}, None)

    def settle_drift(self, claim: Callable[[scheduler.Member], str]) -> Iterator[None]:
        """Compare what is believed with the disk, in steps.

        :param claim: the name of a member's claim directory.
        """
        if self._scheduler is not None:
            members = list(self._scheduler.members)
            held = ((member, self.queue.names(f"claimed/{claim(member)}")) for member in members)
            yield from self._scheduler.drift(time.monotonic(), self.queue.names(), held)


class PipeCoordinator:
    """Shares out tasks and fans out broadcasts for one configuration, until it is told to stop."""

    def __init__(self, profile_name: str, config_path: str | os.PathLike[str]) -> None:
        """
        :raises discovery.CoordinatorError: another one runs for this configuration.
        :raises discovery.DirectoryRefused: a directory is not safe to use, or cannot be used.
        :raises ValueError: the profile name cannot be used.
        """
        self.profile_name = profile_name
        self.layout = discovery.establish(profile_name, config_path)
        self._lock = _lock(self.layout)
        self._poller = fifo.Poller()
        self._peers: dict[str, _Peer] = {}
        self._queues: dict[str, _Queue] = {}
        self._timers: list[tuple[float, int, Callable[[], None]]] = []
        self._stopping = False
        self._since = time.time()
        self._written = ""

    def run(self, on_ready: Callable[[], None] = lambda: None) -> None:
        """Serve until `stop`.

        :param on_ready: called once it serves.
        """
        try:
            self._start()
            on_ready()
            self._serve()
        finally:
            self._end()

    def stop(self) -> None:
        """End `run` in an orderly way. Safe in any thread, and in a signal handler."""
        self._poller.call(lambda: setattr(self, "_stopping", True))

    def _start(self) -> None:
        self._open_intakes()
        for worker in discovery.workers(self.layout):
            self._meet(worker.worker_id)
        for key, directory in taskqueue.queue_directories(self.layout.queue).items():
            queue = self._queue(key, directory)
            if queue is not None:
                self._recover(queue)
        self._write_entry()
        for name in os.listdir(self.layout.pipes):
            if discovery.is_reply_pipe(name):
                self._greet(self.layout.pipes / name, 0.1)
        _LOGGER.info("Serving %s, pid %d, pipes in %s", self.profile_name, os.getpid(), self.layout.pipes)

    def _greet(self, reply: Path, pause: float) -> None:
        """Tell a communicator that a coordinator is here, even if its pipe is full for now."""
        if not fifo.knock(reply, {"type": "coordinator"}) and discovery.is_alive(reply):
            self._later(pause, functools.partial(self._greet, reply, 2 * pause))

    def _later(self, seconds: float, call: Callable[[], None]) -> None:
        heapq.heappush(self._timers, (time.monotonic() + seconds, id(call), call))

    def _open_intakes(self) -> None:
        self._tasks = fifo.Reader(self._poller, self.layout.pipes / discovery.TASKS_INTAKE, keep=True)
        self._broadcasts = fifo.Reader(self._poller, self.layout.pipes / discovery.BROADCAST_INTAKE, keep=True)
        self._tasks.start(lambda reader: self._on_frames(reader.read()))
        self._broadcasts.start(lambda _: self._fan_out())

    def _serve(self) -> None:
        chores = self._housekeeping()
        next_chores = time.monotonic() + HOUSEKEEPING_SECONDS
        while not self._stopping:
            due = [next_chores, *(timer[0] for timer in self._timers[:1])]
            due += [at for queue in list(self._queues.values()) if (at := self._dispatch(queue)) is not None]
            self._poller.poll(max(0.0, min(due) - time.monotonic()))
            self._run_timers(time.monotonic())
            if next_chores <= time.monotonic():
                end = time.monotonic() + _SLICE_SECONDS
                try:
                    while time.monotonic() < end:
                        next(chores)
                except (StopIteration, OSError) as error:
                    if isinstance(error, OSError):
                        _LOGGER.error("Housekeeping was interrupted: %s", error)
                    chores, next_chores = self._housekeeping(), time.monotonic() + HOUSEKEEPING_SECONDS

    def _dispatch(self, queue: _Queue) -> float | None:
        rings, again = queue.dispatch()
        for member, names in rings.items():
            peer = self._peers.get(member.name)
            if peer is not None and peer.task is not None:
                self._ring(peer.task, queue.key, names)
        return again

    def _ring(self, writer: fifo.Writer, key: str, names: list[str]) -> None:
        data = fifo.frame(fifo.encode({"type": "ring", "queue": key, "names": names}))
        if data is None:
            self._ring(writer, key, names[: len(names) // 2])
            self._ring(writer, key, names[len(names) // 2 :])
        else:
            # If it has just died, its death gives them back.
            with contextlib.suppress(BrokenPipeError, BufferError):
                writer.send(data)

    def _run_timers(self, until: float) -> None:
        due = [timer for timer in self._timers if timer[0] <= until]
        self._timers = [timer for timer in self._timers if timer[0] > until]
        heapq.heapify(self._timers)
        for _, _, call in sorted(due):
            try:
                call()
            except OSError as error:  # No descriptor is free, say; housekeeping looks again.
                _LOGGER.error("What was due could not be done: %s", error)

    def _end(self) -> None:
        with contextlib.suppress(AttributeError):
            self._fan_out()
            self._run_timers(time.monotonic() + HOUSEKEEPING_SECONDS)  # Such as to remove what the dead left.
            self._poller.flush(1.0)
            self._broadcasts.close()
            self._tasks.close()
        for peer in list(self._peers.values()):
            self._close(peer)
        (self.layout.registry / "coordinator.json").unlink(missing_ok=True)
        self._poller.close()
        _LOGGER.info("Stopped")
        # The lock goes with the process, or here where the process goes on.
        os.close(self._lock)

    def _write_entry(self) -> None:
        dropped = {
            worker_id: peer.broadcast.dropped
            for worker_id, peer in self._peers.items()
            if peer.broadcast is not None and peer.broadcast.dropped
        }
        entry = {"pid": os.getpid(), "since": self._since, "pipes": str(self.layout.pipes), "dropped": dropped}
        text = json.dumps({"profile": self.profile_name, **entry}, indent=1)
        if text != self._written or not (self.layout.registry / "coordinator.json").exists():
            discovery.write_whole(self.layout.registry / "coordinator.json", text)
            self._written = text

    # Frames

    def _on_frames(self, frames: list[bytes]) -> None:
        for data in frames:
            try:
                message = fifo.unpack(data, self._tasks.path)
                self._on_message(message)
            except (ValueError, KeyError, TypeError, OSError) as error:
                _LOGGER.warning(
                    "%s: a frame that cannot be used: %s: %s", self._tasks.path, type(error).__name__, error
                )

    def _on_message(self, message: fifo.Message) -> None:
        kind = message["type"]
        if kind == "register":
            self._meet(discovery.check_worker_id(message["worker"]))
            return
        queue = self._queue(message["queue"])
        if kind == "task" and queue is not None and discovery.is_quoted(message["name"]):
            queue.add(message["name"])
        elif kind == "report" and queue is not None:
            peer = self._peers.get(message["worker"])
            member = peer.members.get(queue.key) if peer else None
            for what in _REPORTS:
                for name in filter(discovery.is_quoted, message.get(what, ())):
                    queue.report(member, what, name)
        else:
            raise fifo.Garbage(f"it is no message for the coordinator: {kind!r:.40}")

    def _queue(self, key: str, directory: Path | None = None) -> _Queue | None:
        if key not in self._queues:
            if key and not discovery.is_quoted(key):
                raise fifo.Garbage("it names a queue that cannot be")
            directory = directory or (self.layout.queue / "queues" / key if key else self.layout.queue)
            if not directory.is_dir():
                return None
            self._queues[key] = _Queue(key, taskqueue.TaskQueue(directory))
        return self._queues[key]

    def _fan_out(self) -> None:
        frames = self._broadcasts.read()
        self._on_frames(self._tasks.drain())
        for data in frames:
            for peer in list(self._peers.values()):
                if peer.broadcast is not None:
                    try:
                        peer.broadcast.send(fifo.readdress(data, peer.broadcast.path, self._broadcasts.path))
                    except BrokenPipeError:
                        continue
                    except OSError as error:
                        _LOGGER.error("A broadcast to %s was dropped: %s", peer.worker.worker_id, error)
            fifo.discard(data, self._broadcasts.path)

    # Workers

    def _meet(self, worker_id: str) -> None:
        """Read a worker's entry, and come to know it, know it better, or forget it."""
        peer = self._peers.get(worker_id)
        try:
            worker = discovery.Worker.read(self.layout.entry(worker_id))
        except (OSError, ValueError) as error:
            if not isinstance(error, FileNotFoundError):
                _LOGGER.warning("%s", error)
            elif peer is not None:
                _LOGGER.info("Worker %s (pid %d) left", worker_id, peer.worker.pid)
                self._forget(peer)
            return
        if peer is not None and peer.worker.reply != worker.reply:
            self._died(peer)
            peer = None
        try:
            if peer is None:
                reply = fifo.Writer(self._poller, self.layout.pipes / worker.reply, self._on_death)
                peer = self._peers[worker_id] = _Peer(worker, reply)
                _LOGGER.info("Worker %s (pid %d) came", worker_id, worker.pid)
            peer.worker = worker
            self._connect(peer)
        except OSError as error:
            if error.errno not in (errno.ENXIO, errno.ENOENT):
                _LOGGER.error("Worker %s cannot be reached: %s", worker_id, error)
            elif peer is not None:
                self._died(peer)
            else:
                self._bury(worker)

    def _connect(self, peer: _Peer) -> None:
        worker_id, queues = peer.worker.worker_id, peer.worker.queues
        if queues and peer.task is None:
            peer.task = fifo.Writer(self._poller, self.layout.pipes / f"task_{worker_id}", self._on_death)
        if peer.worker.broadcast and peer.broadcast is None:
            peer.broadcast = fifo.Writer(
                self._poller,
                self.layout.pipes / f"broadcast_{worker_id}",
                self._on_death,
                frames=_OUTBOX_FRAMES,
                drops_oldest=True,
            )
        elif not peer.worker.broadcast and peer.broadcast is not None:
            peer.broadcast.close()
            peer.broadcast = None
        for key in peer.members.keys() - queues.keys():
            self._queues[key].leave(peer.members.pop(key))
        for key, prefetch in queues.items():
            queue = self._queue(key)
            if queue is not None:
                if key not in peer.members:
                    held = set(queue.queue.names(f"claimed/{peer.worker.claim}"))
                    peer.members[key] = scheduler.Member(worker_id, prefetch, held=held)
                peer.members[key].prefetch = prefetch
                queue.join(peer.members[key])

    def _on_death(self, writer: fifo.Writer) -> None:
        for peer in list(self._peers.values()):
            if writer in (peer.reply, peer.task, peer.broadcast):
                if self.layout.entry(peer.worker.worker_id).exists():
                    self._died(peer)
                else:
                    _LOGGER.info("Worker %s (pid %d) left", peer.worker.worker_id, peer.worker.pid)
                    self._forget(peer)

    def _died(self, peer: _Peer) -> None:
        _LOGGER.warning("Worker %s (pid %d) died", peer.worker.worker_id, peer.worker.pid)
        self._forget(peer)
        self._bury(peer.worker)

    def _bury(self, worker: discovery.Worker, pause: float = 0.01) -> None:
        """Give a dead worker's tasks back, and remove what it left.

        A dying process closes its pipes and its lock one by one: look again soon for what was not free yet.
        """
        for queue in list(self._queues.values()):
            self._recover(queue)
        with contextlib.suppress(OSError):
            if discovery.remove_dead(self.layout, worker.worker_id):
                _LOGGER.info("Removed what worker %s left", worker.worker_id)
        claims = [queue.queue.directory / "claimed" / worker.claim for queue in self._queues.values()]
        left = discovery.is_registered(self.layout, worker) or any(claim.exists() for claim in claims)
        if left and pause < HOUSEKEEPING_SECONDS:
            self._later(pause, functools.partial(self._bury, worker, 2 * pause))

    def _recover(self, queue: _Queue) -> None:
        for name, failed in queue.queue.recover(functools.partial(discovery.claim_is_dead, self.layout)):
            if failed is None:
                _LOGGER.warning("Task %s waits again: its worker died", name)
                queue.add(name)
                continue
            reason = queue.queue.reason(name)
            _LOGGER.error("Task %s failed: %s", name, reason)
            if not failed.no_reply and discovery.is_reply_pipe(failed.reply_to):
                answer = {"correlation_id": failed.correlation_id, "exception": reason}
                fifo.knock(self.layout.pipes / str(failed.reply_to), answer)

    def _forget(self, peer: _Peer) -> None:
        for key, member in peer.members.items():
            self._queues[key].leave(member)
        del self._peers[peer.worker.worker_id]
        self._close(peer)

    def _close(self, peer: _Peer) -> None:
        for writer in (peer.reply, peer.task, peer.broadcast):
            if writer is not None:
                writer.close()

    # Housekeeping

    def _housekeeping(self) -> Iterator[None]:
        discovery.remake(self.layout)
        if not (self._tasks.is_in_place() and self._broadcasts.is_in_place()):
            _LOGGER.warning("The coordinator's pipes had vanished and are made again")
            self._open_intakes()
        for worker in discovery.workers(self.layout):
            if worker.worker_id not in self._peers:
                self._meet(worker.worker_id)
            yield
        for peer in list(self._peers.values()):
            self._look_after(peer)
            yield
        for key, directory in taskqueue.queue_directories(self.layout.queue).items():
            queue = self._queue(key, directory)
            if queue is not None:
                self._recover(queue)
                yield from queue.settle_drift(self._claim)
                for _ in queue.queue.sweep():
                    yield
        for removed in discovery.sweep(self.layout, _BROADCASTS_KEPT_SECONDS):
            if removed:
                _LOGGER.info("Removed %s, which a dead process left", removed)
            yield
        self._write_entry()

    def _claim(self, member: scheduler.Member) -> str:
        peer = self._peers.get(member.name)
        return peer.worker.claim if peer is not None else ""

    def _look_after(self, peer: _Peer) -> None:
        worker = peer.worker
        if (worker.queues and peer.task is None) or (worker.broadcast and peer.broadcast is None):
            self._meet(peer.worker.worker_id)  # There was no descriptor for it when it came.
        writers = [writer for writer in (peer.reply, peer.task, peer.broadcast) if writer is not None]
        in_place = all(writer.is_in_place() for writer in writers)
        if not in_place or (worker.rpc and not discovery.is_alive(self.layout.pipes / f"rpc_{worker.worker_id}")):
            _LOGGER.warning("Pipes of worker %s have vanished or were replaced", peer.worker.worker_id)
            with contextlib.suppress(BrokenPipeError, BufferError):
                peer.reply.send(fifo.frame(fifo.encode({"type": "restore"})) or b"")
        if peer.broadcast is not None and peer.broadcast.dropped > peer.logged_drops:
            count = peer.broadcast.dropped - peer.logged_drops
            _LOGGER.warning("Worker %s does not read: %d broadcasts to it were dropped", peer.worker.worker_id, count)
            peer.logged_drops = peer.broadcast.dropped


def _lock(layout: discovery.Layout) -> int:
    descriptor = os.open(layout.queue / "coordinator.lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        pid = os.read(descriptor, 20).decode() or "?"
        os.close(descriptor)
        message = f"a coordinator for {layout.config_path} is running already, with pid {pid}"
        raise discovery.CoordinatorError(message) from None
    os.ftruncate(descriptor, 0)
    os.write(descriptor, str(os.getpid()).encode())
    return descriptor


def serve(profile_name: str, config_path: Path, ready: int | None = None) -> None:
    """Serve in the foreground until SIGTERM or SIGINT.

    :param ready: a descriptor for whoever waits in another process; this one then goes to the background. It is told
        ``ready {pid}``, or why it does not serve, and is closed.
    :raises discovery.CoordinatorError: another one runs for this configuration.
    """
    waiting = [] if ready is None else [ready]

    def say(text: str) -> None:
        # Once, as its number may be another file's afterwards; and whoever waited may be gone.
        while waiting:
            descriptor = waiting.pop()
            with contextlib.suppress(BrokenPipeError):
                os.write(descriptor, text.encode())
            os.close(descriptor)

    try:
        if ready is not None and os.fork():
            os._exit(0)  # It is nobody's child: it outlives whoever started it, and whoever kills all its children.
        coordinator = PipeCoordinator(profile_name, config_path)
        _log_to(coordinator.layout.queue / "coordinator.log", terminal=ready is None)
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: coordinator.stop())
        try:
            coordinator.run(lambda: say(f"ready {os.getpid()}"))
        except Exception:
            _LOGGER.exception("The coordinator ends, because of an error")
            raise
    except (RuntimeError, OSError, ValueError) as error:
        say(str(error))
        raise


def _log_to(file: Path, *, terminal: bool) -> None:
    handlers: list[logging.Handler] = [
        logging.handlers.RotatingFileHandler(file, maxBytes=1_000_000, backupCount=3, delay=True)
    ]
    if terminal:
        handlers.append(logging.StreamHandler())
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", handlers=handlers)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    # Not at the top: it is no part of what serves. It is told how to serve, since what runs as a script is called
    # `__main__`, and importing it by its name would load it a second time.
    if TYPE_CHECKING or not __package__:
        import control
    else:
        from . import control
    return control.main(arguments, serve)


if __name__ == "__main__":
    sys.exit(main())
