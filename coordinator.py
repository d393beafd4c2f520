#!/usr/bin/env python3
"""`PipeCoordinator`, which shares out tasks and fans out broadcasts, and the command line that runs and inspects it.

Strategy: it keeps the names of tasks in memory and never a body; all it knows can be read again from the disk, so it
may be killed at any instant. It rings a worker to say that a task waits; the worker claims the task by rename(2), and
says what became of it. Two workers rung for one task is normal, since the rename decides.

Rules:
- A worker is rung for at most `_WINDOW` tasks that it has not claimed yet, and for no more than its prefetch.
- A task that was rung at a worker which does not claim it is rung again at one that has nothing to start; the first
  is rung for nothing more until it reports.
- Broadcasts are forwarded undecoded. The registrations that came before one are read before it is fanned out.
- Every ten seconds, in slices, it looks for what no event told it of: drift between memory and disk, what the
  dead left.

This module knows neither kiwipy nor AiiDA, nor what a body says.
"""

from __future__ import annotations

import argparse
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
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING or not __package__:
    import discovery
    import fifo
    import taskqueue
else:
    from . import discovery, fifo, taskqueue

HOUSEKEEPING_SECONDS = 10.0
_BROADCASTS_KEPT_SECONDS = 60.0
_SLICE_SECONDS = 0.005
_WINDOW = 64
_GRACE_SECONDS = 0.05
_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 1.0, 60.0
_OUTBOX_FRAMES = 10_000

_LOGGER = logging.getLogger("coordinator")


class CoordinatorError(RuntimeError):
    """A coordinator could not be started or stopped; the message says why."""


@dataclass
class _Peer:
    """A live worker, and the ways to it."""

    worker: discovery.Worker
    reply: fifo.Writer
    task: fifo.Writer | None = None
    broadcast: fifo.Writer | None = None
    members: dict[str, _Member] = field(default_factory=dict)
    logged_drops: int = 0


@dataclass(eq=False)
class _Member:
    """A worker in one queue."""

    peer: _Peer
    prefetch: int
    rung: dict[str, None] = field(default_factory=dict)
    claimed: set[str] = field(default_factory=set)
    silent: bool = False
    """Whether others were rung for what it did not claim, and it has reported nothing since."""

    def has_capacity(self) -> bool:
        """Say whether it may be rung for one more task."""
        return (
            not self.silent
            and len(self.rung) < _WINDOW
            and (not self.prefetch or len(self.rung) + len(self.claimed) < self.prefetch)
            and self.peer.task is not None
            and not self.peer.task.is_full
        )


@dataclass
class _Rejection:
    """Who rejected a task, and when it is offered to them again."""

    by: set[str] = field(default_factory=set)
    pause: float = _FIRST_PAUSE_SECONDS
    retry_at: float | None = None


