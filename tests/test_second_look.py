"""What was found by those who had not written it: forks and futures, orderly restarts, strangers' files, bad bodies."""

from __future__ import annotations

import contextlib
import fcntl
import gc
import json
import os
import select
import shutil
import signal
import subprocess
import threading
from pathlib import Path
from typing import Any

import kiwipy
import pytest

import burial
import directories
import presence
import taskqueue
from claims import Claims
from harness import COORDINATOR, ECHO, TIMEOUT, Broker, eventually, is_gone, write_frame

LOOK = 14.0
"""For what is found at the latest when a process looks after itself, which it does every ten seconds."""
DEEP = 200_000

# Forks and futures

FORKING = """
worker = communicator()
queue = worker.task_queue("kiwipy.tasks")
print("ready"); sys.stdin.readline()
with queue.next_task() as task, task.processing() as outcome:
    if os.fork() == 0:
        if arguments[0] == "finishes":
            outcome.set_result("child")
        sys.exit(0)  # Which goes through all contexts, as it does in multiprocessing's children.
    os.wait()
    outcome.set_result("parent")
worker.close()
print("closed")
"""


@pytest.mark.parametrize("what", ["finishes", "gives back"])
def test_forked_child_leaves_its_parents_tasks_alone(broker: Broker, what: str) -> None:
    child = broker.child(FORKING, what)
    future = broker.communicator().task_send("work")
    child.tell("go")
    assert child.line() == "closed"
    assert future.result(TIMEOUT) == "parent"


def test_process_may_be_cancelled_and_begin_again(broker: Broker) -> None:
    communicator = broker.communicator()
    future = communicator.task_send("work")
    with communicator.task_queue("kiwipy.tasks").next_task() as task:
        first = task.process()
        first.cancel()
        second = task.process()
        del first
        gc.collect()
        eventually(lambda: not list(broker.queue.glob("task_*")))
        second.set_result("done")
        assert task.state == "finished"
    assert future.result(TIMEOUT) == "done"


class _Refusal(BaseException):
    pass


def test_decoder_that_raises_whatever_it_likes_leaves_nobody_waiting(broker: Broker) -> None:
    def decode(mapping: dict[str, Any]) -> Any:
        raise _Refusal

    broker.communicator().add_rpc_subscriber(lambda _, body: {"answer": body}, "echo")
    future = broker.communicator(decoder=decode).rpc_send("echo", "call")
    with pytest.raises(_Refusal):
        future.result(TIMEOUT)


def test_pulled_task_whose_body_cannot_be_decoded_waits_again(broker: Broker) -> None:
    def decode(mapping: dict[str, Any]) -> Any:
        raise ValueError("no such thing")

    broker.communicator().task_send({"a": "body"}, no_reply=True)
    queue = broker.communicator(decoder=decode).task_queue("kiwipy.tasks")
    for _ in range(2):
        with pytest.raises(ValueError, match="no such thing"), queue.next_task() as task:
            assert task.body
    with pytest.raises(ValueError, match="no such thing"):
        any(task.body for task in queue)

    eventually(lambda: gc.collect() is not None and list(broker.queue.glob("task_*")))


# Bodies nested too deep for whoever receives them


def deep(text: str, field: str, value: str) -> bytes:
    """Put more into a message's field than anybody can parse."""
    before = f'"{field}":{json.dumps(value)}'
    assert before in text
    return text.replace(before, f'"{field}":{"[" * DEEP}{"]" * DEEP}').encode()


def test_task_nested_too_deep_fails_and_its_sender_is_told(served: Broker) -> None:
    sender = served.communicator()
    future = sender.task_send("here")
    (file,) = served.queue.glob("task_*")
    file.write_bytes(deep(file.read_text(), "body", "here"))
    served.communicator().add_task_subscriber(lambda _, body: body)
    with pytest.raises(kiwipy.RemoteException, match="deep"):
        future.result(TIMEOUT)
    assert [row["state"] for row in served.tasks()] == ["failed"]
    assert sender.task_send("next").result(TIMEOUT) == "next"


