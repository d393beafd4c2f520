"""Nothing new is started while all is paused, across restarts too; and how one waits until nothing is in hand."""

from __future__ import annotations

import concurrent.futures
import os
import signal
from pathlib import Path
from typing import Any

import kiwipy
import pytest

import control
import discovery
from harness import RECORDER, TIMEOUT, Broker, eventually, recorded

# Holds each task until it is told to go on, by a line.
HOLDER = """
import queue
go = queue.SimpleQueue()
with communicator("holder", task_prefetch_count=1) as worker:
    worker.add_task_subscriber(lambda _, body: print(body) or go.get())
    print("ready")
    for line in sys.stdin:
        go.put(line)
    go.put("")
"""
SECONDS = 12.0


def waiting(broker: Broker) -> int:
    return int(control.status(broker.config_path)["tasks"]["waiting"])


def test_nothing_is_started_while_paused(served: Broker, tmp_path: Path) -> None:
    record = tmp_path / "record"
    served.child(RECORDER, record)
    sender = served.communicator()
    assert control.pause(served.config_path) and not control.pause(served.config_path)
    for queue in (sender, sender.task_queue("named")):
        for number in range(10):
            queue.task_send(number, no_reply=True)
    puller = sender.task_queue("named")
    with pytest.raises(kiwipy.QueueEmpty), puller.next_task():
        pass
    assert list(puller) == []
    assert waiting(served) == 20 and not recorded(record)
    assert control.status(served.config_path)["paused"] and "Paused" in served.run("status")
    assert control.resume(served.config_path) and not control.resume(served.config_path)
    assert eventually(lambda: len(recorded(record)) == 10)
    with puller.next_task() as task:
        task.process().set_result(None)
    assert waiting(served) == 9 and not control.status(served.config_path)["paused"]


def test_what_a_worker_was_rung_for_is_not_started_once_paused(served: Broker) -> None:
    child = served.child(HOLDER)
    sender = served.communicator()
    for number in range(5):
        sender.task_send(number, no_reply=True)
    assert child.line() == "0"
    control.pause(served.config_path)
    child.tell("go on")
    eventually(lambda: control.status(served.config_path)["tasks"]["completed"] == 1)
    assert control.drain(served.config_path, SECONDS) == []
    assert waiting(served) == 4
    control.resume(served.config_path)
    assert child.line() == "1"
    for _ in range(4):
        child.tell("go on")
    assert [child.line() for _ in range(3)] == ["2", "3", "4"]


def test_pause_outlives_the_coordinator(served: Broker, tmp_path: Path) -> None:
    control.pause(served.config_path)
    os.kill(served.status()["pid"], signal.SIGKILL)
    sender = served.communicator()
    served.start()
    record = tmp_path / "record"
    served.child(RECORDER, record)
    sender.task_send("body", no_reply=True)
    with pytest.raises(kiwipy.QueueEmpty), sender.task_queue("kiwipy.tasks").next_task():
        pass
    assert waiting(served) == 1 and not recorded(record)
    # As whoever does it by hand: the next look finds it.
    (served.queue / "paused").unlink()
    eventually(lambda: recorded(record), 15.0)


def test_drain_says_what_is_still_in_hand(served: Broker) -> None:
    child = served.child(HOLDER)
    sent = served.communicator().task_send("held")
    assert child.line() == "held"
    assert "1 task is still in hand" in served.run("drain", "--timeout", "0.5", status=4)
    assert control.status(served.config_path)["paused"]
    child.tell("go on")
    assert sent.result(TIMEOUT) == "go on\n"
    assert "Nothing is in hand" in served.run("drain")
    assert "Resumed" in served.run("resume") and "was not paused" in served.run("resume")


