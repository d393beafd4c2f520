"""No task waits for somebody who is full, stopped, gone, or silent, while another could do it."""

from __future__ import annotations

import shutil
import threading
from typing import Any

import kiwipy

from harness import HOLDER, TIMEOUT, Broker, eventually

SOON = 8.0
# A worker in another language that reports nothing: it claims what it is rung for, and moves it on.
MUTE = """
import json
from pathlib import Path
worker = communicator("mute")
queue = Path(config_path, "coordinator")
worker.add_task_subscriber(lambda *_: None)
real = os.write
def write(descriptor, data):
    return len(data) if b'"report"' in data else real(descriptor, data)
os.write = write
print("ready"); sys.stdin.read(); worker.close()
"""


def test_rejected_task_is_offered_to_a_full_worker_when_it_has_room(served: Broker) -> None:
    full, picky, sender = served.communicator(task_prefetch_count=1), served.communicator(), served.communicator()
    held: list[kiwipy.Future] = []

    def hold(_: Any, body: Any) -> Any:
        if body == "first":
            held.append(kiwipy.Future())
            return held[0]
        return "done by the full one"

    full.add_task_subscriber(hold)
    first = sender.task_send("first").result(TIMEOUT)
    rejected = threading.Event()

    def reject(*_: Any) -> None:
        rejected.set()
        raise kiwipy.TaskRejected

    picky.add_task_subscriber(reject)
    second = sender.task_send("second")
    assert rejected.wait(TIMEOUT) and not second.done()
    held[0].set_result("done")
    assert first.result(TIMEOUT) == "done"
    assert second.result(SOON) == "done by the full one"


def test_task_rung_at_a_stopped_worker_does_not_wait_behind_newer_ones(served: Broker) -> None:
    stopped = served.child(HOLDER, "stopped")
    sender = served.communicator(fsync=False)
    stopped.stop()
    order: list[int] = []
    pending = [sender.task_send(number) for number in range(40)]
    worker = served.communicator()
    working = threading.Event()  # Never set: each task takes two milliseconds.
    worker.add_task_subscriber(lambda _, body: order.append(body) or working.wait(0.002) or None)
    pending += [sender.task_send(number) for number in range(40, 400)]
    for future in pending:
        assert future.result(SOON) is None
    # Each of the oldest has been taken over while there was still much to do.
    assert all(order.index(number) < 300 for number in range(40))
    stopped.go_on()


def test_worker_that_reports_nothing_goes_on_being_rung(served: Broker) -> None:
    mute = served.child(MUTE)
    sender = served.communicator(fsync=False)
    pending = [sender.task_send(number) for number in range(100)]
    for future in pending:
        assert future.result(TIMEOUT) is None
    assert mute.end() == 0


def test_pulled_task_gives_its_place_back_at_once(served: Broker) -> None:
    worker = served.communicator(task_prefetch_count=1)
    sender = served.communicator()
    sender.task_send("pulled", no_reply=True)
    with worker.task_queue("kiwipy.tasks").next_task() as task:
        worker.add_task_subscriber(lambda _, body: body)
        waiting = sender.task_send("waits")
        with task.processing() as outcome:
            outcome.set_result(None)
    assert waiting.result(3.0) == "waits"


def test_live_worker_is_not_buried_though_its_pipes_are_removed(broker: Broker) -> None:
    worker, sender = broker.communicator("worker"), broker.communicator()
    worker.add_task_subscriber(lambda _, body: body)
    worker.add_rpc_subscriber(lambda _, body: body, "echo")
    shutil.rmtree(broker.pipes)
    broker.start()
    assert sender.task_send(1).result(TIMEOUT) == 1
    eventually(lambda: (broker.pipes / "route_echo").is_symlink())
    assert sender.rpc_send("echo", 2).result(TIMEOUT) == 2
    assert "died" not in broker.log()
    (row,) = broker.tasks()
    assert row["deaths"] == 0


def test_prefetch_of_a_queue_may_be_given_later(served: Broker) -> None:
    communicator, sender = served.communicator(), served.communicator()
    communicator.task_queue("named")
    queue = communicator.task_queue("named", prefetch_count=1)
    queue.add_task_subscriber(lambda *_: kiwipy.Future())
    for number in range(3):
        sender.task_queue("named").task_send(number, no_reply=True)
    eventually(lambda: len(served.tasks("claimed")) == 1)
    assert served.status()["workers"][0]["queues"] == {"named": 1}
    assert len(served.tasks("waiting")) == 2


def test_claim_directory_without_its_lock_is_given_back(broker: Broker) -> None:
    worker = broker.child(HOLDER, "gone")
    broker.start()
    sender = broker.communicator()
    pending = sender.task_send("held").result(TIMEOUT)
    broker.run("stop")
    worker.kill()
    (broker.queue / "claimed" / "gone" / "lock").unlink()  # As a copy does that drops empty files.
    broker.start()
    sender.add_task_subscriber(lambda _, body: body)
    assert pending.result(45.0) == "held"


def test_one_task_that_cannot_be_given_back_keeps_no_other(broker: Broker) -> None:
    broker.start()
    worker = broker.child(HOLDER, "gone")
    sender = broker.communicator()
    pending = [sender.task_send(number).result(TIMEOUT) for number in range(3)]
    first, *others = sorted(row["id"] for row in broker.tasks("claimed"))
    in_the_way = broker.queue / f"task_{first}.1.json"
    in_the_way.mkdir()
    worker.kill()
    back = [broker.queue / f"task_{name}.1.json" for name in others]
    eventually(lambda: all(path.exists() for path in back))
    in_the_way.rmdir()
    sender.add_task_subscriber(lambda _, body: body)
    assert [future.result(TIMEOUT) for future in pending] == [0, 1, 2]


def test_future_dropped_in_a_cycle_with_its_task_lets_it_wait_again(broker: Broker) -> None:
    import gc

    communicator = broker.communicator()
    queue = communicator.task_queue("named")
    queue.task_send("again", no_reply=True)
    with queue.next_task() as task:
        future = task.process()
        future.task, task.future = task, future
        del future
    del task
    gc.collect()
    with queue.next_task() as task:
        assert task.body == "again"
        with task.processing() as outcome:
            outcome.set_result(None)
