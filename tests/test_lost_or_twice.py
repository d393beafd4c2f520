"""Nothing that was accepted is lost, and nothing is done twice where no worker died: with stopped senders, full pipes,
removed directories and intakes, exhausted descriptors, failing disks, and exceptions that cannot even be printed.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import kiwipy
import pytest

import bodies
import burial
import directories
from harness import HOARD, HOLDER, RECORDER, TIMEOUT, Broker, Child, eventually, is_gone, recorded, within
from test_mending import look

SOON = 5.0
"""For what an event brings about."""
LOOK = 14.0
"""For what is found at the latest when a process looks after itself, which it does every ten seconds."""
LARGE = "x" * 200_000


def pause(pid: int) -> None:
    """Stop a process that is not our child with SIGSTOP, and wait until it has."""
    os.kill(pid, signal.SIGSTOP)
    state = ["ps", "-o", "stat=", "-p", str(pid)]
    eventually(lambda: subprocess.run(state, capture_output=True, text=True, check=False).stdout.startswith("T"), SOON)


def ends_with(child: Child, line: str) -> None:
    """Let a process that was stopped go on, and look with what it ends."""
    child.go_on()
    child.tell("go on")
    assert child.line() == line
    assert child.end() == 0


@contextlib.contextmanager
def disposable(broker: Broker, *children: Child) -> Iterator[None]:
    """Kill children in the end, however they are, and remove the reply pipes that would wait for the next sweep."""
    try:
        yield
    finally:
        for child in children:
            child.kill()
            for left in (*broker.pipes.glob(f"reply_{child.pid}_*"), *broker.pipes.glob(f"body_reply_{child.pid}_*")):
                left.unlink(missing_ok=True)


def listening(broker: Broker) -> list[Any]:
    """Return a list that every broadcast is appended to."""
    got: list[Any] = []
    broker.communicator().add_broadcast_subscriber(lambda _, body, *rest: got.append(body))
    return got


# Outcomes


def test_outcomes_reach_a_sender_that_was_stopped_while_the_workers_went(served: Broker) -> None:
    # The bodies are large enough that the sender's pipe takes a part of the outcomes only.
    script = """
from concurrent.futures import wait
sender = communicator(fsync=False)
futures = {name: [sender.task_queue(name).task_send("x" * 1000) for _ in range(150)] for name in ("killed", "closed")}
print("ready"); sys.stdin.readline()
wait(sum(futures.values(), []), float(arguments[0]))
print(*(sum(future.done() for future in futures[name]) for name in ("killed", "closed")))
sys.stdin.read(); sender.close()
"""
    worker = """
worker = communicator()
worker.task_queue(arguments[0]).add_task_subscriber(lambda _, body: body)
print("ready"); sys.stdin.read(); worker.close()
"""
    sender = served.child(script, LOOK)
    sender.stop()
    killed, closed = (served.child(worker, name) for name in ("killed", "closed"))
    for name in ("killed", "closed"):
        eventually(lambda name=name: len(list((served.queue / "queues" / name / "completed").glob("task_*"))) == 150)
    with disposable(served, sender):
        killed.kill()
        assert closed.end() == 0
        ends_with(sender, "150 150")


def test_sender_whose_pipe_was_full_hears_that_its_task_was_given_up_on(broker: Broker) -> None:
    script = """
sender = communicator()
future = sender.task_send("poison")
print("ready"); sys.stdin.readline()
try:
    while isinstance(future, kiwipy.Future):
        future = future.result(float(arguments[0]))  # The worker has answered with a future, before it died.
    print("result", future)
except BaseException as error:
    print(type(error).__name__)
