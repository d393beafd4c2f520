"""The command line, and the functions behind it, as an operator meets them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import control
import discovery
import fifo
import taskqueue
from harness import HERE, RECORDER, TIMEOUT, WORKER, Broker, eventually, is_gone
from pipebroker import PipeCommunicator


def test_tasks_that_move_meanwhile_are_listed_once(served: Broker) -> None:
    sender = served.communicator()
    sent = [sender.task_send(number) for number in range(500)]
    served.child(RECORDER, served.config_path / "record")
    while not all(future.done() for future in sent):
        # A name that moves on between two looks at the directories is in both.
        rows = control.tasks(served.config_path)
        assert len({row["id"] for row in rows}) == len(rows) == 500


def test_status_without_anything(broker: Broker) -> None:
    assert "not running" in broker.run("status", status=3)
    assert json.loads(broker.run("status", "--json", status=3))["tasks"]["waiting"] == 0
    assert "not running" in broker.run("stop")
    assert not broker.config_path.exists()


def test_command_line(broker: Broker) -> None:
    assert "Started" in broker.run("start")
    broker.stack.callback(control.stop, broker.config_path)
    said = json.loads(broker.run("status", "--json"))
    assert said["running"] and said["pipes"] == str(broker.pipes)
    assert f"with pid {said['pid']}" in broker.run("start", status=1)
    assert f"with pid {said['pid']}" in broker.run(status=1)
    child = broker.child(WORKER, "alpha")
    broker.communicator().task_send("body").result(TIMEOUT)
    said = json.loads(broker.run("status", "--json"))
    (worker,) = said["workers"]
    assert (worker["worker_id"], worker["pid"], worker["rpc"], worker["broadcast"]) == ("alpha", child.pid, 1, True)
    assert worker["queues"] == {"default": 0} and worker["in_hand"] == 0
    assert "alpha" in broker.run("status")
    (row,) = json.loads(broker.run("tasks", "--state", "completed", "--json"))
    assert "completed" in broker.run("tasks")
    assert child.line() == "body"
    broker.run("requeue", row["id"])
    assert child.line() == "body"
    assert "no failed or completed task" in broker.run("requeue", "unknown", status=1)
    assert "Restarted" in broker.run("restart")
    again = json.loads(broker.run("status", "--json"))
    assert again["pid"] != said["pid"]
    assert f"pid {again['pid']}" in broker.run("stop")
    assert eventually(lambda: is_gone(again["pid"]))
    broker.run("status", status=3)
    assert {path.name for path in broker.pipes.glob("coordinator_*")} == set()
    for text in ("Serving", "Worker alpha", "Stopped"):
        assert text in broker.log()


def test_foreground(broker: Broker) -> None:
    command = [
        sys.executable,
        HERE / "coordinator.py",
        "--profile",
        broker.profile,
        "--config-path",
        broker.config_path,
    ]
    for signal_number in (signal.SIGTERM, signal.SIGINT):
        with subprocess.Popen([*command, "start", "--foreground"], stderr=subprocess.PIPE, text=True) as process:
            assert process.stderr is not None and "Serving" in process.stderr.readline()
            process.send_signal(signal_number)
            assert "Stopped" in process.stderr.read()
        assert process.returncode == 0


def test_help_is_for_people(broker: Broker) -> None:
    text = broker.run("--help")
    assert all(word in text for word in ("start", "stop", "restart", "status", "tasks", "requeue", "--config-path"))


def test_failed_task_is_listed_with_the_reason(served: Broker) -> None:
    communicator = served.communicator()
    communicator.add_task_subscriber(lambda _, body: body)
    task_id = taskqueue.new_id()
    (served.queue / f"task_{task_id}.json").write_text('{"body": ')
    assert fifo.knock(served.pipes / discovery.TASKS_INTAKE, {"type": "task", "queue": "", "name": task_id})
    (row,) = eventually(lambda: control.tasks(served.config_path, "failed"))
    assert row["id"] == task_id and "JSONDecodeError" in row["reason"]
    assert communicator.task_send("next").result(TIMEOUT) == "next"


def test_housekeeping(served: Broker) -> None:
    communicator = served.communicator("alive")
    communicator.add_rpc_subscriber(lambda *_: "answer", "x")
    communicator.add_task_subscriber(lambda _, body: body)
    assert communicator.task_send("old").result(TIMEOUT) == "old"
    (old,) = eventually(lambda: list(served.queue.glob("completed/task_*")))
    os.utime(old, (0, time.time() - 25 * 3600))
    dead = served.child(WORKER, "dead")
    dead.kill()
    orphan = served.pipes / discovery.body_name("rpc_dead")
    orphan.touch()
    unrung = served.queue / f"task_{taskqueue.new_id()}.json"
    unrung.with_name(".draft").write_text('{"body": "nobody rang"}')
    unrung.with_name(".draft").rename(unrung)
    for path in (*served.pipes.glob("*_alive"), *served.pipes.glob("route_x"), *served.pipes.glob("reply_*")):
        path.unlink(missing_ok=True)
    eventually(lambda: not old.exists() and not orphan.exists() and not unrung.exists())
    eventually(lambda: len(list(served.pipes.glob("*_alive"))) == 2 and (served.pipes / "route_x").is_symlink())
    with PipeCommunicator(served.profile, served.config_path) as other:
        assert other.rpc_send("x", 1).result(TIMEOUT) == "answer"
        assert other.task_send("new").result(TIMEOUT) == "new"


def test_cleanup_dead_processes(broker: Broker) -> None:
    assert discovery.cleanup_dead_processes(broker.config_path) == 0
    child = broker.child(WORKER, "victim")
    os.kill(broker.start(), signal.SIGKILL)
    child.kill()
    eventually(lambda: not discovery.is_alive(broker.pipes / discovery.TASKS_INTAKE))
    assert discovery.cleanup_dead_processes(broker.config_path) == 2
    assert not list(broker.pipes.glob("*_victim"))
