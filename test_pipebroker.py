"""The broker as its users meet it: real processes, real pipes, real files."""

from __future__ import annotations

import asyncio
import datetime
import fcntl
import gc
import json
import os
import random
import shutil
import signal
import socket
import stat
import struct
import subprocess
import sys
import termios
import threading
import uuid
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kiwipy
import pytest

import control
import control_tasks
import directories
import discovery
import frames
import whose
from harness import HERE, HOLDER, PULLER, RECORDER, SENDER, TIMEOUT, WORKER, Broker, eventually, recorded
from pipebroker import DEFAULT_QUEUE, PipeCommunicator

# Tasks


def test_task_outcome(served: Broker) -> None:
    worker, sender = served.communicator(), served.communicator()
    worker.add_task_subscriber(lambda communicator, body: [communicator is worker, body])
    body = {"text": "ü\0\ud800", "list": [1, 2.5, None, True]}
    assert sender.task_send(body).result(TIMEOUT) == [True, body]


def test_no_reply_gives_none(served: Broker) -> None:
    done = threading.Event()
    communicator = served.communicator()
    communicator.add_task_subscriber(lambda *_: done.set())
    assert communicator.task_send("body", no_reply=True) is None
    assert done.wait(TIMEOUT)


def test_task_is_on_the_disk_when_task_send_returns(broker: Broker) -> None:
    broker.communicator().task_send("the body", no_reply=True)
    (path,) = broker.queue.glob("task_*.json")
    assert json.loads(path.read_text())["body"] == "the body"


def test_subscriber_that_raises(served: Broker) -> None:
    def subscriber(*_: Any) -> None:
        raise KeyError("no such thing")

    communicator = served.communicator()
    communicator.add_task_subscriber(subscriber)
    communicator.add_rpc_subscriber(subscriber, "raises")
    for future in (communicator.task_send(1), communicator.rpc_send("raises", 1)):
        with pytest.raises(kiwipy.RemoteException) as caught:
            future.result(TIMEOUT)
        assert str(caught.value) == str(KeyError("no such thing"))
        assert "in subscriber" in str(caught.value.__cause__)


def test_rejected_task_goes_to_the_next_subscriber_and_then_to_the_next_worker(served: Broker) -> None:
    asked: list[str] = []

    def reject(name: str) -> Any:
        def subscriber(*_: Any) -> None:
            asked.append(name)
            raise kiwipy.TaskRejected

        return subscriber

    first, second = served.communicator(), served.communicator()
    first.add_task_subscriber(reject("one"))
    first.add_task_subscriber(reject("two"))
    second.add_task_subscriber(lambda *_: "done")
    for _ in range(4):
        assert second.task_send("task").result(TIMEOUT) == "done"
    assert asked[:2] == ["one", "two"]


def test_task_that_all_reject_waits_for_somebody_new(served: Broker) -> None:
    asked = []

    def reject(*_: Any) -> None:
        asked.append(1)
        raise kiwipy.TaskRejected

    first = served.communicator()
    first.add_task_subscriber(reject)
    future = first.task_send("task")
    eventually(lambda: len(asked) >= 2)  # The second time after a pause.
    assert len(asked) < 5
    second = served.communicator()
    second.add_task_subscriber(lambda *_: "done")
    assert future.result(TIMEOUT) == "done"


def test_futures_nest_as_with_rabbitmq(served: Broker) -> None:
    inner, outer = kiwipy.Future(), kiwipy.Future()
    communicator = served.communicator()
    communicator.add_task_subscriber(lambda *_: outer)
    communicator.add_rpc_subscriber(lambda *_: outer, "nested")
    sent = [communicator.task_send(1), communicator.rpc_send("nested", 1)]
    first = [future.result(TIMEOUT) for future in sent]
    assert all(isinstance(future, kiwipy.Future) and not future.done() for future in first)
    assert [state for state, _ in states(served)] == ["claimed"]
    outer.set_result(inner)
    second = [future.result(TIMEOUT) for future in first]
    inner.set_result("at last")
    assert [future.result(TIMEOUT) for future in second] == ["at last", "at last"]
    eventually(lambda: [state for state, _ in states(served)] == ["completed"])


def states(broker: Broker) -> list[tuple[str, str]]:
    return [(row["state"], row["id"]) for row in control_tasks.tasks(broker.config_path)]


def test_cancelled_future_gives_the_task_back_when_the_communicator_closes(served: Broker) -> None:
    outcome = kiwipy.Future()
    first, second = served.communicator(), served.communicator()
    first.add_task_subscriber(lambda *_: outcome)
    future = second.task_send("task")
    pending = future.result(TIMEOUT)
    outcome.cancel()
    second.add_task_subscriber(lambda *_: "done by the second")
    first.close()
    assert pending.result(TIMEOUT) == "done by the second"


def test_rpc_of_a_cancelled_future(broker: Broker) -> None:
    outcome = kiwipy.Future()
    communicator = broker.communicator()
    communicator.add_rpc_subscriber(lambda *_: outcome, "x")
    pending = communicator.rpc_send("x", 1).result(TIMEOUT)
    outcome.cancel()
    with pytest.raises(kiwipy.CancelledError):
        pending.result(TIMEOUT)


