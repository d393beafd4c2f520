"""What an operator sees and does: each command in a terminal and in a pipe, and what it says when it cannot."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import kiwipy
import pytest

import control
import control_commands
import control_doctor
import control_install
import control_line
import control_log
import control_tasks
import directories
import taskqueue
from harness import AS_OTHER_USER, COORDINATOR, ECHO, HERE, RECORDER, TIMEOUT, WORKER, Broker, eventually, recorded
from test_faults import enlarge, room

OPERATING = (HERE / "OPERATING.md").read_text()
root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user, and mount a small disk")
COMMANDS = {
    "status": (0, 3),
    "tasks": (0,),
    "tasks --errors --limit 3 --queue default": (0,),
    "show 0": (1,),
    "requeue 0": (1,),
    "remove 0": (1,),
    "purge --state failed": (0,),
    "pause": (0,),
    "drain --timeout 1": (0,),
    "resume": (0,),
    "logs -n 3": (0,),
    "send 1": (0,),
    "call nobody 1 --timeout 1": (1,),
    "broadcast 1": (0,),
    "list": (0, 1),  # It is of all profiles of this user, and some may be in a bad state.
    "doctor": (0, 1),
    "delete": (1,),
    "stop": (0,),
    "start": (0,),
    "restart": (0,),
    "stop --json": (0,),
}
"""Each in turn on a broker that runs, with the exit statuses that may be; the last one stops it."""


def obey(broker: Broker, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [*COORDINATOR, "--profile", broker.profile, "--config-path", broker.config_path, *arguments]
    common = {"check": False, "text": True, "timeout": TIMEOUT, "stdin": subprocess.DEVNULL}
    return subprocess.run(command, **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **common, **options})


class Terminal:
    """A command in a terminal of its own; what it shows can be waited for."""

    def __init__(self, broker: Broker, *arguments: str, **environment: str) -> None:
        self.shown = ""
        command = [*map(str, COORDINATOR), f"--profile={broker.profile}", f"--config-path={broker.config_path}"]
        ours, its = pty.openpty()
        self._descriptor = ours
        self.process = subprocess.Popen(
            [*command, *arguments],
            stdin=its,
            stdout=its,
            stderr=its,
            env={**os.environ, "TERM": "xterm", **environment},
            start_new_session=True,
            # It becomes the terminal that controls it, so that what is typed may be a signal (tty_ioctl(4)).
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
        os.close(its)

    def until(self, text: str) -> str:
        """Return all that is shown up to a text, or at the end."""
        deadline = time.monotonic() + TIMEOUT
        while not text or text not in self.shown:
            ready, _, _ = select.select([self._descriptor], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, f"{text!r} is not shown: {self.shown!r}"
            try:
                data = os.read(self._descriptor, 65536)
            except OSError:  # EIO: it has ended.
                data = b""
            if not data:
                assert not text, f"it ended without {text!r}: {self.shown!r}"
                break
            self.shown += data.decode()
        return self.shown

    def type(self, text: str) -> None:
        os.write(self._descriptor, text.encode())

    def end(self) -> int:
        """Wait for its end; return its exit status."""
        try:
            self.until("")
            return self.process.wait(TIMEOUT)
        finally:
            self.process.kill()
            self.process.wait()
            os.close(self._descriptor)


# Each command


def test_each_command_is_tried_here() -> None:
    assert {line.split()[0] for line in COMMANDS} | {"configure"} == set(control_line.parsers("", with_profile=True)[1])


def test_each_command_in_a_pipe_and_in_a_terminal(served: Broker) -> None:
    for line, statuses in COMMANDS.items():
        for arguments in (line.split(), [*line.split(), "--json"]):
            said = obey(served, *arguments)
            assert "Traceback" not in said.stdout + said.stderr
            assert said.returncode in ((0, 1) if line == "start" else statuses), (arguments, said)
            assert said.returncode in (1, 2) or not said.stderr, (arguments, said)
            assert said.stderr.count("\n") <= 1, (arguments, said)
            for printed in said.stdout.splitlines() if "--json" in arguments and line != "delete" else ():
                assert json.loads(printed)["version"] == 1, arguments
    for line, statuses in COMMANDS.items():
        terminal = Terminal(served, *line.split())
        if line == "delete":
            terminal.until("[y/N]")
            terminal.type("no\n")
        status = terminal.end()
        assert "Traceback" not in terminal.shown
        assert status in (*statuses, 0, 1), (line, terminal.shown)


@pytest.mark.parametrize("line", [line for line in COMMANDS if line.split()[0] not in ("start", "restart", "list")])
def test_each_command_says_that_there_is_no_such_profile(broker: Broker, line: str) -> None:
    said = obey(broker, *line.split())
    assert (said.returncode, said.stdout) == (1, "")
    assert re.fullmatch(r"coordinator.py: no broker has ever run in .*\n", said.stderr), said.stderr
    assert str(broker.config_path) in said.stderr
    assert not broker.config_path.exists()


@root
@pytest.mark.parametrize("line", COMMANDS)
def test_each_command_on_a_full_disk(served: Broker, line: str) -> None:
    # The queue is moved to a small disk while nothing runs.
    served.run("stop")
    kept = served.queue.with_name("kept")
    served.queue.rename(kept)
    with contextlib.contextmanager(room)(served.queue, "400k"):
        shutil.copytree(kept, served.queue, dirs_exist_ok=True)
        with open(served.queue / "fill", "wb", buffering=0) as fill, contextlib.suppress(OSError):
            while True:
                fill.write(b"x" * 4096)
        said = obey(served, *line.split())
        assert "Traceback" not in said.stdout + said.stderr
        assert said.returncode in (0, 1, 3) and said.stderr.count("\n") <= 1, said
        if said.returncode == 1 and "No space" in said.stderr:
            assert re.fullmatch(rf"coordinator.py: {served.config_path}/\S+: No space left on device\n", said.stderr)
        assert said.returncode == 0 or line != "start", "somebody has to work off what lies there"
        (served.queue / "fill").unlink()
        served.run("stop")
    served.queue.rmdir()
    kept.rename(served.queue)


@root
def test_a_log_that_cannot_be_written_is_said_at_the_start(broker: Broker, tmp_path: Path) -> None:
    broker.communicator().close()
    with contextlib.contextmanager(room)(tmp_path / "full", "40k"):
        log = tmp_path / "full" / "log"
        with open(log, "wb", buffering=0) as fill, contextlib.suppress(OSError):
            while True:
                fill.write(b"x" * 4096)
        (broker.queue / "coordinator.log").symlink_to(log)
        said = obey(broker, "start")
        try:
            assert (said.returncode, said.stdout[:7]) == (0, "Started")
            assert (
                "it serves, but" in said.stderr and f"{broker.queue}/coordinator.log cannot be written" in said.stderr
            )
            assert broker.status()["running"]
        finally:
            broker.run("stop")


@root
@pytest.mark.parametrize("line", [line for line in COMMANDS if line != "list"])
def test_each_command_on_another_users_profile(tmp_path_factory: pytest.TempPathFactory, line: str) -> None:
    import tempfile

    with tempfile.TemporaryDirectory(prefix="namedpipe-test-") as public:
        os.chmod(public, 0o711)
        broker = Broker(Path(public))
        directories.establish(broker.profile, broker.config_path)
        os.chmod(broker.config_path, 0o755)
        os.chmod(broker.queue, 0o755)
        try:
            script = AS_OTHER_USER + "sys.exit(coordinator.main())"
            command = [sys.executable, "-c", script, "--profile", broker.profile]
            said = subprocess.run(
                [*command, "--config-path", broker.config_path, *line.split()],
                check=False,
                capture_output=True,
                text=True,
                timeout=TIMEOUT,
                stdin=subprocess.DEVNULL,
            )
            assert "Traceback" not in said.stderr, said.stderr
            assert said.returncode in (0, 1, 3) and said.stderr.count("\n") <= 1, said
            assert (broker.queue / "format").exists() and not (broker.queue / "paused").exists()
        finally:
            shutil.rmtree(broker.pipes)


@pytest.mark.parametrize(
    ("line", "status"),
    [
        ("frob", 2),
        ("send", 2),
        ("send nonsense", 2),
        ("tasks --limit -1", 2),
        ("drain --timeout -1", 2),
        ("logs -n x", 2),
        ("purge", 2),
        ("purge --state claimed", 2),
        ("--version", 0),
        ("status --help", 0),
    ],
)
def test_usage(broker: Broker, line: str, status: int) -> None:
    said = obey(broker, *line.split())
    assert said.returncode == status and "Traceback" not in said.stderr
    assert not broker.config_path.exists()


@pytest.mark.parametrize("before", [True, False])
def test_the_profile_stands_before_the_command_or_after_it(served: Broker, before: bool) -> None:
    given = [f"--profile={served.profile}", f"--config-path={served.config_path}", "--json"]
    command = [*COORDINATOR, *given, "status"] if before else [*COORDINATOR, "status", *given]
    assert json.loads(subprocess.check_output(command))["running"]


# One task


def test_show_says_all_about_a_task(served: Broker) -> None:
    sender, holder = served.communicator(), served.communicator("holder")
    body = {"text": "a\x1b[31mb", "many": list(range(200))}
    sender.task_send(body)
    said = served.run("show", served.tasks()[0]["id"])
    assert "State:    waiting" in said and sender._engine.reply in said and "which lives" in said
    assert "\x1b" not in said and "all of it with --full" in said and '"many"' in said
    task_id = served.tasks()[0]["id"]
    assert "199\n" in served.run("show", task_id[:15], "--full")
    holder.add_task_subscriber(lambda *_: kiwipy.Future())
    eventually(lambda: served.tasks("claimed"))
    # More than a pk has digits, or it may be taken for one.
    said = served.run("show", task_id[-13:])
    assert f"Worker:   holder, pid {os.getpid()}" in said and "State:    claimed" in said
    shown = json.loads(served.run("show", task_id, "--json"))
    assert shown["body"] == body and shown["worker_pid"] == os.getpid() and shown["sender_lives"]


def test_a_task_that_raised_is_not_lost_from_sight(served: Broker) -> None:
    def fails(_: Any, body: Any) -> None:
        raise RuntimeError(f"no {body}")

    sender, worker = served.communicator(), served.communicator("worker")
    worker.add_task_subscriber(fails)
    with pytest.raises(kiwipy.RemoteException):
        sender.task_send("luck").result(TIMEOUT)
    (row,) = eventually(lambda: served.tasks("completed"))
    assert row["outcome"] == "RuntimeError: no luck"
    assert "no luck" in served.run("tasks", "--errors")
    said = served.run("show", row["id"])
    assert "Traceback (most recent call last)" in said and "in fails" in said


def test_a_task_that_is_removed_is_told_to_its_sender(served: Broker) -> None:
    sender = served.communicator()
    future = sender.task_send("never")
    (row,) = served.tasks()
    assert f"Removed {row['id']}." in served.run("remove", row["id"])
    with pytest.raises(kiwipy.RemoteException, match="was removed"):
        future.result(TIMEOUT)
    assert served.tasks() == []
    assert "no task is called" in served.run("remove", row["id"], status=1)


REMOVES = """
import control_tasks, signal, burial
real = burial.tell_sender
def slowly(*arguments):
    print("telling"); sys.stdin.readline()
    real(*arguments)
