"""What the tests, the torture and the benchmark share: waiting for what no event tells, real processes, a profile."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from vendor import MODULES

HERE = Path(__file__).resolve().parent.parent
TIMEOUT = 30.0
COORDINATOR = (sys.executable, HERE / "coordinator.py")
OTHER_USER = 12345
# Every module is loaded first, and what a command loads late: afterwards this process may not read them.
AS_OTHER_USER = f"""
import concurrent.futures.thread, contextlib, gettext, hashlib, importlib, io, json.decoder, locale, multiprocessing, os
import resource, shutil, signal, subprocess, sys, threading, unicodedata, uuid
sys.path.insert(0, {str(HERE)!r})
for name in {[name.removesuffix(".py") for name in MODULES]}:
    with contextlib.suppress(ImportError):
        globals()[name] = importlib.import_module(name)
with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
    coordinator.main(["--profile=x", "--config-path=/nonexistent", "status"])
os.setgroups([]); os.setgid({OTHER_USER}); os.setuid({OTHER_USER})
"""
PRELUDE = """
import os, sys, time
import kiwipy
from pipebroker import PipeCommunicator
profile, config_path, *arguments = sys.argv[1:]
def print(*values):
    # With one write, so that two threads do not mix their lines.
    sys.stdout.write(" ".join(map(str, values)) + "\\n")
def communicator(worker_id=None, **options):
    return PipeCommunicator(profile, config_path, worker_id, **options)
"""
WORKER = """
worker = communicator(arguments[0] if arguments else None)
worker.add_task_subscriber(lambda _, body: print(body) or body)
worker.add_rpc_subscriber(lambda _, body: [os.getpid(), body], worker.worker_id)
worker.add_broadcast_subscriber(lambda _, *message: print(list(message)))
print("ready"); sys.stdin.read(); worker.close()
"""
ECHO = """
worker = communicator(arguments[0])
worker.add_task_subscriber(lambda _, body: body)
worker.add_rpc_subscriber(lambda _, body: body, arguments[0])
print("ready"); sys.stdin.read(); worker.close()
"""
# Writes each body that it works on to a file, one write a line, so that the file is the evidence.
RECORDER = """
record = os.open(arguments[0], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
worker = communicator()
worker.add_task_subscriber(lambda _, body: os.write(record, f"{body}\\n".encode()))
print("ready"); sys.stdin.read(); worker.close()
"""
# Holds whatever it gets for ever.
HOLDER = """
worker = communicator(arguments[0])
worker.add_task_subscriber(lambda *_: kiwipy.Future())
worker.add_rpc_subscriber(lambda *_: kiwipy.Future(), arguments[0])
print("ready"); sys.stdin.read()
"""
PULLER = """
tasks = iter(communicator(arguments[0]).task_queue("kiwipy.tasks"))
task = next(tasks)
print("ready"); sys.stdin.read()
"""
SENDER = """
print("ready"); sys.stdin.readline()
with communicator(fsync=False) as sender:
    for number in range(int(arguments[1])):
        sender.task_send(f"{arguments[0]}-{number}", no_reply=True)
"""
# Each line that it is given is one more worker, made by fork(2), as starting a process takes long.
FORKER = """
import signal, threading
from pathlib import Path
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
print("ready")
for line in sys.stdin:
    if os.fork() == 0:
        break
else:
    os._exit(0)
def note(text):
    record = os.open(arguments[0], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(record, f"{text}\\n".encode())
    os.close(record)
worker = communicator()
"""
HOARD = """
import resource
soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (100, hard))
hoard = []
def use_up():
    # How many were free: another thread may have had one in hand the last time.
    before = len(hoard)
    try:
        while True:
            hoard.append(os.dup(0))
    except OSError:
        return len(hoard) - before
def free():
    while hoard:
        os.close(hoard.pop())
"""


def eventually(condition: Callable[[], Any], seconds: float = TIMEOUT) -> Any:
    """Wait for what no event tells, and return it."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not within {seconds} s: {condition}"
        select.select([], [], [], 0.01)
    return value


def within(condition: Callable[[], Any], seconds: float) -> bool:
    """Say whether a condition comes true, for where an explanation is to follow if not."""
    try:
        return bool(eventually(condition, seconds))
    except AssertionError:
        return False


def is_gone(pid: int) -> bool:
    """Say whether a process has ended, though its parent may not have looked."""
    said = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True, check=False)
    return said.stdout.strip()[:1] in ("", "Z")


def _path() -> list[str]:
    return [path for path in [os.environ.get("PYTHONPATH")] if path]