sys.stdin.read(); sender.close()
"""
    sender = broker.child(script, LOOK)
    (waiting,) = broker.queue.glob("task_*.json")
    waiting.rename(waiting.with_suffix(".19.json"))  # As if 19 workers had died of it.
    broker.start()
    worker = broker.child(HOLDER, "holder")
    with disposable(broker, sender):
        eventually(lambda: list(broker.queue.glob("claimed/holder*/task_*.19.json")))
        sender.stop()
        (pipe,) = broker.pipes.glob(f"reply_{sender.pid}_*")
        text = json.dumps({"correlation_id": "nobody's", "result": 0}).encode()
        descriptor = os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(descriptor, len(text).to_bytes(4, "big") + text)
        os.close(descriptor)
        worker.kill()
        eventually(lambda: list(broker.queue.glob("failed/task_*.json")))
        ends_with(sender, "RemoteException")


class Unspeakable(Exception):
    def __str__(self) -> str:
        raise ValueError("no words")


def unspeakable_call(*_: object) -> None:
    raise Unspeakable


def unspeakable_future(*_: object) -> kiwipy.Future:
    future = kiwipy.Future()
    future.set_exception(Unspeakable())
    return future


@pytest.mark.parametrize("subscriber", [unspeakable_call, unspeakable_future])
@pytest.mark.parametrize("kind", ["task", "rpc"])
def test_exception_that_cannot_be_printed_is_answered(
    served: Broker, kind: str, subscriber: Callable[..., Any]
) -> None:
    worker, caller = served.communicator(), served.communicator()
    worker.add_task_subscriber(subscriber)
    worker.add_rpc_subscriber(subscriber, "unspeakable")
    future = caller.task_send(0) if kind == "task" else caller.rpc_send("unspeakable", 0)
    with pytest.raises(kiwipy.RemoteException):
        outcome = future.result(3)
        outcome.result(3)  # Where the subscriber gave a future.
    eventually(lambda: served.tasks("claimed") == [], SOON)


def test_pulled_task_that_ends_with_such_an_exception_is_done(broker: Broker) -> None:
    sender, worker = broker.communicator(), broker.communicator()
    future = sender.task_send(0)
    with worker.task_queue("kiwipy.tasks").next_task() as task:
        task.process().set_exception(Unspeakable())
    with pytest.raises(kiwipy.RemoteException):
        future.result(3)
    assert [row["state"] for row in broker.tasks()] == ["completed"]


# Tasks


def test_task_is_done_once_although_completed_was_removed(served: Broker, tmp_path: Path) -> None:
    record = tmp_path / "record"
    sender = served.communicator()
    worker = served.child(RECORDER, record)
    sender.task_send("first").result(TIMEOUT)
    eventually(lambda: served.tasks("claimed") == [], SOON)
    shutil.rmtree(served.queue / "completed")
    sender.task_send("second").result(TIMEOUT)
    assert worker.end() == 0
    served.child(RECORDER, record)
    sender.task_send("third").result(TIMEOUT)
    assert recorded(record) == ["first", "second", "third"]
    assert [row["state"] for row in served.tasks()] == ["completed", "completed"]


@pytest.mark.parametrize("name", ["", "named"])
def test_worker_whose_claim_directory_was_removed_goes_on(served: Broker, name: str) -> None:
    script = """
worker = communicator("removed")
(worker.task_queue(arguments[0]) if arguments[0] else worker).add_task_subscriber(lambda _, body: body)
print("ready"); sys.stdin.read(); worker.close()
"""
    sender = served.communicator()
    tasks = sender.task_queue(name) if name else sender
    worker = served.child(script, name)
    with disposable(served, worker):
        assert tasks.task_send(1).result(TIMEOUT) == 1
        eventually(lambda: served.tasks("claimed") == [], SOON)
        root = served.queue / "queues" / name if name else served.queue
        for directory in root.glob("claimed/removed*"):
            shutil.rmtree(directory)
        assert tasks.task_send(2).result(SOON) == 2
        assert worker.end() == 0


@pytest.mark.protocol("T4")
def test_task_send_does_not_raise_once_a_worker_has_claimed_the_task(served: Broker, tmp_path: Path) -> None:
    script = """
import errno, pathlib
real = os.fsync
def fsync(descriptor):
    until = time.monotonic() + 5
    while list(pathlib.Path(config_path, "coordinator").glob("task_*.json")) and time.monotonic() < until:
        time.sleep(0.01)  # The worker takes it meanwhile.
    raise OSError(errno.EIO, "the disk has failed")
with communicator() as sender:
    os.fsync = fsync
    try:
        future = sender.task_send("once")
    except OSError:
        future = None
    os.fsync = real
    # What anybody would do.
    print((future or sender.task_send("once")).result(10))
