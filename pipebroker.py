"""`PipeCommunicator`, a `kiwipy.Communicator` on named pipes, and its task queues.

Strategy: the disk holds the truth, and the pipes are doorbells. A task is a file from before `task_send` returns until
it is done; a frame only says "look". RPC and replies go straight from process to process; only tasks to be shared out
and broadcasts to be fanned out pass the coordinator.

Rules:
- One selector thread does all reading and flushing and never runs user code. Task subscribers run on one thread, RPC
  and broadcast subscribers on another, callbacks of futures on a third; each is started when it is first needed. So a
  subscriber may block, and may wait for a reply on the same communicator.
- Whatever is sent is written straight from the calling thread.
- The threads hold the `_Engine` and never the `PipeCommunicator`, so that garbage collection can close it.
- A forked child finds its copy closed, without any trace in the parent.

Frames that a communicator sends and receives, by pipe (``fifo.py`` says what a frame is):

    coordinator_tasks       {"type": "task", "queue", "name"}            a task waits
                            {"type": "register", "worker"}               read my registry entry
                            {"type": "report", "worker", "queue", "claimed" | "done" | "lost" | "rejected": [names]}
    coordinator_broadcast   {"body", "sender", "subject", "correlation_id"}, and the same to broadcast_{worker}
    task_{worker}           {"type": "ring", "queue", "names"}           these tasks wait; claim them
    rpc_{worker}            {"to", "body", "reply_to", "correlation_id"}
    reply_{pid}_{uuid}      {"correlation_id", "result" | "exception" | "cancelled" | "pending" | "undelivered"}
                            {"type": "coordinator"}                      a coordinator has started
                            {"type": "restore"}                          your pipes have lost their names
"""

from __future__ import annotations

import atexit
import concurrent.futures
import contextlib
import errno
import functools
import inspect
import itertools
import logging
import os
import queue
import threading
import time
import traceback
import uuid
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import kiwipy

if TYPE_CHECKING or not __package__:
    import discovery
    import fifo
    import taskqueue
else:
    from . import discovery, fifo, taskqueue

__all__ = ("DEFAULT_QUEUE", "PipeCommunicator", "PipeIncomingTask", "PipeTaskQueue")