class Child:
    """A process that runs a script; its lines can be waited for, and its standard input ends it."""

    def __init__(self, script: str, *arguments: object) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", script, *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), *_path()]), "PYTHONUNBUFFERED": "1"},
        )
        self.pid = self.process.pid
        self._rest = b""

    def line(self, seconds: float = TIMEOUT) -> str:
        """Return the next line it prints."""
        assert self.process.stdout is not None
        while b"\n" not in self._rest:
            ready, _, _ = select.select([self.process.stdout], [], [], seconds)
            assert ready, f"no line within {seconds} s"
            data = os.read(self.process.stdout.fileno(), 65536)
            assert data, f"it ended with status {self.process.wait()}"
            self._rest += data
        line, self._rest = self._rest.split(b"\n", 1)
        return line.decode()

    def tell(self, line: str) -> None:
        """Give it a line."""
        assert self.process.stdin is not None
        self.process.stdin.write(line.encode() + b"\n")
        self.process.stdin.flush()

    def kill(self) -> None:
        """Kill it with SIGKILL."""
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        """Stop it with SIGSTOP, and wait until all its threads have."""
        os.kill(self.pid, signal.SIGSTOP)
        os.waitpid(self.pid, os.WUNTRACED)

    def go_on(self) -> None:
        """Let it go on after `stop`."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGCONT)

    def end(self, seconds: float = TIMEOUT) -> int:
        """End its standard input, and return its exit status."""
        assert self.process.stdin is not None and self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        try:
            return self.process.wait(seconds)
        finally:
            self.process.stdout.close()


class Broker:
    """A profile, and what talks to it."""

    def __init__(self, directory: Path) -> None:
        self.profile = f"test-{uuid.uuid4().hex[:12]}"
        self.config_path = directory / self.profile
        self.stack = contextlib.ExitStack()

    @property
    def pipes(self) -> Path:
        return Path(f"/tmp/aiida_{self.profile}_pipes")

    @property
    def queue(self) -> Path:
        return self.config_path / "coordinator"

    def communicator(self, worker_id: str | None = None, **options: Any) -> Any:
        """Make a communicator in this process."""
        from pipebroker import PipeCommunicator

        made = PipeCommunicator(self.profile, self.config_path, worker_id, **options)
        self.stack.callback(made.close)
        return made

    def child(self, script: str, *arguments: object) -> Child:
        """Run a script, with the profile and its directory as its first arguments, and wait for its first line."""
        process = self.spawn(script, *arguments)
        assert process.line() == "ready"
        return process

    def spawn(self, script: str, *arguments: object) -> Child:
        """Run a script, as `child` does, without waiting."""
        process = Child(PRELUDE + script, self.profile, self.config_path, *arguments)
        self.stack.callback(self._end, process)
        return process

    def run(self, *arguments: str, status: int = 0) -> str:
        """Run the command line."""
        result = subprocess.run(
            [*COORDINATOR, "--profile", self.profile, "--config-path", self.config_path, *arguments],
            check=False,
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
        )
        assert result.returncode == status, f"{result.returncode}: {result.stdout}{result.stderr}"
        assert "Traceback" not in result.stderr
        return result.stdout + result.stderr

    def start(self) -> int:
        """Start a coordinator, and return its pid."""
        import control

        pid = control.start(self.profile, self.config_path)
        self.stack.callback(control.stop, self.config_path)
        return pid

    def status(self) -> dict[str, Any]:
        """Return what the command line says of how things are."""
        command = [*COORDINATOR, "--profile", self.profile, "--config-path", self.config_path, "status", "--json"]
        said = subprocess.run(command, check=False, capture_output=True, text=True, timeout=TIMEOUT)
        answer: dict[str, Any] = json.loads(said.stdout)
        return answer

    def tasks(self, state: str | None = None) -> list[dict[str, Any]]:
        """Return what the command line says of the tasks."""
        said = json.loads(self.run("tasks", "--json", *(["--state", state] if state else [])))
        assert said["version"] == 1
        rows: list[dict[str, Any]] = said["tasks"]
        return rows

    def log(self) -> str:
        """Return the coordinator's log."""
        return (self.queue / "coordinator.log").read_text()

    def _end(self, process: Child) -> None:
        process.go_on()
        try:
            process.end()
        except subprocess.TimeoutExpired:
            process.kill()
            raise


def recorded(path: Path) -> list[str]:
    return path.read_text().split() if path.exists() else []


def write_frame(fifo: Path, message: object) -> None:
    """Write one message into a FIFO, as a stranger would who has read no more than what a frame is."""
    text = json.dumps(message).encode()
    descriptor = os.open(fifo, os.O_WRONLY | os.O_NONBLOCK)
    try:
        os.write(descriptor, len(text).to_bytes(4, "big") + text)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def at_home(home: Path) -> Iterator[Path]:
    """Give a user the profile that the texts name, and its coordinator."""
    import control
    import directories

    config = home / ".aiida" / "profiles" / "my_profile"
    control.start("my_profile", config)
    try:
        yield home
    finally:
        control.stop(config)
        layout = directories.locate(config)
        assert layout is not None
        directories.remove_pipes(layout.pipes)