sys.stdin.read()
"""
    record = tmp_path / "record"
    served.child(RECORDER, record)
    sender = served.spawn(script)
    with disposable(served, sender):
        assert sender.line() == "5"
        assert sender.end() == 0
    assert recorded(record) == ["once"]


def test_task_send_that_is_interrupted_leaves_no_task(broker: Broker, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_: int) -> None:
        raise KeyboardInterrupt

    sender = broker.communicator()
    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sender.task_send("body")
    monkeypatch.undo()
    assert not [path.name for path in broker.queue.iterdir() if "task_" in path.name or path.name.startswith(".")]


def test_future_of_a_task_given_back_does_not_complete_who_took_it_next(broker: Broker) -> None:
    sender, worker = broker.communicator(), broker.communicator()
    outcome = sender.task_send("body")
    tasks = worker.task_queue("kiwipy.tasks")
    with tasks.next_task() as first:
        late = first.process()
        first.requeue()
        with tasks.next_task() as second:
            with contextlib.suppress(kiwipy.InvalidStateError):
                late.set_result("late")
            assert [row["state"] for row in broker.tasks()] == ["claimed"]
            second.process().set_result("in time")
    assert outcome.result(SOON) == "in time"


@pytest.mark.parametrize("lack", ["threads", "descriptors"])
def test_aiidas_task_send_does_not_raise_once_the_task_is_accepted(broker: Broker, tmp_path: Path, lack: str) -> None:
    pytest.importorskip("aiida")
    broker.config_path = tmp_path / ".aiida" / "profiles" / broker.profile
    script = (
        HOARD.replace("(100, hard)", "(200, hard)")
        + """
import pathlib, threading
os.environ["AIIDA_PATH"] = str(pathlib.Path(config_path).parents[1])
from aiida.manage.configuration import get_config
from aiida.manage.configuration.profile import Profile
from pipebroker import PipeBroker
control = {"backend": "namedpipe", "config": {}}
made = Profile(profile, {"storage": {"backend": "core.sqlite_temp", "config": {}}, "process_control": control})
get_config(create=True).add_profile(made)
broker = PipeBroker(made)
sender = broker.get_communicator()
print(broker.probe_service_status()["pid"]); sys.stdin.readline()
real = threading.Thread.start
def start(thread):
    raise RuntimeError("can't start new thread")
def profiler(frame, event, _):
    if event == "return" and frame.f_code.co_name == "task_send":
        sys.setprofile(None)
        use_up()  # The task was accepted, and all that follows finds no descriptor.
if arguments[0] == "threads":
    threading.Thread.start = start
else:
    sys.setprofile(profiler)
try:
    sender.task_send("body", no_reply=True)
    said = "accepted"
except Exception as error:
    said = f"{type(error).__name__}: {error}"
sys.setprofile(None)
threading.Thread.start = real
free()
print(said); sys.stdin.read()
broker.close()
for thread in threading.enumerate():
    if thread is not threading.main_thread():
        thread.join(10)  # It may be starting a coordinator.
"""
    )

    def stop() -> None:
        with contextlib.suppress(AssertionError):  # It may not be running.
            broker.run("stop")

    broker.stack.callback(stop)
    sender = broker.spawn(script, lack)
    with disposable(broker, sender):
        pid = int(sender.line())
        os.kill(pid, signal.SIGKILL)
        eventually(lambda: is_gone(pid))
        sender.tell("go on")
        try:
            assert sender.line() == "accepted"
            assert len(list(broker.queue.glob("task_*.json"))) == 1
        finally:
            assert sender.end() == 0


# Calls


RPC_HOARDER = (
    HOARD
    + """
worker = communicator()
worker.add_rpc_subscriber(lambda _, body: len(body), "hoarder")
print("ready"); sys.stdin.readline()
use_up()
print("used up"); sys.stdin.read()
free()
worker.close()
"""
)
CALLING_HOARDER = (
    HOARD
    + """
caller = communicator()
assert caller.rpc_send("large", 1).result(10) == "x"
print("ready"); sys.stdin.readline()
use_up()
future = caller.rpc_send("large", 200_000)
try:
    said = len(future.result(5))
except BaseException as error:
    said = type(error).__name__
