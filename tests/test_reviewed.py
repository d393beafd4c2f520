"""What another reading found: what is lost once is no refusal, one queue with two names, who is told that it ended."""

from __future__ import annotations

import errno
import json
import os
import pty
import signal
import subprocess
import threading
from pathlib import Path
from typing import Any

import kiwipy
import pytest

import burial
import control
import control_line
import directories
import engine
import fifo
import files
import peers
import taskqueue
from harness import COORDINATOR, HOLDER, PULLER, RECORDER, TIMEOUT, Broker, eventually
from members import Member
from test_calls import make


def test_what_a_pause_has_put_back_goes_to_whoever_has_room(served: Broker) -> None:
    go, sender = threading.Event(), served.communicator(fsync=False)
    full = served.communicator("full", task_prefetch_count=1)
    full.add_task_subscriber(lambda *_: kiwipy.Future())
    sender.task_send("for days", no_reply=True)
    eventually(lambda: served.status()["tasks"]["claimed"] == 1)
    idle, begun = served.communicator("idle"), threading.Event()
    idle.add_task_subscriber(lambda _, body: begun.set() or (go.wait(TIMEOUT) and body))
    futures = [sender.task_send(0)]
    assert begun.wait(TIMEOUT)
    futures += [sender.task_send(number) for number in range(1, 21)]
    eventually(lambda: served.status()["tasks"]["waiting"] == 20)
    control.pause(served.config_path)
    go.set()
    assert futures[0].result(TIMEOUT) == 0
    eventually(lambda: not idle._engine.default.rung)
    assert [future.done() for future in futures[1:]] == [False] * 20
    control.resume(served.config_path)
    assert [future.result(TIMEOUT) for future in futures] == list(range(21))


def test_who_has_found_a_task_gone_that_waits_again_is_rung_for_it_again(tmp_path: Path) -> None:
    queue = taskqueue.TaskQueue(tmp_path)
    queue.make()
    name = taskqueue.new_id()
    queue.put(name, '{"body": 1}', lambda: None)
    tested, full, idle = peers.Queue("", queue), Member("full", 1), Member("idle")
    for member in (full, idle):
        tested.scheduler.join(member)
    tested.scheduler.claimed(full, "other")
    assert tested.scheduler.dispatch(0.0)[0] == {idle: [name]}
    tested.report(idle, "lost", name)
    assert tested.scheduler.dispatch(0.0)[0] == {idle: [name]}
    # Whoever cannot claim it at all is not rung for ever, but again after the next look.
    tested.report(idle, "lost", name)
    assert tested.scheduler.dispatch(0.0)[0] == {}
    for _ in tested.drift():
        pass
    assert tested.scheduler.dispatch(0.0)[0] == {idle: [name]}


def test_a_queue_of_two_names_is_worked_on_once(served: Broker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "LOOK_SECONDS", 0.5)
    with served.communicator() as sender:
        sender.task_queue("a")
        (served.queue / "queues" / "b").symlink_to("a")
        worker, ran = served.communicator("worker"), list[int]()

        def subscriber(_: Any, body: int) -> None:
            ran.append(body)
            threading.Event().wait(0.1)

        for name in ("b", "a"):
            worker.task_queue(name).add_task_subscriber(subscriber)
        futures = [sender.task_queue("b").task_send(number) for number in range(40)]
        for future in futures:
            future.result(TIMEOUT)
        worker.close()
    assert sorted(ran) == list(range(40))


WITHOUT_DESCRIPTORS = """
import resource
pad = [os.open("/dev/null", os.O_RDONLY) for _ in range(30)]
caller = communicator()
future = caller.rpc_send("holder", 1).result(20)
soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (20, hard))
hoard = []
try:
    while True:
        hoard.append(os.open("/dev/null", os.O_RDONLY))
except OSError:
    print("ready")
sys.stdin.readline()
resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
for descriptor in hoard:
    os.close(descriptor)
print(type(future.exception(20)).__name__)
caller.close()
"""


