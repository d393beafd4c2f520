"""How fast, beside AiiDA's ZeroMQ broker, RabbitMQ and a bare FIFO: the same work, in turn, in one run.

    python tools/benchmark.py                 # all that is installed here, as a table with ratios
    python tools/benchmark.py --growth        # how the cost grows with senders, workers, bodies and waiting tasks
    python tools/benchmark.py --json FILE --svg FILE

ZeroMQ needs ``aiida-core>=2.9`` and RabbitMQ needs ``kiwipy[rmq]`` in this Python, and Debian's ``rabbitmq-server``.
Each broker has its own process, and so has each sender and worker. A figure is the median of the rounds; brokers take
turns in each round, so that a noisy moment does not fall on one of them alone. Tasks are on the disk in every broker,
but only this one (unless `fsync` is off) and RabbitMQ wait until the disk has them.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import contextlib
import importlib.util
import json
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent.parent / "tests")]

import control
import directories
import taskqueue
from harness import HERE
from pipebroker import PipeCommunicator

RABBITMQ = Path("/usr/lib/rabbitmq/bin/rabbitmq-server")
PROFILE = f"benchmark{os.getpid()}"
SENDERS, SUBSCRIBERS, IN_FLIGHT, BURST = 4, 4, 100, 5000
PIPES, UNSYNCED, ZEROMQ, RABBIT = "pipes", "pipes, fsync off", "ZeroMQ", "RabbitMQ"

# The processes that work and send


def connect(kind: str, place: str) -> Any:
    """Make a communicator."""
    if kind in (PIPES, UNSYNCED):
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
    """Send so many tasks as fast as it goes; return how many were done when no more were for two seconds."""
    before = communicator.rpc_send("done by worker", None).result(60)
    for index in range(number):
        communicator.task_send(index, no_reply=True)
    done, since = 0, time.monotonic()
    while done < number and time.monotonic() - since < 2:
        now = communicator.rpc_send("done by worker", None).result(60) - before
        if now > done:
            done, since = now, time.monotonic()
        threading.Event().wait(0.05)
    return done


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
}


class Process:
    """A worker or a sender."""

    def __init__(self, *arguments: str) -> None:
        command = [sys.executable, __file__, *arguments]
        # ZeroMQ's has much to say of what it drops.
        silent = subprocess.DEVNULL if ZEROMQ in arguments else None
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=silent, text=True
        )
        assert self.line() == "ready", f"{arguments} did not start"

    def line(self) -> str:
        """Return the next line that it prints."""
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def ask(self, *action: Any) -> Any:
        """Have a sender do something, and return what it says."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(action) + "\n")
        self._process.stdin.flush()
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


# The brokers


@contextlib.contextmanager
def pipes(directory: Path) -> Iterator[tuple[str, int]]:
    """Run a coordinator; give its place and its pid."""
    pid = control.start(PROFILE, directory)
    try:
        yield f"{PROFILE}:{directory}", pid
    finally:
        control.stop(directory)
        layout = directories.locate(directory)
        if layout is not None:
            shutil.rmtree(layout.pipes)


@contextlib.contextmanager
def zeromq(directory: Path) -> Iterator[tuple[str, int]]:
    """Run AiiDA's ZeroMQ service."""
    command = [sys.executable, "-m", "aiida.brokers.zeromq.service", "--service-dir", str(directory)]
    with subprocess.Popen(command, env={**os.environ, "AIIDA_PATH": str(directory)}) as process:
        try:
            wait_for((directory / "broker.status").exists)
            yield f"ipc://{(directory / 'broker.sockets').read_text().strip()}/router.sock", process.pid
        finally:
            process.terminate()