free()
print(said); sys.stdin.read()
caller.close()
"""
)


def test_large_call_is_answered_though_no_descriptor_is_free(served: Broker) -> None:
    caller = served.communicator()
    worker = served.child(RPC_HOARDER)
    with disposable(served, worker):
        assert caller.rpc_send("hoarder", "x").result(TIMEOUT) == 1
        worker.tell("use up")
        assert worker.line() == "used up"
        assert caller.rpc_send("hoarder", "xx").result(TIMEOUT) == 2
        assert caller.rpc_send("hoarder", LARGE).result(SOON) == len(LARGE)
        assert worker.end() == 0


def test_large_reply_arrives_though_no_descriptor_is_free(served: Broker) -> None:
    served.communicator().add_rpc_subscriber(lambda _, size: "x" * size, "large")
    caller = served.child(CALLING_HOARDER)
    with disposable(served, caller):
        caller.tell("use up")
        assert caller.line() == "200000"
        assert caller.end() == 0


def test_reply_that_cannot_be_used_does_not_touch_the_next_one(served: Broker) -> None:
    script = """
caller = communicator()
given_up, awaited = (caller.rpc_send("later", 0).result(10) for _ in range(2))
given_up.set_result("no longer awaited")  # By the user, so that nothing can be done with its answer.
print("ready"); sys.stdin.readline()
try:
    print(awaited.result(5))
except BaseException as error:
    print(type(error).__name__)
sys.stdin.read(); caller.close()
"""
    futures: list[kiwipy.Future] = []

    def subscriber(*_: object) -> kiwipy.Future:
        futures.append(kiwipy.Future())
        return futures[-1]

    served.communicator().add_rpc_subscriber(subscriber, "later")
    caller = served.child(script)
    with disposable(served, caller):
        caller.stop()  # So that it reads both answers at once.
        futures[0].cancel()
        futures[1].set_result("second")
        ends_with(caller, "second")


def test_large_call_to_the_next_life_of_a_worker_id_is_left_alone_by_the_last(served: Broker) -> None:
    script = """
worker = communicator("twice")
worker.add_rpc_subscriber(lambda _, body: body, "twice")
pipes = os.readlink(os.path.join(config_path, "pipes", "directory"))
state = "open"
def pausing(listing):
    def paused(path=".", *rest):
        global state
        found = listing(path, *rest)
        if state == "closing" and os.fspath(path) == pipes:
            state = "paused"
            print("paused"); sys.stdin.readline()
            found = listing(path, *rest)
        return found
    return paused
os.listdir, os.scandir = pausing(os.listdir), pausing(os.scandir)
print("ready"); sys.stdin.readline()
state = "closing"
worker.close()
print("closed"); sys.stdin.read()
"""
    # It may have to wait until the last life has gone.
    next_one = """
until = time.monotonic() + 15
while True:
    try:
        worker = communicator("twice")
        break
    except kiwipy.DuplicateSubscriberIdentifier:
        if time.monotonic() > until:
            raise
        time.sleep(0.05)
worker.add_rpc_subscriber(lambda _, body: body, "twice")
print("ready"); sys.stdin.read(); worker.close()
"""
    caller = served.communicator()
    last = served.child(script)
    last.tell("close")
    paused = last.line() == "paused"
    following = served.spawn(next_one)
    with disposable(served, last, following):
        try:
            ready = following.line(4) == "ready"
        except AssertionError:
            ready = False
        if paused and not ready:
            last.tell("go on")
            assert last.line() == "closed" and following.line() == "ready"
        following.stop()
        answer = caller.rpc_send("twice", LARGE)
        if paused and ready:
            last.tell("go on")
            assert last.line() == "closed"
        following.go_on()
        assert answer.result(SOON) == LARGE
        assert following.end() == 0


# Broadcasts


def test_broadcasts_sent_while_a_coordinator_ends_reach_the_next_one(broker: Broker) -> None:
    # Tells of whatever it removes in the end, and waits.
    script = """
import pathlib, signal
from coordinator import PipeCoordinator
serving = PipeCoordinator(profile, config_path)
told = []
def end(*_):
    told.append("stop")
    serving.stop()
signal.signal(signal.SIGTERM, end)
def telling(unlink):
    def told_of(path, *rest, **options):
        name = os.path.basename(os.fspath(path))
        if told and name not in told and name in ("coordinator_broadcast", "coordinator.json"):
            told.append(name)
            print(name); sys.stdin.readline()
        return unlink(path, *rest, **options)
    return told_of