def test_prefetch(served: Broker) -> None:
    futures = [kiwipy.Future() for _ in range(5)]
    waiting = iter(futures)
    started = threading.Semaphore(0)

    def subscriber(*_: Any) -> kiwipy.Future:
        started.release()
        return next(waiting)

    worker, sender = served.communicator(task_prefetch_count=2), served.communicator()
    worker.add_task_subscriber(subscriber)
    sent = [sender.task_send(number) for number in range(5)]
    for number in range(5):
        assert started.acquire(timeout=TIMEOUT)
        if number:
            futures[number - 1].set_result(number - 1)
        counts = control.status(served.config_path)["tasks"]
        assert counts["claimed"] <= 2
    futures[4].set_result(4)
    assert [future.result(TIMEOUT).result(TIMEOUT) for future in sent] == list(range(5))


def test_idle_worker_gets_what_a_busy_one_has_not_started(served: Broker) -> None:
    release = threading.Event()
    busy = served.communicator()
    busy.add_task_subscriber(lambda *_: release.wait(TIMEOUT) and "busy")
    sent = [busy.task_send(number) for number in range(5)]
    eventually(lambda: control.status(served.config_path)["tasks"]["claimed"] == 1)
    idle = served.communicator()
    idle.add_task_subscriber(lambda *_: "idle")
    try:
        assert Counter(future.result(TIMEOUT) for future in sent[1:]) == {"idle": 4}
    finally:
        release.set()
    assert sent[0].result(TIMEOUT) == "busy"


def test_idle_worker_gets_what_a_stopped_one_was_rung_for(served: Broker) -> None:
    child = served.child(WORKER, "stopped")
    idle = served.communicator()
    idle.add_task_subscriber(lambda *_: "idle")
    child.stop()
    assert [idle.task_send(number).result(TIMEOUT) for number in range(6)] == ["idle"] * 6
    child.go_on()


def test_stopped_worker_is_rung_for_little(served: Broker) -> None:
    child = served.child(WORKER, "stopped")
    other, go = served.communicator(), threading.Semaphore(0)
    other.add_task_subscriber(lambda *_: go.acquire(timeout=TIMEOUT) and "other")
    child.stop()
    for _ in range(20):
        sent = [other.task_send(number) for number in range(100)]
        go.release(100)
        assert {future.result(TIMEOUT) for future in sent} == {"other"}
    descriptor = os.open(served.pipes / "task_stopped", os.O_RDONLY | os.O_NONBLOCK)
    try:
        unread = struct.unpack("i", fcntl.ioctl(descriptor, termios.FIONREAD, b"\0" * 4))[0]
    finally:
        os.close(descriptor)
    # The 64 that a worker may have unclaimed, and not as many in each round: every round would wait for that.
    assert 0 < unread < 2 * 64 * 100
    child.go_on()


def test_tasks_of_a_killed_worker_are_done_by_another(served: Broker) -> None:
    child = served.child(HOLDER, "doomed")
    sender = served.communicator()
    pending = [sender.task_send(number).result(TIMEOUT) for number in range(3)]
    child.kill()
    eventually(lambda: [state for state, _ in states(served)] == ["waiting"] * 3)
    sender.add_task_subscriber(lambda _, body: body)
    assert [future.result(TIMEOUT) for future in pending] == [0, 1, 2]
    assert [row["deaths"] for row in control_tasks.tasks(served.config_path)] == [1, 1, 1]
    assert "waits again: its worker died" in served.log()


# RPC


def test_rpc_without_coordinator(broker: Broker) -> None:
    server = broker.child(WORKER, "server")
    assert broker.communicator().rpc_send("server", "hello").result(TIMEOUT) == [server.pid, "hello"]


def test_rpc_to_nobody(broker: Broker) -> None:
    communicator = broker.communicator()
    for recipient in ("nobody", 17, "", "../coordinator", "\ud800"):
        with pytest.raises(kiwipy.UnroutableError):
            communicator.rpc_send(recipient, "hello")


def test_rpc_recipient_dies(broker: Broker) -> None:
    child = broker.child(HOLDER, "victim")
    communicator = broker.communicator()
    pending = communicator.rpc_send("victim", 1).result(TIMEOUT)
    child.kill()
    with pytest.raises(kiwipy.DeliveryFailed):
        pending.result(TIMEOUT)
    with pytest.raises(kiwipy.UnroutableError):
        communicator.rpc_send("victim", 2)
    discovery.cleanup_dead_processes(broker.config_path)


ODD = ["a/b", "../..", ".", "..", " ", "a b\n", "ü€😀", "x" * 300, "%2F", "=", "~", 17, 3.5, ("a", 1)]


def test_odd_identifiers(broker: Broker) -> None:
    communicator = broker.communicator()
    for identifier in ODD:
        assert communicator.add_rpc_subscriber(lambda _, body, i=identifier: [str(i), body], identifier) == identifier
    for identifier in ODD:
        assert communicator.rpc_send(str(identifier), 1).result(TIMEOUT) == [str(identifier), 1]
    assert len(list(broker.pipes.glob("route_*"))) == len(ODD)
    with pytest.raises(ValueError):
        communicator.add_rpc_subscriber(print, "\ud800")
    for identifier in ODD:
        communicator.remove_rpc_subscriber(str(identifier))
    assert not list(broker.pipes.glob("route_*"))