def test_a_call_fails_though_there_was_no_descriptor_when_its_recipient_closed(broker: Broker) -> None:
    holder = broker.communicator("holder")
    holder.add_rpc_subscriber(lambda *_: kiwipy.Future(), "holder")
    caller = broker.child(WITHOUT_DESCRIPTORS)
    holder.close()
    eventually(lambda: not list(broker.pipes.glob("rpc_holder")))
    threading.Event().wait(0.3)  # Nothing tells that it has noticed.
    caller.tell("")
    assert caller.line(2 * TIMEOUT) == "DeliveryFailed"


INTERRUPTED = """
import signal, threading
server, caller = communicator(), communicator()
server.add_rpc_subscriber(lambda *_: kiwipy.Future(), "never")
future = caller.rpc_send("never", 1).result(20)
signal.signal(signal.SIGUSR1, lambda *_: caller.close())
allocate = threading._allocate_lock
def interrupt():  # Between the look at the future and the wait for it.
    if sys._getframe(2).f_code.co_name == "result":
        threading._allocate_lock = allocate
        os.kill(os.getpid(), signal.SIGUSR1)
    return allocate()
threading._allocate_lock = interrupt
try:
    future.result()
except kiwipy.CommunicatorClosed:
    print("told")
server.close()
"""


def test_who_is_about_to_wait_hears_that_a_handler_has_closed(broker: Broker) -> None:
    assert broker.spawn(INTERRUPTED).line() == "told"


FORKS_IN_RESULT = """
import signal, threading
server, caller = communicator(), communicator()
server.add_rpc_subscriber(lambda *_: kiwipy.Future(), "never")
future, parent, forked, children = caller.rpc_send("never", 1).result(20), os.getpid(), threading.Event(), []
def fork(*_):
    children.append(os.fork())
    forked.set()
def wait():
    forked.wait(20)
    os.waitpid(children[0], 0)
    server.close()
signal.signal(signal.SIGALRM, fork)
signal.setitimer(signal.ITIMER_REAL, 0.2)
threading.Thread(target=wait).start()
try:
    future.result()
except Exception as error:
    print("child" if os.getpid() != parent else "parent", type(error).__name__)
    sys.stdout.flush()
    if os.getpid() != parent:
        os._exit(0)
caller.close()
"""


def test_a_child_that_is_forked_in_the_middle_of_a_wait_goes_on(broker: Broker) -> None:
    child = broker.spawn(FORKS_IN_RESULT)
    assert [child.line(), child.line()] == ["child CommunicatorClosed", "parent DeliveryFailed"]


def test_close_ends_what_a_decoder_is_just_looking_at(broker: Broker) -> None:
    go, decoding = threading.Event(), threading.Event()
    server = broker.communicator()
    server.add_rpc_subscriber(lambda *_: {"a": 1}, "server")
    caller = broker.communicator(decoder=lambda said: decoding.set() or (go.wait(TIMEOUT) and said))
    futures = [caller.rpc_send("server", 1) for _ in range(3)]
    try:
        assert decoding.wait(TIMEOUT)
        caller.close()
        assert {type(future.exception(TIMEOUT)) for future in futures} == {kiwipy.CommunicatorClosed}
    finally:
        go.set()


def test_a_call_is_known_to_a_forked_child_at_any_instant() -> None:
    calls = make()
    correlation_id, future = calls.expect(None)

    class Watched(dict[str, Any]):
        def pop(self, key: str, *default: Any) -> Any:
            assert key in calls._taken, "a child that is forked now would wait for ever"
            return super().pop(key, *default)

    calls._pending = Watched(calls._pending)
    calls.answer({"correlation_id": correlation_id, "result": 1})
    assert future.result(0) == 1 and not calls._taken