os.unlink, pathlib.Path.unlink = telling(os.unlink), telling(pathlib.Path.unlink)
print("ready")
serving.run()
print("ended")
"""
    first = broker.child(script)
    eventually(lambda: broker.status()["running"])
    got = listening(broker)
    sender = broker.communicator()
    sender.broadcast_send(0)
    eventually(lambda: got == [0])
    sent = 1
    with disposable(broker, first):
        os.kill(first.pid, signal.SIGTERM)
        said = ""
        while said != "ended":
            said = first.line()
            for sent in range(sent, sent + 50):
                sender.broadcast_send(sent)
            sent += 1
            if said != "ended":
                first.tell("go on")
        assert first.end() == 0
    broker.start()
    assert within(lambda: len(got) == sent, SOON), f"{sent - len(got)} of {sent} are lost"
    assert sorted(got) == list(range(sent))


def test_broadcasts_go_on_after_a_moment_without_a_descriptor(served: Broker) -> None:
    script = (
        HOARD
        + """
sender = communicator()
use_up()
try:
    sender.broadcast_send("first")
    said = "sent"
except Exception as error:
    said = "raised"
free()
sender.broadcast_send("second")
sender.broadcast_send("third")
print(said)
sys.stdin.read(); sender.close()
"""
    )
    got = listening(served)
    sender = served.spawn(script)
    with disposable(served, sender):
        expected = {"first", "second", "third"} if sender.line() == "sent" else {"second", "third"}
        assert within(lambda: set(got) == expected, SOON), f"only {got}"
        assert sender.end() == 0


def test_broadcasts_go_on_after_the_intake_was_made_again(served: Broker) -> None:
    got = listening(served)
    sender = served.communicator()
    (served.pipes / "coordinator_broadcast").unlink()
    sender.broadcast_send("first")
    eventually((served.pipes / "coordinator_broadcast").exists, LOOK)
    sender.broadcast_send("second")
    assert within(lambda: set(got) == {"first", "second"}, SOON), f"only {got}"


def heard_across_a_new_intake(broker: Broker) -> list[Any]:
    """Broadcast before and after the intake is made again; return what a listener hears."""
    got = listening(broker)
    sender = broker.communicator()
    sender.broadcast_send("before")
    eventually(lambda: got == ["before"])
    (broker.pipes / "coordinator_broadcast").unlink()
    eventually((broker.pipes / "coordinator_broadcast").exists, LOOK)
    sender.broadcast_send("after")
    return got


def test_old_intake_is_read_after_a_new_one_was_made(broker: Broker) -> None:
    broker.start()
    got = heard_across_a_new_intake(broker)
    broker.communicator().broadcast_send("by another")
    assert within(lambda: sorted(got) == ["after", "before", "by another"], SOON), f"only {got}"


@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="needs /proc")
def test_coordinator_sleeps_after_its_intake_was_made_again(broker: Broker) -> None:
    def seconds() -> float:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    pid = broker.start()
    heard_across_a_new_intake(broker)
    before = seconds()
    threading.Event().wait(2)
    assert seconds() - before < 0.5


def test_broadcasts_that_found_no_coordinator_outlive_their_sender(broker: Broker) -> None:
    got = listening(broker)
    sender = broker.communicator()
    sender.broadcast_send("small")
    sender.broadcast_send(LARGE)
    sender.close()
    try:
        broker.start()
        assert within(lambda: got == ["small", LARGE], SOON), f"{len(got)} of 2"
        eventually(lambda: not list(broker.pipes.glob("body_*")), SOON)
    finally:
        for left in broker.pipes.glob("body_*"):
            left.unlink(missing_ok=True)


DROPPER = """
import logging
logging.basicConfig(stream=sys.stdout, level=logging.WARNING, format="%(message)s")
sender = communicator()
print("ready"); sys.stdin.readline()
for number in range(int(arguments[0])):
    sender.broadcast_send(number, subject="x" * 100)