def test_rpc_identifier_belongs_to_one(broker: Broker) -> None:
    first, second = broker.communicator(), broker.communicator()
    other = broker.child(WORKER, "other")
    first.add_rpc_subscriber(lambda *_: "first", "x")
    for communicator, identifier in ((first, "x"), (second, "x"), (second, "other")):
        with pytest.raises(kiwipy.DuplicateSubscriberIdentifier):
            communicator.add_rpc_subscriber(print, identifier)
    first.remove_rpc_subscriber("x")
    second.add_rpc_subscriber(lambda *_: "second", "x")
    assert first.rpc_send("x", 1).result(TIMEOUT) == "second"
    second.close()
    first.add_rpc_subscriber(lambda *_: "first again", "x")
    other.kill()
    first.add_rpc_subscriber(lambda *_: "taken over", "other")
    assert first.rpc_send("other", 1).result(TIMEOUT) == "taken over"
    discovery.cleanup_dead_processes(broker.config_path)


def test_subscriber_may_wait_for_a_reply_on_the_same_communicator(served: Broker) -> None:
    first, second = served.communicator(), served.communicator()
    second.add_rpc_subscriber(lambda _, body: body + 1, "add")
    first.add_rpc_subscriber(lambda me, body: me.rpc_send("add", body).result(TIMEOUT), "relay")
    first.add_task_subscriber(lambda me, body: me.rpc_send("relay", body).result(TIMEOUT))
    assert second.task_send(1).result(TIMEOUT) == 2


def test_callbacks_of_futures_may_block(broker: Broker) -> None:
    communicator = broker.communicator()
    communicator.add_rpc_subscriber(lambda _, body: body, "echo")
    got: kiwipy.Future = kiwipy.Future()
    future = communicator.rpc_send("echo", 1)
    future.add_done_callback(lambda _: got.set_result(communicator.rpc_send("echo", 2).result(TIMEOUT)))
    assert got.result(TIMEOUT) == 2


# Broadcasts


def test_broadcast(served: Broker) -> None:
    got: list[Any] = []
    arrived = threading.Semaphore(0)

    def subscriber(_: Any, body: Any, sender: Any, subject: Any, correlation_id: Any) -> None:
        got.append((body, sender, subject, correlation_id))
        arrived.release()

    children = [served.child(WORKER) for _ in range(2)]
    communicator = served.communicator()
    communicator.add_broadcast_subscriber(kiwipy.BroadcastFilter(subscriber, subject="sub.*"))
    assert communicator.broadcast_send({"a": 1}, sender=17, subject="sub.ject", correlation_id="c") is True
    communicator.broadcast_send("filtered out", subject="other")
    assert arrived.acquire(timeout=TIMEOUT)
    assert got == [({"a": 1}, 17, "sub.ject", "c")]
    assert [child.line() for child in children] == ["[{'a': 1}, 17, 'sub.ject', 'c']"] * 2


def test_subscriber_added_before_a_broadcast_receives_it(served: Broker) -> None:
    sender = served.communicator()
    for number in range(30):
        got: kiwipy.Future = kiwipy.Future()
        with PipeCommunicator(served.profile, served.config_path) as communicator:
            communicator.add_broadcast_subscriber(lambda _, body, *rest, got=got: got.set_result(body))
            sender.broadcast_send(number)
            assert got.result(TIMEOUT) == number


def test_broadcast_is_kept_for_a_coordinator(broker: Broker) -> None:
    communicator = broker.communicator()
    got: list[int] = []
    arrived = threading.Semaphore(0)
    communicator.add_broadcast_subscriber(lambda _, body, *rest: (got.append(body), arrived.release()))
    communicator.broadcast_send(0)
    pid = broker.start()
    assert arrived.acquire(timeout=TIMEOUT)
    os.kill(pid, signal.SIGKILL)
    eventually(lambda: not directories.is_read(broker.pipes / directories.BROADCAST_INTAKE))
    for number in range(1, 5):
        communicator.broadcast_send(number)
    broker.start()
    communicator.broadcast_send(5)
    for _ in range(5):
        assert arrived.acquire(timeout=TIMEOUT)
    assert got == list(range(6))


# Subscribers, bodies, closing


def test_unknown_subscribers(broker: Broker) -> None:
    communicator = broker.communicator()
    for remove in (
        communicator.remove_rpc_subscriber,
        communicator.remove_task_subscriber,
        communicator.remove_broadcast_subscriber,
        communicator.task_queue("named").remove_task_subscriber,
    ):
        with pytest.raises(ValueError):
            remove("unknown")


def test_identifiers(broker: Broker) -> None:
    communicator = broker.communicator()
    for add, remove in (
        (communicator.add_task_subscriber, communicator.remove_task_subscriber),
        (communicator.add_broadcast_subscriber, communicator.remove_broadcast_subscriber),
    ):
        assert add(print) not in (None, "")
        assert add(print, 17) == 17
        with pytest.raises(kiwipy.DuplicateSubscriberIdentifier):
            add(print, "17")
        remove("17")
        assert add(print, 17) == 17


def test_removed_task_subscriber_gets_nothing(served: Broker) -> None:
    first, second = served.communicator(), served.communicator()
    identifier = first.add_task_subscriber(lambda *_: "first")
    assert second.task_send(1).result(TIMEOUT) == "first"
    first.remove_task_subscriber(identifier)
    second.add_task_subscriber(lambda *_: "second")
    assert {second.task_send(1).result(TIMEOUT) for _ in range(5)} == {"second"}