CALLER = """
caller = communicator()
print("ready"); sys.stdin.readline()
future = caller.rpc_send(arguments[0], "here")
print("sent")
try:
    print(future.result(20))
except Exception as error:
    print(type(error).__name__, error)
caller.close()
"""


@pytest.mark.parametrize("way", ["call", "answer"])
def test_call_or_answer_nested_too_deep_ends_the_call(served: Broker, way: str) -> None:
    """What is on its way is made larger while whoever reads it is stopped."""
    large = "x" * 100_000
    child = served.child(CALLER.replace('"here"', '"x" * 100_000'), "echo")
    other = served.child(ECHO, "echo")
    other.stop()
    child.tell("go")
    assert child.line() == "sent"
    stopped, pattern = other, "body_rpc_*"
    if way == "answer":
        # The answer comes once the worker goes on, and by then the caller has been stopped.
        child.stop()
        other.go_on()
        stopped, pattern = child, "body_reply_*"
    (body,) = eventually(lambda: list(served.pipes.glob(pattern)))
    body.write_bytes(deep(body.read_text(), "body" if way == "call" else "result", large))
    stopped.go_on()
    assert "RemoteException" in (said := child.line()) and "deep" in said


# Orderly restarts

FLOOD = 6000


@pytest.mark.protocol("B2")
def test_orderly_restart_loses_no_broadcast_that_fits_the_intake(broker: Broker) -> None:
    got: list[Any] = []
    flood = FLOOD if hasattr(fcntl, "F_SETPIPE_SZ") else FLOOD // 10
    # It comes while no coordinator runs, so it cannot hold the intake open yet.
    broker.communicator().add_broadcast_subscriber(lambda _, body, *rest: got.append(body))
    pid = broker.start()
    sender = broker.communicator()
    sender.broadcast_send("first")
    eventually(lambda: got)
    os.kill(pid, signal.SIGSTOP)
    for number in range(flood):
        sender.broadcast_send(number)
    os.kill(pid, signal.SIGTERM)
    os.kill(pid, signal.SIGCONT)
    eventually(lambda: is_gone(pid))
    broker.start()
    sender.broadcast_send("last")
    eventually(lambda: "last" in got)
    assert sorted(body for body in got if isinstance(body, int)) == list(range(flood))
    assert "skipped" not in broker.log()


LISTENER = """
worker = communicator("listener")
worker.add_broadcast_subscriber(lambda *_: None)
print("ready"); sys.stdin.read(); worker.close()
"""


def test_coordinator_that_stops_says_which_broadcasts_it_drops(broker: Broker) -> None:
    broker.start()
    listener = broker.child(LISTENER)
    sender = broker.communicator()
    listener.stop()
    for number in range(FLOOD):
        sender.broadcast_send(number)
    broker.run("stop")
    assert "broadcasts to listener are dropped" in broker.log()


# Queues and files that others have changed


def test_worker_of_a_queue_that_was_removed_while_no_coordinator_ran_is_served(broker: Broker) -> None:
    broker.start()
    worker = broker.communicator()
    worker.task_queue("named").add_task_subscriber(lambda _, body: body)
    broker.run("stop")
    shutil.rmtree(broker.queue / "queues")
    broker.start()
    assert broker.communicator().task_queue("named").task_send("body").result(LOOK) == "body"


@pytest.mark.parametrize("what", ["claimed", "claimed/stray"])
def test_symlink_that_leads_nowhere_in_a_queue_stops_nobody(broker: Broker, what: str) -> None:
    broker.communicator().task_queue("bad").task_send("waits", no_reply=True)
    place = broker.queue / "queues" / "bad" / what
    if place.exists():
        place.rmdir()
    place.symlink_to(place.name)
    broker.start()
    assert broker.communicator("named").worker_id == "named"
    assert broker.status()["running"] and len(broker.tasks()) == 1
    other = broker.communicator()
    other.add_task_subscriber(lambda _, body: body)
    assert other.task_send("body").result(TIMEOUT) == "body"
    dead = broker.child(ECHO, "dead")
    dead.kill()
    eventually(lambda: not (broker.config_path / "pipes" / "worker_dead.json").exists())
    assert other.task_send("again").result(TIMEOUT) == "again"
    place.unlink()


