"""The futures that await an answer, and what each kind of answer does to them. No I/O.

Strategy: each call for which an answer is awaited stands in `Calls` under its correlation id until the answer has come,
or whoever owes it has died.

An answer carries the correlation id and one of these fields, which says what becomes of the future that waits
(`Calls`):

    result        it has this result, as the user's decoder has it
    exception     it has a `kiwipy.RemoteException` of this text, caused by what is in ``traceback``
    undelivered   it has a `kiwipy.UnroutableError`: nobody subscribes to the identifier in that communicator any more
    cancelled     it is cancelled
    pending       the subscriber returned a future: it has another future as its result, which waits from here on. The
                  number is how many there were; a lower one is old, and passed over

Rules:
- An entry is put in by one call and taken out by one, so that each future is ended once, whoever comes first.
- Callbacks of futures are user code, and run on a lane of their own.
- No future is waited for: a signal handler may have interrupted whoever looks at it, and wait for an answer itself; and
  one that raises there leaves a future of Python's locked for ever (`threading.Condition.__exit__` is a function). What
  cannot be ended at once is tried again.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import itertools
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import kiwipy

if TYPE_CHECKING or not __package__:
    import frames
    from lane import Lane
else:
    from . import frames
    from .lane import Lane

_LOOKED_AT_SECONDS = 0.005
_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.01, 10.0


class RemoteTraceback(Exception):
    """The traceback of a subscriber's exception, as the ``__cause__`` of the `kiwipy.RemoteException`."""

    def __str__(self) -> str:
        return f'\n"""\n{self.args[0]}"""'


def failure(error: BaseException) -> dict[str, Any]:
    """Return the fields of an answer that carry an exception, whatever it does when it is printed."""
    try:
        text = str(error)
    except Exception:
        text = f"{type(error).__name__}, which cannot be printed"
    try:
        trace = "".join(traceback.format_exception(error))
    except Exception:
        trace = text
    return {"exception": text, "traceback": trace}


class Reply(concurrent.futures.Future[Any]):
    """A future whose callbacks run on a thread of their own, since they are user code."""

    def __init__(self, lane: Lane) -> None:
        super().__init__()
        self._lane = lane
        self._due: list[Callable[[], object]] | None = None
        """What is to be called once it has ended; `None` unless that is just being done."""

    def add_done_callback(self, fn: Callable[[concurrent.futures.Future[Any]], Any]) -> None:
        """Call `fn` when this is done; :raises RuntimeError: the system has no room for the thread that does."""
        self._lane.start()
        super().add_done_callback(lambda future: self._call(functools.partial(fn, future)))

    def _call(self, job: Callable[[], object]) -> None:
        due = self._due if self.is_held_here() else None  # Not what another thread ends just now.
        if due is None:
            self._lane.put(job)
        else:
            due.append(job)

    def end(self, how: Callable[[], object], seconds: float = _LOOKED_AT_SECONDS) -> bool:
        """End it, unless it has ended; say whether that could be done, as nobody holds it for so long."""
        if not self._condition.acquire(timeout=seconds):
            return False
        self._due = due = list[Callable[[], object]]()
        try:
            with contextlib.suppress(concurrent.futures.InvalidStateError, RuntimeError):  # By its user himself.
                how()
            # Once more, for whoever had been interrupted when he began to wait, and did not hear that it ended.
            self._condition.notify_all()
        finally:
            self._due = None
            self._condition.release()
        for job in due:
            self._lane.put(job)  # Which runs it here where it has ended: not while we hold what it may wait for.
        return True

    def is_held_here(self) -> bool:
        """Say whether this very thread holds it: we have interrupted whoever looks at it, or is about to wait."""
        return bool(self._condition._is_owned())  # type: ignore[attr-defined]

    def disown(self) -> None:
        """End it, in a forked child: the thread that looked at it, and those that waited, are the parent's."""
        before, self._condition = self._condition, threading.Condition()
        self._waiters.clear()
        self.end(lambda: self.set_exception(kiwipy.CommunicatorClosed()))
        # But for whom a signal handler has interrupted there, and who goes on in the child.
        for waiter in list(before._waiters):  # type: ignore[attr-defined]
            with contextlib.suppress(RuntimeError):
                waiter.release()


@dataclass
class Call:
    """What a correlation id stands for: the future that awaits the next answer."""

    future: Reply
    way: object
    """The way to an RPC's recipient, whose death ends the call; `None` for a task."""
    level: int = 0
    """How many futures the recipient has answered with; a task that runs a second time may repeat them."""


