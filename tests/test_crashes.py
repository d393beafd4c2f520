"""Who is killed, and what becomes of the rest; at every system call that changes the disk or a pipe, in each role.

strace(1) kills the process when it enters the call, so the call is not made. Each call of a role's plain run is a crash
point: "immediately before this one" and, as nothing changes in between, "immediately after the one before".
"""

from __future__ import annotations

import collections
import contextlib
import functools
import os
import re
import shutil
import signal
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

import burial
import control
import control_tasks
import directories
import presence
import taskqueue
from harness import COORDINATOR, ECHO, TIMEOUT, Broker, Child, eventually, is_gone

CALLS = "openat,write,/^rename,/^unlink,/^symlink,/^mkdir,rmdir,/^mknod,/^link,fsync,flock,ftruncate,utimensat,close"
LINE = re.compile(r"^(\d+) +(\w+)\((.*)")
Point = tuple[str, int]


def _can_trace() -> bool:
    if shutil.which("strace") is None:
        return False
    return subprocess.run(["strace", "-o", "/dev/null", "true"], capture_output=True, check=False).returncode == 0


traced = pytest.mark.skipif(not _can_trace(), reason="needs strace, and leave to use it")


class Strace:
    """strace attached to a running process."""

    def __init__(self, pid: int, log: Path, point: Point | None) -> None:
        command = ["strace", "-f", "-y", "-o", log, "-e", f"trace={CALLS}", "-p", str(pid)]
        if point is not None:
            command += ["-e", f"inject={point[0]}:signal=KILL:when={point[1]}"]
        self._process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert self._process.stderr is not None and "attached" in self._process.stderr.readline()

    def end(self) -> None:
        """Detach, if the process still lives."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)
        self._process.communicate(timeout=TIMEOUT)


def points(log: Path, place: str) -> list[tuple[Point, str]]:
    """Return the calls in a log that change something below a place, each as strace counts it, and its text."""
    counts: collections.Counter[tuple[str, str]] = collections.Counter()
    found = {}
    for line in log.read_text().splitlines():
        match = LINE.match(line)
        if match is None:
            continue
        thread, call, text = match.groups()
        counts[thread, call] += 1
        changes = call not in ("openat", "close", "write") or "O_CREAT" in text or (call != "openat" and place in text)
        if changes and place in text and "coordinator.log" not in text:
            found[call, counts[thread, call]] = f"{call}({text}"
    return list(found.items())


def drained(broker: Broker) -> None:
    """See to it that nothing waits or is claimed: somebody does all that is left."""
    with contextlib.closing(broker.communicator()) as worker:
        worker.add_task_subscriber(lambda _, body: body)
        eventually(
            lambda: not {row["state"] for row in control_tasks.tasks(broker.config_path)} & {"waiting", "claimed"}
        )


def state(broker: Broker) -> str:
    """Say how many tasks are in which state on the disk."""
    counts = collections.Counter(row["state"] for row in control_tasks.tasks(broker.config_path))
    return ", ".join(f"{count} {name}" for name, count in sorted(counts.items())) or "nothing"


def each_point(tmp_path: Path, place: str, run: Callable[[Callable[[int], Strace], str], bool]) -> None:
    """Run something plainly, three times, and then once for each crash point.

    :param run: runs it; it is given what attaches strace to a process, and the name of the run, and says whether it
        came to its end.
    """
    log = tmp_path / "log"
    lives: list[Strace] = []

    def attach(point: Point | None, pid: int) -> Strace:
        lives.append(Strace(pid, log, point))
        return lives[-1]

    def once(point: Point | None, name: str) -> bool:
        try:
            return run(functools.partial(attach, point), name)
        finally:
            while lives:
                lives.pop().end()

    plain = []
    for number in range(3):
        assert once(None, f"plain{number}")
        plain.append(points(log, place))
    # The shortest, as a second look or a round of housekeeping adds calls that another run does not make.
    found = min(plain, key=len)
    assert len(found) > 1
    survived = [text for index, (point, text) in enumerate(found) if once(point, str(index))]
    assert len(survived) <= len(found) // 4, f"too many were not killed: {survived}"


def sweep(broker: Broker) -> None:
    """Do what the coordinator's housekeeping does every ten seconds, for senders that nobody knew."""
    layout = directories.locate(broker.config_path)
    assert layout is not None
    for draft in broker.pipes.glob(".*_*"):
        os.utime(draft, (0, 0))  # Nobody waits an hour here.
    for _, directory in layout.queues():
        for draft in (*directory.glob(".*"), *directory.glob("claimed/.*")):
            os.utime(draft, (0, 0))
        collections.deque(taskqueue.TaskQueue(directory).sweep(), maxlen=0)
    collections.deque(burial.sweep(layout), maxlen=0)


