"""What another reading found: what is lost once is no refusal, one queue with two names, who is told that it ended."""

from __future__ import annotations

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
import directories
import engine
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