def test_bad_task_that_cannot_be_set_aside_at_once_is_later(served: Broker) -> None:
    worker = served.communicator()
    worker.task_queue("kiwipy.tasks", prefetch_count=1).add_task_subscriber(lambda _, body: body)
    sender = served.communicator()
    # From then on nobody makes the directories of the queue again.
    assert sender.task_send("first").result(TIMEOUT) == "first"
    failed = served.queue / "failed"
    failed.rmdir()
    failed.write_text("a file")
    sender.task_send("bad", no_reply=True)
    (served.queue / ".bad").write_text("{")
    (served.queue / ".bad").rename(served.queue / "task_0-bad.json")
    sender.task_send("ring", no_reply=True)
    assert sender.task_send("next").result(TIMEOUT) == "next"
    eventually(lambda: list(served.queue.glob("claimed/*/task_*")), LOOK)
    failed.unlink()
    eventually(lambda: [row["id"] for row in served.tasks("failed")] == ["0-bad"], LOOK)


@pytest.mark.parametrize("content", [b"", b"{}", b"\0" * 60])
def test_format_that_a_loss_of_power_left_empty_is_written_anew(broker: Broker, content: bytes) -> None:
    broker.communicator().task_send("accepted", no_reply=True)
    (broker.queue / "format").write_bytes(content)
    assert "1 waiting" in broker.run("status", status=3)
    broker.communicator().task_send("accepted too", no_reply=True)
    assert json.loads((broker.queue / "format").read_text())["profile"] == broker.profile


def test_configuration_of_another_user_is_refused(broker: Broker) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give a directory to another user")
    broker.communicator().close()
    os.chown(broker.queue, 12345, -1)
    with pytest.raises(directories.DirectoryRefused, match="belongs to another user"):
        broker.communicator()
    assert "belongs to another user" in broker.run("start", status=1)


# The command line


def test_log_that_is_no_file_is_refused(broker: Broker) -> None:
    broker.communicator().close()
    os.mkfifo(broker.queue / "coordinator.log")
    assert "coordinator.log is not a regular file" in broker.run("start", status=1)
    broker.run("status", status=3)


def test_start_with_closed_standard_streams(broker: Broker) -> None:
    command = [*COORDINATOR, "--profile", broker.profile, "--config-path", broker.config_path]
    words = " ".join(f"'{word}'" for word in command)
    try:
        subprocess.run(["sh", "-c", f"{words} start <&- >&- 2>&-"], check=True, timeout=TIMEOUT)
        assert broker.status()["running"]
        said = subprocess.run(["sh", "-c", f"{words} status >&-"], capture_output=True, text=True, timeout=TIMEOUT)
        assert "Traceback" not in said.stderr
    finally:
        broker.run("stop")


def test_empty_configuration_path_is_refused(broker: Broker, tmp_path: Path) -> None:
    command = [*COORDINATOR, "--profile", broker.profile, "--config-path="]
    for rest in (["status"], ["start"], []):
        said = subprocess.run([*command, *rest], cwd=tmp_path, capture_output=True, text=True, timeout=TIMEOUT)
        assert said.returncode == 1 and "--config-path" in said.stderr and "Traceback" not in said.stderr
    assert not list(tmp_path.iterdir()) or [path.name for path in tmp_path.iterdir()] == [broker.profile]


@pytest.mark.parametrize("dropped", ["[1]", '{"a": "x"}', '"x"', "7"])
def test_status_of_an_entry_that_somebody_has_written(broker: Broker, dropped: str) -> None:
    pid = broker.start()
    broker.communicator("a").add_rpc_subscriber(lambda *_: None, "a")
    entry = {"pid": pid, "dropped": json.loads(dropped), "since": [1]}
    (broker.config_path / "pipes" / "coordinator.json").write_text(json.dumps(entry))
    assert broker.status()["running"]
    assert "running" in broker.run("status")


