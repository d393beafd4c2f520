"""What the broker survives: no room, no descriptors, other users, hostile input, stopped and poisoned workers, forks.

`test_crashes.py` kills at every system call, and `torture.py` at random and for longer.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import os
import resource
import select
import shutil
import signal
import stat
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import kiwipy
import pytest

import bodies
import control
import control_tasks
import coordinator
import directories
import fifo
import taskqueue
from harness import AS_OTHER_USER, ECHO, FORKER, HOARD, OTHER_USER, TIMEOUT, Broker, eventually
from pipebroker import PipeCommunicator

root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user, and mount a small disk")


@pytest.fixture
def public() -> Iterator[Path]:
    """A directory that other users can reach, as those of pytest are not."""
    directory = Path(tempfile.mkdtemp(prefix="namedpipe-test-"))
    directory.chmod(0o711)
    yield directory
    shutil.rmtree(directory)


def room(path: Path, size: str) -> Iterator[None]:
    """Make a directory a small disk of its own."""
    path.mkdir(parents=True, exist_ok=True)
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size},mode=0700", "tmpfs", path], capture_output=True, check=False
    )
    if made.returncode:
        pytest.skip(f"no small disk can be mounted here: {made.stderr.decode()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", path], check=True)


def enlarge(path: Path, size: str) -> None:
    subprocess.run(["mount", "-o", f"remount,size={size}", path], check=True)


# No room


@root
def test_full_disk_of_the_queue(broker: Broker) -> None:
    with contextlib.contextmanager(room)(broker.config_path, "400k"):
        broker.start()
        sender = broker.communicator()
        accepted = []
        with pytest.raises(OSError) as refused:
            while True:
                accepted.append(sender.task_send("x" * 10_000))
        assert refused.value.errno == errno.ENOSPC
        assert len(accepted) == len(list(broker.queue.glob("task_*"))) > 10
        assert not list(broker.queue.glob(".*"))
        # The last free page is for whoever asks next: nothing can be registered any more.
        (broker.config_path / "filler").write_bytes(b"")
        with contextlib.suppress(OSError), open(broker.config_path / "filler", "wb", buffering=0) as filler:
            while True:
                filler.write(b"x" * 100)
        with pytest.raises(OSError) as refused:
            broker.communicator().add_task_subscriber(lambda _, body: len(body))
        assert refused.value.errno == errno.ENOSPC
        enlarge(broker.config_path, "10m")
        sender.add_task_subscriber(lambda _, body: len(body))
        assert [future.result(TIMEOUT) for future in accepted] == [10_000] * len(accepted)
        assert sender.task_send("more").result(TIMEOUT) == 4
        assert f"Worker {sender.worker_id}" in broker.log()
        broker.stack.close()


@root
def test_coordinator_on_a_full_disk_says_so(broker: Broker) -> None:
    with contextlib.contextmanager(room)(broker.config_path, "40k"):
        with contextlib.suppress(OSError), open(broker.config_path / "filler", "wb", buffering=0) as filler:
            while True:
                filler.write(b"x" * 100)
        assert "No space left on device" in broker.run("start", status=1)
        assert not broker.pipes.exists() or not [path for path in broker.pipes.iterdir() if path.name != ".config"]
        enlarge(broker.config_path, "10m")
        broker.run("start")
        broker.run("stop")


@root
def test_full_disk_of_the_pipes(broker: Broker) -> None:
    with contextlib.contextmanager(room)(broker.pipes, "100k"):
        broker.start()
        broker.child(ECHO, "echo")
        communicator = broker.communicator()
        large = "x" * 200_000
        for send in (lambda: communicator.rpc_send("echo", large), lambda: communicator.broadcast_send(large)):
            with pytest.raises(OSError) as refused:
                send()
            assert refused.value.errno == errno.ENOSPC
        assert not list(broker.pipes.glob("body_*"))
        # The task is on another disk, but its result is too large for this one.
        with pytest.raises(kiwipy.RemoteException, match=r"the result cannot be sent: .*No space left"):
            communicator.task_send(large).result(TIMEOUT)
        assert communicator.rpc_send("echo", "small").result(TIMEOUT) == "small"
        enlarge(broker.pipes, "10m")
        assert communicator.rpc_send("echo", large).result(TIMEOUT) == large
        assert communicator.task_send(large).result(TIMEOUT) == large
        broker.stack.close()


def test_no_descriptors_in_the_sender(served: Broker) -> None:
    script = (
        HOARD
        + """