class Calls:
    """The calls that await an answer. Safe in any thread: each entry is put in by one call, and taken out by one."""

    def __init__(
        self,
        callbacks: Lane,
        decode: Callable[[frames.Message, str], Any],
        prepare: Callable[[], None],
        later: Callable[[float, Callable[[], None]], object],
    ) -> None:
        """
        :param prepare: called before an answer is awaited.
        :param later: does something after so many seconds. Called in any thread.
        """
        self._callbacks = callbacks
        self._decode = decode
        self._prepare = prepare
        self._later = later
        self._pending: dict[str, Call] = {}
        self._taken: dict[str, Call] = {}
        """Those whose answer has come, and is just being decoded."""
        self._unended: dict[Reply, Callable[[], object]] = {}
        """Futures that could not be ended at once, each with how."""
        self._numbers = itertools.count(1)
        self.closed = False

    def __bool__(self) -> bool:
        return bool(self._pending)

    def expect(self, way: object) -> tuple[str, Reply]:
        """Await an answer; return the correlation id it will carry, and its future.

        :raises kiwipy.CommunicatorClosed: there will be none.
        :raises RuntimeError: the system has no room for the thread that decodes it.
        """
        self._prepare()
        correlation_id, future = f"{next(self._numbers):x}", Reply(self._callbacks)
        self._pending[correlation_id] = Call(future, way)
        if self.closed:
            self.forget(correlation_id)
            raise kiwipy.CommunicatorClosed
        return correlation_id, future

    def forget(self, correlation_id: str | None) -> None:
        """Await an answer no more."""
        self._pending.pop(correlation_id or "", None)

    def answer(self, message: frames.Message) -> None:
        """Take an answer, and do to the future that waits what it says.

        :raises frames.Garbage: it is no answer; whoever waits goes on waiting.
        """
        correlation_id = str(message.get("correlation_id"))
        for kind, take in _ANSWERS.items():
            if kind in message:
                self._take(correlation_id, functools.partial(take, self, correlation_id, message))
                return
        raise frames.Garbage(f"an answer of no known kind: {sorted(message)}")

    def _take(self, correlation_id: str, use: Callable[[Call], None]) -> None:
        """Take a call out, unless somebody else does; a child that is forked meanwhile finds it all the same."""
        call = self._pending.get(correlation_id)
        if call is None:
            return
        self._taken[correlation_id] = call
        try:
            if self._pending.pop(correlation_id, None) is call:
                use(call)
        finally:
            self._taken.pop(correlation_id, None)

    def _fail(self, call: Call, error: BaseException) -> None:
        self._end(call.future, functools.partial(call.future.set_exception, error))

    def fail(self, way: object, error: BaseException) -> None:
        """End the calls to a recipient that will not answer any more."""
        for correlation_id, call in list(self._pending.items()):
            if call.way is way:
                self._take(correlation_id, lambda call: self._fail(call, error))

    def ways(self) -> set[object]:
        """Return the ways to those who owe an answer."""
        return {call.way for call in list(self._pending.values()) if call.way is not None}

    def close(self) -> None:
        """End all calls. Nothing is done later by whoever gave `later`, from here on."""
        self.closed = True
        # Those too whose answer a decoder is just looking at, for as long as it likes.
        for call in self._taken.copy().values():
            self._fail(call, kiwipy.CommunicatorClosed())
        while self._pending:
            for correlation_id in list(self._pending):
                self._take(correlation_id, lambda call: self._fail(call, kiwipy.CommunicatorClosed()))
        if self._unended:
            with contextlib.suppress(RuntimeError):  # There is no room for another thread.
                threading.Thread(target=self._end_patiently, name="pipebroker endings", daemon=True).start()

    def end_the_rest(self) -> None:
        """End what could not be ended yet: in whoever closes, as it is often he that holds it."""
        for future, how in list(self._unended.items()):
            # Whom we have interrupted may be about to wait, and not hear of it: he is told once more when he does.
            interrupted = future.is_held_here()
            if future.end(how) and not interrupted:
                self._unended.pop(future, None)

    def _end_patiently(self) -> None:
        pause = _FIRST_PAUSE_SECONDS
        while self._unended:
            self.end_the_rest()
            threading.Event().wait(pause)
            pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)

    def disown(self) -> None:
        """End all calls, in a forked child."""
        self.closed = True
        for call in (*self._pending.values(), *self._taken.values()):
            call.future.disown()
        for future in self._unended:
            future.disown()
        self._pending.clear()
        self._unended.clear()

    def _end(self, future: Reply, how: Callable[[], object], pause: float = _FIRST_PAUSE_SECONDS) -> None:
        # Together, as whoever holds one may hold many: `concurrent.futures.wait` does.
        if future.end(how, _LOOKED_AT_SECONDS / (1 + len(self._unended))):
            self._unended.pop(future, None)
            return
        self._unended[future] = how
        self._later(pause, lambda: self._end_again(future, pause))

    def _end_again(self, future: Reply, pause: float) -> None:
        how = self._unended.get(future)
        if how is not None:
            self._end(future, how, min(2 * pause, _LONGEST_PAUSE_SECONDS))

    def _result(self, _: str, message: frames.Message, call: Call) -> None:
        try:
            value = self._decode(message, "result")
        except BaseException as error:
            self._fail(call, error)
        else:
            self._end(call.future, functools.partial(call.future.set_result, value))

    def _exception(self, _: str, message: frames.Message, call: Call) -> None:
        error = kiwipy.RemoteException(message["exception"])
        if message.get("traceback"):
            error.__cause__ = RemoteTraceback(message["traceback"])
        self._fail(call, error)

    def _undelivered(self, _: str, message: frames.Message, call: Call) -> None:
        self._fail(call, kiwipy.UnroutableError(message["undelivered"]))

    def _cancelled(self, _: str, message: frames.Message, call: Call) -> None:
        def cancel() -> None:
            call.future.cancel()
            call.future.set_running_or_notify_cancel()

        self._end(call.future, cancel)

    def _pending_answer(self, correlation_id: str, message: frames.Message, call: Call) -> None:
        level = message["pending"]
        if not isinstance(level, int) or level <= call.level:
            self._pending[correlation_id] = call
            return
        following = Call(Reply(self._callbacks), call.way, level)
        self._pending[correlation_id] = following
        if self.closed:  # Perhaps just now, with the others.
            self._take(correlation_id, lambda call: self._fail(call, kiwipy.CommunicatorClosed()))
        self._end(call.future, functools.partial(call.future.set_result, following.future))


_ANSWERS: dict[str, Callable[[Calls, str, frames.Message, Call], None]] = {
    "result": Calls._result,
    "exception": Calls._exception,
    "undelivered": Calls._undelivered,
    "cancelled": Calls._cancelled,
    "pending": Calls._pending_answer,
}
