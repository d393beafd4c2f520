"""The programs in ``examples/``: each runs as it is written, and those in C and in shell do so beside Python's."""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from harness import ECHO, HERE, TIMEOUT, Broker, Child, at_home, eventually, write_frame

EXAMPLES = HERE / "examples"


class Program(Child):
    """A program whose lines can be waited for."""

    def __init__(self, *command: object, home: Path | None = None) -> None:
        environment = {**os.environ, **({"HOME": str(home)} if home is not None else {})}
        self.process = subprocess.Popen(
            list(map(str, command)), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, cwd=HERE, env=environment
        )
        self.pid = self.process.pid
        self._rest = b""

    def rest(self) -> str:
        """Return the lines that were not waited for, at its end."""
        out, _ = self.process.communicate(timeout=TIMEOUT)
        return (self._rest + out).decode()


@pytest.fixture
def programs() -> Iterator[list[Program]]:
    """Those that are ended, whatever comes of the test."""
    made: list[Program] = []
    yield made
    for program in made:
        program.process.kill()
        program.process.wait()
        assert program.process.stdout is not None
        program.process.stdout.close()


# Python


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Path]:
    with at_home(tmp_path) as made:
        yield made


def example(home: Path, programs: list[Program], name: str, first: str = "") -> tuple[Program, str]:
    """Begin an example, and wait for its first line; return what it is to print after that."""
    program = Program(sys.executable, "-m", f"examples.{name}", home=home)
    programs.append(program)
    expected = (EXAMPLES / f"{name}.out").read_text()
    if first:
        assert program.line() == first
        expected = expected.removeprefix(f"{first}\n")
    return program, expected


def ends_as_expected(program: Program, expected: str) -> None:
    assert program.rest() == expected and program.process.returncode == 0


def test_every_example_is_run_here_and_says_what_it_prints() -> None:
    names = {path.stem for path in EXAMPLES.glob("*.py")}
    assert names == {path.stem for path in EXAMPLES.glob("*.out")}
    here = Path(__file__).read_text()
    assert all(f'"{name}"' in here for name in names)
    assert all(f"`{name}.py`" in (EXAMPLES / "README.md").read_text() for name in names)


def test_worker_and_sender(home: Path, programs: list[Program]) -> None:
    worker, done = example(home, programs, "worker", "Waiting for tasks")
    ends_as_expected(*example(home, programs, "sender"))
    worker.process.send_signal(signal.SIGINT)
    ends_as_expected(worker, done)


def test_awaiting(home: Path, programs: list[Program]) -> None:
    worker, _ = example(home, programs, "worker", "Waiting for tasks")
    ends_as_expected(*example(home, programs, "awaiting"))
    worker.process.send_signal(signal.SIGINT)
    assert "Received task: 2" in worker.rest()


def test_draining_worker(home: Path, programs: list[Program]) -> None:
    worker, done = example(home, programs, "draining_worker", "Waiting for tasks")
    sender, _ = example(home, programs, "sender")
    began = worker.line()
    worker.process.send_signal(signal.SIGTERM)
    ends_as_expected(worker, done.removeprefix(f"{began}\n"))
    assert sender.rest() == "Task result: {'command': 'process', 'data': 123}\n"


def test_named_queue(home: Path, programs: list[Program]) -> None:
    ends_as_expected(*example(home, programs, "named_queue"))


def test_rpc(home: Path, programs: list[Program]) -> None:
    server, served = example(home, programs, "rpc_server", "Serving")
    ends_as_expected(*example(home, programs, "rpc_client"))
    ends_as_expected(server, served)


def test_broadcasts(home: Path, programs: list[Program]) -> None:
    listener, heard = example(home, programs, "listener", "Listening")
    ends_as_expected(*example(home, programs, "broadcaster"))
    ends_as_expected(listener, heard)


# C

COMPILER = shutil.which("cc")
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="there is no C compiler here")


