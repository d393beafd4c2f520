"""One bad item, wherever it lies, keeps nothing from the others, and what could not be done is not lost."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import kiwipy
import pytest

import bodies
import burial
import control
import control_tasks
import directories
import fifo
import files
import frames
import presence
import strangers
import taskqueue
from harness import COORDINATOR, ECHO, PULLER, TIMEOUT, Broker, eventually, write_frame
from members import WINDOW, Member
from scheduler import Scheduler
from test_mending import look


def refuse(path: Path) -> None:
    """Leave what cannot be listed, nor asked for."""
    os.symlink("x" * 300, path)  # Not even root may: ENAMETOOLONG.


@pytest.fixture
def layout(broker: Broker) -> directories.Layout:
    made = directories.establish(broker.profile, broker.config_path)
    taskqueue.TaskQueue(made.queue).make()
    return made


# Queues


def test_a_link_that_cannot_be_followed_hides_no_queue(layout: directories.Layout) -> None:
    queues = layout.queue / "queues"
    for number in range(8):
        (queues / f"queue{number}").mkdir(parents=True)
    refuse(queues / "archive")
    assert {key for key, _ in layout.queues()} == {"", *(f"queue{number}" for number in range(8))}
    assert [Path(found).name for found in strangers.strangers(layout) if found] == ["archive"]


def test_a_queue_that_cannot_be_used_keeps_its_workers_from_no_other(broker: Broker) -> None:
    broker.start()
    worker, sender = broker.communicator("worker"), broker.communicator()
    for name in ("bad", "good"):
        worker.task_queue(name).add_task_subscriber(lambda _, body: body)
    control.stop(broker.config_path)
    bad = broker.queue / "queues" / "bad"
    shutil.rmtree(bad)
    bad.touch()
    broker.start()
    assert sender.task_queue("good").task_send("done").result(TIMEOUT) == "done"
    assert "cannot join queue 'bad'" in broker.log()


def test_what_an_earlier_life_left_in_another_queue_waits_again(broker: Broker) -> None:
    worker = broker.communicator("worker")
    worker.add_task_subscriber(lambda *_: None)
    claims = broker.queue / "queues" / "other" / "claimed" / "worker"
    claims.mkdir(parents=True)
    (claims / "task_1.json").write_text('{"body": 1}')
    look(worker)
    assert (broker.queue / "queues" / "other" / "task_1.json").exists()


# What dead workers leave


def test_a_claim_directory_that_cannot_be_listed_hides_no_other(layout: directories.Layout) -> None:
    loops = [layout.queue / "claimed" / f"loop{number}" for number in range(8)]
    for number, loop in enumerate(loops):
        claims = layout.lock(f"dead{number}").parent
        claims.mkdir(parents=True)
        (claims / f"task_{number}.json").write_text('{"body": 1}')
        refuse(loop)
    undertaker = burial.Undertaker(layout)
    for _ in range(3):  # Who has no entry is buried at the second sight.
        undertaker.round()
    for loop in loops:
        loop.unlink()
    assert len(list(layout.queue.glob("task_*"))) == 8


@pytest.mark.parametrize("place", ["claimed", "failed"])
def test_a_place_that_cannot_be_listed_keeps_no_other_from_being_swept(tmp_path: Path, place: str) -> None:
    queue = taskqueue.TaskQueue(tmp_path)
    queue.make()
    done = Path(queue.file("1", "completed"))
    done.touch()
    (tmp_path / place).rmdir()
    refuse(tmp_path / place)
    with pytest.MonkeyPatch.context() as later:
        later.setattr(time, "time", lambda now=time.time(): now + 2 * taskqueue.COMPLETED_KEPT_SECONDS)
        for _ in queue.sweep():
            pass
    assert not done.exists()


def test_what_is_named_as_no_part_of_the_broker_is_left_alone(layout: directories.Layout) -> None:
    strange = [layout.queue / "claimed" / "worker" / "lock", layout.pipes / "route_notes"]
    strange[0].mkdir(parents=True)
    strange[1].write_text("")
    os.symlink("/etc/hosts", layout.pipes / "route_hosts")
    for _ in burial.sweep(layout):
        pass
    assert sorted(found for found in strangers.strangers(layout) if found) == sorted(map(str, strange))
    strange[0].rmdir()
    strange[1].unlink()
    assert not os.path.lexists(layout.pipes / "route_hosts"), "nobody can be called by it, or claim its identifier"


def test_whoever_sent_a_task_that_is_given_up_is_told_once_the_disk_has_room(
    layout: directories.Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = directories.reply_pipe()
    reply = layout.pipes / name
    os.mkfifo(reply)
    reader = os.open(reply, os.O_RDONLY | os.O_NONBLOCK)
    text = frames.encode({"correlation_id": "1", "exception": "x" * 10_000})
    try:
        with monkeypatch.context() as trouble:

            def full(*_: Any) -> None:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

            trouble.setattr(bodies, "pack_body", full)
            with pytest.raises(OSError, match="No space"):
                fifo.leave(text, layout, name)
        fifo.leave(text, layout, name)
        assert os.read(reader, 65536)
    finally:
        os.close(reader)
        for path in layout.pipes.glob("body_*"):
            path.unlink()
        reply.unlink()


def test_a_link_that_cannot_be_put_in_place_leaves_no_draft(tmp_path: Path) -> None:
    (tmp_path / "link").mkdir()
    with pytest.raises(OSError, match="link"):
        files.replace_symlink("target", tmp_path / "link")
    assert os.listdir(tmp_path) == ["link"]


# Completed tasks


def test_the_newest_completed_tasks_are_those_that_were_done_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(taskqueue, "COMPLETED_KEPT", 3)
    queue, now = taskqueue.TaskQueue(tmp_path), time.time_ns()
    queue.make()
    days = 24 * 3600 * 10**9
    # The clock was a year ahead when most were sent, and the last was sent two days ago.
    sent = [now + 365 * days + number for number in range(5)] + [now - 2 * days]
    for when in sent:
        begin = time.time_ns()
        Path(queue.file(f"{when:020d}-0", "completed")).touch()
        eventually(lambda begin=begin: time.time_ns() > begin + 10**7)  # The granularity of the times of files.
    for _ in queue.sweep():
        pass
    assert sorted(queue.names("completed")) == sorted(f"{when:020d}-0" for when in sent[-3:])


# The scheduler


def test_parked_tasks_that_are_pulled_leave_nothing_behind() -> None:
    tested, full, picky = Scheduler(), Member("full", 1), Member("picky", 1)
    for member in (full, picky):
        tested.join(member)
    tested.claimed(full, "0")
    for number in range(1, 5000):
        name = f"{number:05}"
        tested.add(name)
        tested.dispatch(0.0)
        tested.claimed(picky, name)
        tested.refuse(picky, name)
        tested.dispatch(0.0)
        tested.withdraw(name)
    assert sum(map(len, tested._parked.heaps.values())) < 10 * WINDOW


@pytest.mark.parametrize("members", [10, 100])
def test_who_has_refused_all_that_is_overdue_costs_nobody_anything(members: int) -> None:
    tested, picky, lines = Scheduler(), Member("picky"), 0
    tested.join(picky)
    names = [f"{number:06}" for number in range(members * WINDOW)]
    for name in names:
        tested.add(name)
    while rings := tested.dispatch(0.0)[0]:
        for name in rings[picky]:
            tested.claimed(picky, name)
            tested.refuse(picky, name)
    for number in range(members):
        tested.join(Member(f"busy{number}"))
    assert sum(map(len, tested.dispatch(0.0)[0].values())) == len(names)
    tested.dispatch(1.0)

    def trace(*_: Any) -> Any:
        nonlocal lines
        lines += 1
        return trace

    tested.add("new")
    sys.settrace(trace)
    try:
        rings = tested.dispatch(1.1)[0]
    finally:
        sys.settrace(None)
    assert rings == {picky: ["new"]}
    assert lines < 300


# The coordinator


def test_a_directory_in_place_of_the_entry_ends_no_coordinator(broker: Broker) -> None:
    (broker.config_path / "pipes" / "coordinator.json").mkdir(parents=True)
    worker = broker.communicator("worker")
    worker.add_task_subscriber(lambda _, body: body)
    broker.start()
    assert broker.communicator().task_send("done").result(TIMEOUT) == "done"
    assert "cannot be written down" in broker.log()


def test_stop_is_for_the_coordinator_that_was_asked(served: Broker) -> None:
    pid = served.status()["pid"]
    write_frame(served.pipes / "coordinator_tasks", {"type": "stop", "pid": 1})
    worker = served.communicator("worker")
    worker.add_task_subscriber(lambda _, body: body)
    assert served.communicator().task_send("done").result(TIMEOUT) == "done"
    assert served.status()["pid"] == pid


def test_a_coordinator_that_waits_for_another_can_be_told_to_end(broker: Broker) -> None:
    directories.establish(broker.profile, broker.config_path)
    intake = broker.pipes / "coordinator_tasks"
    os.mkfifo(intake)
    reader = os.open(intake, os.O_RDONLY | os.O_NONBLOCK)
    command = [*COORDINATOR, "--profile", broker.profile, "--config-path", broker.config_path, "start", "--foreground"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        eventually(lambda: _read(reader))  # It asks whoever reads its intake to look at itself.
        begin = time.monotonic()
        process.terminate()
        assert "told to stop before it served" in process.communicate(timeout=TIMEOUT)[1]
        assert process.returncode == 1
        assert time.monotonic() - begin < 4.0, "it waits five seconds for the other one"
    finally:
        process.kill()
        process.wait()
        os.close(reader)
        intake.unlink()


def _read(descriptor: int) -> bytes:
    with contextlib.suppress(BlockingIOError):
        return os.read(descriptor, 65536)
    return b""


# What is held


def test_a_task_without_a_body_is_told_to_its_sender(broker: Broker) -> None:
    broker.start()
    broker.run("pause")
    future = broker.communicator().task_send(1)
    (path,) = broker.queue.glob("task_*.json")
    said = json.loads(path.read_text())
    del said["body"]
    path.write_text(json.dumps(said))
    broker.run("resume")
    broker.child(ECHO, "w1")
    with pytest.raises(kiwipy.RemoteException, match="no body"):
        future.result(TIMEOUT)


KILLED_BEFORE_FAILED = """
import signal, taskqueue
move = taskqueue.TaskQueue.move
def moves(self, name, source, target, new=None):
    if target == "failed":
        os.kill(os.getpid(), signal.SIGKILL)
    return move(self, name, source, target, new)
