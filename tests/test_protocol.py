"""PROTOCOL.md, sentence by sentence: a stranger who has read nothing else talks to the real broker.

`Stranger` knows no module of ours. Each test names the sentences that it checks, and each sentence has such a test.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import select
import signal
import stat
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kiwipy
import pytest

import directories
import engine
import whose
from harness import ECHO, HERE, HOLDER, OTHER_USER, RECORDER, TIMEOUT, WORKER, Broker, eventually, recorded
from test_operating import root, serving

sys.path.append(str(HERE / "tools"))
import draw

PROTOCOL = (HERE / "PROTOCOL.md").read_text()
checks = pytest.mark.protocol
SLOW = 0.001
"""A coordinator with so slow a clock does nothing every ten seconds: what comes soon comes for another reason."""


def new_hex() -> str:
    return uuid.uuid4().hex


class Stranger:
    """A process that knows the protocol by its text alone."""

    def __init__(self, config: Path) -> None:
        self.pipes = Path(os.readlink(config / "pipes" / "directory"))
        self.registry, self.queue = config / "pipes", config / "coordinator"
        self.reply = f"reply_{os.getpid()}_{new_hex()}"
        self.worker_id = f"stranger-{new_hex()[:12]}"
        self._stack = contextlib.ExitStack()
        self._fifos: dict[str, int] = {}
        self._rest: dict[str, bytes] = {}

    def close(self) -> None:
        """End without a word, as if killed."""
        self._stack.close()

    def go(self) -> None:
        """End in an orderly way, with nothing in hand."""
        entry = self.registry / f"worker_{self.worker_id}.json"
        for path in (entry, *(self.pipes / name for name in self._fifos), self.ours / "lock"):
            path.unlink(missing_ok=True)
        if self.ours.exists():
            self.ours.rmdir()
        self.close()

    def _open(self, path: Path | str, flags: int, mode: int = 0o600) -> int:
        descriptor = os.open(path, flags | os.O_NOFOLLOW, mode)
        self._stack.callback(os.close, descriptor)
        return descriptor

    # Files

    def put(self, path: Path, text: str | bytes, draft: str = "") -> None:
        """Write a file as a draft, and give it its name."""
        hidden = path.with_name(draft or f".{path.name}.{new_hex()}")
        descriptor = os.open(hidden, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        os.write(descriptor, text.encode() if isinstance(text, str) else text)
        os.rename(hidden, path)
        os.fsync(descriptor)
        os.close(descriptor)

    def task(self, **fields: Any) -> str:
        """Send a task, and tell nobody; return its id."""
        task_id = f"{time.time_ns():020d}-{new_hex()[:8]}"
        self.put(self.queue / f"task_{task_id}.json", json.dumps(fields), f".{task_id}")
        descriptor = os.open(self.queue, os.O_RDONLY | os.O_DIRECTORY)
        os.fsync(descriptor)
        os.close(descriptor)
        return task_id

    # Pipes

    def read_from(self, name: str) -> None:
        """Make a FIFO of ours."""
        draft = self.pipes / f".{name}.{new_hex()}"
        os.mkfifo(draft, 0o600)
        self._fifos[name] = self._open(draft, os.O_RDONLY | os.O_NONBLOCK)
        self._open(draft, os.O_WRONLY | os.O_NONBLOCK)
        os.rename(draft, self.pipes / name)

    def next(self, name: str, seconds: float = TIMEOUT) -> dict[str, Any] | None:
        """Return the next message that comes by a FIFO of ours; `None` if none does in time."""
        rest = self._rest.get(name, b"")
        while len(rest) < 4 or len(rest) < 4 + int.from_bytes(rest[:4], "big"):
            if not select.select([self._fifos[name]], [], [], seconds)[0]:
                return None
            rest += os.read(self._fifos[name], 1 << 16)
        end = 4 + int.from_bytes(rest[:4], "big")
        text, self._rest[name] = rest[4:end], rest[end:]
        message = json.loads(text)
        if "body_file" in message:
            body = self.pipes / message["body_file"]
            message = json.loads(body.read_text())
            body.unlink()
        return dict(message)

    def tell(self, name: str, *messages: object) -> None:
        """Write messages into somebody's FIFO, with one write."""
        data = b""
        for message in messages:
            text = message if isinstance(message, bytes) else json.dumps(message).encode()
            data += len(text).to_bytes(4, "big") + text
        self.tell_raw(name, data)

    def tell_raw(self, name: str, data: bytes) -> None:
        descriptor = os.open(self.pipes / name, os.O_WRONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
        try:
            os.write(descriptor, data)
        finally:
            os.close(descriptor)

    # A worker's life

    def lock(self) -> None:
        """Begin a life."""
        home = self.queue / "claimed" / self.worker_id
        home.mkdir(mode=0o700, exist_ok=True)
        draft = home.with_name(f".{self.worker_id}.{new_hex()}")
        fcntl.flock(self._open(draft, os.O_RDWR | os.O_CREAT | os.O_EXCL), fcntl.LOCK_EX | fcntl.LOCK_NB)
        try:
            os.link(draft, home / "lock")
        finally:
            draft.unlink()

    def come(self, *kinds: str, queues: dict[str, int] | None = None, **fields: Any) -> None:
        """Come as a worker."""
        self.lock()
        for name in (self.reply, *(f"{kind}_{self.worker_id}" for kind in kinds)):
            self.read_from(name)
        entry = {"worker_id": self.worker_id, "pid": os.getpid(), "since": time.time(), "reply": self.reply}
        text = json.dumps({**entry, **({"queues": queues} if queues is not None else {}), **fields})
        self.put(self.registry / f"worker_{self.worker_id}.json", text)
        self.tell("coordinator_tasks", {"type": "register", "worker": self.worker_id})

    @property
    def ours(self) -> Path:
        """Where our claims are."""
        return self.queue / "claimed" / self.worker_id

    def claim(self, name: str) -> dict[str, Any] | None:
        """Claim a task, and read it; `None` if somebody else has it."""
        try:
            os.rename(self.queue / f"task_{name}.json", self.ours / f"task_{name}.json")
        except FileNotFoundError:
            return None
        return dict(json.loads((self.ours / f"task_{name}.json").read_text()))

    def answer(self, task: dict[str, Any], **fields: Any) -> None:
        """Bring an outcome on its way."""
        self.tell(task["reply_to"], {**fields, "correlation_id": task["correlation_id"]})

    def complete(self, name: str) -> None:
        os.rename(self.ours / f"task_{name}.json", self.queue / "completed" / f"task_{name}.json")

    def report(self, key: str = "", **lists: list[str]) -> None:
        said = {"type": "report", "worker": self.worker_id, "reply": self.reply, "queue": key}
        self.tell("coordinator_tasks", {**said, **lists})


@pytest.fixture
def stranger(served: Broker) -> Iterator[Stranger]:
    made = Stranger(served.config_path)
    yield made
    made.go()


@pytest.fixture
def worker(stranger: Stranger) -> Stranger:
    """One that works on the default queue."""
    stranger.come("task", queues={"": 0})
    return stranger


def mortal(broker: Broker) -> Stranger:
    """Return a stranger for a test that begins without a coordinator; when it ends, nothing of him is left."""
    made = Stranger(broker.config_path)
    for end in (made.close, made.go):  # The last one first.
        broker.stack.callback(end)
    return made


def killed_before(pattern: str) -> str:
    """Return a script's beginning: its process is killed when it is about to give something such a name."""
    return f"""
import os, re, signal, sys
def hook(event, arguments):
    if event == "os.rename" and re.search({pattern!r}, os.fspath(arguments[1])):
        os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(hook)
"""


def fill(fifo: Path) -> None:
    """Write into a FIFO until it takes nothing more."""
    descriptor = os.open(fifo, os.O_WRONLY | os.O_NONBLOCK)
    for size in (select.PIPE_BUF, 1):
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(descriptor, bytes(size))
    os.close(descriptor)


def see_a_sweep(broker: Broker) -> None:
    """Wait until the coordinator has looked for what nobody can use any more, which a route that leads nowhere is."""
    route = broker.pipes / "route_nowhere"
    os.symlink("nowhere", route)
    eventually(lambda: not os.path.lexists(route))


def done(broker: Broker, name: str) -> bool:
    return (broker.queue / "completed" / f"task_{name}.json").exists()


# The text itself


def test_every_sentence_is_checked_by_a_test_that_names_it() -> None:
    sentences = re.findall(r"^- \*\*\[([A-Z]\d+)\]\*\* ", PROTOCOL, re.MULTILINE)
    assert len(sentences) == len(set(sentences)) > 50
    for letter in {sentence[0] for sentence in sentences}:
        numbers = [int(sentence[1:]) for sentence in sentences if sentence[0] == letter]
        assert numbers == list(range(1, len(numbers) + 1)), f"the sentences {letter} are out of order"
    named = set()
    for path in (HERE / "tests").glob("test_*.py"):
        for marks in re.findall(r"^@(?:checks|pytest\.mark\.protocol)\((.*)\)$", path.read_text(), re.MULTILINE):
            named.update(re.findall(r'"([A-Z]\d+)"', marks))
    assert named == set(sentences)
    assert set(re.findall(r"\[([A-Z]\d+)\]", PROTOCOL)) == set(sentences)


# Directories


@checks("D1")
def test_pipes_are_found_by_a_symlink(served: Broker) -> None:
    assert os.readlink(served.config_path / "pipes" / "directory") == str(served.pipes)


@checks("D2", "D6")
def test_everything_is_for_its_user_alone(served: Broker) -> None:
    served.child(WORKER, "w1")
    served.communicator().task_send("waits", no_reply=True)
    assert stat.S_ISDIR(os.lstat(served.pipes).st_mode)
    assert os.readlink(served.pipes / ".config") == os.path.realpath(served.config_path)
    for place in (served.pipes, served.config_path / "pipes", served.queue):
        assert os.lstat(place).st_uid == os.geteuid() and os.lstat(place).st_mode & 0o77 == 0
        for path in place.rglob("*"):
            with contextlib.suppress(FileNotFoundError):
                status = os.lstat(path)
                assert stat.S_ISLNK(status.st_mode) or status.st_mode & 0o77 == 0, path


@checks("D2")
@pytest.mark.parametrize("mode", [0o770, 0o705])
def test_pipes_that_others_may_enter_are_not_used(broker: Broker, mode: int) -> None:
    broker.communicator().close()
    broker.pipes.chmod(mode)
    with pytest.raises(OSError, match="open to other users"):
        broker.communicator()
    broker.pipes.chmod(0o700)


@checks("D2")
@root
@pytest.mark.parametrize("marked", [False, True])
def test_pipes_that_another_user_has_made_are_not_used(broker: Broker, marked: bool) -> None:
    broker.pipes.mkdir(mode=0o700)
    if marked:
        os.symlink(os.path.realpath(broker.config_path), broker.pipes / ".config")
    os.chown(broker.pipes, OTHER_USER, OTHER_USER)
    before = os.listdir(broker.pipes)
    own = Path(f"{broker.pipes}_{digest(broker)}")
    with broker.communicator("w1") as worker:
        worker.add_task_subscriber(lambda _, body: body)
        assert os.readlink(broker.config_path / "pipes" / "directory") == str(own)
        assert (own / "task_w1").is_fifo() and os.listdir(broker.pipes) == before
    directories.remove_pipes(own)


@checks("D2")
@root
def test_pipes_that_have_come_to_another_user_are_not_used_any_more(broker: Broker) -> None:
    broker.communicator().close()
    os.chown(broker.pipes, OTHER_USER, OTHER_USER)
    own = Path(f"{broker.pipes}_{digest(broker)}")
    with broker.communicator():
        assert os.readlink(broker.config_path / "pipes" / "directory") == str(own)
        assert os.listdir(broker.pipes) == [".config"]
    directories.remove_pipes(own)


@checks("D6", "W4")
def test_no_file_is_opened_through_a_symlink(served: Broker, stranger: Stranger, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text('{"body":"elsewhere"}')
    served.child(RECORDER, tmp_path / "record")
    os.symlink(tmp_path / "secret", served.queue / "task_1.json")
    stranger.tell("coordinator_tasks", {"type": "task", "queue": "", "name": "1"})
    eventually(lambda: os.path.lexists(served.queue / "failed" / "task_1.json"))
    assert recorded(tmp_path / "record") == [] and (tmp_path / "secret").exists()


@checks("D4")
def test_a_draft_whose_writer_died_is_removed_after_an_hour(broker: Broker) -> None:
    broker.communicator().close()

    def drafts(age: float) -> list[Path]:
        made = [
            broker.queue / f".{time.time_ns():020d}-{new_hex()[:8]}",
            broker.queue / "claimed" / f".w1.{new_hex()}",
            broker.pipes / f".task_w1.{new_hex()}",
            broker.config_path / "pipes" / f".worker_w1.json.{new_hex()}",
        ]
        for path in made:
            path.touch()
            os.utime(path, (0, time.time() - age))
        return made

    young = drafts(1800)
    nobodys = broker.queue / ".notes"
    nobodys.touch()
    os.utime(nobodys, (0, 0))
    with serving(broker, ahead=0.0):
        for _ in range(2):  # In the first round the young ones may have their turn after these.
            old = drafts(7200)
            eventually(lambda: not any(path.exists() for path in old))
    assert all(path.exists() for path in (*young, nobodys))
    for path in young:
        path.unlink()


def digest(broker: Broker) -> str:
    """Return what the sentence D3 puts behind a name that is taken."""
    return hashlib.sha256(f"{os.getuid()}:{os.path.realpath(broker.config_path)}".encode()).hexdigest()[:16]


@checks("D3")
def test_who_finds_the_name_taken_takes_the_one_with_the_digest(broker: Broker, tmp_path: Path) -> None:
    broker.pipes.mkdir(mode=0o700)
    (tmp_path / "another").mkdir()  # Or whoever starts meanwhile takes the directory for forgotten.
    os.symlink(tmp_path / "another", broker.pipes / ".config")
    broker.communicator().close()
    own = Path(f"{broker.pipes}_{digest(broker)}")
    assert os.readlink(broker.config_path / "pipes" / "directory") == str(own)
    assert os.readlink(own / ".config") == os.path.realpath(broker.config_path)
    directories.remove_pipes(own)


@checks("D4", "D5")
def test_drafts_and_what_is_in_no_text_are_passed_over(served: Broker, stranger: Stranger) -> None:
    for name in (f".{time.time_ns():020d}-0badcafe", "task_.json", "task_a b.json", "notes.txt"):
        (served.queue / name).write_text('{"body": "no task"}')
    os.mkfifo(served.config_path / "pipes" / "worker_fifo.json")
    draft = served.pipes / f".task_x.{new_hex()}"
    draft.touch()
    served.child(ECHO, "w1")
    task_id = stranger.task(body=1)
    eventually(lambda: done(served, task_id))
    assert len(served.tasks()) == 1
    draft.unlink()
    (served.config_path / "pipes" / "worker_fifo.json").unlink()


@checks("D7")
def test_another_format_is_refused(broker: Broker) -> None:
    with broker.communicator():
        said = json.loads((broker.queue / "format").read_text())
    assert said == {"format": 1, "profile": broker.profile, "uuid": None}
    (broker.queue / "format").write_text(json.dumps({**said, "format": 2}))
    with pytest.raises(OSError, match="format 2"):
        broker.communicator()
    (broker.queue / "format").write_text(json.dumps({**said, "profile": "other", "uuid": "1"}))
    with pytest.raises(OSError, match="belongs to the profile 'other'"):
        broker.communicator()
    with pytest.raises(OSError, match="belongs to"):
        broker.communicator(profile_uuid="2")
    broker.communicator(profile_uuid="1").close()


# Frames


@checks("F1")
def test_frames_that_share_a_write_all_arrive(served: Broker, stranger: Stranger) -> None:
    child = served.child(WORKER, "w1")
    count = select.PIPE_BUF // (4 + len('{"body": 10}'))
    stranger.tell("coordinator_broadcast", *({"body": number} for number in range(count)))
    assert [json.loads(child.line().replace("None", "null"))[0] for _ in range(count)] == list(range(count))


@checks("F2", "F3")
def test_garbage_is_skipped_and_the_next_frame_is_found(served: Broker, stranger: Stranger) -> None:
    child = served.child(WORKER, "w1")
    for garbage in (b"\1garbage without a zero", b"\0\0\0\5[1,2]", b"\0\0\0\4{\0\0}", b"\0\0\0\0\0\0", os.urandom(100)):
        stranger.tell_raw("coordinator_broadcast", garbage)
        stranger.tell("coordinator_broadcast", {"body": "one that may follow what looks like the begin of a frame"})
        stranger.tell("coordinator_broadcast", {"body": "found\0"})
        eventually(lambda: "found\\x00" in child.line())


@checks("F1")
def test_nobody_writes_a_frame_that_is_too_long(served: Broker, stranger: Stranger) -> None:
    served.child(ECHO, "w1")
    stranger.read_from(stranger.reply)
    for size in range(select.PIPE_BUF - 100, select.PIPE_BUF + 5, 5):
        call = {"to": "w1", "body": "x" * size, "reply_to": stranger.reply, "correlation_id": "1"}
        body = f"body_rpc_w1.{new_hex()}"
        stranger.put(served.pipes / body, json.dumps(call))
        stranger.tell("rpc_w1", f'{{"body_file":"{body}"}}'.encode())
        eventually(lambda: select.select([stranger._fifos[stranger.reply]], [], [], TIMEOUT)[0])
        data = os.read(stranger._fifos[stranger.reply], 1 << 16)
        assert len(data) <= select.PIPE_BUF and len(data) == 4 + int.from_bytes(data[:4], "big")
        for left in served.pipes.glob("body_reply_*"):
            left.unlink()


@checks("F4")
def test_what_may_be_missing_may_be_null(served: Broker, stranger: Stranger) -> None:
    nothing = {"rpc": None, "broadcast": None, "listens_since": None, "version": None}
    stranger.come("task", queues={"": 1}, **nothing)
    pipe = f"task_{stranger.worker_id}"
    sender = served.communicator()
    for number in range(2):
        sender.task_send(number, no_reply=True)
        ring = stranger.next(pipe)
        assert ring is not None
        (name,) = ring["names"]
        assert stranger.claim(name) is not None
        stranger.complete(name)
        stranger.report(lost=None, done=[name])  # type: ignore[arg-type]


@checks("F4")
def test_unknown_fields_are_passed_over_and_optional_ones_may_be_missing(served: Broker, stranger: Stranger) -> None:
    child = served.child(WORKER, "w1")
    stranger.tell("coordinator_broadcast", {"body": 1, "colour": "green"})
    assert child.line() == "[1, None, None, None]"
    task_id = stranger.task(body=2, colour="green")
    stranger.tell("coordinator_tasks", {"type": "task", "queue": "", "name": task_id, "colour": "green"})
    assert child.line() == "2"
    stranger.come("task", queues={"": 0}, colour="green")
    eventually(lambda: len(served.status()["workers"]) == 2)


@checks("F5")
def test_who_sent_what_cannot_be_parsed_is_told_if_that_stands_last(served: Broker, stranger: Stranger) -> None:
    served.child(ECHO, "w1")
    stranger.read_from(stranger.reply)
    deep = "[" * 100_000
    reply_to, correlation_id = f'"reply_to": "{stranger.reply}"', '"correlation_id" : "C-1"'
    ends = (
        f"{reply_to},{correlation_id}",
        f"{correlation_id}, {reply_to} ",
        f'{reply_to},"no_reply":null, {correlation_id}',
    )
    for end in ends:
        body = f"body_rpc_w1.{new_hex()}"
        stranger.put(served.pipes / body, f'{{"to":"w1","body":{deep}, {end}}}')
        stranger.tell("rpc_w1", f'{{"body_file":"{body}"}}'.encode())
        answer = stranger.next(stranger.reply)
        assert answer is not None and answer["correlation_id"] == "C-1" and "cannot be read" in answer["exception"]


@checks("F6")
def test_values_beyond_json_are_dressed(served: Broker, stranger: Stranger) -> None:
    server = served.communicator("w1")
    heard: list[Any] = []
    server.add_rpc_subscriber(lambda _, body: heard.append(body) or heard[-1], "w1")
    stranger.read_from(stranger.reply)
    body = {"at": {"!": "date", "value": "2026-01-31"}, "some": {"!": "set", "value": [1]}}
    call = {"to": "w1", "body": body, "dressed": True, "reply_to": stranger.reply, "correlation_id": "1"}
    stranger.tell("rpc_w1", call)
    answer = stranger.next(stranger.reply)
    assert str(heard) == "[{'at': datetime.date(2026, 1, 31), 'some': {1}}]"
    assert answer == {"result": body, "dressed": True, "correlation_id": "1"}
    stranger.tell("rpc_w1", {**call, "dressed": False})
    assert stranger.next(stranger.reply) == {"result": body, "correlation_id": "1"}
    assert heard[1] == body


# Pipes


@checks("P1")
def test_no_other_name_is_a_worker_id(served: Broker, stranger: Stranger) -> None:
    for worker_id in ("", ".hidden", "a/b", "a b", "x" * 101, "ä"):
        stranger.tell("coordinator_tasks", {"type": "register", "worker": worker_id})
        with pytest.raises(ValueError, match="cannot be a worker id"):
            served.communicator(worker_id)
    stranger.worker_id = "A." + "x" * 98
    stranger.come("task", queues={"": 0})
    eventually(lambda: [worker["worker_id"] for worker in served.status()["workers"]] == [stranger.worker_id])


@checks("P2")
def test_a_new_reply_pipe_is_a_new_life(served: Broker, worker: Stranger) -> None:
    first = worker.task(body=1)
    worker.tell("coordinator_tasks", {"type": "task", "queue": "", "name": first})
    assert worker.next(f"task_{worker.worker_id}") == {"type": "ring", "queue": "", "names": [first]}
    (served.pipes / worker.reply).unlink()
    worker.reply = f"reply_{os.getpid()}_{new_hex()}"
    worker.read_from(worker.reply)
    entry = served.config_path / "pipes" / f"worker_{worker.worker_id}.json"
    worker.put(entry, json.dumps({**json.loads(entry.read_text()), "reply": worker.reply}))
    worker.tell("coordinator_tasks", {"type": "register", "worker": worker.worker_id})
    # What the old life was rung for, and has not claimed, the new one is rung for.
    assert worker.next(f"task_{worker.worker_id}") == {"type": "ring", "queue": "", "names": [first]}
    eventually(lambda: f"Worker {worker.worker_id}" in served.log())


@checks("P3", "P4")
def test_a_fifo_has_its_name_only_while_somebody_reads_it(served: Broker) -> None:
    child = served.child(ECHO, "w1")
    for name in ("coordinator_tasks", "coordinator_broadcast", "task_w1", "rpc_w1"):
        os.close(os.open(served.pipes / name, os.O_WRONLY | os.O_NONBLOCK))
    child.kill()
    for name in ("task_w1", "rpc_w1"):
        with pytest.raises(OSError) as caught:
            os.close(os.open(served.pipes / name, os.O_WRONLY | os.O_NONBLOCK))
        assert caught.value.errno in (errno.ENXIO, errno.ENOENT)


@checks("P3")
def test_a_fifo_gets_its_name_only_once_it_is_read(broker: Broker, monkeypatch: pytest.MonkeyPatch) -> None:
    mkfifo, rename, made, is_read = os.mkfifo, os.rename, [], {}

    def makes(path: Any, *rest: Any) -> None:
        made.append(os.path.basename(path))
        mkfifo(path, *rest)

    def renames(source: Any, target: Any) -> None:
        if stat.S_ISFIFO(os.lstat(source).st_mode):
            try:
                os.close(os.open(source, os.O_WRONLY | os.O_NONBLOCK))
                is_read[os.path.basename(target)] = True
            except OSError:
                is_read[os.path.basename(target)] = False
        rename(source, target)

    monkeypatch.setattr(os, "mkfifo", makes)
    monkeypatch.setattr(os, "rename", renames)
    # Python 3.10's has kept os.rename as it was.
    monkeypatch.setattr(Path, "rename", renames)
    worker = broker.communicator("w1")
    worker.add_task_subscriber(lambda *_: None)
    worker.add_rpc_subscriber(lambda *_: None)
    worker.add_broadcast_subscriber(lambda *_: None)
    assert all(is_read.values()) and all(name.startswith(".") for name in made), (is_read, made)
    named = {path.name for path in broker.pipes.iterdir() if stat.S_ISFIFO(os.lstat(path).st_mode)}
    assert named == is_read.keys() and {"task_w1", "rpc_w1", "broadcast_w1"} < named


@checks("P5")
def test_what_is_no_fifo_is_not_written_to(served: Broker) -> None:
    stranger = Stranger(served.config_path)
    served.child(ECHO, "w1")
    (served.pipes / stranger.reply).write_text("")
    call = {"to": "w1", "body": 1, "reply_to": stranger.reply, "correlation_id": "1"}
    stranger.tell("rpc_w1", call)
    assert served.communicator().rpc_send("w1", 2).result(TIMEOUT) == 2
    assert (served.pipes / stranger.reply).read_text() == ""
    (served.pipes / stranger.reply).unlink()


@checks("P5")
@root
def test_a_fifo_of_another_user_is_not_written_to(served: Broker, stranger: Stranger) -> None:
    served.child(ECHO, "w1")
    stranger.read_from(stranger.reply)
    os.chown(served.pipes / stranger.reply, OTHER_USER, OTHER_USER)
    stranger.tell("rpc_w1", {"to": "w1", "body": 1, "reply_to": stranger.reply, "correlation_id": "1"})
    assert served.communicator().rpc_send("w1", 2).result(TIMEOUT) == 2
    assert stranger.next(stranger.reply, 0) is None


@checks("P6")
def test_a_task_that_nobody_was_told_of_is_done(served: Broker, stranger: Stranger) -> None:
    served.child(ECHO, "w1")
    task_id = stranger.task(body=1)
    eventually(lambda: done(served, task_id))


# Large messages


@checks("M1", "M2")
def test_large_messages_go_by_a_file(served: Broker, stranger: Stranger) -> None:
    served.child(ECHO, "w1")
    stranger.read_from(stranger.reply)
    body = "x" * 100_000
    name = f"body_rpc_w1.{new_hex()}"
    call = {"to": "w1", "body": body, "reply_to": stranger.reply, "correlation_id": "1"}
    stranger.put(served.pipes / name, json.dumps(call))
    stranger.tell("rpc_w1", f'{{"body_file":"{name}"}}'.encode())
    assert stranger.next(stranger.reply) == {"result": body, "correlation_id": "1"}
    assert not [name for name in os.listdir(served.pipes) if name.startswith("body_")]
    for stolen in (f"body_rpc_w2.{new_hex()}", "../coordinator/format", ".config"):
        stranger.tell("rpc_w1", f'{{"body_file":"{stolen}"}}'.encode())
    assert served.communicator().rpc_send("w1", 2).result(TIMEOUT) == 2
    assert (served.queue / "format").exists()


@checks("M3")
def test_a_body_that_is_gone_is_passed_over(served: Broker, stranger: Stranger) -> None:
    sender = served.communicator()
    served.child(HOLDER, "w1")
    future = sender.rpc_send("w1", 1)
    (reply,) = (name for name in os.listdir(served.pipes) if name.startswith("reply_") and str(os.getpid()) in name)
    stranger.tell(reply, f'{{"body_file":"body_{reply}.{new_hex()}"}}'.encode())
    pending = future.result(TIMEOUT)
    assert not pending.done()


@checks("M4", "A3")
def test_an_outcome_that_was_left_on_the_disk_is_found(served: Broker, worker: Stranger) -> None:
    future = served.communicator().task_send("left")
    ring = worker.next(f"task_{worker.worker_id}")
    assert ring is not None
    (name,) = ring["names"]
    task = worker.claim(name)
    assert task is not None
    text = json.dumps({"result": "found", "correlation_id": task["correlation_id"]})
    worker.put(served.pipes / f"body_{task['reply_to']}.{new_hex()}", text)
    worker.complete(name)
    assert future.result(TIMEOUT) == "found"


@checks("M4")
def test_whoever_gives_up_a_large_message_removes_its_body(served: Broker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "_FLUSH_SECONDS", 0.1)  # For so long it tries when it closes.
    server = served.child(ECHO, "w1")
    server.stop()
    fill(served.pipes / "rpc_w1")
    caller = served.communicator()
    future = caller.rpc_send("w1", "x" * 100_000)
    assert len(list(served.pipes.glob("body_rpc_w1.*"))) == 1
    caller.close()
    assert not list(served.pipes.glob("body_rpc_w1.*"))
    with pytest.raises(kiwipy.CommunicatorClosed):
        future.result(TIMEOUT)
    server.go_on()


# Tasks: sending


@checks("T1")
def test_tasks_are_offered_in_the_order_of_their_ids(served: Broker, stranger: Stranger, tmp_path: Path) -> None:
    for task_id in ("b", "a", "Z-9_", "00", "x" * 80):
        stranger.put(served.queue / f"task_{task_id}.json", json.dumps({"body": task_id}))
    served.child(RECORDER, tmp_path / "record")
    eventually(lambda: len(recorded(tmp_path / "record")) == 5)
    assert recorded(tmp_path / "record") == sorted(["b", "a", "Z-9_", "00", "x" * 80])


@checks("T2", "T3", "T5")
def test_a_task_is_done_and_its_sender_told(served: Broker, stranger: Stranger) -> None:
    served.child(ECHO, "w1")
    stranger.read_from(stranger.reply)
    task_id = stranger.task(body={"a": 1}, no_reply=False, reply_to=stranger.reply, correlation_id="abc")
    stranger.tell("coordinator_tasks", {"type": "task", "queue": "", "name": task_id})
    assert stranger.next(stranger.reply) == {"result": {"a": 1}, "correlation_id": "abc"}
    eventually(lambda: done(served, task_id))


@checks("T4")
def test_a_task_that_was_removed_in_time_is_not_done(served: Broker, stranger: Stranger, tmp_path: Path) -> None:
    task_id = stranger.task(body="withdrawn")
    os.unlink(served.queue / f"task_{task_id}.json")
    stranger.tell("coordinator_tasks", {"type": "task", "queue": "", "name": task_id})
    served.child(RECORDER, tmp_path / "record")
    other = stranger.task(body="other")
    stranger.tell("coordinator_tasks", {"type": "task", "queue": "", "name": other})
    eventually(lambda: done(served, other))
    assert recorded(tmp_path / "record") == ["other"]


@checks("T4")
def test_a_task_whose_fsync_failed_is_removed(broker: Broker, monkeypatch: pytest.MonkeyPatch) -> None:
    there: list[str] = []

    def fails(_: int) -> None:
        there.extend(name for name in os.listdir(broker.queue) if name.startswith("task_"))
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    sender = broker.communicator()
    before = sorted(os.listdir(broker.queue))
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fails)
        with pytest.raises(OSError, match="Input/output error"):
            sender.task_send("not accepted")
    assert len(there) == 1 and sorted(os.listdir(broker.queue)) == before


# Tasks: working


@checks("W1", "L8")
def test_a_worker_may_claim_what_it_finds_with_nothing_but_its_lock(served: Broker, stranger: Stranger) -> None:
    future = served.communicator().task_send("found")
    stranger.lock()
    (name,) = (found[5:-5] for found in os.listdir(served.queue) if found.startswith("task_"))
    task = stranger.claim(name)
    assert task is not None
    stranger.answer(task, result=task["body"])
    stranger.complete(name)
    assert future.result(TIMEOUT) == "found"


@checks("W2", "W5", "A1", "A2", "R1")
def test_of_two_who_claim_one_has_it(served: Broker, worker: Stranger) -> None:
    future = served.communicator().task_send("one")
    ring = worker.next(f"task_{worker.worker_id}")
    assert ring is not None
    (name,) = ring["names"]
    other = Stranger(served.config_path)
    other.lock()
    task = other.claim(name)
    assert task is not None and worker.claim(name) is None
    worker.report(lost=[name])
    other.answer(task, result="other's")
    other.complete(name)
    assert future.result(TIMEOUT) == "other's"
    other.go()


@checks("W2")
def test_a_directory_of_claims_that_is_gone_is_made_again(served: Broker) -> None:
    served.child(ECHO, "w1")
    sender = served.communicator()
    assert sender.task_send(1).result(TIMEOUT) == 1
    # The outcome comes before the task is moved.
    eventually(lambda: not list((served.queue / "claimed" / "w1").glob("task_*")))
    (served.queue / "claimed" / "w1" / "lock").unlink()
    (served.queue / "claimed" / "w1").rmdir()
    assert sender.task_send(2).result(TIMEOUT) == 2


@checks("W3", "Q3")
def test_while_paused_nothing_is_rung_for_and_nothing_is_begun(served: Broker, worker: Stranger) -> None:
    (served.queue / "paused").touch()
    future = served.communicator().task_send("later")
    assert worker.next(f"task_{worker.worker_id}", 0.3) is None
    served.child(ECHO, "w1")
    worker.tell("task_w1", {"type": "ring", "queue": "", "names": [served.tasks()[0]["id"]]})
    assert served.tasks()[0]["state"] == "waiting"
    (served.queue / "paused").unlink()
    worker.tell("coordinator_tasks", {"type": "look"})  # Or else it sees that within ten seconds.
    assert future.result(TIMEOUT) == "later"


@checks("W4")
def test_what_is_no_task_goes_to_failed_and_its_sender_is_told(served: Broker, stranger: Stranger) -> None:
    served.child(ECHO, "w1")
    stranger.read_from(stranger.reply)
    envelope = f'"no_reply":false,"reply_to":"{stranger.reply}","correlation_id":"ab"}}'
    for text in ('{"body":' + "[" * 100_000 + "," + envelope, '{"no_body":1,' + envelope):
        task_id = f"{time.time_ns():020d}-{new_hex()[:8]}"
        stranger.put(served.queue / f"task_{task_id}.json", text)
        stranger.tell("coordinator_tasks", {"type": "task", "queue": "", "name": task_id})
        eventually(lambda: (served.queue / "failed" / f"task_{task_id}.json").exists())
        assert (served.queue / "failed" / f"task_{task_id}.reason").read_text()
    answer = stranger.next(stranger.reply)
    assert answer is not None and answer["correlation_id"] == "ab" and "not a task" in answer["exception"]


@checks("W3")
def test_a_pause_between_the_look_and_the_claim_is_seen(served: Broker, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = served.communicator("w1")
    worker.add_task_subscriber(lambda _, body: body)
    rename = os.rename

    def pausing(source: Any, target: Any, **options: Any) -> None:
        rename(source, target, **options)
        if "claimed/w1" in str(target):
            (served.queue / "paused").touch()

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", pausing)
        future = served.communicator().task_send("later")
        eventually(lambda: (served.queue / "paused").exists())
        eventually(lambda: [row["state"] for row in served.tasks()] == ["waiting"])
    assert not future.done()
    served.run("resume")
    assert future.result(TIMEOUT) == "later"


@checks("A1")
def test_whoever_wants_no_outcome_gets_none(served: Broker, stranger: Stranger) -> None:
    served.child(ECHO, "w1")
    stranger.read_from(stranger.reply)
    for no_reply in (True, False):
        task_id = stranger.task(body=1, no_reply=no_reply, reply_to=stranger.reply, correlation_id=str(no_reply))
        stranger.tell("coordinator_tasks", {"type": "task", "queue": "", "name": task_id})
        eventually(lambda: done(served, task_id))
    assert stranger.next(stranger.reply) == {"result": 1, "correlation_id": "False"}


@checks("W6", "R4")
def test_what_is_given_back_goes_to_whom_the_report_says(served: Broker, worker: Stranger) -> None:
    pipe = f"task_{worker.worker_id}"
    served.communicator().task_send("for somebody else", no_reply=True)
    for kind in ("returned", "rejected"):
        ring = worker.next(pipe)
        assert ring is not None
        (name,) = ring["names"]
        assert worker.claim(name) is not None
        os.rename(worker.ours / f"task_{name}.json", served.queue / f"task_{name}.json")
        worker.report(**{kind: [name]})
    # Nobody else is here, so it is put off for a second.
    assert worker.next(pipe, 0.3) is None
    served.child(ECHO, "w1")
    eventually(lambda: done(served, name))


@checks("W7", "L5")
def test_a_death_is_counted_in_the_name_and_the_twentieth_is_the_last(served: Broker, worker: Stranger) -> None:
    sender = Stranger(served.config_path)
    sender.read_from(sender.reply)
    for name in ("a", "b.7", "c.19"):
        task = {"body": name, "reply_to": sender.reply, "correlation_id": name}
        worker.put(served.queue / f"task_{name}.json", json.dumps(task))
        assert worker.claim(name) is not None
    named = served.queue / "queues" / "q" / "claimed" / worker.worker_id
    served.communicator().task_queue("q")
    named.mkdir()
    worker.put(named / "task_d.json", '{"body":1}')
    worker.close()
    eventually(lambda: not worker.ours.exists())
    assert sorted(name for name in os.listdir(served.queue) if name.startswith("task_")) == [
        "task_a.1.json",
        "task_b.8.json",
    ]
    assert (served.queue / "queues" / "q" / "task_d.1.json").exists()
    told = sender.next(sender.reply)
    assert told is not None and told["correlation_id"] == "c.19" and "20 workers" in told["exception"]
    sender.go()
    assert (served.queue / "failed" / "task_c.19.json").exists()
    assert "20 workers" in (served.queue / "failed" / "task_c.19.reason").read_text()
    left = [
        path for root in (served.pipes, served.config_path / "pipes") for path in root.glob(f"*{worker.worker_id}*")
    ]
    assert left == []


@checks("W7")
def test_the_sender_is_told_of_the_last_death_before_the_task_goes_to_failed(broker: Broker) -> None:
    broker.communicator().close()
    sender, worker = mortal(broker), mortal(broker)
    sender.read_from(sender.reply)
    task = {"body": 1, "reply_to": sender.reply, "correlation_id": "c"}
    with serving(broker, before=killed_before("/failed/task_[^/]*[.]json$")) as coordinator:
        worker.come()
        worker.put(broker.queue / "task_c.19.json", json.dumps(task))
        assert worker.claim("c.19") is not None
        worker.close()
        assert coordinator.process.wait(TIMEOUT) == -signal.SIGKILL
    told = sender.next(sender.reply, 0)
    assert told is not None and told["correlation_id"] == "c" and "20 workers" in told["exception"]
    assert list(broker.queue.rglob("task_*.json")) == [worker.ours / "task_c.19.json"]
    # Who has buried it was killed in the middle, so the next one begins anew.
    broker.start()
    eventually(lambda: (broker.queue / "failed" / "task_c.19.json").exists())
    assert sender.next(sender.reply) == told


RAISES = """
def raises(*_):
    raise ValueError("too difficult")
worker = communicator("w1")
worker.add_task_subscriber(raises)
print("ready"); sys.stdin.read()
"""


@checks("W5", "W8", "A2")
def test_the_outcome_and_its_reason_come_before_the_task_is_completed(served: Broker) -> None:
    child = served.child(killed_before("/completed/task_[^/]*[.]json$") + RAISES)
    future = served.communicator().task_send("raises")
    assert child.process.wait(TIMEOUT) == -signal.SIGKILL
    with pytest.raises(kiwipy.RemoteException, match="too difficult"):
        future.result(TIMEOUT)
    (reason,) = (served.queue / "completed").iterdir()
    assert re.fullmatch(r"task_[^.]*\.reason", reason.name) and "too difficult" in reason.read_text()


@checks("W8")
def test_what_a_subscriber_of_pythons_raised_is_beside_its_task_too(served: Broker) -> None:
    def raises(*_: Any) -> None:
        raise ValueError("too difficult")

    served.communicator("w1").add_task_subscriber(raises)
    served.communicator().task_send("raises", no_reply=True)
    eventually(lambda: [path.read_text() for path in served.queue.glob("completed/*.reason")])
    (reason,) = served.queue.glob("completed/*.reason")
    assert "too difficult" in reason.read_text()


@checks("W8")
def test_what_a_subscriber_raised_is_beside_its_task(served: Broker, worker: Stranger) -> None:
    served.communicator().task_send("raises", no_reply=True)
    ring = worker.next(f"task_{worker.worker_id}")
    assert ring is not None
    (name,) = ring["names"]
    worker.claim(name)
    worker.put(served.queue / "completed" / f"task_{name}.reason", "Traceback: it was too difficult")
    worker.complete(name)
    worker.report(done=[name])
    (row,) = served.tasks()
    assert row["state"] == "completed" and "too difficult" in row["outcome"]
    assert "too difficult" in served.run("show", row["id"])


# A worker's life


@checks("L1", "L2")
def test_a_lock_that_is_held_is_a_life(served: Broker, worker: Stranger) -> None:
    with pytest.raises(kiwipy.DuplicateSubscriberIdentifier):
        served.communicator(worker.worker_id)
    with pytest.raises(FileExistsError):
        worker.lock()
    worker.close()
    served.communicator(worker.worker_id).close()


@checks("L2")
def test_the_lock_has_its_name_only_once_it_is_held(broker: Broker, monkeypatch: pytest.MonkeyPatch) -> None:
    link, is_held = os.link, []

    def links(source: Any, target: Any, **options: Any) -> None:
        if os.path.basename(target) == "lock":
            descriptor = os.open(source, os.O_RDWR)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                is_held.append(False)
            except BlockingIOError:
                is_held.append(True)
            os.close(descriptor)
        link(source, target, **options)

    monkeypatch.setattr(os, "link", links)
    monkeypatch.setattr(engine, "LOOK_SECONDS", 0.2)
    broker.communicator("w1")
    lock = broker.queue / "claimed" / "w1" / "lock"
    assert lock.is_file() and is_held == [True]
    lock.unlink()
    eventually(lock.is_file)  # It is made again.
    assert is_held == [True, True]
    assert [path.name for path in (broker.queue / "claimed").iterdir()] == ["w1"]


@checks("L3", "L5")
def test_who_takes_an_id_that_was_used_buries_what_is_left(broker: Broker) -> None:
    broker.communicator().close()
    dead = mortal(broker)
    dead.lock()
    dead.read_from(dead.reply)
    dead.read_from(f"rpc_{dead.worker_id}")
    entry = {"worker_id": dead.worker_id, "pid": 1, "since": 1.0, "reply": dead.reply, "rpc": True}
    dead.put(dead.registry / f"worker_{dead.worker_id}.json", json.dumps(entry))
    os.symlink(f"rpc_{dead.worker_id}", dead.pipes / "route_r")
    name = dead.task(body=1)
    assert dead.claim(name) is not None
    dead.close()
    broker.communicator(dead.worker_id)
    assert (broker.queue / f"task_{name}.1.json").exists() and os.listdir(dead.ours) == ["lock"]
    left = {".config", *(path.name for path in broker.pipes.glob("reply_*"))}
    assert set(os.listdir(broker.pipes)) == left and dead.reply not in left
    assert json.loads((dead.registry / f"worker_{dead.worker_id}.json").read_text())["reply"] in left


@checks("L5")
def test_whoever_has_locked_what_has_lost_its_name_buries_nobody(
    broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    broker.communicator().close()
    dead, heir = mortal(broker), mortal(broker)
    heir.worker_id = dead.worker_id
    dead.lock()
    dead.close()
    name = heir.task(body=1)
    flock = fcntl.flock

    def late(descriptor: int, operation: int) -> None:
        monkeypatch.setattr(fcntl, "flock", flock)
        # The lock is open, and not yet locked: meanwhile somebody else buries the dead one, and its heir comes.
        (dead.ours / "lock").unlink()
        heir.lock()
        heir.read_from(heir.reply)
        heir.read_from(f"task_{heir.worker_id}")
        entry = {"worker_id": heir.worker_id, "pid": 1, "since": 1.0, "reply": heir.reply, "queues": {"": 0}}
        heir.put(heir.registry / f"worker_{heir.worker_id}.json", json.dumps(entry))
        assert heir.claim(name) is not None
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    with pytest.raises(kiwipy.DuplicateSubscriberIdentifier):
        broker.communicator(dead.worker_id)
    assert (heir.pipes / f"task_{heir.worker_id}").is_fifo()
    assert (heir.registry / f"worker_{heir.worker_id}.json").exists()
    heir.complete(name)


@checks("L5")
def test_one_whose_lock_has_no_name_is_buried_in_the_third_round(broker: Broker) -> None:
    broker.communicator().close()
    with serving(broker, 10.0):
        dead, alive = mortal(broker), mortal(broker)
        for one in (dead, alive):
            one.come("task", queues={"": 0})
            assert one.claim(one.task(body=1)) is not None
        see_a_sweep(broker)  # The next round is a second away, and each buries before it sweeps.
        for one in (dead, alive):
            (one.ours / "lock").unlink()
        dead.close()
        for _ in range(2):
            see_a_sweep(broker)
            assert list(dead.ours.glob("task_*"))
        see_a_sweep(broker)
        assert not dead.ours.exists() and len(list(broker.queue.glob("task_*.1.json"))) == 1
        # So is nobody whose pipes are read.
        (path,) = alive.ours.glob("task_*")
        path.unlink()


@checks("L3", "L4")
def test_a_stranger_comes_and_is_rung(served: Broker, worker: Stranger) -> None:
    eventually(lambda: [found["worker_id"] for found in served.status()["workers"]] == [worker.worker_id])
    future = served.communicator().task_send("hello")
    ring = worker.next(f"task_{worker.worker_id}")
    assert ring is not None and ring["queue"] == ""
    task = worker.claim(ring["names"][0])
    assert task is not None and task["body"] == "hello"
    worker.answer(task, result="done")
    worker.complete(ring["names"][0])
    worker.report(done=ring["names"])
    assert future.result(TIMEOUT) == "done"


@checks("L6")
def test_who_goes_in_an_orderly_way_costs_no_death(served: Broker, worker: Stranger) -> None:
    served.communicator().task_send("given back", no_reply=True)
    ring = worker.next(f"task_{worker.worker_id}")
    assert ring is not None
    (name,) = ring["names"]
    worker.claim(name)
    os.rename(worker.ours / f"task_{name}.json", served.queue / f"task_{name}.json")
    worker.go()
    eventually(lambda: f"Worker {worker.worker_id} (pid {os.getpid()}) left" in served.log())
    assert [(row["state"], row["deaths"]) for row in served.tasks()] == [("waiting", 0)]


@checks("L7")
def test_a_worker_makes_again_what_is_gone(served: Broker) -> None:
    served.child(ECHO, "w1")
    there = [
        served.queue / "claimed" / "w1" / "lock",
        served.pipes / "task_w1",
        served.pipes / "rpc_w1",
        served.pipes / "route_w1",
        served.config_path / "pipes" / "worker_w1.json",
    ]
    for path in there:
        path.unlink()
    eventually(lambda: all(map(os.path.lexists, there)))


@checks("L7")
def test_a_pipe_that_is_made_again_is_registered_and_the_old_one_is_read_on(
    broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "LOOK_SECONDS", 0.2)
    server = broker.communicator("w1")
    server.add_rpc_subscriber(lambda _, body: body, "r")
    stranger = mortal(broker)
    stranger.read_from(stranger.reply)
    stranger.read_from("coordinator_tasks")  # There is no coordinator, so this is where it is told.
    old = os.open(broker.pipes / "rpc_w1", os.O_WRONLY | os.O_NONBLOCK)
    try:
        (broker.pipes / "rpc_w1").unlink()
        assert stranger.next("coordinator_tasks") == {"type": "register", "worker": "w1"}
        assert not os.path.samestat(os.fstat(old), os.stat(broker.pipes / "rpc_w1"))
        call = {"to": "r", "body": 1, "reply_to": stranger.reply, "correlation_id": "by the new one"}
        stranger.tell("rpc_w1", call)
        assert stranger.next(stranger.reply) == {"result": 1, "correlation_id": "by the new one"}
        text = json.dumps({**call, "correlation_id": "by the old one"}).encode()
        os.write(old, len(text).to_bytes(4, "big") + text)
        assert stranger.next(stranger.reply) == {"result": 1, "correlation_id": "by the old one"}
    finally:
        os.close(old)


@checks("L7")
def test_whoever_finds_anothers_lock_under_its_id_has_lost_it_and_what_it_claimed(
    served: Broker, stranger: Stranger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "LOOK_SECONDS", 0.2)
    held = kiwipy.Future()
    loser, sender = served.communicator("w1"), served.communicator()
    loser.add_task_subscriber(lambda *_: held)
    pending = sender.task_send("held").result(TIMEOUT)
    stranger.worker_id = "w1"
    (path,) = stranger.ours.glob("task_*.json")
    draft = stranger.queue / "claimed" / f".w1.{new_hex()}"
    fcntl.flock(stranger._open(draft, os.O_RDWR | os.O_CREAT | os.O_EXCL), fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.rename(draft, stranger.ours / "lock")
    # It begins a new life, under an id that nobody has used.
    eventually(lambda: len(list(stranger.registry.glob("worker_*.json"))) == 2)
    held.set_result("too late")
    assert sender.task_send("more").result(TIMEOUT).result(TIMEOUT) == "too late"
    task = json.loads(path.read_text())
    stranger.answer(task, result="by who has the id")
    stranger.complete(path.name[5:-5])
    assert pending.result(TIMEOUT) == "by who has the id"


# Rings and reports


@checks("R1")
def test_at_most_64_are_rung_for_and_not_heard_of(served: Broker, worker: Stranger) -> None:
    sender = served.communicator(fsync=False)
    for number in range(100):
        sender.task_send(number, no_reply=True)
    names: list[str] = []
    while (ring := worker.next(f"task_{worker.worker_id}", TIMEOUT if len(names) < 64 else 0.3)) is not None:
        names += ring["names"]
    assert len(names) == len(set(names)) == 64


@checks("R4")
def test_whoever_cannot_claim_what_waits_is_not_rung_for_it_for_ever(served: Broker, worker: Stranger) -> None:
    future = served.communicator().task_send("cannot be claimed")
    pipe, rings, end = f"task_{worker.worker_id}", 0, time.monotonic() + 2.0
    while time.monotonic() < end:
        ring = worker.next(pipe, 0.2)
        if ring is not None:
            rings += 1
            worker.report(lost=ring["names"])
    # Twice; once more after a look, which may come just then; and after each pause, of a second and two.
    assert 2 <= rings <= 6
    served.child(ECHO, "w1")
    assert future.result(TIMEOUT) == "cannot be claimed"


@checks("R2")
def test_what_is_not_claimed_is_offered_to_others(served: Broker, worker: Stranger) -> None:
    future = served.communicator().task_send("waits for nobody")
    assert worker.next(f"task_{worker.worker_id}") is not None
    served.child(ECHO, "w1")
    assert future.result(TIMEOUT) == "waits for nobody"


@checks("R2")
def test_a_silent_worker_is_rung_for_no_more_until_it_is_heard_from(broker: Broker) -> None:
    broker.communicator().close()
    # Its first look comes as late as it can, and not while this runs.
    with serving(broker, 1.0, "import random\nrandom.random = lambda: 1.0\n"):
        silent, other = mortal(broker), mortal(broker)

        def sent() -> str:
            name = silent.task(body=1)
            silent.tell("coordinator_tasks", {"type": "task", "queue": "", "name": name})
            return name

        def rung(worker: Stranger, seconds: float = 2.0) -> list[str] | None:
            ring = worker.next(f"task_{worker.worker_id}", seconds)
            return list(ring["names"]) if ring is not None else None

        silent.come("task", queues={"": 0})
        begin = time.monotonic()
        first = sent()
        assert rung(silent) == [first]
        other.come("task", queues={"": 0})
        assert rung(other) == [first]
        assert time.monotonic() - begin > 0.05
        for number in range(4):
            name = first if number == 0 else sent()
            assert name == first or rung(other) == [name]
            assert other.claim(name) is not None
            other.report(claimed=[name])
        assert rung(silent, 0.2) is None
        silent.report(lost=[first])
        last = sent()
        assert rung(silent) == [last]
        for path in other.ours.glob("task_*"):
            path.unlink()


@checks("R3")
def test_a_report_need_not_say_whose_lifes_it_is(broker: Broker) -> None:
    broker.communicator().close()
    with serving(broker, SLOW):
        worker = mortal(broker)
        worker.come("task", queues={"": 1})
        pipe, names = f"task_{worker.worker_id}", []
        for _ in range(2):
            names.append(worker.task(body=1))
            worker.tell("coordinator_tasks", {"type": "task", "queue": "", "name": names[-1]})
        report = {"type": "report", "worker": worker.worker_id, "queue": ""}
        ring = worker.next(pipe)
        assert ring is not None and ring["names"] == names[:1]
        assert worker.claim(names[0]) is not None
        worker.tell("coordinator_tasks", {**report, "claimed": names[:1]})
        worker.complete(names[0])
        # It holds one at once, and a report of another life says nothing of this one.
        worker.tell("coordinator_tasks", {**report, "reply": f"reply_1_{new_hex()}", "done": names[:1]})
        assert worker.next(pipe, 0.3) is None
        worker.tell("coordinator_tasks", {**report, "done": names[:1]})
        ring = worker.next(pipe, 3.0)
        assert ring is not None and ring["names"] == names[1:]


@checks("R3")
def test_a_worker_that_reports_nothing_gets_all_the_same(served: Broker, worker: Stranger) -> None:
    sender = served.communicator(fsync=False)
    futures = [sender.task_send(number) for number in range(70)]
    while not all(future.done() for future in futures):
        ring = worker.next(f"task_{worker.worker_id}", 1.0)
        for name in ring["names"] if ring is not None else ():
            task = worker.claim(name)
            if task is not None:
                worker.answer(task, result=task["body"])
                worker.complete(name)
    assert [future.result(TIMEOUT) for future in futures] == list(range(70))


# Answers


@checks("A4")
def test_each_kind_of_answer_does_what_the_table_says(served: Broker, worker: Stranger) -> None:
    sender = served.communicator()

    def sent(**answer: Any) -> kiwipy.Future:
        future = sender.task_send("question")
        ring = worker.next(f"task_{worker.worker_id}")
        assert ring is not None
        (name,) = ring["names"]
        task = worker.claim(name)
        assert task is not None
        worker.answer(task, shrug=True)  # Of no known kind.
        worker.answer(task, **answer)
        if "pending" in answer:
            worker.answer(task, pending=answer["pending"])  # An old one.
            worker.answer(task, result="in the end")
        worker.complete(name)
        worker.report(done=[name])
        return future

    assert sent(result=None).result(TIMEOUT) is None
    with pytest.raises(kiwipy.RemoteException, match="too difficult") as caught:
        sent(exception="too difficult", traceback="line 1").result(TIMEOUT)
    assert "line 1" in str(caught.value.__cause__)
    with pytest.raises(kiwipy.UnroutableError):
        sent(undelivered="not here").result(TIMEOUT)
    with pytest.raises(kiwipy.CancelledError):
        sent(cancelled="no more").result(TIMEOUT)
    assert sent(pending=1).result(TIMEOUT).result(TIMEOUT) == "in the end"


@checks("A2", "A3")
def test_an_outcome_that_the_pipe_has_no_room_for_is_on_the_disk_before_its_task_is_completed(
    served: Broker, stranger: Stranger
) -> None:
    stranger.read_from(stranger.reply)
    fill(served.pipes / stranger.reply)
    child = served.child(killed_before("/completed/task_[^/]*[.]json$") + ECHO, "w1")
    name = stranger.task(body=1, reply_to=stranger.reply, correlation_id="c")
    stranger.tell("coordinator_tasks", {"type": "task", "queue": "", "name": name})
    assert child.process.wait(TIMEOUT) == -signal.SIGKILL
    (body,) = served.pipes.glob(f"body_{stranger.reply}.*")
    assert json.loads(body.read_text()) == {"result": 1, "correlation_id": "c"}


@checks("A3")
def test_an_outcome_whose_pipe_has_no_name_is_kept_for_a_minute(broker: Broker) -> None:
    broker.communicator().close()
    body = broker.pipes / f"body_reply_1_{new_hex()}.{new_hex()}"
    body.write_text('{"result": 1, "correlation_id": "c"}')
    for ahead, is_kept in ((30.0, True), (65.0, False)):
        with serving(broker, ahead=ahead):
            for _ in range(2):  # In the first round the body may have its turn after this.
                see_a_sweep(broker)
        assert body.exists() == is_kept


# RPC


@checks("C1", "C4", "C5")
def test_a_stranger_serves_an_identifier_and_calls_one(served: Broker, stranger: Stranger) -> None:
    stranger.come("rpc", rpc=True)
    os.symlink(f"rpc_{stranger.worker_id}", served.pipes / "route_adder")
    caller = served.communicator()
    with pytest.raises(kiwipy.DuplicateSubscriberIdentifier):
        caller.add_rpc_subscriber(lambda *_: None, "adder")
    future = caller.rpc_send("adder", [1, 2])
    call = stranger.next(f"rpc_{stranger.worker_id}")
    assert call is not None and call["to"] == "adder"
    stranger.answer(call, result=sum(call["body"]))
    assert future.result(TIMEOUT) == 3
    served.child(ECHO, "w1")
    target = os.readlink(served.pipes / "route_w1")
    stranger.tell(target, {"to": "w1", "body": "hi", "reply_to": stranger.reply, "correlation_id": "7"})
    assert stranger.next(stranger.reply) == {"result": "hi", "correlation_id": "7"}
    stranger.tell(target, {"to": "nobody", "body": "hi", "reply_to": stranger.reply, "correlation_id": "8"})
    answer = stranger.next(stranger.reply)
    assert answer is not None and "undelivered" in answer and answer["correlation_id"] == "8"
    (served.pipes / "route_adder").unlink()


def by_the_text(name: str) -> str:
    """Quote a name as the sentence C2 says."""
    plain = b"abcdefghijklmnopqrstuvwxyz0123456789._~-"
    quoted = "".join(chr(byte) if byte in plain else f"%{byte:02x}" for byte in name.encode())
    quoted = "%2e" + quoted[1:] if quoted.startswith(".") else quoted
    return quoted if len(quoted) <= 200 else "=" + hashlib.sha256(name.encode()).hexdigest()


@checks("C2")
@pytest.mark.parametrize(
    "name", ["plain", "Capital", "a b/c", ".dot", "ä€", "%41", "=x", "~a-b_c.d", "x" * 201, "Ä" * 40]
)
def test_an_identifier_is_quoted_as_the_text_says(served: Broker, name: str) -> None:
    served.communicator().add_rpc_subscriber(lambda *_: None, name)
    assert [found for found in os.listdir(served.pipes) if found.startswith("route_")] == [f"route_{by_the_text(name)}"]


@checks("C6", "A3")
def test_an_answer_that_was_left_on_the_disk_outlives_its_server(served: Broker, stranger: Stranger) -> None:
    stranger.come("rpc", rpc=True)
    os.symlink(f"rpc_{stranger.worker_id}", served.pipes / "route_r")
    future = served.communicator().rpc_send("r", 1)
    call = stranger.next(f"rpc_{stranger.worker_id}")
    assert call is not None
    text = json.dumps({"result": 1, "correlation_id": call["correlation_id"]})
    stranger.put(served.pipes / f"body_{call['reply_to']}.{new_hex()}", text)
    (served.pipes / "route_r").unlink()
    stranger.go()
    assert future.result(TIMEOUT) == 1


@checks("C3", "C6")
def test_the_route_of_the_dead_is_replaced_and_who_has_called_them_is_told(broker: Broker) -> None:
    child = broker.child(HOLDER, "w1")
    caller = broker.communicator()
    pending = caller.rpc_send("w1", 1).result(TIMEOUT)
    child.kill()
    with pytest.raises(kiwipy.DeliveryFailed):
        pending.result(TIMEOUT)
    # Without a coordinator: whoever meets the route buries the dead.
    caller.add_rpc_subscriber(lambda _, body: body, "w1")
    assert broker.communicator().rpc_send("w1", 2).result(TIMEOUT) == 2


# Broadcasts


@checks("B1", "B2")
def test_a_stranger_listens_and_broadcasts(served: Broker, stranger: Stranger) -> None:
    stranger.come("broadcast", broadcast=True, listens_since=time.time())
    pipe = f"broadcast_{stranger.worker_id}"
    served.communicator().broadcast_send("news", "me", "subject", "c1")
    assert stranger.next(pipe) == {"body": "news", "sender": "me", "subject": "subject", "correlation_id": "c1"}
    stranger.tell("coordinator_broadcast", {"body": 1, "colour": "green"})
    assert stranger.next(pipe) == {"body": 1, "colour": "green"}


@checks("B2")
def test_who_came_before_a_broadcast_gets_it_though_the_coordinator_reads_both_at_once(broker: Broker) -> None:
    broker.communicator().close()
    with serving(broker, SLOW) as coordinator:
        early, listener = mortal(broker), mortal(broker)
        early.come("broadcast", broadcast=True, listens_since=time.time())
        for number in range(2):
            early.tell("coordinator_broadcast", {"body": number})
            assert early.next(f"broadcast_{early.worker_id}") == {"body": number}
        # It waits for both pipes now; and the broadcasts are the first that it finds to read when it goes on.
        coordinator.stop()
        listener.tell("coordinator_broadcast", {"body": "before"})
        listener.come("broadcast", broadcast=True, listens_since=time.time())
        listener.tell("coordinator_broadcast", {"body": "after"})
        coordinator.go_on()
        heard: list[Any] = []
        while "after" not in heard:
            message = listener.next(f"broadcast_{listener.worker_id}", 5.0)
            assert message is not None
            heard.append(message["body"])


@checks("B2")
def test_what_lies_in_the_intake_outlives_the_coordinator_where_a_listener_holds_it_open(broker: Broker) -> None:
    broker.communicator().close()
    with serving(broker, SLOW) as coordinator:
        listener = broker.child(WORKER, "w1")
        coordinator.stop()
        mortal(broker).tell("coordinator_broadcast", {"body": "outlives it"})
        coordinator.kill()
    with serving(broker, SLOW):
        assert listener.line() == "['outlives it', None, None, None]"


@checks("B5")
def test_for_a_listener_that_does_not_read_the_newest_wait(served: Broker, stranger: Stranger) -> None:
    stranger.come("broadcast", broadcast=True, listens_since=time.time())
    eventually(lambda: len(served.status()["workers"]) == 1)
    sender = served.communicator()
    body = "x" * 300
    for number in range(11_500):
        sender.broadcast_send([number, body])
    eventually(lambda: served.status()["workers"][0]["broadcasts_dropped"])
    pipe = f"broadcast_{stranger.worker_id}"
    heard = []
    while not heard or heard[-1] != 11_499:
        message = stranger.next(pipe)
        assert message is not None
        heard.append(message["body"][0])
    assert 10_000 <= len(heard) < 11_500 and heard[-10_000:] == list(range(1_500, 11_500))


@checks("B3", "B4")
def test_what_is_kept_is_sent_on_oldest_first_and_is_forgotten(broker: Broker) -> None:
    child = broker.child(WORKER, "w1")
    stranger = Stranger(broker.config_path)
    for number in (3, 1, 2):
        stranger.put(broker.pipes / f"kept_{time.time_ns() + number * 10**9:020d}-{new_hex()}", f'{{"body":{number}}}')
    broker.start()
    assert [json.loads(child.line().replace("None", "null"))[0] for _ in range(3)] == [1, 2, 3]


@checks("B3")
def test_the_coordinator_is_told_of_what_is_kept(broker: Broker) -> None:
    sender, stranger = broker.communicator(), mortal(broker)
    stranger.read_from("coordinator_tasks")  # As a coordinator's that has just come.
    sender.broadcast_send("kept")
    assert stranger.next("coordinator_tasks") == {"type": "kept"}
    (kept,) = broker.pipes.glob("kept_*")
    stranger.go()
    kept.unlink()
    with serving(broker, SLOW):
        child = broker.child(WORKER, "w1")
        stranger.put(broker.pipes / f"kept_{time.time_ns():020d}-{new_hex()}", '{"body":"at once"}')
        stranger.tell("coordinator_tasks", {"type": "kept"})
        assert child.line() == "['at once', None, None, None]"


@checks("B4")
def test_whoever_keeps_one_removes_those_of_a_minute_ago(broker: Broker, monkeypatch: pytest.MonkeyPatch) -> None:
    import files

    sender = broker.communicator()
    sender.broadcast_send("old")
    (old,) = broker.pipes.glob("kept_*")
    monkeypatch.setattr(files, "is_older", lambda path, seconds: path == old and seconds == 60.0)
    sender.broadcast_send("new")
    (left,) = broker.pipes.glob("kept_*")
    assert json.loads(left.read_text())["body"] == "new"


@checks("B3", "B4")
def test_a_broadcast_is_kept_for_the_next_coordinator(broker: Broker) -> None:
    with broker.communicator() as sender:
        sender.broadcast_send("kept")
        (kept,) = (name for name in os.listdir(broker.pipes) if name.startswith("kept_"))
        assert re.fullmatch(r"kept_\d{20}-[0-9a-f]{32}", kept)
        assert json.loads((broker.pipes / kept).read_text())["body"] == "kept"
        for number in range(1000):
            (broker.pipes / f"kept_{time.time_ns():020d}-{number:032x}").write_text('{"body":"more"}')
        sender.broadcast_send("one more")
        assert sum(name.startswith("kept_") for name in os.listdir(broker.pipes)) == 1000
        for name in os.listdir(broker.pipes):
            if name.startswith("kept_"):
                os.unlink(broker.pipes / name)
        child = broker.child(WORKER, "w1")
        stranger = Stranger(broker.config_path)
        stranger.put(broker.pipes / f"kept_{time.time_ns():020d}-{new_hex()}", '{"body":"a stranger\'s"}')
        broker.start()
        assert child.line() == '["a stranger\'s", None, None, None]'


# Named queues


@checks("Q1", "Q2")
def test_a_named_queue_has_its_own_tasks_and_no_lock(served: Broker, stranger: Stranger) -> None:
    sender = served.communicator()
    future = sender.task_queue("My Queue").task_send("in it")
    key = by_the_text("My Queue")
    directory = served.queue / "queues" / key
    assert (directory / "name").read_text() == "My Queue"
    stranger.come("task", queues={key: 1})
    ring = stranger.next(f"task_{stranger.worker_id}")
    assert ring is not None and ring["queue"] == key
    (name,) = ring["names"]
    ours = directory / "claimed" / stranger.worker_id
    ours.mkdir(mode=0o700)
    os.rename(directory / f"task_{name}.json", ours / f"task_{name}.json")
    task = json.loads((ours / f"task_{name}.json").read_text())
    stranger.answer(task, result=task["body"])
    os.rename(ours / f"task_{name}.json", directory / "completed" / f"task_{name}.json")
    stranger.report(key, done=[name])
    assert future.result(TIMEOUT) == "in it"
    assert os.listdir(ours) == [] and (stranger.ours / "lock").exists()


# Versions


@checks("V1")
def test_a_field_more_in_format_changes_nothing(broker: Broker) -> None:
    broker.communicator().close()
    said = json.loads((broker.queue / "format").read_text())
    (broker.queue / "format").write_text(json.dumps({**said, "colour": "green"}))
    broker.communicator().close()
    assert said["format"] == whose.FORMAT


# The session


class Session:
    """Carries out the last section, line by line."""

    def __init__(self, config: Path) -> None:
        self._stranger = Stranger(config)
        self._roots = {"PIPES": self._stranger.pipes, "REGISTRY": config / "pipes", "QUEUE": config / "coordinator"}
        self._open: dict[int, int] = {}

    def close(self) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)
        self._stranger.close()

    def path(self, text: str) -> Path:
        root, *rest = text.split("/", 1)
        return self._roots[root].joinpath(*rest)

    def obey(self, verb: str, rest: str) -> None:
        """Do what a line says, and see whether what it says comes about."""
        where, *more = rest.split("  ")
        if verb in ("write", "gets"):
            data = bytes.fromhex(more[0]) + more[1].encode()
            if verb == "write":
                self._stranger.tell_raw(where, data)
            else:
                inode = os.stat(self._roots["PIPES"] / where).st_ino
                assert select.select([self._open[inode]], [], [], TIMEOUT)[0]
                assert os.read(self._open[inode], 1 << 16) == data
        else:
            getattr(self, verb)(self.path(where), *more)

    def mkdir(self, path: Path) -> None:
        os.mkdir(path, 0o700)

    def rmdir(self, path: Path) -> None:
        os.rmdir(path)

    def create(self, path: Path) -> None:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        self._open[os.fstat(descriptor).st_ino] = descriptor

    def flock(self, path: Path) -> None:
        fcntl.flock(self._open[os.stat(path).st_ino], fcntl.LOCK_EX | fcntl.LOCK_NB)

    def link(self, path: Path, new: str) -> None:
        os.link(path, self.path(new))

    def unlink(self, path: Path) -> None:
        os.unlink(path)

    def rename(self, path: Path, new: str) -> None:
        os.rename(path, self.path(new))

    def mkfifo(self, path: Path) -> None:
        os.mkfifo(path, 0o600)

    def open(self, path: Path) -> None:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        self._open[os.fstat(descriptor).st_ino] = descriptor
        self._open[-descriptor] = os.open(path, os.O_WRONLY | os.O_NONBLOCK)

    def put(self, path: Path, text: str) -> None:
        self.create(path)
        os.write(self._open[os.stat(path).st_ino], text.encode())

    def finds(self, path: Path, text: str) -> None:
        assert path.read_text() == text

    def fsync(self, path: Path) -> None:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def test_the_session_runs_as_it_is_written(served: Broker) -> None:
    lines = PROTOCOL.split("## 14. ")[1].split("```")[1].split("\n")
    written = [re.sub(r"\{(\d)\}", lambda match: match[1] * 32, line).split(None, 2) for line in lines if line]
    assert len(written) > 30
    session = Session(served.config_path)
    try:
        for who, verb, rest in written:
            assert who in ("worker", "sender")
            session.obey(verb, rest)
    finally:
        session.close()


def test_the_frame_of_the_text_is_one() -> None:
    _, block = PROTOCOL.split("## 2. Frames")[1].split("```")[:2]
    data, text = block.strip().split("\n")
    assert bytes.fromhex(data) == len(text.split(None, 1)[1]).to_bytes(4, "big") + text.split(None, 1)[1].encode()


# The drawings

RECORDS = """
import re, burial, control_tasks, directories, taskqueue
queue = os.path.join(config_path, "coordinator") + "/"
def state(path):
    path = os.fspath(path)
    if not path.startswith(queue):
        return None
    path = path.removeprefix(queue)
    found = re.fullmatch(r"(?:queues/[^/]+/)?(?:(claimed|completed|failed)/(?:[^/]+/)?)?task_[^/]*[.]json", path)
    return found and (found[1] or "waiting")
moves = []
def hook(event, arguments):
    if event == "os.rename":
        moves.append((state(arguments[0]) or "", state(arguments[1]) or ""))
    elif event == "os.remove":
        moves.append((state(arguments[0]) or "", ""))
sys.addaudithook(hook)
"""

LIVES = (
    RECORDS
    + """
with communicator() as made:
    pulled = made.task_queue("kiwipy.tasks")
    pulled.task_send("done", no_reply=True)
    with pulled.next_task() as task, task.processing() as outcome:
        outcome.set_result(None)
    pulled.task_send("given back", no_reply=True)
    with pulled.next_task():
        pass
    here = taskqueue.TaskQueue(directories.locate(config_path).queue)
    with open(here.file("0"), "w") as file:
        file.write("no task")
    with pulled.next_task():
        pass
    fsync, os.fsync = os.fsync, lambda descriptor: (_ for _ in ()).throw(OSError())
    try:
        pulled.task_send("could not be sent", no_reply=True)
    except OSError:
        pass
    os.fsync = fsync
os.makedirs(queue + "claimed/dead")
open(queue + "claimed/dead/lock", "w").close()
for name in ("1.19", "2"):
    with open(here.file(name, "claimed/dead"), "w") as file:
        file.write('{"body": 1}')
burial.clean_up(directories.locate(config_path))
for state_ in ("failed", "completed"):
    name = next(here.names(state_))
    list(control_tasks.requeue(config_path, [name.split(".")[0]]))
for name in [*here.names(), *here.names("failed")]:
    list(control_tasks.remove(config_path, [name.split(".")[0]]))
with communicator() as made, made.task_queue("kiwipy.tasks").next_task(fail=False) as none:
    made.task_queue("kiwipy.tasks").task_send("old", no_reply=True)
    with made.task_queue("kiwipy.tasks").next_task() as task, task.processing() as outcome:
        outcome.set_result(None)
taskqueue.COMPLETED_KEPT = 0
list(here.sweep())
sys.stdout.write(json.dumps(sorted({move for move in moves if any(move)})) + "\\n")
"""
)

COMES_AND_GOES = """
import directories, taskqueue
events = []
def name(path):
    path = os.fspath(path)
    kind = os.path.basename(path).split("_")[0]
    if path.startswith(str(layout.pipes)) and not kind.startswith("."):
        return {"reply": "reply pipe", "task": "other pipes", "rpc": "other pipes"}.get(kind)
    if path == str(layout.lock("w1")):
        return "lock"
    if path == str(layout.entry("w1")):
        return "entry"
    return "tasks" if os.path.dirname(path) == str(layout.queue) and kind == "task" else None
def hook(event, arguments):
    if event in ("os.rename", "os.link"):
        events.append(name(arguments[1]))
    elif event == "os.remove":
        events.append(name(arguments[0]))
layout = directories.establish(profile, config_path)
write = os.write
def writes(descriptor, data):
    if b'"register"' in data:
        events.append("register")
    return write(descriptor, data)
os.write = writes
sys.addaudithook(hook)
made = communicator("w1")
made.add_task_subscriber(lambda *_: kiwipy.Future())
made.add_rpc_subscriber(lambda *_: None, "r")
came = [event for event in events if event]
made.task_send("held", no_reply=True)
end = time.monotonic() + 30
while not os.path.exists(layout.lock("w1").parent) or len(os.listdir(layout.lock("w1").parent)) < 2:
    assert time.monotonic() < end
    time.sleep(0.01)
events.clear()
made.close()
sys.stdout.write(json.dumps([came, [event for event in events if event]]) + "\\n")
"""


def test_the_drawings_are_those_of_the_tables() -> None:
    for picture in (draw.task, draw.worker):
        assert (HERE / "drawings" / f"{picture.__name__}.svg").read_text() == picture()


def test_a_tasks_file_moves_as_it_is_drawn(broker: Broker) -> None:
    moves = json.loads(broker.spawn("import json\n" + LIVES).line())
    assert {tuple(move) for move in moves} == set(draw.TASK)


def test_a_worker_comes_and_goes_as_it_is_drawn(served: Broker) -> None:
    came, went = json.loads(served.spawn("import json\n" + COMES_AND_GOES).line())
    # What it subscribes to later is one more pipe, and the entry is written anew.
    assert list(dict.fromkeys(came)) == [name for name, _, _ in draw.COMING]
    assert list(dict.fromkeys(went)) == [name for name, _, _ in draw.GOING]