burial.tell_sender = slowly
print("ready")
for done in control_tasks.remove(config_path, arguments):
    print(done)
"""


@pytest.mark.parametrize("by", [signal.SIGINT, signal.SIGHUP, signal.SIGKILL])
def test_a_removal_that_is_ended_in_the_middle_loses_nothing(served: Broker, by: signal.Signals) -> None:
    future = served.communicator().task_send("sent")
    (row,) = served.tasks()
    child = served.child(REMOVES, row["id"])
    assert child.line() == "telling"
    child.process.send_signal(by)
    child.process.wait(TIMEOUT)
    (left,) = served.tasks()
    assert left["state"] == "failed" and "being removed" in left["outcome"]
    if by == signal.SIGINT:
        served.run("requeue", row["id"])
        served.communicator("worker").add_task_subscriber(lambda _, body: body)
        assert future.result(TIMEOUT) == "sent"
    else:
        served.run("remove", row["id"])
        with pytest.raises(kiwipy.RemoteException, match="was removed"):
            future.result(TIMEOUT)


def test_a_task_whose_sender_is_gone_with_the_pipes_can_be_removed(broker: Broker) -> None:
    sender = broker.spawn('sender = communicator(); sender.task_send("sent"); sender.close()')
    assert sender.end() == 0
    (row,) = broker.tasks()
    shutil.rmtree(broker.pipes)
    assert f"Removed {row['id']}." in broker.run("remove", row["id"])
    assert broker.tasks() == [] and not broker.pipes.exists()


def test_all_ids_are_resolved_before_anything_is_done(broker: Broker) -> None:
    sender = broker.communicator()
    for number in range(2):
        sender.task_send(number, no_reply=True)
    first, second = (row["id"] for row in broker.tasks())
    said = obey(broker, "remove", first, first[:10])
    assert (said.returncode, said.stdout) == (1, f"Removed {first}.\n") and "2 tasks have ids" in said.stderr
    # One that is named twice is one.
    assert broker.run("remove", second, second[-13:]) == f"Removed {second}.\n"


def refuse(path: Path) -> None:
    """Leave in its place what cannot be listed, not even by root (ENAMETOOLONG)."""
    path.rmdir()
    path.symlink_to("x" * 300)


def test_what_cannot_be_read_hides_nothing_else(broker: Broker) -> None:
    sender = broker.communicator()
    for name in ("bad", "good"):
        sender.task_queue(name).task_send(name, no_reply=True)
    refuse(broker.queue / "queues" / "bad" / "failed")
    said = broker.run("status", status=3)
    assert "Not all is well" in said and "good: 1 waiting" in said
    said = broker.run("tasks", status=1)
    assert "good" in said and "File name too long" in said
    (row,) = (row for row in control_tasks.tasks(broker.config_path) if row["queue"] == "good")
    assert "Task:" in broker.run("show", row["id"])
    assert "1 waiting task removed" in broker.run("purge", "--state", "waiting", status=1)


def test_drain_does_not_take_what_it_cannot_see_for_nothing(broker: Broker) -> None:
    broker.communicator().close()
    (broker.queue / "claimed" / "worker").symlink_to("x" * 300)
    assert "File name too long" in broker.run("drain", "--timeout", "0", status=1)
    (broker.queue / "claimed" / "worker").unlink()


def test_drain_notices_that_somebody_has_resumed(served: Broker) -> None:
    served.communicator("holder").add_task_subscriber(lambda *_: kiwipy.Future())
    served.communicator().task_send("held", no_reply=True)
    eventually(lambda: served.tasks("claimed"))
    command = [*COORDINATOR, f"--profile={served.profile}", f"--config-path={served.config_path}", "drain"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        eventually(lambda: served.status()["paused"])
        served.run("resume")
        assert process.wait(TIMEOUT) == 1
        assert process.stderr is not None and "somebody has resumed" in process.stderr.read()


def test_a_queue_that_its_user_has_called_default_is_another_one(served: Broker) -> None:
    sender = served.communicator()
    sender.task_send("default one", no_reply=True)
    sender.task_queue("default").task_send("other one", no_reply=True)
    served.run("send", "3", "--queue", "queues/default")
    assert [row["queue"] for row in served.tasks()] == ["default", "queues/default", "queues/default"]
    assert "2 waiting tasks removed" in served.run("purge", "--state", "waiting", "--queue", "queues/default")
    assert [row["queue"] for row in served.tasks()] == ["default"]
    assert "there is no queue typo; there are default, queues/default" in served.run(
        "tasks", "--queue", "typo", status=1
    )


@pytest.mark.parametrize("what", ["directory", "fifo", "no body"])
def test_show_and_the_workers_agree_on_what_is_a_task(broker: Broker, what: str) -> None:
    broker.communicator().close()
    path = broker.queue / "failed" / "task_1.json"
    {"directory": path.mkdir, "fifo": lambda: os.mkfifo(path), "no body": lambda: path.write_text("{}")}[what]()
    assert "It cannot be read" in broker.run("show", "1")


def test_nobody_adds_a_line_of_his_own(served: Broker) -> None:
    served.communicator().task_queue("q\nCoordinator: not running\x1b[2J").task_send("x" * 5000, no_reply=True)
    assert not re.search("^Coordinator: not", served.run("status"), re.MULTILINE)
    said = served.run("show", served.tasks()[0]["id"])
    assert "\x1b" not in said and "cut here" in said and not re.search("^Coordinator", said, re.MULTILINE)


def test_the_sender_of_a_task_that_cannot_be_read_is_told_that_it_was_removed(served: Broker) -> None:
    future = served.communicator().task_send("x")
    (row,) = served.tasks()
    path = served.queue / f"task_{row['id']}.json"
    text = path.read_text()
    path.write_text(text.replace('"x"', f"{'[' * 100_000}{']' * 100_000}"))
    served.run("remove", row["id"])
    with pytest.raises(kiwipy.RemoteException, match="was removed"):
        future.result(TIMEOUT)


@pytest.mark.parametrize("line", ["send 1 --wait --timeout 1e10", "call nobody 1 --timeout 1e10"])
def test_a_timeout_may_be_longer_than_any_clock(served: Broker, line: str) -> None:
    served.communicator("worker").add_task_subscriber(lambda _, body: body)
    assert "Traceback" not in obey(served, *line.split()).stderr


@pytest.mark.parametrize("line", ["remove", "purge --state waiting", "status"])
def test_what_is_to_be_done_is_done_though_nobody_reads_what_is_said(broker: Broker, line: str) -> None:
    sender = broker.communicator(fsync=False)
    for number in range(20):
        sender.task_send(number, no_reply=True)
    ids = [row["id"] for row in broker.tasks()] if line == "remove" else []
    read_end, write_end = os.pipe()
    os.close(read_end)
    try:
        said = obey(broker, *line.split(), *ids, stdout=write_end)
    finally:
        os.close(write_end)
    assert (said.returncode, said.stderr) == (control_commands.NOT_RUNNING if line == "status" else 0, "")
    assert len(broker.tasks()) == (20 if line == "status" else 0)


def test_what_cannot_be_done_to_one_task_is_done_to_the_others(served: Broker) -> None:
    sender = served.communicator()
    for number in range(2):
        sender.task_send(number, no_reply=True)
    first, second = (row["id"] for row in served.tasks())
    said = obey(served, "remove", "unknown", first, second)
    assert (said.returncode, said.stdout) == (1, f"Removed {first}.\nRemoved {second}.\n")
    assert "no task is called unknown" in said.stderr


@pytest.mark.parametrize("command", ["remove", "requeue"])
def test_a_task_in_the_hands_of_a_live_worker_is_refused(served: Broker, command: str) -> None:
    served.communicator("holder").add_task_subscriber(lambda *_: kiwipy.Future())
    served.communicator().task_send("held", no_reply=True)
    (row,) = eventually(lambda: served.tasks("claimed"))
    assert f"kill {os.getpid()}" in served.run(command, row["id"], status=1)
    assert served.tasks("claimed")


def test_purge_removes_what_is_in_one_state_of_one_queue(served: Broker) -> None:
    sender = served.communicator()
    futures = [sender.task_queue(name).task_send(name) for name in ("a b", "other")]
    assert "1 waiting task removed" in served.run("purge", "--state", "waiting", "--queue", "a b")
    with pytest.raises(kiwipy.RemoteException, match="was removed"):
        futures[0].result(TIMEOUT)
    assert [row["queue"] for row in served.tasks()] == ["other"]


def test_a_task_that_is_given_back_while_all_are_listed_is_listed(
    broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = directories.establish(broker.profile, broker.config_path)
    queue = taskqueue.TaskQueue(layout.queue)
    queue.make()
    (layout.queue / "claimed" / "worker").mkdir()
    Path(queue.file("1", "claimed/worker")).write_text("{}")
    claimed = taskqueue.TaskQueue.claimed

    def moved(self: taskqueue.TaskQueue, *arguments: Any) -> Iterator[tuple[str, str]]:
        queue.move("1", "claimed/worker", "", "1.1")
        return claimed(self, *arguments)

    monkeypatch.setattr(taskqueue.TaskQueue, "claimed", moved)
    assert [row["state"] for row in control_tasks.tasks(broker.config_path)] == ["waiting"]
    (layout.queue / "claimed" / "worker").rmdir()


# How things are


def test_status_says_who_is_missing(served: Broker) -> None:
    sender = served.communicator()
    for _ in range(2):
        sender.task_queue("lonely").task_send("waits", no_reply=True)
    said = served.run("status")
    assert "2 tasks wait in queue lonely, and nobody subscribes to it." in said
    assert f"version {directories.VERSION}" in said and "format 1" in said and "the oldest sent" in said


def test_status_is_watched_in_a_pipe_and_in_a_terminal(served: Broker) -> None:
    served.child(WORKER, "alpha")
    sender = served.communicator()
    sender.task_send("x").result(TIMEOUT)
    command = [*COORDINATOR, f"--profile={served.profile}", f"--config-path={served.config_path}", "status", "--watch"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(2)]
        process.send_signal(signal.SIGINT)
        assert process.wait(TIMEOUT) == control_commands.INTERRUPTED
    assert all("running, 0 waiting, 0 claimed, 1 done" in line for line in lines)
    for environment, coloured in (({}, True), ({"NO_COLOR": "1"}, False)):
        terminal = Terminal(served, "status", "--watch", **environment)
        terminal.until("alpha in hand")
        terminal.type("\x03")
        assert terminal.end() == control_commands.INTERRUPTED
        assert ("\x1b[32m" in terminal.shown) == coloured and "done in the last minute" in terminal.shown


def test_the_readme_explains_each_key_and_each_exit_status(served: Broker) -> None:
    served.communicator("worker").add_task_subscriber(lambda *_: None)
    served.communicator().task_queue("q").task_send(1, no_reply=True)
    section = OPERATING[OPERATING.index("## What `--json` prints") :]
    status = served.status()
    keys = {*status, *status["workers"][0], *status["queues"][0], *status["tasks"]}
    keys |= set(served.tasks()[0]) | set(json.loads(served.run("show", served.tasks()[0]["id"], "--json")))
    keys |= set(json.loads(obey(served, "list", "--json").stdout)["profiles"][0])
    found = json.loads(obey(served, "doctor", "--json").stdout)["findings"]
    keys |= set(found[0])
    assert [key for key in sorted(keys) if f"`{key}`" not in section] == []
    for status in (
        control_commands.FAILED,
        2,
        control_commands.NOT_RUNNING,
        control_commands.TIMED_OUT,
        control_commands.INTERRUPTED,
    ):
        assert f"| {status} |" in OPERATING


# The log


def log_lines(broker: Broker, number: int) -> None:
    with open(broker.queue / "coordinator.log", "a") as log:
        log.writelines(f"line {index}\n" for index in range(number))


def test_logs_go_on_across_rotation(broker: Broker) -> None:
    broker.communicator()
    assert "no coordinator has logged" in broker.run("logs", status=1)
    for index, name in enumerate(["coordinator.log.2", "coordinator.log.1", "coordinator.log"]):
        (broker.queue / name).write_text("".join(f"{index}.{line}\n" for line in range(3)))
    assert control_log.last(broker.config_path, 5) == ["1.1", "1.2", "2.0", "2.1", "2.2"]
    assert broker.run("logs", "-n", "1") == "2.2\n"
    assert len(control_log.last(broker.config_path, 100)) == 9


@pytest.mark.parametrize("rotation", ["ours", "twice", "logrotate", "copytruncate"])
def test_logs_are_followed_across_rotation(broker: Broker, rotation: str) -> None:
    broker.communicator()
    log = broker.queue / "coordinator.log"
    log.write_text("old\n")
    command = [*COORDINATOR, f"--profile={broker.profile}", f"--config-path={broker.config_path}"]
    with subprocess.Popen([*command, "logs", "--follow"], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "old\n"
        expected = []
        for round_ in range(3):
            with log.open("a") as file:
                file.write(f"{round_}a\nha")
                file.write(f"lf {round_}\n")
            expected += [f"{round_}a\n", f"half {round_}\n"]
            if round_ == 0:
                lines = [process.stdout.readline() for _ in expected]
            for _ in range(2 if rotation == "twice" else 1):
                if rotation == "logrotate":
                    log.rename(broker.queue / f"elsewhere.{round_}")
                elif rotation == "copytruncate":
                    lines += [process.stdout.readline() for _ in expected[len(lines) :]]
                    os.truncate(log, 0)
                    select.select([], [], [], 1.5)  # It looks once a second, and is not told.
                else:
                    for number in (2, 1):
                        with contextlib.suppress(FileNotFoundError):
                            os.rename(f"{log}.{number}", f"{log}.{number + 1}")
                    log.rename(f"{log}.1")
                log.write_text(f"new {round_}\n")
                expected.append(f"new {round_}\n")
            lines += [process.stdout.readline() for _ in expected[len(lines) :]]
        process.send_signal(signal.SIGINT)
        assert process.wait(TIMEOUT) == control_commands.INTERRUPTED
    assert lines == expected


# To try it


def test_anything_can_be_tried_from_a_shell(served: Broker) -> None:
    heard: list[Any] = []
    listener = served.communicator()
    listener.add_broadcast_subscriber(lambda _, *message: heard.append(list(message[:3])))
    served.child(ECHO, "echo")
    assert json.loads(served.run("send", '{"a": 1}', "--wait")) == {"a": 1}
    assert served.run("send", "1", "--queue", "q") == "Sent.\n"
    assert json.loads(served.run("call", "echo", '[1, "x"]', "--timeout", "20", "--json"))["result"] == [1, "x"]
    served.run("broadcast", '"hello"', "--sender", "me", "--subject", "greeting")
    eventually(lambda: heard == [["hello", "me", "greeting"]])
    assert "in time" in served.run("send", "1", "--queue", "q", "--wait", "--timeout", "0.3", status=4)
    served.communicator("holder").add_rpc_subscriber(lambda *_: kiwipy.Future(), "holder")
    assert "in time" in served.run("call", "holder", "1", "--timeout", "0.3", status=4)
    assert "no RPC subscriber 'nobody'" in served.run("call", "nobody", "1", status=1)

    def fails(*_: Any) -> None:
        raise RuntimeError("no luck")

    served.communicator("fails").add_rpc_subscriber(fails, "fails")
    assert "no luck" in served.run("call", "fails", "1", status=1)


# Installations


def test_list_finds_what_runs_and_what_aiida_knows(
    served: Broker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AIIDA_PATH", f"{tmp_path / 'none'}:{tmp_path / 'some'}")
    stopped, unused = (tmp_path / "some" / ".aiida" / "profiles" / name for name in ("stopped", "unused"))
    stopped.mkdir(parents=True)
    unused.mkdir()
    config = {"profiles": {"stopped": {}, "unused": {}}}
    (tmp_path / "some" / ".aiida" / "config.json").write_text(json.dumps(config))
    layout = directories.establish("stopped", stopped)
    shutil.rmtree(layout.pipes)
    served.communicator().task_send(1, no_reply=True)
    rows = {row["profile"]: row for row in control_install.installations()}
    ours = rows[served.profile]
    assert (ours["running"], ours["waiting"], ours["directory"]) == (True, 1, str(served.config_path))
    assert not rows["stopped"]["running"] and "unused" not in rows
    said = subprocess.run([*COORDINATOR, "list"], check=False, capture_output=True, text=True, timeout=TIMEOUT).stdout
    assert re.search(rf"{served.profile} +pid {ours['pid']} +1 ", said) and "stopped" in said


def test_delete_leaves_nothing_and_is_refused_while_somebody_is_there(served: Broker) -> None:
    sender = served.communicator()
    sender.task_send(1, no_reply=True)
    assert f"end the processes {os.getpid()} first" in served.run("delete", "--yes", status=1)
    assert served.tasks() and served.status()["running"]
    sender.close()
    (served.config_path / "notes").write_text("AiiDA's own")
    terminal = Terminal(served, "delete")
    terminal.until("1 task, of which 1 is not done? [y/N]")
    terminal.type("y\n")
    assert terminal.end() == 0 and "Deleted" in terminal.shown
    assert not served.pipes.exists() and sorted(path.name for path in served.config_path.iterdir()) == ["notes"]


def test_delete_removes_no_directory_that_is_not_the_brokers(broker: Broker, tmp_path: Path) -> None:
    directories.establish(broker.profile, broker.config_path)
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.tex").touch()
    note = broker.config_path / "pipes" / "directory"
    note.unlink()
    note.symlink_to(precious)
    broker.run("delete", "--yes")
    assert (precious / "thesis.tex").exists()
    shutil.rmtree(broker.pipes)


def test_delete_leaves_what_is_not_the_brokers_and_names_it(broker: Broker) -> None:
    thesis, notes = broker.config_path / "pipes" / "src" / "thesis.tex", broker.queue / "notes.txt"
    for path in (thesis, notes, broker.queue / ".gitignore"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("precious")
    broker.communicator().close()
    said = broker.run("delete", "--yes")
    assert thesis.exists() and notes.exists() and (broker.queue / ".gitignore").exists()
    assert f"Left {notes}, which" in said and f"Left {thesis.parent}, which" in said
    assert not broker.pipes.exists() and not (broker.queue / "completed").exists()


def test_delete_is_refused_while_a_worker_lives_whose_pipes_are_gone(broker: Broker) -> None:
    worker = broker.child(WORKER, "worker")
    worker.stop()
    try:
        shutil.rmtree(broker.pipes)
        assert f"end the processes {worker.pid} first" in broker.run("delete", "--yes", status=1)
    finally:
        worker.go_on()


def test_delete_of_a_copy_leaves_the_original_alone(served: Broker, tmp_path: Path) -> None:
    worker = served.communicator("worker")
    worker.add_task_subscriber(lambda _, body: body)
    shutil.copytree(served.config_path, tmp_path / "copy", symlinks=True)
    copy = Broker(tmp_path)
    copy.profile, copy.config_path = served.profile, tmp_path / "copy"
    assert "not running" in copy.run("status", status=3)
    assert "Deleted" in copy.run("delete", "--yes")
    assert served.communicator().task_send("done").result(TIMEOUT) == "done"


def test_one_bad_configuration_hides_no_other(broker: Broker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broker.communicator().close()
    path = tmp_path / ".aiida" / "config.json"
    path.parent.mkdir()
    monkeypatch.setenv("AIIDA_PATH", f"~nobody-of-this-name:{tmp_path}")
    for text in ('{"profiles": null}', "5", "[1]", "{", json.dumps({"profiles": {"a\0": {}, "\ud800": {}}})):
        path.write_text(text)
        assert broker.profile in [row["profile"] for row in control_install.installations()]


def test_pipes_whose_configuration_cannot_be_seen_are_not_forgotten(broker: Broker) -> None:
    broker.communicator().close()
    config = broker.pipes / ".config"
    config.unlink()
    config.symlink_to(f"/{'x' * 300}/config")  # ENAMETOOLONG: the kernel does not say.
    directories.remove_forgotten()
    assert config.is_symlink()


def findings(broker: Broker) -> str:
    found = control_doctor.examine(broker.config_path)
    return "\n".join(f"{each.what} -> {each.remedy}" for each in found)


TROUBLE: dict[str, tuple[Callable[[Broker], object], str]] = {
    "open": (lambda broker: broker.pipes.chmod(0o755), "chmod 700"),
    "open queue": (lambda broker: broker.queue.chmod(0o777), "chmod go-w"),
    "format": (lambda broker: (broker.queue / "format").write_text('{"format": 2}'), "has format 2"),
    "stranger": (lambda broker: (broker.queue / "notes.txt").write_text(""), "notes.txt is none of the broker's"),
    "unreadable": (lambda broker: (broker.queue / "task_1.json").write_text("{"), "remove it by 'remove 1'"),
    "alone": (lambda broker: (broker.queue / "task_1.json").write_text('{"body": 1}'), "no coordinator runs"),
    "paused": (lambda broker: (broker.queue / "paused").touch(), "go on by 'resume'"),
    "log": (lambda broker: os.mkfifo(broker.queue / "coordinator.log"), "coordinator.log is no regular file"),
    "lock": (lambda broker: (broker.queue / "coordinator.lock").mkdir(), "coordinator.lock is no regular file"),
    "claimed": (
        lambda broker: (broker.queue / "claimed").rmdir() or (broker.queue / "claimed").touch(),
        "claimed is no directory",
    ),
    "whose": (lambda broker: (broker.queue / "format").write_text('{"format": 1}'), "does not say whose"),
    "failed": (lambda broker: (broker.queue / "failed" / "task_1.json").write_text("{}"), "were given up on"),
}


@pytest.mark.parametrize("what", TROUBLE)
def test_the_doctor_finds(broker: Broker, what: str) -> None:
    broker.communicator().close()
    before = findings(broker)
    trouble, said = TROUBLE[what]
    assert said not in before
    trouble(broker)
    try:
        assert said in findings(broker)
    finally:
        broker.pipes.chmod(0o700)
        broker.queue.chmod(0o700)
        (broker.queue / "claimed").is_dir() or (broker.queue / "claimed").unlink()


def test_the_doctor_raises_no_false_alarm(served: Broker, monkeypatch: pytest.MonkeyPatch) -> None:
    served.communicator().task_queue("pulled").task_send(1, no_reply=True)
    assert not any(each.problem for each in control_doctor.examine(served.config_path))
    listed = control_doctor.files.listed

    def with_gone(directory: Any, **options: Any) -> Iterator[str]:
        yield from listed(directory, **options)
        yield "task_gone.json"  # Somebody claims it meanwhile.

    layout = directories.locate(served.config_path)
    assert layout is not None
    monkeypatch.setattr(control_doctor.files, "listed", with_gone)
    assert list(control_doctor._strangers(layout)) == []


def test_the_doctor_finds_nothing_wrong_where_pipes_are_made_again(broker: Broker) -> None:
    broker.communicator().close()
    for directory in (broker.pipes, broker.config_path / "pipes"):
        shutil.rmtree(directory)
    assert not any(each.problem for each in control_doctor.examine(broker.config_path))


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="there is no /proc here")
def test_the_doctor_finds_who_is_stopped(served: Broker) -> None:
    worker = served.child(WORKER, "worker")
    worker.stop()
    assert f"worker worker (pid {worker.pid}) is stopped" in findings(served)
    worker.go_on()


@root
def test_the_doctor_finds_another_users_file_and_a_full_disk(broker: Broker) -> None:
    broker.communicator().close()
    os.chown(broker.queue / "format", 12345, 12345)
    assert "is another user's" in findings(broker)
    os.chown(broker.queue / "format", 0, 0)
    kept = broker.queue.with_name("kept")
    broker.queue.rename(kept)
    with contextlib.contextmanager(room)(broker.queue, "400k"):
        shutil.copytree(kept, broker.queue, dirs_exist_ok=True)
        assert "make room" in findings(broker)
        enlarge(broker.queue, "200m")
        assert "make room" not in findings(broker)
    broker.queue.rmdir()
    kept.rename(broker.queue)


def test_the_doctor_finds_two_versions_and_few_descriptors(served: Broker, monkeypatch: pytest.MonkeyPatch) -> None:
    served.communicator("worker").add_task_subscriber(lambda *_: None)
    assert "has version" not in findings(served)
    monkeypatch.setattr(directories, "VERSION", "9.9.9")
    assert findings(served).count("has version") == 2
    monkeypatch.setattr(control_doctor.resource, "getrlimit", lambda _: (50, 50))
    assert "may open 50 files" in findings(served)


@pytest.mark.parametrize(("mounts", "kind"), [("/ ext4", "ext4"), ("/ ext4;/home nfs4;/home/m\\040e btrfs", "btrfs")])
def test_the_doctor_knows_the_file_system(monkeypatch: pytest.MonkeyPatch, mounts: str, kind: str) -> None:
    text = "".join(f"source {mount} rw 0 0\n" for mount in mounts.split(";"))
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: text)
    assert control_doctor._kind("/home/m e/.aiida") == kind
    assert control_doctor._NETWORK.fullmatch("nfs4") and not control_doctor._NETWORK.fullmatch("ext4")


# Signals and services


@contextlib.contextmanager
def foreground(broker: Broker, **environment: str) -> Iterator[subprocess.Popen[str]]:
    command = [*COORDINATOR, f"--profile={broker.profile}", f"--config-path={broker.config_path}"]
    options = {"stderr": subprocess.PIPE, "text": True, "env": {**os.environ, **environment}}
    with subprocess.Popen([*command, "start", "--foreground"], **options) as process:
        # Whoever waits for a line that does not come waits for its end then.
        patience = threading.Timer(4 * TIMEOUT, process.kill)
        patience.start()
        try:
            yield process
        finally:
            process.kill()
            patience.cancel()
            patience.join()


@pytest.mark.parametrize("abstract", [False, True])
def test_systemd_is_told(broker: Broker, tmp_path: Path, abstract: bool) -> None:
    address = f"@{broker.profile}" if abstract else str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ours:
        try:
            ours.bind(address.replace("@", "\0") if abstract else address)
        except OSError:
            pytest.skip("there are no abstract addresses here")
        ours.settimeout(TIMEOUT)
        with foreground(broker, NOTIFY_SOCKET=address) as process:
            assert ours.recv(100) == b"READY=1"
            assert broker.status()["running"]
            process.terminate()
            assert ours.recv(100) == b"STOPPING=1"
            assert process.wait(TIMEOUT) == 0
        # One that is started in the background by a service is not that service.
        assert obey(broker, "start", env={**os.environ, "NOTIFY_SOCKET": address}).returncode == 0
        broker.run("stop")
        ours.setblocking(False)
        with pytest.raises(BlockingIOError):
            ours.recv(100)


def line_with(process: subprocess.Popen[str], text: str) -> str:
    """Return the next line of its log that has a text: others may come between."""
    assert process.stderr is not None
    return next(line for line in process.stderr if text in line)


def test_signals_leave_a_line(broker: Broker) -> None:
    with foreground(broker) as process:
        line_with(process, "Serving")
        for number in (signal.SIGUSR1, signal.SIGUSR2):
            process.send_signal(number)
            line_with(process, number.name)
        moved = broker.queue / "moved.log"
        (broker.queue / "coordinator.log").rename(moved)
        process.send_signal(signal.SIGHUP)
        line_with(process, "opened anew")
        assert "opened anew" in broker.log() and "Serving" in moved.read_text()
        process.send_signal(signal.SIGQUIT)
        line_with(process, "Told to end by SIGQUIT")
        assert process.wait(TIMEOUT) == 0


def test_a_terminal_that_goes_takes_its_coordinator_along(broker: Broker) -> None:
    terminal = Terminal(broker, "start", "--foreground")
    terminal.until("Serving")
    terminal.process.send_signal(signal.SIGHUP)
    assert terminal.end() == 0
    assert "Told to end by SIGHUP" in broker.log()


def test_a_fifo_in_place_of_the_log_holds_nobody_up(broker: Broker) -> None:
    with foreground(broker) as process:
        assert process.stderr is not None and "Serving" in process.stderr.readline()
        log = broker.queue / "coordinator.log"
        log.unlink()
        os.mkfifo(log)
        process.send_signal(signal.SIGHUP)
        process.send_signal(signal.SIGUSR1)
        broker.run("stop")
        assert process.wait(TIMEOUT) == 0
        log.unlink()


def test_a_rotation_that_cannot_be_made_ends_no_log(broker: Broker) -> None:
    broker.communicator().close()
    (broker.queue / "coordinator.log").write_text(f"{'x' * 99}\n" * 10_000)
    (broker.queue / "coordinator.log.2").touch()
    (broker.queue / "coordinator.log.3").mkdir()
    broker.start()
    broker.run("stop")
    assert "Serving" in broker.log() and "Stopped" in broker.log()


def test_a_terminal_that_is_not_read_holds_nobody_up(broker: Broker) -> None:
    with foreground(broker) as process:
        assert process.stderr is not None and "Serving" in process.stderr.readline()
        for _ in range(3000):
            process.send_signal(signal.SIGUSR1)
            process.send_signal(signal.SIGUSR2)
            select.select([], [], [], 0.0003)
        broker.run("stop")
        assert "Stopped" in broker.log()


def test_a_coordinator_that_can_serve_nobody_any_more_has_failed(broker: Broker) -> None:
    import test_operating

    with test_operating.serving(broker) as child:
        (broker.queue / "coordinator.lock").unlink()
        assert eventually(lambda: child.process.poll() is not None) and child.process.returncode == 1


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="there is no systemd-analyze")
def test_the_unit_is_one(tmp_path: Path) -> None:
    name = "aiida-coordinator@.service"
    shutil.copy(HERE / name, tmp_path / name)
    command = ["systemd-analyze", "verify", "--user", str(tmp_path / name.replace("@", "@some_profile"))]
    environment = {**os.environ, "XDG_RUNTIME_DIR": str(tmp_path)}
    said = subprocess.run(command, check=False, capture_output=True, text=True, env=environment, timeout=TIMEOUT)
    assert (said.returncode, [line for line in said.stderr.splitlines() if name.split("@", maxsplit=1)[0] in line]) == (
        0,
        [],
    )


# Backup and move


def test_a_copy_of_a_queue_in_use_runs(served: Broker, tmp_path: Path) -> None:
    record = tmp_path / "record"
    served.child(RECORDER, record)
    served.communicator("holder", task_prefetch_count=1).add_task_subscriber(lambda *_: kiwipy.Future())
    sender = served.communicator(fsync=False)
    for number in range(300):
        sender.task_send(number, no_reply=True)
    copy = Broker(tmp_path)
    copy.profile = served.profile  # It is the same profile, in another directory.
    copy.config_path = tmp_path / "copy" / served.profile
    script = re.search(r"```bash\n(mkdir .*?)```", OPERATING, re.DOTALL)
    assert script is not None
    served.run("pause")
    variables = {"OLD": str(served.config_path), "NEW": str(copy.config_path)}
    subprocess.run(["bash", "-e", "-c", script[1]], check=True, env={**os.environ, **variables})
    served.run("resume")
    sent_before_the_copy = {str(number) for number in range(300)}
    with contextlib.ExitStack() as stack:
        stack.enter_context(copy.stack)
        copy.start()
        elsewhere = tmp_path / "elsewhere"
        copy.child(RECORDER, elsewhere)
        eventually(lambda: not {row["state"] for row in copy.tasks()} & {"waiting", "claimed"})
        done = {row["id"] for row in copy.tasks("completed")}
        assert len(done) == 300
        assert set(recorded(record)) | set(recorded(elsewhere)) == sent_before_the_copy
        pipes = Path(copy.status()["pipes"])
        assert pipes != served.pipes
    shutil.rmtree(pipes)


def test_what_an_operator_asks_is_asked_quickly(broker: Broker) -> None:
    """No time is measured here; but a body that is read, or a module that is loaded, would show in it."""
    with broker.communicator(fsync=False) as sender:
        for number in range(2000):
            sender.task_send(number, no_reply=True)
    opened = 0
    real = os.open

    def counting(*arguments: Any, **options: Any) -> int:
        nonlocal opened
        opened += 1
        return real(*arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "open", counting)
        assert control.status(broker.config_path)["tasks"]["waiting"] == 2000
        assert len(control_tasks.tasks(broker.config_path, limit=10)) == 10
    assert opened < 20


def test_what_is_logged_between_the_old_lines_and_the_new_ones_is_followed(broker: Broker) -> None:
    broker.communicator()
    log = broker.queue / "coordinator.log"
    log.write_text("old\n")
    lines = control_log.follow(broker.config_path, 1)
    assert next(lines) == "old"
    with log.open("a") as file:
        file.write("new\n")
    assert next(lines) == "new"
    lines.close()


@pytest.mark.parametrize("command", ["remove", "requeue", "show"])
def test_a_number_is_a_pk_and_never_a_part_of_another_process_task(broker: Broker, command: str) -> None:
    sender, last = broker.communicator(), "x"
    while not last.isdigit() or last == "0":
        sender.task_send({"task": "continue", "args": {"pid": 10}}, no_reply=True)
        last = max(task["id"] for task in broker.tasks())[-1]
    count = len(broker.tasks())
    said = broker.run(command, last, status=1)
    assert f"no task is called {last}, nor is one that of a process with this pk; of the id 0" in said
    assert f"{last} give more than a number" in said
    assert "with this pk; 'tasks' lists them" in broker.run(command, "9" * 12, status=1)
    assert len(broker.tasks("waiting")) == count
    assert "10" in broker.run("show", "10")