# Who dies, and then

SENT = """
sender = communicator()
for number in range(int(arguments[0])):
    sender.task_send([number, "x" * 1000])
print("ready"); sys.stdin.read()
"""


def test_sender_that_dies_after_task_send_has_its_task_run_and_its_outcome_dropped(served: Broker) -> None:
    sender = served.child(SENT, 3)
    sender.kill()
    drained(served)
    assert state(served) == "3 completed"
    sweep(served)
    assert not list(served.pipes.glob("body_*")) and not list(served.pipes.glob(f"reply_{sender.pid}_*"))


def test_tasks_of_a_worker_that_dies_wait_again_oldest_first(served: Broker) -> None:
    sender = served.communicator()
    holder = served.child(HOLDER)
    held = [sender.task_send(number).result(TIMEOUT) for number in range(20)]
    got: list[int] = []
    other = served.communicator()
    # One at a time, or they would all be rung at once.
    queue = other.task_queue("kiwipy.tasks", prefetch_count=1)
    holder.kill()
    eventually(lambda: not list(served.queue.glob("claimed/*")))
    assert {row["deaths"] for row in control_tasks.tasks(served.config_path)} == {1}
    queue.add_task_subscriber(lambda _, body: [got.append(body), body][1])
    assert [future.result(TIMEOUT) for future in held] == list(range(20))
    assert got == list(range(20))


STOPPED = """
from concurrent.futures import wait
sender = communicator(fsync=False)
futures = [sender.task_send([number, "x" * 1000]) for number in range(200)]
print("ready"); sys.stdin.readline()
done, _ = wait(futures, 25)
print(sum(future.result() == [number, "x" * 1000] for number, future in enumerate(futures) if future in done))
sender.close()
"""


def test_sender_that_was_stopped_gets_the_outcomes_of_a_worker_that_died(served: Broker) -> None:
    sender = served.child(STOPPED)
    sender.stop()
    worker = served.child(ECHO, "worker")
    eventually(lambda: state(served) == "200 completed")
    worker.kill()
    sender.go_on()
    sender.tell("go on")
    assert sender.line() == "200"
    assert sender.end() == 0


def test_all_go_on_while_a_coordinator_is_dead_and_the_next_one_reads_the_disk(broker: Broker) -> None:
    pid = broker.start()
    worker, sender = broker.communicator(), broker.communicator()
    release, heard = threading.Event(), []
    worker.add_task_subscriber(lambda _, body: [release.wait(TIMEOUT), body][1])
    worker.add_rpc_subscriber(lambda _, body: body, "echo")
    worker.add_broadcast_subscriber(lambda _, body, *rest: heard.append(body))
    begun = sender.task_send("begun")
    eventually(lambda: list(broker.queue.glob("claimed/*/task_*")))
    sender.broadcast_send("before")
    eventually(lambda: heard == ["before"])
    os.kill(pid, signal.SIGKILL)
    eventually(lambda: is_gone(pid))
    release.set()
    assert begun.result(TIMEOUT) == "begun"
    assert sender.rpc_send("echo", "body").result(TIMEOUT) == "body"
    waiting = sender.task_send("meanwhile")
    sender.broadcast_send("meanwhile")
    broker.start()
    assert waiting.result(TIMEOUT) == "meanwhile"
    eventually(lambda: heard == ["before", "meanwhile"])


@pytest.mark.protocol("T2")
@traced
def test_task_is_on_the_disk_before_task_send_returns(broker: Broker, tmp_path: Path) -> None:
    """Write, rename, `fsync` of the file, `fsync` of its directory: then a loss of power takes nothing back."""
    child = broker.child(SENDER, "body")
    strace = Strace(child.pid, tmp_path / "log", None)
    child.tell("go")
    assert child.line() == "sent"
    strace.end()
    child.kill()
    queue = str(broker.queue)
    steps = []
    for line in (tmp_path / "log").read_text().splitlines():
        match = LINE.match(line)
        if match and queue in match[3] and match[2] != "openat":
            what = "task" if f"{queue}/" in match[3] else "directory"
            steps.append(f"{match[2].removesuffix('at2').removesuffix('at')} {what}")
        elif match and match[2] == "write" and "sent" in match[3]:
            steps.append("returned")
    order = ["write task", "rename task", "fsync task", "fsync directory", "returned"]
    assert [step for step in steps if step in order] == order, steps
    (task,) = broker.queue.glob("task_*")
    task.unlink()
    sweep(broker)


