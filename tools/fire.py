"""AiiDA under fire: real processes under random blows, for ``python tools/torture.py --aiida --minutes 60 --seed N``.

A daemon runs WorkChains with calcfunctions, parents with children, and CalcJobs on localhost, while workers, the
coordinator and the daemon itself are killed, processes are paused, played and killed, the pipes in /tmp are removed,
and the profile is switched to RabbitMQ and back. Each step of a WorkChain appends a line to a file, with the pid it ran
in. At the end every process is finished, killed because somebody asked for it, or excepted, which is named; no step ran
again but where the one before it was in a process that had died; and ``verdi process repair --dry-run`` finds nothing.
What AiiDA itself loses, as it does with any broker (UPSTREAM.md), is listed, and is not the broker's fault.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import signal
import subprocess
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import control
import verdi
from harness import eventually

PROCESSES = """
import os
from aiida import orm
from aiida.engine import ToContext, WorkChain, calcfunction

def note(node, step):
    evidence = os.open(os.environ["FIRE_EVIDENCE"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    os.write(evidence, f"{node.pk} {step} {os.getpid()}\\n".encode())
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

class Parent(WorkChain):
    @classmethod
    def define(cls, spec):
        super().define(spec)
        spec.outline(cls.spawn, cls.collect)
        spec.exit_code(400, "ERROR_CHILD", message="a child did not finish")

    def spawn(self):
        note(self.node, "spawn")
        return ToContext(**{f"child{n}": self.submit(Small, n=orm.Int(n).store()) for n in range(3)})

    def collect(self):
        note(self.node, "collect")
        if not all(self.ctx[f"child{n}"].is_finished_ok for n in range(3)):
            return self.exit_codes.ERROR_CHILD
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
def act(action, pk):
    try:
        future = getattr(manager.get_process_controller(), f'{action}_process')(pk)
        return unwrap_kiwi_future(future).result(20)
    except Exception as error:
        return f'{type(error).__name__}: {error}'
def states():
    rows = []
    for node in orm.QueryBuilder().append(orm.ProcessNode).all(flat=True):
        state = node.process_state.value if node.process_state else 'none'
        caller = node.caller.pk if node.caller else None
        rows.append([node.pk, node.process_label, state, node.exit_status, node.paused, node.exception, caller])
    return rows
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


class Fire:
    """A daemon, what it works on, and what happens to it."""

    def __init__(self, aiida: verdi.Aiida, evidence: Path, seed: int, port: int | None) -> None:
        self.aiida, self.evidence, self.port = aiida, evidence, port
        self.chance = random.Random(seed)
        self.started: list[int] = []
        self.killed: set[int] = set()
        self.gone: set[int] = set()
        """Processes of the system that were killed or told to end: what they had begun may run again."""
        self.forgotten: dict[int, str] = {}
        self.left: list[str] = []
        self.blows = Counter[str]()
        self.helper = verdi.Helper(aiida, ORDERS)

    def workers(self) -> list[int]:
        """Return the pids of the daemon's workers that have come to this broker."""
        rows = control.status(self.aiida.config_path)["workers"]
        return [row["pid"] for row in rows if row["queues"] and row["pid"] != self.helper.process.pid]

    # Blows

    def kill_worker(self) -> None:
        """Circus starts another one."""
        for pid in self.workers()[:1]:
            self._kill(pid)

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
        """Remove all pipes, as a cleaner of /tmp does."""
        for path in Path(f"/tmp/aiida_{self.aiida.profile}_pipes").iterdir():
            if path.name != ".config":
                path.unlink()

    def act(self) -> None:
        """Pause, play or kill some process."""
        action = self.chance.choice(["pause", "play", "pause", "play", "kill"])
        alive = [row[0] for row in self.helper.ask("states") if row[2] in ("created", "running", "waiting")]
        if alive:
            pk = self.chance.choice(alive)
            if action == "kill":
                self.killed.add(pk)
            self.helper.ask("act", action, pk)

    def switch(self) -> None:
        """Go to RabbitMQ and back, processes in flight included."""
        if self.port is None:
            return
        self._stop_daemon()
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

    def _stop_daemon(self) -> None:
        self.gone.update(self.aiida.workers())
        self.aiida.verdi("daemon", "stop")

    def start_daemon(self) -> None:
        """Start two workers, whatever the last ones have left."""
        eventually(lambda: "is running" in self._verdi("daemon", "start", "2") + self._verdi("daemon", "status"), 180)

    def _verdi(self, *arguments: str) -> str:
        command, options = ["verdi", *arguments], {"capture_output": True, "text": True, "timeout": 120}
        return subprocess.run(command, check=False, env=self.aiida.env, cwd=self.aiida.home, **options).stdout

    def _kill(self, pid: int) -> None:
        self.gone.add(pid)
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
            (self.switch, 1),
        ]
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            for _ in range(self.chance.randrange(1, 6)):
                kind = self.chance.choices(["calc", "small", "parent"], [2, 4, 1])[0]
                self.started.append(self.helper.ask("start", kind, len(self.started)))
            time.sleep(self.chance.random() * 4)
            (blow,) = self.chance.choices([each for each, _ in blows], [weight for _, weight in blows])
            self.blows[blow.__name__] += 1
            blow()

    def settle(self) -> list[list[Any]]:
        """Play what is paused, and wait until all has ended; return how all processes are."""
        self.start_daemon()
        end, looks = time.monotonic() + PATIENCE, 0
        while True:
            rows = self.helper.ask("states")
            alive = [row for row in rows if row[2] in ("created", "running", "waiting", "none")]
            paused = [row[0] for row in alive if row[4]]
            why = {row[0]: self.helper.ask("forgotten", row[0]) for row in alive if not row[4]}
            self.forgotten = {pk: reason for pk, reason in why.items() if reason}
            # One that has just been played is saved as a forgotten one is, until it goes on.
            looks = looks + 1 if len(alive) == len(self.forgotten) else 0
            if not alive or looks > 10 or time.monotonic() > end:
                return rows
            for pk in paused:
                self.helper.ask("act", "play", pk)
            time.sleep(2.0)

    def judge(self, rows: list[list[Any]]) -> list[str]:
        """Return what is not as it should be."""
        wrong = []
        by_pk = {row[0]: row for row in rows}
        for pk, label, state, status, _, exception, caller in rows:
            asked = pk in self.killed or caller in self.killed
            if self._left_by_aiida(pk, exception, caller):
                self.left.append(f"{label} {pk} is {state}, which is AiiDA's own doing with any broker (UPSTREAM.md)")
                continue
            if state not in ("finished", "killed", "excepted"):
                wrong.append(f"{label} {pk} is {state}, and nobody goes on with it")
            elif state == "killed" and not asked:
                wrong.append(f"{label} {pk} was killed, and nobody asked for it")
            elif state == "excepted":
                wrong.append(f"{label} {pk} excepted: {exception}")
            elif state == "finished" and status and not (status == 400 and self._lost_a_child(pk, by_pk)):
                wrong.append(f"{label} {pk} finished with {status}")
        return wrong + self._repeated()

    def _lost_a_child(self, pk: int, by_pk: dict[int, list[Any]]) -> bool:
        return any(row[6] == pk and row[2] == "killed" for row in by_pk.values())

    def _left_by_aiida(self, pk: int, exception: str | None, caller: int | None) -> bool:
        if self.forgotten.get(pk) == "paused":
            return True
        never_saved = self.forgotten.get(pk) == "abandoned" or "does not have a saved checkpoint" in (exception or "")
        notes = [line.split() for line in self.evidence.read_text().splitlines()]
        return never_saved and any(noted == str(caller) and int(pid) in self.gone for noted, _, pid in notes)

    def _repeated(self) -> list[str]:
        ran = defaultdict[tuple[str, str], list[int]](list)
        for line in self.evidence.read_text().splitlines() if self.evidence.exists() else ():
            pk, step, pid = line.split()
            ran[pk, step].append(int(pid))
        return [
            f"step {step} of {pk} ran again though process {pid} had not died"
            for (pk, step), pids in ran.items()
            for pid in pids[:-1]
            if pid not in self.gone
        ]

    def unrepaired(self) -> list[str]:
        """Return what `verdi process repair` would find, but for what AiiDA itself has lost."""
        repair = self._verdi("process", "repair", "--dry-run")
        found = {int(pk) for pks in re.findall(r"\{([\d, ]+)\}", repair) for pk in pks.split(", ")}
        if "No inconsistencies" in repair or (found and found <= self.forgotten.keys()):
            return []
        return [f"verdi process repair --dry-run: {repair}"]


def main(minutes: float, seed: int) -> int:
    """Burn, and say what is left; return the exit status."""
    with contextlib.ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fire")))
        site, home = root / "site", root / "home"
        home.mkdir()
        verdi.install(site, vendored=True)
        (site / "fire_processes.py").write_text(PROCESSES)
        os.environ["FIRE_EVIDENCE"] = str(root / "evidence")
        port = None
        if verdi.RABBITMQ_SERVER.exists():
            port = stack.enter_context(verdi.rabbitmq(root / "rabbitmq")).port
        aiida = stack.enter_context(verdi.instance(site, home, vendored=True))
        aiida.verdi("config", "set", "warnings.rabbitmq_version", "False")
        aiida.start_daemon()
        fire = Fire(aiida, root / "evidence", seed, port)
        fire.burn(minutes * 60)
        rows = fire.settle()
        fire.helper.end()
        wrong = fire.judge(rows)
        aiida.verdi("daemon", "stop")
        wrong += fire.unrepaired()
        print(f"{len(rows)} processes: {dict(Counter(row[2] for row in rows))}")
        print(f"blows: {dict(fire.blows)}; {len(fire.gone)} workers died or were ended")
        print("\n".join(fire.left))
        print("\n".join(wrong) or "Nothing was lost, nothing ran twice without a death, nothing is stuck.")
        return 1 if wrong else 0