print("ready"); sys.stdin.readline()
sender = communicator()
use_up()
calls = [lambda: sender.task_send(1), lambda: sender.rpc_send("echo", 1), lambda: communicator(),
         lambda: sender.add_task_subscriber(print), lambda: sender.add_rpc_subscriber(print, "x")]
for call in calls:
    try:
        call()
        print("done")
    except OSError as error:
        print(error.strerror)
free()
print(sender.task_send(2).result(30), sender.rpc_send("echo", 3).result(30), sender.add_rpc_subscriber(print, "x"))
sender.close()
sys.stdin.read()
"""
    )
    served.child(ECHO, "echo")
    child = served.child(script)
    child.tell("go")
    assert [child.line() for _ in range(5)] == ["Too many open files"] * 5
    assert child.line() == "2 3 x"
    assert [row["state"] for row in control_tasks.tasks(served.config_path)] == ["completed"]


def test_no_descriptors_in_the_worker(served: Broker) -> None:
    script = (
        HOARD
        + """
worker = communicator("hoarder")
worker.add_task_subscriber(lambda _, body: body)
worker.add_rpc_subscriber(lambda _, body: use_up() if body else free(), "hoard")
print("ready"); sys.stdin.read(); worker.close()
"""
    )
    served.child(script)
    owner, other = served.communicator(), served.communicator()
    eventually(lambda: owner.rpc_send("hoard", True).result(TIMEOUT) == 0)
    pending = other.task_send("kept")
    eventually(lambda: [row["state"] for row in control_tasks.tasks(served.config_path)] == ["waiting"])
    # The worker has never answered this one: it has to open a pipe.
    other.rpc_send("hoard", True).result(TIMEOUT)
    owner.rpc_send("hoard", False).result(TIMEOUT)
    assert pending.result(TIMEOUT) == "kept"


@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="needs prlimit(2)")
def test_no_descriptors_in_the_coordinator(broker: Broker) -> None:
    pid = broker.start()
    broker.child(ECHO, "early")
    communicator = broker.communicator()
    assert communicator.task_send(1).result(TIMEOUT) == 1
    soft, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    highest = max(int(name) for name in os.listdir(f"/proc/{pid}/fd"))
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (highest + 1, hard))
    broker.child(ECHO, "late")
    eventually(lambda: "Too many open files" in broker.log())
    assert communicator.task_send(2).result(TIMEOUT) == 2
    assert communicator.rpc_send("late", 3).result(TIMEOUT) == 3
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (soft, hard))
    eventually(lambda: "Worker late" in broker.log().rpartition("Too many open files")[2])


@root
def test_no_more_threads(broker: Broker, public: Path) -> None:
    script = (
        AS_OTHER_USER
        + """
soft, hard = resource.getrlimit(resource.RLIMIT_NPROC)
before = len(os.listdir("/proc/self/fd"))
def limited(call):
    resource.setrlimit(resource.RLIMIT_NPROC, (1, hard))
    try:
        call()
    except Exception as error:
        print(type(error).__name__, error)
    finally:
        resource.setrlimit(resource.RLIMIT_NPROC, (soft, hard))
limited(lambda: communicator("first"))
print(len(os.listdir("/proc/self/fd")) - before)
made = communicator("first")
limited(lambda: made.add_task_subscriber(lambda _, body: body))
limited(lambda: control.start(profile, config_path))
made.add_rpc_subscriber(lambda _, body: body, "echo")
print(made.rpc_send("echo", "works").result(30))
made.close()
print("ready"); sys.stdin.read()
"""
    )
    broker.config_path = public / broker.profile
    broker.config_path.mkdir()
    os.chown(broker.config_path, OTHER_USER, OTHER_USER)
    process = broker.spawn(script)
    assert process.line() == "RuntimeError can't start new thread"
    assert process.line() == "0"
    assert process.line() == "RuntimeError can't start new thread"
    assert process.line().startswith("BlockingIOError [Errno 11] Resource temporarily unavailable")
    assert process.line() == "works"
    assert process.line() == "ready"


@root
def test_read_only_configuration_directory(broker: Broker, public: Path) -> None:
    script = (
        AS_OTHER_USER
        + """
