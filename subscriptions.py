"""Who subscribes to what, and the life as a worker that this takes.

Strategy: a worker id that was given, the first subscription or the first pull begins a life (``life.py``): an id with
its lock. A subscription opens the pipe that it needs, where there is none yet; what the others have to know is in the
registry entry before the coordinator is told to read it.

Rules:
- A subscription that fails halfway is none: it is taken out again.
- Nothing waits for another process here but a new life, or an RPC identifier, for whoever buries the last one that had
  it, five seconds at most.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import kiwipy

if TYPE_CHECKING or not __package__:
    import directories
    import fifo
    import presence
    import taskqueue
    from holding import Holdings, Side
    from life import Intake, Life
    from poller import HELD_UP_SECONDS, Poller
    from post import Post
    from subscribers import MessageSubscribers
else:
    from . import directories, fifo, presence, taskqueue
    from .holding import Holdings, Side
    from .life import Intake, Life
    from .poller import HELD_UP_SECONDS, Poller
    from .post import Post
    from .subscribers import MessageSubscribers

_LOGGER = logging.getLogger(__name__)


def _mending(step: Callable[..., Any]) -> Callable[..., Any]:
    """Do something; where a directory is gone, make it again, and then do it."""

    @functools.wraps(step)
    def mended(self: Subscriptions, *arguments: Any) -> Any:
        # Whoever closes takes it too, so that nobody subscribes to what is closed.
        with self._mutex:
            self.ensure_open()
            try:
                return step(self, *arguments)
            except FileNotFoundError:
                directories.remake(self._layout)
                self._poller.call(self.look)  # And soon what lay in them.
                return step(self, *arguments)

    return mended


@contextlib.contextmanager
def _added(subscribers: dict[str, Any], subscriber: Any, identifier: Any, kind: str) -> Iterator[Any]:
    """Add a subscriber, and take it out again if what has to follow fails."""
    if not callable(subscriber):
        raise TypeError(f"the subscriber must be callable, not {subscriber!r}")
    identifier = uuid.uuid4().hex if identifier in (None, "") else identifier
    if str(identifier) in subscribers:
        raise kiwipy.DuplicateSubscriberIdentifier(f"{kind} identifier '{identifier}'")
    subscribers[str(identifier)] = subscriber
    try:
        yield identifier
    except BaseException:
        subscribers.pop(str(identifier), None)
        raise


def _take_out(subscribers: dict[str, Any], identifier: Any, kind: str) -> None:
    if subscribers.pop(str(identifier), None) is None:
        raise ValueError(f"unknown {kind} subscriber '{identifier}'")


class Subscriptions:
    """Who subscribes to what, and the life that this takes. `_mutex` guards it; no user code runs inside."""

    def __init__(
        self,
        layout: directories.Layout,
        poller: Poller,
        post: Post,
        holdings: Holdings,
        messages: MessageSubscribers,
        reply: str,
        handlers: Mapping[str, Callable[[fifo.Reader, bytes], None]],
        *,
        fsync: bool,
    ) -> None:
        """
        :param reply: the name of the communicator's reply pipe.
        :param handlers: what is to be done when a pipe can be read, by its kind.
        """
        self._layout = layout
        self._poller = poller
        self._post = post
        self._holdings = holdings
        self._messages = messages
        self._reply = reply
        self._handlers = handlers
        self._fsync = fsync
        self._life: Life | None = None
        self._has_lived = False
        self._intake = Intake(layout, poller)
        self._listens_since = 0.0
        self._mutex = threading.RLock()
        self.closed = False

    def ensure_open(self) -> None:
        """:raises kiwipy.CommunicatorClosed: it is closed."""
        if self.closed:
            raise kiwipy.CommunicatorClosed

    def side(self, name: str | None, prefetch: int) -> Side:
        """Return this communicator's side of a queue.

        :param name: as the user wrote it; `None`: the default one.
        :param prefetch: 0: as it is.
        """
        key = "" if name is None else directories.quoted(name)
        with self._mutex:
            side = self._holdings.sides.get(key)
            if side is None:
                self._layout.owner.look(self._layout.queue)
                queue = taskqueue.TaskQueue(self._layout.queue_directory(key), name, fsync=self._fsync)
                queue.make()
                side = self._holdings.sides.setdefault(key, Side(key, queue, prefetch))
            elif prefetch and prefetch != side.prefetch:
                side.prefetch = prefetch
                if side.subscribers:
                    self._register(self._begun())
            return side

    def hold(self, side: Side) -> None:
        """See to it that this communicator may hold tasks of a queue."""
        with self._mutex:
            self.ensure_open()
            life = self.live(None)
            if side.claims is None:
                claims = self._holdings.claims_for(side, life.worker_id, self._layout.paused)
                side.claims = claims if side.claims is None else side.claims

    def live(self, worker_id: str | None) -> Life:
        """Return our life as a worker; begin it where it has not begun, and register it."""
        with self._mutex:
            if self._life is None:
                self._register(self._begun(worker_id))
            return self._begun()

    def _begun(self, worker_id: str | None = None) -> Life:
        """Return our life as a worker, for whoever registers what it adds to it."""
        if self._life is None:
            life = Life(self._layout, self._poller, worker_id, self._post.ring_task)
            if self._life is not None:
                life.end()  # A signal handler has begun another one meanwhile.
                return self._life
            self._life, self._has_lived = life, True
        return self._life

    @_mending
    def add_task(self, side: Side, subscriber: Callable[..., Any], identifier: Any) -> Any:
        """Subscribe to a task queue."""
        with _added(side.subscribers, subscriber, identifier, "Task") as identifier:
            self._holdings.lane.start()
            life = self._begun()
            self.hold(side)
            self._open(life, "task")
            self._register(life, more=True)  # Who may take what others here have refused.
            return identifier

    def remove_task(self, side: Side, identifier: Any) -> None:
        """Unsubscribe from a task queue."""
        with self._mutex:
            self.ensure_open()
            _take_out(side.subscribers, identifier, "task")
            if not side.subscribers:
                self._register_later()

    @_mending
    def add_rpc(self, subscriber: Callable[..., Any], identifier: Any) -> Any:
        """Subscribe to the calls for an identifier."""
        with _added(self._messages.rpc, subscriber, identifier, "RPC") as identifier:
            self._messages.lane.start()
            life = self._begun()
            if self._open(life, "rpc"):
                self._register(life)
            if not life.claim_route(str(identifier)):
                raise kiwipy.DuplicateSubscriberIdentifier(f"RPC identifier '{identifier}'")
            return identifier

    def remove_rpc(self, identifier: Any) -> None:
        """Unsubscribe from the calls for an identifier."""
        with self._mutex:
            self.ensure_open()
            _take_out(self._messages.rpc, identifier, "RPC")
            if self._life is not None:
                self._life.release_route(str(identifier))

    @_mending
    def add_broadcast(self, subscriber: Callable[..., Any], identifier: Any) -> Any:
        """Subscribe to all broadcasts."""
        with _added(self._messages.broadcast, subscriber, identifier, "Broadcast") as identifier:
            self._messages.lane.start()
            if len(self._messages.broadcast) == 1:
                life = self._begun()
                self._open(life, "broadcast")
                self._listens_since = time.time()
                self._intake.hold()
                self._register(life)
            return identifier

    def remove_broadcast(self, identifier: Any) -> None:
        """Unsubscribe from broadcasts."""
        with self._mutex:
            self.ensure_open()
            _take_out(self._messages.broadcast, identifier, "broadcast")
            if not self._messages.broadcast:
                self._register_later()

    def _open(self, life: Life, kind: str) -> bool:
        """Make a pipe of ours; say whether there was none."""
        return life.pipes.open(f"{kind}_{life.worker_id}", self._handlers[kind])

    def _register(self, life: Life, *, more: bool = False) -> None:
        life.pipes.made_again = False
        self._entry(life).register(self._layout)
        self._post.ring({"type": "register", "worker": life.worker_id, **({"more": True} if more else {})})

    def _register_later(self) -> None:
        """Register what has become less; where that cannot be done now, it is done at the next look."""
        with contextlib.suppress(OSError):
            if self._life is not None:
                self._register(self._life)

    def _entry(self, life: Life) -> presence.Worker:
        # What has no pipe yet is registered once it has one.
        sides = list(self._holdings.sides.values()) if f"task_{life.worker_id}" in life.pipes else []
        listens = bool(self._messages.broadcast) and f"broadcast_{life.worker_id}" in life.pipes
        return presence.Worker(
            worker_id=life.worker_id,
            pid=os.getpid(),
            since=life.since,
            reply=self._reply,
            queues={side.key: side.prefetch for side in sides if side.subscribers},
            rpc=f"rpc_{life.worker_id}" in life.pipes,
            broadcast=listens,
            listens_since=self._listens_since if listens else 0.0,
            version=directories.VERSION,
        )

    def look(self) -> None:
        """Make again what is not in place; begin a new life where another has the id. In the selector thread.

        :raises OSError: something cannot be made; the next look goes on where this one ended.
        """
        # Whoever subscribes may be held up by a signal handler that waits for this thread: the next look will do.
        if not self._mutex.acquire(timeout=HELD_UP_SECONDS):
            return
        try:
            if self.closed or not self._has_lived:
                return
            if self._life is not None and not self._life.look():
                _LOGGER.error("Another process has the worker id %s: what it held is for others", self._life.worker_id)
                self._life.abandon()
                self._life = None
            self._complete(self._begun())
        finally:
            self._mutex.release()

    def _complete(self, life: Life) -> None:
        self._holdings.give_back_strays(self._layout, life.worker_id)
        for kind, has in (
            ("task", any(side.subscribers for side in self._holdings.sides.values())),
            ("rpc", self._messages.rpc),
            ("broadcast", self._messages.broadcast),
        ):
            if has:
                self._open(life, kind)
        for identifier in self._messages.rpc.keys() - life.routes:
            if not life.claim_route(identifier):
                _LOGGER.error("The RPC identifier '%s' has been taken by another worker", identifier)
        if self._messages.broadcast:
            self._intake.hold()
        if life.pipes.made_again or not life.is_registered(self._entry(life)):
            self._register(life)

    def listen_on(self) -> None:
        """Hold the coordinator's intake open, now that a broadcast tells that there is a coordinator."""
        if not self._intake.is_held:
            with self._mutex:
                if not self.closed:
                    self._intake.hold()

    def inject(self, receiver: str, data: bytes) -> None:
        """Take a frame as if it had come by our RPC pipe, if that is who it is for. In the selector thread."""
        life = self._life
        if life is not None and receiver == f"rpc_{life.worker_id}":
            life.pipes.inject(receiver, data)

    @property
    def worker_id(self) -> str:
        """The id of our life as a worker; that of none is the name of the reply pipe."""
        life = self._life
        return life.worker_id if life is not None else self._reply

    def leave(self) -> None:
        """Give back what is held, and let nobody find us any more. In the selector thread."""
        with self._mutex:
            # Whoever was about to subscribe has done so now, and nobody can any more.
            life = self._life
        if life is not None:
            life.leave()
            self._post.ring({"type": "register", "worker": life.worker_id})
        self._holdings.close()

    def end(self) -> None:
        """Close the pipes, and let go of the id. In the selector thread."""
        if self._life is not None:
            self._life.end()

    def disown(self) -> None:
        """Be closed, in a forked child."""
        self._mutex = threading.RLock()  # Another thread of the parent may have had it.
        self.closed = True