# At every system call

SENDER = """
sender = communicator()
print("ready"); sys.stdin.readline()
sender.task_send(arguments[0], no_reply=True)
print("sent"); sys.stdin.read()
os._exit(0)
"""


@traced
def test_sender(served: Broker, tmp_path: Path) -> None:
    rows = []

    def run(attach: Callable[[int], Strace], name: str) -> bool:
        child = served.child(SENDER, name)
        attach(child.pid)
        child.tell("go")
        sent = said(child) == "sent"
        child.kill()
        rows.append(state(served))
        assert rows[-1] == "1 waiting" or (not sent and rows[-1] == "nothing")
        drained(served)
        shutil.rmtree(served.queue / "completed")
        (served.queue / "completed").mkdir()
        for draft in served.queue.glob(".0*"):
            draft.unlink()
        return sent

    each_point(tmp_path, served.profile, run)
    sweep(served)
    assert rows == ["1 waiting"] * 3 + ["nothing"] * 3 + ["1 waiting"] * (len(rows) - 6), rows


def said(child: Child) -> str:
    """Return the next line, or '' if it was killed."""
    try:
        return child.line()
    except AssertionError:
        return ""


WORKER = """
record = os.open(arguments[0], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
worker = communicator("worker")
def work(_, body):
    os.write(record, f"{body}\\n".encode())
    time.sleep(0.04)  # Work, for long enough that it is reported as claimed.
    return body
worker.add_task_subscriber(work)
print("ready"); sys.stdin.read()
os._exit(0)
"""


@pytest.mark.protocol("W5", "A2")
@traced
def test_worker(served: Broker, tmp_path: Path) -> None:
    record, rows = tmp_path / "record", []
    sender = served.communicator()

    def run(attach: Callable[[int], Strace], name: str) -> bool:
        child = served.child(WORKER, record)
        attach(child.pid)
        pending = sender.task_send(name)
        with contextlib.suppress(subprocess.TimeoutExpired):
            # Until it is killed, or until it has done all.
            eventually(lambda: child.process.poll() is not None or (state(served) == "1 completed" and pending.done()))
            child.process.wait(0.2)
        killed = child.process.poll() is not None
        before = state(served)
        child.kill()
        eventually(lambda: not list(served.queue.glob("claimed/*")))
        after = [(row["state"], row["deaths"]) for row in control_tasks.tasks(served.config_path)]
        runs_before = recorded(record).count(name)
        with contextlib.closing(served.communicator()) as other:
            other.add_task_subscriber(lambda _, body: [append(record, body), body][1])
            assert pending.result(TIMEOUT) == name
            eventually(lambda: state(served) == "1 completed")
        runs = recorded(record).count(name)
        if after == [("completed", 0)]:
            assert runs == runs_before == 1
        else:
            assert runs == runs_before + 1
        rows.append((after, runs, before))
        shutil.rmtree(served.queue / "completed")
        (served.queue / "completed").mkdir()
        return not killed

    each_point(tmp_path, served.profile, run)
    outcomes = {(after[0], runs) for after, runs, _ in rows}
    assert outcomes == {(("waiting", 0), 1), (("waiting", 1), 1), (("waiting", 1), 2), (("completed", 0), 1)}, rows


def append(record: Path, text: str) -> None:
    with open(record, "a") as file:
        file.write(f"{text}\n")


def recorded(record: Path) -> list[str]:
    return record.read_text().split() if record.exists() else []


JOINER = """
print("ready"); sys.stdin.readline()
worker = communicator("joiner")
worker.add_task_subscriber(lambda _, body: body)
worker.add_rpc_subscriber(lambda _, body: body, "joiner")
worker.add_broadcast_subscriber(lambda *_: None)
held = worker.task_queue("other").add_task_subscriber(lambda _, body: body)
print("joined"); sys.stdin.readline()
worker.close()
print("left"); sys.stdin.read()
"""