try:
    communicator()
except directories.DirectoryRefused as error:
    print(error)
print(coordinator.main(["--profile", profile, "--config-path", config_path]))
print(coordinator.main(["--profile", profile, "--config-path", config_path, "status"]))
print("ready"); sys.stdin.read()
"""
    )
    broker.config_path = public / broker.profile
    broker.config_path.mkdir(mode=0o555)
    process = broker.spawn(script)
    assert process.line() == (
        f"the directory {broker.config_path} cannot be used: Permission denied ({broker.config_path}/pipes). "
        "Make it writable for this user, or name another configuration directory."
    )
    assert [process.line(), process.line()] == ["1", "Coordinator: not running"]
    assert process.line().startswith("Queue:       none: no broker has run in")
    assert process.line() == "3"
    assert process.line() == "ready"


# Slow and stopped


def test_stopped_worker_holds_nobody_up(served: Broker) -> None:
    heard = threading.Semaphore(0)
    script = """
heard = 0
def hear(_, body, *rest):
    global heard
    heard += 1
worker = communicator("stopped")
worker.add_task_subscriber(lambda *_: kiwipy.Future())
worker.add_rpc_subscriber(lambda *_: heard, "heard")
worker.add_broadcast_subscriber(hear)
print("ready"); sys.stdin.read(); worker.close()
"""
    child = served.child(script)
    communicator = served.communicator()
    held = communicator.task_send("held").result(TIMEOUT)
    communicator.add_task_subscriber(lambda _, body: body)
    communicator.add_broadcast_subscriber(lambda *_: heard.release())
    pid = control.status(served.config_path)["pid"]
    before = _resident(pid)
    child.stop()
    size = min(3000, select.PIPE_BUF - 200)
    text = "x" * size
    for _ in range(40):
        for _ in range(1000):
            communicator.broadcast_send(text)
        assert all(heard.acquire(timeout=TIMEOUT) for _ in range(1000))
        assert communicator.task_send("go on").result(TIMEOUT) == "go on"
    assert _resident(pid) - before < 80 << 20  # All of them would be 120 MB, and the 10,000 that it keeps are 30.
    # It keeps 10,000, and the pipe holds a few; the rest is counted at the next housekeeping.
    eventually(lambda: _worker(served, "stopped")["broadcasts_dropped"] >= 40_000 - 10_000 - 65_536 // size - 1)
    dropped = _worker(served, "stopped")["broadcasts_dropped"]
    assert "Worker stopped does not read" in served.log()
    child.go_on()
    eventually(lambda: communicator.rpc_send("heard", None).result(TIMEOUT) == 40_000 - dropped)
    assert _worker(served, "stopped")["in_hand"] == 1
    assert not held.done()


def _resident(pid: int) -> int:
    said = subprocess.run(["ps", "-o", "rss=", "-p", str(pid)], capture_output=True, text=True, check=True)
    return int(said.stdout) << 10


def _worker(broker: Broker, worker_id: str) -> dict[str, int]:
    (found,) = [row for row in control.status(broker.config_path)["workers"] if row["worker_id"] == worker_id]
    return found


# Many


def test_three_hundred_workers(served: Broker, tmp_path: Path) -> None:
    record = tmp_path / "record"
    script = (
        FORKER
        + """