DEFAULT_QUEUE = "kiwipy.tasks"
"""The name by which `PipeCommunicator.task_queue` gives the default queue, as in ``kiwipy.rmq.defaults``."""
BROADCASTS_KEPT_SECONDS = 60.0
_FLUSH_SECONDS = 5.0
_REPORT_SECONDS = 0.02
_REPORT_NAMES = min(16, fifo.LARGEST_TEXT // 150)

_LOGGER = logging.getLogger(__name__)


class RemoteTraceback(Exception):
    """The traceback of a subscriber's exception, as the ``__cause__`` of the `kiwipy.RemoteException`."""

    def __str__(self) -> str:
        return f'\n"""\n{self.args[0]}"""'


class _Reply(concurrent.futures.Future[Any]):
    """A future whose callbacks run on a thread of their own, since they are user code."""

    def __init__(self, lane: _Lane) -> None:
        super().__init__()
        self._lane = lane

    def add_done_callback(self, fn: Callable[[concurrent.futures.Future[Any]], Any]) -> None:
        self._lane.start()
        super().add_done_callback(lambda future: self._lane.put(functools.partial(fn, future)))


@dataclass
class _Call:
    """What a correlation id stands for: the future that awaits the next reply."""

    future: _Reply
    writer: fifo.Writer | None
    """The way to the recipient of an RPC, whose death ends the call."""
    level: int = 0
    """How many futures the recipient has answered with; a task that runs a second time may repeat them."""


def failure(error: BaseException) -> dict[str, Any]:
    """Return the fields of a reply that carry an exception."""
    return {"exception": str(error), "traceback": "".join(traceback.format_exception(error))}


class _Lane:
    """A thread that runs jobs one after the other."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._jobs: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._mutex = threading.Lock()
        self._busy = False
        self._ended = False
        self._stopped = False

    def start(self) -> None:
        """Start the thread, where that has not been done; in whoever is about to need it, who can be told.

        :raises RuntimeError: the system has no room for another thread.
        """
        with self._mutex:
            if self._thread is None and not self._ended:
                thread = threading.Thread(target=self._run, name=self._name, daemon=True)
                thread.start()
                self._thread = thread

    def put(self, job: Callable[[], object]) -> None:
        """Run a job after those that wait."""
        if self._ended:
            job()
        else:
            self._jobs.put(job)

    def is_empty(self) -> bool:
        """Say whether no job waits."""
        return self._jobs.empty()

    def stop(self) -> None:
        """Start no job any more."""
        with self._mutex:
            self._stopped = True
        self._jobs.put(None)

    def finish(self) -> None:
        """Run the jobs that wait and then end; jobs that come later run where they come from."""
        with self._mutex:
            self._ended = self._thread is None
        if not self._ended:
            self._jobs.put(self._end)

    def _end(self) -> None:
        self._ended = True
        self._jobs.put(None)  # What came in between is done first.

    def join(self) -> None:
        """After `stop` or `finish`, wait for the thread's end, but not for user code that may take any time."""
        with self._mutex:
            waits = self._thread and self._thread is not threading.current_thread() and not self._busy
        if self._thread and waits:
            self._thread.join(_FLUSH_SECONDS)

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            with self._mutex:
                if self._stopped:
                    return
                self._busy = True
            try:
                job()
            except BaseException:
                _LOGGER.exception("Error in %s", self._name)
            del job  # It may hold the last reference to a communicator.
            self._busy = False


@dataclass
class _Side:
    """A communicator's side of one task queue."""

    key: str
    queue: taskqueue.TaskQueue
    prefetch: int
    subscribers: dict[str, Callable[..., Any]] = field(default_factory=dict)
    claims: taskqueue.Claims | None = None


class _Engine:
    """All of a communicator that its threads know."""

    def __init__(
        self,
        profile_name: str,
        config_path: str | os.PathLike[str],
        worker_id: str | None,
        prefetch: int,
        encoder: Callable[[Any], Any] | None,
        decoder: Callable[[dict[str, Any]], Any] | None,
        fsync: bool,
    ) -> None:
        self.worker_id = discovery.check_worker_id(worker_id or f"{os.getpid()}-{uuid.uuid4().hex[:12]}")
        self.layout = discovery.establish(profile_name, config_path)
        self.closed = False
        self.facade: Callable[[], PipeCommunicator | None] = lambda: None
        self.rpc: dict[str, Callable[..., Any]] = {}
        self.broadcast: dict[str, Callable[..., Any]] = {}
        self._since = time.time()
        self._claim = f"{self.worker_id}.{uuid.uuid4().hex}"
        self._encode = fifo.encoder(encoder)
        self._decoder = decoder
        self._fsync = fsync
        self._mutex = threading.RLock()
        self._calls: dict[str, _Call] = {}
        self._correlation = itertools.count(1)
        self._writers: dict[str, fifo.Writer] = {}
        self._readers: dict[str, list[fifo.Reader]] = {}
        self._held: deque[tuple[float, bytes]] = deque()
        self._held_mutex = threading.Lock()
        self._reports: dict[str, dict[str, list[str]]] = {}
        self._unreported = 0
        self._report_at: float | None = None
        self._is_worker = False
        self._done = False
        self._gone = False
        self.tasks = _Lane(f"pipebroker tasks {self.worker_id}")
        self._messages = _Lane(f"pipebroker messages {self.worker_id}")
        self._callbacks = _Lane(f"pipebroker callbacks {self.worker_id}")
        self._reply_name = discovery.reply_pipe()
        self._handlers: dict[str, Callable[[fifo.Reader, list[bytes]], None]] = {
            "task": self._on_ring,
            "rpc": functools.partial(self._on_message, self._serve_rpc),
            "broadcast": functools.partial(self._on_message, self._serve_broadcast),
            "reply": self._on_reply,
        }
        self.sides: dict[str, _Side] = {}
        self._poller = fifo.Poller()
        _engines.add(self)
        try:
            self.side("", prefetch)
            self._open_pipe("reply", self._reply_name)
            if worker_id is not None:
                self._become_worker()
            self._thread = threading.Thread(target=self._run, name=f"pipebroker {self.worker_id}", daemon=True)
            self._thread.start()
        except BaseException:
            _engines.discard(self)
            self.closed = self._done = True
            self._tear_down()
            raise

    # Subscriptions

    def side(self, key: str, prefetch: int) -> _Side:
        """Return this communicator's side of a queue."""
        with self._mutex:
            if key not in self.sides:
                directory = self.layout.queue / "queues" / key if key else self.layout.queue
                self.sides[key] = _Side(key, taskqueue.TaskQueue(directory, fsync=self._fsync), prefetch)
            return self.sides[key]

    def add_task(self, side: _Side, subscriber: Callable[..., Any], identifier: Any) -> Any:
        """Subscribe to a task queue."""
        with self._mutex, self._adding(side.subscribers, subscriber, identifier, "Task") as identifier:
            self.tasks.start()
            self.hold(side)
            self._open_pipe("task")
            self._register()
            return identifier

    def remove_task(self, side: _Side, identifier: Any) -> None:
        """Unsubscribe from a task queue."""
        with self._mutex:
            self._remove(side.subscribers, identifier, "task")
            if not side.subscribers:
                self._register()

    def add_rpc(self, subscriber: Callable[..., Any], identifier: Any) -> Any:
        """Subscribe to the calls for an identifier."""
        with self._mutex, self._adding(self.rpc, subscriber, identifier, "RPC") as identifier:
            self._messages.start()
            self._become_worker()
            if self._open_pipe("rpc"):
                self._register()
            if not discovery.claim_route(self.layout, str(identifier), self.worker_id):
                raise kiwipy.DuplicateSubscriberIdentifier(f"RPC identifier '{identifier}'")
            return identifier

    def remove_rpc(self, identifier: Any) -> None:
        """Unsubscribe from the calls for an identifier."""
        with self._mutex:
            self._remove(self.rpc, identifier, "RPC")
            discovery.release_route(self.layout, str(identifier), self.worker_id)

    def add_broadcast(self, subscriber: Callable[..., Any], identifier: Any) -> Any:
        """Subscribe to all broadcasts."""
        with self._mutex, self._adding(self.broadcast, subscriber, identifier, "Broadcast") as identifier:
            self._messages.start()
            if len(self.broadcast) == 1:
                self._become_worker()
                self._open_pipe("broadcast")
                self._register()
            return identifier

    def remove_broadcast(self, identifier: Any) -> None:
        """Unsubscribe from broadcasts."""
        with self._mutex:
            self._remove(self.broadcast, identifier, "broadcast")
            if not self.broadcast:
                self._register()

    @contextlib.contextmanager
    def _adding(self, subscribers: dict[str, Any], subscriber: Any, identifier: Any, kind: str) -> Iterator[Any]:
        """Add a subscriber, and take it out again if what has to follow fails."""
        self.ensure_open()
        if not callable(subscriber):
            raise TypeError(f"the subscriber must be callable, not {subscriber!r}")
        identifier = uuid.uuid4().hex if identifier in (None, "") else identifier
        if str(identifier) in subscribers:
            raise kiwipy.DuplicateSubscriberIdentifier(f"{kind} identifier '{identifier}'")
        subscribers[str(identifier)] = subscriber
        try:
            yield identifier
        except BaseException:
            del subscribers[str(identifier)]
            raise

    def _remove(self, subscribers: dict[str, Any], identifier: Any, kind: str) -> None:
        self.ensure_open()
        if subscribers.pop(str(identifier), None) is None:
            raise ValueError(f"unknown {kind} subscriber '{identifier}'")

    def hold(self, side: _Side) -> taskqueue.Claims:
        """Return what this communicator holds of a queue."""
        with self._mutex:
            self.ensure_open()
            self._become_worker()
            if side.claims is None:
                side.claims = taskqueue.Claims(side.queue, self._claim)
            return side.claims

    def _become_worker(self) -> None:
        if self._is_worker:
            return
        with discovery.exclusive(self.layout.registry):
            if not discovery.remove_dead_locked(self.layout, self.worker_id):
                raise kiwipy.DuplicateSubscriberIdentifier(f"worker id '{self.worker_id}' is taken by a live worker")
            self._is_worker = True
            self._register()
        for key, directory in taskqueue.queue_directories(self.layout.queue).items():
            self.recover(key, taskqueue.TaskQueue(directory), dying=self.worker_id)

    def _register(self) -> None:
        # What has no pipe yet is registered once it has one.
        sides = self.sides.values() if "task" in self._readers else ()
        discovery.Worker(
            worker_id=self.worker_id,
            pid=os.getpid(),
            since=self._since,
            reply=self._reply_name,
            claim=self._claim,
            queues={side.key: side.prefetch for side in sides if side.subscribers},
            rpc="rpc" in self._readers,
            broadcast=bool(self.broadcast) and "broadcast" in self._readers,
        ).register(self.layout)
        self._ring({"type": "register", "worker": self.worker_id})

    def _open_pipe(self, kind: str, name: str | None = None) -> bool:
        if kind in self._readers:
            return False
        self._add_reader(kind, name or f"{kind}_{self.worker_id}")
        return True

    def _add_reader(self, kind: str, name: str) -> None:
        reader = fifo.Reader(self._poller, self.layout.pipes / name)
        self._readers.setdefault(kind, []).append(reader)
        handler = self._handlers[kind]
        self._poller.call(lambda: reader.start(lambda ready: handler(ready, ready.read())))

    # Sending

    def send_task(self, side: _Side, body: Any, no_reply: bool) -> _Reply | None:
        """Put a task on the disk and ring the coordinator."""
        self.ensure_open()
        correlation_id = None if no_reply else f"{next(self._correlation):x}"
        text = self._encode(
            {
                "body": body,
                "no_reply": bool(no_reply),
                "reply_to": None if no_reply else self._reply_name,
                "correlation_id": correlation_id,
            }
        )
        future = None if correlation_id is None else self._expect(correlation_id, None)
        task_id = taskqueue.new_id()
        try:
            side.queue.put(task_id, text, lambda: self.ring_task(side.key, task_id))
        except BaseException:
            self._calls.pop(correlation_id or "", None)
            raise
        return future

    def send_rpc(self, recipient: Any, body: Any) -> _Reply:
        """Send a call straight to its recipient."""
        self.ensure_open()
        try:
            route = self.layout.route(str(recipient))
        except ValueError as error:
            raise kiwipy.UnroutableError(f"no RPC subscriber can be called '{recipient}': {error}") from None
        correlation_id = f"{next(self._correlation):x}"
        text = self._encode(
            {"to": str(recipient), "body": body, "reply_to": self._reply_name, "correlation_id": correlation_id}
        )
        # A second time, since the pipe that we know may belong to a life of the recipient that is over.
        for _ in range(2):
            pipe = discovery.route_target(route)
            writer = self._writer(pipe) if pipe else None
            if writer is None:
                break
            data = fifo.pack(text, writer.path)
            future = self._expect(correlation_id, writer)
            try:
                writer.send(data)
                return future
            except (BrokenPipeError, BufferError) as error:
                self._calls.pop(correlation_id, None)
                fifo.discard(data, writer.path)
                if isinstance(error, BufferError):
                    raise kiwipy.DeliveryFailed(str(error)) from error
        raise kiwipy.UnroutableError(f"no RPC subscriber '{recipient}'")

    def send_broadcast(self, body: Any, sender: Any, subject: Any, correlation_id: Any) -> None:
        """Send a broadcast to the coordinator, or keep it for the next one."""
        self.ensure_open()
        text = self._encode({"body": body, "sender": sender, "subject": subject, "correlation_id": correlation_id})
        data = fifo.pack(text, self.layout.pipes / discovery.BROADCAST_INTAKE)
        with self._held_mutex:
            if not self._held and self._forward(data):
                return
            self._held.append((time.monotonic() + BROADCASTS_KEPT_SECONDS, data))
        self._poller.call(self._expire_held)

    def _forward(self, data: bytes) -> bool:
        with contextlib.suppress(OSError):
            writer = self._writer(discovery.BROADCAST_INTAKE)
            if writer is not None:
                writer.send(data)
                return True
        return False

    def ring_task(self, key: str, name: str) -> None:
        """Tell the coordinator that a task waits."""
        self._ring({"type": "task", "queue": key, "name": name})

    def _ring(self, message: fifo.Message) -> None:
        data = fifo.frame(fifo.encode(message))
        # Nobody there, or no room: the next coordinator, or this one's next housekeeping, finds it on the disk.
        for _ in range(2):
            with contextlib.suppress(OSError, BufferError):
                writer = self._writer(discovery.TASKS_INTAKE)
                if writer is not None and data is not None:
                    writer.send(data)
                return

    def _writer(self, name: str) -> fifo.Writer | None:
        """Return the way to a pipe; `None` if nobody reads it."""
        writer = self._writers.get(name)
        if writer is not None and not writer.dead:
            return writer
        with self._mutex:
            path, kept = self.layout.pipes / name, name == discovery.BROADCAST_INTAKE
            writer = self._writers.get(name)
            # A dead one that is kept waits for the next coordinator's greeting.
            if (writer is None or (writer.dead and not kept)) and not self._gone:
                try:
                    writer = fifo.Writer(self._poller, path, self._on_death, drops_oldest=kept, persistent=kept)
                except OSError as error:
                    if error.errno in (errno.ENXIO, errno.ENOENT):
                        return None
                    raise
                self._writers[name] = writer
            return None if self._gone else writer

    def _expect(self, correlation_id: str, writer: fifo.Writer | None) -> _Reply:
        future = _Reply(self._callbacks)
        self._calls[correlation_id] = _Call(future, writer)
        if self.closed:
            self._calls.pop(correlation_id, None)
            raise kiwipy.CommunicatorClosed
        return future

    def _reply(self, reply_to: object, correlation_id: object, **answer: Any) -> None:
        if not discovery.is_reply_pipe(reply_to):
            return
        name = str(reply_to)
        try:
            text = self._encode({"correlation_id": correlation_id, **answer})
        except Exception as error:
            text = fifo.encode({"correlation_id": correlation_id, "exception": f"the result cannot be sent: {error}"})
        for _ in range(2):
            try:
                writer = self._writer(name)
                if writer is not None:
                    writer.send(fifo.pack(text, writer.path))
                return
            except BrokenPipeError:
                continue
            except (OSError, BufferError) as error:
                if getattr(error, "errno", None) in (errno.EMFILE, errno.ENFILE) and self._reply_with_spare(text, name):
                    return
                _LOGGER.error("A reply to %s was dropped: %s", name, error)
                text = fifo.encode(
                    {"correlation_id": correlation_id, "exception": f"the result cannot be sent: {error}"}
                )

    def _reply_with_spare(self, text: str, name: str) -> bool:
        """Answer although this process has no free descriptor: whoever waits would otherwise wait for ever."""
        path = self.layout.pipes / name
        with self._poller.spare_descriptor(), contextlib.suppress(OSError):
            fifo.write_once(path, fifo.pack(text, path))
            return True
        return False

    # The selector thread

    def _run(self) -> None:
        while not self._done:
            # Read once: another thread that sends the reports resets it at any time.
            report_at = self._report_at
            due = [self._held[0][0]] if self._held else []
            due += [report_at] if report_at is not None else []
            self._poller.poll(max(0.0, min(due) - time.monotonic()) if due else None)
            if self._held:
                self._expire_held()
            if report_at is not None and report_at <= time.monotonic():
                self._send_reports()
        self._tear_down()

    def _on_ring(self, reader: fifo.Reader, frames: list[bytes]) -> None:
        for message in self._unpacked(reader, frames):
            side, names = self.sides.get(str(message.get("queue"))), message.get("names")
            if side is not None and isinstance(names, list):
                for name in names:
                    if discovery.is_quoted(name):
                        self.tasks.put(functools.partial(self._work, side, name))
                self._report_soon()
            else:
                _LOGGER.warning("%s: a frame that is no ring", reader.path)

    def _on_message(self, serve: Callable[[fifo.Message], None], reader: fifo.Reader, frames: list[bytes]) -> None:
        for data in frames:
            self._messages.put(functools.partial(self._serve, serve, reader, data))

    def _serve(self, serve: Callable[[fifo.Message], None], reader: fifo.Reader, data: bytes) -> None:
        for message in self._unpacked(reader, [data]):
            serve(message)

    def _unpacked(self, reader: fifo.Reader, frames: list[bytes]) -> Iterator[fifo.Message]:
        for data in frames:
            try:
                yield fifo.unpack(data, reader.path)
            except (fifo.Garbage, OSError) as error:
                _LOGGER.warning("%s: a frame that cannot be read: %s", reader.path, error)

    def _on_reply(self, reader: fifo.Reader, frames: list[bytes]) -> None:
        for message in self._unpacked(reader, frames):
            if message.get("type") == "coordinator":
                self._release_held()
            elif message.get("type") == "restore":
                self._restore()
            else:
                self._resolve(message)

    def _resolve(self, message: fifo.Message) -> None:
        correlation_id = str(message.get("correlation_id"))
        call = self._calls.pop(correlation_id, None)
        if call is None:
            return
        with contextlib.suppress(concurrent.futures.InvalidStateError):
            if "result" in message:
                try:
                    call.future.set_result(self._decode(message["result"]))
                except concurrent.futures.InvalidStateError:
                    raise
                except Exception as error:
                    call.future.set_exception(error)
            elif "exception" in message:
                remote = kiwipy.RemoteException(message["exception"])
                if message.get("traceback"):
                    remote.__cause__ = RemoteTraceback(message["traceback"])
                call.future.set_exception(remote)
            elif "undelivered" in message:
                call.future.set_exception(kiwipy.UnroutableError(message["undelivered"]))
            elif "cancelled" in message:
                call.future.cancel()
                call.future.set_running_or_notify_cancel()
            elif isinstance(message.get("pending"), int):
                following = call
                if message["pending"] > call.level:
                    following = _Call(_Reply(self._callbacks), call.writer, message["pending"])
                self._calls[correlation_id] = following
                if following is not call:
                    call.future.set_result(following.future)
            else:
                self._calls[correlation_id] = call
                _LOGGER.warning("A reply of no known kind: %s", sorted(message))

    def _on_death(self, writer: fifo.Writer) -> None:
        if writer.path.name == discovery.BROADCAST_INTAKE:
            self._keep(writer)
            if discovery.is_alive(writer.path):
                self._release_held()
            return
        if self._writers.get(writer.path.name) is writer:
            del self._writers[writer.path.name]
        if writer.path.name.startswith("rpc_"):
            # What the recipient wrote before it died is in our pipe by now.
            for reader in self._readers["reply"]:
                self._on_reply(reader, reader.drain())
            for correlation_id, call in list(self._calls.items()):
                if call.writer is writer:
                    self._calls.pop(correlation_id, None)
                    with contextlib.suppress(concurrent.futures.InvalidStateError):
                        call.future.set_exception(
                            kiwipy.DeliveryFailed("the recipient died or closed before it answered")
                        )

    def _keep(self, writer: fifo.Writer) -> None:
        with self._held_mutex:
            deadline = time.monotonic() + BROADCASTS_KEPT_SECONDS
            self._held.extendleft((deadline, data) for data in reversed(writer.outbox))
            writer.outbox.clear()

    def _release_held(self) -> None:
        """There is a coordinator: open its pipe anew, and send what was kept for it."""
        old = self._writers.get(discovery.BROADCAST_INTAKE)
        if old is not None and old.dead:
            self._keep(old)
            with self._mutex:
                del self._writers[discovery.BROADCAST_INTAKE]
            # The old one stays open until there is a new one: an unread pipe that nobody holds open loses its bytes.
            self._writer(discovery.BROADCAST_INTAKE)
            old.close()
        with self._held_mutex:
            while self._held and self._forward(self._held[0][1]):
                self._held.popleft()

    def _expire_held(self) -> None:
        with self._held_mutex:
            while self._held and self._held[0][0] <= time.monotonic():
                fifo.discard(self._held.popleft()[1], self.layout.pipes / discovery.BROADCAST_INTAKE)
                _LOGGER.warning("A broadcast was dropped: no coordinator for %d seconds", BROADCASTS_KEPT_SECONDS)

    def _restore(self) -> None:
        """Make again what somebody removed from the pipes directory."""
        with self._mutex:
            discovery.remake(self.layout)
            for kind, readers in list(self._readers.items()):
                if not readers[-1].is_in_place():
                    _LOGGER.warning("%s had vanished and is made again", readers[-1].path)
                    # The old one stays open: those who have opened it go on writing to it.
                    self._add_reader(kind, readers[-1].path.name)
            for identifier in self.rpc:
                discovery.claim_route(self.layout, identifier, self.worker_id)
            if self._is_worker:
                self._register()

    # The subscribers' threads

    def _work(self, side: _Side, name: str) -> None:
        subscribers = list(side.subscribers.values())
        if not subscribers or side.claims is None:
            self._report(side, "lost", name)
            return
        try:
            task = side.claims.take(name)
        except taskqueue.Unreadable as error:
            _LOGGER.error("Task %s failed: %s", name, error)
            self._report(side, "done", name)
        except OSError as error:
            _LOGGER.error("Task %s could not be read and waits again: %s", name, error)
            self._report(side, "rejected", name)
        else:
            self._report(side, "lost" if task is None else "claimed", name)
            if task is not None:
                self._offer(side, task, iter(subscribers))

    def _offer(self, side: _Side, task: taskqueue.Task, subscribers: Iterator[Callable[..., Any]]) -> None:
        for subscriber in subscribers:
            communicator = self.facade()
            if communicator is None:
                return
            try:
                outcome = subscriber(communicator, self._decode(task.body))
            except kiwipy.TaskRejected:
                continue
            except kiwipy.CancelledError:
                return
            except BaseException as error:
                _LOGGER.exception("A task subscriber raised for task %s", task.name)
                self._settle(side, task, **failure(error))
                return
            if isinstance(outcome, kiwipy.Future):
                self._follow(side, task, outcome, subscribers, 1)
            else:
                self._settle(side, task, result=outcome)
            return
        if side.claims is not None and side.claims.settle(task.name, lambda: None, ""):
            self._report(side, "rejected", task.name)

    def _follow(
        self,
        side: _Side,
        task: taskqueue.Task,
        future: kiwipy.Future,
        subscribers: Iterator[Callable[..., Any]],
        level: int,
    ) -> None:
        if not task.no_reply:
            self._reply(task.reply_to, task.correlation_id, pending=level)

        def done(future: kiwipy.Future) -> None:
            try:
                outcome = future.result()
            except kiwipy.CancelledError:
                return  # It stays claimed until the communicator closes.
            except kiwipy.TaskRejected:
                self.tasks.put(functools.partial(self._offer, side, task, subscribers))
            except BaseException as error:
                self._settle(side, task, **failure(error))
            else:
                if isinstance(outcome, kiwipy.Future):
                    self._follow(side, task, outcome, subscribers, level + 1)
                else:
                    self._settle(side, task, result=outcome)

        future.add_done_callback(done)

    def _settle(self, side: _Side, task: taskqueue.Task, **answer: Any) -> None:
        if self.settle(side, task, **answer):
            self._report(side, "done", task.name)

    def settle(self, side: _Side, task: taskqueue.Task, **answer: Any) -> bool:
        """Send a task's outcome, and then move it to ``completed/``."""

        def reply() -> None:
            if not task.no_reply:
                self._reply(task.reply_to, task.correlation_id, **answer)

        return side.claims is not None and side.claims.settle(task.name, reply)

    def _report(self, side: _Side, kind: str, name: str) -> None:
        """Tell the coordinator what became of a task: soon, or at once where it may have another for us."""
        with self._mutex:
            self._reports.setdefault(side.key, {}).setdefault(kind, []).append(name)
            self._unreported += 1
            if self._unreported < _REPORT_NAMES and (kind == "claimed" or not self.tasks.is_empty()):
                if self._report_at is None:
                    self._poller.call(self._report_soon)
                return
        self._send_reports()

    def _report_soon(self) -> None:
        if self._report_at is None:
            self._report_at = time.monotonic() + _REPORT_SECONDS

    def _send_reports(self) -> None:
        with self._mutex:
            reports, self._reports = self._reports, {}
            self._unreported, self._report_at = 0, None
        for key, names in reports.items():
            self._ring({"type": "report", "worker": self.worker_id, "queue": key, **names})

    def _serve_rpc(self, message: fifo.Message) -> None:
        reply_to, correlation_id = message.get("reply_to"), message.get("correlation_id")
        subscriber, communicator = self.rpc.get(str(message.get("to"))), self.facade()
        if subscriber is None or communicator is None or "body" not in message:
            self._reply(reply_to, correlation_id, undelivered=f"no RPC subscriber '{message.get('to')}'")
            return
        try:
            outcome = subscriber(communicator, self._decode(message["body"]))
        except BaseException as error:
            self._reply(reply_to, correlation_id, **failure(error))
        else:
            self._answer(reply_to, correlation_id, outcome, 1)

    def _answer(self, reply_to: object, correlation_id: object, outcome: Any, level: int) -> None:
        if not isinstance(outcome, kiwipy.Future):
            self._reply(reply_to, correlation_id, result=outcome)
            return
        self._reply(reply_to, correlation_id, pending=level)

        def done(future: kiwipy.Future) -> None:
            try:
                result = future.result()
            except kiwipy.CancelledError as error:
                self._reply(reply_to, correlation_id, cancelled=str(error))
            except BaseException as error:
                self._reply(reply_to, correlation_id, **failure(error))
            else:
                self._answer(reply_to, correlation_id, result, level + 1)

        outcome.add_done_callback(done)

    def _serve_broadcast(self, message: fifo.Message) -> None:
        if "body" not in message:
            _LOGGER.warning("A broadcast without a body: %s", sorted(message))
            return
        fields = [message.get(key) for key in ("sender", "subject", "correlation_id")]
        for subscriber in list(self.broadcast.values()):
            communicator = self.facade()
            if communicator is None:
                return
            try:
                outcome = subscriber(communicator, self._decode(message["body"]), *fields)
                if inspect.iscoroutine(outcome):
                    # kiwipy's RabbitMQ communicator takes coroutine functions here, and only here.
                    import asyncio

                    asyncio.run(outcome)
            except BaseException:
                _LOGGER.exception("A broadcast subscriber raised")

    def _decode(self, value: Any) -> Any:
        # Only for what is the user's: json's own hook would be called for the envelope too.
        if self._decoder is None:
            return value
        if isinstance(value, list):
            return [self._decode(item) for item in value]
        if isinstance(value, dict):
            return self._decoder({key: self._decode(item) for key, item in value.items()})
        return value

    # Pulling tasks

    def recover(self, key: str, task_queue: taskqueue.TaskQueue, dying: str | None = None) -> None:
        """Give back the tasks of dead workers, and tell the coordinator, or the sender of one given up on."""
        for name, failed in task_queue.recover(functools.partial(discovery.claim_is_dead, self.layout), dying):
            if failed is None:
                self.ring_task(key, name)
            elif not failed.no_reply:
                self._reply(failed.reply_to, failed.correlation_id, exception=task_queue.reason(name))

    def pull(self, side: _Side) -> Iterator[taskqueue.Task]:
        """Claim waiting tasks, oldest first, until there are none that have not been offered."""
        claims = self.hold(side)
        self.recover(side.key, side.queue)
        seen: set[str] = set()
        while names := sorted(set(side.queue.names()) - seen):
            for name in names:
                seen.add(name)
                self.ensure_open()
                with contextlib.suppress(taskqueue.Unreadable):
                    task = claims.take(name)
                    if task is not None:
                        yield taskqueue.Task(
                            task.name, self._decode(task.body), task.no_reply, task.reply_to, task.correlation_id
                        )

    def give_back(self, side: _Side, name: str) -> None:
        """Let a held task wait again."""
        if side.claims is not None and side.claims.settle(name, lambda: None, ""):
            self.ring_task(side.key, name)

    # The end

    def ensure_open(self) -> None:
        """:raises kiwipy.CommunicatorClosed: it is closed."""
        if self.closed:
            raise kiwipy.CommunicatorClosed

    def close_soon(self) -> None:
        """Close in the selector thread; safe to be called by the garbage collector in any thread."""
        if not self.closed:
            self.closed = True
            self._poller.call(self._stop)

    def close(self) -> None:
        """Close, and wait until it is done."""
        self.close_soon()
        if threading.current_thread() is not self._thread:
            self._thread.join()
            for lane in (self.tasks, self._messages, self._callbacks):
                lane.join()

    def abandon(self) -> None:
        """Close the descriptors of a forked child's copy, and touch nothing that the parent uses."""
        if not self.closed or not self._done:
            self.closed = self._done = True
            self._poller.close()
            for side in self.sides.values():
                if side.claims is not None:
                    os.close(side.claims.descriptor)

    def _stop(self) -> None:
        self._done = True

    def _tear_down(self) -> None:
        # From the outside in: first nobody gives us anything more, then we give back, then we vanish.
        # Without our mutex: a thread that settles a task holds the mutex of its claims, and then wants ours.
        for step in (self._leave, functools.partial(self._poller.flush, _FLUSH_SECONDS), self._close_pipes):
            try:
                step()
            except Exception:
                _LOGGER.exception("Closing %s went wrong", self.worker_id)
        self._fail_calls()
        self.tasks.stop()
        self._messages.stop()
        self._callbacks.finish()

    def _leave(self) -> None:
        with self._mutex:
            identifiers = list(self.rpc)  # Whoever was about to subscribe has done so now, and nobody can any more.
        for identifier in identifiers:
            discovery.release_route(self.layout, identifier, self.worker_id)
        if self._is_worker:
            self.layout.entry(self.worker_id).unlink(missing_ok=True)
            self._ring({"type": "register", "worker": self.worker_id})
        for side in self.sides.values():
            for name in side.claims.close() if side.claims is not None else []:
                self.ring_task(side.key, name)

    def _close_pipes(self) -> None:
        with self._mutex:
            self._gone = True
        for writer in list(self._poller.writers):
            writer.close()
        for readers in self._readers.values():
            for reader in readers:
                reader.close()
        self._poller.close()
        names = {reader.path.name for readers in self._readers.values() for reader in readers}
        with contextlib.suppress(FileNotFoundError):  # Somebody may have removed the directory.
            for name in os.listdir(self.layout.pipes) if self._is_worker else []:
                if discovery.body_receiver(name) in names:
                    (self.layout.pipes / name).unlink(missing_ok=True)

    def _fail_calls(self) -> None:
        while self._calls:
            _, call = self._calls.popitem()
            with contextlib.suppress(concurrent.futures.InvalidStateError):
                call.future.set_exception(kiwipy.CommunicatorClosed())


_engines: weakref.WeakSet[_Engine] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    for engine in list(_engines):
        engine.close()


def _abandon_copies() -> None:
    for engine in list(_engines):
        engine.abandon()


os.register_at_fork(after_in_child=_abandon_copies)


class PipeCommunicator(kiwipy.Communicator):  # type: ignore[misc]
    """A `kiwipy.Communicator` on named pipes: what ``kiwipy.rmq.RmqThreadCommunicator`` is on RabbitMQ.

    It is thread-safe, and a context manager. It needs no running coordinator to be made, to send tasks (they wait on
    the disk) or for RPC; only tasks that are to reach a subscriber and broadcasts need one.
    """

    def __init__(
        self,
        profile_name: str,
        config_path: str | os.PathLike[str],
        worker_id: str | None = None,
        *,
        task_prefetch_count: int = 0,
        encoder: Callable[[Any], Any] | None = None,
        decoder: Callable[[dict[str, Any]], Any] | None = None,
        fsync: bool = True,
    ) -> None:
        """
        :param profile_name: the name of the profile; it names the pipes directory.
        :param config_path: the profile's configuration directory; all who name the same one talk to each other.
        :param worker_id: a name of letters, digits, '.', '_' and '-', for the log and the registry (default: made up).
        :param task_prefetch_count: how many tasks of the default queue this communicator holds at once (0: no limit).
        :param encoder: the ``default`` of `json.dumps`, called for what JSON cannot express.
        :param decoder: the ``object_hook`` of `json.loads`, called for each JSON object in a body or result.
        :param fsync: whether `task_send` waits until the task would survive a loss of power.
        :raises ValueError: a name cannot be used.
        :raises discovery.DirectoryRefused: a directory is not safe to use, or cannot be used.
        :raises kiwipy.DuplicateSubscriberIdentifier: a live worker has this id.
        """
        self._engine = _Engine(profile_name, config_path, worker_id, task_prefetch_count, encoder, decoder, fsync)
        self._engine.facade = weakref.ref(self)
        weakref.finalize(self, self._engine.close_soon).atexit = False

    def __str__(self) -> str:
        return f"PipeCommunicator({self._engine.worker_id}, {self._engine.layout.pipes})"

    @property
    def worker_id(self) -> str:
        """The name under which the registry knows this communicator."""
        return self._engine.worker_id

    def is_closed(self) -> bool:
        """Return whether the communicator was closed."""
        return self._engine.closed

    def close(self) -> None:
        """Send what was accepted, give unfinished tasks back, and remove the pipes, routes and registry entry.

        Futures that are still pending get `kiwipy.CommunicatorClosed`. A subscriber that is running is not waited for.
        """
        self._engine.close()

    def add_rpc_subscriber(self, subscriber: Callable[..., Any], identifier: Any = None) -> Any:
        """Answer the calls for an identifier with ``subscriber(communicator, body)``.

        :param identifier: of any type, compared as `str` (default: made up).
        :return: the identifier.
        :raises kiwipy.DuplicateSubscriberIdentifier: a live communicator of this configuration has it.
        """
        return self._engine.add_rpc(subscriber, identifier)

    def remove_rpc_subscriber(self, identifier: Any) -> None:
        """Stop answering the calls for an identifier.

        :raises ValueError: there is no such subscriber.
        """
        self._engine.remove_rpc(identifier)

    def add_task_subscriber(self, subscriber: Callable[..., Any], identifier: Any = None) -> Any:
        """Work on tasks of the default queue with ``subscriber(communicator, body)``.

        If it returns a future, the task is held until that future is done. If it raises `kiwipy.TaskRejected`, the task
        goes to the next subscriber, then to the next worker.

        :return: the identifier.
        :raises kiwipy.DuplicateSubscriberIdentifier: a subscriber of this communicator has it.
        """
        return self._engine.add_task(self._engine.sides[""], subscriber, identifier)

    def remove_task_subscriber(self, identifier: Any) -> None:
        """Stop working on tasks of the default queue.

        :raises ValueError: there is no such subscriber.
        """
        self._engine.remove_task(self._engine.sides[""], identifier)

    def add_broadcast_subscriber(self, subscriber: Callable[..., Any], identifier: Any = None) -> Any:
        """Receive all broadcasts with ``subscriber(communicator, body, sender, subject, correlation_id)``.

        :return: the identifier.
        :raises kiwipy.DuplicateSubscriberIdentifier: a subscriber of this communicator has it.
        """
        return self._engine.add_broadcast(subscriber, identifier)

    def remove_broadcast_subscriber(self, identifier: Any) -> None:
        """Stop receiving broadcasts.

        :raises ValueError: there is no such subscriber.
        """
        self._engine.remove_broadcast(identifier)

    def task_send(self, task: Any, no_reply: bool = False) -> kiwipy.Future | None:
        """Add a task to the default queue; when this returns, it is on the disk.

        :param task: the body.
        :param no_reply: do not ask for the outcome.
        :return: a future of the outcome; `None` with `no_reply`.
        :raises TypeError: JSON cannot express the body.
        :raises OSError: the task could not be written (the disk is full, say); nothing is left of it.
        """
        return self._engine.send_task(self._engine.sides[""], task, no_reply)

    def task_queue(self, queue_name: str, prefetch_size: int = 0, prefetch_count: int = 0) -> PipeTaskQueue:
        """Return a named task queue; `DEFAULT_QUEUE` is the default one.

        :param prefetch_size: must be 0, as with RabbitMQ.
        :param prefetch_count: how many tasks of the queue this communicator holds at once (0: no limit).
        """
        self._engine.ensure_open()
        if prefetch_size:
            raise NotImplementedError("prefetch_size must be 0: prefetching by size is not implemented")
        key = "" if queue_name == DEFAULT_QUEUE else discovery.quoted(queue_name)
        return PipeTaskQueue(self, self._engine.side(key, prefetch_count))

    def rpc_send(self, recipient_id: Any, msg: Any) -> kiwipy.Future:
        """Call the RPC subscriber of an identifier.

        :return: a future of the answer; it gets `kiwipy.DeliveryFailed` if the recipient dies before it answers.
        :raises kiwipy.UnroutableError: no live communicator has the identifier.
        :raises TypeError: JSON cannot express the message.
        """
        return self._engine.send_rpc(recipient_id, msg)

    def broadcast_send(self, body: Any, sender: Any = None, subject: Any = None, correlation_id: Any = None) -> bool:
        """Send a message to all broadcast subscribers; without a coordinator it is kept for one for 60 seconds.

        :return: `True`.
        :raises TypeError: JSON cannot express the message.
        """
        self._engine.send_broadcast(body, sender, subject, correlation_id)
        return True


class PipeTaskQueue:
    """A task queue, as ``kiwipy.rmq.RmqThreadTaskQueue``. Made by `PipeCommunicator.task_queue`."""

    def __init__(self, communicator: PipeCommunicator, side: _Side) -> None:
        self._communicator = communicator  # Which garbage collection would close.
        self._engine = communicator._engine
        self._side = side

    def __iter__(self) -> Iterator[PipeIncomingTask]:
        """Yield the waiting tasks, oldest first; those that are not processed wait again when the loop ends."""
        offered: list[PipeIncomingTask] = []
        try:
            for task in self._engine.pull(self._side):
                offered.append(PipeIncomingTask(self._communicator, self._side, task))
                yield offered[-1]
        finally:
            for incoming in offered:
                if incoming.state == "pending" and not self._engine.closed:
                    incoming.requeue()

    def task_send(self, task: Any, no_reply: bool = False) -> kiwipy.Future | None:
        """Add a task to this queue, as `PipeCommunicator.task_send` does to the default one."""
        return self._engine.send_task(self._side, task, no_reply)

    def add_task_subscriber(self, subscriber: Callable[..., Any], identifier: Any = None) -> Any:
        """Work on tasks of this queue, as `PipeCommunicator.add_task_subscriber` does on those of the default one."""
        return self._engine.add_task(self._side, subscriber, identifier)

    def remove_task_subscriber(self, identifier: Any) -> None:
        """Stop working on tasks of this queue.

        :raises ValueError: there is no such subscriber.
        """
        self._engine.remove_task(self._side, identifier)

    @contextlib.contextmanager
    def next_task(self, timeout: float = 5.0, fail: bool = True) -> Iterator[PipeIncomingTask | None]:
        """Take the oldest waiting task; if it is not processed, it waits again when the context ends.

        :param timeout: not used, as the disk answers at once; it is here because RabbitMQ's communicator has it.
        :param fail: raise if there is none; otherwise the context has `None`.
        :raises kiwipy.QueueEmpty: no task waits.
        """
        task = next(self._engine.pull(self._side), None)
        if task is None:
            if fail:
                raise kiwipy.QueueEmpty(f"no task waits in {self._side.queue.directory}")
            yield None
            return
        incoming = PipeIncomingTask(self._communicator, self._side, task)
        try:
            yield incoming
        finally:
            if incoming.state == "pending" and not self._engine.closed:
                incoming.requeue()


class PipeIncomingTask:
    """A task taken from a queue, as ``kiwipy.rmq.RmqThreadIncomingTask``."""

    def __init__(self, communicator: PipeCommunicator, side: _Side, task: taskqueue.Task) -> None:
        self._communicator = communicator
        self._engine = communicator._engine
        self._side = side
        self._task = task
        self._state = "pending"
        self._outcome: weakref.ReferenceType[kiwipy.Future] | None = None

    @property
    def body(self) -> Any:
        """What was sent."""
        return self._task.body

    @property
    def no_reply(self) -> bool:
        """Whether the sender asked for no outcome."""
        return self._task.no_reply

    @property
    def state(self) -> str:
        """One of 'pending', 'processing', 'finished' and 'requeued'."""
        return self._state

    def process(self) -> kiwipy.Future:
        """Start processing; the task is done when the future that this returns is, and waits again if it is dropped.

        :raises asyncio.InvalidStateError: the task is not pending.
        """
        self._begin()
        outcome = kiwipy.Future()
        outcome.add_done_callback(self._finish)
        self._outcome = weakref.ref(outcome, self._dropped)
        return outcome

    @contextlib.contextmanager
    def processing(self) -> Iterator[kiwipy.Future]:
        """Process the task in a context, which gives the future of its outcome; if that is not done, it waits again.

        :raises asyncio.InvalidStateError: the task is not pending.
        """
        self._begin()
        outcome = kiwipy.Future()
        try:
            yield outcome
        except Exception as error:
            outcome.set_exception(error)
            raise
        finally:
            if outcome.done():
                self._finish(outcome)
            else:
                self._give_back()

    def requeue(self) -> None:
        """Let the task wait again; when this returns, it does.

        :raises asyncio.InvalidStateError: the task is finished or requeued.
        """
        if self._state not in ("pending", "processing"):
            self._refuse()
        self._give_back()

    def _begin(self) -> None:
        if self._state != "pending":
            self._refuse()
        self._state = "processing"

    def _refuse(self) -> None:
        # What RabbitMQ's communicator raises; asyncio takes long to import, and only mistaken code gets here.
        import asyncio

        raise asyncio.InvalidStateError(f"The task is {self._state}")

    def _give_back(self) -> None:
        self._state = "requeued"
        self._engine.give_back(self._side, self._task.name)

    def _dropped(self, _: object) -> None:
        if self._state == "processing":
            self._give_back()

    def _finish(self, outcome: kiwipy.Future) -> None:
        if outcome.cancelled():
            self._state = "pending"
            return
        self._state = "finished"
        error = outcome.exception()
        answer = failure(error) if error is not None else {"result": outcome.result()}
        self._engine.settle(self._side, self._task, **answer)


def __getattr__(name: str) -> Any:
    """Give `PipeBroker` to whoever asks for it here (PEP 562), so that importing this module does not import AiiDA."""
    if name != "PipeBroker":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if TYPE_CHECKING or not __package__:
        import aiidabroker
    else:
        from . import aiidabroker
    return aiidabroker.PipeBroker
