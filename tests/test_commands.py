"""The command line, and the functions behind it, as an operator meets them."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import control
import control_tasks
import directories
import discovery
import fifo
import presence
import taskqueue
from harness import AS_OTHER_USER, COORDINATOR, HERE, RECORDER, TIMEOUT, WORKER, Broker, eventually, is_gone
from pipebroker import PipeCommunicator

root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can run a command as another user")
SECONDS = 30.0


def obey(*arguments: str | os.PathLike[str], **options: Any) -> subprocess.CompletedProcess[str]:
    """Run the command line, whatever comes of it, as long as something does."""
    options = {"check": False, "capture_output": True, "text": True, "timeout": SECONDS, **options}
    return subprocess.run([*COORDINATOR, *arguments], **options)


def of(broker: Broker) -> list[str | Path]:
    return ["--profile", broker.profile, "--config-path", broker.config_path]


def test_tasks_that_move_meanwhile_are_listed_once(served: Broker) -> None:
    sender = served.communicator()
    sent = [sender.task_send(number) for number in range(500)]
    served.child(RECORDER, served.config_path / "record")
    while not all(future.done() for future in sent):
        # A name that moves on between two looks at the directories is in both.
        rows = control_tasks.tasks(served.config_path)
        assert len({row["id"] for row in rows}) == len(rows) == 500


def test_status_without_anything(broker: Broker) -> None:
    for command in ("status", "status --json", "stop", "tasks", "pause", "drain", "purge --state failed"):
        said = broker.run(*command.split(), status=1)
        assert "no broker has ever run in" in said and str(broker.config_path) in said and "not running" not in said
    assert not broker.config_path.exists()


@pytest.mark.parametrize("known_by", ["its directory", "AiiDA"])
def test_status_of_a_profile_that_has_not_used_the_broker_yet(broker: Broker, tmp_path: Path, known_by: str) -> None:
    broker.config_path = tmp_path / "profiles" / broker.profile
    if known_by == "AiiDA":
        (tmp_path / "config.json").write_text(json.dumps({"profiles": {broker.profile: {}}}))
    else:
        broker.config_path.mkdir(parents=True)
    assert "not running" in broker.run("status", status=3) and "not running" in broker.run("stop")
    assert not broker.status()["running"]
    assert not (broker.config_path / "coordinator").exists()


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
    (row,) = broker.tasks("completed")
    assert "completed" in broker.run("tasks")
    assert child.line() == "body"
    broker.run("requeue", row["id"])
    assert child.line() == "body"
    assert "no task is called unknown" in broker.run("requeue", "unknown", status=1)
    assert "Restarted" in broker.run("restart")
    again = json.loads(broker.run("status", "--json"))
    assert again["pid"] != said["pid"]
    assert f"pid {again['pid']}" in broker.run("stop")
    assert eventually(lambda: is_gone(again["pid"]))
    broker.run("status", status=3)
    assert not directories.is_read(broker.pipes / directories.TASKS_INTAKE)
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
    assert fifo.knock(served.pipes / directories.TASKS_INTAKE, {"type": "task", "queue": "", "name": task_id})
    (row,) = eventually(lambda: control_tasks.tasks(served.config_path, "failed"))
    assert row["id"] == task_id and "JSONDecodeError" in row["outcome"]
    assert communicator.task_send("next").result(TIMEOUT) == "next"


def test_housekeeping(served: Broker) -> None:
    communicator = served.communicator("alive")
    communicator.add_rpc_subscriber(lambda *_: "answer", "x")
    communicator.add_task_subscriber(lambda _, body: body)
    assert communicator.task_send("old").result(TIMEOUT) == "old"
    dead = served.child(WORKER, "dead")
    dead.kill()
    orphan = served.pipes / directories.body_name("rpc_dead")
    orphan.touch()
    unrung = served.queue / f"task_{taskqueue.new_id()}.json"
    unrung.with_name(".draft").write_text('{"body": "nobody rang"}')
    unrung.with_name(".draft").rename(unrung)
    for path in (*served.pipes.glob("*_alive"), *served.pipes.glob("route_x"), *served.pipes.glob("reply_*")):
        path.unlink(missing_ok=True)
    eventually(lambda: not orphan.exists() and not unrung.exists())
    eventually(lambda: len(list(served.pipes.glob("*_alive"))) == 2 and (served.pipes / "route_x").is_symlink())
    with PipeCommunicator(served.profile, served.config_path) as other:
        assert other.rpc_send("x", 1).result(TIMEOUT) == "answer"
        assert other.task_send("new").result(TIMEOUT) == "new"


def test_cleanup_dead_processes(broker: Broker) -> None:
    assert discovery.cleanup_dead_processes(broker.config_path) == 0
    child = broker.child(WORKER, "victim")
    os.kill(broker.start(), signal.SIGKILL)
    child.kill()
    eventually(lambda: not directories.is_read(broker.pipes / directories.TASKS_INTAKE))
    assert discovery.cleanup_dead_processes(broker.config_path) == 2
    assert not list(broker.pipes.glob("*_victim"))


# Stopping


def test_stop_gives_up_on_a_coordinator_that_does_not_run(broker: Broker) -> None:
    pid = broker.start()
    os.kill(pid, signal.SIGSTOP)
    try:
        said = obey(*of(broker), "stop", timeout=SECONDS)
        assert str(pid) in said.stdout + said.stderr
        # Whether it insists or gives up, it says what came of it.
        assert (said.returncode == 0) == is_gone(pid)
    finally:
        os.kill(pid, signal.SIGCONT)
    eventually(lambda: is_gone(pid))


# Serves once, and goes on as something else under the same pid; what it left says that it was killed.
FORMER = """
import signal, coordinator
from pathlib import Path
files = [Path(config_path, "coordinator", "coordinator.lock"), Path(config_path, "pipes", "coordinator.json")]
left, serving = {}, coordinator.PipeCoordinator(profile, config_path)
def serves():
    left.update((file, file.read_bytes()) for file in files)
    serving.stop()
