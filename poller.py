"""The selector with its timers, and what a forked child has to close.

Strategy: one thread for each communicator, and the coordinator's only one, waits in `Poller.poll` for whatever becomes
ready or due.

Rules:
- Only the selector thread touches the selector and closes what that watches; others leave it a request with
  `Poller.call`.
- One bad item, be it a frame, a request, a timer or a handler, is logged, and never touches the next one.
- The locks are reentrant, taken by `with` and held for calls that do not block only, since a signal handler or a
  finalizer may run inside any function here and call any other. (``acquire`` and then ``try`` leaked the lock to a
  handler that raises 10,444 of 12,313 times, ``with`` 0 of 12,545.)
- A signal handler may take any time, and may wait for another thread while the main thread, which it has interrupted,
  holds a lock. So the selector thread waits `HELD_UP_SECONDS` at most for a lock that is only ever held for a few
  system calls; then it goes on without it (`patient`), which does no harm as whoever has it stands still, or puts off
  what it was about to do. The lanes, in which others' code runs, may wait until the handler is done.
- A fork waits for the few lines in which a descriptor is open and not yet listed in `Poller.descriptors` (`no_fork`).
  The child closes its copies, whatever its parent was about to do, and nothing else.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import logging
import os
import selectors
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

_LOGGER = logging.getLogger(__name__)
_PATIENCE_SECONDS = 1.0
HELD_UP_SECONDS = 0.05
"""How long a thread waits for a lock that is held for a few system calls, before it takes its holder for held up."""


class Outbox(Protocol):
    """Something that may hold what a pipe did not take yet."""

    dead: bool

    @property
    def waiting(self) -> int:
        """How many frames the pipe has not taken yet."""


no_fork = threading.RLock()
"""To be held while a descriptor is open and not yet listed."""
_pollers: weakref.WeakSet[Poller] = weakref.WeakSet()


def _abandon_copies() -> None:
    no_fork.release()
    for poller in list(_pollers):
        poller.abandon()


os.register_at_fork(before=no_fork.acquire, after_in_parent=no_fork.release, after_in_child=_abandon_copies)


def say(what: str, *arguments: object) -> None:
    """Log the exception that is being handled. A user's log handler may raise: no thread of ours ends by that."""
    with contextlib.suppress(Exception):
        _LOGGER.exception(what, *arguments)


class _Patient:
    def __init__(self, lock: Any) -> None:
        self._lock = lock

    def __enter__(self) -> None:
        self._held = self._lock.acquire(timeout=HELD_UP_SECONDS)

    def __exit__(self, *_: object) -> None:
        if self._held:
            self._lock.release()


def patient(lock: Any) -> contextlib.AbstractContextManager[Any]:
    """Return what to hold, by `with`, in place of a reentrant lock whose holder a signal handler may hold up."""
    # In the main thread the lock itself, as only its own `with` cannot be interrupted halfway.
    return lock if has_handlers() else _Patient(lock)


def has_handlers() -> bool:
    """Say whether signal handlers run in this thread (signal(7): Python's run in the main thread)."""
    return threading.current_thread() is threading.main_thread()


def guarded(items: Iterable[bytes], handle: Callable[[bytes], None]) -> None:
    """Handle one frame after the other, whatever becomes of one."""
    for item in items:
        try:
            handle(item)
        except Exception:
            say("A frame could not be handled")


