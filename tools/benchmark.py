"""How fast, beside AiiDA's ZeroMQ broker, RabbitMQ and a bare FIFO: the same work, in turn, in one run.

    python tools/benchmark.py                 # all that is installed here, as a table with ratios
    python tools/benchmark.py --growth        # how the cost grows with senders, workers, bodies and waiting tasks
    python tools/benchmark.py --against HASH  # this edition beside another commit's, in paired turns
    python tools/benchmark.py --aiida         # a daemon with real processes, beside the same with the other brokers
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
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent.parent / "tests")]

import editions
import realwork
from realwork import processor_seconds, resident
from roles import PIPES, RABBIT, UNSYNCED, ZEROMQ, Process, connect, many

import control
import directories
import taskqueue
import verdi
from harness import HERE, eventually
from pipebroker import PipeCommunicator

PROFILE = f"benchmark{os.getpid()}"
SENDERS, SUBSCRIBERS, BURST = 4, 4, 5000

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
            eventually((directory / "broker.status").exists)
            yield f"ipc://{(directory / 'broker.sockets').read_text().strip()}/router.sock", process.pid
        finally:
            process.terminate()


@contextlib.contextmanager
def rabbitmq(directory: Path) -> Iterator[tuple[str, int]]:
    """Run a RabbitMQ of our own."""
    with verdi.rabbitmq(directory / "rabbitmq") as server:
        yield f"amqp://guest:guest@127.0.0.1:{server.port}/", server.pid


def present() -> dict[str, Callable[[Path], Any]]:
    """Return the brokers that can run here."""
    found: dict[str, Callable[[Path], Any]] = {PIPES: pipes}
    with contextlib.suppress(ModuleNotFoundError):
        if importlib.util.find_spec("aiida.brokers.zeromq"):
            found[ZEROMQ] = zeromq
    if verdi.RABBITMQ_SERVER.exists() and importlib.util.find_spec("aio_pika"):
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
        self.values["broker's memory before the work (MiB)"].append(self._resident)

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


# figure, measured with, against, whether less is better
RATIOS = [
    ("RPC round trip (µs)", PIPES, ZEROMQ, True),
    ("RPC round trip (µs)", PIPES, RABBIT, True),
    ("RPC round trip (µs)", PIPES, "bare FIFO", True),
    ("RPC, 100 in flight (/s)", PIPES, ZEROMQ, False),
    ("RPC with 1 MB (ms)", PIPES, ZEROMQ, True),
    ("tasks, 4 senders (/s)", UNSYNCED, ZEROMQ, False),
    ("tasks, 4 senders (/s)", PIPES, ZEROMQ, False),
    ("tasks, 4 senders (/s)", PIPES, RABBIT, False),
    ("task to result (µs)", PIPES, RABBIT, True),
    ("broadcasts to 4, deliveries (/s)", PIPES, ZEROMQ, False),
    ("broadcasts to 4, deliveries (/s)", PIPES, RABBIT, False),
    ("making a communicator (ms)", PIPES, ZEROMQ, True),
    ("lost of a burst of 5,000 tasks", PIPES, ZEROMQ, True),
    ("broker's memory before the work (MiB)", PIPES, ZEROMQ, True),
    ("broker's processor time for 10,000 tasks (s)", UNSYNCED, ZEROMQ, True),
]


def compare(figures: dict[str, dict[str, float]], imported: float) -> list[dict[str, Any]]:
    """Return the rows of the table."""
    rows = []
    for figure, ours, theirs, less in RATIOS:
        if theirs not in figures:
            continue
        value, other = figures[ours][figure], figures[theirs][figure]
        ratio = (other / value if less else value / other) if value and other else None
        rows.append({"figure": figure, "with": ours, "value": value, "against": theirs, "other": other, "ratio": ratio})
    row = {"figure": "import over kiwipy's (ms)", "with": PIPES, "value": imported, "against": "", "other": None}
    return [*rows, {**row, "ratio": None}]


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
    ratios = compare(figures, import_milliseconds())
    return {"machine": machine(), "rounds": rounds, "figures": figures, "ratios": ratios}


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
    progress("what an operator waits for")
    waits = operator()
    progress("")
    return {"machine": machine(), "growth": tables, "operator": waits}


@contextlib.contextmanager
def _forked_workers(name: str, place: str, count: int) -> Iterator[BinaryIO]:
    """Have so many workers; give what tells of each broadcast that one of them hears."""
    read_end, write_end = os.pipe()
    # Forked, as a hundred interpreters take long to start.
    template = subprocess.Popen(
        [sys.executable, __file__, "fork", place, str(count), str(write_end)],
        pass_fds=(write_end,), stdin=subprocess.PIPE,
    )  # fmt: skip
    os.close(write_end)
    with open(read_end, "rb", buffering=0) as heard:
        eventually(lambda: len(control.status(name)["workers"]) == count)
        yield heard
        template.communicate()
        eventually(lambda: not control.status(name)["workers"])


def _with_workers(count: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory(prefix="namedpipe-benchmark-") as name, pipes(Path(name)) as (place, pid):
        with _forked_workers(name, place, count) as heard, PipeCommunicator(PROFILE, name, fsync=False) as sender:
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


def operator() -> dict[str, float]:
    """Return the milliseconds that an operator waits for commands, with 100,000 tasks and 300 workers."""
    with tempfile.TemporaryDirectory(prefix="namedpipe-benchmark-") as name, pipes(Path(name)) as (place, _):
        queue = taskqueue.TaskQueue(Path(name, "coordinator", "queues", "operator"), fsync=False)
        for number in range(100_000):
            queue.put(taskqueue.new_id(), json.dumps({"body": number, "no_reply": True}), lambda: None)
        ours = [sys.executable, str(HERE / "coordinator.py"), "--profile", PROFILE, "--config-path", name]
        commands = {"Python itself": [sys.executable, "-c", "pass"]}
        commands |= {command: [*ours, *command.split()] for command in ("--version", "status", "tasks --limit 10")}
        times: dict[str, list[float]] = collections.defaultdict(list)
        with _forked_workers(name, place, 300):
            for command in list(commands) * 7:
                begin = time.perf_counter()
                subprocess.run(commands[command], check=True, stdout=subprocess.DEVNULL)
                times[command].append(1e3 * (time.perf_counter() - begin))
    return {command: statistics.median(each) for command, each in times.items()}


# The command


def print_ratios(answer: dict[str, Any]) -> None:
    """Print the table of ratios."""
    print(f"{answer['machine']}; medians of {answer['rounds']} rounds\n")
    print("| figure | this broker | against | | ratio |\n|---|---:|---|---:|---:|")
    for row in answer["ratios"]:
        ours = f"{row['value']:,.1f}" + (" (fsync off)" if row["with"] == UNSYNCED else "")
        other, ratio = (f"{row[key]:,.1f}" if row[key] is not None else "" for key in ("other", "ratio"))
        print(f"| {row['figure']} | {ours} | {row['against']} | {other} | {ratio} |")


def print_growth(answer: dict[str, Any]) -> None:
    """Print the tables of growth."""
    print(answer["machine"])
    for title, rows in answer["growth"].items():
        names = list(rows[0][1])
        print(f"\n| {title} | {' | '.join(names)} |\n|---:|{'---:|' * len(names)}")
        for key, values in rows:
            print(f"| {key:,} | " + " | ".join(f"{values[name]:,.0f}" for name in names) + " |")
    print("\n| with 100,000 tasks and 300 workers | ms |\n|---|---:|")
    for command, milliseconds in answer["operator"].items():
        print(f"| {f'`{command}`' if command != 'Python itself' else command} | {milliseconds:.0f} |")


def draw(answer: dict[str, Any], path: Path) -> None:
    """Draw the ratios as bars on a logarithmic scale: how many times better than each of the others."""
    rows = [row for row in answer["ratios"] if row["ratio"] and row["against"] in (ZEROMQ, RABBIT)]
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
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(description="Measure the brokers that are installed here.")
    parser.add_argument("--rounds", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--tasks", type=int, default=2000, help="tasks in a round (default: %(default)s)")
    parser.add_argument("--growth", action="store_true", help="measure how this broker's cost grows instead")
    parser.add_argument("--aiida", action="store_true", help="measure AiiDA's own work with each broker instead")
    parser.add_argument("--against", metavar="COMMIT", help="measure this edition and another of it in turn instead")
    parser.add_argument("--turns", type=int, default=15, help="paired turns with --against (default: %(default)s)")
    parser.add_argument("--only", default="", metavar="TEXT", help="with --against: figures with this in their names")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there too")
    parser.add_argument("--svg", type=Path, metavar="FILE", help="draw the ratios there too")
    options = parser.parse_args()
    answer: dict[str, Any] = {"machine": machine()}
    if options.against:
        answer["rows"] = editions.contest(options.against, options.turns, options.only, progress)
    elif options.aiida:
        answer["rows"] = realwork.contest(options.rounds, progress)
    else:
        answer = growth() if options.growth else contest(options.rounds, options.tasks)
    if options.json:
        options.json.write_text(json.dumps(answer, indent=1))
    if options.against:
        print(answer["machine"])
        editions.print_rows(answer["rows"], options.against, options.turns)
    elif options.aiida:
        print(f"{answer['machine']}; medians of {options.rounds} rounds\n")
        realwork.print_rows(answer["rows"])
    elif options.growth:
        print_growth(answer)
    else:
        print_ratios(answer)
        if options.svg:
            draw(answer, options.svg)
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["fork"]:
        fork_workers(*sys.argv[2:])
    else:
        sys.exit(main())