def test_lock_that_is_a_symlink_stops_no_status(broker: Broker) -> None:
    worker = broker.communicator("worker")
    worker.add_rpc_subscriber(lambda *_: None, "a")
    entry = (broker.config_path / "pipes" / "worker_worker.json").read_text()
    bad = broker.config_path / "pipes" / "worker_bad.json"
    bad.write_text(entry.replace('"worker"', '"bad"', 1))
    claims = broker.queue / "claimed" / "bad"
    claims.mkdir()
    (claims / "lock").symlink_to("lock")
    assert [row["worker_id"] for row in broker.status()["workers"]] == ["worker"]
    bad.unlink()
    shutil.rmtree(claims)


# Signal handlers and the garbage collector

HANDLER_CLOSES = """
import signal
worker = communicator()
queue = worker.task_queue("kiwipy.tasks")
def close(*_):
    worker.close()
    raise SystemExit(0)
signal.signal(signal.SIGALRM, close)
print("ready"); sys.stdin.readline()
signal.setitimer(signal.ITIMER_REAL, float(arguments[0]))
while True:
    worker.task_send("body", no_reply=True)
    with queue.next_task() as task, task.processing() as outcome:
        outcome.set_result(None)
"""


@pytest.mark.parametrize("after", [0.05, 0.1, 0.15])
def test_signal_handler_may_close(broker: Broker, after: float) -> None:
    child = broker.child(HANDLER_CLOSES, after)
    child.tell("go")
    assert child.end() == 0
    # Where closing could not be waited for, the process ended all the same, and it is as if it had been killed.
    broker.communicator("next")
    with broker.communicator().task_queue("kiwipy.tasks").next_task(fail=False) as task:
        assert task is None or task.body == "body"
    with contextlib.suppress(kiwipy.QueueEmpty), broker.communicator().task_queue("kiwipy.tasks").next_task() as task:
        task.process().set_result(None)
    broker.run("start")
    eventually(lambda: not list(broker.queue.glob("claimed/*/task_*")))
    broker.run("stop")


INTERRUPTED = """
import signal
class Interrupt(Exception):
    pass
def interrupt(*_):
    raise Interrupt
signal.signal(signal.SIGALRM, interrupt)
worker = communicator(fsync=False)
queue = worker.task_queue("kiwipy.tasks")
poller = worker._engine.poller
print("ready"); sys.stdin.readline()
end, count = time.monotonic() + 3, 0
while time.monotonic() < end:
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.0003 + count % 97 * 0.00001)
        count += 1
        while True:
            poller.call(lambda: None)
            if arguments[0] == "pulls":
                worker.task_send("body", no_reply=True)
                with queue.next_task() as task, task.processing() as outcome:
                    outcome.set_result(None)
    except Interrupt:
        pass
signal.setitimer(signal.ITIMER_REAL, 0)
print(any(poller.catch_up() for _ in range(20)))
worker.close()
print("closed")
"""


@pytest.mark.parametrize("what", ["wakes", "pulls"])
def test_handler_that_raises_leaves_nothing_claimed_and_nobody_deaf(broker: Broker, what: str) -> None:
    child = broker.child(INTERRUPTED, what)
    child.tell("go")
    assert child.line() == "True"
    assert child.line() == "closed"
    assert child.end() == 0
    assert not list(broker.queue.glob("claimed/*/task_*"))
    # What was interrupted half written is swept after an hour.
    for left in (*broker.queue.rglob(".*"), *broker.pipes.glob("reply_*")):
        left.unlink()


COLLECTED = """
import gc, threading
gc.disable()
worker = communicator(fsync=False)
queue = worker.task_queue("kiwipy.tasks")
engine = worker._engine
print("ready"); sys.stdin.readline()
class Cycle:
    pass
def lose(context):
    cycle = Cycle()
    cycle.context, cycle.me, cycle.task = context, cycle, context.__enter__()
    return cycle.task
task = lose(queue.next_task())
if arguments[0] == "processing":
    lose(task.processing())
del task
# Another thread holds what the collector would wait for, were it to take a lock.
side = engine.subscriptions.side(None, 0)
held, over = threading.Event(), threading.Event()
def hold():
    with side.claims._mutex:
        held.set()
        over.wait(20)
holder = threading.Thread(target=hold)
holder.start()
held.wait()
begin = time.monotonic()
gc.collect()
print("collected", time.monotonic() - begin < 10)
over.set()
holder.join()
with queue.next_task() as task:
    print(task.body)
worker.close()
"""