class _Queue:
    """What the coordinator knows of one task queue: the names of its tasks, and its members."""

    def __init__(self, key: str, queue: taskqueue.TaskQueue) -> None:
        self.key = key
        self.queue = queue
        self.members: set[_Member] = set()
        self.known: set[str] = set()
        """All names in `_waiting`, `_rung` and `_rejected`, but those that a worker has claimed."""
        self._waiting: list[str] = []
        self._rung: dict[str, tuple[float, list[_Member]]] = {}
        self._rejected: dict[str, _Rejection] = {}
        self._idle: dict[_Member, None] = {}
        self._ready: dict[_Member, None] = {}
        self._outgoing: dict[_Member, list[str]] = {}

    def add(self, name: str) -> None:
        """A task waits."""
        if name not in self.known:
            self.known.add(name)
            heapq.heappush(self._waiting, name)

    def join(self, member: _Member) -> None:
        """A worker subscribes, or subscribes once more."""
        self.members.add(member)
        for rejection in self._rejected.values():
            rejection.by.discard(member.peer.worker.claim)
        self._place(member)

    def leave(self, member: _Member) -> None:
        """A worker is gone: what it was rung for and did not claim waits again."""
        self.members.discard(member)
        self._idle.pop(member, None)
        self._ready.pop(member, None)
        for name in list(member.rung):
            self._unring(member, name)

    def report(self, member: _Member, kind: str, name: str) -> None:
        """A worker says what became of a task it was rung for."""
        member.silent = False
        if kind == "claimed":
            member.claimed.add(name)
            for other in self._rung.pop(name, (0.0, []))[1]:
                other.rung.pop(name, None)
                self._place(other)
            self.known.discard(name)
        elif kind == "done":
            member.claimed.discard(name)
            self._unring(member, name)
            self._rejected.pop(name, None)
        elif kind == "lost":
            self._unring(member, name)
            self._find(name)
        elif kind == "rejected":
            member.claimed.discard(name)
            member.rung.pop(name, None)
            self._rung.pop(name, None)
            self.known.add(name)
            self._rejected.setdefault(name, _Rejection()).by.add(member.peer.worker.claim)
        self._place(member)

    def _find(self, name: str) -> None:
        """Find on the disk who has claimed a task and has not said so: a stopped worker cannot."""
        others = list(self._rung.get(name, (0.0, []))[1])
        if others and not self.queue.is_waiting(name):
            for other in others:
                if os.path.exists(self.queue.file(name, f"claimed/{other.peer.worker.claim}")):
                    other.claimed.add(name)
                self._unring(other, name)
                self._place(other)

    def _unring(self, member: _Member, name: str) -> None:
        member.rung.pop(name, None)
        _, others = self._rung.get(name, (0.0, []))
        if member in others:
            others.remove(member)
            if not others:
                del self._rung[name]
                self.known.discard(name)
                # Whoever has claimed it may have given it back already.
                if self.queue.is_waiting(name):
                    self.add(name)

    def _place(self, member: _Member) -> None:
        self._idle.pop(member, None)
        self._ready.pop(member, None)
        if member in self.members and member.has_capacity():
            (self._ready if member.rung or member.claimed else self._idle)[member] = None

    def _ring(self, member: _Member, name: str) -> None:
        self._rung.setdefault(name, (time.monotonic(), []))[1].append(member)
        member.rung[name] = None
        self._outgoing.setdefault(member, []).append(name)
        self._place(member)

    def dispatch(self) -> float | None:
        """Share out what waits.

        :return: when to look again, if nothing happens before (`time.monotonic`).
        """
        while self._waiting and (self._idle or self._ready):
            self._ring(next(iter(self._idle or self._ready)), heapq.heappop(self._waiting))
        due = [self._offer_rejected(name, rejection) for name, rejection in list(self._rejected.items())]
        due.append(self._ring_again())
        for member, names in self._outgoing.items():
            self._send(member, names)
        self._outgoing.clear()
        return min((at for at in due if at is not None), default=None)

    def _send(self, member: _Member, names: list[str]) -> None:
        data = fifo.frame(fifo.encode({"type": "ring", "queue": self.key, "names": names}))
        if data is None:
            self._send(member, names[: len(names) // 2])
            self._send(member, names[len(names) // 2 :])
        elif member.peer.task is not None:
            # If it has just died, its death gives them back.
            with contextlib.suppress(BrokenPipeError, BufferError):
                member.peer.task.send(data)

    def _offer_rejected(self, name: str, rejection: _Rejection) -> float | None:
        if name not in self.known or name in self._rung:
            return None
        now = time.monotonic()
        if rejection.retry_at is not None and rejection.retry_at <= now:
            rejection.by.clear()
            rejection.retry_at = None
        others = [member for member in self.members if member.peer.worker.claim not in rejection.by]
        if not others:
            if rejection.retry_at is None:
                rejection.retry_at = now + rejection.pause
                rejection.pause = min(2 * rejection.pause, _LONGEST_PAUSE_SECONDS)
            return rejection.retry_at if self.members else None
        rejection.retry_at = None
        for member in others:
            if member.has_capacity():
                self._ring(member, name)
                break
        return None

    def _ring_again(self) -> float | None:
        """Ring at a worker that has nothing to start what another has not claimed for a while."""
        if self._waiting or not self._rung:
            return None
        if not self._idle and not self._ready:
            return None
        oldest = next(iter(self._rung.values()))[0]
        if time.monotonic() - oldest < _GRACE_SECONDS:
            return oldest + _GRACE_SECONDS
        free = [member for member in (*self._idle, *self._ready) if not member.rung]
        for name, (since, others) in list(self._rung.items())[: 4 * _WINDOW]:
            if not free:
                return None
            if time.monotonic() - since < _GRACE_SECONDS:
                return since + _GRACE_SECONDS
            rejection = self._rejected.get(name, _Rejection())
            for member in free:
                if member not in others and member.peer.worker.claim not in rejection.by:
                    for other in others:
                        other.silent = True
                        self._place(other)
                    self._ring(member, name)
                    free.remove(member)
                    break
        return None

    def settle_drift(self) -> Iterator[None]:
        """Compare what is known with the disk, in slices."""
        for name in self.queue.names():
            self.add(name)
            yield
        for member in list(self.members):
            on_disk = set(self.queue.names(f"claimed/{member.peer.worker.claim}"))
            for name in list(member.claimed):
                if not os.path.exists(self.queue.file(name, f"claimed/{member.peer.worker.claim}")):
                    member.claimed.discard(name)
            member.claimed |= on_disk - member.rung.keys()
            member.silent = False
            self._place(member)
            yield
        for name in list(self._rejected):
            if name not in self.known and not any(name in member.claimed for member in self.members):
                del self._rejected[name]


class PipeCoordinator:
    """Shares out tasks and fans out broadcasts for one configuration, until it is told to stop."""

    def __init__(self, profile_name: str, config_path: str | os.PathLike[str]) -> None:
        """
        :raises CoordinatorError: another one runs for this configuration.
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
                for name in queue.queue.names():
                    queue.add(name)
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
            due += [at for queue in list(self._queues.values()) if (at := queue.dispatch()) is not None]
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
            if member is not None:
                for what in ("claimed", "lost", "done", "rejected"):
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
                    claimed = set(queue.queue.names(f"claimed/{peer.worker.claim}"))
                    peer.members[key] = _Member(peer, prefetch, claimed=claimed)
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
                yield from queue.settle_drift()
                for _ in queue.queue.sweep():
                    yield
        for removed in discovery.sweep(self.layout, _BROADCASTS_KEPT_SECONDS):
            if removed:
                _LOGGER.info("Removed %s, which a dead process left", removed)
            yield
        self._write_entry()

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
        raise CoordinatorError(f"a coordinator for {layout.config_path} is running already, with pid {pid}") from None
    os.ftruncate(descriptor, 0)
    os.write(descriptor, str(os.getpid()).encode())
    return descriptor


def start(profile_name: str, config_path: str | os.PathLike[str]) -> int:
    """Start a coordinator in the background, and wait until it serves.

    :return: its pid.
    :raises CoordinatorError: it did not start; the message says why.
    """
    read_end, write_end = os.pipe()
    # Run as a script even from inside a package: it needs nothing of the package, which may be large.
    command = [sys.executable, os.path.abspath(__file__), "--profile", profile_name]
    command += ["--config-path", os.path.abspath(config_path), "--ready-descriptor", str(write_end)]
    with open(read_end) as answer:
        process = subprocess.Popen(
            command,
            pass_fds=(write_end,),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            cwd="/",
        )
        os.close(write_end)
        said = answer.read()
    status = process.wait()
    if not said.startswith("ready "):
        raise CoordinatorError(said or f"the coordinator ended with status {status} before it served")
    return int(said.split()[1])


def stop(config_path: str | os.PathLike[str]) -> int | None:
    """Stop the coordinator of a configuration, and wait until it is gone.

    :return: its pid; `None` if none was running.
    :raises CoordinatorError: it may not be stopped by this user.
    """
    path = Path(os.path.realpath(Path(config_path).expanduser())) / "coordinator" / "coordinator.lock"
    if not path.exists():
        return None
    with open(path) as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return None
        except BlockingIOError:
            pid = int(lock.read() or 0)
        if not pid:
            raise CoordinatorError("the coordinator is just starting: try again")
        try:
            os.kill(pid, signal.SIGTERM)
        except ProcessLookupError:
            pass
        except PermissionError:
            raise CoordinatorError(f"the coordinator (pid {pid}) belongs to another user") from None
        fcntl.flock(lock, fcntl.LOCK_SH)  # The kernel grants it when the coordinator is gone.
        return pid


def status(config_path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read from the disk how things are; the answer is what ``status --json`` prints."""
    layout = discovery.locate(config_path)
    said = discovery.coordinator(layout) if layout else None
    answer: dict[str, Any] = {"running": said is not None, "pid": None, "since": None, "pipes": None}
    if layout is not None:
        answer["pipes"] = str(layout.pipes)
    answer.update({key: said.get(key) for key in ("pid", "since")} if said else {})
    in_hand: dict[str, int] = {}
    counts = {"waiting": 0, "claimed": 0, "completed": 0, "failed": 0}
    for queue in _existing_queues(layout).values():
        counts["waiting"] += sum(1 for _ in queue.names())
        counts["failed"] += sum(1 for _ in queue.names("failed"))
        for name in queue.names("completed"):
            with contextlib.suppress(FileNotFoundError):
                age = time.time() - queue.path(name, "completed").stat().st_mtime
                counts["completed"] += age < taskqueue.COMPLETED_KEPT_SECONDS
        for claim, _ in queue.claimed():
            counts["claimed"] += 1
            in_hand[claim] = in_hand.get(claim, 0) + 1
    answer["tasks"] = counts
    routes: dict[str | None, int] = {}
    for route in layout.pipes.glob("route_*") if layout else ():
        target = discovery.route_target(route)
        routes[target] = routes.get(target, 0) + 1
    dropped = (said or {}).get("dropped") or {}
    answer["workers"] = [
        {
            "worker_id": worker.worker_id,
            "pid": worker.pid,
            "since": worker.since,
            "queues": {_queue_name(key): prefetch for key, prefetch in worker.queues.items()},
            "rpc": routes.get(f"rpc_{worker.worker_id}", 0),
            "broadcast": worker.broadcast,
            "in_hand": in_hand.get(worker.claim, 0),
            "broadcasts_dropped": dropped.get(worker.worker_id, 0),
        }
        for worker in (discovery.workers(layout) if layout else [])
        if layout and worker.is_alive(layout)
    ]
    return answer


def tasks(config_path: str | os.PathLike[str], state: str | None = None) -> list[dict[str, Any]]:
    """List the tasks, oldest first; the answer is what ``tasks --json`` prints.

    A task that moves on meanwhile is listed once, in the state where it was met last.

    :param state: 'waiting', 'claimed', 'completed' or 'failed' (default: all).
    """
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for key, queue in _existing_queues(discovery.locate(config_path)).items():
        for place in ("waiting", "claimed", "completed", "failed"):
            if state not in (None, place):
                continue
            pairs = (
                queue.claimed()
                if place == "claimed"
                else ((None, name) for name in queue.names(place.replace("waiting", "")))
            )
            for claim, name in pairs:
                task_id, _, deaths = name.partition(".")
                row: dict[str, Any] = {
                    "id": task_id,
                    "state": place,
                    "queue": _queue_name(key),
                    "deaths": int(deaths or 0),
                }
                row["worker"] = claim.rpartition(".")[0] if claim else None
                row["reason"] = queue.reason(name) if place == "failed" else None
                rows[key, task_id] = row
    return sorted(rows.values(), key=lambda row: str(row["id"]))


def requeue(config_path: str | os.PathLike[str], task_id: str) -> bool:
    """Move a failed or completed task back to waiting; say whether there was one."""
    layout = discovery.locate(config_path)
    for key, queue in _existing_queues(layout).items():
        name = queue.requeue(task_id)
        if name is not None and layout is not None:
            fifo.knock(layout.pipes / discovery.TASKS_INTAKE, {"type": "task", "queue": key, "name": name})
            return True
    return False


def _existing_queues(layout: discovery.Layout | None) -> dict[str, taskqueue.TaskQueue]:
    directories = taskqueue.queue_directories(layout.queue) if layout and layout.queue.is_dir() else {}
    return {key: taskqueue.TaskQueue(directory, make=False) for key, directory in directories.items()}


def _queue_name(key: str) -> str:
    return key or "default"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="coordinator.py",
        description="Shares out tasks and fans out broadcasts between the processes of one profile. "
        "Without a command it runs in the foreground.",
    )
    parser.add_argument("--profile", required=True, metavar="NAME", help="the profile's name")
    parser.add_argument(
        "--config-path", metavar="DIR", help="the profile's directory (default: ~/.aiida/profiles/NAME)"
    )
    parser.add_argument("--ready-descriptor", type=int, help=argparse.SUPPRESS)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    command = commands.add_parser("start", help="start it in the background, and return when it serves")
    command.add_argument(
        "--foreground", action="store_true", help="stay in the foreground, and log to the terminal too"
    )
    commands.add_parser("stop", help="stop it, and return when it is gone")
    commands.add_parser("restart", help="stop it if it runs, and start it")
    command = commands.add_parser("status", help="say how things are; exit status 0 if it runs, 3 if not")
    command.add_argument("--json", action="store_true", help="print JSON")
    command = commands.add_parser("tasks", help="list the tasks on disk, oldest first")
    command.add_argument("--state", choices=("waiting", "claimed", "completed", "failed"), help="only these")
    command.add_argument("--json", action="store_true", help="print JSON")
    command = commands.add_parser("configure", help="point the AiiDA profile of this name at this broker")
    command.add_argument(
        "--no-autostart", dest="autostart", action="store_false", help="start no coordinator when one is needed"
    )
    command = commands.add_parser("requeue", help="move failed or completed tasks back to waiting")
    command.add_argument("task_ids", nargs="+", metavar="TASK_ID", help="as the command 'tasks' prints it")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    options = _parser().parse_args(arguments)
    config_path = Path(options.config_path or f"~/.aiida/profiles/{options.profile}").expanduser().absolute()
    ready = options.ready_descriptor
    try:
        if options.command is None or (options.command == "start" and options.foreground):
            _run(options.profile, config_path, ready)
        elif options.command == "start":
            print(f"Started the coordinator, pid {start(options.profile, config_path)}.")
        elif options.command == "stop":
            pid = stop(config_path)
            print("The coordinator is not running." if pid is None else f"Stopped the coordinator, pid {pid}.")
        elif options.command == "restart":
            stop(config_path)
            print(f"Restarted the coordinator, pid {start(options.profile, config_path)}.")
        elif options.command == "status":
            return _print_status(status(config_path), options.json)
        elif options.command == "configure":
            _configure(options.profile, options.autostart)
        elif options.command == "tasks":
            _print_tasks(tasks(config_path, options.state), options.json)
        else:
            unknown = [task_id for task_id in options.task_ids if not requeue(config_path, task_id)]
            if unknown:
                raise CoordinatorError(f"no failed or completed task is called {', '.join(unknown)}")
    except (RuntimeError, OSError, ValueError) as error:
        if ready is not None:
            os.write(ready, str(error).encode())
        print(f"coordinator.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def _run(profile_name: str, config_path: Path, ready: int | None) -> None:
    if ready is not None and os.fork():
        os._exit(0)  # So that it is nobody's child: it outlives whoever started it, and whoever kills all its children.
    coordinator = PipeCoordinator(profile_name, config_path)
    log = coordinator.layout.queue / "coordinator.log"
    handlers: list[logging.Handler] = [
        logging.handlers.RotatingFileHandler(log, maxBytes=1_000_000, backupCount=3, delay=True)
    ]
    if ready is None:
        handlers.append(logging.StreamHandler())
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", handlers=handlers)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: coordinator.stop())

    def on_ready() -> None:
        if ready is not None:
            os.write(ready, f"ready {os.getpid()}".encode())
            os.close(ready)

    try:
        coordinator.run(on_ready)
    except Exception:
        _LOGGER.exception("The coordinator ends, because of an error")
        raise


def _configure(profile_name: str, autostart: bool) -> None:
    # The one command that needs AiiDA; nothing else here may, as that takes long to import.
    try:
        if TYPE_CHECKING or not __package__:
            import aiidabroker
        else:
            from . import aiidabroker
        aiidabroker.configure(profile_name, autostart=autostart)
    except ImportError as error:
        raise CoordinatorError(f"AiiDA is not installed here: {error}") from error
    print(f"Profile {profile_name} uses the named pipe broker now. Restart its daemon if it runs.")


def _print_status(answer: dict[str, Any], as_json: bool) -> int:
    if as_json:
        print(json.dumps(answer, indent=1))
    else:
        state = (
            f"running, pid {answer['pid']}, since {_local_time(answer['since'])}"
            if answer["running"]
            else "not running"
        )
        counts = answer["tasks"]
        print(f"Coordinator: {state}")
        print(f"Pipes:       {answer['pipes'] or 'none yet'}")
        print(
            f"Tasks:       {counts['waiting']} waiting, {counts['claimed']} claimed, "
            f"{counts['completed']} completed in the last 24 h, {counts['failed']} failed"
        )
        print(f"Workers:     {len(answer['workers'])}")
        for worker in answer["workers"]:
            queues = ", ".join(f"{name} (prefetch {count or 'unlimited'})" for name, count in worker["queues"].items())
            print(
                f"  {worker['worker_id']}: pid {worker['pid']}, since {_local_time(worker['since'])}, "
                f"tasks: {queues or 'none'}, RPC identifiers: {worker['rpc']}, "
                f"broadcasts: {'yes' if worker['broadcast'] else 'no'} ({worker['broadcasts_dropped']} dropped), "
                f"in hand: {worker['in_hand']}"
            )
    return 0 if answer["running"] else 3


def _print_tasks(rows: list[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    for row in rows:
        details = [f"queue {row['queue']}", f"deaths {row['deaths']}"]
        details += [f"worker {row['worker']}"] if row["worker"] else []
        details += [row["reason"]] if row["reason"] else []
        print(f"{row['id']}  {row['state']:9}  {', '.join(details)}")


def _local_time(seconds: float | None) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds)) if seconds else "?"


if __name__ == "__main__":
    sys.exit(main())
