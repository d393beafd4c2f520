"""The workers that the coordinator knows, and the queues in which it shares out tasks among them.

Strategy: a worker is met when its registry entry is read, and it is known as long as somebody reads its reply pipe, to
which the coordinator holds a writing end. That pipe's death is the event to look; the lock of the worker's id is the
proof, and a dying process lets go of both one by one. So the suspects of some milliseconds are tried together, and who
still holds the lock is tried again soon.

Rules:
- The coordinator keeps the names of tasks, never bodies, and of a queue to which nobody subscribes not even those.
- A report counts for the life that made it: it carries the name of its reply pipe.
- Whatever is not said here is found by housekeeping: an entry that was not read, a death that was not seen.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import logging
import os
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING or not __package__:
    import bodies
    import burial
    import directories
    import fifo
    import frames
    import presence
    import taskqueue
    from members import Member
    from poller import Poller
    from scheduler import Scheduler
else:
    from . import bodies, burial, directories, fifo, frames, presence, taskqueue
    from .members import Member
    from .poller import Poller
    from .scheduler import Scheduler

_LOGGER = logging.getLogger("coordinator")
_OUTBOX_FRAMES = 10_000
_COLLECT_SECONDS = 0.005
_LONGEST_PAUSE_SECONDS = 10.0
_REPORTS = ("claimed", "lost", "done", "rejected", "returned")


@dataclass(eq=False)
class Peer:
    """A live worker, and the ways to it."""

    worker: presence.Worker
    reply: fifo.Writer
    task: fifo.Writer | None = None
    broadcast: fifo.Writer | None = None
    members: dict[str, Member] = field(default_factory=dict)
    logged_drops: int = 0

    def writers(self) -> list[fifo.Writer]:
        """Return the ways."""
        return [writer for writer in (self.reply, self.task, self.broadcast) if writer is not None]


class Queue:
    """One queue that has subscribers: on the disk, and the scheduler that shares its tasks out."""

    def __init__(self, key: str, queue: taskqueue.TaskQueue) -> None:
        self.key = key
        self.queue = queue
        self.due: float | None = None
        """When it is looked at again though nothing happens."""
        self.scheduler = Scheduler()
        self._lost: dict[tuple[Member, str], int] = {}
        """How often since the last look a worker found gone what waits all the same."""
        for name in queue.names():
            self.scheduler.add(name)

    def report(self, member: Member | None, kind: str, name: str) -> None:
        """A worker, a subscriber or not, says what became of a task."""
        if member is None:
            if kind in ("rejected", "returned"):
                self.scheduler.add(name)
            elif kind != "lost":  # That is said of a ring, which nobody remembers.
                self.scheduler.withdraw(name)
        elif kind == "claimed":
            self.scheduler.claimed(member, name)
        elif kind == "done":
            self.scheduler.done(member, name)
        elif kind == "rejected":
            self.scheduler.refuse(member, name)
        elif kind == "returned":
            self.scheduler.give_back(member, name)
        elif kind == "lost" and self.scheduler.lose(member, name) and self.queue.is_waiting(name):
            # Somebody may have given it back; but whoever cannot claim what waits is not to be rung for it for ever.
            self._lost[member, name] = losses = self._lost.get((member, name), 0) + 1
            if losses > 1:
                self.scheduler.refuse(member, name)
            else:
                self.scheduler.add(name)

    def drift(self) -> Iterator[None]:
        """Compare what is believed with the disk, in steps; who could not claim something may try again."""
        for member, name in self._lost:
            self.scheduler.forgive(member, [name])
        self._lost.clear()
        return self.scheduler.drift(time.monotonic(), self.queue.names(), self._held())

    def _held(self) -> Iterator[tuple[Member, list[str]]]:
        for member in list(self.scheduler.members):
            try:
                yield member, list(self.queue.names(f"claimed/{member.name}"))
            except OSError as error:
                _LOGGER.error("What worker %s has claimed cannot be listed: %s", member.name, error)


class Queues:
    """The queues that have subscribers, and what each is to ring next. It lives in the coordinator's thread."""

    def __init__(self, layout: directories.Layout, poller: Poller) -> None:
        self._layout = layout
        self._poller = poller
        self._queues: dict[str, Queue] = {}
        self._touched: dict[Queue, None] = {}

    def get(self, key: object) -> Queue | None:
        """Return a queue, in which something has happened; `None` if nobody subscribes to it.

        :raises frames.Garbage: there cannot be one.
        """
        if not isinstance(key, str) or (key and not directories.is_quoted(key)):
            raise frames.Garbage("it names a queue that cannot be")
        queue = self._queues.get(key)
        if queue is not None:
            self._touched[queue] = None
        return queue

    def add(self, key: str, name: str) -> None:
        """A task waits."""
        queue = self.get(key)
        if queue is not None:
            queue.scheduler.add(name)

    def join(self, key: str, member: Member) -> None:
        """A worker subscribes to a queue, or does so once more.

        :raises OSError: the queue cannot be read, or made where somebody has removed it.
        """
        queue = self.get(key)
        if queue is None:
            on_disk = taskqueue.TaskQueue(self._layout.queue_directory(key))
            on_disk.make()
            queue = self._queues[key] = Queue(key, on_disk)
            self._touched[queue] = None
        queue.scheduler.join(member)

    def leave(self, key: str, member: Member) -> None:
        """A worker unsubscribes from a queue, or is gone."""
        queue = self.get(key)
        if queue is not None:
            queue.scheduler.leave(member)
            if not queue.scheduler.members:
                del self._queues[key]

    def dispatch(self, ring: Callable[[str, Queue, list[str]], None]) -> None:
        """Share out what waits in the queues in which something has happened.

        :param ring: called with a worker id, a queue and names.
        """
        # What is touched stays so until it can be shared out.
        if not self._touched or os.path.lexists(self._layout.paused):
            return
        touched, self._touched = self._touched, {}
        for queue in touched:
            rings, again = queue.scheduler.dispatch(time.monotonic())
            for member, names in rings.items():
                ring(member.name, queue, names)
            if again is not None and (queue.due is None or again < queue.due):
                queue.due = again
                self._poller.later(max(0.0, again - time.monotonic()), functools.partial(self._look, queue))

    def _look(self, queue: Queue) -> None:
        queue.due = None
        self._touched[queue] = None

    def look(self) -> Iterator[None]:
        """Compare each queue with the disk, and remove what is old in it, in steps."""
        for key, directory in self._layout.queues():
            try:
                yield from self._look_at(key, directory)
            except OSError as error:
                _LOGGER.error("A queue could not be looked at: %s", error)

    def _look_at(self, key: str, directory: Path) -> Iterator[None]:
        queue = self._queues.get(key)
        if queue is not None:
            try:
                yield from queue.drift()
            finally:
                self._touched[queue] = None
        for _ in taskqueue.TaskQueue(directory).sweep():
            yield


