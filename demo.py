"""The main job in front of your eyes: ``python demo.py``. Exit status 0 if nothing was lost."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import control
import directories
from pipebroker import PipeCommunicator

PROFILE = f"demo{os.getpid()}"
TIMEOUT = 15.0


def worker(profile: str, config_path: str, name: str) -> None:
    """Work on tasks until standard input ends."""
    with PipeCommunicator(profile, config_path, name) as communicator:

        def work(_: Any, task: dict[str, Any]) -> dict[str, Any]:
            print("started", task["number"], flush=True)
            time.sleep(task["seconds"])  # The work.
            return {"number": task["number"], "worker": name}

        communicator.add_task_subscriber(work)
        communicator.add_rpc_subscriber(lambda _, message: f"{name} heard {message!r}", name)
        communicator.add_broadcast_subscriber(lambda _, body, *rest: print("heard", body, flush=True))
        print("ready", flush=True)
        sys.stdin.read()


def say(text: str) -> None:
    """Print a line with the time since the start."""
    try:
        print(f"{time.monotonic() - BEGIN:6.2f} s  {text}", flush=True)
    except OSError:
        # Nobody reads any more; the exit status still says how it went. (Python's documentation of SIGPIPE.)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def line_of(process: subprocess.Popen[str], word: str) -> str:
    """Return the next line that a worker prints and that starts with a word."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(word):
            return line.strip()
    raise RuntimeError(f"a worker ended before it said '{word}'")


def main(config_path: Path, stack: contextlib.ExitStack) -> None:
    """Run the show."""
    pid = control.start(PROFILE, config_path)
    stack.callback(control.stop, config_path)
    say(f"A coordinator serves, pid {pid}.")

    workers: dict[str, subprocess.Popen[str]] = {}
    for name in ("ada", "bob", "cleo"):
        command = [sys.executable, __file__, PROFILE, str(config_path), name]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        workers[name] = process
        stack.callback(process.wait, TIMEOUT)
        stack.callback(process.stdin.close)  # type: ignore[union-attr]
    for name, process in workers.items():
        line_of(process, "ready")
        say(f"Worker {name} is ready, pid {process.pid}.")

    sender = stack.enter_context(PipeCommunicator(PROFILE, config_path))

    def send(numbers: range, seconds: float) -> list[Any]:
        return [sender.task_send({"number": number, "seconds": seconds}) for number in numbers]

    def collect(futures: list[Any], numbers: range) -> dict[str, int]:
        answers = [future.result(TIMEOUT) for future in futures]
        if [answer["number"] for answer in answers] != list(numbers):
            raise RuntimeError(f"sent {list(numbers)}, got {answers}")
        names = [answer["worker"] for answer in answers]
        return {name: names.count(name) for name in sorted(set(names))}

    begin = time.monotonic()
    futures = send(range(300), 0.001)
    say(f"300 tasks are on the disk after {time.monotonic() - begin:.2f} s.")
    shares = collect(futures, range(300))
    say(f"All 300 are done after {time.monotonic() - begin:.2f} s: {shares}.")

    begin = time.monotonic()
    answer = sender.rpc_send("bob", "good morning").result(TIMEOUT)
    say(f"RPC after {(time.monotonic() - begin) * 1e6:.0f} µs: {answer}.")

    sender.broadcast_send("hello everybody", sender="demo", subject="greeting")
    for name, process in workers.items():
        say(f"Broadcast: {name} {line_of(process, 'heard')}.")

    futures = send(range(1000, 1003), 0.5)
    line = line_of(workers["ada"], "started 1")
    say(f"ada has {line}. Killing ada with SIGKILL in the middle of it.")
    workers["ada"].kill()
    shares = collect(futures, range(1000, 1003))
    say(f"All 3 are done nevertheless: {shares}.")

    os.kill(pid, signal.SIGKILL)
    say("Killed the coordinator with SIGKILL.")
    say(f"RPC goes on without it: {sender.rpc_send('cleo', 'still there?').result(TIMEOUT)}.")
    futures = send(range(2000, 2100), 0.001)
    counts = control.status(config_path)["tasks"]
    say(f"100 tasks more were sent; on the disk are {counts['waiting']} waiting.")
    say(f"A new coordinator serves, pid {control.start(PROFILE, config_path)}.")
    say(f"All 100 are done: {collect(futures, range(2000, 2100))}.")
    # The last outcome is there before its task has moved on.
    control.drain(config_path, TIMEOUT)
    counts = control.status(config_path)["tasks"]
    say(f"On the disk: {counts['completed']} completed, {counts['waiting']} waiting, {counts['claimed']} claimed.")
    if counts != {"waiting": 0, "claimed": 0, "completed": 403, "failed": 0}:
        raise RuntimeError(f"403 tasks were sent; on the disk are {counts}")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        worker(*sys.argv[1:])
        sys.exit()
    BEGIN = time.monotonic()
    directory = Path(tempfile.mkdtemp(prefix="namedpipe-demo-"))
    status = 1
    try:
        with contextlib.ExitStack() as everything:
            main(directory, everything)
        say("Nothing was lost.")
        status = 0
    except KeyboardInterrupt:
        say("Interrupted.")
    except Exception as error:
        say(f"FAILED: {type(error).__name__}: {error}")
    finally:
        layout = directories.locate(directory)
        if layout is not None:
            shutil.rmtree(layout.pipes, ignore_errors=True)
        shutil.rmtree(directory, ignore_errors=True)
    sys.exit(status)
