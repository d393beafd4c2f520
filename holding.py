"""What a communicator holds of the task queues, from the claim to the report.

Strategy: it claims a task by rename(2), and finishes it in one function, in this order: the outcome is on its way, the
task is in ``completed/``, the report is noted. Who works on it meanwhile, a subscriber or whoever pulled it, is not
known here.

Rules:
- A task that is gone is normal: somebody else has it.
- One bad task is told to its sender and logged, and keeps nobody from the others.
- Reports are hints: while more waits, they go to the coordinator for several tasks at once, after 20 ms or 16 names, or
  fewer where frames are small, as on macOS. (One at a time cost 18 to 68 % of the tasks per second.) Pulled tasks are
  reported like others.
"""

from __future__ import annotations

import contextlib
import functools
import heapq
import logging
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import kiwipy

if TYPE_CHECKING or not __package__:
    import directories
    import files
    import frames
    import taskqueue
    from claims import Claims
    from lane import Lane
    from poller import Poller, patient
    from post import Post
else:
    from . import directories, files, frames, taskqueue
    from .claims import Claims
    from .lane import Lane
    from .poller import Poller, patient
    from .post import Post

_LOGGER = logging.getLogger(__name__)
_REPORT_SECONDS = 0.02
_REPORT_NAMES = min(16, frames.LARGEST_TEXT // 150)

Subscriber = Callable[..., Any]


@dataclass(eq=False)
class Side:
    """A communicator's side of one task queue."""

    key: str
    """'' for the default one, otherwise its quoted name."""
    queue: taskqueue.TaskQueue
    prefetch: int
    subscribers: dict[str, Subscriber] = field(default_factory=dict)
    claims: Claims | None = None
    put_by: deque[str] = field(default_factory=deque)
    """Rings for which there was no room."""
    rung: set[str] = field(default_factory=set)
    """Names on their way to the lane, or put by: they are not taken in twice."""
    awaited: dict[taskqueue.Task, tuple[kiwipy.Future, Callable[[kiwipy.Future], None]]] = field(default_factory=dict)
    """Tasks whose subscribers have returned a future, and what is done once that has its outcome."""
    cancelled: list[taskqueue.Task] = field(default_factory=list)
    """Tasks that stay claimed until the communicator closes."""
    listed: list[str] = field(default_factory=list)
    """A heap of names that waited when the directory was last listed, for those who pull."""

    def has_room(self) -> bool:
        """Say whether one more task may be claimed."""
        return not self.prefetch or self.claims is None or len(self.claims) < self.prefetch


class Reports:
    """What became of tasks, on its way to the coordinator. `_mutex` guards it; only the selector thread has timers."""

    def __init__(self, post: Post, poller: Poller, whose: Callable[[], dict[str, str]]) -> None:
        """
        :param whose: gives the fields that tell whose reports they are.
        """
        self._post = post
        self._poller = poller
        self._whose = whose
        self._mutex = threading.RLock()
        self._noted: deque[tuple[str, str, str]] = deque()
        """What became of tasks, oldest first: the key of the queue, what became of it, and its name."""
        self._due = False
        self._sending = False

    def add(self, key: str, kind: str, name: str, *, at_once: bool) -> None:
        """Note what became of a task; tell the coordinator soon, or at once where it may have another for us."""
        self._noted.append((key, kind, name))
        if at_once or len(self._noted) >= _REPORT_NAMES:
            self.send()
        elif not self._due:
            self._poller.call(self.expect)

    def expect(self) -> None:
        """See to it that what is noted from now on is sent soon. In the selector thread."""
        if not self._due:
            self._due = True
            self._poller.later(_REPORT_SECONDS, self._send_due)

    def _send_due(self) -> None:
        self._due = False
        self.send()

    def send(self) -> None:
        """Send what is noted."""
        # Under the lock, or a "done" that another thread notes overtakes its "claimed".
        with patient(self._mutex):
            if self._sending:
                return  # Whoever a signal handler or finalizer has interrupted here goes on.
            self._sending = True
            try:
                while self._noted:
                    for key, kinds in self._taken().items():
                        self._post.ring({"type": "report", **self._whose(), "queue": key, **kinds})
            finally:
                self._sending = False

    def _taken(self) -> dict[str, dict[str, list[str]]]:
        """Take out what is noted now, by queue and by what became of it."""
        found: dict[str, dict[str, list[str]]] = {}
        for _ in range(len(self._noted)):
            key, kind, name = self._noted.popleft()
            kinds = found.setdefault(key, {})
            if kind == "done" and name in kinds.get("claimed", ()):
                kinds["claimed"].remove(name)  # Which "done" says as well.
            kinds.setdefault(kind, []).append(name)
        return found

    def disown(self) -> None:
        """Have nothing to send, in a forked child."""
        self._mutex = threading.RLock()  # Another thread of the parent may have had it.
        self._noted.clear()


class Holdings:
    """Claims tasks, and lets them go.

    `sides` is added to under the lock of ``subscriptions.py``, and each `Claims` guards itself.
    """

    def __init__(self, post: Post, reports: Reports, lane: Lane) -> None:
        """
        :param lane: where tasks are worked on: as long as something waits there, reports wait for more.
        """
        self.sides: dict[str, Side] = {}
        self.on_room: Callable[[Side], object] = lambda side: None
        """Called, in any thread, when a task has left our hands."""
        self._post = post
        self._reports = reports
        self.lane = lane
        self._waiters: dict[threading.Lock, bool] = {}
        """Who waits until nothing is in hand, and whether what was about to be claimed is."""
        self._closed = False

    def claims_of(self, queue: taskqueue.TaskQueue) -> Claims | None:
        """Return what is held of a queue by another of its names, as a link may give it; `None` if there is none."""
        where = os.path.realpath(queue.directory)
        for side in list(self.sides.values()):
            if side.claims is not None and os.path.realpath(side.queue.directory) == where:
                return side.claims
        return None

    def claims_for(self, side: Side, worker_id: str, paused: Path) -> Claims:
        """Return what claims from a queue for a worker: the same one for all the names that a queue has."""
        known = self.claims_of(side.queue)
        return known if known is not None and known.worker_id == worker_id else Claims(side.queue, worker_id, paused)

    def claim(self, side: Side, name: str, *, pulled: bool = False) -> taskqueue.Task | None:
        """Claim a task; `None` if somebody else has it, or if it is none, which its sender is told.

        :param pulled: nobody was rung for it.
        :return: the task, which is in hand only as long as somebody refers to it.
        :raises OSError: it could not be read now, and waits again.
        """
        try:
            tell = functools.partial(self._tell_unreadable, name)
            task = side.claims.take(name, tell) if side.claims is not None else None
        except taskqueue.Unreadable:
            self.report(side, "done", name)
            return None
        if task is not None:
            self.report(side, "claimed", name)
        elif not pulled:
            paused = side.claims is not None and side.claims.is_paused()
            self.report(side, "returned" if paused else "lost", name)
        return task

    def _tell_unreadable(self, name: str, error: taskqueue.Unreadable) -> None:
        _LOGGER.error("Task %s failed: %s", name, error)
        if error.envelope.get("no_reply"):
            return
        correlation_id = error.envelope.get("correlation_id")
        text = self._post.express(correlation_id, {"exception": str(error)})
        self._post.deliver(error.envelope.get("reply_to"), correlation_id, text, outlives=True)

    def finish(self, side: Side, task: taskqueue.Task, answer: dict[str, Any]) -> bool:
        """Finish a task: send its outcome, move it to ``completed/``, and report it; say whether it was still held.

        In any thread.
        """

        # By the user's encoder, so before any lock is held.
        text = "" if task.no_reply else self._post.express(task.correlation_id, answer)

        def reply() -> None:
            if text:
                self._post.deliver(task.reply_to, task.correlation_id, text, outlives=True)

        reason = str(answer.get("traceback", ""))
        held = side.claims is not None and side.claims.settle(task, reply, "completed", reason)
        side.awaited.pop(task, None)
        if held:
            self.report(side, "done", task.name)
            self._let_go(side)
        return held

    def give_back(self, side: Side, task: taskqueue.Task, kind: str = "returned") -> None:
        """Let a held task wait again. In any thread.

        :param kind: 'rejected' if it is rather for somebody else, 'returned' if it is for anyone.
        """
        if side.claims is not None and side.claims.settle(task, lambda: None, ""):
            side.awaited.pop(task, None)
            if side.listed:
                heapq.heappush(side.listed, task.name)
            self.report(side, kind, task.name)
            self._let_go(side)

    def wait_until_idle(self, timeout: float | None) -> bool:
        """Wait until nothing is in hand, nor about to be; say whether it came to that. Not in the lane.

        :param timeout: for how many seconds at most; `None`: as long as it takes.
        """
        # Not an event, whose lock a handler that raises may leave locked, for whoever finishes a task to wait for.
        idle = threading.Lock()
        idle.acquire()

        def wait() -> None:
            if idle in self._waiters:  # Otherwise its time is over.
                self._waiters[idle] = True
                self._tell_if_idle()

        self._waiters[idle] = False
        try:
            self.lane.start()
            self.lane.put(wait)  # After what it is just about to claim.
            # Once it can be found: whoever closes looks for it after saying so.
            seconds = -1 if timeout is None else max(0.0, min(timeout, threading.TIMEOUT_MAX))
            return self._closed or idle.acquire(timeout=seconds)
        finally:
            self._waiters.pop(idle, None)

    def _tell_if_idle(self) -> None:
        claims = [side.claims for side in list(self.sides.values()) if side.claims is not None]
        if self._waiters and (self._closed or all(each.is_empty() for each in claims)):
            for idle, ready in list(self._waiters.items()):
                if ready or self._closed:
                    with contextlib.suppress(RuntimeError):  # Another thread was faster.
                        idle.release()
                    self._waiters.pop(idle, None)

    def _let_go(self, side: Side) -> None:
        self._tell_if_idle()
        self.on_room(side)

    def report(self, side: Side, kind: str, name: str) -> None:
        """Note what became of a task, for the coordinator. In any thread."""
        self._reports.add(side.key, kind, name, at_once=kind != "claimed" and self.lane.is_empty())

    def pull(self, side: Side, before_listing: Callable[[], None]) -> taskqueue.Task | None:
        """Claim the oldest task that waits, of those that waited when the directory was last listed.

        :param before_listing: called before the directory is listed.
        :return: the task; `None` if none waits, or all is paused.
        """
        fresh = False
        while side.claims is not None and not side.claims.is_paused():
            try:
                name = heapq.heappop(side.listed)
            except IndexError:
                if fresh:
                    return None
                fresh = True
                before_listing()
                listed = list(side.queue.names())
                heapq.heapify(listed)
                side.listed = listed
                continue
            task = self._pull(side, name)
            if task is not None:
                return task
            if side.claims.is_paused():
                heapq.heappush(side.listed, name)  # It keeps its place.
        return None

    def pull_each(self, side: Side, before_each: Callable[[], None]) -> Iterator[taskqueue.Task]:
        """Claim waiting tasks, oldest first, until there are none that have not been offered.

        :param before_each: called before each is claimed.
        """
        seen: set[str] = set()
        while names := sorted(set(side.queue.names()) - seen):
            for name in names:
                if side.claims is None or side.claims.is_paused():
                    return
                seen.add(name)
                before_each()
                task = self._pull(side, name)
                if task is not None:
                    yield task

    def _pull(self, side: Side, name: str) -> taskqueue.Task | None:
        """
        :raises OSError: there is no free descriptor.
        """
        try:
            return self.claim(side, name, pulled=True)
        except OSError as error:
            if error.errno in files.NO_DESCRIPTOR:
                raise
            _LOGGER.error("Task %s could not be read and waits again: %s", name, error)
            return None

    def give_back_strays(self, layout: directories.Layout, worker_id: str) -> None:
        """Let wait again what an earlier life has left under our worker id; begin anew where the id is a new one.

        For whoever sees to it that nobody subscribes meanwhile.
        """
        for side in list(self.sides.values()):
            if side.claims is not None and side.claims.worker_id != worker_id:
                side.claims = self.claims_for(side, worker_id, layout.paused)
        # By where they lie: a link may give a queue a second name.
        ours = {
            os.path.realpath(side.queue.directory): side.claims
            for side in list(self.sides.values())
            if side.claims is not None
        }
        with contextlib.suppress(OSError):
            for _, directory in layout.queues():
                claims = ours.get(os.path.realpath(directory))
                if claims is None:
                    claims = Claims(taskqueue.TaskQueue(directory), worker_id, layout.paused)
                with contextlib.suppress(OSError):  # One bad queue keeps nothing in the others.
                    claims.give_back_strays()

    def look(self) -> None:
        """Move what could not be moved when it was finished, and report what somebody had and lost."""
        for side in list(self.sides.values()):
            side.queue.keep_name()
            for name in side.claims.look() if side.claims is not None else ():
                self.report(side, "returned", name)
                self.on_room(side)
        self._tell_if_idle()

    def close(self) -> None:
        """Give back what is held."""
        for side in list(self.sides.values()):
            for name in side.claims.close() if side.claims is not None else ():
                self._reports.add(side.key, "returned", name, at_once=False)
        self._closed = True
        self._tell_if_idle()

    def disown(self) -> None:
        """Hold nothing, in a forked child."""
        for side in self.sides.values():
            if side.claims is not None:
                side.claims.disown()
        self._closed = True
        self._waiters.clear()
