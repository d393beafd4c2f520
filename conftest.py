"""Fixtures: a profile of its own for each test, real processes, and a check that nothing is left behind."""

from __future__ import annotations

import contextlib
import gc
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import burial
import directories
from harness import Broker, eventually

# A shell that runs the suite in the background, and nohup, have some ignored, and children would inherit that.
for ignored in (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP):
    if signal.getsignal(ignored) is signal.SIG_IGN:
        signal.signal(ignored, signal.default_int_handler if ignored == signal.SIGINT else signal.SIG_DFL)


# Users do not have it, and it hides what is lost in a buffer.
os.environ.pop("PYTHONUNBUFFERED", None)


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[Broker]:
    """A profile without a coordinator."""
    made = Broker(tmp_path)
    try:
        yield made
        made.stack.close()
        left = sorted(path.name for path in made.pipes.iterdir()) if made.pipes.exists() else []
        # The intakes and broadcasts wait for a coordinator, and outcomes for a sender that may have lost its pipe.
        kept = (".config", "coordinator_", "kept_", "body_reply_")
        assert [name for name in left if not name.startswith(kept)] == []
        registry = made.config_path / "pipes"
        assert sorted(path.name for path in registry.glob("worker_*")) == []
        layout = directories.locate(made.config_path)
        if layout is not None:
            # What a worker left that died without a coordinator is for whoever comes next.
            burial.clean_up(layout)
        for path, below, beside in os.walk(made.queue):  # Some tests leave what cannot be looked at.
            assert below + beside == [] or os.path.basename(path) != "claimed"
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