def test_many_futures_that_somebody_holds_are_not_waited_for_one_by_one() -> None:
    later: list[Any] = []
    calls = make(later=lambda _, job: later.append(job))
    expected = [calls.expect(None) for _ in range(4000)]
    release, held = threading.Event(), threading.Event()

    def hold() -> None:
        for _, future in expected:
            future._condition.acquire()
        held.set()
        release.wait(TIMEOUT)
        for _, future in expected:
            future._condition.release()

    holder = threading.Thread(target=hold)
    holder.start()
    assert held.wait(TIMEOUT)
    answering = threading.Thread(
        target=lambda: [calls.answer({"correlation_id": known, "result": 1}) for known, _ in expected]
    )
    answering.start()
    answering.join(10.0)
    slow = answering.is_alive()
    release.set()
    holder.join(TIMEOUT)
    answering.join(TIMEOUT)
    while later:
        later.pop()()
    assert not slow and all(future.result(0) == 1 for _, future in expected)


def test_calls_are_served_in_order_though_the_recipients_of_their_server_die(served: Broker) -> None:
    holders = [served.child(HOLDER, name) for name in ("a", "b")]
    server = served.child("""
server = communicator("server")
server.add_rpc_subscriber(lambda _, body: print(body[0]), "server")
futures = [server.rpc_send(name, 1).result(20) for name in "ab"]
print("ready"); sys.stdin.read()
""")
    caller = served.communicator()
    server.stop()
    for holder in holders:
        holder.kill()
    futures = [caller.rpc_send("server", body) for body in (["first"], ["second", "x" * 10_000])]
    server.go_on()
    assert [server.line(), server.line()] == ["first", "second"]
    for future in futures:
        future.result(TIMEOUT)


