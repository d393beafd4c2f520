"""This edition beside an earlier one, the same work in turn in one run: medians of paired ratios, with intervals.

``python tools/benchmark.py --against COMMIT`` checks the commit out beside this tree and measures both. A turn measures
a figure with the one and at once with the other, the first of them by turns; a ratio is that of one turn, over 1 where
this edition is better, so that a noisy minute falls on both. The interval holds the median with at least 95 %
confidence, whatever the distribution (order statistics).
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from roles import PIPES, UNSYNCED, Process

from harness import HERE, eventually

SENDERS, LISTENERS = 4, 4
WAITING = 20_000


class Edition:
    """A checkout, a profile of its own, and its coordinator."""

    def __init__(self, root: Path, directory: Path) -> None:
        self.root, self.directory = root, directory
        self.profile = f"editions{uuid.uuid4().hex[:12]}"
        self.place = f"{self.profile}:{directory}"
        self.stack = contextlib.ExitStack()

    def command(self, *arguments: str) -> str:
        """Run its command line."""
        command = [sys.executable, "coordinator.py", "--profile", self.profile, "--config-path", str(self.directory)]
        return subprocess.run([*command, *arguments], cwd=self.root, check=True, capture_output=True, text=True).stdout

    def __enter__(self) -> Edition:
        self.command("start")
        self.stack.callback(self.command, "stop")
        self.pid = json.loads(self.command("status", "--json"))["pid"]
        self._worker = self.process("work", PIPES, "worker")
        self._listeners = [self.process("work", PIPES, "listener") for _ in range(LISTENERS)]
        self._senders = {kind: [self.process("send", kind) for _ in range(SENDERS)] for kind in (PIPES, UNSYNCED)}
        self._filled = False
        self._others: Process | None = None
        return self

    def __exit__(self, *_: object) -> None:
        self.stack.close()
        pipes = Path(f"/tmp/aiida_{self.profile}_pipes")
        for path in pipes.iterdir():
            path.unlink()
        pipes.rmdir()

    def process(self, role: str, kind: str, *arguments: str) -> Process:
        """Start a process of this edition."""
        made = Process(role, kind, self.place, *arguments, path=str(self.root))
        self.stack.callback(made.end)
        return made

    # The figures

    def call(self) -> float:
        """Return the microseconds of a call and its answer."""
        return 1e6 * float(self._senders[PIPES][0].ask("call", 500))

    def calls(self) -> float:
        """Return the calls in a second."""
        return 4000 / float(self._senders[PIPES][0].ask("calls", 4000))

    def body(self) -> float:
        """Return the milliseconds of a call with 1 MB."""
        return 1e3 * float(self._senders[PIPES][0].ask("body", 1_000_000, 10))

    def task(self) -> float:
        """Return the microseconds of a task from its sending to its result."""
        return 1e6 * float(self._senders[PIPES][0].ask("task", 60))

    def tasks(self, kind: str, number: int) -> float:
        """Return the tasks in a second."""
        with concurrent.futures.ThreadPoolExecutor(SENDERS) as pool:
            times = list(pool.map(lambda each: each.ask("tasks", number // SENDERS), self._senders[kind]))
        return number / max(times)

    def coordinator(self) -> float:
        """Return the coordinator's microseconds of processor time for a task."""
        before = processor_seconds(self.pid)
        self.tasks(UNSYNCED, 4000)
        return 1e6 * (processor_seconds(self.pid) - before) / 4000

    def broadcasts(self) -> float:
        """Return the deliveries of broadcasts in a second."""
        begin = time.perf_counter()
        for _ in range(3):
            self._senders[PIPES][0].ask("broadcast", 400)
            assert {listener.line() for listener in self._listeners} == {"heard"}
        return 3 * 400 * LISTENERS / (time.perf_counter() - begin)

    def pull(self) -> float:
        """Return the milliseconds of one task that is pulled while `WAITING` wait, the median of up to 1,000."""
        sender = self._senders[UNSYNCED][0]
        if not self._filled:
            self._filled = True
            sender.ask("fill", "pulled", WAITING)
        puller = Process("send", UNSYNCED, self.place, path=str(self.root))
        value = 1e3 * float(puller.ask("pull", "pulled", 1000, 5.0))
        puller.end()
        return value

    def coming(self) -> float:
        """Return the milliseconds until 100 workers who come at once are known to the coordinator."""
        with self._crowd(100, 0) as (crowd, log):
            before, begin = log.read_text().count(") came"), time.perf_counter()
            crowd.tell("come")
            assert crowd.line() == "here"
            eventually(lambda: log.read_text().count(") came") - before >= 100, 120.0)
            return 1e3 * (time.perf_counter() - begin)

    def coming_among_others(self) -> float:
        """Return the milliseconds until 100 workers are known who come while 200 with 40 routes each are here."""
        if self._others is None:
            self._others = self.process("crowd", UNSYNCED, "200", "40")
            self._others.tell("come")
            assert self._others.line() == "here"
        return self.coming()

    def dying(self) -> float:
        """Return the coordinator's milliseconds of processor time for the death of 200 with 40 routes each."""
        with self._crowd(200, 40) as (crowd, log):
            before = log.read_text().count(") came")
            crowd.tell("come")
            assert crowd.line() == "here"
            eventually(lambda: log.read_text().count(") came") - before >= 200, 120.0)
            spent = processor_seconds(self.pid)
            crowd.tell("die")
            assert crowd.line() == "dead"
            eventually(lambda: len(list(Path(self.directory, "pipes").glob("worker_*"))) == 1 + LISTENERS, 120.0)
            return 1e3 * (processor_seconds(self.pid) - spent)

    @contextlib.contextmanager
    def _crowd(self, count: int, routes: int) -> Iterator[tuple[Process, Path]]:
        crowd = Process("crowd", UNSYNCED, self.place, str(count), str(routes), path=str(self.root))
        try:
            yield crowd, self.directory / "coordinator" / "coordinator.log"
        finally:
            crowd.end()