worker.add_task_subscriber(lambda _, body: [os.getpid(), body])
worker.add_rpc_subscriber(lambda _, body: body, f"worker{int(line)}")
worker.add_broadcast_subscriber(lambda _, body, *rest: note("heard") or (body == "end" and leave.set()))
leave = threading.Event()
note("ready")
leave.wait()
worker.close()
note("left")
os._exit(0)
"""
    )
    forker = served.child(script, record)
    for number in range(300):
        forker.tell(str(number))
    eventually(lambda: _count(record, "ready") == 300, 120)
    communicator = served.communicator()
    assert all(communicator.rpc_send(f"worker{number}", number).result(TIMEOUT) == number for number in range(300))
    eventually(lambda: len(control.status(served.config_path)["workers"]) == 300)
    pending = [communicator.task_send(number) for number in range(1500)]
    outcomes = [future.result(TIMEOUT) for future in pending]
    assert [body for _, body in outcomes] == list(range(1500))
    assert len({pid for pid, _ in outcomes}) > 100
    communicator.broadcast_send("hello")
    eventually(lambda: _count(record, "heard") == 300)
    communicator.broadcast_send("end")
    eventually(lambda: _count(record, "left") == 300, 120)
    eventually(lambda: not control.status(served.config_path)["workers"])


def _count(record: Path, word: str) -> int:
    return record.read_text().split().count(word) if record.exists() else 0


def test_coordinator_starts_on_many_waiting_tasks(broker: Broker) -> None:
    queue = taskqueue.TaskQueue(broker.queue, fsync=False)
    for number in range(20_000):
        queue.put(taskqueue.new_id(), json.dumps({"body": number, "no_reply": True}), lambda: None)
    broker.start()
    first = threading.Event()
    communicator = broker.communicator(task_prefetch_count=1)
    communicator.add_task_subscriber(lambda _, body: [first.set(), kiwipy.Future()][1] if body == 0 else None)
    assert first.wait(TIMEOUT)
    assert control.status(broker.config_path)["tasks"] == {
        "waiting": 19_999,
        "claimed": 1,
        "completed": 0,
        "failed": 0,
    }


# Hostile


@root
def test_other_users_can_do_nothing(served: Broker) -> None:
    script = (
        AS_OTHER_USER
        + """
pipes = f"/tmp/aiida_{profile}_pipes"
for call in (lambda: os.listdir(pipes), lambda: open(f"{pipes}/coordinator_tasks", "wb"), communicator,
             lambda: open(f"{pipes}/new", "w"), lambda: os.rename(pipes, f"{pipes}2")):
    try:
        print("done", call())
    except OSError as error:
        print(type(error).__name__)