def test_a_terminal_that_is_not_read_keeps_no_coordinator_from_serving(broker: Broker) -> None:
    ours, its = pty.openpty()
    command = [*COORDINATOR, "--profile", broker.profile, "--config-path", broker.config_path]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=its, stderr=its, env=environment) as process:
        try:
            eventually(lambda: broker.queue.joinpath("coordinator.log").exists() and "Serving" in broker.log())
            worker = broker.communicator("worker")
            worker.add_task_subscriber(lambda _, body: body)
            for number in range(400):
                process.send_signal(signal.SIGUSR1)
                eventually(lambda number=number: broker.log().count("SIGUSR1") > number // 2)
            assert broker.communicator().task_send("served").result(TIMEOUT) == "served"
        finally:
            process.kill()
            os.close(ours)
            os.close(its)


def test_one_link_that_cannot_be_followed_keeps_no_dead_from_being_buried(served: Broker, tmp_path: Path) -> None:
    puller = served.communicator()
    puller.task_send("held", no_reply=True)
    child = served.child(PULLER, "puller")
    (served.pipes / "task_foo").symlink_to("a" * 300)
    (served.config_path / "pipes" / "worker_puller.json").unlink()
    child.kill()
    layout = directories.locate(served.config_path)
    assert layout is not None and "puller" in burial.everybody(layout)
    assert "foo" not in burial.everybody(layout)
    recorder = served.child(RECORDER, tmp_path / "record")
    eventually(lambda: (tmp_path / "record").exists() and (tmp_path / "record").read_text() == "held\n", 2 * TIMEOUT)
    recorder.end()
    (served.pipes / "task_foo").unlink()
    for pipe in served.pipes.glob("reply_*"):
        if not directories.is_read(pipe):
            pipe.unlink()  # Or the coordinator does so, after a while.


# The commands


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a directory away")
@pytest.mark.parametrize(
    "line", ["pause", "resume", "drain", "requeue 1", "remove 1", "purge --state failed", "delete --yes"]
)
def test_what_is_another_users_is_not_changed(broker: Broker, line: str) -> None:
    broker.communicator().close()
    os.chown(broker.queue, 65534, -1)
    try:
        said = broker.run(*line.split(), status=1)
    finally:
        os.chown(broker.queue, 0, -1)
    assert f"{broker.queue} is another user's: do this as that user" in said and not (broker.queue / "paused").exists()


def test_what_raised_is_kept_longest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(taskqueue, "COMPLETED_KEPT", 5)
    queue = taskqueue.TaskQueue(tmp_path)
    queue.make()
    for number in range(10):
        (tmp_path / "completed" / f"task_{number}.json").write_text("{}")
    (tmp_path / "completed" / "task_0.reason").write_text("ValueError: no")
    for _ in queue.sweep():
        pass
    left = sorted(queue.names("completed"))
    assert len(left) == 5 and left[0] == "0" and queue.reason("0", "completed")


def test_what_could_not_be_started_again_is_not_stopped_by_restart(served: Broker) -> None:
    pid = served.status()["pid"]
    said = (served.queue / "format").read_text()
    (served.queue / "format").write_text(said.replace("1", "2", 1))
    try:
        assert "has format 2" in served.run("restart", status=1)
        status = served.run("status", status=1)
        assert f"pid {pid}" in status and "has format 2, and this version knows 1" in status
    finally:
        (served.queue / "format").write_text(said)
    assert served.status()["pid"] == pid


def test_a_directory_in_place_of_a_task_is_left_where_it_is(served: Broker) -> None:
    task = served.queue / f"task_{1:020d}-00000000.json"
    task.mkdir()
    assert "move it elsewhere" in served.run("remove", "00000000", status=1) and task.is_dir()
    assert "move it elsewhere" in served.run("doctor", status=1)
    task.rmdir()


def test_who_lives_and_has_lost_his_entry_is_not_said_to_be_dead(served: Broker) -> None:
    served.communicator("holder").add_task_subscriber(lambda *_: kiwipy.Future())
    served.communicator().task_send("x", no_reply=True)
    eventually(lambda: served.status()["tasks"]["claimed"] == 1)
    (row,) = served.tasks()

    def shown() -> str:
        # Its owner makes it again at the next look.
        (served.config_path / "pipes" / "worker_holder.json").unlink(missing_ok=True)
        return served.run("show", row["id"])

    eventually(lambda: "holder, pid ?" in shown())


def test_list_says_what_it_cannot_read(
    broker: Broker, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    broker.communicator().close()
    scanned = os.scandir

    def refuse(path: Any) -> Any:
        if str(path).rstrip("/") == str(broker.queue):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return scanned(path)

    monkeypatch.setattr(os, "scandir", refuse)  # As root may list whatever there is.
    assert control_line.main(["list"], print, "coordinator") == 1
    said = capsys.readouterr()
    assert f"coordinator: {broker.queue}/: Permission denied" in said.err and broker.profile not in said.out


def test_an_entry_that_is_gone_is_no_old_version(served: Broker) -> None:
    (served.config_path / "pipes" / "coordinator.json").unlink()
    assert "unknown" not in served.run("doctor", status=0)


def test_what_a_subscriber_raises_is_one_line_and_says_what_it_was(served: Broker) -> None:
    def fails(*_: Any) -> None:
        raise ValueError("bad\ncoordinator.py: all is well")

    worker = served.communicator()
    worker.add_task_subscriber(fails)
    said = served.run("send", "1", "--wait", status=1)
    assert said.count("\n") == 1 and "bad" in said
    (row,) = served.tasks()
    assert row["outcome"] == "ValueError: bad"


@pytest.mark.parametrize(
    ("line", "status", "said"),
    [
        ("send NaN", 2, "it has NaN"),
        ("send [-Infinity]", 2, "it has -Infinity"),
        ("send 1 --queue queues/x", 1, "do you mean x?"),
        ("logs -n x", 2, "'x' is no number"),
        ("drain --timeout -1", 2, "'-1' is no number of seconds"),
    ],
)
def test_what_is_mistyped_is_said_to_be_that(served: Broker, line: str, status: int, said: str) -> None:
    answer = served.run(*line.split(), status=status)
    assert said in answer and "_seconds" not in answer


def test_of_two_paths_it_is_the_new_one_that_is_named() -> None:
    assert files.told(OSError(20, "Not a directory", "/a", None, "/b")) == "/b: Not a directory"


def test_a_real_time_signal_leaves_a_line(broker: Broker) -> None:
    command = [*COORDINATOR, "--profile", broker.profile, "--config-path", broker.config_path]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        eventually(lambda: (broker.queue / "coordinator.log").exists() and "Serving" in broker.log())
        process.send_signal(signal.SIGRTMIN + 3)
        eventually(lambda: f"Passed over signal {signal.SIGRTMIN + 3}" in broker.log())
        process.terminate()
        assert process.wait(TIMEOUT) == 0


@pytest.mark.parametrize("command", ["show", "requeue", "remove"])
def test_a_number_is_the_pk_of_a_process(broker: Broker, command: str) -> None:
    with broker.communicator() as sender:
        for pk in (7, 123, 7):
            sender.task_send({"task": "continue", "args": {"pid": pk, "nowait": True}}, no_reply=True)
        sender.task_send([{"args": 7}], no_reply=True)
    newest = broker.tasks()[2]["id"]
    if command == "requeue":
        (task,) = broker.queue.glob(f"task_{newest}*")
        (broker.queue / "failed").mkdir(exist_ok=True)
        task.rename(broker.queue / "failed" / task.name)
    said = broker.run(command, "7")
    assert newest in said and (command != "show" or "Process:  pk 7\n" in said)
    assert "AiiDA" in broker.run("tasks", "--aiida", status=1)
    assert "no task is called 8" in broker.run(command, "8" * 12, status=1)


# What strangers write


def test_nobody_is_told_of_what_nobody_wants_to_hear_of(served: Broker) -> None:
    sender = served.communicator()
    reply = sender._engine.reply
    (served.queue / "task_1.json").write_text(json.dumps({"no_reply": True, "reply_to": reply, "correlation_id": "1"}))
    (served.queue / "task_2.json").write_text(json.dumps({"reply_to": reply, "correlation_id": "2"}))
    told: list[Any] = []
    answer = sender._engine.calls.answer
    sender._engine.calls.answer = lambda message: told.append(message["correlation_id"]) or answer(message)
    served.communicator("worker").add_task_subscriber(lambda *_: None)
    eventually(lambda: served.status()["tasks"]["failed"] == 2)
    eventually(lambda: told == ["2"])


def test_a_field_that_may_be_missing_may_be_null(served: Broker) -> None:
    worker = served.communicator("worker", task_prefetch_count=1)
    worker.add_task_subscriber(lambda *_: kiwipy.Future())
    sender = served.communicator()
    layout = directories.locate(served.config_path)
    assert layout is not None
    sender.task_send(1, no_reply=True)
    eventually(lambda: served.status()["tasks"]["claimed"] == 1)
    ((_, name),) = taskqueue.TaskQueue(layout.queue).claimed()
    report = {"type": "report", "worker": "worker", "reply": None, "queue": "", "done": [name]}
    # It has room as far as the coordinator knows, so it is rung for the next one.
    assert fifo.knock(layout.pipes / directories.TASKS_INTAKE, report)
    sender.task_send(2, no_reply=True)
    eventually(lambda: worker._engine.default.put_by)


def test_what_is_no_name_of_a_task_is_not_rung_for(served: Broker) -> None:
    worker = served.communicator("worker", task_prefetch_count=1)
    worker.add_task_subscriber(lambda _, body: body)
    rung: list[str] = []
    take = worker._engine.holdings.claim
    worker._engine.holdings.claim = lambda side, name, **options: rung.append(name) or take(side, name, **options)
    intake = served.pipes / directories.TASKS_INTAKE
    for name in ("x.y", "x.y.1", "%41"):
        assert fifo.knock(intake, {"type": "task", "queue": "", "name": name})
    assert served.communicator().task_send("served").result(TIMEOUT) == "served"
    assert len(rung) == 1