taskqueue.TaskQueue.move = moves
worker = communicator("w1")
worker.add_task_subscriber(lambda _, body: body)
print("ready"); sys.stdin.read()
"""


@pytest.mark.protocol("W4")
def test_the_sender_of_what_is_no_task_is_told_before_it_goes_to_failed(broker: Broker) -> None:
    broker.start()
    broker.run("pause")
    future = broker.communicator().task_send(1)
    (path,) = broker.queue.glob("task_*.json")
    path.write_text(path.read_text().replace("1", "[" * 100_000, 1))
    broker.run("resume")
    # Where the task comes at once, it has no time to say that it is ready.
    child = broker.spawn(KILLED_BEFORE_FAILED)
    child.process.wait(TIMEOUT)
    with pytest.raises(kiwipy.RemoteException):
        future.result(TIMEOUT)


def test_a_task_that_cannot_leave_a_claim_is_said_once(broker: Broker, caplog: pytest.LogCaptureFixture) -> None:
    broker.start()
    worker = broker.communicator("w1")
    worker.add_task_subscriber(lambda _, body: body)
    completed = broker.queue / "completed"

    def replace() -> bool:
        completed.rmdir()
        with contextlib.suppress(IsADirectoryError):  # The coordinator was faster.
            completed.write_text("")
        return completed.is_file()

    eventually(replace)
    assert broker.communicator().task_send(1).result(TIMEOUT) == 1
    for _ in range(2):
        look(worker)
    assert len([record for record in caplog.records if "cannot leave the claims" in record.message]) == 1
    completed.unlink()
    look(worker)
    eventually(lambda: [row["state"] for row in broker.tasks()] == ["completed"])


def test_a_lock_that_cannot_be_made_keeps_nothing_else_from_being_mended(broker: Broker) -> None:
    broker.start()
    worker = broker.communicator("w1")
    worker.add_rpc_subscriber(lambda _, body: body, "r")
    lock = broker.queue / "claimed" / "w1" / "lock"
    lock.unlink()
    lock.mkdir()
    (broker.pipes / "rpc_w1").unlink()
    (broker.pipes / "route_r").unlink()
    look(worker)
    assert broker.communicator().rpc_send("r", 1).result(TIMEOUT) == 1
    lock.rmdir()
    look(worker)
    assert lock.is_file()


def test_a_route_that_is_something_else_is_made_again(broker: Broker) -> None:
    broker.start()
    worker = broker.communicator("w1")
    for identifier in ("a", "b"):
        worker.add_rpc_subscriber(lambda _, body: body, identifier)
        (broker.pipes / f"route_{identifier}").unlink()
    (broker.pipes / "route_a").mkdir()
    (broker.pipes / "route_b").write_text("")
    look(worker)
    sender = broker.communicator()
    assert sender.rpc_send("b", 1).result(TIMEOUT) == 1
    (broker.pipes / "route_a").rmdir()
    look(worker)
    assert sender.rpc_send("a", 1).result(TIMEOUT) == 1


def test_a_queue_that_is_moved_away_and_back_buries_nobody(broker: Broker) -> None:
    broker.start()
    worker, sender, going_on = broker.communicator("w1"), broker.communicator(), threading.Event()
    worker.add_task_subscriber(lambda _, body: going_on.wait(TIMEOUT) and body)
    future = sender.task_send("held")
    eventually(lambda: list(broker.queue.glob("claimed/w1/task_*")))
    away = broker.queue.with_name("away")
    broker.queue.rename(away)
    look(worker)
    assert (broker.queue / "claimed" / "w1" / "lock").exists()
    shutil.rmtree(broker.queue)
    away.rename(broker.queue)
    layout = directories.locate(broker.config_path)
    assert layout is not None and burial.bury(layout, ["w1"]) == burial.Buried()
    look(worker)
    going_on.set()
    assert future.result(TIMEOUT) == "held"
    eventually(lambda: list(broker.queue.glob("completed/task_*")))


def test_a_link_to_a_queue_takes_nothing_from_it(broker: Broker) -> None:
    broker.start()
    worker, sender, going_on = broker.communicator("w1"), broker.communicator(), threading.Event()
    worker.task_queue("big").add_task_subscriber(lambda _, body: going_on.wait(TIMEOUT) and body)
    future = sender.task_queue("big").task_send("held")
    eventually(lambda: list(broker.queue.glob("queues/big/claimed/w1/task_*")))
    os.symlink("big", broker.queue / "queues" / "alias")
    look(worker)
    assert list(broker.queue.glob("queues/big/claimed/w1/task_*"))
    going_on.set()
    assert future.result(TIMEOUT) == "held"


def test_a_lock_whose_directory_goes_at_once_is_whole(
    layout: directories.Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = os.link

    def links(source: Any, target: Any, **options: Any) -> None:
        link(source, target, **options)
        os.unlink(target)

    monkeypatch.setattr(os, "link", links)
    lock = presence.WorkerLock.take(layout, "w1", make=True)
    assert lock is not None and not lock.is_in_place()
    lock.release()


def test_a_queue_that_is_made_again_has_its_name(broker: Broker) -> None:
    broker.start()
    sender = broker.communicator()
    queue = sender.task_queue("Größe")
    shutil.rmtree(broker.queue / "queues")
    queue.task_send(1, no_reply=True)
    assert "Größe" in broker.run("tasks", "--queue", "Größe")
    (broker.queue / "queues" / directories.quoted("Größe") / "name").unlink()
    look(sender)
    assert broker.run("tasks", "--queue", "Größe")


@pytest.mark.parametrize("state", ["failed", "completed"])
def test_a_task_that_cannot_be_requeued_keeps_its_reason(
    layout: directories.Layout, state: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue = taskqueue.TaskQueue(layout.queue)
    Path(queue.file("1-a.3", state)).write_text('{"body": 1}')
    queue.note("1-a.3", state, "why")
    with monkeypatch.context() as patch:

        def refuses(*_: Any) -> bool:
            raise PermissionError

        patch.setattr(queue, "move", refuses)
        with pytest.raises(PermissionError):
            queue.requeue("1-a")
    assert queue.reason("1-a.3", state) == "why"
    assert queue.requeue("1-a") == "1-a" and queue.reason("1-a.3", state) == ""


def test_whoever_removes_what_has_just_been_claimed_leaves_it(
    layout: directories.Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue = taskqueue.TaskQueue(layout.queue)
    Path(queue.file("1-a")).write_text('{"body": 1}')
    fail = taskqueue.TaskQueue.fail

    def claimed_meanwhile(self: taskqueue.TaskQueue, *arguments: Any) -> bool:
        self.move("1-a", "", "claimed/w1")
        failed = fail(self, *arguments)
        self.move("1-a", "claimed/w1", "")
        return failed

    monkeypatch.setattr(taskqueue.TaskQueue, "fail", claimed_meanwhile)
    ((task_id, problem),) = control_tasks.remove(layout.config_path, ["1-a"])
    assert task_id == "1-a" and isinstance(problem, control_tasks.NoSuchTask)
    assert queue.is_waiting("1-a") and list((layout.queue / "failed").iterdir()) == []


def test_drain_waits_for_a_puller_that_has_lost_its_lock(broker: Broker) -> None:
    broker.start()
    broker.communicator().task_send("x", no_reply=True)
    child = broker.child(PULLER, "puller")
    child.stop()
    (broker.queue / "claimed" / "puller" / "lock").unlink()
    assert "puller" in broker.run("drain", "--timeout", "0.2", status=4)
    child.go_on()


def test_nobody_makes_a_queue_again_that_is_moved_away(broker: Broker) -> None:
    sender = broker.communicator()
    sender.task_send(1, no_reply=True)
    sender.task_queue("named").task_send(1, no_reply=True)
    named = broker.queue / "queues" / "named"
    named.rename(broker.config_path / "named")
    broker.queue.rename(broker.config_path / "away")
    look(sender)
    assert not broker.queue.exists()
    (broker.config_path / "away").rename(broker.queue)
    look(sender)
    assert not named.exists() and "1 waiting" in broker.run("status", status=3)


def test_a_queue_that_is_a_link_to_another_is_served(broker: Broker) -> None:
    sender = broker.communicator()
    sender.task_queue("old")
    os.symlink("old", broker.queue / "queues" / "new")
    broker.start()
    worker = broker.communicator("w1")
    for name in ("new", "old"):
        worker.task_queue(name).add_task_subscriber(lambda _, body: body)
    for name in ("new", "old", "new"):
        assert sender.task_queue(name).task_send(name).result(TIMEOUT) == name
        look(worker)


def test_locks_of_directories_that_are_gone_are_let_go(broker: Broker) -> None:
    worker = broker.communicator("w1")
    life = worker._engine.subscriptions._life
    for number in range(5):
        broker.queue.rename(broker.config_path / f"away{number}")
        look(worker)
    assert len(life._locks) == 6
    for number in range(5):
        shutil.rmtree(broker.config_path / f"away{number}")
    look(worker)
    assert len(life._locks) == 1