def test_closed(served: Broker) -> None:
    communicator = served.communicator()
    pending = communicator.task_send("nobody does it")
    called = kiwipy.Future()
    pending.add_done_callback(called.set_result)
    assert not communicator.is_closed()
    communicator.close()
    communicator.close()
    assert communicator.is_closed()
    for future in (pending, called.result(TIMEOUT)):
        with pytest.raises(kiwipy.CommunicatorClosed):
            future.result(TIMEOUT)
    for call in (
        lambda: communicator.task_send(1),
        lambda: communicator.rpc_send("x", 1),
        lambda: communicator.broadcast_send(1),
        lambda: communicator.add_task_subscriber(print),
        lambda: communicator.add_rpc_subscriber(print),
        lambda: communicator.add_broadcast_subscriber(print),
        lambda: communicator.remove_rpc_subscriber("x"),
        lambda: communicator.task_queue("x"),
    ):
        with pytest.raises(kiwipy.CommunicatorClosed):
            call()


def test_close_gives_unfinished_tasks_back_uncounted(served: Broker) -> None:
    first, second = served.communicator(), served.communicator()
    first.add_task_subscriber(lambda *_: kiwipy.Future())
    pending = second.task_send("task").result(TIMEOUT)
    second.add_task_subscriber(lambda *_: "second")
    first.close()
    assert pending.result(TIMEOUT) == "second"
    assert [row["deaths"] for row in control_tasks.tasks(served.config_path)] == [0]


def test_close_flushes(served: Broker) -> None:
    child = served.child(WORKER, "slow")
    child.stop()
    other = served.communicator()
    done = threading.Semaphore(0)
    other.add_broadcast_subscriber(lambda *_: done.release())
    with PipeCommunicator(served.profile, served.config_path) as communicator:
        for number in range(3000):
            communicator.broadcast_send([number, "x" * 400])
    for _ in range(3000):
        assert done.acquire(timeout=TIMEOUT)
    child.go_on()


def test_garbage_collection_closes(served: Broker) -> None:
    communicator = PipeCommunicator(served.profile, served.config_path, "forgotten")
    communicator.add_rpc_subscriber(print, "x")
    communicator.add_task_subscriber(print)
    del communicator
    gc.collect()
    eventually(lambda: not list(served.pipes.glob("*_forgotten")) and not list(served.pipes.glob("route_*")))
    assert not (served.config_path / "pipes" / "worker_forgotten.json").exists()


def test_interpreter_exit_closes(served: Broker) -> None:
    child = served.child(WORKER.replace("worker.close()", ""), "forgetful")
    assert child.end() == 0
    assert not list(served.pipes.glob("*_forgetful")) and not list(served.pipes.glob("route_*"))
    assert not (served.config_path / "pipes" / "worker_forgetful.json").exists()


def test_body_that_json_cannot_express(broker: Broker) -> None:
    communicator = broker.communicator()
    communicator.add_rpc_subscriber(lambda *_: object(), "x")
    circle: list[Any] = []
    circle.append(circle)
    for body in (object(), {object()}, circle, {(1, 2): 3}):
        for send in (
            communicator.task_send,
            communicator.broadcast_send,
            lambda body: communicator.rpc_send("x", body),
            communicator.task_queue("named").task_send,
        ):
            with pytest.raises(TypeError):
                send(body)
    assert not list(broker.queue.rglob("task_*.json"))
    with pytest.raises(kiwipy.RemoteException, match="JSON"):
        communicator.rpc_send("x", 1).result(TIMEOUT)


def test_what_goes_beyond_json_arrives_as_what_it_was(served: Broker) -> None:
    body = {
        "uuid": uuid.UUID(int=7),
        "times": [datetime.datetime(2026, 2, 28, 12, tzinfo=datetime.timezone.utc), datetime.date(2026, 2, 28)],
        "rest": [b"\0\xff", {1, (2, 3)}, frozenset("a"), 3 - 4j],
        "!": "no mark of ours",
        "large": ["x" * 10_000],
    }
    communicator, other = served.communicator(), served.communicator()
    heard: kiwipy.Future = kiwipy.Future()
    other.add_broadcast_subscriber(lambda _, *message: heard.set_result(message))
    other.add_rpc_subscriber(lambda _, body: body, "echo")
    other.add_task_subscriber(lambda _, body: body)
    assert communicator.rpc_send("echo", body).result(TIMEOUT) == body
    assert communicator.task_send(body).result(TIMEOUT) == body
    sender, correlation_id = uuid.uuid4(), uuid.uuid4()
    # As plumpy does, whose processes have UUIDs.
    communicator.broadcast_send(body, sender, "state_changed.running.finished", correlation_id)
    assert heard.result(TIMEOUT) == (body, sender, "state_changed.running.finished", correlation_id)


def test_encoder_and_decoder_see_only_what_is_the_users(served: Broker) -> None:
    seen: list[Any] = []

    def decode(mapping: dict[str, Any]) -> Any:
        seen.append(mapping)
        return complex(*mapping["complex"]) if "complex" in mapping else mapping

    options = {"encoder": lambda value: {"complex": [value.real, value.imag]}, "decoder": decode}
    communicator = served.communicator(**options)
    communicator.add_task_subscriber(lambda _, body: body["z"] * 2)
    communicator.add_rpc_subscriber(lambda _, body: body * 2, "double")
    assert communicator.task_send({"z": 1 + 2j}).result(TIMEOUT) == 2 + 4j
    assert communicator.rpc_send("double", 3j).result(TIMEOUT) == 6j
    assert all("correlation_id" not in mapping for mapping in seen)


