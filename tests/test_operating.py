"""What a running coordinator survives: strangers in its directories, one bad item, and what is removed under it.

Its clock runs fast here, so that what it does every ten seconds is not waited for.
"""

from __future__ import annotations

import contextlib
import os
import queue
import re
import shutil
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness import COORDINATOR, ECHO, OTHER_USER, TIMEOUT, Broker, Child, eventually, write_frame

root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a directory to another user")
SECONDS = 8.0
DAY = 25 * 3600
# The clocks of this process: one runs faster or slower than the true one, and the other is ahead of it.
CLOCKS = """
import selectors
speed, ahead = float(arguments[0]), float(arguments[1])
begin, monotonic, clock, select = time.monotonic(), time.monotonic, time.time, selectors.DefaultSelector.select
time.monotonic = lambda: begin + speed * (monotonic() - begin)
time.time = lambda: clock() + ahead
def often(selector, timeout=None):
    return select(selector, 0.05 if timeout is None else min(timeout, 0.05))
selectors.DefaultSelector.select = often
"""
SERVE = """
import runpy
script = os.path.join(os.environ["PYTHONPATH"].split(os.pathsep)[0], "coordinator.py")
sys.argv = [script, "--profile", profile, "--config-path", config_path, "start", "--foreground"]
runpy.run_path(script, run_name="__main__")
"""
SUBSCRIBER = """
with communicator(arguments[0]) as worker:
    worker.add_task_subscriber(lambda _, body: body)
    worker.add_rpc_subscriber(lambda _, body: body, "rpc")
    print("ready"); sys.stdin.read()
"""


@contextlib.contextmanager
def serving(broker: Broker, speed: float = 20.0, before: str = "", ahead: float = DAY) -> Iterator[Child]:
    """Run a coordinator whose seconds are shorter than ours, and whose files are a day old."""
    child = broker.spawn(before + CLOCKS + SERVE, speed, ahead)
    try:
        eventually(lambda: _serves(broker, child), 10.0)
        yield child
    finally:
        child.kill()


def _serves(broker: Broker, child: Child) -> bool:
    assert child.process.poll() is None, "the coordinator ended"
    with contextlib.suppress(FileNotFoundError):
        return f"pid {child.pid}," in broker.log()
    return False


def _has_ended(child: Child) -> bool:
    return child.process.poll() is not None


def orphan(broker: Broker) -> Path:
    """Leave what a dead process would: it goes once all that the coordinator looks after has been looked at."""
    path, draft = broker.pipes / f"body_rpc_dead.{uuid.uuid4().hex}", broker.config_path / "draft"
    draft.write_text("{}")
    os.utime(draft, (0, 0))
    draft.rename(path)  # By a clock that is ahead it is old as soon as it is there.
    return path


def goes_on(broker: Broker, child: Child) -> None:
    """Check that a coordinator lives, still looks after things, and still shares out tasks."""
    for _ in range(2):
        left = orphan(broker)
        try:
            eventually(lambda: _has_ended(child) or not left.exists(), SECONDS)
        finally:
            left.unlink(missing_ok=True)
        assert not _has_ended(child)
    broker.child(SUBSCRIBER, "subscriber")
    sender = broker.communicator()
    assert sender.task_send("body").result(SECONDS) == "body"


# Strangers in its directories


@pytest.mark.parametrize("name", ["a b", "caf\udce9"])
def test_a_stray_directory_among_the_queues_does_not_end_the_coordinator(broker: Broker, name: str) -> None:
    with serving(broker) as child:
        (broker.queue / "queues" / name).mkdir(parents=True)
        goes_on(broker, child)


def test_what_is_no_part_of_the_broker_is_named_once_in_the_log(broker: Broker) -> None:
    with serving(broker) as child:
        other = broker.communicator(worker_id="other")
        other.task_queue("named").add_task_subscriber(print)
        other.add_rpc_subscriber(print, "identifier")
        other.add_broadcast_subscriber(print)
        registry, queues = broker.config_path / "pipes", broker.queue / "queues"
        strange = [broker.pipes / "notes\n.txt", registry / "worker_b c.json", broker.queue / "task.json"]
        strange += [broker.queue / "claimed" / "notes.txt", broker.queue / "completed" / "task_1.json.bak"]
        strange += [broker.queue / "claimed" / "other" / "key", queues / "file"]
        for path in strange:
            path.parent.mkdir(exist_ok=True)
            path.write_text("")
        os.mkfifo(registry / "worker_fifo.json")
        (broker.pipes / "rpc_x").mkdir()
        (queues / "a b").mkdir()
        strange += [registry / "worker_fifo.json", broker.pipes / "rpc_x", queues / "a b"]
        eventually(lambda: all(repr(str(path)) in broker.log() for path in strange), SECONDS)
        for number in range(1000):
            (broker.pipes / f"stray{number}").write_text("")
        # The next look may fall into the middle of this.
        eventually(lambda: re.search(r"stray\d+' and \d+ more", broker.log()), SECONDS)
        goes_on(broker, child)
        said = broker.log()
        assert [said.count(repr(str(path))) for path in strange] == [1] * len(strange)
        # Each look names ten of what it saw first, once; how many looks fall into this is for the machine to say.
        looks = [re.findall(r"stray\d+", line) for line in said.splitlines() if "none of ours" in line]
        named = [each for look in looks for each in look]
        assert max(map(len, looks)) == 10 and all(named.count(each) == 1 for each in named)
        for path in (*strange, *broker.pipes.glob("stray*")):
            path.rmdir() if path.is_dir() else path.unlink()