print("sent"); sys.stdin.readline()
sender.close()
print("closed"); sys.stdin.read()
"""


def test_sender_says_what_its_outbox_dropped(broker: Broker) -> None:
    pid = broker.start()
    sender = broker.child(DROPPER, 150_000)
    pause(pid)
    try:
        with disposable(broker, sender):
            sender.tell("send")
            said = sender.line()
            # When the next line comes is for it to choose; an outbox is looked at every ten seconds.
            with contextlib.suppress(AssertionError):
                said += "\n" + sender.line(LOOK - 3)
            assert "drop" in said
    finally:
        os.kill(pid, signal.SIGCONT)


def test_closing_says_what_could_not_be_sent(broker: Broker) -> None:
    pid = broker.start()
    got = listening(broker)
    sender = broker.child(DROPPER, 20_000)
    pause(pid)
    try:
        with disposable(broker, sender):
            sender.tell("send")
            said = [sender.line()]
            sender.tell("close")
            while said[-1] != "closed":
                said.append(sender.line())
    finally:
        os.kill(pid, signal.SIGCONT)
    # Or it found a way to keep them.
    assert any("drop" in line for line in said) or within(lambda: len(got) == 20_000, SOON), f"{said}, {len(got)}"


def test_closing_leaves_no_body_behind(broker: Broker) -> None:
    sender = broker.communicator()
    sender.broadcast_send(LARGE)
    sender.close()
    try:
        assert not list(broker.pipes.glob("body_*"))
    finally:
        for left in (*broker.pipes.glob("body_*"), *broker.pipes.glob("kept_*")):
            left.unlink()


def test_a_rejection_in_another_thread_takes_nothing_from_the_next_subscriber(
    served: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker, first, second = served.communicator("worker"), kiwipy.Future(), kiwipy.Future()
    worker.add_task_subscriber(lambda *_: first)
    worker.add_task_subscriber(lambda *_: second)
    sent = served.communicator().task_send("body")
    side, lane = worker._engine.holdings.sides[""], worker._engine.holdings.lane
    eventually(lambda: side.awaited)

    def put(job: Callable[[], object], put: Callable[..., object] = lane.put) -> None:
        put(job)
        if threading.current_thread() is threading.main_thread():
            eventually(lambda: second in [future for future, _ in list(side.awaited.values())], SOON)

    monkeypatch.setattr(lane, "put", put)
    first.set_exception(kiwipy.TaskRejected("not for me"))
    second.set_result("done")
    assert sent.result(SOON).result(SOON) == "done"


FEW_DESCRIPTORS = """
import burial, directories
layout = directories.locate(config_path)
use_up()
for _ in range(int(arguments[0])):
    os.close(hoard.pop())
