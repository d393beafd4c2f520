"""Fixtures: a profile of its own for each test, real processes, and a check that nothing is left behind."""

from __future__ import annotations

import contextlib
import gc
import os
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import taskqueue

HERE = Path(__file__).resolve().parent
TIMEOUT = 30.0
COORDINATOR = (sys.executable, HERE / "coordinator.py")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell that runs the suite in the background has it ignored, and children would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def eventually(condition: Callable[[], Any], seconds: float = TIMEOUT) -> Any:
    """Wait for what no event tells, and return it."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not within {seconds} s: {condition}"
        select.select([], [], [], 0.01)
    return value


def is_gone(pid: int) -> bool:
    """Say whether a process has ended, though its parent may not have looked."""
    said = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True, check=False)
    return said.stdout.strip()[:1] in ("", "Z")


class Child:
    """A process that runs a script; its lines can be waited for, and its standard input ends it."""

    def __init__(self, script: str, *arguments: object) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", script, *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(HERE), "PYTHONUNBUFFERED": "1"},
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
        import coordinator

        pid = coordinator.start(self.profile, self.config_path)
        self.stack.callback(coordinator.stop, self.config_path)
        return pid

    def log(self) -> str:
        """Return the coordinator's log."""
        return (self.queue / "coordinator.log").read_text()

    def _end(self, process: Child) -> None:
        with contextlib.suppress(OSError):
            os.kill(process.pid, signal.SIGCONT)
        try:
            process.end()
        except subprocess.TimeoutExpired:
            process.kill()
            raise


PRELUDE = """
import os, sys, time
import kiwipy
from pipebroker import PipeCommunicator
profile, config_path, *arguments = sys.argv[1:]
def communicator(worker_id=None, **options):
    return PipeCommunicator(profile, config_path, worker_id, **options)
"""


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[Broker]:
    """A profile without a coordinator."""
    made = Broker(tmp_path)
    try:
        yield made
        made.stack.close()
        left = sorted(path.name for path in made.pipes.iterdir()) if made.pipes.exists() else []
        # An intake whose coordinator was killed waits for the next one.
        assert [name for name in left if not name.startswith((".config", "coordinator_"))] == []
        registry = made.config_path / "pipes"
        assert sorted(path.name for path in registry.glob("worker_*")) == []
        for claims in made.queue.rglob("claimed"):
            # What a worker left that died without a coordinator is for whoever comes next.
            list(taskqueue.TaskQueue(claims.parent).recover(lambda _: True))
            assert sorted(claims.iterdir()) == []
    finally:
        made.stack.close()
        if made.pipes.is_dir() and not made.pipes.is_symlink():
            shutil.rmtree(made.pipes, ignore_errors=True)
        else:
            # What a test of squatters left that failed; rmtree would wait for ever for a FIFO's writer.
            made.pipes.unlink(missing_ok=True)


@pytest.fixture
def served(broker: Broker) -> Broker:
    """A profile with a coordinator."""
    broker.start()
    return broker


def _descriptors() -> set[str]:
    directory = "/proc/self/fd" if os.path.isdir("/proc/self/fd") else "/dev/fd"
    found = set()
    for name in os.listdir(directory):
        with contextlib.suppress(OSError):
            found.add(f"{name}: {os.readlink(f'{directory}/{name}')}")
    return {entry for entry in found if directory not in entry and not entry.endswith(f"/{os.getpid()}/fd")}


@pytest.fixture(autouse=True)
def nothing_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """Check that a test leaves no thread, descriptor or child process."""
    gc.collect()
    threads, descriptors = set(threading.enumerate()), _descriptors()
    if "broker" in request.fixturenames:
        broker = request.getfixturevalue("broker")
        yield
        broker.stack.close()
    else:
        yield
    gc.collect()
    eventually(lambda: set(threading.enumerate()) <= threads, 5.0)
    eventually(lambda: _descriptors() <= descriptors, 5.0)
    with contextlib.suppress(ChildProcessError):
        assert os.waitpid(-1, os.WNOHANG) == (0, 0), "a child process was left"
        raise AssertionError("a child process is still running")