def test_a_coordinator_starts_beside_a_stray_directory_among_the_queues(broker: Broker) -> None:
    (broker.queue / "queues" / "a b").mkdir(parents=True)
    pid = broker.start()
    assert broker.status()["pid"] == pid
    broker.child(SUBSCRIBER, "subscriber")
    assert broker.communicator().task_send("body").result(SECONDS) == "body"


def test_status_passes_over_a_stray_file_among_the_queues(served: Broker) -> None:
    served.communicator().task_send("body")
    _stray_file(served)
    assert "1 waiting" in served.run("status")
    assert [row["state"] for row in served.tasks()] == ["waiting"]


def test_a_worker_comes_beside_a_stray_file_among_the_queues(served: Broker) -> None:
    _stray_file(served)
    served.child(SUBSCRIBER, "subscriber")
    communicator = served.communicator()
    assert communicator.rpc_send("rpc", "call").result(SECONDS) == "call"
    assert communicator.task_send("body").result(SECONDS) == "body"


def _stray_file(broker: Broker) -> None:
    (broker.queue / "queues").mkdir(exist_ok=True)
    (broker.queue / "queues" / "notes.txt").write_text("what I meant to do")


def test_a_coordinator_starts_beside_a_fifo_in_the_registry(broker: Broker) -> None:
    with _fifo_in_the_registry(broker), serving(broker, 1.0):
        broker.child(SUBSCRIBER, "subscriber")
        assert broker.communicator().task_send("body").result(SECONDS) == "body"


def test_a_fifo_in_the_registry_does_not_stop_the_coordinator(broker: Broker) -> None:
    with serving(broker) as child, _fifo_in_the_registry(broker):
        goes_on(broker, child)


@contextlib.contextmanager
def _fifo_in_the_registry(broker: Broker) -> Iterator[None]:
    path = broker.config_path / "pipes" / "worker_x.json"
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    os.mkfifo(path, 0o600)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


@pytest.mark.protocol("D4")
def test_old_drafts_in_the_registry_are_swept(broker: Broker) -> None:
    with serving(broker):
        registry = broker.config_path / "pipes"
        drafts = [registry / f".{name}.{uuid.uuid4().hex}" for name in ("worker_x.json", "coordinator.json")]
        for draft in drafts:
            draft.write_text("{")
            os.utime(draft, (0, 0))
        eventually(lambda: not any(draft.exists() for draft in drafts), SECONDS)


def test_a_frame_whose_queue_is_null_is_refused(served: Broker) -> None:
    served.child(SUBSCRIBER, "subscriber")
    sender = served.communicator()
    warnings = served.log().count(" WARNING ")
    write_frame(served.pipes / "coordinator_tasks", {"type": "task", "queue": None, "name": "1"})
    # What comes after it has been read is proof that it has been read too.
    assert sender.task_send("body").result(TIMEOUT) == "body"
    assert served.log().count(" WARNING ") > warnings


# What it is told


@pytest.mark.parametrize(("name", "directory"), [("kiwipy.tasks", ""), ("named", "queues/named")])
def test_a_task_that_is_requeued_is_done_at_once_and_its_deaths_are_forgotten(
    broker: Broker, name: str, directory: str
) -> None:
    # A slow clock: what it does every ten seconds is not done here.
    with serving(broker, 0.001):
        done: queue.SimpleQueue[str] = queue.SimpleQueue()
        broker.communicator().task_queue(name).add_task_subscriber(lambda _, body: done.put(body))
        failed = broker.queue / directory / "failed" / "task_1.20.json"
        failed.write_text('{"body": "body"}')
        failed.with_suffix(".reason").write_text("20 workers died while they held it")
        assert broker.run("requeue", "1") == "Requeued 1.\n"
        assert done.get(timeout=SECONDS) == "body"
        (row,) = eventually(lambda: broker.tasks("completed"), SECONDS)
        assert (row["id"], row["deaths"]) == ("1", 0)
        assert not list(failed.parent.iterdir())