@traced
def test_worker_that_comes_and_goes(served: Broker, tmp_path: Path) -> None:
    sender = served.communicator()

    def run(attach: Callable[[int], Strace], name: str) -> bool:
        child = served.child(JOINER)
        attach(child.pid)
        child.tell("come")
        if said(child) == "joined":
            with contextlib.suppress(BrokenPipeError):
                child.tell("go")
        left = said(child) == "left"
        child.kill()
        # Whoever comes next has the same names at once, and nothing of the dead one is in the way.
        with contextlib.closing(served.communicator("joiner")) as again:
            again.add_task_subscriber(lambda _, body: ["again", body])
            again.add_rpc_subscriber(lambda _, body: ["again", body], "joiner")
            assert sender.rpc_send("joiner", name).result(TIMEOUT) == ["again", name]
            assert sender.task_send(name).result(TIMEOUT) == ["again", name]
        eventually(lambda: not list(served.queue.rglob("claimed/joiner*")))
        assert not list(served.pipes.glob("*joiner"))
        return left

    each_point(tmp_path, served.profile, run)
    sweep(served)


HOLDER = """
worker = communicator("holder")
worker.add_task_subscriber(lambda *_: kiwipy.Future())
worker.add_rpc_subscriber(lambda *_: None, "holder")
print("ready"); sys.stdin.read()
os._exit(0)
"""


@pytest.mark.protocol("L5")
@traced
def test_coordinator_that_buries_a_worker(broker: Broker, tmp_path: Path) -> None:
    sender = broker.communicator()
    pid = broker.start()

    def run(attach: Callable[[int], Strace], name: str) -> bool:
        nonlocal pid
        holder = broker.child(HOLDER)
        held = sender.task_send(name).result(TIMEOUT)
        strace = attach(pid)
        holder.kill()
        more = sender.task_send("more")
        # Until it is killed, or has done all that.
        gone = broker.config_path / "pipes" / "worker_holder.json"
        eventually(lambda: not directories.is_read(broker.pipes / "coordinator_tasks") or not gone.exists())
        strace.end()
        survived = True

        def both_are_done() -> bool:
            nonlocal pid, survived
            # Asked again, as one that has just been killed reads its pipes until the kernel has closed them.
            if not directories.is_read(broker.pipes / "coordinator_tasks"):
                control.stop(broker.config_path)  # It waits until it is gone.
                pid, survived = control.start(broker.profile, broker.config_path), False
            return bool(held.done() and more.done())

        got: list[str] = []
        with contextlib.closing(broker.communicator()) as other:
            other.add_task_subscriber(lambda _, body: [got.append(body), body][1])
            eventually(both_are_done)
            assert [held.result(0), more.result(0)] == [name, "more"]
        assert got == [name, "more"]
        eventually(lambda: not gone.exists() and not list(broker.pipes.glob("*holder")))
        eventually(lambda: not list(broker.queue.rglob("claimed/holder*")))
        return survived

    each_point(tmp_path, broker.profile, run)


@traced
def test_coordinator_that_starts_and_stops(broker: Broker, tmp_path: Path) -> None:
    command = [*COORDINATOR, "--profile", broker.profile, "--config-path", broker.config_path]
    log = tmp_path / "log"
    sender = broker.communicator()

    def run(point: Point | None, name: str) -> None:
        pending = sender.task_send(name)
        inject = ["-e", f"inject={point[0]}:signal=KILL:when={point[1]}"] if point else []
        command_traced = ["strace", "-y", "-o", log, "-e", f"trace={CALLS}", *inject, *command, "start", "--foreground"]
        with subprocess.Popen(command_traced, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
            assert process.stderr is not None
            if "Serving" in process.stderr.readline():
                with contextlib.suppress(presence.CoordinatorError):
                    control.stop(broker.config_path)
            process.communicate(timeout=TIMEOUT)
        broker.run("start")
        with contextlib.closing(broker.communicator()) as worker:
            worker.add_task_subscriber(lambda _, body: body)
            assert pending.result(TIMEOUT) == name
        broker.run("stop")
        assert not directories.is_read(broker.pipes / directories.TASKS_INTAKE)

    run(None, "plain")
    # Without strace's -f there are no numbers of threads.
    log.write_text("".join(f"1 {line}\n" for line in log.read_text().splitlines()))
    found = points(log, broker.profile)
    assert len(found) > 10
    for index, (point, _) in enumerate(found):
        run(point, str(index))
    sweep(broker)