@pytest.mark.parametrize("context", ["next_task", "processing"])
def test_contexts_that_the_collector_ends_take_no_lock(broker: Broker, context: str) -> None:
    child = broker.child(COLLECTED, context)
    broker.communicator().task_send("body", no_reply=True)
    child.tell("go")
    assert child.line() == "collected True"
    assert child.line() == "body"
    assert child.end() == 0


FORKED_WAKE = """
import threading
worker = communicator()
waking = worker._engine.poller._waking
held, over = threading.Event(), threading.Event()
def hold():
    with waking:
        held.set()
        over.wait(20)
holder = threading.Thread(target=hold)
holder.start()
held.wait()
pid = os.fork()
if pid == 0:
    worker._engine.poller.call(print)
    os._exit(7)
over.set()
holder.join()
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
worker.close()
"""


def test_forked_child_may_collect_what_asks_the_selector_thread(broker: Broker) -> None:
    child = broker.spawn(FORKED_WAKE)
    assert child.line() == "7"
    assert child.end() == 0


def test_encoder_may_wait_for_a_reply(served: Broker) -> None:
    other = served.communicator()
    other.add_rpc_subscriber(lambda _, body: body, "echo")

    def encode(value: Any) -> Any:
        # As the selector thread does every ten seconds, meanwhile.
        worker._engine.poller.call(worker._engine.upkeep.look_once)
        return other.rpc_send("echo", str(value)).result(TIMEOUT)

    worker = served.communicator(encoder=encode)
    worker.add_task_subscriber(lambda *_: 1j)
    assert other.task_send("body").result(TIMEOUT) == "1j"


@pytest.mark.parametrize("what", ["call", "task"])
def test_encoder_that_raises_whatever_it_likes_leaves_nobody_waiting(served: Broker, what: str) -> None:
    def encode(value: Any) -> Any:
        raise _Refusal

    worker = served.communicator(encoder=encode)
    worker.add_task_subscriber(lambda *_: 1j)
    worker.add_rpc_subscriber(lambda *_: 1j, "rpc")
    sender = served.communicator()
    future = sender.rpc_send("rpc", None) if what == "call" else sender.task_send(None)
    with pytest.raises(kiwipy.RemoteException):
        future.result(TIMEOUT)


# What a look mends


def test_unsubscription_whose_entry_could_not_be_written_is_registered_later(broker: Broker) -> None:
    worker = broker.communicator("worker")
    identifier = worker.add_broadcast_subscriber(lambda *_: None)
    registry = broker.config_path / "pipes"
    registry.rename(broker.config_path / "away")
    registry.write_text("a file")
    worker.remove_broadcast_subscriber(identifier)
    registry.unlink()
    (broker.config_path / "away").rename(registry)
    worker._engine.poller.call(worker._engine.upkeep.look_once)
    eventually(lambda: '"broadcast": false' in (registry / "worker_worker.json").read_text())


@pytest.mark.parametrize("pipe", ["task", "rpc"])
def test_new_life_that_could_not_begin_at_once_begins_later(served: Broker, pipe: str) -> None:
    worker = served.communicator("old")
    worker.add_task_subscriber(lambda _, body: body)
    worker.add_rpc_subscriber(lambda _, body: body, "rpc")
    engine = worker._engine
    failed: list[str] = []
    life = engine.subscriptions._life
    opened = life.pipes.__class__.open

    def fail_once(self: Any, name: str, handler: Any) -> None:
        if name.startswith(pipe) and not failed:
            failed.append(name)
            raise OSError(24, "Too many open files")
        opened(self, name, handler)

    life.pipes.__class__.open = fail_once
    try:
        lock = served.queue / "claimed" / "old" / "lock"
        lock.unlink()
        layout = directories.locate(served.config_path)
        assert layout is not None
        other = presence.WorkerLock.take(layout, "old", make=True)
        assert other is not None
        engine.poller.call(engine.upkeep.look_once)
        eventually(lambda: failed)
        other.release()
        engine.poller.call(engine.upkeep.look_once)
        sender = served.communicator()
        assert sender.task_send("body").result(TIMEOUT) == "body"
        assert sender.rpc_send("rpc", "body").result(TIMEOUT) == "body"
    finally:
        life.pipes.__class__.open = opened


