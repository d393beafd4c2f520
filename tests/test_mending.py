"""What heals by itself, what keeps its order, and what interruptions and forks leave alone."""

from __future__ import annotations

import errno
import itertools
import json
import logging
import os
import signal
import subprocess
import threading
from pathlib import Path
from typing import Any

import kiwipy
import pytest

import burial
import control
import directories
import files
import frames
import presence
import taskqueue
from harness import COORDINATOR, HOLDER, TIMEOUT, Broker, eventually
from test_operating import serving

SLOW = 0.001
"""A coordinator with so slow a clock does nothing every ten seconds."""


def is_sent(communicator: Any) -> bool:
    """Say whether the pipes have taken everything, or it is kept."""
    poller = communicator._engine.poller
    return bool(poller.catch_up()) and not any(writer.waiting for writer in poller.writers)


def look(communicator: Any) -> None:
    communicator._engine.poller.call(communicator._engine.upkeep.look_once)
    assert communicator._engine.poller.catch_up()


# Reports


def test_done_does_not_overtake_claimed(broker: Broker, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = broker.communicator()._engine
    reports, ring = engine._reports, engine.post.ring
    told: list[str] = []
    other = threading.Thread(target=reports.add, args=("", "done", "2"), kwargs={"at_once": True})

    def slowly(message: dict[str, Any]) -> None:
        if "claimed" in message:
            other.start()
            other.join(0.2)
        told.extend(message.keys() & {"claimed", "done"})
        ring(message)

    monkeypatch.setattr(engine.post, "ring", slowly)
    reports.add("", "claimed", "1", at_once=False)
    reports.send()
    other.join()
    assert told == ["claimed", "done"]


def test_task_given_back_by_whoever_has_just_claimed_it_goes_to_another_at_once(broker: Broker) -> None:
    with serving(broker, SLOW):
        closes, stays = broker.communicator("closes"), broker.communicator("stays", task_prefetch_count=1)
        busy, got, done = kiwipy.Future(), threading.Event(), threading.Event()
        stays.add_task_subscriber(lambda _, body: busy if body == "busy" else done.set())
        sender = broker.communicator(fsync=False)
        sender.task_send("busy", no_reply=True)
        eventually(lambda: list((broker.queue / "claimed" / "stays").glob("task_*")))
        closes.add_task_subscriber(lambda *_: (got.set(), kiwipy.Future())[1])
        sender.task_send("given back", no_reply=True)
        assert got.wait(TIMEOUT)
        closes.close()
        busy.set_result(None)
        assert done.wait(TIMEOUT)


def test_ring_for_which_there_is_room_meanwhile_is_not_put_by_for_ever(broker: Broker) -> None:
    worker = broker.communicator("worker", task_prefetch_count=1)
    done: list[str] = []
    worker.add_task_subscriber(lambda _, body: done.append(body))
    sender = broker.communicator()
    sender.task_send("work", no_reply=True)
    (side,) = worker._engine.holdings.sides.values()
    name = next(side.queue.names())
    # As where room came between the look for it and the putting by.
    side.rung.add(name)
    side.put_by.append(name)
    look(worker)
    eventually(lambda: done == ["work"])


# What was removed, or cannot be had


def test_broadcasts_that_wait_for_a_pipe_that_is_made_again_are_kept(broker: Broker) -> None:
    with serving(broker, SLOW):
        listener = broker.child("""
heard = []
worker = communicator("listener")
worker.add_broadcast_subscriber(lambda _, body, *rest: heard.append(body))
print("ready"); sys.stdin.readline()
end = time.monotonic() + 20
while len(heard) < 3000 and time.monotonic() < end:
    worker._engine.poller.call(worker._engine.upkeep.look_once)
    time.sleep(0.1)
print(len(heard), len(set(heard))); sys.stdin.read(); worker.close()
""")
        sender = broker.communicator()
        listener.stop()
        for number in range(3000):
            sender.broadcast_send(number)
        eventually(
            lambda: sender._engine.poller.catch_up() and not any(w.waiting for w in sender._engine.poller.writers)
        )
        (broker.pipes / "broadcast_listener").unlink()
        listener.go_on()
        listener.tell("go on")
        assert listener.line() == "3000 3000"


def test_task_that_cannot_be_read_keeps_nobody_from_the_others(broker: Broker, monkeypatch: pytest.MonkeyPatch) -> None:
    communicator = broker.communicator()
    for number in range(3):
        communicator.task_send(number, no_reply=True)
    bad = min(broker.queue.glob("task_*.json")).name
    read = files.read

    def fails(path: Any) -> bytes:
        if Path(path).name == bad:
            raise OSError(errno.EIO, os.strerror(errno.EIO), path)
        return read(path)

    monkeypatch.setattr(files, "read", fails)
    queue = communicator.task_queue("kiwipy.tasks")
    assert [task.body for task in queue] == [1, 2]
    with queue.next_task() as task:
        assert task is not None and task.body == 1


def test_task_that_was_done_is_not_done_again_though_it_is_met_before_it_is_moved(broker: Broker) -> None:
    communicator = broker.communicator("worker")
    queue, done = communicator.task_queue("kiwipy.tasks"), []
    for body in ("a", "b"):
        queue.task_send(body, no_reply=True)

    def work(context: Any) -> None:
        with context as task:
            if task is not None:
                with task.processing() as outcome:
                    done.append(task.body)
                    outcome.set_result(None)

    work(queue.next_task())  # It knows of both from here on.
    completed = broker.queue / "completed"
    completed.rename(broker.queue / "aside")
    completed.write_text("in the way")
    for task in queue:
        with task.processing() as outcome:
            done.append(task.body)
            outcome.set_result(None)
    completed.unlink()
    (broker.queue / "aside").rename(completed)
    work(queue.next_task(fail=False))
    look(communicator)
    assert done == ["a", "b"] and len(list(completed.glob("task_*.json"))) == 2


def test_claimed_file_is_not_gone_where_the_kernel_did_not_say(broker: Broker, monkeypatch: pytest.MonkeyPatch) -> None:
    communicator = broker.communicator()
    queue = communicator.task_queue("kiwipy.tasks")
    queue.task_send("work", no_reply=True)
    with queue.next_task() as task, monkeypatch.context() as trouble:
        assert task is not None

        def refuses(*arguments: Any, **options: Any) -> Any:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

        trouble.setattr(os, "rename", refuses)
        trouble.setattr(os, "lstat", refuses)
        task.process().set_result(None)
    look(communicator)
    assert len(list((broker.queue / "completed").glob("task_*.json"))) == 1


def test_what_lies_among_the_claims_and_nobody_has_waits_again(broker: Broker) -> None:
    worker = broker.communicator("worker")
    with worker.task_queue("kiwipy.tasks").next_task(fail=False):
        pass
    claims = broker.queue / "claimed" / "worker"
    (claims / "task_1.json").write_text('{"body": "work"}')
    look(worker)
    assert (broker.queue / "task_1.json").exists()


def test_queues_that_cannot_be_seen_keep_nobody_from_the_default_one(
    broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    holder = broker.child(HOLDER, "holder")
    with serving(broker, SLOW):
        broker.communicator().task_send("work", no_reply=True)
        eventually(lambda: list((broker.queue / "claimed" / "holder").glob("task_*")))
    holder.kill()
    layout = directories.locate(broker.config_path)
    assert layout is not None
    listed = files.listed

    def fails(directory: Any, **options: Any) -> Any:
        if str(directory).endswith("/queues"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), directory)
        return listed(directory, **options)

    with monkeypatch.context() as trouble:
        trouble.setattr(files, "listed", fails)
        assert [key for key, _ in burial.bury(layout, ["holder"]).tasks] == [""]
        assert layout.lock("holder").exists(), "there may be more of it where nobody can look"
    assert burial.bury(layout, ["holder"]).worker_ids == ["holder"]


def test_strangers_thing_in_place_of_one_pipe_keeps_nothing_from_the_others(broker: Broker) -> None:
    worker, done = broker.communicator("worker"), threading.Event()
    worker.add_task_subscriber(lambda *_: done.set())
    worker.add_broadcast_subscriber(lambda *_: None)
    pipe = broker.pipes / "broadcast_worker"
    pipe.unlink()
    pipe.mkdir()
    try:
        with serving(broker, SLOW):
            broker.communicator().task_send("work", no_reply=True)
            assert done.wait(TIMEOUT)
    finally:
        pipe.rmdir()


def test_half_written_reasons_are_swept(broker: Broker) -> None:
    broker.communicator()
    draft = f".task_1.reason.{'0' * 32}"
    drafts = [broker.queue / place / draft for place in ("", "claimed", "completed", "failed")]
    drafts.append(broker.queue / f".{taskqueue.new_id()}")
    others = [broker.queue / name for name in (".gitignore", ".task_1.json.swp", ".nfs000000000000000100000002")]
    for path in drafts + others:
        path.write_text("half")
        os.utime(path, (1, 1))
    for _ in taskqueue.TaskQueue(broker.queue).sweep():
        pass
    assert not any(path.exists() for path in drafts) and all(path.exists() for path in others)


# Broadcasts


def test_broadcasts_that_are_given_up_keep_their_order(broker: Broker) -> None:
    pid, heard = broker.start(), []
    broker.communicator().add_broadcast_subscriber(lambda _, body, *rest: heard.append(body))
    sender = broker.communicator()
    sender.broadcast_send(0)
    eventually(lambda: heard == [0])
    os.kill(pid, signal.SIGSTOP)
    number = 1
    while not any(writer.waiting for writer in sender._engine.poller.writers):
        sender.broadcast_send(number)
        number += 1
    for number in range(number, number + 100):
        sender.broadcast_send(number)
    os.kill(pid, signal.SIGKILL)
    layout = directories.locate(broker.config_path)
    assert layout is not None
    eventually(lambda: presence.coordinator_pid(layout) is None)
    for number in range(number + 1, number + 100):
        sender.broadcast_send(number)
    eventually(lambda: is_sent(sender))
    broker.start()
    eventually(lambda: len(heard) == number + 1)
    assert sorted(heard) == list(range(number + 1))
    # What was kept comes before what the killed one left in its intake; each of the two is in order.
    assert sum(after < before for before, after in itertools.pairwise(heard)) <= 1


def test_kept_broadcast_reaches_who_subscribed_before_the_clock_was_set_back(broker: Broker) -> None:
    listener = broker.child("""
real = time.time
time.time = lambda: real() + 3600
worker = communicator()
worker.add_broadcast_subscriber(lambda _, body, *rest: print(body))
time.time = real
print("ready"); sys.stdin.read(); worker.close()
""")
    broker.communicator().broadcast_send("kept")
    broker.start()
    assert listener.line() == "kept"


# Interruptions


def test_handlers_calls_are_not_overtaken(broker: Broker) -> None:
    got: list[int] = []
    broker.communicator().add_rpc_subscriber(lambda _, body: got.append(body), "rpc")
    sender = broker.communicator()
    sender.rpc_send("rpc", -1).result(TIMEOUT)
    (writer,) = [writer for writer in sender._engine.poller.writers if writer.path.name.startswith("rpc_")]
    # As where a handler has sent in the middle of a send.
    before = frames.frame(json.dumps({"to": "rpc", "body": 0}))
    writer._reentered.append(before)
    sender.rpc_send("rpc", 1).result(TIMEOUT)
    assert got == [-1, 0, 1]


INTERRUPTED = """
import threading
def encode(value):
    if interrupt.pop():
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)
    return "encoded"
import signal
interrupt = [False, True]
worker = communicator(encoder=encode)
with worker.task_queue("kiwipy.tasks").next_task() as task:
    outcome = task.process()
    print("ready")
    try:
        outcome.set_result({1})
    except KeyboardInterrupt:
        print("interrupted", task.state)
        task.requeue()
with worker.task_queue("kiwipy.tasks").next_task() as task, task.processing() as outcome:
    outcome.set_result({1})
worker.close()
print("closed")
"""


def test_interruption_of_an_encoder_is_the_users_and_not_the_outcome(broker: Broker) -> None:
    future = broker.communicator().task_send("work")
    child = broker.child(INTERRUPTED)
    assert child.line() == "interrupted processing"
    assert child.line() == "closed"
    assert future.result(TIMEOUT) == "encoded"


def test_log_handler_that_raises_does_not_end_the_selector_thread(broker: Broker) -> None:
    worker = broker.communicator("worker")
    worker.add_rpc_subscriber(lambda _, body: body, "rpc")

    class Raises(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            raise RuntimeError("no log")

    handler = Raises()
    logging.getLogger("poller").addHandler(handler)
    try:
        worker._engine.poller.call(lambda: 1 / 0)
        assert broker.communicator().rpc_send("rpc", "body").result(TIMEOUT) == "body"
    finally:
        logging.getLogger("poller").removeHandler(handler)


def test_handler_that_subscribes_in_a_first_subscription_leaves_one_life(
    broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = broker.communicator()
    take, handled = presence.WorkerLock.take, []

    def interrupted(*arguments: Any, **options: Any) -> Any:
        if not handled:
            handled.append(True)
            worker.add_rpc_subscriber(lambda _, body: body, "handler")
        return take(*arguments, **options)

    monkeypatch.setattr(presence.WorkerLock, "take", interrupted)
    worker.add_task_subscriber(lambda _, body: body)
    assert len(list((broker.queue / "claimed").iterdir())) == 1
    assert [path.name for path in (broker.config_path / "pipes").glob("worker_*")] == [
        f"worker_{worker.worker_id}.json"
    ]


# Forks


FORKED = """
import signal
worker = communicator("worker")
held = kiwipy.Future()
identifier = worker.add_task_subscriber(lambda *_: 1)
worker.add_rpc_subscriber(lambda *_: held, "worker")
queue = worker.task_queue("kiwipy.tasks")
print("ready"); sys.stdin.readline()
mutex = worker._engine.subscriptions._mutex
def forked(action):
    # Another thread has the lock, as one that subscribes.
    import threading
    has, go = threading.Event(), threading.Event()
    def hold():
        with mutex:
            has.set()
            go.wait()
    thread = threading.Thread(target=hold)
    thread.start()
    has.wait()
    pid = os.fork()
    if pid == 0:
        signal.alarm(5)
        try:
            action()
        except kiwipy.CommunicatorClosed:
            os._exit(7)
        os._exit(0)
    go.set()
    thread.join()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
def pull():
    with queue.next_task():
        pass
print(forked(pull), forked(lambda: worker.remove_task_subscriber(identifier)), forked(lambda: held.set_result("child")))
held.set_result("parent")
sys.stdin.read(); worker.close()
"""


def test_forked_child_is_closed_at_once_and_answers_nobody(broker: Broker) -> None:
    child = broker.child(FORKED)
    future = broker.communicator().rpc_send("worker", None).result(TIMEOUT)
    child.tell("go")
    assert child.line() == "7 7 0"
    assert future.result(TIMEOUT) == "parent"


# Commands


def test_coordinator_that_cannot_log_is_not_taken_for_one_that_serves(broker: Broker) -> None:
    log = broker.queue / "coordinator.log"
    log.mkdir(parents=True)
    for _ in range(3):
        assert "is not a regular file" in broker.run("start", status=1)
        assert not control.status(broker.config_path)["running"]


def test_requeue_says_what_it_did_and_overwrites_nothing(broker: Broker) -> None:
    broker.communicator()
    for place in ("", "failed"):
        (broker.queue / place / "task_1.json").write_text(json.dumps({"body": place}))
    (broker.queue / "failed" / "task_2.json").write_text('{"body": 2}')
    assert broker.run("requeue", "2", "2") == "Requeued 2.\n"
    assert "task 1 waits already" in broker.run("requeue", "1", status=1)
    assert json.loads((broker.queue / "task_1.json").read_text()) == {"body": ""}


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("command", ["status", "--help", "--version"])
def test_answer_that_cannot_be_printed_is_said(broker: Broker, command: str, unbuffered: str) -> None:
    broker.communicator()
    with open("/dev/full", "w") as full:
        command = [*COORDINATOR, "--profile", broker.profile, "--config-path", broker.config_path, command]
        said = subprocess.run(
            command,
            check=False,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=TIMEOUT,
            env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
        )
    assert said.returncode == 1 and "cannot be printed" in said.stderr and "Traceback" not in said.stderr