@pytest.fixture(scope="session")
def binaries(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs in C, compiled."""
    made = tmp_path_factory.mktemp("c")
    # As on macOS, where the suite is run so.
    (made / "limits.h").write_text(f"#include_next <limits.h>\n#undef PIPE_BUF\n#define PIPE_BUF {select.PIPE_BUF}\n")
    for source in (EXAMPLES / "c").glob("*.c"):
        compiled(source, made / source.stem, f"-I{made}")
    return made


def compiled(source: Path, binary: Path, *more: str) -> Path:
    """Compile a program, with what the environment's ``CFLAGS`` say besides (``-fsanitize=address,undefined``, say)."""
    flags = ["-std=c11", "-D_GNU_SOURCE", "-Wall", "-Wextra", "-Werror", *os.environ.get("CFLAGS", "").split(), *more]
    subprocess.run([str(COMPILER), *flags, "-o", binary, source], check=True)
    return binary


def write_text(pipe: Path, text: bytes) -> None:
    """Write a frame with this very text."""
    with open(pipe, "wb", buffering=0) as end:
        end.write(len(text).to_bytes(4, "big") + text)


REPLY_TO = f"reply_1_{'1' * 32}"
ENVELOPE = b',"no_reply":false,"reply_to":"%s","correlation_id":"1"}' % REPLY_TO.encode()


def put_task(served: Broker, name: str, text: bytes) -> None:
    """Send a task that holds this very text."""
    (served.queue / f".{name}").write_bytes(text)
    (served.queue / f".{name}").rename(served.queue / f"task_{name}.json")
    write_frame(served.pipes / "coordinator_tasks", {"type": "task", "queue": "", "name": name})


def left_for_nobody(served: Broker) -> bytes:
    """Wait for an answer to `REPLY_TO`, which no pipe is called, so that it lies on the disk; take it."""
    body = eventually(lambda: next(served.pipes.glob(f"body_{REPLY_TO}.*"), None))
    text: bytes = body.read_bytes()
    body.unlink()
    return text


def test_each_program_in_c_is_short() -> None:
    for source in (EXAMPLES / "c").glob("*.c"):
        assert len(source.read_text().splitlines()) < 250
        assert set(line for line in source.read_text().splitlines() if line.startswith("#include")) <= {
            "#include <dirent.h>",
            '#include "namedpipe.h"',
        }


@needs_compiler
def test_worker_in_c(served: Broker, binaries: Path, programs: list[Program]) -> None:
    worker = Program(binaries / "worker", served.config_path)
    programs.append(worker)
    assert worker.line() == "ready"
    sender = served.communicator()
    bodies: list[Any] = [1, 'text with "quotes" and ü', {"a": [1, {"b": None}]}, "x" * 100_000, [], {1}, b"x"]
    assert [sender.task_send(body).result(TIMEOUT) for body in bodies] == bodies
    worker.process.send_signal(signal.SIGTERM)
    worker.rest()
    assert worker.process.returncode == 0
    eventually(lambda: not (served.queue / "claimed").exists() or os.listdir(served.queue / "claimed") == [])


@needs_compiler
def test_worker_in_c_refuses_what_is_no_task(served: Broker, binaries: Path, programs: list[Program]) -> None:
    bad = [
        '{"body":12',
        '[1,{"body":2}]',
        'x {"body":3}',
        '{"body":3} x',
        '{"body":[}]}',
        '{"body":1,}',
        '{"body":"\\q"}',
    ]
    for number, text in enumerate([*bad, '{"body":nonsense}']):
        (served.queue / f"task_{number}.json").write_text(text)
    long = {"body": 1, "reply_to": "reply_" + "x" * 260, "correlation_id": "1"}
    (served.queue / "task_9.json").write_text(json.dumps(long))
    programs.append(Program(binaries / "worker", served.config_path))
    assert programs[0].line() == "ready" and programs[0].line() == "1"
    eventually(lambda: len(served.tasks("completed")) == 1)
    assert len(served.tasks("failed")) == 8 and programs[0].process.poll() is None
    # Five bytes that look like the begin of a frame, and hide none behind them.
    (pipe,) = served.pipes.glob("task_c-*")
    with open(pipe, "wb", buffering=0) as end:
        end.write(b"\0\0\x0f\xf0{")
    assert served.communicator().task_send(2).result(TIMEOUT) == 2
    # Whose claims are gone has lost its life.
    shutil.rmtree(next(served.queue.glob("claimed/c-*")))
    future = served.communicator().task_send(3)
    assert programs[0].process.wait(TIMEOUT) == 1
    served.child(ECHO, "w1")
    assert future.result(TIMEOUT) == 3
    eventually(lambda: not any("c-" in name for name in os.listdir(served.pipes)))
    eventually(lambda: not list((served.config_path / "pipes").glob("worker_c-*")))


@needs_compiler
def test_worker_in_c_knows_what_is_json(served: Broker, binaries: Path, programs: list[Program]) -> None:
    good = [b"0", b"-0.50e+10", b"1E5", b"[ ]", b"NaN", b"[-Infinity,Infinity]"]
    good += [b'"\xc3\xa9\xed\x9f\xbf\xf4\x8f\xbf\xbf"']
    bad = [b"0x10", b"-inf", b"-nan(1)", b"01", b"1.", b".5", b"+1", b"-", b"1e", b"1e+", b"nan", b"infinity", b"1 2"]
    # Of UTF-8: too long, halves of a pair, beyond the last, cut off, and never to be met.
    bad += [b'"%s"' % text for text in (b"\xc0\x80", b"\xe0\x80\x80", b"\xf0\x80\x80\x80", b"\xed\xa0\x80")]
    bad += [b'"%s"' % text for text in (b"\xf4\x90\x80\x80", b"\xe2\x82", b"\x80", b"\xff", b"\0")]
    programs.append(Program(binaries / "worker", served.config_path))
    assert programs[0].line() == "ready"
    for number, text in enumerate(good):
        put_task(served, f"good{number}", b'{"body":' + text + ENVELOPE)
        assert left_for_nobody(served) == b'{"result":' + text + b',"correlation_id":"1"}'
    for number, text in enumerate(bad):
        put_task(served, f"bad{number}", b'{"body":' + text + b"}")
    eventually(lambda: len(list(served.queue.glob("failed/task_bad*.json"))) == len(bad))
    assert len(list(served.queue.glob("completed/task_good*.json"))) == len(good)


@needs_compiler
def test_worker_in_c_makes_the_directories_that_are_gone(
    served: Broker, binaries: Path, programs: list[Program]
) -> None:
    programs.append(Program(binaries / "worker", served.config_path, 1))
    assert programs[0].line() == "ready"
    future = served.communicator().task_send("in hand")
    eventually(lambda: list(served.queue.glob("claimed/*/task_*")))
    shutil.rmtree(served.queue / "completed", ignore_errors=True)
    shutil.rmtree(served.queue / "failed", ignore_errors=True)
    assert future.result(TIMEOUT) == "in hand"
    eventually(lambda: list(served.queue.glob("completed/task_*")))
    put_task(served, "bad", b"no JSON")
    eventually(lambda: os.path.exists(served.queue / "failed" / "task_bad.json"))
    assert (served.queue / "failed" / "task_bad.reason").read_text().startswith("it is no JSON object")
    assert programs[0].process.poll() is None
    # What is no task's name is none, whoever rings for it.
    (pipe,) = served.pipes.glob("task_c-*")
    for name in ("x.y", "x.", ".1", "x.1.2", "x" * 81):
        (served.queue / f"task_{name}.json").write_text('{"body":1}')
        write_frame(pipe, {"type": "ring", "queue": "", "names": [name]})
    put_task(served, "last.12", b'{"body":1}')
    eventually(lambda: os.path.exists(served.queue / "completed" / "task_last.12.json"))
    assert len(list(served.queue.glob("task_*.json"))) == 5


# As a disk that has no room left.
FULL = """
#include <errno.h>
#include <sys/stat.h>
static int no_room(const char *path) { return (void)path, errno = ENOSPC, -1; }
#define mkdir(path, mode) no_room(path)
"""


@needs_compiler
def test_worker_in_c_says_that_there_is_no_room(served: Broker, tmp_path: Path) -> None:
    source = tmp_path / "full.c"
    source.write_text(f'{FULL}#include "{EXAMPLES}/c/worker.c"\n')
    worker = compiled(source, tmp_path / "full")
    said = subprocess.run([worker, served.config_path], check=False, capture_output=True, text=True, timeout=TIMEOUT)
    assert said.returncode == 1 and said.stderr.endswith(": No space left on device\n")
    assert said.stderr.count("\n") == 1
    for draft in served.queue.glob("claimed/.c-*"):
        draft.unlink()


# What cannot be parsed; in the last, what a user sent looks like an end.
BROKEN = [b"nonsense", b"[}]", b'"\xff"', b'"\0"', b"[" * 6000 + b"]" * 6000, b'x,"reply_to":"reply_2_0","y":1']


@needs_compiler
def test_worker_in_c_tells_who_sent_what_cannot_be_parsed(
    served: Broker, binaries: Path, programs: list[Program]
) -> None:
    programs.append(Program(binaries / "worker", served.config_path))
    assert programs[0].line() == "ready"
    for number, body in enumerate(BROKEN):
        put_task(served, str(number), b'{"body":' + body + ENVELOPE.replace(b",", b" , "))
        said = json.loads(left_for_nobody(served))
        assert said.pop("exception").startswith("it is no JSON object") and said == {"correlation_id": "1"}
    put_task(served, "dressed", b'{"body":x' + ENVELOPE[:-1] + b',"dressed":true}')
    assert "exception" in json.loads(left_for_nobody(served))
    # Of what has no such end, or one that wants no answer, nobody is told.
    ends = ENVELOPE + b"x", ENVELOPE.replace(b"false", b"true"), ENVELOPE.replace(b'"1"', b'"\\n"')
    for number, end in enumerate(ends):
        put_task(served, f"unheard{number}", b'{"body":x' + end)
    eventually(lambda: len(list(served.queue.glob("failed/*.json"))) == len(BROKEN) + 4)
    assert not list(served.pipes.glob("body_*"))


@needs_compiler
def test_rpc_server_in_c_tells_who_called_with_what_cannot_be_parsed(
    served: Broker, binaries: Path, programs: list[Program]
) -> None:
    programs.append(Program(binaries / "rpc_server", served.config_path, "r"))
    assert programs[0].line() == "ready"
    (pipe,) = served.pipes.glob("rpc_c-*")
    for body in (body for body in BROKEN if b"\0" not in body and len(body) < 4000):
        write_text(pipe, b'{"to":"r","body":' + body + ENVELOPE)
        assert json.loads(left_for_nobody(served)) == {"exception": "the message cannot be read", "correlation_id": "1"}
    write_text(pipe, b'{"to":"s","body":1' + ENVELOPE)
    assert "undelivered" in json.loads(left_for_nobody(served))
    programs[0].process.send_signal(signal.SIGTERM)
    assert programs[0].process.wait(TIMEOUT) == 0


@needs_compiler
def test_rpc_server_in_c_looks_for_the_bodies_that_are_for_it(
    served: Broker, binaries: Path, programs: list[Program]
) -> None:
    programs.append(Program(binaries / "rpc_server", served.config_path, "r"))
    assert programs[0].line() == "ready"
    (pipe,) = served.pipes.glob("rpc_c-*")
    call = b'{"to":"r","body":1' + ENVELOPE
    # What is no name of a body for this very pipe is not read, whoever rings for it.
    others = [f"body_{pipe.name}.{end}" for end in ("nohex", "A" * 32, "1" * 33, "1" * 31)]
    others += [f"body_{pipe.name}x.{'1' * 32}", f"{pipe.name}.{'1' * 32}"]
    for name in others:
        (served.pipes / name).write_bytes(call)
        write_text(pipe, b'{"body_file":"%s"}' % name.encode())
    write_text(pipe, b'{"body_file":1,' + call[1:])
    for number in range(2):  # Nobody rings for these.
        (served.pipes / f"body_{pipe.name}.{number:032}").write_bytes(call.replace(b"1,", b"2,"))
    for _ in range(2):
        assert left_for_nobody(served) == b'{"result":2,"correlation_id":"1"}'
    assert [name for name in others if not (served.pipes / name).exists()] == []
    for name in others:
        (served.pipes / name).unlink()
    programs[0].process.send_signal(signal.SIGTERM)
    assert programs[0].process.wait(TIMEOUT) == 0


DEEP = 4900


@needs_compiler
def test_programs_in_c_answer_what_is_nested_deeper_than_python_can(
    served: Broker, binaries: Path, programs: list[Program]
) -> None:
    programs.append(Program(binaries / "worker", served.config_path))
    programs.append(Program(binaries / "rpc_server", served.config_path, "r"))
    assert [program.line() for program in programs] == ["ready", "ready"]
    deep = b"[" * DEEP + b"]" * DEEP
    result = b'{"result":' + deep + b',"correlation_id":"1"}'
    put_task(served, "1", b'{"body":' + deep + ENVELOPE)
    assert left_for_nobody(served) == result
    (pipe,) = served.pipes.glob("rpc_c-*")
    body = f"body_{pipe.name}.{'2' * 32}"
    (served.pipes / body).write_bytes(b'{"to":"r","body":' + deep + ENVELOPE)
    write_text(pipe, b'{"body_file":"%s"}' % body.encode())
    assert left_for_nobody(served) == result
    programs[1].process.send_signal(signal.SIGTERM)
    assert programs[1].process.wait(TIMEOUT) == 0


@needs_compiler
def test_rpc_server_in_c_answers_what_has_come_when_it_is_told_to_end(
    served: Broker, binaries: Path, programs: list[Program]
) -> None:
    server = Program(binaries / "rpc_server", served.config_path, "r")
    programs.append(server)
    assert server.line() == "ready"
    (pipe,) = served.pipes.glob("rpc_c-*")
    write_text(pipe, b'{"to":"\\u1","body":1}')
    server.stop()
    caller = served.communicator()
    futures = [caller.rpc_send("r", number) for number in range(50)]
    server.process.send_signal(signal.SIGTERM)
    server.go_on()
    assert [future.result(TIMEOUT) for future in futures] == list(range(50))
    assert server.process.wait(TIMEOUT) == 0


@needs_compiler
def test_worker_in_c_beside_one_in_python(served: Broker, binaries: Path, programs: list[Program]) -> None:
    programs.append(Program(binaries / "worker", served.config_path))
    assert programs[0].line() == "ready"
    served.child(ECHO, "w1")
    sender = served.communicator(fsync=False)
    futures = [sender.task_send(number) for number in range(300)]
    assert [future.result(TIMEOUT) for future in futures] == list(range(300))


@needs_compiler
def test_worker_in_c_that_is_killed_loses_nothing(served: Broker, binaries: Path, programs: list[Program]) -> None:
    worker = Program(binaries / "worker", served.config_path, 30)
    programs.append(worker)
    assert worker.line() == "ready"
    future = served.communicator().task_send("in hand")
    eventually(lambda: list(served.queue.glob("claimed/*/task_*")))
    worker.kill()
    served.child(ECHO, "w1")
    assert future.result(TIMEOUT) == "in hand"
    assert [row["deaths"] for row in served.tasks()] == [1]


SENDS = """
sender = communicator(fsync=False)
print("ready")
sys.stdin.readline()
futures = [sender.task_send("x" * 1000) for _ in range(200)]
print("sent")
print(sum(len(future.result(60)) for future in futures))
sender.close()
"""


@needs_compiler
def test_a_stopped_sender_gets_what_a_worker_in_c_has_done(
    served: Broker, binaries: Path, programs: list[Program]
) -> None:
    sender = served.child(SENDS)
    sender.tell("")
    assert sender.line() == "sent"
    sender.stop()
    worker = Program(binaries / "worker", served.config_path)
    programs.append(worker)
    eventually(lambda: sum(row["state"] == "completed" for row in served.tasks()) == 200)
    worker.kill()
    assert any(name.startswith("body_reply_") for name in os.listdir(served.pipes))
    sender.go_on()
    assert sender.line() == "200000"


@needs_compiler
def test_sender_in_c(served: Broker, binaries: Path, programs: list[Program]) -> None:
    served.child(ECHO, "w1")
    bodies = ["1", '"text"', json.dumps({"a": ["x" * 5000]}), "null"]
    sender = Program(binaries / "sender", served.config_path, *bodies)
    programs.append(sender)
    said = [line.removeprefix("result: ") for line in sender.rest().splitlines()]
    assert sorted(said) == sorted(json.dumps(json.loads(body), separators=(",", ":")) for body in bodies)
    assert sender.process.returncode == 0


@needs_compiler
def test_sender_in_c_frees_what_it_was_given(served: Broker, tmp_path: Path) -> None:
    flags = ["-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover"]
    try:
        sender = compiled(EXAMPLES / "c" / "sender.c", tmp_path / "sender", *flags)
    except subprocess.CalledProcessError:
        pytest.skip("this compiler has no sanitizers")
    served.child(ECHO, "w1")
    said = subprocess.run([sender, served.config_path, "1"], check=False, capture_output=True, timeout=TIMEOUT)
    assert (said.returncode, said.stdout, said.stderr) == (0, b"result: 1\n", b"")


@needs_compiler
def test_rpc_server_in_c(served: Broker, binaries: Path, programs: list[Program]) -> None:
    server = Program(binaries / "rpc_server", served.config_path, "A server.é")
    programs.append(server)
    assert server.line() == "ready"
    caller = served.communicator()
    for body in ([1, 2], "x" * 50_000):
        assert caller.rpc_send("A server.é", body).result(TIMEOUT) == body
    second = Program(binaries / "rpc_server", served.config_path, "A server.é")
    programs.append(second)
    assert second.process.wait(TIMEOUT) == 1
    server.process.send_signal(signal.SIGTERM)
    server.rest()
    assert server.process.returncode == 0
    # Who has ended without a word is buried by the coordinator.
    eventually(lambda: os.listdir(served.queue / "claimed") == [])


@needs_compiler
def test_listener_in_c(served: Broker, binaries: Path, programs: list[Program]) -> None:
    listener = Program(binaries / "listener", served.config_path)
    programs.append(listener)
    assert listener.line() == "ready"
    sender = served.communicator()
    for body in ({"a": 1}, "x" * 10_000):
        sender.broadcast_send(body, "me", "subject", "c1")
        said = {"body": body, "sender": "me", "subject": "subject", "correlation_id": "c1"}
        assert json.loads(listener.line()) == said
    write_text(served.pipes / "coordinator_broadcast", b'{"body":\n1}')
    assert json.loads(listener.line()) == {"body": 1}
    listener.kill()
    eventually(lambda: os.listdir(served.queue / "claimed") == [])


@needs_compiler
def test_programs_in_c_say_why_they_cannot(tmp_path: Path, binaries: Path) -> None:
    for name in ("worker", "sender", "rpc_server", "listener"):
        for arguments in ([], [tmp_path, "1"], [tmp_path / "nowhere", "1"]):
            said = subprocess.run(
                [binaries / name, *arguments], check=False, capture_output=True, text=True, timeout=TIMEOUT
            )
            assert said.returncode == 1 and said.stderr.count("\n") == 1 and said.stdout == ""


# Shell


needs_flock = pytest.mark.skipif(shutil.which("flock") is None, reason="there is no flock(1) here")


def in_shell(served: Broker, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run the worker in shell, with the programs in `path` before all others."""
    searched = os.pathsep.join([*([str(path)] if path else []), os.environ["PATH"]])
    return subprocess.run(
        ["sh", EXAMPLES / "worker.sh", served.config_path],
        check=False,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        env={**os.environ, "PATH": searched},
    )


@needs_flock
def test_worker_in_shell_uses_nothing_that_is_not_for_it(served: Broker, tmp_path: Path) -> None:
    (served.queue / "task_1.json").write_text("no JSON")

    def refuses(why: str) -> None:
        said = in_shell(served)
        assert said.returncode == 1 and why in said.stderr and said.stderr.count("\n") == 1 and said.stdout == ""
        assert (served.queue / "task_1.json").exists() and not list(served.queue.glob("claimed/*sh-*"))

    pipes, link, mark = served.pipes, served.config_path / "pipes" / "directory", served.pipes / ".config"
    target, owner, known = os.readlink(link), os.readlink(mark), (served.queue / "format").read_text()
    try:
        for mode in (0o777, 0o701, 0o710):
            pipes.chmod(mode)
            refuses("is no directory for its user alone")
        pipes.chmod(0o700)
        if os.geteuid() == 0:
            os.chown(pipes, 65534, -1)
            refuses("is another user's")
            os.chown(pipes, 0, -1)
        mark.unlink()
        refuses("is not for")
        mark.symlink_to(tmp_path)
        refuses("is not for")
        mark.unlink()
        mark.symlink_to(owner)
        link.unlink()
        refuses("no broker runs")
        link.symlink_to(tmp_path / "nowhere")
        refuses("no broker runs")
        (tmp_path / "another").symlink_to(target)
        link.unlink()
        link.symlink_to(tmp_path / "another")
        refuses("is no directory")
        link.unlink()
        link.symlink_to(target)
        for other in ('{"format": 2, "profile": "\\"format\\": 1,"}', '{"format": 10}', "{}", ""):
            (served.queue / "format").write_text(other)
            refuses("has a format")
    finally:
        (served.queue / "format").write_text(known)
        (served.queue / "task_1.json").unlink()


@needs_flock
def test_worker_in_shell_says_that_there_is_no_room(served: Broker, tmp_path: Path) -> None:
    (tmp_path / "mkdir").write_text('#!/bin/sh\necho "mkdir: no room" >&2\nexit 1\n')
    (tmp_path / "mkdir").chmod(0o700)
    said = in_shell(served, tmp_path)
    assert (said.returncode, said.stderr) == (1, "mkdir: no room\n")
    for draft in served.queue.glob("claimed/.sh-*"):
        draft.unlink()


@needs_flock
def test_worker_in_shell_makes_the_directories_that_are_gone(served: Broker, tmp_path: Path) -> None:
    # When the worker counts the bytes of its task, somebody tidies up.
    (tmp_path / "wc").write_text(f"#!/bin/sh\nrm -r {served.queue}/completed {served.queue}/failed\necho 1\n")
    (tmp_path / "wc").chmod(0o700)
    (served.queue / "task_0.json").write_text("no JSON")
    (served.queue / "task_1.json").write_bytes(b'{"body":1' + ENVELOPE)
    assert in_shell(served, tmp_path).returncode == 0
    assert left_for_nobody(served) == b'{"result":"a task of 1 bytes","correlation_id":"1"}'
    assert (served.queue / "completed" / "task_1.json").exists()
    assert (served.queue / "completed").stat().st_mode & 0o777 == 0o700


@needs_flock
def test_worker_in_shell_tells_who_sent_what_is_no_json_object(served: Broker) -> None:
    for text in (b"nonsense", b"[1]", b"{body:1", b'x\n{"body":1'):
        (served.queue / "task_1.json").write_bytes(text + ENVELOPE)
        assert in_shell(served).returncode == 1
        said = {"exception": "it is no JSON object with a body", "correlation_id": "1"}
        assert json.loads(left_for_nobody(served)) == said
        assert (served.queue / "failed" / "task_1.reason").read_text() == said["exception"]
    # Of what says nobody who sent it, nobody is told.
    for number, text in enumerate((b"", b"{}", b"{}" + ENVELOPE.replace(b"111", b"11"))):
        (served.queue / f"task_unheard{number}.json").write_bytes(text)
    assert in_shell(served).returncode == 1
    assert len(list(served.queue.glob("failed/task_*.json"))) == 4
    assert not list(served.pipes.glob("body_*"))


@needs_flock
def test_worker_in_shell(served: Broker) -> None:
    command = ["sh", EXAMPLES / "worker.sh", served.config_path]
    assert subprocess.run(command, check=False, timeout=TIMEOUT).returncode == 1
    future = served.communicator().task_send("for a shell")
    assert subprocess.run(command, check=False, timeout=TIMEOUT).returncode == 0
    assert future.result(TIMEOUT).startswith("a task of ")
    # Dressed, and with what looks like an envelope in its body; and one whose sender wants no outcome.
    tricky = served.communicator().task_send(
        {uuid.uuid4().hex: uuid.uuid4(), "x": '","no_reply":false,"reply_to":"reply_1_0","correlation_id":"1"}'}
    )
    assert subprocess.run(command, check=False, timeout=TIMEOUT).returncode == 0
    assert tricky.result(TIMEOUT).startswith("a task of ")
    # What it cannot do it leaves to others, and what has no task's name where it is.
    done = '{"body":1,"no_reply":true,"reply_to":null,"correlation_id":null}'
    others = ["a b", "x.y", "x.1.2", "x.", ".1", "x" * 81]
    for name, text in (("0", '{"body":1}\n\n'), ("1", '{"body":1}'), *((name, done) for name in others)):
        (served.queue / f"task_{name}.json").write_text(text)
    os.mkfifo(served.queue / "task_2.json")
    served.communicator().task_send("unheard", no_reply=True)
    assert subprocess.run(command, check=False, timeout=TIMEOUT).returncode == 0
    assert sorted(row["state"] for row in served.tasks()) == ["completed"] * 3 + ["waiting"] * 3
    assert all((served.queue / f"task_{name}.json").exists() for name in others)
    (served.queue / "task_2.json").unlink()
    with contextlib.suppress(FileNotFoundError):
        assert os.listdir(served.queue / "claimed") == []