@contextlib.contextmanager
def rabbitmq(directory: Path) -> Iterator[tuple[str, int]]:
    """Run a RabbitMQ of our own, on the loopback interface only."""
    port = 20000 + os.getpid() % 10000
    (directory / "rabbitmq.conf").write_text(f"listeners.tcp.1 = 127.0.0.1:{port}\n")
    names = {"MNESIA_BASE": "mnesia", "LOG_BASE": "log", "CONFIG_FILE": "rabbitmq.conf", "CONF_ENV_FILE": "none",
             "ENABLED_PLUGINS_FILE": "plugins", "GENERATED_CONFIG_DIR": "config", "FEATURE_FLAGS_FILE": "flags",
             "PID_FILE": "pid"}  # fmt: skip
    env = {
        **os.environ,
        **{f"RABBITMQ_{name}": f"{directory}/{value}" for name, value in names.items()},
        "HOME": str(directory),
        "RABBITMQ_NODENAME": f"benchmark{port}@localhost",
        "RABBITMQ_DIST_PORT": str(port + 20000),
        "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "-kernel inet_dist_use_interface {127,0,0,1}",
        "ERL_EPMD_ADDRESS": "127.0.0.1",
        "ERL_EPMD_PORT": str(port + 1),
    }
    # The server would start a port mapper that outlives it.
    with subprocess.Popen(["epmd"], env=env) as mapper:
        try:
            with subprocess.Popen([RABBITMQ], env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
                place = f"amqp://guest:guest@127.0.0.1:{port}/"
                try:
                    wait_for(lambda: _connects(place))
                    yield place, int((directory / "pid").read_text())
                finally:
                    server.terminate()
        finally:
            mapper.kill()


def _connects(place: str) -> bool:
    import socket

    port = int(place.rpartition(":")[2].strip("/"))
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True
    return False


def wait_for(condition: Callable[[], Any], seconds: float = 60.0) -> None:
    """Wait for what no event tells."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError
        threading.Event().wait(0.02)


def present() -> dict[str, Callable[[Path], Any]]:
    """Return the brokers that can run here."""
    found: dict[str, Callable[[Path], Any]] = {PIPES: pipes}
    with contextlib.suppress(ModuleNotFoundError):
        if importlib.util.find_spec("aiida.brokers.zeromq"):
            found[ZEROMQ] = zeromq
    if RABBITMQ.exists() and importlib.util.find_spec("aio_pika"):
        found[RABBIT] = rabbitmq
    return found


# The figures


class Contest:
    """The processes of one kind of communicator, and what they have measured."""

    def __init__(self, kind: str, place: str, pid: int) -> None:
        self.kind, self._place, self._pid = kind, place, pid
        self.values: dict[str, list[float]] = collections.defaultdict(list)
        self._resident = resident(pid)

    def __enter__(self) -> Contest:
        self._worker = Process("work", self.kind, self._place, "worker")
        self._listeners = [Process("work", self.kind, self._place, "listener") for _ in range(SUBSCRIBERS)]
        self._senders = [Process("send", self.kind, self._place) for _ in range(SENDERS)]
        return self

    def __exit__(self, *_: object) -> None:
        for process in (self._worker, *self._listeners, *self._senders):
            process.end()

    def round(self, tasks: int) -> None:
        """Measure everything once."""
        sender, slow = self._senders[0], self.kind == RABBIT
        self.values["RPC round trip (µs)"].append(1e6 * sender.ask("call", 100 if slow else 1000))
        number = 1000 if slow else 5000
        self.values["RPC, 100 in flight (/s)"].append(number / sender.ask("calls", number))
        self.values["RPC with 1 MB (ms)"].append(1e3 * sender.ask("body", 1_000_000, 20))
        self.values["task to result (µs)"].append(1e6 * sender.ask("task", 100))
        before = processor_seconds(self._pid)
        with concurrent.futures.ThreadPoolExecutor(SENDERS) as pool:
            times = list(pool.map(lambda each: each.ask("tasks", tasks // SENDERS), self._senders))
        spent = processor_seconds(self._pid) - before
        self.values["tasks, 4 senders (/s)"].append(tasks / max(times))
        self.values["broker's processor time for 10,000 tasks (s)"].append(spent / tasks * 10_000)
        bursts, number = 5, 400  # More at once, and ZeroMQ drops some.
        begin = time.perf_counter()
        for _ in range(bursts):
            sender.ask("broadcast", number)
            assert {listener.line() for listener in self._listeners} == {"heard"}
        self.values["broadcasts to 4, deliveries (/s)"].append(
            SUBSCRIBERS * bursts * number / (time.perf_counter() - begin)
        )
        self.values["making a communicator (ms)"].append(1e3 * self._making())
        self.values["broker's memory (MiB)"].append(self._resident)

    def burst(self) -> None:
        """Measure, once, what a burst loses."""
        self.values["lost of a burst of 5,000 tasks"].append(BURST - self._senders[0].ask("burst", BURST))

    def _making(self) -> float:
        times = []
        for _ in range(10):
            begin = time.perf_counter()
            made = connect(self.kind, self._place)
            times.append(time.perf_counter() - begin)
            made.close()
        return statistics.median(times)

    def medians(self) -> dict[str, float]:
        """Return the figures."""
        return {name: statistics.median(values) for name, values in self.values.items()}


def resident(pid: int) -> float:
    """Return a process's resident memory, in MiB."""
    said = subprocess.run(["ps", "-o", "rss=", "-p", str(pid)], capture_output=True, text=True, check=True)
    return int(said.stdout) / 1024


def processor_seconds(pid: int) -> float:
    """Return the processor time of a process (proc(5))."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def floor() -> float:
    """Return the median of the microseconds that a byte takes through one FIFO and back through another.

    On Linux each of the two processes has a core of its own, as senders and workers mostly have: left alone, the two
    may share one or not, which makes a tenfold difference from run to run.
    """
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    if len(cores) < 2:
        return _ping_pong("pass")
    os.sched_setaffinity(0, cores[:1])
    try:
        return _ping_pong(f"os.sched_setaffinity(0, [{cores[1]}])")
    finally:
        os.sched_setaffinity(0, cores)


def _ping_pong(first: str) -> float:
    with tempfile.TemporaryDirectory() as directory:
        there, back = f"{directory}/there", f"{directory}/back"
        for name in (there, back):
            os.mkfifo(name)
        script = (
            f"import os, sys; {first}; r = os.open(sys.argv[1], 0); w = os.open(sys.argv[2], 1)\n"
            "while data := os.read(r, 4096): os.write(w, data)"
        )
        with subprocess.Popen([sys.executable, "-c", script, there, back]) as _:
            out, answer = os.open(there, os.O_WRONLY), os.open(back, os.O_RDONLY)
            times = []
            for _ in range(3000):
                begin = time.perf_counter()
                os.write(out, b"x" * 100)
                os.read(answer, 4096)
                times.append(time.perf_counter() - begin)
            os.close(out)
            os.close(answer)
    return 1e6 * statistics.median(times)


def import_milliseconds() -> float:
    """Return what importing `pipebroker` takes over what importing kiwipy takes."""
    script = "import kiwipy, time; b = time.perf_counter(); import pipebroker; print(time.perf_counter() - b)"
    with tempfile.TemporaryDirectory() as directory:
        env = {**os.environ, "PYTHONPYCACHEPREFIX": directory, "PYTHONDONTWRITEBYTECODE": ""}
        times = [
            float(
                subprocess.run(
                    [sys.executable, "-c", script], cwd=HERE, env=env, capture_output=True, check=True
                ).stdout
            )
            for _ in range(8)
        ]
    return 1e3 * statistics.median(times[1:])  # The first has compiled it.


# figure, measured with, against, how many times better, whether less is better
GOALS = [
    ("RPC round trip (µs)", PIPES, ZEROMQ, 5, True),
    ("RPC round trip (µs)", PIPES, RABBIT, 15, True),
    ("RPC round trip (µs)", PIPES, "bare FIFO", 0.5, True),
    ("RPC, 100 in flight (/s)", PIPES, ZEROMQ, 8, False),
    ("RPC with 1 MB (ms)", PIPES, ZEROMQ, 2, True),
    ("tasks, 4 senders (/s)", UNSYNCED, ZEROMQ, 5, False),
    ("tasks, 4 senders (/s)", PIPES, ZEROMQ, 1, False),
    ("tasks, 4 senders (/s)", PIPES, RABBIT, 3, False),
    ("task to result (µs)", PIPES, RABBIT, 4, True),
    ("broadcasts to 4, deliveries (/s)", PIPES, ZEROMQ, 4, False),
    ("broadcasts to 4, deliveries (/s)", PIPES, RABBIT, 15, False),
    ("making a communicator (ms)", PIPES, ZEROMQ, 1, True),
    ("lost of a burst of 5,000 tasks", PIPES, ZEROMQ, None, True),
    ("broker's memory (MiB)", PIPES, ZEROMQ, 2, True),
    ("broker's processor time for 10,000 tasks (s)", UNSYNCED, ZEROMQ, 2, True),
]


def compare(figures: dict[str, dict[str, float]], imported: float) -> list[dict[str, Any]]:
    """Return the table: each goal with both values, and whether it was met."""
    rows = []
    for figure, ours, theirs, goal, less in GOALS:
        if theirs not in figures:
            continue
        value, other = figures[ours][figure], figures[theirs][figure]
        ratio = (other / value if less else value / other) if value and other else None
        met = value == 0 if goal is None else ratio is not None and ratio >= goal
        row = {"figure": figure, "with": ours, "value": value, "against": theirs, "other": other}
        rows.append({**row, "ratio": ratio, "goal": goal, "met": met})
    row = {"figure": "import over kiwipy's (ms)", "with": PIPES, "value": imported, "against": "15 ms", "other": 15.0}
    rows.append({**row, "ratio": 15 / imported, "goal": 1, "met": imported < 15})
    return rows


def contest(rounds: int, tasks: int) -> dict[str, Any]:
    """Measure all brokers in turn."""
    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="namedpipe-benchmark-")))
        contests = []
        for number, (kind, run) in enumerate(present().items()):
            home = directory / str(number)
            home.mkdir()
            place, pid = stack.enter_context(run(home))
            kinds = (PIPES, UNSYNCED) if kind == PIPES else (kind,)
            contests += [Contest(each, place, pid) for each in kinds]
        floors = []
        for number in range(rounds):
            floors.append(floor())
            for each in contests:
                progress(f"round {number + 1} of {rounds}: {each.kind}")
                with each:
                    each.round(tasks)
                    if number == rounds - 1:
                        each.burst()
        progress("")
    figures = {each.kind: each.medians() for each in contests}
    figures["bare FIFO"] = {"RPC round trip (µs)": statistics.median(floors)}
    goals = compare(figures, import_milliseconds())
    return {"machine": machine(), "rounds": rounds, "figures": figures, "goals": goals}


def machine() -> str:
    """Name the machine."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return f"{line.partition(':')[2].strip()}, {os.cpu_count()} cores, {platform.system()}, " + (
                    f"Python {platform.python_version()}"
                )
    return f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()}, Python {platform.python_version()}"