buried = burial.bury(layout, [f"w{number}" for number in range(int(arguments[1]))])
print(len(buried.worker_ids), len(buried.tasks))
"""


@pytest.mark.parametrize(("dead", "free"), [(150, 50), (10, 10), (3, 3), (3, 2), (2, 2)])
def test_as_many_dead_as_descriptors_or_more_are_buried(broker: Broker, dead: int, free: int) -> None:
    sender = broker.communicator(fsync=False)
    for number in range(dead):
        sender.task_send(number, no_reply=True)
    # As so many workers leave it that were killed with a task in hand.
    for number, task in enumerate(sorted(broker.queue.glob("task_*"))):
        claimed = broker.queue / "claimed" / f"w{number}"
        claimed.mkdir()
        (claimed / "lock").touch()
        task.rename(claimed / task.name)
    assert broker.spawn(HOARD + FEW_DESCRIPTORS, free, dead).line() == f"{dead} {dead}"
    assert len(broker.tasks("waiting")) == dead


@pytest.mark.parametrize("kind", ["task", "call"])
def test_an_answer_comes_though_all_pipes_were_removed_before_it(served: Broker, kind: str) -> None:
    begun, goes_on = threading.Event(), threading.Event()

    def subscriber(_: Any, body: Any) -> Any:
        begun.set()
        goes_on.wait(TIMEOUT)
        return body

    worker, sender = served.communicator("worker"), served.communicator()
    worker.add_task_subscriber(subscriber)
    worker.add_rpc_subscriber(subscriber, "worker")
    sent = sender.task_send("body") if kind == "task" else sender.rpc_send("worker", "body")
    assert begun.wait(TIMEOUT)
    shutil.rmtree(served.pipes)
    goes_on.set()
    assert sent.result(LOOK) == "body"


def test_an_outcome_comes_though_the_pipe_comes_back_while_it_is_looked_for(
    served: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker, sender = served.communicator("worker"), served.communicator()
    ways, pipe = worker._engine.post.ways, served.pipes / sender._engine.reply
    away, comes_back = pipe.with_name("away"), [True]
    to = ways.to

    def slowly(name: str) -> Any:
        way = to(name)
        if name == pipe.name and way is None and comes_back:
            comes_back.clear()
            away.rename(pipe)
        return way

    def subscriber(_: Any, body: Any) -> Any:
        pipe.rename(away)
        return body

    monkeypatch.setattr(ways, "to", slowly)
    worker.add_task_subscriber(subscriber)
    assert sender.task_send("body").result(LOOK) == "body"
    assert not comes_back


def without_room(*_: object) -> bytes:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@contextlib.contextmanager
def outcome_without_room(broker: Broker, caplog: pytest.LogCaptureFixture) -> Iterator[tuple[Any, Any, kiwipy.Future]]:
    """Let a worker have done a task whose outcome finds no room; give it, the sender, and what that waits for."""
    worker, sender = broker.communicator("worker"), broker.communicator()

    def subscriber(_: Any, body: Any) -> Any:
        (broker.pipes / sender._engine.reply).unlink()
        return body

    with pytest.MonkeyPatch.context() as full:
        full.setattr(bodies, "pack_body", without_room)
        worker.add_task_subscriber(subscriber)
        sent = sender.task_send("body")
        eventually(lambda: "cannot leave" in caplog.text)
        yield worker, sender, sent


def test_an_outcome_that_finds_no_room_is_kept_until_it_does(served: Broker, caplog: pytest.LogCaptureFixture) -> None:
    with outcome_without_room(served, caplog) as (worker, sender, sent):
        assert len(served.tasks("claimed")) == 1 and not served.tasks("completed")
    look(sender)
    look(worker)
    assert sent.result(2 * LOOK) == "body"
    eventually(lambda: len(served.tasks("completed")) == 1)


SENDS_AND_IS_STOPPED = """
sender = communicator(fsync=False)
sent = [sender.task_send("x" * 300) for _ in range(400)]
print("ready"); sys.stdin.readline()
print(all(len(future.result(30)) == 300 for future in sent))
sys.stdin.read(); sender.close()
"""


def test_outcomes_that_a_stopped_sender_and_a_full_disk_do_not_take_outlive_their_worker(
    served: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    sender, ran = served.child(SENDS_AND_IS_STOPPED), 0
    sender.stop()

    def subscriber(_: Any, body: Any) -> Any:
        nonlocal ran
        ran += 1
        return body

    with disposable(served, sender):
        with monkeypatch.context() as full:
            full.setattr(bodies, "pack_body", without_room)
            worker = served.communicator("worker", task_prefetch_count=400)
            worker.add_task_subscriber(subscriber)
            eventually(lambda: ran == 400)
        worker.close()
        sender.go_on()
        sender.tell("go on")
        assert sender.line(TIMEOUT) == "True" and ran == 400
        assert sender.end() == 0


def test_a_sender_without_a_descriptor_hears_truly_whether_its_task_runs(served: Broker) -> None:
    sends = (
        HOARD
        + """
sender = communicator()
assert sender.task_send("first").result(20) == "first"
use_up()
os.close(hoard.pop())
raised = []
for number in range(100):
    try:
        sender.task_send(number, no_reply=True)
    except OSError:
        raised.append(number)
