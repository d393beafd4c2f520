"""AiiDA under fire: real processes under random blows, for ``python tools/torture.py --aiida --minutes 60 --seed N``.

A daemon runs WorkChains with calcfunctions, parents with children, and CalcJobs on localhost, while workers, the
coordinator and the daemon itself are killed, processes are paused, played and killed, the pipes in /tmp are removed,
and the profile is switched to RabbitMQ and back. Each step of a WorkChain appends a line to a file, with the process it
ran in, and each death does before it comes. At the end every process is finished, or killed because somebody asked for
it; no step ran again but where the one before it was in another process, whose death stands between; and ``verdi
process repair --dry-run`` finds nothing, neither then nor before each switch. What AiiDA itself loses, as it does with
any broker (UPSTREAM.md), is listed, and is not the broker's fault. What goes wrong leaves its directory, with the logs,
the database and ``evidence``, where each blow stands between the steps.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import control
import verdi
from harness import eventually

PROCESSES = f"""{verdi.FAMILY}
import os
from aiida.engine import calcfunction

def note(node, step):
    # A pid comes again; with the time of its start (proc(5)) it does not.
    with open("/proc/self/stat") as stat:
        started = stat.read().rpartition(")")[2].split()[19]
    evidence = os.open(os.environ["FIRE_EVIDENCE"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    os.write(evidence, f"{{node.pk}} {{step}} {{os.getpid()}}.{{started}}\\n".encode())
    os.close(evidence)

@calcfunction
def add(x, y):
    return orm.Int(x + y)

class Small(WorkChain):
    @classmethod
    def define(cls, spec):
        super().define(spec)
        spec.input("n", valid_type=orm.Int)
        spec.output("sum", valid_type=orm.Int)
        spec.outline(cls.first, cls.second)

    def first(self):
        note(self.node, "first")
        self.ctx.sum = add(self.inputs.n, orm.Int(1))

    def second(self):
        note(self.node, "second")
        self.out("sum", self.ctx.sum)

class Parent(Family):
    def spawn(self):
        note(self.node, "spawn")
        for n in range(3):
            child = self.submit(Small, n=orm.Int(n).store())
            note(child, "submitted")
            self.to_context(**{{f"child{{n}}": child}})

    def collect(self):
        note(self.node, "collect")
        return super().collect()
"""
ORDERS = """
import fire_processes
from aiida.orm.utils.serialize import deserialize_unsafe
from plumpy.futures import unwrap_kiwi_future
def start(kind, number):
    if kind == 'calc':
        return add(number, 'sleep 1')
    if kind == 'small':
        return submit(fire_processes.Small, n=orm.Int(number)).pk
    return submit(fire_processes.Parent).pk
def act(action, pk, seconds):
    try:
        future = getattr(manager.get_process_controller(), f'{action}_process')(pk)
        return unwrap_kiwi_future(future).result(seconds)
    except Exception as error:
        return f'{type(error).__name__}: {error}'
def states():
    attributes = ['process_label', 'process_state', 'exit_status', 'paused', 'exception']
    nodes = orm.QueryBuilder().append(orm.ProcessNode, project=['id', *(f'attributes.{name}' for name in attributes)])
    calls = orm.QueryBuilder().append(orm.ProcessNode, project=['id'], tag='caller')
    calls.append(orm.ProcessNode, project=['id'], with_incoming='caller')
    callers = {called: caller for caller, called in calls.all()}
    return [[pk, label, state or 'none', *rest, callers.get(pk)] for pk, label, state, *rest in nodes.all()]
def unsaved(pks):
    return [pk for pk in pks if not orm.load_node(pk).checkpoint]
def forgotten(pk):
    # Why no message can make it go on. AiiDA saved it waiting, and for nothing; or it was never saved, and so is no
    # task: a function, or what died with its worker before it was submitted. Whoever called it has called it again.
    node = orm.load_node(pk)
    if node.checkpoint:
        saved = deserialize_unsafe(node.checkpoint)
        return 'paused' if 'Waiting' in str(saved['_state']) and saved.get('_awaitables') == [] else ''
    return 'abandoned' if node.caller is not None and node.caller.is_terminated else ''
"""
PATIENCE = 600.0


class Evidence:
    """A file to which everybody appends: what ran, where, and who died."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.touch()

    def add(self, *words: object) -> None:
        """Append a line."""
        with self.path.open("a") as file:
            file.write(" ".join(map(str, words)) + "\n")

    def dies(self, pid: int) -> None:
        """Say that a process dies, before it does."""
        with contextlib.suppress(FileNotFoundError):
            started = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
            self.add("-", "dies", f"{pid}.{started}")

    def lines(self) -> list[list[str]]:
        """Return all lines, as words."""
        return [line.split() for line in self.path.read_text().splitlines()]

    def submitted(self) -> set[int]:
        """Return the children whose `submit` returned, so that their tasks may not be lost."""
        return {int(pk) for pk, step, _ in self._steps() if step == "submitted"}

    def died(self, pk: int | None) -> bool:
        """Say whether a process in which this one ran has died."""
        lines = self.lines()
        dead = {words[2] for words in lines if words[1] == "dies"}
        return any(noted == str(pk) and process in dead for noted, _, process in self._steps())

    def repeated(self) -> list[str]:
        """Return the steps that ran again though who ran them before had not died."""
        last, dead, wrong = dict[tuple[str, str], str](), set[str](), []
        for subject, what, *rest in self.lines():
            if subject != "-":
                before = last.get((subject, what))
                if before is not None and (before == rest[0] or before not in dead):
                    wrong.append(f"step {what} of {subject} ran in {rest[0]}, and before in {before} without its death")
                last[subject, what] = rest[0]
            elif what == "dies":
                dead.add(rest[0])
        return wrong

    def _steps(self) -> list[list[str]]:
        return [words for words in self.lines() if words[0] != "-"]


def unanswered(answers: Counter[str]) -> list[str]:
    """Say what had no answer though its worker lived: no blow comes while a pause or a play is waited for."""
    # A kill is AiiDA's own to wait with: for children, and for jobs that have just ended (UPSTREAM.md).
    late = [answer for answer in answers if answer.endswith(": TimeoutError") and not answer.startswith("kill ")]
    return [f"there was no answer: {answer}, {answers[answer]} times" for answer in late]


class Fire:
    """A daemon, what it works on, and what happens to it."""

    def __init__(self, aiida: verdi.Aiida, evidence: Evidence, seed: int, port: int | None) -> None:
        self.aiida, self.evidence, self.port = aiida, evidence, port
        self.chance = random.Random(seed)
        self.started: list[int] = []
        self.paused: set[int] = set()
        self.killed: set[int] = set()
        self.forgotten: dict[int, str] = {}
        self.wrong: list[str] = []
        self.left: list[str] = []
        self.blows = Counter[str]()
        self.answers = Counter[str]()
        self.helper = verdi.Helper(aiida, ORDERS)

    def workers(self) -> list[int]:
        """Return the pids of the daemon's workers that have come to this broker."""
        rows = control.status(self.aiida.config_path)["workers"]
        return [row["pid"] for row in rows if row["queues"] and row["pid"] != self.helper.process.pid]

    # Blows

    def kill_worker(self) -> None:
        """Circus starts another one."""
        workers = self.workers()
        if workers:
            self._kill(self.chance.choice(workers))

    def kill_coordinator(self) -> None:
        """Whoever sends next starts another one."""
        with contextlib.suppress(OSError, ValueError, KeyError):
            os.kill(self.aiida.coordinator_pid(), signal.SIGKILL)

    def kill_daemon(self) -> None:
        """Kill circus and all that it has started, and start it anew."""
        pid_file = self.aiida.home / ".aiida" / "daemon" / f"circus-{self.aiida.profile}.pid"
        with contextlib.suppress(OSError, ValueError):
            circus = pid_file.read_text().strip()
            listed = subprocess.run(["ps", "-eo", "pid=,ppid="], check=True, capture_output=True, text=True).stdout
            children = [pid for pid, parent in map(str.split, listed.splitlines()) if parent == circus]
            for pid in (circus, *children):
                self._kill(int(pid))
        self.start_daemon()

    def empty_tmp(self) -> None:
        """Remove all pipes, or their directory too, as a cleaner of /tmp does."""
        pipes = Path(f"/tmp/aiida_{self.aiida.profile}_pipes")
        if self.chance.random() < 0.5:
            shutil.rmtree(pipes, ignore_errors=True)
            return
        for path in pipes.iterdir():
            if path.name != ".config":
                path.unlink(missing_ok=True)

    def act(self) -> None:
        """Pause, play or kill some process."""
        action = self.chance.choice(["pause", "play", "pause", "play", "kill"])
        alive = [row for row in self.helper.ask("states") if row[2] in ("created", "running", "waiting")]
        if alive:
            self._ask(action, self.chance.choice(alive))

    def _ask(self, action: str, row: list[Any]) -> None:
        pk, label, *_ = row
        if action == "kill":
            self.killed.add(pk)
        elif action == "pause":
            self.paused.add(pk)
        self.evidence.add("-", action, pk)
        # Of a busy worker, each process has a turn when all others have had theirs.
        seconds = 20.0 if action == "kill" else 120.0
        answer = str(self.helper.ask("act", action, pk, seconds)).partition(":")[0]
        self.answers[f"{action} {label}: {answer}"] += 1

    def switch(self) -> None:
        """Go to RabbitMQ and back, processes in flight included."""
        self._stop_daemon()
        self._look_for_losses()
        options = ["configure-broker", "core.rabbitmq", "-n", "--broker-port", str(self.port)]
        self.aiida.verdi("profile", *options, self.aiida.profile)
        self._restart(10.0)
        self._stop_daemon()
        self.aiida.coordinator("configure")
        self._restart(0.0)

    def _restart(self, seconds: float) -> None:
        self.helper.end()
        self.aiida.verdi("process", "repair")
        self.start_daemon()
        self.helper = verdi.Helper(self.aiida, ORDERS)
        time.sleep(seconds)

    def _look_for_losses(self) -> None:
        # Now, since `repair` would mend it.
        missing, others = self._unrepaired()
        # What has no checkpoint is no task; what was not submitted, since its worker died before, is none yet.
        known = {*self.evidence.submitted(), *self.started}
        lost = missing & known - set(self.helper.ask("unsaved", sorted(missing & known)))
        self.wrong += [f"before a switch there was no task for {sorted(lost)}"] if lost else []
        # The task of a process that ended just before its worker died is there until the next one drops it.
        self.wrong += [f"before a switch: {each}" for each in others if "terminated" not in each]

    def _stop_daemon(self) -> None:
        for pid in self.aiida.workers():
            self.evidence.dies(pid)
        self.aiida.verdi("daemon", "stop")

    def start_daemon(self) -> None:
        """Start two workers, whatever the last ones have left."""
        eventually(lambda: "is running" in self._verdi("daemon", "start", "2") + self._verdi("daemon", "status"), 180)

    def _verdi(self, *arguments: str) -> str:
        command, streams = ["verdi", *arguments], {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        options: dict[str, Any] = {"env": self.aiida.env, "cwd": self.aiida.home, "text": True, "timeout": 120}
        return str(subprocess.run(command, check=False, **streams, **options).stdout)

    def _kill(self, pid: int) -> None:
        self.evidence.dies(pid)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)

    # The whole

    def burn(self, seconds: float) -> None:
        """Start processes, and strike."""
        blows: list[tuple[Callable[[], None], int]] = [
            (self.act, 10),
            (self.kill_worker, 4),
            (self.kill_coordinator, 4),
            (self.empty_tmp, 2),
            (self.kill_daemon, 1),
            (self.switch, 0 if self.port is None else 1),
        ]
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            for _ in range(self.chance.randrange(1, 6)):
                kind = self.chance.choices(["calc", "small", "parent"], [2, 4, 1])[0]
                self.started.append(self.helper.ask("start", kind, len(self.started)))
            time.sleep(self.chance.random() * 4)
            (blow,) = self.chance.choices([each for each, _ in blows], [weight for _, weight in blows])
            self.blows[blow.__name__] += 1
            self.evidence.add("-", blow.__name__, time.strftime("%H:%M:%S"))
            blow()

    def settle(self) -> list[list[Any]]:
        """Play what is paused, and wait until all has ended; return how all processes are."""
        self.start_daemon()
        end, looks = time.monotonic() + PATIENCE, 0
        while True:
            rows = self.helper.ask("states")
            alive = [row for row in rows if row[2] in ("created", "running", "waiting", "none")]
            paused = [row for row in alive if row[4]]
            why = {row[0]: self.helper.ask("forgotten", row[0]) for row in alive if not row[4]}
            self.forgotten = {pk: reason for pk, reason in why.items() if reason}
            # One that has just been played is saved as a forgotten one is, until it goes on.
            looks = looks + 1 if len(alive) == len(self.forgotten) else 0
            if not alive or looks > 10 or time.monotonic() > end:
                return rows
            for row in paused:
                self._ask("play", row)
            time.sleep(2.0)

    def judge(self, rows: list[list[Any]]) -> None:
        """Note what is not as it should be, and what is AiiDA's own doing."""
        lost_a_child = {row[6] for row in rows if row[2] == "killed"}
        for pk, label, state, status, _, exception, caller in rows:
            asked = pk in self.killed or caller in self.killed
            if self._left_by_aiida(pk, state, exception, caller):
                self.left.append(f"{label} {pk} is {state}, which is AiiDA's own doing with any broker (UPSTREAM.md)")
            elif state not in ("finished", "killed", "excepted"):
                self.wrong.append(f"{label} {pk} is {state}, and nobody goes on with it")
            elif state == "killed" and not asked:
                self.wrong.append(f"{label} {pk} was killed, and nobody asked for it")
            elif state == "excepted":
                self.wrong.append(f"{label} {pk} excepted: {exception}")
            elif state == "finished" and status and not (status == 400 and pk in lost_a_child):
                self.wrong.append(f"{label} {pk} finished with {status}")
        self.wrong += self.evidence.repeated()
        self.wrong += unanswered(self.answers)

    def _left_by_aiida(self, pk: int, state: str, exception: str | None, caller: int | None) -> bool:
        if self.forgotten.get(pk) == "paused":
            return pk in self.paused
        never_saved = self.forgotten.get(pk) == "abandoned" or "does not have a saved checkpoint" in (exception or "")
        return (never_saved or self._never_submitted(pk, state, caller)) and self.evidence.died(caller)

    def _never_submitted(self, pk: int, state: str, caller: int | None) -> bool:
        return state == "created" and caller is not None and pk not in self.evidence.submitted()

    def look_for_losses_at_last(self, rows: list[list[Any]]) -> None:
        """Note what `verdi process repair` would find, but for what AiiDA itself has lost."""
        missing, others = self._unrepaired()
        for pk, _label, state, _, _, exception, caller in rows:
            # One that waits for nothing is in a worker's hands all the same.
            if self.forgotten.get(pk) != "paused" and self._left_by_aiida(pk, state, exception, caller):
                missing.discard(pk)
        self.wrong += [f"there is no task for {sorted(missing)}"] if missing else []
        self.wrong += others

    def _unrepaired(self) -> tuple[set[int], list[str]]:
        """Return the processes without a task, and what else `verdi process repair` would mend."""
        said = self._verdi("process", "repair", "--dry-run")
        found = dict(re.findall(r"There are ([\w ]+): *\{([\d, ]+)\}", said))
        assert found or "No inconsistencies" in said, said
        missing = found.pop("active processes without process task", "")
        return {int(pk) for pk in re.findall(r"\d+", missing)}, [f"{what}: {pks}" for what, pks in found.items()]


def main(minutes: float, seed: int) -> int:
    """Burn, and say what is left; return the exit status."""
    root, wrong = Path(tempfile.mkdtemp(prefix="fire")), True
    try:
        wrong = bool(_burn(root, minutes, seed))
    finally:
        if wrong:
            print(f"The evidence is in {root}.")
        else:
            shutil.rmtree(root)
    return 1 if wrong else 0


def _burn(root: Path, minutes: float, seed: int) -> list[str]:
    with contextlib.ExitStack() as stack:
        site, home = root / "site", root / "home"
        home.mkdir()
        verdi.install(site, vendored=True)
        (site / "fire_processes.py").write_text(PROCESSES)
        evidence = Evidence(root / "evidence")
        os.environ["FIRE_EVIDENCE"] = str(evidence.path)
        port = None
        if verdi.RABBITMQ_SERVER.exists():
            port = stack.enter_context(verdi.rabbitmq(root / "rabbitmq")).port
        aiida = stack.enter_context(verdi.instance(site, home, vendored=True))
        aiida.verdi("config", "set", "warnings.rabbitmq_version", "False")
        aiida.start_daemon()
        fire = Fire(aiida, evidence, seed, port)
        fire.burn(minutes * 60)
        rows = fire.settle()
        fire.helper.end()
        fire.judge(rows)
        aiida.verdi("daemon", "stop")
        fire.look_for_losses_at_last(rows)
    print(f"{len(rows)} processes: {dict(Counter(row[2] for row in rows))}")
    print(f"blows: {dict(fire.blows)}{'' if port else ' (there is no RabbitMQ to switch to)'}")
    print(f"answers: {dict(fire.answers)}")
    print("\n".join([*fire.left, *(fire.wrong or ["Nothing was lost, ran twice without a death, or is stuck."])]))
    return fire.wrong