def test_tasks_of_the_dead_are_in_nobodys_hand(broker: Broker) -> None:
    os.kill(broker.start(), signal.SIGKILL)
    broker.communicator().task_send("body", no_reply=True)
    child = broker.spawn("""
with communicator("dead") as worker, worker.task_queue("kiwipy.tasks").next_task():
    print("ready"); os.kill(os.getpid(), 9)
""")
    assert child.process.wait(TIMEOUT) == -9
    assert control.drain(broker.config_path, 0.0) == []
    assert discovery.cleanup_dead_processes(broker.config_path) == 2


# A communicator that drains


def test_a_communicator_drains(served: Broker, tmp_path: Path) -> None:
    worker, sender = served.communicator(), served.communicator()
    outcomes: list[kiwipy.Future] = []
    worker.add_task_subscriber(lambda _, body: outcomes.append(kiwipy.Future()) or outcomes[-1])
    worker.add_rpc_subscriber(lambda _, body: body, "identifier")
    sent = [sender.task_send(number) for number in range(3)]
    eventually(lambda: len(outcomes) == 3)
    assert not worker.drain(0.05)
    later = sender.task_send("later", no_reply=True)
    assert sender.rpc_send("identifier", "call").result(TIMEOUT) == "call"
    with concurrent.futures.ThreadPoolExecutor() as pool:
        drained = pool.submit(worker.drain, TIMEOUT)
        for outcome in outcomes:
            assert not drained.done()
            outcome.set_result("done")
        assert drained.result(TIMEOUT)
    assert [future.result(TIMEOUT).result(TIMEOUT) for future in sent] == ["done"] * 3
    assert later is None and waiting(served) == 1 and len(outcomes) == 3
    assert worker.drain()
    served.child(RECORDER, tmp_path / "record")
    eventually(lambda: recorded(tmp_path / "record") == ["later"])


def test_drain_waits_for_what_was_pulled(broker: Broker) -> None:
    communicator = broker.communicator()
    assert communicator.drain()
    communicator.task_send("body", no_reply=True)
    with communicator.task_queue("kiwipy.tasks").next_task() as task:
        assert not communicator.drain(0.05)
        task.process().set_result(None)
        assert communicator.drain(TIMEOUT)


def test_whoever_drains_is_told_when_it_is_closed(served: Broker) -> None:
    worker = served.communicator()
    worker.add_task_subscriber(lambda *_: kiwipy.Future())
    served.communicator().task_send("body", no_reply=True)
    eventually(lambda: control.status(served.config_path)["tasks"]["claimed"] == 1)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        drained = pool.submit(worker.drain, TIMEOUT)
        eventually(lambda: not control.status(served.config_path)["workers"][0]["queues"])
        worker.close()
        assert isinstance(drained.exception(TIMEOUT), kiwipy.CommunicatorClosed)
    with pytest.raises(kiwipy.CommunicatorClosed):
        worker.drain()


def test_drain_hears_of_what_was_pulled_and_dropped(broker: Broker) -> None:
    worker = broker.communicator("worker")
    worker.task_send("dropped", no_reply=True)
    for task in worker.task_queue("kiwipy.tasks"):
        future = task.process()
    future.cancel()
    del task, future
    assert worker.drain(SECONDS + 5)


@pytest.mark.parametrize("removed", ["registry", "lock"])
def test_a_task_is_in_hand_whatever_was_removed(served: Broker, removed: str) -> None:
    served.communicator("holder").add_task_subscriber(lambda *_: kiwipy.Future())
    served.communicator().task_send("held", no_reply=True)
    eventually(lambda: control.status(served.config_path)["tasks"]["claimed"] == 1)
    if removed == "registry":
        (served.config_path / "pipes" / "worker_holder.json").unlink()
    else:
        (served.queue / "claimed" / "holder" / "lock").unlink()
    assert [each["worker_id"] for each in control.drain(served.config_path, 0.0)] == ["holder"]
    control.resume(served.config_path)