free()
print(raised)
sys.stdin.read(); sender.close()
"""
    )
    done: list[Any] = []
    worker = served.communicator("worker")
    worker.add_task_subscriber(lambda _, body: done.append(body) or body)
    sender = served.spawn(sends)
    raised = json.loads(sender.line())
    eventually(lambda: not served.tasks("waiting") and not served.tasks("claimed"))
    assert sorted([*raised, *done[1:]]) == list(range(100))
    assert sender.end() == 0


@pytest.mark.parametrize("serving", [True, False])
def test_who_waits_for_a_task_that_is_removed_hears_of_it_though_the_pipes_were_removed(
    broker: Broker, serving: bool
) -> None:
    if serving:
        broker.start()
    sender = broker.communicator()
    sent = sender.task_send("body")
    shutil.rmtree(broker.pipes)
    (task,) = broker.tasks("waiting")
    broker.run("remove", task["id"])
    look(sender)
    with pytest.raises(kiwipy.RemoteException, match="was removed from the queue"):
        sent.result(LOOK)


def test_pipes_that_are_removed_while_they_are_made_again_are_nobody_elses(
    broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    broker.communicator().close()
    layout, symlink = directories.locate(broker.config_path), os.symlink
    assert layout is not None
    shutil.rmtree(layout.pipes)

    def vanishes(target: Any, link: Any) -> None:
        monkeypatch.setattr(os, "symlink", symlink)
        symlink(target, link)
        shutil.rmtree(layout.pipes)

    monkeypatch.setattr(os, "symlink", vanishes)
    directories.remake(layout)
    assert layout.pipes.is_dir()


def test_a_second_subscriber_of_a_worker_gets_at_once_what_the_first_has_rejected(served: Broker) -> None:
    rejected = 0

    def reject(*_: Any) -> None:
        nonlocal rejected
        rejected += 1
        raise kiwipy.TaskRejected("not for me")

    worker = served.communicator("worker")
    worker.add_task_subscriber(reject)
    sent = served.communicator().task_send("body")
    eventually(lambda: rejected == 4)  # The next time would be eight seconds later.
    worker.add_task_subscriber(lambda _, body: body)
    assert sent.result(SOON) == "body"


def test_a_task_that_comes_into_nobodys_hands_waits_again(served: Broker, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = served.communicator("worker")
    worker.add_task_subscriber(lambda _, body: body)
    tasks = worker._engine.tasks
    offer, missed = tasks._offer_guarded, []

    def interrupted(side: Any, task: Any, offering: Any) -> None:
        if not missed:
            missed.append(task.name)
            raise RuntimeError("somebody has set it in this thread")
        offer(side, task, offering)

    # pytest would keep the exception that is logged, and by its frames the task.
    monkeypatch.setattr("lane.say", lambda *_: None)
    monkeypatch.setattr(tasks, "_offer_guarded", interrupted)
    sent = served.communicator().task_send("body")
    eventually(lambda: missed)
    look(worker)
    assert sent.result(LOOK) == "body"


def test_who_subscribes_to_anything_else_is_not_asked_again_for_what_it_has_rejected(served: Broker) -> None:
    rejected = 0

    def subscriber(_: Any, body: Any) -> Any:
        nonlocal rejected
        if body == "rejected":
            rejected += 1
            raise kiwipy.TaskRejected("not for me")
        return body

    worker, sender = served.communicator("worker"), served.communicator()
    worker.add_task_subscriber(subscriber)
    sender.task_send("rejected", no_reply=True)
    eventually(lambda: rejected == 3)  # The next time is four seconds later, and then eight.
    for number in range(20):
        worker.remove_broadcast_subscriber(worker.add_broadcast_subscriber(lambda *_: None))
        assert sender.task_send(number).result(SOON) == number
    assert rejected <= 5


def test_an_outcome_that_nobody_waits_for_needs_no_room(served: Broker, monkeypatch: pytest.MonkeyPatch) -> None:
    sender = served.spawn('sender = communicator(); sender.task_send("body"); sender.close()')
    assert sender.end() == 0
    with monkeypatch.context() as full:
        full.setattr(bodies, "pack_body", without_room)
        served.communicator("worker").add_task_subscriber(lambda _, body: body)
        eventually(lambda: len(served.tasks("completed")) == 1, SOON)


def test_who_closes_while_an_outcome_finds_no_room_leaves_no_death(
    served: Broker, caplog: pytest.LogCaptureFixture
) -> None:
    with outcome_without_room(served, caplog) as (worker, sender, sent):
        worker.close()
    (task,) = served.tasks("waiting")
    assert task["deaths"] == 0
    look(sender)
    served.communicator("next").add_task_subscriber(lambda _, body: body)
    assert sent.result(2 * LOOK) == "body"


def test_what_waits_beside_a_strangers_file_in_a_pipes_place_is_kept(broker: Broker) -> None:
    name = broker.communicator()._engine.reply
    (broker.pipes / name).unlink()
    (broker.pipes / name).write_text("a stranger's")
    frame = bodies.pack_body("{}", broker.pipes / name)
    body = bodies.claimed_body(frame, broker.pipes / name)
    assert body is not None and not burial._is_orphan(body)
    body.unlink()
    (broker.pipes / name).unlink()


def test_a_reply_pipe_has_the_name_of_one() -> None:
    assert directories.is_reply_pipe(directories.reply_pipe())
    assert directories.reply_pid(directories.reply_pipe()) == os.getpid()
    assert not directories.is_reply_pipe(f"reply_{'1' * 300}_{'a' * 32}")