serving.run(serves)
for file, data in left.items():
    file.write_bytes(data)
signals = []
signal.signal(signal.SIGTERM, lambda number, _: signals.append(number))
print("ready")
for line in sys.stdin:
    print(signals)
"""
# Is held up where it has just got the lock.
COMING = """
import fcntl, signal, coordinator
flock = fcntl.flock
lock = os.path.join(config_path, "coordinator", "coordinator.lock")
def held_up(descriptor, how):
    flock(descriptor, how)
    if how & fcntl.LOCK_EX and os.path.samestat(os.fstat(descriptor), os.stat(lock)):
        fcntl.flock = flock
        print("ready")
        sys.stdin.readline()
fcntl.flock = held_up
serving = coordinator.PipeCoordinator(profile, config_path)
signal.signal(signal.SIGTERM, lambda *_: serving.stop())
serving.run(lambda: print("serves"))
"""


def test_stop_never_signals_who_has_the_pid_of_an_earlier_coordinator(broker: Broker) -> None:
    former = broker.child(FORMER)
    coming = broker.child(COMING)
    try:
        with contextlib.suppress(subprocess.TimeoutExpired):
            obey(*of(broker), "stop")
        former.tell("who was signalled?")
        assert former.line() == "[]"
        # It may well find out who is coming, and stop that one.
        if coming.process.poll() is None:
            coming.tell("go on")
            assert coming.line() == "serves"
            assert f"pid {coming.pid}" in obey(*of(broker), "stop").stdout
        coming.process.wait(SECONDS)
    finally:
        coming.kill()


@pytest.mark.parametrize("command", ["stop", "restart"])
def test_a_coordinator_is_not_stopped_in_the_name_of_another_profile(broker: Broker, command: str) -> None:
    pid = broker.start()
    said = obey("--profile", "other", "--config-path", broker.config_path, command)
    assert said.returncode == 1 and broker.profile in said.stderr
    assert not is_gone(pid) and broker.status()["pid"] == pid


# Is held up where it is about to let go of its lock.
LEAVING = """
import fcntl, coordinator
flock = fcntl.flock
lock = os.path.join(config_path, "coordinator", "coordinator.lock")
def held_up(descriptor, how):
    if how & fcntl.LOCK_UN and os.path.samestat(os.fstat(descriptor), os.stat(lock)):
        fcntl.flock = flock
        print("leaving")
        sys.stdin.readline()
    flock(descriptor, how)
fcntl.flock = held_up
coordinator.PipeCoordinator(profile, config_path).run(lambda: print("ready"))
"""


def test_stop_returns_when_the_coordinator_is_gone(broker: Broker) -> None:
    leaving = broker.child(LEAVING)
    with subprocess.Popen([*COORDINATOR, *of(broker), "stop"], stdout=subprocess.PIPE, text=True) as stopping:
        try:
            assert leaving.line() == "leaving"
            with pytest.raises(subprocess.TimeoutExpired):
                stopping.wait(0.5)
            leaving.tell("go on")
            assert f"pid {leaving.pid}" in stopping.communicate(timeout=SECONDS)[0]
        finally:
            stopping.kill()
    broker.start()
    control.stop(broker.config_path)
    layout = directories.locate(broker.config_path)
    assert layout is not None and presence.coordinator_pid(layout) is None


def test_a_coordinator_that_is_stopped_takes_its_entry_along(broker: Broker) -> None:
    broker.start()
    assert (broker.config_path / "pipes" / "coordinator.json").exists()
    control.stop(broker.config_path)
    assert not (broker.config_path / "pipes" / "coordinator.json").exists()


# Starting

SIGNALLED = """
import fcntl, os, signal
flock = fcntl.flock
def signalled(descriptor, how):
    flock(descriptor, how)
    with open(os.environ["LOCK"]) as lock:
        if how & fcntl.LOCK_EX and os.path.samestat(os.fstat(descriptor), os.fstat(lock.fileno())):
            open(os.environ["LOCK"] + ".signalled", "w").close()
            os.kill(os.getpid(), signal.SIGTERM)
