"""Runs user code: task subscribers on one thread, RPC and broadcast subscribers on another.

Strategy: a ring names tasks that wait. The worker claims each by rename(2), runs its subscribers, and finishes it in
one function, in this order: the outcome is on its way, the task is in ``completed/``, the report is noted.

Rules:
- A task that is gone is normal: somebody else has it. A ring beyond the prefetch is put by until there is room.
- Reports are hints: while more waits, they go to the coordinator for several tasks at once, 16 names or 20 ms. (One at
  a time cost 18 to 68 % of the tasks per second.) Pulled tasks are reported like others.
- A subscriber that raises ends its task with that outcome, and the reason is kept beside the task. Two mean something
  else: `kiwipy.TaskRejected` passes it on, and with `kiwipy.CancelledError` it stays claimed until the communicator
  closes.
"""

from __future__ import annotations

import errno
import functools
import heapq
import inspect
import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import kiwipy

if TYPE_CHECKING or not __package__:
    import directories
    import frames
    import taskqueue
    from calls import failure
    from lane import Lane
    from poller import Poller
    from post import Post
else:
    from . import directories, frames, taskqueue
    from .calls import failure
    from .lane import Lane
    from .poller import Poller
    from .post import Post

_LOGGER = logging.getLogger(__name__)
_REPORT_SECONDS = 0.02
_REPORT_NAMES = min(16, frames.LARGEST_TEXT // 150)

Subscriber = Callable[..., Any]
Facade = Callable[[], Any]
"""Gives the communicator that subscribers are called with; `None` once it has been collected."""


@dataclass(eq=False)
class Side:
    """A communicator's side of one task queue."""

    key: str
    """'' for the default one, otherwise its quoted name."""
    queue: taskqueue.TaskQueue
    prefetch: int
    subscribers: dict[str, Subscriber] = field(default_factory=dict)
    claims: taskqueue.Claims | None = None
    put_by: deque[str] = field(default_factory=deque)
    """Rings for which there was no room."""
    rung: set[str] = field(default_factory=set)
    """Names on their way to the lane, or put by: they are not taken in twice."""
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
        self._names: dict[str, dict[str, list[str]]] = {}
        self._due = False
        self._sending = False

    def add(self, key: str, kind: str, name: str, *, at_once: bool) -> None:
        """Note what became of a task; tell the coordinator soon, or at once where it may have another for us."""
        with self._mutex:
            kinds = self._names.setdefault(key, {})
            if kind == "done" and name in kinds.get("claimed", ()):
                kinds["claimed"].remove(name)  # Which "done" says as well.
            kinds.setdefault(kind, []).append(name)
            count = sum(len(names) for kinds in self._names.values() for names in kinds.values())
            waits = not at_once and count < _REPORT_NAMES
        if not waits:
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
        with self._mutex:
            if self._sending:
                return  # Whoever a signal handler or finalizer has interrupted here goes on.
            self._sending = True
            try:
                while self._names:
                    names, self._names = self._names, {}
                    for key, kinds in names.items():
                        self._post.ring({"type": "report", **self._whose(), "queue": key, **kinds})
            finally:
                self._sending = False

    def disown(self) -> None:
        """Have nothing to send, in a forked child."""
        self._mutex = threading.RLock()  # Another thread of the parent may have had it.
        self._names.clear()


class TaskSubscribers:
    """Claims tasks, runs their subscribers, and finishes them.

    `sides` is added to under its owner's lock, each `taskqueue.Claims` guards itself, and the lane has what is put by.
    """

    def __init__(self, post: Post, codec: frames.Codec, reports: Reports, lane: Lane, facade: Facade) -> None:
        self.sides: dict[str, Side] = {}
        self.lane = lane
        self._post = post
        self._codec = codec
        self._reports = reports
        self._facade = facade

    def rung(self, message: frames.Message) -> None:
        """Take a ring. In the selector thread.

        :raises frames.Garbage: it is none.
        """
        side, names = self.sides.get(str(message.get("queue"))), message.get("names")
        if side is None or not isinstance(names, list):
            raise frames.Garbage("a frame that is no ring")
        for name in names:
            if directories.is_quoted(name) and name not in side.rung:
                side.rung.add(name)
                self.lane.put(functools.partial(self._work, side, name))
        self._reports.expect()

    def _work(self, side: Side, name: str) -> None:
        # Put by before it is asked whether there is room, as that may come in any thread meanwhile.
        side.put_by.append(name)
        self._work_put_by(side)

    def _work_put_by(self, side: Side) -> None:
        while side.put_by and (side.has_room() or not side.subscribers):
            name = side.put_by.popleft()
            side.rung.discard(name)
            self._claim(side, name)

    def _claim(self, side: Side, name: str) -> None:
        subscribers = list(side.subscribers.values())
        if not subscribers or side.claims is None:
            self._report(side, "rejected", name)
            return
        try:
            task = side.claims.take(name)
        except taskqueue.Unreadable as error:
            self._tell_unreadable(name, error)
            self._report(side, "done", name)
        except OSError as error:
            _LOGGER.error("Task %s could not be read and waits again: %s", name, error)
            self._report(side, "rejected", name)
        else:
            self._report(side, "lost" if task is None else "claimed", name)
            if task is not None:
                self._offer(side, task, iter(subscribers))

    def _offer(self, side: Side, task: taskqueue.Task, subscribers: Iterator[Subscriber]) -> None:
        for subscriber in subscribers:
            communicator = self._facade()
            if communicator is None:
                return
            try:
                outcome = subscriber(communicator, self._codec.decode(task.message, "body"))
            except kiwipy.TaskRejected:
                continue
            except kiwipy.CancelledError:
                return  # It stays claimed until the communicator closes.
            except BaseException as error:
                _LOGGER.exception("A task subscriber raised for task %s", task.name)
                self.finish(side, task, failure(error))
                return
            self._take_outcome(side, task, outcome, subscribers, 1)
            return
        self.give_back(side, task, "rejected")

    def _take_outcome(
        self, side: Side, task: taskqueue.Task, outcome: Any, subscribers: Iterator[Subscriber], level: int
    ) -> None:
        if not isinstance(outcome, kiwipy.Future):
            self.finish(side, task, {"result": outcome})
            return
        if not task.no_reply:
            self._post.answer(task.reply_to, task.correlation_id, pending=level)

        def done(future: kiwipy.Future) -> None:
            try:
                following = future.result()
            except kiwipy.CancelledError:
                return  # It stays claimed until the communicator closes.
            except kiwipy.TaskRejected:
                self.lane.put(functools.partial(self._offer, side, task, subscribers))
            except BaseException as error:
                self.finish(side, task, failure(error))
            else:
                self._take_outcome(side, task, following, subscribers, level + 1)

        outcome.add_done_callback(done)

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
        if held:
            self._report(side, "done", task.name)
            self._go_on(side)
        return held

    def give_back(self, side: Side, task: taskqueue.Task, kind: str = "returned") -> None:
        """Let a held task wait again. In any thread.

        :param kind: 'rejected' if it is rather for somebody else, 'returned' if it is for anyone.
        """
        if side.claims is not None and side.claims.settle(task, lambda: None, ""):
            if side.listed:
                heapq.heappush(side.listed, task.name)
            self._report(side, kind, task.name)
            self._go_on(side)

    def _go_on(self, side: Side) -> None:
        if side.put_by:
            self.lane.put(functools.partial(self._work_put_by, side))

    def _report(self, side: Side, kind: str, name: str) -> None:
        self._reports.add(side.key, kind, name, at_once=kind != "claimed" and self.lane.is_empty())

    def pull(self, side: Side, before_listing: Callable[[], None]) -> taskqueue.Task | None:
        """Claim the oldest task that waits, of those that waited when the directory was last listed.

        :param before_listing: called before the directory is listed.
        :return: the task; `None` if none waits.
        """
        fresh = False
        while True:
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
            task = self.take(side, name)
            if task is not None:
                return task

    def pull_each(self, side: Side, before_each: Callable[[], None]) -> Iterator[taskqueue.Task]:
        """Claim waiting tasks, oldest first, until there are none that have not been offered.

        :param before_each: called before each is claimed.
        """
        seen: set[str] = set()
        while names := sorted(set(side.queue.names()) - seen):
            for name in names:
                seen.add(name)
                before_each()
                task = self.take(side, name)
                if task is not None:
                    yield task

    def take(self, side: Side, name: str) -> taskqueue.Task | None:
        """Claim a task for somebody who pulls; `None` if it is gone, is none, or cannot be had, which is said.

        :raises OSError: there is no free descriptor.
        """
        try:
            task = side.claims.take(name) if side.claims is not None else None
        except taskqueue.Unreadable as error:
            self._tell_unreadable(name, error)
            return None
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                raise
            # One bad task is not to keep whoever pulls from all the others.
            _LOGGER.error("Task %s could not be read and waits again: %s", name, error)
            return None
        if task is not None:
            self._report(side, "claimed", name)
        return task

    def _tell_unreadable(self, name: str, error: taskqueue.Unreadable) -> None:
        _LOGGER.error("Task %s failed: %s", name, error)
        correlation_id = error.envelope.get("correlation_id")
        text = self._post.express(correlation_id, {"exception": str(error)})
        self._post.deliver(error.envelope.get("reply_to"), correlation_id, text, outlives=True)

    def look(self) -> None:
        """Move what could not be moved when it was finished, and take up again what was put by."""
        for side in list(self.sides.values()):
            if side.claims is not None:
                side.claims.look()
            self._go_on(side)

    def close(self) -> None:
        """Give back what is held."""
        for side in list(self.sides.values()):
            for name in side.claims.close() if side.claims is not None else ():
                self._reports.add(side.key, "returned", name, at_once=False)

    def disown(self) -> None:
        """Hold nothing, in a forked child."""
        for side in self.sides.values():
            if side.claims is not None:
                side.claims.disown()


class MessageSubscribers:
    """Answers calls and hears broadcasts. `rpc` and `broadcast` are changed under their owner's lock."""

    def __init__(self, post: Post, codec: frames.Codec, lane: Lane, facade: Facade) -> None:
        self.rpc: dict[str, Subscriber] = {}
        self.broadcast: dict[str, Subscriber] = {}
        self.lane = lane
        self._post = post
        self._codec = codec
        self._facade = facade

    def called(self, message: frames.Message) -> None:
        """Run the subscriber that a call is for, and answer it. In the lane."""
        to, reply_to, correlation_id = message.get("to"), message.get("reply_to"), message.get("correlation_id")
        subscriber, communicator = self.rpc.get(str(to)), self._facade()
        if subscriber is None or communicator is None or "body" not in message:
            self._post.answer(reply_to, correlation_id, undelivered=f"no RPC subscriber '{to}'")
            return
        try:
            outcome = subscriber(communicator, self._codec.decode(message, "body"))
        except BaseException as error:
            self._post.answer(reply_to, correlation_id, **failure(error))
        else:
            self._answer(reply_to, correlation_id, outcome, 1)

    def _answer(self, reply_to: object, correlation_id: object, outcome: Any, level: int) -> None:
        if not isinstance(outcome, kiwipy.Future):
            self._post.answer(reply_to, correlation_id, result=outcome)
            return
        self._post.answer(reply_to, correlation_id, pending=level)

        def done(future: kiwipy.Future) -> None:
            try:
                result = future.result()
            except kiwipy.CancelledError as error:
                self._post.answer(reply_to, correlation_id, cancelled=str(error))
            except BaseException as error:
                self._post.answer(reply_to, correlation_id, **failure(error))
            else:
                self._answer(reply_to, correlation_id, result, level + 1)

        outcome.add_done_callback(done)

    def heard(self, message: frames.Message) -> None:
        """Run the broadcast subscribers. In the lane."""
        if "body" not in message:
            _LOGGER.warning("A broadcast without a body: %s", sorted(message))
            return
        for subscriber in list(self.broadcast.values()):
            communicator = self._facade()
            if communicator is None:
                return
            try:
                fields = [self._codec.decode(message, key) for key in ("body", "sender", "subject", "correlation_id")]
                outcome = subscriber(communicator, *fields)
                if inspect.iscoroutine(outcome):
                    # kiwipy's RabbitMQ communicator takes coroutine functions here, and only here.
                    import asyncio

                    asyncio.run(outcome)
            except BaseException:
                _LOGGER.exception("A broadcast subscriber raised")