def test_large_bodies(served: Broker) -> None:
    big = "x" * 50_000_000
    got: kiwipy.Future = kiwipy.Future()
    first, second = served.communicator(), served.communicator()
    first.add_task_subscriber(lambda _, body: body)
    first.add_rpc_subscriber(lambda _, body: body, "echo")
    first.add_broadcast_subscriber(lambda _, body, *rest: got.set_result(body))
    assert second.task_send(big).result(TIMEOUT) == big
    assert second.rpc_send("echo", big).result(TIMEOUT) == big
    second.broadcast_send(big)
    assert got.result(TIMEOUT) == big
    eventually(lambda: not list(served.pipes.glob("body_*")))


def test_worker_id(broker: Broker) -> None:
    child = broker.child(WORKER, "me")
    with pytest.raises(kiwipy.DuplicateSubscriberIdentifier):
        broker.communicator("me")
    for bad in ("", "a/b", "../x", ".x", "x" * 101, "ü", 17):
        if bad != "":
            with pytest.raises(ValueError):
                broker.communicator(bad)
    child.kill()
    broker.communicator("me").add_rpc_subscriber(lambda *_: "new life", "me")
    assert broker.communicator().rpc_send("me", 1).result(TIMEOUT) == "new life"


def test_worker_id_is_taken_over_with_its_tasks_given_back(broker: Broker) -> None:
    sender = broker.communicator()
    sender.task_send("task", no_reply=True)
    child = broker.child(PULLER, "me")
    child.kill()
    heir = broker.communicator("me")
    assert [state for state, _ in states(broker)] == ["waiting"]
    with heir.task_queue(DEFAULT_QUEUE).next_task() as task:
        assert task.body == "task"


# Named queues


def test_next_task(broker: Broker) -> None:
    queue = broker.communicator().task_queue("a/queue")
    with pytest.raises(kiwipy.QueueEmpty), queue.next_task(timeout=0.1):
        pass
    sent = queue.task_send("one")
    queue.task_send("two", no_reply=True)
    with queue.next_task() as task:
        assert (task.body, task.no_reply, task.state) == ("one", False, "pending")
    with queue.next_task() as task, task.processing() as outcome:
        assert (task.body, task.state) == ("one", "processing")
        outcome.set_result("done")
    assert task.state == "finished"
    assert sent.result(TIMEOUT) == "done"
    with queue.next_task() as task:
        outcome = task.process()
        with pytest.raises(asyncio.InvalidStateError):
            task.process()
        task.requeue()
        assert task.state == "requeued"
    with queue.next_task() as task, pytest.raises(ZeroDivisionError), task.processing():
        1 / 0
    with queue.next_task(fail=False) as task:
        assert task is None


def test_iteration_offers_each_task_once(broker: Broker) -> None:
    queue = broker.communicator().task_queue("named")
    for number in range(5):
        queue.task_send(number, no_reply=True)
    assert [task.body for task in queue] == list(range(5))
    for task in queue:
        if task.body % 2:
            with task.processing() as outcome:
                outcome.set_result(None)
    assert [task.body for task in queue] == [0, 2, 4]


def test_processing_is_given_up_when_its_future_is_dropped(broker: Broker) -> None:
    queue = broker.communicator().task_queue("named")
    queue.task_send("task", no_reply=True)
    with queue.next_task() as task:
        outcome = task.process()
        del outcome
        gc.collect()
    with queue.next_task() as task:
        outcome = task.process()
        outcome.set_result(1)
    with pytest.raises(kiwipy.QueueEmpty), queue.next_task():
        pass


def test_named_queue_is_shared_out(served: Broker) -> None:
    worker, sender = served.communicator(), served.communicator()
    worker.add_task_subscriber(lambda *_: "default")
    queue = worker.task_queue("named")
    identifier = queue.add_task_subscriber(lambda *_: "named")
    assert sender.task_queue("named").task_send(1).result(TIMEOUT) == "named"
    assert sender.task_queue(DEFAULT_QUEUE).task_send(1).result(TIMEOUT) == "default"
    queue.remove_task_subscriber(identifier)


# Names and directories


def test_two_configurations_with_one_profile_name(tmp_path: Path, broker: Broker) -> None:
    other = broker.config_path.with_name("other")
    with (
        PipeCommunicator(broker.profile, broker.config_path) as first,
        PipeCommunicator(broker.profile, other) as second,
    ):
        first.add_rpc_subscriber(lambda *_: "first", "x")
        with pytest.raises(kiwipy.UnroutableError):
            second.rpc_send("x", 1)
        second.add_rpc_subscriber(lambda *_: "second", "x")
        assert first.rpc_send("x", 1).result(TIMEOUT) == "first"
        assert second.rpc_send("x", 1).result(TIMEOUT) == "second"
    layout = directories.locate(other)
    assert layout is not None and layout.pipes != broker.pipes
    (broker.pipes / ".config").unlink()
    broker.pipes.rmdir()
    assert directories.establish(broker.profile, other).pipes == layout.pipes
    (layout.pipes / ".config").unlink()
    layout.pipes.rmdir()


def test_unsafe_pipes_directory_is_refused(broker: Broker) -> None:
    broker.pipes.symlink_to("/tmp")
    with pytest.raises(directories.DirectoryRefused, match="remove it"):
        broker.communicator()
    broker.pipes.unlink()
    broker.communicator().close()
    broker.pipes.chmod(0o770)
    with pytest.raises(directories.DirectoryRefused, match="chmod 700"):
        broker.communicator()
    assert "chmod 700" in broker.run("start", status=1)
    broker.pipes.chmod(0o700)


