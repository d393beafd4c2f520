"""What was found by those who had not written it: forks and futures, orderly restarts, strangers' files, bad bodies."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import kiwipy
import pytest

import directories
from harness import COORDINATOR, ECHO, TIMEOUT, Broker, eventually, is_gone

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
    stopped = other if way == "call" else child
    if way == "call":
        other.stop()
    child.tell("go")
    assert child.line() == "sent"
    if way == "answer":
        # The answer comes once the worker goes on, and by then the caller has been stopped.
        child.stop()
    with contextlib.suppress(ProcessLookupError):
        pattern = "body_rpc_*" if way == "call" else "body_reply_*"
        found = eventually(lambda: list(served.pipes.glob(pattern)) or child.process.poll() is not None, 5.0)
        if way == "answer" and found is True:
            pytest.fail("the caller ended before it could be stopped")
        (body,) = found
        body.write_bytes(deep(body.read_text(), "body" if way == "call" else "result", large))
        os.kill(stopped.pid, signal.SIGCONT)
    assert "RemoteException" in (said := child.line()) and "deep" in said


# Orderly restarts

FLOOD = 6000


def test_orderly_restart_loses_no_broadcast_that_fits_the_intake(broker: Broker) -> None:
    got: list[Any] = []
    # It comes while no coordinator runs, so it cannot hold the intake open yet.
    broker.communicator().add_broadcast_subscriber(lambda _, body, *rest: got.append(body))
    pid = broker.start()
    sender = broker.communicator()
    sender.broadcast_send("first")
    eventually(lambda: got)
    os.kill(pid, signal.SIGSTOP)
    for number in range(FLOOD):
        sender.broadcast_send(number)
    os.kill(pid, signal.SIGTERM)
    os.kill(pid, signal.SIGCONT)
    eventually(lambda: is_gone(pid))
    broker.start()
    sender.broadcast_send("last")
    eventually(lambda: "last" in got)
    assert sorted(body for body in got if isinstance(body, int)) == list(range(FLOOD))
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
    failed = served.queue / "failed"
    failed.rmdir()
    failed.write_text("a file")
    sender = served.communicator()
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