print(coordinator.main(["--profile", profile, "--config-path", config_path, "stop"]))
print("ready"); sys.stdin.read()
"""
    )
    process = served.spawn(script)
    refused = [process.line() for _ in range(5)]
    assert refused == ["PermissionError", "PermissionError", "DirectoryRefused", "PermissionError", "PermissionError"]
    assert process.line() == "1"
    assert process.line() == "ready"


@root
@pytest.mark.parametrize("squat", ["directory", "open directory", "symlink", "file", "fifo"])
def test_squatter_gets_nothing(broker: Broker, tmp_path: Path, squat: str) -> None:
    bait = tmp_path / "bait"
    bait.mkdir()
    if squat == "symlink":
        broker.pipes.symlink_to(bait)
    elif squat == "file":
        broker.pipes.touch()
    elif squat == "fifo":
        os.mkfifo(broker.pipes, 0o666)
    else:
        broker.pipes.mkdir(mode=0o700)
        broker.pipes.chmod(0o777 if squat == "open directory" else 0o700)
    os.chown(broker.pipes, OTHER_USER, OTHER_USER, follow_symlinks=False)
    broker.start()
    communicator = broker.communicator()
    communicator.add_task_subscriber(lambda _, body: body)
    assert communicator.task_send(1).result(TIMEOUT) == 1
    said = control.status(broker.config_path)
    own = Path(said["pipes"])
    assert own != broker.pipes and own.name.startswith(broker.pipes.name) and stat.S_IMODE(own.stat().st_mode) == 0o700
    assert not list(bait.iterdir())
    broker.stack.close()
    shutil.rmtree(own)
    # He may guess the other name too.
    shutil.rmtree(broker.config_path)
    own.mkdir()
    os.chown(own, OTHER_USER, OTHER_USER)
    assert f"{own} belongs to somebody else" in broker.run("start", status=1)
    own.rmdir()
    broker.pipes.unlink() if squat in ("symlink", "file", "fifo") else broker.pipes.rmdir()


def test_directory_that_is_opened_to_others_later_is_refused(served: Broker) -> None:
    communicator = served.communicator()
    communicator.add_rpc_subscriber(lambda _, body: body, "echo")
    served.pipes.chmod(0o770)
    for make in (served.communicator, lambda: coordinator.PipeCoordinator(served.profile, served.config_path)):
        with pytest.raises(directories.DirectoryRefused, match=f"run 'chmod 700 {served.pipes}'"):
            make()
    assert "chmod 700" in served.run("start", status=1)
    served.pipes.chmod(0o700)
    assert served.communicator().rpc_send("echo", 1).result(TIMEOUT) == 1


def test_pipes_that_were_replaced(served: Broker, tmp_path: Path) -> None:
    impostors = {"file": Path.touch, "symlink": lambda path: path.symlink_to(bait), "socket": _make(stat.S_IFSOCK)}
    if os.geteuid() == 0:
        impostors["device"] = _make(stat.S_IFCHR)
    bait = tmp_path / "bait"
    bait.touch()
    communicator = served.communicator()
    for name, replace in impostors.items():
        served.child(ECHO, name)
        pipe = served.pipes / f"rpc_{name}"
        pipe.unlink()
        replace(pipe)
        with pytest.raises((directories.DirectoryRefused, kiwipy.UnroutableError)):
            communicator.rpc_send(name, 1)
    assert bait.read_bytes() == b""

    def answers(name: str) -> bool:
        with contextlib.suppress(directories.DirectoryRefused, kiwipy.UnroutableError):
            return bool(communicator.rpc_send(name, 1).result(TIMEOUT) == 1)
        return False

    # The coordinator's housekeeping sees it, and the workers make first their pipes again, then their routes.
    for name in impostors:
        eventually(functools.partial(answers, name))


def _make(kind: int) -> Callable[[Path], None]:
    return lambda path: os.mknod(path, kind | 0o600, os.makedev(1, 3))


BAD_TASKS = {
    "empty": b"",
    "half": b'{"body": 1, "no_re',
    "no JSON": b"task",
    "no UTF-8": b'{"body": "\xff"}',
    "no object": b"[1, 2]",
    "no body": b'{"no_reply": true}',
    "deep": b'{"body": ' + b"[" * 200_000 + b"]" * 200_000 + b"}",
    "huge number": b'{"body": ' + b"9" * 10_000 + b"}",
}


def test_closing_when_the_pipes_directory_is_gone(broker: Broker, caplog: pytest.LogCaptureFixture) -> None:
    communicator = broker.communicator()
    communicator.add_rpc_subscriber(lambda _, body: body, "somebody")
    communicator.add_task_subscriber(lambda _, body: body)
    shutil.rmtree(broker.pipes)
    communicator.close()
    assert not caplog.records, "and conftest looks whether a descriptor is left"


def test_bad_task_files_fail_with_a_reason_and_stop_nothing(served: Broker, tmp_path: Path) -> None:
    bad = {}
    for title, content in BAD_TASKS.items():
        bad[title] = taskqueue.new_id()
        (served.queue / f"task_{bad[title]}.json").write_bytes(content)
    for title in ("directory", "symlink", "fifo"):
        bad[title] = taskqueue.new_id()
    (served.queue / f"task_{bad['directory']}.json").mkdir()
    secret = tmp_path / "secret"
    secret.write_text('{"body": "secret", "no_reply": true}')
    (served.queue / f"task_{bad['symlink']}.json").symlink_to(secret)
    os.mkfifo(served.queue / f"task_{bad['fifo']}.json")
    communicator = served.communicator()
    got = []
    communicator.add_task_subscriber(lambda _, body: got.append(body))
    for name in bad.values():
        assert fifo.knock(served.pipes / directories.TASKS_INTAKE, {"type": "task", "queue": "", "name": name})
    communicator.task_send("good").result(TIMEOUT)
    rows = {row["id"]: row for row in control_tasks.tasks(served.config_path, "failed")}
    reasons = {title: rows[name]["outcome"] for title, name in bad.items()}
    assert all(reason.startswith("it is not") for reason in reasons.values()), reasons
    assert got == ["good"]
    assert secret.exists()
    assert served.run("requeue", bad["half"]) == f"Requeued {bad['half']}.\n"
    eventually(lambda: bad["half"] in {row["id"] for row in control_tasks.tasks(served.config_path, "failed")})


HOSTILE_NAMES = [
    "../escaped",
    "/tmp/escaped",
    "..",
    ".",
    "",
    "coordinator_tasks",
    "reply_1_" + "0" * 32 + "/../../escaped",
    "reply_1_" + "0" * 32,
    "body_reply.0\0",
    "x" * 5000,
    None,
    17,
    ["reply"],
    {"a": "b"},
    "\ud800",
]


def test_names_in_messages_never_lead_out_of_the_directory(served: Broker, tmp_path: Path) -> None:
    communicator = served.communicator("victim")
    communicator.add_rpc_subscriber(lambda _, body: body, "echo")
    communicator.add_task_subscriber(lambda _, body: body)
    everything = sorted(path for path in served.pipes.rglob("*") if not path.name.startswith("."))
    for name in HOSTILE_NAMES:
        messages = {
            "rpc_victim": [{"to": "echo", "body": 1, "reply_to": name, "correlation_id": name}, {"body_file": name}],
            "broadcast_victim": [],
            "task_victim": [
                {"type": "ring", "queue": name, "names": [name]},
                {"type": "ring", "queue": "", "names": name},
            ],
            "coordinator_tasks": [
                {"type": "task", "queue": name, "name": name},
                {"type": "task", "queue": "", "name": name},
                {"type": "register", "worker": name},
                {"type": "report", "worker": "victim", "queue": "", "claimed": [name], "done": name},
            ],
            "coordinator_broadcast": [{"body_file": name}],
        }
        for pipe, kinds in messages.items():
            for message in kinds:
                with contextlib.suppress(ValueError):
                    fifo.knock(served.pipes / pipe, message)
        task_id = taskqueue.new_id()
        document = json.dumps({"body": 1, "reply_to": name, "correlation_id": name})
        taskqueue.TaskQueue(served.queue).put(task_id, document, lambda: None)
        entry = {"worker_id": name, "pid": 1, "since": 1, "reply": name, "claim": name, "queues": {str(name): 1}}
        (served.config_path / "pipes" / "worker_evil.json").write_text(json.dumps(entry))
        fifo.knock(served.pipes / "coordinator_tasks", {"type": "register", "worker": "evil"})
        assert communicator.task_send(1).result(TIMEOUT) == 1
        assert communicator.rpc_send("echo", 1).result(TIMEOUT) == 1
    (served.config_path / "pipes" / "worker_evil.json").unlink()
    # A reply pipe that is not there may be made again, so an answer to it is kept for a while.
    for body in served.pipes.glob(f"body_reply_1_{'0' * 32}.*"):
        body.unlink()
    assert sorted(path for path in served.pipes.rglob("*") if not path.name.startswith(".")) == everything
    assert not list(tmp_path.rglob("*escaped*")) and not Path("/tmp/escaped").exists()


def test_deep_huge_and_duplicate_json(served: Broker) -> None:
    communicator = served.communicator("victim")
    communicator.add_rpc_subscriber(lambda _, body: body, "echo")
    texts = [
        '{"to":"echo","body":' + "[" * 100_000 + "]" * 100_000 + "}",
        '{"to":"echo","body":' + "9" * 10_000 + "}",
        '{"to":"nobody","to":"echo","body":1,"body":2}',
        '{"to":"echo"}',
        "[" * 3000,
        '{"to":"echo","body":"' + "x" * 50_000_000 + '"}',
    ]
    for text in texts:
        data = bodies.pack(text, served.pipes / "rpc_victim")
        with open(served.pipes / "rpc_victim", "wb", buffering=0) as pipe:
            pipe.write(data)
        assert communicator.rpc_send("echo", 1).result(TIMEOUT) == 1
    assert not list(served.pipes.glob("body_*")), "what could not be read is removed too"


# Poison


def test_poison(served: Broker, tmp_path: Path) -> None:
    script = (
        FORKER
        + """