class Suspects:
    """Those who may be dead, until they are buried or it shows that they live. It lives in the coordinator's thread."""

    def __init__(self, layout: directories.Layout, poller: Poller, queues: Queues, known: Collection[str]) -> None:
        """
        :param known: the ids of the workers that are known to live.
        """
        self._layout = layout
        self._poller = poller
        self._queues = queues
        self._known = known
        self._by_pause: dict[float, set[str]] = {}
        """By how many seconds to wait before they are tried."""
        self._undertaker = burial.Undertaker(layout)

    def add(self, worker_id: str, pause: float = _COLLECT_SECONDS) -> None:
        """Somebody may be dead."""
        together = self._by_pause.setdefault(pause, set())
        if not together:
            self._poller.later(pause, functools.partial(self._try, pause))
        together.add(worker_id)

    def _try(self, pause: float) -> None:
        suspects = self._by_pause.pop(pause, set())
        self._take(burial.bury(self._layout, suspects))
        for worker_id in suspects:
            left = worker_id not in self._known and self._layout.lock(worker_id).exists()
            if left and pause < _LONGEST_PAUSE_SECONDS:
                self.add(worker_id, 2 * pause)

    def bury(self) -> None:
        """Bury those of them who are dead."""
        for pause in list(self._by_pause):
            self._try(pause)

    def bury_all(self) -> None:
        """Bury whoever is dead, whether or not anything tells of it."""
        self._take(self._undertaker.round())

    def _take(self, buried: burial.Buried) -> None:
        for key, name in buried.tasks:
            self._queues.add(key, name)
        for worker_id in buried.worker_ids:
            _LOGGER.info("Removed what worker %s left", worker_id)