def progress(text: str) -> None:
    """Show what is being measured, on a terminal."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


# How it grows


def growth() -> dict[str, Any]:
    """Measure how this broker's cost grows."""
    tables: dict[str, list[tuple[int, dict[str, float]]]] = collections.defaultdict(list)
    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="namedpipe-benchmark-")))
        place, _ = stack.enter_context(pipes(directory))

        def started(*arguments: str) -> Process:
            process = Process(*arguments)
            stack.callback(process.end)
            return process

        started("work", UNSYNCED, place, "worker")
        senders = [started("send", UNSYNCED, place) for _ in range(8)]
        for count in (1, 2, 4, 8):
            progress(f"{count} senders")
            with concurrent.futures.ThreadPoolExecutor(count) as pool:
                calls = max(pool.map(lambda each: each.ask("calls", 16_000 // count), senders[:count]))  # noqa: B023
                tasks = max(pool.map(lambda each: each.ask("tasks", 8_000 // count), senders[:count]))  # noqa: B023
            tables["senders"].append((count, {"RPC (/s)": 16_000 / calls, "tasks (/s)": 8_000 / tasks}))
        for size, number in (
            (100, 1000),
            (1000, 1000),
            (10_000, 500),
            (100_000, 200),
            (1_000_000, 30),
            (10_000_000, 5),
        ):
            progress(f"bodies of {size} bytes")
            tables["bytes in a body"].append((size, {"RPC (µs)": 1e6 * senders[0].ask("body", size, number)}))
        listener = started("work", UNSYNCED, place, "listener")
        paused = [started("work", UNSYNCED, place, name) for name in ("second worker", "listener")]
        for process in paused:
            stack.callback(process.signal, signal.SIGCONT)
        samples: dict[int, list[dict[str, float]]] = {0: [], 1: []}
        for stopped in (0, 1) * 5:
            progress(f"{stopped} of 2 workers and listeners stopped")
            for process in paused:
                process.signal(signal.SIGSTOP if stopped else signal.SIGCONT)
            begin = time.perf_counter()
            senders[0].ask("broadcast", 2000)
            assert listener.line() == "heard"
            heard = 2000 / (time.perf_counter() - begin)
            calls, tasks = (4000 / senders[0].ask(what, 4000) for what in ("calls", "tasks"))
            samples[stopped].append({"RPC (/s)": calls, "tasks (/s)": tasks, "broadcasts (/s)": heard})
        for stopped, found in samples.items():
            figures = {name: statistics.median(each[name] for each in found) for name in found[0]}
            tables["stopped workers of 2, and listeners"].append((stopped, figures))
    for count in (1, 10, 100, 300):
        progress(f"{count} workers")
        tables["workers"].append((count, _with_workers(count)))
    for depth in (0, 1000, 10_000, 100_000):
        progress(f"{depth} waiting tasks")
        tables["waiting tasks"].append((depth, _with_waiting(depth)))
    progress("")
    return {"machine": machine(), "growth": tables}


def _with_workers(count: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory(prefix="namedpipe-benchmark-") as name, pipes(Path(name)) as (place, pid):
        read_end, write_end = os.pipe()
        # Forked, as a hundred interpreters take long to start.
        template = subprocess.Popen(
            [sys.executable, __file__, "fork", place, str(count), str(write_end)],
            pass_fds=(write_end,), stdin=subprocess.PIPE,
        )  # fmt: skip
        os.close(write_end)
        with open(read_end, "rb", buffering=0) as heard, PipeCommunicator(PROFILE, name, fsync=False) as sender:
            wait_for(lambda: len(control.status(name)["workers"]) == count)
            before, begin = processor_seconds(pid), time.perf_counter()
            many(sender.task_send, 4000)
            tasks = 4000 / (time.perf_counter() - begin)
            spent = processor_seconds(pid) - before
            begin = time.perf_counter()
            for _ in range(20):
                sender.broadcast_send("news")
            left = 20 * count
            while left:
                left -= len(heard.read(left) or b"")
            deliveries = 20 * count / (time.perf_counter() - begin)
            template.communicate()
            wait_for(lambda: not control.status(name)["workers"])
        return {
            "tasks (/s)": tasks,
            "coordinator's time for a task (µs)": 1e6 * spent / 4000,
            "deliveries of broadcasts (/s)": deliveries,
        }


def fork_workers(place: str, count: str, answer: str) -> None:
    """Be so many workers until standard input ends."""
    ended, alive = os.pipe()
    children = []
    for _ in range(int(count)):
        if not (pid := os.fork()):
            os.close(alive)
            communicator = connect(UNSYNCED, place)
            communicator.add_task_subscriber(lambda _, body: body)
            communicator.add_broadcast_subscriber(lambda *_: os.write(int(answer), b"x"))
            os.read(ended, 1)
            communicator.close()
            os._exit(0)
        children.append(pid)
    sys.stdin.read()
    os.close(alive)
    for pid in children:
        os.waitpid(pid, 0)


def _with_waiting(depth: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory(prefix="namedpipe-benchmark-") as name:
        queue = taskqueue.TaskQueue(Path(name, "coordinator"), fsync=False)
        for number in range(depth):
            queue.put(taskqueue.new_id(), json.dumps({"body": number, "no_reply": True}), lambda: None)
        begin = time.perf_counter()
        with pipes(Path(name)), PipeCommunicator(PROFILE, name) as sender:
            started = time.perf_counter() - begin
            times = []
            for number in range(500):
                begin = time.perf_counter()
                sender.task_send(number, no_reply=True)
                times.append(time.perf_counter() - begin)
            return {"coordinator starts in (ms)": 1e3 * started, "task_send (µs)": 1e6 * statistics.median(times)}


# The command


def print_goals(answer: dict[str, Any]) -> None:
    """Print the table of goals."""
    print(f"{answer['machine']}; medians of {answer['rounds']} rounds\n")
    print("| figure | this broker | against | | ratio | goal |\n|---|---:|---|---:|---:|---|")
    for row in answer["goals"]:
        ours = f"{row['value']:,.1f}" + (" (fsync off)" if row["with"] == UNSYNCED else "")
        ratio = f"{row['ratio']:.1f}" if row["ratio"] is not None else ""
        goal = "0" if row["goal"] is None else f"{row['goal']}"
        met = "met" if row["met"] else "MISSED"
        print(f"| {row['figure']} | {ours} | {row['against']} | {row['other']:,.1f} | {ratio} | {goal}: {met} |")


def print_growth(answer: dict[str, Any]) -> None:
    """Print the tables of growth."""
    print(answer["machine"])
    for title, rows in answer["growth"].items():
        names = list(rows[0][1])
        print(f"\n| {title} | {' | '.join(names)} |\n|---:|{'---:|' * len(names)}")
        for key, values in rows:
            print(f"| {key:,} | " + " | ".join(f"{values[name]:,.0f}" for name in names) + " |")


def draw(answer: dict[str, Any], path: Path) -> None:
    """Draw the ratios as bars on a logarithmic scale: how many times better than each of the others."""
    rows = [row for row in answer["goals"] if row["ratio"] and row["against"] in (ZEROMQ, RABBIT)]
    scale, left, height = 110.0, 330, 22
    parts = []
    for index, row in enumerate(rows):
        y, width = 30 + index * height, max(2.0, scale * _decades(row["ratio"]))
        color = "#2a6fbb" if row["against"] == ZEROMQ else "#e07b39"
        label = row["figure"].rpartition(" (")[0] + (", fsync off" if row["with"] == UNSYNCED else "")
        parts.append(f'<text x="{left - 8}" y="{y + 12}" text-anchor="end">{label}</text>')
        parts.append(f'<rect x="{left}" y="{y}" width="{width:.0f}" height="15" fill="{color}"/>')
        parts.append(f'<text x="{left + width + 5:.0f}" y="{y + 12}">{row["ratio"]:.1f} times {row["against"]}</text>')
    size = f'width="720" height="{50 + len(rows) * height}"'
    title = '<text x="8" y="18" font-weight="bold">How many times better (logarithmic)</text>'
    path.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="12">\n'
        + '<rect width="100%" height="100%" fill="white"/>\n' + "\n".join([title, *parts]) + "\n</svg>\n"
    )  # fmt: skip


def _decades(ratio: float) -> float:
    import math

    return math.log10(max(ratio, 1.0))


def main() -> int:
    """Run the command line; return the exit status: 1 if a goal was missed."""
    parser = argparse.ArgumentParser(description="Measure the brokers that are installed here.")
    parser.add_argument("--rounds", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--tasks", type=int, default=2000, help="tasks in a round (default: %(default)s)")
    parser.add_argument("--growth", action="store_true", help="measure how this broker's cost grows instead")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there too")
    parser.add_argument("--svg", type=Path, metavar="FILE", help="draw the ratios there too")
    options = parser.parse_args()
    answer = growth() if options.growth else contest(options.rounds, options.tasks)
    if options.json:
        options.json.write_text(json.dumps(answer, indent=1))
    if options.growth:
        print_growth(answer)
        return 0
    print_goals(answer)
    if options.svg:
        draw(answer, options.svg)
    return 0 if all(row["met"] for row in answer["goals"]) else 1


if __name__ == "__main__":
    roles: dict[str, Callable[..., None]] = {"work": work, "send": send, "fork": fork_workers}
    if sys.argv[1:] and sys.argv[1] in roles:
        roles[sys.argv[1]](*sys.argv[2:])
    else:
        sys.exit(main())