# One bad item


def test_a_missing_state_directory_does_not_stop_housekeeping(broker: Broker) -> None:
    with serving(broker) as child:
        shutil.rmtree(broker.queue / "claimed", ignore_errors=True)
        goes_on(broker, child)


def test_a_queue_that_cannot_be_used_does_not_stop_housekeeping(broker: Broker) -> None:
    with serving(broker) as child:
        in_the_way = broker.queue / "queues" / "broken" / "claimed"
        in_the_way.parent.mkdir(parents=True)
        in_the_way.write_text("in the way")
        try:
            goes_on(broker, child)
        finally:
            in_the_way.unlink()


def test_a_body_for_no_possible_receiver_does_not_end_the_coordinator(broker: Broker) -> None:
    with serving(broker) as child:
        body = broker.pipes / f"body_..{uuid.uuid4().hex}"
        body.write_text("{}")
        os.utime(body, (0, 0))
        try:
            goes_on(broker, child)
        finally:
            body.unlink(missing_ok=True)


# What is removed or taken under it


def test_a_coordinator_whose_queue_directory_is_removed_says_so_and_ends(broker: Broker) -> None:
    with serving(broker, before="os.dup2(1, 2)\n") as child:
        shutil.rmtree(broker.queue)
        eventually(lambda: _has_ended(child), SECONDS)
        assert child.process.stdout is not None
        assert str(broker.queue) in child.process.stdout.read().decode()
    broker.start()
    broker.child(SUBSCRIBER, "subscriber")
    assert broker.communicator().task_send("body").result(SECONDS) == "body"


def test_a_coordinator_whose_lock_file_is_removed_ends(broker: Broker) -> None:
    with serving(broker) as child:
        (broker.queue / "coordinator.lock").unlink()
        eventually(lambda: _has_ended(child), SECONDS)
        assert "coordinator.lock" in broker.log()


def test_commands_agree_while_a_queue_directory_is_removed(broker: Broker) -> None:
    # A slow clock: it does not come to notice by itself.
    with serving(broker, 0.05) as child, contextlib.ExitStack() as stack:
        stop = [*COORDINATOR, "--profile", broker.profile, "--config-path", broker.config_path, "stop"]
        # Should another one have been started.
        stack.callback(subprocess.run, stop, check=False, timeout=SECONDS)
        shutil.rmtree(broker.queue)
        said = broker.status()
        assert said["pid"] in (None, child.pid) and said["running"] == (said["pid"] is not None)
        if said["running"]:
            assert f"pid {child.pid}" in broker.run("start", status=1)
            assert f"pid {child.pid}" in broker.run("stop")
            eventually(lambda: _has_ended(child), SECONDS)
        else:
            assert "not running" in broker.run("stop")


@pytest.mark.parametrize("by", [pytest.param("user", marks=root), "configuration"])
def test_a_coordinator_whose_pipes_directory_is_taken_ends_and_the_next_finds_its_way(
    broker: Broker, by: str, tmp_path: Path
) -> None:
    taken, others = broker.pipes.with_name(f"{broker.pipes.name}_taken"), []
    try:
        with serving(broker) as child:
            broker.pipes.rename(taken)
            others.append(taken)
            broker.pipes.mkdir(mode=0o700)
            if by == "user":
                os.chown(broker.pipes, OTHER_USER, OTHER_USER)
            else:
                # One that is there, or any coordinator that starts meanwhile removes the directory as forgotten.
                (broker.pipes / ".config").symlink_to(tmp_path)
            eventually(lambda: _has_ended(child), SECONDS)
            assert str(broker.pipes) in "".join(line for line in broker.log().splitlines() if " ERROR " in line)
        broker.start()
        others.append(Path(broker.status()["pipes"]))
        assert others[-1] != broker.pipes
        broker.child(SUBSCRIBER, "subscriber")
        assert broker.communicator().task_send("body").result(SECONDS) == "body"
    finally:
        broker.stack.close()
        for directory in others:
            shutil.rmtree(directory, ignore_errors=True)


# Where the system is another one

INFINITE = """
import resource
resource.getrlimit = lambda which: (256, resource.RLIM_INFINITY)
def setrlimit(which, limits):
    if limits[0] == resource.RLIM_INFINITY or limits[0] > 10_240:
        raise ValueError("current limit exceeds maximum limit")
    print(limits[0])
resource.setrlimit = setrlimit
"""