class Peers:
    """The workers that are known. It lives in the coordinator's thread."""

    def __init__(self, layout: directories.Layout, poller: Poller, queues: Queues) -> None:
        self._layout = layout
        self._poller = poller
        self._queues = queues
        self._peers: dict[str, Peer] = {}
        self.suspects = Suspects(layout, poller, queues, self._peers)

    def meet(self, worker_id: str, *, more: bool = False) -> None:
        """Read a worker's entry, and come to know it, know it better, or forget it.

        :param more: it has a task subscriber more, who may take what others there have refused.
        """
        peer = self._peers.get(worker_id)
        try:
            worker = presence.Worker.read(self._layout.entry(worker_id))
        except FileNotFoundError:
            if peer is not None:
                self._left(peer)
            return
        except (OSError, ValueError) as error:
            _LOGGER.warning("%s", error)
            return
        if peer is not None and peer.worker.reply != worker.reply:
            self._died(peer)
            peer = None
        try:
            if peer is None:
                peer = Peer(worker, self._writer(worker.reply, worker_id))
                self._peers[worker_id] = peer
                _LOGGER.info("Worker %s (pid %d) came", worker_id, worker.pid)
            peer.worker = worker
            self._connect(peer, more)
        except OSError as error:
            if error.errno not in (errno.ENXIO, errno.ENOENT):
                _LOGGER.error("Worker %s cannot be reached: %s", worker_id, error)
            elif peer is None:
                self.suspects.add(worker_id)

    def _writer(self, name: str, worker_id: str, **options: Any) -> fifo.Writer:
        on_death = functools.partial(self._on_death, worker_id)
        return fifo.Writer(self._poller, self._layout.pipes / name, on_death, **options)

    def _connect(self, peer: Peer, more: bool) -> None:
        """Open the ways that are missing, or whose pipe was made again, and join the queues."""
        queues, before = peer.worker.queues, peer.task
        peer.task = self._way(peer, "task", before, bool(queues))
        peer.broadcast = self._way(
            peer, "broadcast", peer.broadcast, peer.worker.broadcast, limit=_OUTBOX_FRAMES, drops_oldest=True
        )
        if peer.broadcast is None:
            peer.logged_drops = 0
        # What it was rung for by a way that is gone waits again.
        self._leave(peer, [key for key in peer.members if key not in queues or peer.task is not before])
        for key, prefetch in queues.items() if peer.task is not None else ():
            try:
                self._join(peer, key, prefetch, more)
            except OSError as error:
                # One bad queue keeps nobody from the others.
                _LOGGER.error("Worker %s cannot join queue '%s': %s", peer.worker.worker_id, key or "default", error)

    def _way(self, peer: Peer, kind: str, old: fifo.Writer | None, wanted: bool, **options: Any) -> fifo.Writer | None:
        """Return the way to a pipe of a worker's: the one there is or, where the pipe was made again, a new one.

        As long as the new one is not there the old one is kept: its reader may live, and read it.
        """
        if old is not None and not wanted:
            old.close()
        if not wanted or (old is not None and not old.dead and old.is_in_place()):
            return old if wanted else None
        try:
            new = self._writer(f"{kind}_{peer.worker.worker_id}", peer.worker.worker_id, **options)
        except OSError as error:
            if error.errno not in (errno.ENXIO, errno.ENOENT):
                _LOGGER.error("Worker %s cannot be reached: %s", peer.worker.worker_id, error)
            return old
        if old is not None:
            new.dropped = old.dropped
            with contextlib.suppress(BrokenPipeError):
                for data in old.take_back():
                    new.send(data)
            old.close()
        return new

    def _join(self, peer: Peer, key: str, prefetch: int, more: bool) -> None:
        member = peer.members.get(key)
        if member is not None and member.prefetch == prefetch and not more:
            return
        if member is None:
            worker_id = peer.worker.worker_id
            queue = taskqueue.TaskQueue(self._layout.queue_directory(key))
            member = Member(worker_id, held=set(queue.names(f"claimed/{worker_id}")))
        member.prefetch = prefetch
        self._queues.join(key, member)
        peer.members[key] = member

    def _leave(self, peer: Peer, keys: list[str]) -> None:
        for key in keys:
            self._queues.leave(key, peer.members.pop(key))

    def _forget(self, peer: Peer) -> None:
        self._leave(peer, list(peer.members))
        del self._peers[peer.worker.worker_id]
        for writer in peer.writers():
            writer.close()

    def _on_death(self, worker_id: str, writer: fifo.Writer, left: list[bytes]) -> None:
        for data in left:
            bodies.discard(data, writer.path)
        peer = self._peers.get(worker_id)
        if peer is None or writer not in peer.writers():
            return
        if self._layout.entry(peer.worker.worker_id).exists():
            self._died(peer)
        else:
            self._left(peer)

    def _left(self, peer: Peer) -> None:
        _LOGGER.info("Worker %s (pid %d) left", peer.worker.worker_id, peer.worker.pid)
        self._forget(peer)
        self.suspects.add(peer.worker.worker_id)  # It may be killed on its way out.

    def _died(self, peer: Peer) -> None:
        _LOGGER.warning("Worker %s (pid %d) died", peer.worker.worker_id, peer.worker.pid)
        self._forget(peer)
        self.suspects.add(peer.worker.worker_id)

    # What comes and goes

    def report(self, message: frames.Message) -> None:
        """Take a report.

        :raises frames.Garbage: it is none.
        """
        queue, peer = self._queues.get(message.get("queue")), self._peers.get(str(message.get("worker")))
        if queue is None:
            return
        if peer is not None and message.get("reply") not in (None, peer.worker.reply):
            peer = None
        member = peer.members.get(queue.key) if peer is not None else None
        for kind in _REPORTS:
            names = message.get(kind) or []
            if not isinstance(names, list):
                raise frames.Garbage(f"its {kind!r} is no list")
            for name in filter(directories.is_quoted, names):
                queue.report(member, kind, str(name))

    def ring(self, worker_id: str, queue: Queue, names: list[str]) -> None:
        """Tell a worker that tasks wait."""
        peer = self._peers.get(worker_id)
        if peer is None or peer.task is None:
            return
        data = frames.frame(frames.encode({"type": "ring", "queue": queue.key, "names": names}))
        if data is None:
            self.ring(worker_id, queue, names[: len(names) // 2])
            self.ring(worker_id, queue, names[len(names) // 2 :])
        else:
            # If it has just died, its death gives them back.
            with contextlib.suppress(BrokenPipeError, BufferError):
                peer.task.send(data)

    def fan_out(self, data: bytes, source: Any, sent: float | None = None) -> None:
        """Forward a broadcast to all who listen.

        :param source: the path of the pipe that it is in, or for.
        :param sent: when it was sent, in seconds since the epoch: those who listen only since then do not get it.
        """
        for peer in list(self._peers.values()):
            since = peer.worker.listens_since
            # A clock that was set back leaves entries from the future.
            if peer.broadcast is not None and (sent is None or since <= sent or since > time.time()):
                try:
                    peer.broadcast.send(bodies.readdress(data, peer.broadcast.path, source))
                except BrokenPipeError:
                    continue
                except OSError as error:
                    _LOGGER.error("A broadcast to %s was dropped: %s", peer.worker.worker_id, error)
        bodies.discard(data, source)

    def dropped(self) -> dict[str, int]:
        """Return how many broadcasts were dropped for whom, as he does not read."""
        counts = {}
        for worker_id, peer in self._peers.items():
            if peer.broadcast is not None and peer.broadcast.dropped:
                counts[worker_id] = peer.broadcast.dropped
        return counts

    def look(self) -> Iterator[None]:
        """Find who came or died without our hearing of it, in steps."""
        for worker in presence.workers(self._layout):
            peer = self._peers.get(worker.worker_id)
            if peer is None or peer.worker != worker or self._lacks_a_way(peer):
                self.meet(worker.worker_id)
            yield
        for peer in list(self._peers.values()):
            if not self._layout.entry(peer.worker.worker_id).exists() and not peer.reply.is_in_place():
                self.suspects.add(peer.worker.worker_id)
            self._say_drops(peer)
            yield
        self.suspects.bury_all()

    def _lacks_a_way(self, peer: Peer) -> bool:
        return (
            bool(peer.worker.queues and peer.task is None)
            or (peer.worker.broadcast and peer.broadcast is None)
            or peer.members.keys() != peer.worker.queues.keys()
            or not all(writer.is_in_place() for writer in peer.writers()[1:])
        )

    def _say_drops(self, peer: Peer) -> None:
        if peer.broadcast is not None and peer.broadcast.dropped > peer.logged_drops:
            count = peer.broadcast.dropped - peer.logged_drops
            _LOGGER.warning("Worker %s does not read: %d broadcasts to it were dropped", peer.worker.worker_id, count)
            peer.logged_drops = peer.broadcast.dropped

    def close(self) -> None:
        """Close all ways, and say which broadcasts are dropped with them."""
        for peer in list(self._peers.values()):
            left = peer.broadcast.waiting if peer.broadcast is not None else 0
            if left:
                _LOGGER.warning("%d broadcasts to %s are dropped: it does not read", left, peer.worker.worker_id)
            for writer in peer.writers():
                writer.close()
        self._peers.clear()