fcntl.flock = signalled
"""


def test_start_says_that_a_signal_ended_the_coordinator(broker: Broker, tmp_path: Path) -> None:
    (tmp_path / "site").mkdir()
    # Read by each Python that starts with this path, as the coordinator that `start` starts does.
    (tmp_path / "site" / "sitecustomize.py").write_text(SIGNALLED)
    lock = broker.queue / "coordinator.lock"
    lock.parent.mkdir(parents=True)
    lock.touch(0o600)
    said = obey(*of(broker), "start", env={**os.environ, "PYTHONPATH": str(tmp_path / "site"), "LOCK": str(lock)})
    assert lock.with_name(f"{lock.name}.signalled").exists()
    assert said.returncode == 1 and "Traceback" not in said.stderr
    assert "status 0" not in said.stderr


def test_start_says_what_kept_the_coordinator_from_its_log(broker: Broker, tmp_path: Path) -> None:
    (tmp_path / "copied").mkdir()
    for module in HERE.glob("*.py"):
        shutil.copy(module, tmp_path / "copied")
    (tmp_path / "copied" / "service.py").unlink()
    command = [sys.executable, tmp_path / "copied" / "coordinator.py", *of(broker), "start"]
    said = subprocess.run(command, check=False, capture_output=True, text=True, timeout=SECONDS)
    assert said.returncode == 1 and "service" in said.stderr and "Traceback" not in said.stderr


def test_a_coordinator_in_the_background_has_a_session_of_its_own(broker: Broker) -> None:
    assert os.getsid(broker.start()) != os.getsid(0)


@pytest.mark.skipif(not os.path.isdir("/proc/self/cwd"), reason="needs /proc to tell where a process is")
def test_a_coordinator_in_the_background_is_in_nobodys_way(broker: Broker) -> None:
    assert os.readlink(f"/proc/{broker.start()}/cwd") == "/"


def test_a_coordinator_finds_its_modules_where_scripts_do_not(broker: Broker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONSAFEPATH", "1")
    pid = broker.start()
    monkeypatch.undo()
    assert broker.status()["pid"] == pid


@contextlib.contextmanager
def cleaned(*arguments: str | os.PathLike[str], **options: Any) -> Iterator[None]:
    """Stop a coordinator that a test has started, and remove its pipes."""
    try:
        yield
    finally:
        said = obey(*arguments, "status", "--json", **options)
        obey(*arguments, "stop", **options)
        with contextlib.suppress(ValueError):
            shutil.rmtree(json.loads(said.stdout)["pipes"] or "/nonexistent", ignore_errors=True)


@pytest.mark.parametrize("name", ["../../evil", "..", ".", "a/b", "/absolute"])
def test_no_profile_name_leads_elsewhere(tmp_path: Path, name: str) -> None:
    if name == "/absolute":
        name = str(tmp_path / "absolute")
    home = tmp_path / "home"
    home.mkdir()
    environment = {**os.environ, "HOME": str(home)}
    before = set(tmp_path.rglob("*"))
    with cleaned(f"--profile={name}", env=environment):
        said = obey(f"--profile={name}", "start", env=environment)
        made = set(tmp_path.rglob("*")) - before
        assert said.returncode == 1 and not made
        assert "Traceback" not in said.stderr and name in said.stderr


def test_a_profile_name_may_start_with_a_dash(broker: Broker) -> None:
    arguments = [f"--profile=-x{uuid.uuid4().hex}", "--config-path", broker.config_path]
    with cleaned(*arguments):
        assert obey(*arguments, "start").returncode == 0
        assert obey(*arguments, "status").returncode == 0


def test_a_second_start_says_that_one_runs_where_the_path_is_not_utf_8(broker: Broker, tmp_path: Path) -> None:
    broker.config_path = tmp_path / os.fsdecode(b"caf\xe9")
    with cleaned(*of(broker)):
        assert obey(*of(broker), "start").returncode == 0
        pid = broker.status()["pid"]
        said = obey(*of(broker), "start")
        assert said.returncode == 1 and "Traceback" not in said.stderr
        assert f"with pid {pid}" in said.stderr


# Asking


def test_status_passes_over_a_fifo_in_the_registry(served: Broker) -> None:
    served.child(WORKER, "alpha")
    stray = served.config_path / "pipes" / "worker_x.json"
    os.mkfifo(stray, 0o600)
    try:
        said = obey(*of(served), "status", "--json")
        assert [worker["worker_id"] for worker in json.loads(said.stdout)["workers"]] == ["alpha"]
    finally:
        stray.unlink()


@pytest.mark.parametrize(
    ("whose", "since"),
    [
        *(("coordinator", since) for since in (1e300, -1e300, "x", [1], float("nan"), float("inf"))),
        *(("worker_alpha", since) for since in (1e300, -1e300, float("nan"), float("inf"))),
    ],
)
def test_status_reads_any_time_of_coming(served: Broker, whose: str, since: object) -> None:
    served.child(WORKER, "alpha")
    entry = served.config_path / "pipes" / f"{whose}.json"
    said = json.loads(entry.read_text())
    draft = entry.with_name(".draft")
    draft.write_text(json.dumps({**said, "since": since}))
    draft.rename(entry)
    text = served.run("status")
    assert f"running, pid {served.status()['pid']}" in text


def test_a_reason_that_is_not_utf_8_is_listed(served: Broker) -> None:
    served.communicator().task_send("waits", no_reply=True)
    (waiting,) = served.tasks()
    task = served.queue / "failed" / f"task_{waiting['id']}1.json"
    task.write_text('{"body": null}')
    task.with_suffix(".reason").write_bytes(b"the caf\xe9 is closed")
    (failed,) = served.tasks("failed")
    assert "is closed" in failed["outcome"]
    assert "is closed" in served.run("tasks")
    assert {row["state"] for row in served.tasks()} == {"waiting", "failed"}


def test_status_of_a_mistyped_profile_says_that_there_is_none(broker: Broker) -> None:
    said = obey(*of(broker), "status")
    assert said.returncode != 0 and str(broker.config_path) in said.stdout + said.stderr
    assert "0 waiting" not in said.stdout


@root
def test_status_of_an_unreadable_profile_says_that_it_cannot_be_read(broker: Broker) -> None:
    with tempfile.TemporaryDirectory(prefix="namedpipe-test-") as public:
        os.chmod(public, 0o711)
        broker.config_path = Path(public, broker.profile)
        broker.config_path.mkdir(0o755)
        with broker.communicator() as sender:
            sender.task_send("body", no_reply=True)
        script = AS_OTHER_USER + "sys.exit(coordinator.main())"
        said = subprocess.run(
            [sys.executable, "-c", script, "--profile", broker.profile, "--config-path", broker.config_path, "status"],
            check=False,
            capture_output=True,
            text=True,
            timeout=SECONDS,
        )
        assert "Traceback" not in said.stderr
        assert said.returncode == 1 and "Permission denied" in said.stderr and "0 waiting" not in said.stdout


def test_tasks_are_found_without_the_registry(broker: Broker) -> None:
    broker.start()
    child = broker.child(WORKER, "alpha")
    sender = broker.communicator()
    sender.task_send("done").result(TIMEOUT)
    (done,) = eventually(lambda: broker.tasks("completed"))
    assert child.line() == "done" and child.end() == 0
    sender.task_send("waits", no_reply=True)
    sender.close()
    broker.run("stop")
    shutil.rmtree(broker.config_path / "pipes")
    said = broker.status()
    assert (said["running"], said["tasks"]["waiting"], said["tasks"]["completed"]) == (False, 1, 1)
    assert "1 waiting" in broker.run("status", status=3)
    assert [row["state"] for row in broker.tasks()] == ["completed", "waiting"]
    broker.run("requeue", done["id"])
    assert [row["state"] for row in broker.tasks()] == ["waiting", "waiting"]
    broker.start()
    child = broker.spawn(WORKER, "alpha")
    lines = [child.line() for _ in range(3)]
    lines.remove("ready")
    assert lines == ["done", "waits"]


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize(
    ("command", "count"),
    [
        ("tasks", 1),
        ("tasks", 2000),
        ("tasks --json", 1),
        ("status", 1),
        ("--help", 0),
        ("tasks --help", 0),
        ("--version", 0),
    ],
)
def test_a_reader_may_leave_early(broker: Broker, command: str, count: int, unbuffered: str) -> None:
    broker.communicator()
    with broker.communicator(fsync=False) as sender:
        for number in range(count):
            sender.task_send(number, no_reply=True)
    # Where nothing is buffered, nothing is left for the end either.
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    to_nobody = {"capture_output": False, "stderr": subprocess.PIPE, "env": environment}
    read_end, write_end = os.pipe()
    os.close(read_end)
    try:
        said = obey(*of(broker), *command.split(), stdout=write_end, **to_nobody)
    finally:
        os.close(write_end)
    assert said.stderr == ""