def open_to_others(broker: Broker) -> list[str]:
    made = [path for path in (broker.config_path, *broker.config_path.rglob("*")) if path.is_dir()]
    assert {broker.config_path / "pipes", *broker.queue.glob("claimed/[!.]*")} < set(made)
    return [f"{path}: {mode:o}" for path in made if (mode := stat.S_IMODE(path.stat().st_mode)) != 0o700]


@pytest.fixture
def umask() -> Iterator[None]:
    """No umask: what is made has the mode that was asked for."""
    before = os.umask(0)
    yield
    os.umask(before)


@pytest.mark.usefixtures("umask")
def test_directories_are_for_their_owner_alone(broker: Broker) -> None:
    worker = broker.communicator()
    worker.add_task_subscriber(lambda *_: None)
    worker.task_queue("named").add_task_subscriber(lambda *_: None)
    assert open_to_others(broker) == []


@pytest.mark.usefixtures("umask")
@pytest.mark.parametrize("removed", ["pipes", "coordinator", "."])
def test_directories_that_are_made_again_are_for_their_owner_alone(broker: Broker, removed: str) -> None:
    worker = broker.communicator("worker")
    worker.add_task_subscriber(lambda *_: None)
    shutil.rmtree(broker.config_path / removed)
    worker._engine.poller.call(worker._engine.upkeep.look_once)
    eventually(lambda: (broker.queue / "claimed" / "worker" / "lock").exists())
    eventually(lambda: (broker.config_path / "pipes" / "worker_worker.json").exists())
    assert open_to_others(broker) == []


def test_queue_of_another_profile_of_the_same_name_is_refused(broker: Broker) -> None:
    broker.communicator(profile_uuid="first").close()
    # None matches all, and changes nothing.
    for profile_uuid in ("first", None, "first"):
        broker.communicator(profile_uuid=profile_uuid).close()
    with pytest.raises(directories.DirectoryRefused) as refused:
        broker.communicator(profile_uuid="second")
    assert f"another profile that was called '{broker.profile}'" in str(refused.value)
    assert f"set it aside by 'mv {broker.queue} {broker.queue}.old', or delete it" in str(refused.value)


def test_queue_takes_the_first_uuid_that_it_is_given(broker: Broker) -> None:
    for profile_uuid in (None, "first", None):
        broker.communicator(profile_uuid=profile_uuid).close()
    with pytest.raises(directories.DirectoryRefused, match="another profile"):
        broker.communicator(profile_uuid="second")
    broker.communicator(profile_uuid="first").close()


@pytest.mark.parametrize("step", [1, -1])
def test_queue_in_another_format_is_refused(broker: Broker, step: int) -> None:
    broker.communicator().close()
    said, number = json.loads((broker.queue / "format").read_text()), whose.FORMAT + step
    (broker.queue / "format").write_text(json.dumps({**said, "format": number}))
    with pytest.raises(directories.DirectoryRefused) as refused:
        broker.communicator()
    sentence = f"{broker.queue} has format {number}, and this version knows {whose.FORMAT}: use the version that "
    assert sentence in str(refused.value)
    broker.stack.callback(control.stop, broker.config_path)
    assert sentence in broker.run("start", status=1)


def test_quoted_names_never_become_paths() -> None:
    names = [directories.quoted(str(name)) for name in ODD]
    assert len(set(names)) == len(ODD)
    assert all(directories.is_quoted(name) and "/" not in name and not name.startswith(".") for name in names)
    assert not any(directories.is_quoted(name) for name in ("..", "", "a/b", "a\n", 5, None, "x" * 201))


def test_import_needs_fifos() -> None:
    script = "import os; del os.mkfifo\ntry:\n import discovery\nexcept ImportError as error:\n print(error)"
    said = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=HERE, timeout=TIMEOUT)
    assert "FIFOs" in said.stdout and said.stdout.count("\n") == 1


# The examples of the specification, as written but for the import path, each in a process of its own

SETUP = """
import time
from pathlib import Path
from pipebroker import PipeCommunicator
config_path = Path.home() / '.aiida' / 'profiles' / 'my_profile'
"""
EXAMPLE_WORKER = """
# Create communicator
communicator = PipeCommunicator(
    profile_name='my_profile',
    config_path=Path.home() / '.aiida' / 'profiles' / 'my_profile'
)

# Add task subscriber
def my_task_handler(communicator, task):
    print(f"Received task: {task}")
    # Process task
    return {"result": "success"}

communicator.add_task_subscriber(my_task_handler)
print("ready")
# Keep worker running
try:
    while True:
        time.sleep(1)
except KeyboardInterrupt:
    communicator.close()
"""
EXAMPLE_SENDER = """
communicator = PipeCommunicator(
    profile_name='my_profile',
    config_path=Path.home() / '.aiida' / 'profiles' / 'my_profile'
)

# Send a task
future = communicator.task_send({'command': 'process', 'data': 123})

# Wait for result
result = future.result(timeout=10)
print(f"Task result: {result}")

communicator.close()
"""
EXAMPLE_BROADCAST_SUBSCRIBER = """
communicator = PipeCommunicator('my_profile', config_path)

def broadcast_handler(communicator, body, sender, subject, correlation_id):
    print(f"Broadcast from {sender}: {body}")

communicator.add_broadcast_subscriber(broadcast_handler)
print("ready")
sys.stdin.read()
communicator.close()
"""
EXAMPLE_BROADCAST_PUBLISHER = """
communicator = PipeCommunicator('my_profile', config_path)
# Publisher
communicator.broadcast_send(
    body={'message': 'Hello, workers!'},
    sender='main',
    subject='announcement'
)
"""
EXAMPLE_RPC_SERVER = """
server_comm = PipeCommunicator(
    profile_name='my_profile',
    config_path=config_path,
    worker_id='rpc_server'
)

def rpc_handler(communicator, msg):
    print(f"RPC call: {msg}")
    return {"response": "processed"}

server_comm.add_rpc_subscriber(rpc_handler, identifier='rpc_server')
print("ready")
sys.stdin.read()
"""
EXAMPLE_RPC_CLIENT = """
client_comm = PipeCommunicator('my_profile', config_path)
future = client_comm.rpc_send('rpc_server', {'request': 'data'})
result = future.result(timeout=5)
print(result)
"""
EXAMPLE_CLEANUP = """
import discovery

config_path = Path.home() / '.aiida' / 'profiles' / 'my_profile'
count = discovery.cleanup_dead_processes(config_path)
print(f"Cleaned up {count} dead processes")
"""