worker.add_task_subscriber(lambda *_: os.kill(os.getpid(), signal.SIGKILL))
signal.pause()
"""
    )
    forker = served.child(script, tmp_path / "record")
    sender = served.communicator()
    pending = sender.task_send("poison")
    for deaths in range(1, taskqueue.MAX_DEATHS):
        forker.tell("die")
        eventually(lambda: [row["deaths"] for row in control_tasks.tasks(served.config_path, "waiting")] == [deaths])
    forker.tell("die")
    reason = f"{taskqueue.MAX_DEATHS} workers died while they held it"
    with pytest.raises(kiwipy.RemoteException, match=reason):
        pending.result(TIMEOUT)
    (row,) = control_tasks.tasks(served.config_path)
    # Its sender is told before the task is moved.
    eventually(
        lambda: (
            [(each["state"], each["outcome"]) for each in control_tasks.tasks(served.config_path)]
            == [("failed", reason)]
        )
    )
    got = threading.Event()
    sender.add_task_subscriber(lambda _, body: got.set())
    served.run("requeue", row["id"])
    assert got.wait(TIMEOUT)


# fork


def test_death_of_a_parent_whose_forked_child_lives(served: Broker) -> None:
    script = """
import multiprocessing, threading
def live(answer):
    try:
        worker.task_send(1)
    except kiwipy.CommunicatorClosed:
        answer.put([os.getpid(), "closed"])
    threading.Event().wait()