def test_what_is_about_to_leave_is_in_hand_for_both_who_drain(served: Broker) -> None:
    worker = served.communicator("worker")
    worker.add_task_subscriber(lambda _, body: body)
    completed = served.queue / "completed"
    assert served.communicator().task_send("first").result(TIMEOUT) == "first"
    eventually(lambda: list(completed.iterdir()))
    completed.rename(served.queue / "elsewhere")
    completed.write_text("in the way")
    assert served.communicator().task_send("stuck").result(TIMEOUT) == "stuck"
    assert not worker.drain(0.1)
    assert control.drain(served.config_path, 0.0)
    completed.unlink()
    (served.queue / "elsewhere").rename(completed)
    assert worker.drain(SECONDS + 5)
    control.resume(served.config_path)


def test_a_pull_that_meets_a_pause_keeps_its_place(broker: Broker, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = broker.communicator("worker")
    queue = worker.task_queue("pulled")
    for number in range(3):
        queue.task_send(number, no_reply=True)
    bodies = []
    with queue.next_task() as task:
        bodies.append(task.body)
        task.process().set_result(None)
    (side,) = (side for side in worker._engine.holdings.sides.values() if side.key)
    take = type(side.claims).take

    def paused(*arguments: Any, **options: Any) -> Any:
        control.pause(broker.config_path)
        return take(*arguments, **options)

    with monkeypatch.context() as meanwhile, pytest.raises(kiwipy.QueueEmpty):
        meanwhile.setattr(type(side.claims), "take", paused)
        with queue.next_task():
            pass
    control.resume(broker.config_path)
    for _ in range(2):
        with queue.next_task() as task:
            bodies.append(task.body)
            task.process().set_result(None)
    assert bodies == [0, 1, 2]


def test_a_worker_that_is_killed_while_it_closes_is_buried_at_once(served: Broker) -> None:
    # Its entry goes first; then what it holds, which it is killed before it has given back.
    script = """
worker = communicator("closing")
worker.add_task_subscriber(lambda *_: kiwipy.Future())
worker._engine.holdings.close = lambda: os.kill(os.getpid(), 9)
print("ready"); sys.stdin.read(); worker.close()
"""
    child = served.child(script)
    served.communicator().task_send("held", no_reply=True)
    eventually(lambda: control.status(served.config_path)["tasks"]["claimed"] == 1)
    child.process.stdin.close()
    child.process.wait(TIMEOUT)
    eventually(lambda: control.status(served.config_path)["tasks"]["waiting"] == 1, 5.0)
    discovery.cleanup_dead_processes(served.config_path)


@pytest.mark.parametrize("timeout", [-1.0, -0.25, float("inf"), 1e10])
def test_drain_takes_any_timeout(broker: Broker, timeout: float) -> None:
    assert broker.communicator().drain(timeout) in (True, timeout > 0)


def test_a_forked_child_waits_for_nothing(broker: Broker) -> None:
    worker = broker.communicator("worker")
    pid = os.fork()
    if pid == 0:
        try:
            worker.drain()
        except kiwipy.CommunicatorClosed:
            os._exit(7)
        os._exit(8)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7


def test_a_worker_that_drains_leaves_no_task_with_a_death(served: Broker) -> None:
    child = served.spawn("""
import signal, threading
end = threading.Event()
signal.signal(signal.SIGTERM, lambda *_: end.set())
with communicator() as worker:
    worker.add_task_subscriber(lambda _, body: print("begun") or time.sleep(0.5) or body)
    print("ready")
    end.wait()
    print(worker.drain(10))
""")
    assert child.line() == "ready"
    sender = served.communicator()
    first, second = sender.task_send(1), sender.task_send(2)
    assert child.line() == "begun"
    child.process.terminate()
    assert first.result(TIMEOUT) == 1
    assert child.line() in ("True", "begun") and child.process.wait(TIMEOUT) == 0
    left = served.tasks("waiting")
    assert len(left) == (not second.done()) and all(row["deaths"] == 0 for row in left)
