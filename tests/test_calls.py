"""The calls that await an answer, without any process: a table of the answers, and random events against a model."""

from __future__ import annotations

import concurrent.futures
import contextlib
import random
import threading
from collections.abc import Iterator
from typing import Any

import kiwipy
import pytest

import frames
from calls import Calls, RemoteTraceback
from harness import TIMEOUT
from lane import Lane


def make(codec: frames.Codec | None = None, later: Any = lambda seconds, job: None) -> Calls:
    return Calls(Lane("callbacks"), (codec or frames.Codec()).decode, lambda: None, later)


def ended(future: concurrent.futures.Future[Any]) -> Any:
    """Return what became of a future: 'waits', a result, or the type of an exception."""
    if not future.done():
        return "waits"
    if future.cancelled():
        return "cancelled"
    error = future.exception()
    return type(error) if error is not None else future.result()


@pytest.mark.parametrize(
    ("answer", "outcome"),
    [
        ({"result": {"a": [1]}}, {"a": [1]}),
        ({"result": None}, None),
        ({"exception": "no", "traceback": "at line 1"}, kiwipy.RemoteException),
        ({"exception": "no"}, kiwipy.RemoteException),
        ({"undelivered": "nobody"}, kiwipy.UnroutableError),
        ({"cancelled": ""}, "cancelled"),
        ({"pending": "x"}, "waits"),
        ({"pending": 0}, "waits"),
    ],
)
def test_kinds_of_answer(answer: dict[str, Any], outcome: Any) -> None:
    calls = make()
    correlation_id, future = calls.expect(None)
    other_id, other = calls.expect(None)
    calls.answer({"correlation_id": correlation_id, **answer})
    assert ended(future) == outcome and ended(other) == "waits"
    if outcome != "waits":
        # What comes a second time finds nobody.
        calls.answer({"correlation_id": correlation_id, "result": "again"})
        assert ended(future) == outcome
    calls.answer({"correlation_id": other_id, "result": 1})
    assert ended(other) == 1


def locked(future: concurrent.futures.Future[Any]) -> threading.Event:
    """Have a thread hold a future, as one does that is interrupted while it looks at it, until the event is set."""
    holds, lets_go = threading.Event(), threading.Event()

    def hold() -> None:
        with future._condition:
            holds.set()
            lets_go.wait(TIMEOUT)

    threading.Thread(target=hold).start()
    assert holds.wait(TIMEOUT)
    return lets_go


@contextlib.contextmanager
def locked_by_another(future: concurrent.futures.Future[Any]) -> Iterator[None]:
    lets_go = locked(future)
    try:
        yield
    finally:
        lets_go.set()
        with future._condition:
            pass


def test_a_future_that_somebody_holds_is_ended_later_and_holds_up_no_other() -> None:
    due: list[tuple[float, Any]] = []
    calls = make(later=lambda seconds, job: due.append((seconds, job)))
    (first_id, first), (second_id, second) = calls.expect(None), calls.expect(None)
    lets_go = locked(first)
    calls.answer({"correlation_id": first_id, "result": 1})
    calls.answer({"correlation_id": second_id, "result": 2})
    assert ended(second) == 2
    for _ in range(12):
        assert len(due) == 1
        due.pop()[1]()
    assert due[0][0] == 10.0
    third_id, third = calls.expect(None)
    with locked_by_another(third):
        calls.answer({"correlation_id": third_id, "result": 3})
        assert len(due) == 2 and due[1][0] < 0.1
    due.pop()[1]()
    assert ended(third) == 3
    lets_go.set()
    with first._condition:
        due.pop()[1]()
    assert ended(first) == 1 and due == []


def test_exception_has_its_traceback_as_its_cause() -> None:
    calls = make()
    correlation_id, future = calls.expect(None)
    calls.answer({"correlation_id": correlation_id, "exception": "no", "traceback": "at line 1"})
    cause = future.exception().__cause__
    assert isinstance(cause, RemoteTraceback) and "at line 1" in str(cause)


def test_answer_of_no_known_kind_is_garbage_and_ends_nothing() -> None:
    calls = make()
    correlation_id, future = calls.expect(None)
    with pytest.raises(frames.Garbage):
        calls.answer({"correlation_id": correlation_id, "resolt": 1})
    calls.answer({"correlation_id": correlation_id, "result": 1})
    assert future.result() == 1


