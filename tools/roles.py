"""The processes of a benchmark that work and send, with whichever communicator is measured.

    python tools/roles.py work|send|crowd KIND PLACE ...

Which edition of this broker they import is for ``PYTHONPATH`` to say, so nothing else of ours is imported here.
"""

from __future__ import annotations

import collections
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

PIPES, UNSYNCED, ZEROMQ, RABBIT = "pipes", "pipes, fsync off", "ZeroMQ", "RabbitMQ"
IN_FLIGHT = 100


def connect(kind: str, place: str) -> Any:
    """Make a communicator."""
    if kind in (PIPES, UNSYNCED):
        from pipebroker import PipeCommunicator

        profile, _, config_path = place.partition(":")
        return PipeCommunicator(profile, config_path, fsync=kind == PIPES)
    if kind == ZEROMQ:
        from aiida.brokers.zeromq.communicator import ZeromqCommunicator

        communicator = ZeromqCommunicator(router_endpoint=place)
        communicator.start()
        return communicator
    import kiwipy.rmq

    return kiwipy.rmq.RmqThreadCommunicator.connect(connection_params={"url": place})


def work(kind: str, place: str, name: str) -> None:
    """Do tasks, answer calls and count broadcasts, until standard input ends."""
    communicator = connect(kind, place)
    done = collections.Counter[str]()

    def do(_: Any, body: Any) -> Any:
        done["tasks"] += 1
        return body

    def hear(_: Any, body: Any, *rest: Any) -> None:
        if body == "last":
            print("heard", flush=True)

    if name != "listener":
        communicator.add_task_subscriber(do)
        communicator.add_rpc_subscriber(lambda _, body: body if isinstance(body, int) else len(body), name)
        communicator.add_rpc_subscriber(lambda *_: done["tasks"], f"done by {name}")
    else:
        communicator.add_broadcast_subscriber(hear)
        # ZeroMQ's broadcasts reach only those who subscribe to something else too.
        communicator.add_rpc_subscriber(lambda *_: None, f"listener {os.getpid()}")
    print("ready", flush=True)
    sys.stdin.read()
    communicator.close()


def send(kind: str, place: str) -> None:
    """Do what standard input says, a line of JSON each, and print how long it took."""
    communicator = connect(kind, place)
    print("ready", flush=True)
    for line in sys.stdin:
        what, *arguments = json.loads(line)
        print(json.dumps(ACTIONS[what](communicator, *arguments)), flush=True)
    communicator.close()


def one_by_one(call: Callable[[int], Any], number: int) -> float:
    """Return the median of the seconds that a call and its answer take."""
    times = []
    for index in range(number):
        begin = time.perf_counter()
        call(index).result(60)
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def many(call: Callable[[int], Any], number: int) -> float:
    """Return the seconds that so many calls take, `IN_FLIGHT` at a time."""
    pending: collections.deque[Any] = collections.deque()
    begin = time.perf_counter()
    for index in range(number):
        if len(pending) == IN_FLIGHT:
            pending.popleft().result(60)
        pending.append(call(index))
    for future in pending:
        future.result(60)
    return time.perf_counter() - begin


def broadcast(communicator: Any, number: int) -> float:
    """Send so many broadcasts, the last of which says so."""
    begin = time.perf_counter()
    for _ in range(number - 1):
        communicator.broadcast_send("news")
    communicator.broadcast_send("last")
    return time.perf_counter() - begin


def burst(communicator: Any, number: int) -> int:
    """Send so many tasks as fast as it goes; return how many were done when no more were for five seconds."""
    before = communicator.rpc_send("done by worker", None).result(60)
    for index in range(number):
        communicator.task_send(index, no_reply=True)
    done, since = 0, time.monotonic()
    while done < number and time.monotonic() - since < 5:
        with contextlib.suppress(Exception):  # A broker that drops tasks may drop calls too.
            now = communicator.rpc_send("done by worker", None).result(2) - before
            if now > done:
                done, since = now, time.monotonic()
        threading.Event().wait(0.05)
    return done


def pull(communicator: Any, queue: str, number: int, seconds: float) -> float:
    """Take tasks and give them back, so many times or for so long; return the median of the seconds of one."""
    tasks, times, end = communicator.task_queue(queue), [], time.monotonic() + seconds
    while len(times) < number and time.monotonic() < end:
        begin = time.perf_counter()
        with tasks.next_task() as task, task.processing() as outcome:
            outcome.set_result(None)
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def fill(communicator: Any, queue: str, number: int) -> None:
    """Have so many tasks wait."""
    tasks = communicator.task_queue(queue)
    for index in range(number):
        tasks.task_send(index, no_reply=True)


ACTIONS: dict[str, Callable[..., Any]] = {
    "call": lambda communicator, number: one_by_one(lambda i: communicator.rpc_send("worker", i), number),
    "calls": lambda communicator, number: many(lambda i: communicator.rpc_send("worker", i), number),
    "body": lambda communicator, size, number: one_by_one(
        lambda _, body="x" * size: communicator.rpc_send("worker", body), number
    ),
    "task": lambda communicator, number: one_by_one(communicator.task_send, number),
    "tasks": lambda communicator, number: many(communicator.task_send, number),
    "broadcast": broadcast,
    "burst": burst,
    "fill": fill,
    "pull": pull,
}


def crowd(kind: str, place: str, count: str, routes: str) -> None:
    """Fork so many workers, who all come when they are told to, and die when standard input ends."""
    import pipebroker  # noqa: F401  # Which is not what is measured.

    go, told = os.pipe()
    heard, here = os.pipe()
    children = []
    for _ in range(int(count)):
        if not (pid := os.fork()):
            os.close(told)
            os.read(go, 1)
            communicator = connect(kind, place)
            communicator.add_task_subscriber(lambda _, body: body)
            for number in range(int(routes)):
                communicator.add_rpc_subscriber(lambda _, body: body, f"{os.getpid()}.{number}")
            os.write(here, b"x")
            signal.pause()
        children.append(pid)
    print("ready", flush=True)
    sys.stdin.readline()
    os.close(told)
    for _ in children:
        os.read(heard, 1)
    print("here", flush=True)
    sys.stdin.readline()
    for pid in children:
        os.kill(pid, signal.SIGKILL)
    for pid in children:
        os.waitpid(pid, 0)
    print("dead", flush=True)


class Process:
    """A process in a role."""

    def __init__(self, role: str, *arguments: str, path: str | None = None) -> None:
        """:param path: where it finds this broker's modules; `None`: as we do."""
        env = {**os.environ, "PYTHONPATH": path or os.pathsep.join(filter(None, sys.path))}
        # ZeroMQ's has much to say of what it drops.
        silent = subprocess.DEVNULL if ZEROMQ in arguments else None
        self._process = subprocess.Popen(
            [sys.executable, __file__, role, *arguments],
            env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=silent, text=True,
        )  # fmt: skip
        assert self.line() == "ready", f"{role} {arguments} did not start"

    def line(self) -> str:
        """Return the next line that it prints."""
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def tell(self, line: str) -> None:
        """Give it a line."""
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()

    def ask(self, *action: Any) -> Any:
        """Have a sender do something, and return what it says."""
        self.tell(json.dumps(action))
        return json.loads(self.line())

    def signal(self, number: int) -> None:
        """Send it a signal."""
        self._process.send_signal(number)

    def end(self) -> None:
        """End it."""
        try:
            self._process.communicate(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()


if __name__ == "__main__":
    {"work": work, "send": send, "crowd": crowd}[sys.argv[1]](*sys.argv[2:])