def test_more_descriptors_are_asked_for_where_the_limit_is_infinity(broker: Broker) -> None:
    with serving(broker, 1.0, INFINITE) as child:
        assert int(child.line(0.5)) >= 4096


# Where a selector says of a pipe that waits for room, and has lost its reader, only that it can be written.
WRITABLE = """
import concurrent.futures, selectors
select, both = selectors.DefaultSelector.select, selectors.EVENT_READ | selectors.EVENT_WRITE
def only_writable(selector, timeout=None):
    return [
        (key, selectors.EVENT_WRITE if key.events == both and mask & selectors.EVENT_WRITE else mask)
        for key, mask in select(selector, timeout)
    ]
selectors.DefaultSelector.select = only_writable
with communicator() as caller:
    calls = [caller.rpc_send("stopped", "x" * 1000) for _ in range(200)]
    print("ready")
    concurrent.futures.wait(calls, 8)
    print({type(call.exception()).__name__ if call.done() else "nothing" for call in calls})
"""


def test_calls_fail_when_the_recipient_dies_though_only_a_write_tells(served: Broker) -> None:
    recipient = served.child(ECHO, "stopped")
    recipient.stop()
    caller = served.child(WRITABLE)
    try:
        recipient.kill()
        assert caller.line(12.0) == "{'DeliveryFailed'}"
    finally:
        caller.kill()
        for left in served.pipes.glob(f"reply_{caller.pid}_*"):
            left.unlink()


# Says of each file and directory that is synced which one it is.
SYNCED = """
import fcntl
synced = set()
def noting(sync):
    def note(descriptor, *rest):
        status = os.fstat(descriptor)
        synced.add((status.st_dev, status.st_ino))
        return sync(descriptor, *rest)
    return note
os.fsync = noting(os.fsync)
if hasattr(fcntl, "F_FULLFSYNC"):
    call, full = fcntl.fcntl, noting(fcntl.fcntl)
    fcntl.fcntl = lambda descriptor, command, *rest: (full if command == fcntl.F_FULLFSYNC else call)(
        descriptor, command, *rest
    )
def is_synced(path):
    status = os.stat(path)
    return (status.st_dev, status.st_ino) in synced
"""
SEND_SYNCED = (
    SYNCED
    + """
name, *paths = arguments
config = os.path.realpath(config_path)
with communicator() as worker, communicator() as sender:
    if name:
        worker.task_queue(name).add_task_subscriber(lambda *_: kiwipy.Future())
        sender.task_queue(name).task_send("body", no_reply=True)
    else:
        sender.task_send("body", no_reply=True)
    print([path for path in paths if not is_synced(os.path.join(config, path))])
"""
)


@pytest.mark.protocol("Q1")
@pytest.mark.parametrize(
    ("name", "paths"),
    [("", ["coordinator", "", ".."]), ("new", ["coordinator/queues/new", "coordinator/queues", "coordinator", ""])],
)
def test_the_parents_of_a_new_queue_are_synced_before_a_task_is_accepted(
    broker: Broker, name: str, paths: list[str]
) -> None:
    assert not broker.config_path.exists()
    assert broker.spawn(SEND_SYNCED, name, *paths).line() == "[]"


FULL = """
import fcntl
fcntl.F_FULLFSYNC = 51
full, call = [], fcntl.fcntl
def counted(descriptor, command, *rest):
    if command != 51:
        return call(descriptor, command, *rest)
    full.append("directory" if os.path.isdir(f"/proc/self/fd/{descriptor}") else "file")
    return 0
fcntl.fcntl = counted
with communicator() as sender:
    sender.task_send("first", no_reply=True)
    del full[:]
    sender.task_send("second", no_reply=True)
    print(sorted(set(full)))
"""


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs /proc to tell what is synced")
def test_a_task_is_forced_through_the_cache_of_the_drive_where_that_can_be_asked(broker: Broker) -> None:
    # It is named before the modules are read, as they may look for it only once.
    script = FULL.replace("import taskqueue\n", "")
    assert broker.spawn(script).line() == "['directory', 'file']"


@pytest.mark.parametrize("names", [("Alpha", "alpha"), ("ALPHA beta", "alpha BETA"), ("%C3", "%c3")])
def test_names_that_differ_in_case_make_files_that_differ_otherwise_too(broker: Broker, names: tuple[str, str]) -> None:
    communicator = broker.communicator()
    for name in names:
        communicator.task_queue(name).task_send(name, no_reply=True)
        communicator.add_rpc_subscriber(lambda _, body: body, name)
    for directory, pattern in ((broker.queue / "queues", "*"), (broker.pipes, "route_*")):
        found = [path.name for path in directory.glob(pattern)]
        assert len(found) == len({name.casefold() for name in found}) == 2