def test_pending_answers_nest_and_old_ones_are_passed_over() -> None:
    calls = make()
    correlation_id, future = calls.expect(None)
    for level in (1, 1, 2, 1, 2):
        calls.answer({"correlation_id": correlation_id, "pending": level})
    calls.answer({"correlation_id": correlation_id, "result": "at last"})
    assert future.result().result().result() == "at last"


def test_result_may_overtake_pending() -> None:
    calls = make()
    correlation_id, future = calls.expect(None)
    calls.answer({"correlation_id": correlation_id, "result": 1})
    calls.answer({"correlation_id": correlation_id, "pending": 1})
    assert future.result() == 1 and not calls


def test_result_that_does_not_hold_what_it_says_ends_the_call() -> None:
    def decoder(_: dict[str, Any]) -> Any:
        raise LookupError("not mine")

    calls = make(frames.Codec(decoder=decoder))
    correlation_id, future = calls.expect(None)
    calls.answer({"correlation_id": correlation_id, "result": {}})
    assert ended(future) is LookupError


def test_future_that_its_user_has_ended_is_left_alone() -> None:
    calls = make()
    for answer in ({"result": 1}, {"cancelled": ""}, {"pending": 1}, {"exception": "no"}):
        correlation_id, future = calls.expect(None)
        assert future.cancel()
        calls.answer({"correlation_id": correlation_id, **answer})
        assert future.cancelled()


def test_closed_calls_expect_nothing() -> None:
    calls = make()
    _, future = calls.expect(None)
    calls.close()
    assert ended(future) is kiwipy.CommunicatorClosed
    with pytest.raises(kiwipy.CommunicatorClosed):
        calls.expect(None)
    assert not calls


class Expected:
    """What a call must have come to: a chain of futures, and the end of the last one."""

    def __init__(self, way: object, future: Any) -> None:
        self.way = way
        self.futures = [future]
        self.level = 0
        self.end: Any = "waits"


def step(chance: random.Random, calls: Calls, model: dict[str, Expected], ways: list[object]) -> None:
    """Do something at random, to both."""
    kind = chance.randrange(10)
    correlation_id = chance.choice([*model, "unknown"]) if model else "unknown"
    expected = model.get(correlation_id)
    waits = expected is not None and expected.end == "waits"
    if kind < 3:
        way = chance.choice(ways)
        new_id, future = calls.expect(way)
        assert new_id not in model
        model[new_id] = Expected(way, future)
    elif kind < 6:
        answer, end = chance.choice(
            [
                ({"result": kind}, kind),
                ({"exception": "no"}, kiwipy.RemoteException),
                ({"undelivered": "no"}, kiwipy.UnroutableError),
                ({"cancelled": ""}, "cancelled"),
            ]
        )
        calls.answer({"correlation_id": correlation_id, **answer})
        if expected is not None and waits:
            expected.end = end
    elif kind < 8:
        level = chance.randrange(4)
        calls.answer({"correlation_id": correlation_id, "pending": level})
        if expected is not None and waits and level > expected.level:
            expected.level = level
            expected.futures.append(expected.futures[-1].result(0))
    elif kind < 9 and chance.random() < 0.3:
        way = chance.choice(ways)
        calls.fail(way, kiwipy.DeliveryFailed("it died"))
        for call in model.values():
            if call.way is way and call.end == "waits":
                call.end = kiwipy.DeliveryFailed
    elif chance.random() < 0.3:
        calls.forget(correlation_id)
        if expected is not None and waits:
            expected.end = "forgotten"


def test_random_events() -> None:
    for seed in range(200):
        chance = random.Random(seed)
        calls, model, ways = make(), dict[str, Expected](), [object(), object(), None]
        for _ in range(1000):
            step(chance, calls, model, ways)
        for expected in model.values():
            *before, last = expected.futures
            assert all(future.done() for future in before)
            assert ended(last) == ("waits" if expected.end == "forgotten" else expected.end), seed
        assert bool(calls) == any(expected.end == "waits" for expected in model.values())
        assert calls.ways() == {call.way for call in model.values() if call.end == "waits"} - {None}
        calls.close()
        closed = [expected for expected in model.values() if expected.end == "waits"]
        assert {ended(expected.futures[-1]) for expected in closed} <= {kiwipy.CommunicatorClosed} and not calls