class Poller:
    """A selector, its timers, a way to wake it from other threads, and the list of what it holds open.

    It belongs to the selector thread, but for `call`, `spare_descriptor` and additions to `descriptors`.
    """

    def __init__(self) -> None:
        self._requests: deque[Callable[[], object]] = deque()
        self._timers: list[tuple[float, int, Callable[[], object]]] = []
        self._numbers = itertools.count()
        self._closed = False
        self._waking = threading.RLock()
        self._spare: int | None = None
        self._sparing = threading.RLock()
        self.writers: set[Outbox] = set()
        with patient(no_fork):
            self._selector = selectors.DefaultSelector()
            try:
                self._wake_read, self._wake_write = os.pipe()
            except OSError:
                self._selector.close()
                raise
            self.descriptors = {self._wake_read, self._wake_write}
            """What a forked child has to close, the selector's own aside."""
            _pollers.add(self)
        for descriptor in self.descriptors:
            os.set_blocking(descriptor, False)
        self._selector.register(self._wake_read, selectors.EVENT_READ, self._woken)
        self._fill_spare()

    def call(self, request: Callable[[], object]) -> None:
        """Have the selector thread call `request`. Safe in any thread, and in a signal handler or finalizer."""
        self._requests.append(request)
        # A byte for each, since a note that one is on its way would have to be kept under the lock by whoever reads it.
        with patient(self._waking):
            if not self._closed:
                with contextlib.suppress(BlockingIOError):
                    os.write(self._wake_write, b"\0")

    def catch_up(self) -> bool:
        """Wait until what was asked for has been done; say whether it was. In any thread but the selector's."""
        # Not an event, whose lock a handler that raises may leave locked, for the selector thread to wait for.
        done = threading.Lock()
        done.acquire()
        self.call(done.release)
        return done.acquire(timeout=_PATIENCE_SECONDS)

    def later(self, seconds: float, call: Callable[[], object]) -> None:
        """Have the selector thread call something after so many seconds. Only in the selector thread."""
        heapq.heappush(self._timers, (time.monotonic() + seconds, next(self._numbers), call))

    def call_later(self, seconds: float, call: Callable[[], object]) -> None:
        """Do what `later` does, in any thread."""
        self.call(lambda: self.later(seconds, call))

    def poll(self, timeout: float | None = None) -> None:
        """Wait for events and timers, for at most `timeout` seconds (`None`: as long as it takes), and handle them."""
        if self._timers:
            left = max(0.0, self._timers[0][0] - time.monotonic())
            timeout = left if timeout is None else min(timeout, left)
        for key, mask in self._selector.select(timeout):
            # Written out, since this is done for each message.
            try:
                key.data(mask)
            except Exception:
                say("An event could not be handled")
        # What is due now, but nothing that is only asked for meanwhile.
        now, due = time.monotonic(), []
        while self._timers and self._timers[0][0] <= now:
            due.append(heapq.heappop(self._timers)[2])
        for call in due:
            self._try(call)

    def _try(self, call: Callable[[], object]) -> None:
        try:
            call()
        except Exception:
            say("An event could not be handled")

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
        """Close a descriptor."""
        self.watch(descriptor, 0, lambda _: None)
        with patient(no_fork):
            self.descriptors.discard(descriptor)
            os.close(descriptor)

    @contextlib.contextmanager
    def spare_descriptor(self) -> Iterator[None]:
        """Give back, for the length of a context, the descriptor that is kept for when there is no other."""
        with self._sparing:
            with patient(no_fork):
                if self._spare is not None:
                    self.descriptors.discard(self._spare)
                    os.close(self._spare)
                    self._spare = None
            try:
                yield
            finally:
                self._fill_spare()

    def _fill_spare(self) -> None:
        with patient(no_fork), contextlib.suppress(OSError):
            if self._spare is None and not self._closed:
                self._spare = os.dup(self._wake_read)
                self.descriptors.add(self._spare)

    def flush(self, seconds: float) -> None:
        """Handle events until every outbox is empty, or for so many seconds."""
        deadline = time.monotonic() + seconds
        while any(writer.waiting for writer in list(self.writers)) and (left := deadline - time.monotonic()) > 0:
            self.poll(left)

    def close(self) -> None:
        """Close everything."""
        with self._waking:
            # Nobody writes to the number of our wake-up pipe once it may be somebody else's.
            self._closed = True
        self.abandon()

    def abandon(self) -> None:
        """Close all descriptors, and touch nothing that is shared with the process that we were forked from."""
        self._closed = True
        self._waking = threading.RLock()  # Another thread of the parent may have had it.
        with patient(no_fork):
            # The selector's kernel object is shared with the parent. Unlike unregistering, closing leaves it alone.
            self._selector.close()
            while self.descriptors:
                os.close(self.descriptors.pop())
            _pollers.discard(self)
        for writer in list(self.writers):
            writer.dead = True  # Its descriptor's number may be another file's now.
        self.writers.clear()

    def _woken(self, _: int) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(self._wake_read, 4096)
        while self._requests:
            self._try(self._requests.popleft())
