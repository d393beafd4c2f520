"""Runs user code: task subscribers on one thread, RPC and broadcast subscribers on another.

Strategy: a ring names tasks that wait. Each is claimed (``holding.py``) and offered to the subscribers in turn until
one does not reject it. What that one returns is its outcome; of a future, what it ends with.

Rules:
- A ring beyond the prefetch is put by until there is room.
- A subscriber that raises ends its task with that outcome, and the reason is kept beside the task. Two mean something
  else: `kiwipy.TaskRejected` passes it on, and with `kiwipy.CancelledError` it stays claimed until the communicator
  closes.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import kiwipy

if TYPE_CHECKING or not __package__:
    import directories
    import frames
    import taskqueue
    from calls import failure
    from holding import Holdings, Reports, Side, Subscriber
    from lane import Lane
    from poller import say
    from post import Post
else:
    from . import directories, frames, taskqueue
    from .calls import failure
    from .holding import Holdings, Reports, Side, Subscriber
    from .lane import Lane
    from .poller import say
    from .post import Post

_LOGGER = logging.getLogger(__name__)
Facade = Callable[[], Any]
"""Gives the communicator that subscribers are called with; `None` once it has been collected."""


class Offering:
    """A task's way through the subscribers. Only the lane goes on to the next one."""

    def __init__(self, subscribers: list[Subscriber]) -> None:
        self.left = iter(subscribers)
        self.number = 0
        """Which offer is the present one: what the future of an earlier one says is not heard any more."""


class TaskSubscribers:
    """Works on the tasks that it is rung for. The lane has what is put by."""

    def __init__(self, holdings: Holdings, reports: Reports, post: Post, codec: frames.Codec, facade: Facade) -> None:
        self.lane = holdings.lane
        self._holdings = holdings
        holdings.on_room = self._go_on
        self._reports = reports
        self._post = post
        self._codec = codec
        self._facade = facade

    def rung(self, message: frames.Message) -> None:
        """Take a ring. In the selector thread.

        :raises frames.Garbage: it is none.
        """
        side, names = self._holdings.sides.get(str(message.get("queue"))), message.get("names")
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
            self._holdings.report(side, "rejected", name)
            return
        try:
            task = self._holdings.claim(side, name)
        except OSError as error:
            _LOGGER.error("Task %s could not be read and waits again: %s", name, error)
            self._holdings.report(side, "rejected", name)
        else:
            if task is not None:
                self._offer_guarded(side, task, Offering(subscribers))

    def _pass_on(self, side: Side, task: taskqueue.Task, offering: Offering, number: int) -> None:
        if offering.number == number:  # A look may have put us here a second time.
            self._offer_guarded(side, task, offering)

    def _offer_guarded(self, side: Side, task: taskqueue.Task, offering: Offering) -> None:
        try:
            side.awaited.pop(task, None)
            offering.number += 1
            self._offer(side, task, offering)
        except BaseException as error:
            # Somebody has set it in this thread, as a watchdog does, when the subscriber had returned.
            if task not in side.awaited:
                self._holdings.finish(side, task, failure(error))
            raise

    def _offer(self, side: Side, task: taskqueue.Task, offering: Offering) -> None:
        for subscriber in offering.left:
            communicator = self._facade()
            if communicator is None:
                return
            try:
                outcome = subscriber(communicator, self._codec.decode(task.message, "body"))
            except kiwipy.TaskRejected:
                continue
            except kiwipy.CancelledError:
                side.cancelled.append(task)
                return
            except BaseException as error:
                say("A task subscriber raised for task %s", task.name)
                self._holdings.finish(side, task, failure(error))
                return
            self._take_outcome(side, task, outcome, offering, offering.number, 1)
            return
        self._holdings.give_back(side, task, "rejected")

    def _take_outcome(
        self, side: Side, task: taskqueue.Task, outcome: Any, offering: Offering, number: int, level: int
    ) -> None:
        if not isinstance(outcome, kiwipy.Future):
            self._holdings.finish(side, task, {"result": outcome})
            return
        if not task.no_reply:
            self._post.answer(task.reply_to, task.correlation_id, pending=level)

        def done(future: kiwipy.Future) -> None:
            # By a look again, if a signal handler raised before it was called or in the middle of it.
            if offering.number == number:
                self._take_final(side, task, future, offering, number, level)

        side.awaited[task] = (outcome, done)
        outcome.add_done_callback(done)

    def _take_final(
        self,
        side: Side,
        task: taskqueue.Task,
        future: kiwipy.Future,
        offering: Offering,
        number: int,
        level: int,
    ) -> None:
        # Nothing is caught here: it would be what a signal handler raises.
        error = None if future.cancelled() else future.exception()
        if future.cancelled() or isinstance(error, kiwipy.CancelledError):
            side.cancelled.append(task)
            side.awaited.pop(task, None)
            return
        if isinstance(error, kiwipy.TaskRejected):
            self.lane.put(functools.partial(self._pass_on, side, task, offering, number))
        elif error is not None:
            self._holdings.finish(side, task, failure(error))
        else:
            self._take_outcome(side, task, future.result(), offering, number, level + 1)

    def _go_on(self, side: Side) -> None:
        if side.put_by:
            self.lane.put(functools.partial(self._work_put_by, side))

    def look(self) -> None:
        """Take up again what was put by, and the outcomes that a signal handler has kept from us."""
        for side in list(self._holdings.sides.values()):
            for future, done in list(side.awaited.values()):
                if _is_done(future):
                    self.lane.put(functools.partial(done, future))
            self._go_on(side)


def _is_done(future: kiwipy.Future) -> bool:
    # Not `done` alone, which waits: a handler that raises in the middle of `set_result` may have left a future of
    # Python's locked for ever (`threading.Condition.__exit__` is a function, and it is interrupted where it begins).
    if not future._condition.acquire(blocking=False):
        return False
    try:
        return bool(future.done())
    finally:
        future._condition.release()


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
        try:
            self._call(message)
        except BaseException as error:
            # Somebody has set it in this thread, as a watchdog does, when the subscriber had returned.
            self._post.answer(message.get("reply_to"), message.get("correlation_id"), **failure(error))
            raise

    def _call(self, message: frames.Message) -> None:
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
                say("A broadcast subscriber raised")