def test_examples_of_the_specification(broker: Broker, monkeypatch: pytest.MonkeyPatch) -> None:
    home = broker.config_path.parent
    monkeypatch.setenv("HOME", str(home))
    broker.config_path = home / ".aiida" / "profiles" / "my_profile"
    name = f"my_profile-{os.getpid()}"
    setup = SETUP.replace("my_profile", name)
    broker.profile, broker.config_path = name, broker.config_path.with_name(name)

    def run(example: str) -> str:
        command = [sys.executable, "-c", "import sys\n" + setup + example.replace("my_profile", name)]
        env = {**os.environ, "PYTHONPATH": str(HERE)}
        result = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, env=env, check=True)
        assert result.stderr == ""
        return result.stdout

    broker.start()
    worker = broker.child(setup + EXAMPLE_WORKER.replace("my_profile", name))
    assert run(EXAMPLE_SENDER) == "Task result: {'result': 'success'}\n"
    assert worker.line() == "Received task: {'command': 'process', 'data': 123}"
    subscriber = broker.child(setup + EXAMPLE_BROADCAST_SUBSCRIBER.replace("my_profile", name))
    run(EXAMPLE_BROADCAST_PUBLISHER)
    assert subscriber.line() == "Broadcast from main: {'message': 'Hello, workers!'}"
    server = broker.child(setup + EXAMPLE_RPC_SERVER.replace("my_profile", name))
    assert run(EXAMPLE_RPC_CLIENT) == "{'response': 'processed'}\n"
    assert server.line() == "RPC call: {'request': 'data'}"
    worker.process.send_signal(signal.SIGINT)
    assert worker.end() == 0
    server.kill()
    eventually(lambda: not (broker.config_path / "pipes" / "worker_rpc_server.json").exists())
    assert run(EXAMPLE_CLEANUP) == "Cleaned up 0 dead processes\n"


# Many


@pytest.mark.parametrize("kills", [0, 5])
def test_every_task_is_done_exactly_once(served: Broker, kills: int) -> None:
    record = served.config_path / "record"
    workers = [served.child(RECORDER, record) for _ in range(4)]
    senders = [served.child(SENDER, number, 5000) for number in range(6)]
    for sender in senders:
        sender.tell("go")
    for number in range(kills):
        eventually(lambda number=number: len(recorded(record)) >= (number + 1) * 4000)
        said = control.status(served.config_path)
        os.kill(said["pid"], signal.SIGKILL)
        eventually(lambda: not directories.is_read(served.pipes / directories.TASKS_INTAKE))
        served.start()
    assert [sender.end(120) for sender in senders] == [0] * 6
    eventually(lambda: len(recorded(record)) >= 30_000, 120)
    assert [worker.end() for worker in workers] == [0] * 4
    counts = Counter(recorded(record))
    assert len(counts) == 30_000 and set(counts.values()) == {1}


def test_workers_killed_at_random(served: Broker) -> None:
    chance = random.Random(4)
    record = served.config_path / "record"
    slow = RECORDER.replace("os.write(record", "time.sleep(0.002) or os.write(record")
    workers = [served.child(slow, record) for _ in range(4)]
    sender = served.communicator(fsync=False)
    for number in range(2000):
        sender.task_send(number, no_reply=True)
    kills = 0
    done = threading.Event()
    while len(set(recorded(record))) < 2000:
        victim = chance.randrange(4)
        workers[victim].kill()
        kills += 1
        workers[victim] = served.child(slow, record)
        done.wait(0.2)
        assert kills < 300
    counts = Counter(recorded(record))
    assert set(counts) == {str(number) for number in range(2000)}
    # A worker with a subscriber that blocks has one task in hand.
    assert sum(counts.values()) - 2000 <= kills
    eventually(lambda: control.status(served.config_path)["tasks"]["claimed"] == 0)
    assert control.status(served.config_path)["tasks"] == {
        "waiting": 0,
        "claimed": 0,
        "completed": 2000,
        "failed": 0,
    }