Measure = Callable[[Edition], float]
FIGURES: dict[str, tuple[Measure, bool]] = {
    # what, how, and whether less is better
    "RPC round trip (µs)": (Edition.call, True),
    "RPC, 100 in flight (/s)": (Edition.calls, False),
    "RPC with 1 MB (ms)": (Edition.body, True),
    "task to result (µs)": (Edition.task, True),
    "tasks, 4 senders (/s)": (lambda edition: edition.tasks(PIPES, 1000), False),
    "tasks, 4 senders, fsync off (/s)": (lambda edition: edition.tasks(UNSYNCED, 3000), False),
    "coordinator's time for a task (µs)": (Edition.coordinator, True),
    "broadcasts to 4, deliveries (/s)": (Edition.broadcasts, False),
    "next_task, 20,000 waiting (ms)": (Edition.pull, True),
    "100 workers come at once (ms)": (Edition.coming, True),
    "200 with 40 routes die, coordinator's time (ms)": (Edition.dying, True),
    "100 come, 200 with 40 routes are here (ms)": (Edition.coming_among_others, True),
}


def processor_seconds(pid: int) -> float:
    """Return the processor time of a process, by the nanosecond (proc(5), ``schedstat``)."""
    return (
        sum(int(Path(task, "schedstat").read_text().split()[0]) for task in Path(f"/proc/{pid}/task").iterdir()) / 1e9
    )


def interval(ratios: list[float]) -> tuple[float, float]:
    """Return between which of the ratios the true median lies, with at least 95 % confidence."""
    values, number = sorted(ratios), len(ratios)
    rank, tail = 0, 0.0
    while (tail := tail + math.comb(number, rank) / 2**number) <= 0.025:
        rank += 1
    low = max(0, rank - 1)
    return values[low], values[number - 1 - low]


@contextlib.contextmanager
def checked_out(commit: str) -> Iterator[Path]:
    """Check a commit out beside this tree."""
    with tempfile.TemporaryDirectory(prefix="namedpipe-edition-") as name:
        place = str(Path(name, "tree"))
        git = ["git", "-C", str(HERE), "worktree"]
        if subprocess.run([*git, "add", "-q", "--detach", place, commit], check=False).returncode:
            sys.exit(f"There is no commit {commit} to measure against.")
        try:
            yield Path(place)
        finally:
            subprocess.run([*git, "remove", "--force", place], check=True)


def contest(commit: str, turns: int, only: str, progress: Callable[[str], None]) -> list[dict[str, Any]]:
    """Measure both editions in turn; return a row for each figure.

    :param only: measure the figures that have this in their names.
    """
    rows = []
    with contextlib.ExitStack() as stack:
        there = stack.enter_context(checked_out(commit))
        editions = [
            stack.enter_context(
                Edition(root, Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="namedpipe-"))))
            )
            for root in (HERE, there)
        ]
        for name, (measure, less) in FIGURES.items():
            if only not in name:
                continue
            values: list[list[float]] = [[], []]
            for turn in range(turns):
                progress(f"{name}: turn {turn + 1} of {turns}")
                for index in (0, 1) if turn % 2 else (1, 0):
                    values[index].append(measure(editions[index]))
            ratios = [theirs / ours if less else ours / theirs for ours, theirs in zip(*values, strict=True)]
            ours, theirs = map(statistics.median, values)
            row = {"figure": name, "value": ours, "other": theirs, "ratio": statistics.median(ratios)}
            rows.append({**row, "interval": interval(ratios)})
    progress("")
    return rows


def print_rows(rows: list[dict[str, Any]], commit: str, turns: int) -> None:
    """Print the table."""
    print(f"medians of {turns} paired turns; a ratio over 1 is for this edition\n")
    print(f"| figure | this edition | {commit[:7]} | ratio | interval |\n|---|---:|---:|---:|---|")
    for row in rows:
        low, high = row["interval"]
        figures = f"{row['value']:,.2f} | {row['other']:,.2f} | {row['ratio']:.2f} | {low:.2f} to {high:.2f}"
        print(f"| {row['figure']} | {figures} |")