@pytest.mark.parametrize("removed", ["registry", "pipes"])
def test_subscribing_and_sending_go_on_though_a_directory_was_removed(broker: Broker, removed: str) -> None:
    worker = broker.communicator("worker")
    worker.add_rpc_subscriber(lambda _, body: body, "before")
    identifier = worker.add_broadcast_subscriber(lambda *_: None)
    shutil.rmtree(broker.pipes if removed == "pipes" else broker.config_path / "pipes")
    worker.broadcast_send("kept")
    worker.remove_broadcast_subscriber(identifier)
    worker.add_task_subscriber(lambda _, body: body)
    worker.add_rpc_subscriber(lambda _, body: body, "after")
    caller = broker.communicator()
    assert caller.rpc_send("after", "body").result(TIMEOUT) == "body"
    assert eventually(lambda: (broker.pipes / "route_before").is_symlink())
    for kept in broker.pipes.glob("kept_*"):
        kept.unlink()


def test_large_call_is_not_taken_for_a_lost_one_before_its_turn(broker: Broker) -> None:
    got: list[int] = []
    receiver, sender = broker.communicator(), broker.communicator()
    receiver.add_rpc_subscriber(lambda _, body: got.append(body[0]), "rpc")
    engine = receiver._engine
    sent: list[Any] = []

    def send_and_look() -> None:
        sent.extend(sender.rpc_send("rpc", [number, "x" * (10_000 * (number % 2))]) for number in range(40))
        engine.upkeep.look_once()

    engine.poller.call(send_and_look)
    eventually(lambda: len(sent) == 40)
    for future in sent:
        future.result(TIMEOUT)
    assert got == list(range(40))


def test_large_call_whose_doorbell_is_lost_is_found(broker: Broker) -> None:
    got: list[str] = []
    receiver = broker.communicator("worker")
    receiver.add_rpc_subscriber(lambda _, body: got.append(body), "rpc")
    (broker.pipes / f"body_rpc_worker.{32 * 'a'}").write_text(json.dumps({"to": "rpc", "body": "lost"}))
    for _ in range(2):
        receiver._engine.poller.call(receiver._engine.upkeep.look_once)
    assert eventually(lambda: got) == ["lost"]


def test_old_pipes_are_closed_when_their_last_writer_has_gone(broker: Broker) -> None:
    worker = broker.communicator("worker")
    worker.add_rpc_subscriber(lambda _, body: body, "rpc")
    worker.add_task_subscriber(lambda _, body: body)

    def look() -> None:
        worker._engine.poller.call(worker._engine.upkeep.look_once)
        assert worker._engine.poller.catch_up()

    look()
    before = len(worker._engine.poller.descriptors)
    for _ in range(5):
        shutil.rmtree(broker.pipes)
        look()
    eventually(lambda: worker._engine.poller.catch_up() and len(worker._engine.poller.descriptors) <= before)
    assert broker.communicator().rpc_send("rpc", "body").result(TIMEOUT) == "body"


@pytest.mark.parametrize("prefetch", [-1, 2.5, None, "3"])
def test_prefetch_that_is_none_is_refused(broker: Broker, prefetch: Any) -> None:
    with pytest.raises(ValueError, match="prefetch"):
        broker.communicator(task_prefetch_count=prefetch)
    with pytest.raises(ValueError, match="prefetch"):
        broker.communicator().task_queue("named", prefetch_count=prefetch)


def test_who_only_looks_at_a_dead_workers_lock_keeps_its_identifiers_from_nobody(broker: Broker) -> None:
    dead = broker.child(ECHO, "dead")
    dead.kill()
    # As `status` does for a moment: a shared lock, which only says that nobody has the other.
    descriptor = os.open(broker.queue / "claimed" / "dead" / "lock", os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_SH)
    threading.Timer(0.3, os.close, (descriptor,)).start()
    broker.communicator().add_rpc_subscriber(lambda *_: None, "dead")