def test_twenty_threads_of_one_communicator(served: Broker) -> None:
    got: dict[str, list[int]] = {}
    total, arrived = 20 * 15, threading.Semaphore(0)

    def take(_: Any, body: Any, *rest: Any) -> int:
        kind, number, text = body
        assert text == text[:1] * len(text)
        got.setdefault(kind, []).append(number)
        arrived.release()
        return len(text)

    receiver, sender = served.communicator(), served.communicator(fsync=False)
    receiver.add_task_subscriber(take)
    receiver.add_rpc_subscriber(take, "take")
    receiver.add_broadcast_subscriber(take)

    def send(thread: int) -> None:
        chance = random.Random(thread)
        for number in range(15):
            text = chr(97 + thread) * chance.choice([1, 100, 5000, chance.randrange(1, 200_000)])
            futures.append((sender.rpc_send("take", [f"rpc{thread}", number, text]), len(text)))
            futures.append((sender.task_send([f"task{thread}", number, text]), len(text)))
            sender.broadcast_send([f"broadcast{thread}", number, text])

    futures: list[tuple[Any, int]] = []
    threads = [threading.Thread(target=send, args=(thread,)) for thread in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(future.result(TIMEOUT) == size for future, size in futures)
    for _ in range(3 * total):
        assert arrived.acquire(timeout=TIMEOUT)
    assert len(got) == 60 and all(numbers == list(range(15)) for numbers in got.values())


def test_tasks_without_a_coordinator(broker: Broker) -> None:
    record = broker.config_path / "record"
    sender = broker.child(SENDER, "x", 5000)
    sender.tell("go")
    assert sender.end(120) == 0
    assert "5000 waiting" in broker.run("status", status=3)
    broker.start()
    broker.child(RECORDER, record)
    eventually(lambda: len(recorded(record)) == 5000, 60)
    assert len(set(recorded(record))) == 5000


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs /proc")
def test_idle_processes_sleep(served: Broker) -> None:
    child = served.child(WORKER)
    served.communicator().rpc_send(json.loads(served.run("status", "--json"))["workers"][0]["worker_id"], 1).result(
        TIMEOUT
    )
    pids = [child.pid, json.loads(served.run("status", "--json"))["pid"]]

    def wakes() -> list[int]:
        counts = []
        for pid in pids:
            tasks = Path(f"/proc/{pid}/task").iterdir()
            texts = [(task / "status").read_text() for task in tasks]
            counts.append(sum(int(text.split("voluntary_ctxt_switches:")[1].split()[0]) for text in texts))
        return counts

    before = wakes()
    threading.Event().wait(12)  # Longer than the housekeeping's period.
    worker, server = (after - first for after, first in zip(wakes(), before, strict=True))
    assert worker <= 2
    assert server <= 60


GARBAGE = [
    os.urandom(500),
    b"\0\0\0\x50{half a frame",
    b"\xff\xff\xff\xff",
    b"\x7f\xff\xff\xff{}",
    b"\0\0\0\x02[]",
    b"\0\0\0\x02{}",
    frames.frame('{"type": []}'),
    frames.frame('{"type": "task", "queue": {}, "name": 5}'),
    frames.frame('{"type": "task", "queue": "../..", "name": "../../x"}'),
    frames.frame('{"type": "register", "worker": "../../x"}'),
    frames.frame('{"type": "report", "worker": [], "queue": ""}'),
    frames.frame('{"type": "ring", "queue": [], "names": {}}'),
    frames.frame('{"body_file": "../../etc/passwd"}'),
    frames.frame('{"correlation_id": {}, "pending": "x"}'),
    frames.frame("{" + '"a":{' * 500 + "}" * 501),
]


def test_garbage_in_every_pipe(served: Broker, caplog: pytest.LogCaptureFixture) -> None:
    got = threading.Semaphore(0)
    communicator = served.communicator("me")
    communicator.add_task_subscriber(lambda _, body: body)
    communicator.add_rpc_subscriber(lambda _, body: body, "echo")
    communicator.add_broadcast_subscriber(lambda *_: got.release())
    pipes = [path for path in served.pipes.iterdir() if path.is_fifo() and not path.is_symlink()]
    assert len(pipes) == 6, pipes
    for garbage in GARBAGE:
        for pipe in pipes:
            with open(pipe, "wb", buffering=0) as file:
                file.write(garbage or b"")
        assert communicator.rpc_send("echo", 1).result(TIMEOUT) == 1
        assert communicator.task_send(1).result(TIMEOUT) == 1
        communicator.broadcast_send(1)
        assert got.acquire(timeout=TIMEOUT)
    assert "coordinator_tasks: skipped" in served.log() and "cannot be used" in served.log()
    assert all(f"{pipe}: " in caplog.text for pipe in pipes if "coordinator" not in pipe.name)


def test_forked_child_is_closed(served: Broker) -> None:
    communicator = served.communicator()
    communicator.add_rpc_subscriber(lambda _, body: body, "echo")
    communicator.add_task_subscriber(lambda _, body: body)
    here, there = socket.socketpair()
    pid = os.fork()
    if pid == 0:
        here.close()
        try:
            communicator.rpc_send("echo", 1)
        except kiwipy.CommunicatorClosed:
            there.sendall(b"closed")
        communicator.close()
        there.recv(1)
        os._exit(0)
    there.close()
    with here:
        here.settimeout(TIMEOUT)
        assert here.recv(10) == b"closed"
        assert communicator.rpc_send("echo", 1).result(TIMEOUT) == 1
        assert communicator.task_send(2).result(TIMEOUT) == 2
        communicator.close()
        # The child lives, and nobody takes it for its parent.
        other = served.communicator()
        with pytest.raises(kiwipy.UnroutableError):
            other.rpc_send("echo", 1)
    os.waitpid(pid, 0)
