"""Random work under random blows: does what may never happen, happen?

    python tools/torture.py --minutes 5 --seed 7
    python tools/torture.py --aiida --minutes 60 --seed 7       (`fire.py` says what that is)

The blows are SIGKILL, to one or to all workers, SIGSTOP, restarts, and the removal of directories, pipes and routes.
Senders send from signal handlers too, inside other sends, and fork. Senders and workers append a line to a file before
or after each step, so that the evidence outlives them, and a line stands there before each kill. At the end:
every task whose ``task_send`` returned was done; whoever did a task was killed before somebody did it again; every call
and every task that somebody waited for came to an end; nobody ended who was not told to; nothing is left of anybody.
The exit status is 1 if not.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import itertools
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import kiwipy

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent.parent / "tests")]

import control
import directories
from harness import within
from pipebroker import PipeCommunicator

WORKERS, SENDERS = 4, 3
QUEUES = ("kiwipy.tasks", "other/queue")
DRAIN_SECONDS = 120.0


class Evidence:
    """A file that processes append lines to, each with one write."""

    def __init__(self, directory: str | Path, name: str) -> None:
        self._path = Path(directory, f"{name}.evidence")
        self._descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def add(self, *words: object) -> None:
        """Append a line."""
        os.write(self._descriptor, (" ".join(map(str, words)) + "\n").encode())

    def take(self) -> list[list[str]]:
        """Close the file, and return all lines, as words."""
        os.close(self._descriptor)
        return [line.split() for line in self._path.read_text().splitlines()]


def work(profile: str, config_path: str, name: str, life: str, seed: str) -> None:
    """Do tasks, answer calls and listen, until standard input ends."""
    chance = random.Random(seed)
    done, broadcasts = Evidence(config_path, "done"), Evidence(config_path, "broadcasts")
    heard = Counter[str]()
    ending = threading.Event()

    def do(_: Any, body: dict[str, Any]) -> Any:
        if ending.is_set() or chance.random() < 0.02:
            raise kiwipy.TaskRejected
        done.add(body["id"], life)
        if chance.random() < 0.5:
            ending.wait(chance.random() * 0.005)  # The work.
            return body
        outcome = kiwipy.Future()
        threading.Timer(chance.random() * 0.05, outcome.set_result, (body,)).start()
        return outcome

    with PipeCommunicator(profile, config_path, name, task_prefetch_count=chance.choice([0, 1, 5])) as communicator:
        communicator.add_rpc_subscriber(lambda _, body: body, name)
        communicator.add_broadcast_subscriber(lambda _, body, *rest: heard.update([body["id"]]))
        queues = [communicator.task_queue(queue) for queue in QUEUES]
        identifiers = [queue.add_task_subscriber(do) for queue in queues]
        print("ready", flush=True)
        sys.stdin.read()
        ending.set()
        for queue, identifier in zip(queues, identifiers, strict=True):
            queue.remove_task_subscriber(identifier)
        # What is in hand is finished first: a task that is given back is done again without anybody's death.
        within(lambda: not any(Path(config_path, "coordinator").rglob(f"claimed/{name}/task_*")), DRAIN_SECONDS)
    broadcasts.add(len(heard), heard.total() - len(heard))


def send(profile: str, config_path: str, name: str, seed: str) -> None:
    """Send at random until standard input ends, also inside sends, and then wait for every answer."""
    chance = random.Random(seed)
    sent, ends = Evidence(config_path, "sent"), Evidence(config_path, "ends")
    stopped = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.read(), stopped.set()), daemon=True).start()
    numbers = itertools.count(1)
    with PipeCommunicator(profile, config_path, fsync=chance.random() < 0.3) as communicator:
        queues = [communicator.task_queue(queue) for queue in QUEUES]

        def interrupt(*_: object) -> None:
            body = {"id": f"{name}-{next(numbers)}", "text": "from a signal handler"}
            chance.choice(queues).task_send(body, no_reply=True)
            sent.add(body["id"])
            communicator.broadcast_send(body)

        signal.signal(signal.SIGALRM, interrupt)
        pending: list[tuple[str, dict[str, Any], Any]] = []
        print("ready", flush=True)
        while not stopped.wait(chance.random() * 0.01):
            signal.setitimer(signal.ITIMER_REAL, 0.0001 + chance.random() * 0.003)
            body = {
                "id": f"{name}-{next(numbers)}",
                "text": "x" * chance.choice([1, 100, 5000, chance.randrange(300_000)]),
            }
            kind = chance.random()
            if kind < 0.5:
                future = chance.choice(queues).task_send(body, no_reply=chance.random() < 0.5)
                sent.add(body["id"])
                if future is not None:
                    pending.append(("task", body, future))
            elif kind < 0.9:
                try:
                    future = communicator.rpc_send(f"worker{chance.randrange(WORKERS)}", body)
                    pending.append(("call", body, future))
                except kiwipy.DeliveryFailed as error:
                    ends.add("call", type(error).__name__)
            elif kind < 0.99:
                communicator.broadcast_send(body)
            else:
                ends.add("fork", fork(communicator, chance.random() < 0.5))
            if len(pending) >= 100:
                settle(pending, ends)
        signal.setitimer(signal.ITIMER_REAL, 0)
        settle(pending, ends)


def fork(communicator: PipeCommunicator, orderly: bool) -> str:
    """Fork a child that finds the communicator closed, and ends; say in a word whether it did."""
    signal.setitimer(signal.ITIMER_REAL, 0)
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            communicator.broadcast_send("from a child")
        except kiwipy.CommunicatorClosed:
            if orderly:
                communicator.close()
            status = 0
        finally:
            os._exit(status)
    return "closed" if os.waitpid(pid, 0)[1] == 0 else "WRONG"


def settle(pending: list[tuple[str, dict[str, Any], Any]], ends: Evidence) -> None:
    """Wait for every answer, and write down what it was."""
    while pending:
        what, body, future = pending.pop()
        ends.add(what, how_it_ends(future, body))


def how_it_ends(future: Any, expected: object) -> str:
    """Wait for a future, and for the futures that it resolves to; say in a word what came of it."""
    try:
        outcome = future
        while isinstance(outcome, kiwipy.Future):
            outcome = outcome.result(DRAIN_SECONDS)
        return "result" if outcome == expected else "WRONG"
    except concurrent.futures.TimeoutError:
        return "HANGS"
    except Exception as error:
        return type(error).__name__


def done_again(lines: list[list[str]]) -> tuple[dict[str, str], set[str], set[str]]:
    """Return who did each task last, which were done again after a kill, and which without one."""
    last, dead, again, unexplained = dict[str, str](), set[str](), set[str](), set[str]()
    for task, life in lines:
        if task == "killed":
            dead.add(life)
            continue
        if task in last:
            (again if last[task] in dead and last[task] != life else unexplained).add(task)
        last[task] = life
    return last, again, unexplained


class Torture:
    """A profile, its processes, and what is done to them."""

    def __init__(self, directory: Path, seed: int) -> None:
        self.profile = f"torture{os.getpid()}"
        self.config_path = directory
        self.chance = random.Random(seed)
        self.blows = Counter[str]()
        self._failed: list[str] = []
        self._lives: dict[int, str] = {}
        self._evidence = {name: Evidence(directory, name) for name in ("done", "sent", "ends", "broadcasts")}
        self.workers: list[subprocess.Popen[str]] = []
        self.senders: list[subprocess.Popen[str]] = []

    def begin(self) -> None:
        """Start the processes."""
        self._descriptors = self._open_descriptors(control.start(self.profile, self.config_path))
        self.workers += (self._start_worker(number) for number in range(WORKERS))
        self.senders += (self._start_sender(number) for number in range(SENDERS))

    def _start_worker(self, number: int) -> subprocess.Popen[str]:
        life = f"life{len(self._lives)}"
        process = self._start("work", f"worker{number}", life)
        self._lives[process.pid] = life
        return process

    def _start_sender(self, number: int) -> subprocess.Popen[str]:
        return self._start("send", f"sender{number}.{self.blows.total()}")

    def _start(self, *arguments: str) -> subprocess.Popen[str]:
        role, *rest = arguments
        command = [sys.executable, __file__, role, self.profile, str(self.config_path), *rest]
        command.append(str(self.chance.random()))
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None and process.stdout.readline() == "ready\n", f"{arguments} did not start"
        return process

    def strike(self) -> None:
        """Do one bad thing."""
        blows = (self._kill_worker, self._kill_worker, self._kill_all_workers, self._kill_sender,
                 self._kill_coordinator, self._stop_worker, self._stop_sender, self._stop_coordinator,
                 self._restart_worker, self._restart_coordinator, self._remove_directory, self._remove_pipe,
                 self._remove_pipe)  # fmt: skip
        blow = self.chance.choice(blows)
        blow()
        self.blows[blow.__name__.strip("_").replace("_", " ")] += 1

    def _kill_worker(self) -> None:
        number = self.chance.randrange(WORKERS)
        self._kill(self.workers[number])
        self.workers[number] = self._start_worker(number)

    def _kill_all_workers(self) -> None:
        self._kill(*self.workers)
        self.workers = [self._start_worker(number) for number in range(WORKERS)]

    def _kill_sender(self) -> None:
        number = self.chance.randrange(SENDERS)
        self._kill(self.senders[number])
        self.senders[number] = self._start_sender(number)

    def _kill_coordinator(self) -> None:
        os.kill(control.status(self.config_path)["pid"], signal.SIGKILL)
        control.stop(self.config_path)  # It waits until it is gone.
        control.start(self.profile, self.config_path)

    def _stop_worker(self) -> None:
        self._pause(self.chance.choice(self.workers).pid)

    def _stop_sender(self) -> None:
        self._pause(self.chance.choice(self.senders).pid)

    def _remove_directory(self) -> None:
        """Remove one that holds nothing which cannot be made again."""
        layout = directories.locate(self.config_path)
        assert layout is not None
        queues = [directory / state for _, directory in layout.queues() for state in ("completed", "failed")]
        shutil.rmtree(self.chance.choice([*queues, layout.registry]), ignore_errors=True)

    def _remove_pipe(self) -> None:
        """Remove a pipe or a route, but no body, which is a message."""
        layout = directories.locate(self.config_path)
        assert layout is not None
        kinds = ("coordinator_", "reply_", "route_", "task_", "rpc_", "broadcast_")
        found = sorted(path for path in layout.pipes.iterdir() if path.name.startswith(kinds))
        if found:
            self.chance.choice(found).unlink(missing_ok=True)

    def _stop_coordinator(self) -> None:
        self._pause(control.status(self.config_path)["pid"])

    def _restart_worker(self) -> None:
        number = self.chance.randrange(WORKERS)
        self._end(self.workers[number])
        self.workers[number] = self._start_worker(number)

    def _restart_coordinator(self) -> None:
        control.stop(self.config_path)
        control.start(self.profile, self.config_path)

    def _kill(self, *processes: subprocess.Popen[str]) -> None:
        for process in processes:
            if process.poll() is not None:
                self._failed.append(f"{process.args[2:5]}: {process.returncode}")
            # Before it is so, since its task may be another's at once.
            self._evidence["done"].add("killed", self._lives.get(process.pid, "sender"))
            process.kill()
        for process in processes:
            process.communicate()

    def _end(self, process: subprocess.Popen[str]) -> None:
        process.communicate(timeout=4 * DRAIN_SECONDS)
        if process.returncode:
            self._failed.append(f"{process.args[2:5]}: {process.returncode}")

    def _pause(self, pid: int) -> None:
        os.kill(pid, signal.SIGSTOP)
        threading.Event().wait(self.chance.random())
        os.kill(pid, signal.SIGCONT)

    def _open_descriptors(self, pid: int) -> int:
        directory = f"/proc/{pid}/fd"
        return len(os.listdir(directory)) if os.path.isdir(directory) else 0

    def _unfinished(self) -> int:
        counts = control.status(self.config_path)["tasks"]
        return int(counts["waiting"] + counts["claimed"] + counts["failed"])

    def _left(self, layout: directories.Layout) -> list[str]:
        """Return the files that are there although nobody runs."""
        # An outcome for a sender whose pipe is gone is kept for a minute, and so is the body of a broadcast whose
        # sender was killed before it rang.
        kept = (".config", "coordinator_", "body_reply_", "body_coordinator_broadcast.")
        found = [path for path in layout.pipes.iterdir() if not path.name.startswith(kept)]
        found += [*layout.registry.glob("worker_*"), *layout.registry.glob(".*"), *layout.queue.rglob("claimed/*")]
        found += [path for path in layout.queue.rglob(".*")]
        for path in found:
            if path.name.startswith("."):
                with contextlib.suppress(FileNotFoundError):
                    os.utime(path, (0, 0), follow_symlinks=False)  # A draft goes by its age.
        return [path.name for path in found]

    def verdict(self) -> dict[str, tuple[object, bool]]:
        """End everything, and return each figure with whether it is as it must be."""
        for process in self.senders:
            self._end(process)
        within(lambda: not self._unfinished(), DRAIN_SECONDS)
        unfinished = self._unfinished()
        for process in self.workers:
            self._end(process)
        layout = directories.locate(self.config_path)
        assert layout is not None
        within(lambda: not self._left(layout), DRAIN_SECONDS)
        left = self._left(layout)
        descriptors = self._open_descriptors(control.status(self.config_path)["pid"])
        control.stop(self.config_path)
        said = [path.read_text(errors="replace") for path in layout.queue.glob("coordinator.log*")]
        strangers = [line for text in said for line in text.splitlines() if "none of ours" in line]
        lines = {name: evidence.take() for name, evidence in self._evidence.items()}
        did, again, unexplained = done_again(lines["done"])
        lost = [task for (task,) in lines["sent"] if task not in did]
        ends = {what: Counter(end for kind, end in lines["ends"] if kind == what) for what in ("call", "task", "fork")}
        heard, heard_twice = (sum(map(int, counts)) for counts in zip(*lines["broadcasts"], strict=True))
        return {
            "tasks sent": (len(lines["sent"]), bool(lines["sent"])),
            "tasks lost": (len(lost), not lost),
            "tasks left waiting, claimed or failed": (unfinished, not unfinished),
            "tasks done again after a kill": (len(again), True),
            "tasks done again without a kill": (len(unexplained), not unexplained),
            "how the outcomes of tasks came": (dict(ends["task"]), ends["task"].keys() == {"result"}),
            "how calls ended": (
                dict(ends["call"]),
                {"result"} <= ends["call"].keys() <= {"result", "UnroutableError", "DeliveryFailed"},
            ),
            "what sends in a forked child found": (dict(ends["fork"]), ends["fork"].keys() <= {"closed"}),
            "broadcasts heard": (heard, bool(heard)),
            "broadcasts heard twice": (heard_twice, not heard_twice),
            "processes that ended of themselves": (self._failed[:3], not self._failed),
            "files, pipes and routes left": (left[:5], not left),
            "own files that were taken for a stranger's": (strangers[:1], not strangers),
            "descriptors that the coordinator has left open": (
                max(0, descriptors - self._descriptors),
                descriptors <= self._descriptors,
            ),
        }

    def clean_up(self) -> None:
        """End and remove everything, whatever happened."""
        for process in (*self.workers, *self.senders):
            process.kill()
        control.stop(self.config_path)
        layout = directories.locate(self.config_path)
        if layout is not None:
            shutil.rmtree(layout.pipes, ignore_errors=True)


def main() -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(description="Torture the broker, and say what broke.")
    parser.add_argument("--minutes", type=float, default=5.0, help="for how long (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=7, help="of all that is random (default: %(default)s)")
    parser.add_argument("--aiida", action="store_true", help="torture AiiDA with its daemon instead")
    options = parser.parse_args()
    if options.aiida:
        import fire  # It needs AiiDA, which not everybody has.

        return fire.main(options.minutes, options.seed)
    directory = Path(tempfile.mkdtemp(prefix="namedpipe-torture-"))
    torture = Torture(directory, options.seed)
    try:
        torture.begin()
        begin = time.monotonic()
        while (now := time.monotonic() - begin) < 60 * options.minutes:
            torture.strike()
            print(f"\r{now:5.0f} s  {torture.blows.total()} blows", end="", file=sys.stderr, flush=True)
            threading.Event().wait(torture.chance.random() * 0.3)
        print(file=sys.stderr)
        verdict = torture.verdict()
    finally:
        torture.clean_up()
    for kind, count in sorted(torture.blows.items()):
        print(f"{kind:50} {count}")
    for name, (value, good) in verdict.items():
        print(f"{name:50} {value!s}{'' if good else '   VIOLATION'}")
    if all(good for _, good in verdict.values()):
        shutil.rmtree(directory)
        return 0
    print(f"The evidence is in {directory}.")
    return 1


if __name__ == "__main__":
    if sys.argv[1:2] in (["work"], ["send"]):
        {"work": work, "send": send}[sys.argv[1]](*sys.argv[2:])
    else:
        sys.exit(main())