def test_one_suspect_that_holds_its_lock_delays_nobodys_burial(served: Broker) -> None:
    holder = served.child(ECHO, "holder")
    lock = os.open(served.queue / "claimed" / "holder" / "lock", os.O_RDWR)
    try:
        # Its lock is another's, who holds on to it.
        keeper = served.child(KEEPER, served.queue / "claimed" / "holder" / "lock", holder.pid)
        assert keeper.line() == "kept"
        select.select([], [], [], 2.8)  # By now the tries are far apart: the next one is 5.1 s after the first.
        dead = served.child(ECHO, "dead")
        dead.kill()
        eventually(lambda: not (served.config_path / "pipes" / "worker_dead.json").exists(), 1.5)
    finally:
        os.close(lock)
        keeper.kill()
        holder.process.wait()
    eventually(lambda: not (served.config_path / "pipes" / "worker_holder.json").exists(), LOOK)


KEEPER = """
import fcntl, signal
descriptor = os.open(arguments[0], os.O_RDWR)
print("ready")
os.kill(int(arguments[1]), signal.SIGKILL)
while True:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        break
    except BlockingIOError:
        pass
print("kept"); sys.stdin.read()
"""


def test_strays_among_claims_and_pipes_are_nobody(broker: Broker) -> None:
    broker.communicator().close()
    for path in ("claimed/x/notes.txt", "claimed/y/task_my copy.json"):
        (broker.queue / path).parent.mkdir()
        (broker.queue / path).write_text("{}")
    (broker.queue / "claimed" / "empty").mkdir()
    (broker.pipes / "task_z").mkdir()
    layout = directories.locate(broker.config_path)
    assert layout is not None
    assert burial.everybody(layout) == set()
    assert burial.clean_up(layout) == 0
    assert not (broker.queue / "claimed" / "empty").exists()
    for left in (broker.queue / "claimed" / "x", broker.queue / "claimed" / "y", broker.pipes / "task_z"):
        shutil.rmtree(left)


def test_task_that_is_rung_for_again_is_taken_in_once(served: Broker) -> None:
    busy, over = threading.Event(), threading.Event()
    runs: list[Any] = []

    def work(_: Any, body: Any) -> None:
        runs.append(body)
        busy.set()
        over.wait(TIMEOUT)

    worker = served.communicator("worker")
    worker.add_task_subscriber(work)
    sender = served.communicator()
    futures = [sender.task_send(number) for number in range(3)]
    busy.wait(TIMEOUT)
    names = sorted(path.name[5:-5] for path in served.queue.glob("task_*"))
    for _ in range(50):
        write_frame(served.pipes / "task_worker", {"type": "ring", "queue": "", "names": names})
    assert worker._engine.poller.catch_up()
    assert len(worker._engine.tasks.lane._jobs) <= 2
    over.set()
    for future in futures:
        future.result(TIMEOUT)
    assert sorted(runs) == [0, 1, 2]


def test_sweep_of_many_completed_goes_in_small_steps(tmp_path: Path) -> None:
    queue = taskqueue.TaskQueue(tmp_path)
    queue.make()
    for number in range(taskqueue.COMPLETED_KEPT + 300):
        (tmp_path / "completed" / f"task_{number:020d}-0.json").touch()
    now = f"{taskqueue.new_id()}"
    steps, removed = 0, 0
    for gone in queue.sweep():
        steps, removed = steps + 1, removed + gone
    assert removed == 300 and steps > taskqueue.COMPLETED_KEPT
    left = sorted(queue.names("completed"))
    assert len(left) == taskqueue.COMPLETED_KEPT and left[0].startswith(f"{300:020d}") and left[-1] < now


def test_queue_is_listed_by_the_name_that_its_user_gave(broker: Broker) -> None:
    broker.communicator().task_queue("Große Queue").task_send("body", no_reply=True)
    assert [row["queue"] for row in broker.tasks()] == ["Große Queue"]


# Promises that nothing watched


def test_subscriber_added_before_a_broadcast_was_sent_receives_it_though_the_coordinator_reads_both_at_once(
    broker: Broker,
) -> None:
    pid = broker.start()
    sender, worker = broker.communicator(), broker.communicator()
    got: list[Any] = []
    os.kill(pid, signal.SIGSTOP)
    # So that the broadcasts are the first that it finds to read when it goes on.
    sender.broadcast_send("before")
    worker.add_broadcast_subscriber(lambda _, body, *rest: got.append(body))
    sender.broadcast_send("after")
    os.kill(pid, signal.SIGCONT)
    assert eventually(lambda: "after" in got)