context = multiprocessing.get_context("fork")
answer = context.Queue()
worker = communicator("parent")
worker.add_rpc_subscriber(lambda *_: kiwipy.Future(), "parent")
worker.add_task_subscriber(lambda *_: kiwipy.Future())
child = context.Process(target=live, args=(answer,))
child.start()
print("ready")
print(*answer.get())
sys.stdin.read()
"""
    parent = served.child(script)
    pid, said = parent.line().split()
    try:
        assert said == "closed"
        communicator = served.communicator()
        call = communicator.rpc_send("parent", 1).result(TIMEOUT)
        held = communicator.task_send("held").result(TIMEOUT)
        parent.kill()
        with pytest.raises(kiwipy.DeliveryFailed):
            call.result(TIMEOUT)
        communicator.add_task_subscriber(lambda _, body: body)
        assert held.result(TIMEOUT) == "held"
        os.kill(int(pid), 0)
        communicator.add_rpc_subscriber(lambda _, body: body, "parent")
        assert communicator.rpc_send("parent", 1).result(TIMEOUT) == 1
    finally:
        os.kill(int(pid), signal.SIGKILL)


# Clock and names


def test_order_holds_when_the_clock_steps_back(served: Broker) -> None:
    script = """
with communicator() as sender:
    for number in range(3):
        sender.task_send(number, no_reply=True)
    real, time.time_ns = time.time_ns, lambda: real() - 3600 * 10**9
    for number in range(3, 6):
        sender.task_send(number, no_reply=True)
print("ready"); sys.stdin.read()
"""
    served.child(script)
    got: list[int] = []
    communicator = served.communicator()
    communicator.add_task_subscriber(lambda _, body: got.append(body))
    eventually(lambda: len(got) == 6)
    assert got == list(range(6))


@root
@pytest.mark.parametrize("first", ["root", "other"])
def test_two_users_with_one_profile_name_never_meet(public: Path, broker: Broker, first: str) -> None:
    script = (
        AS_OTHER_USER
        + """
served = coordinator.PipeCoordinator(profile, config_path)
thread = threading.Thread(target=served.run)
thread.start()
worker = communicator("same")
worker.add_task_subscriber(lambda _, body: "other")
worker.add_rpc_subscriber(lambda _, body: "other", "same")
print("ready")
for line in sys.stdin:
    print(worker.task_send(1).result(30), worker.rpc_send("same", 1).result(30), served.layout.pipes)
worker.close()
served.stop()
thread.join()
"""
    )
    theirs = public / "theirs"
    theirs.mkdir()
    os.chown(theirs, OTHER_USER, OTHER_USER)
    ours = broker.config_path

    def start_ours() -> PipeCommunicator:
        broker.start()
        made: PipeCommunicator = broker.communicator("same")
        made.add_task_subscriber(lambda _, body: "root")
        made.add_rpc_subscriber(lambda _, body: "root", "same")
        return made

    communicator = start_ours() if first == "root" else None
    broker.config_path = theirs
    other = broker.child(script)
    broker.config_path = ours
    communicator = communicator or start_ours()
    for _ in range(2):
        assert communicator.task_send(1).result(TIMEOUT) == "root"
        assert communicator.rpc_send("same", 1).result(TIMEOUT) == "root"
        other.tell("go")
        tasks, calls, pipes = other.line().split()
        assert (tasks, calls) == ("other", "other")
        mine = Path(control.status(ours)["pipes"])
        assert mine != Path(pipes)
        # The plain name is the first one's; the second goes on, and whoever comes to the second, without it.
        if first == "root":
            break
        assert Path(pipes) == broker.pipes
        broker.communicator().close()
        assert Path(control.status(ours)["pipes"]) == mine
    other.end()
    shutil.rmtree(theirs)
    shutil.rmtree(pipes)
    with PipeCommunicator(broker.profile, ours) as late:
        assert late.rpc_send("same", 1).result(TIMEOUT) == "root"
    broker.stack.close()
    shutil.rmtree(mine)