@pytest.mark.protocol("B3")
def test_kept_broadcast_is_for_those_who_listened_when_it_was_sent(broker: Broker) -> None:
    got: dict[str, list[Any]] = {"early": [], "late": []}
    sender = broker.communicator()
    for name, heard in got.items():
        sender.broadcast_send(f"before {name}")
        broker.communicator(name).add_broadcast_subscriber(
            lambda _, body, *rest, heard=heard: heard.append(body)  # type: ignore[misc]
        )
    broker.start()
    sender.broadcast_send("last")
    eventually(lambda: all("last" in heard for heard in got.values()))
    assert got == {"early": ["before late", "last"], "late": ["last"]}


ANSWERED = """
caller = communicator()
future = caller.rpc_send("echo", "body")
print("ready"); sys.stdin.readline()
print(future.result(20))
caller.close()
"""


SLOW = """
server = communicator("server")
def serve(_, body):
    print("called"); sys.stdin.readline()
    return body
server.add_rpc_subscriber(serve, "echo")
server.add_rpc_subscriber(lambda _, body: body, "ping")
print("ready")
import threading
threading.Event().wait()
"""


def test_answer_that_was_sent_before_its_sender_died_comes(served: Broker) -> None:
    server = served.child(SLOW)
    caller = served.child(ANSWERED)
    assert server.line() == "called"
    caller.stop()
    server.tell("answer")
    # It is served after the other call, on the same thread.
    assert served.communicator().rpc_send("ping", 1).result(TIMEOUT) == 1
    server.kill()
    caller.go_on()
    caller.tell("go on")
    assert caller.line() == "body"
    assert caller.end() == 0
    eventually(lambda: not (served.config_path / "pipes" / "worker_server.json").exists())


@pytest.mark.parametrize("ending", ["look", "close"])
def test_task_that_could_not_be_moved_when_it_was_done_is_moved_later(tmp_path: Path, ending: str) -> None:
    queue = taskqueue.TaskQueue(tmp_path)
    queue.make()
    name = taskqueue.new_id()
    queue.put(name, '{"body": 1}', lambda: None)
    claims = Claims(queue, "worker", tmp_path / "paused")
    task = claims.take(name, print)
    assert task is not None
    (tmp_path / "completed").rmdir()
    (tmp_path / "completed").write_text("a file")
    assert claims.settle(task, lambda: None, "completed")
    assert list(queue.names("claimed/worker")) == [name] and len(claims) == 0
    (tmp_path / "completed").unlink()
    assert (claims.look() if ending == "look" else claims.close()) in (None, [])
    assert list(queue.names("completed")) == [name]


@pytest.mark.parametrize("step", ["claim", "send", "move"])
def test_task_whose_settling_was_interrupted_is_not_forgotten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    queue = taskqueue.TaskQueue(tmp_path)
    queue.make()
    name = taskqueue.new_id()
    queue.put(name, '{"body": 1}', lambda: None)
    claims = Claims(queue, "worker", tmp_path / "paused")

    times = []

    def interrupted(*_: object, **__: object) -> Any:
        times.append(1)
        if len(times) == 1:
            raise _Refusal

    def claim_and_be_interrupted(path: Any, name: str) -> Any:
        raise _Refusal

    with monkeypatch.context() as patch, contextlib.suppress(_Refusal):
        if step == "claim":
            patch.setattr(taskqueue.Task, "read", claim_and_be_interrupted)
        task = claims.take(name, print)
        assert task is not None
        if step == "move":
            patch.setattr(queue, "move", interrupted)
        claims.settle(task, interrupted if step == "send" else lambda: None, "completed")
    claims.look()
    assert list(queue.names("claimed/worker")) == []
    # An outcome that was about to be sent is sent once more.
    assert list(queue.names("" if step == "claim" else "completed")) == [name]
    assert len(times) == {"claim": 0, "send": 2, "move": 1}[step]
