"""AiiDA's own work with each of its brokers, for ``python tools/benchmark.py --aiida``.

Each turn makes a profile of its own, with a daemon of two workers, for one broker: this one, ZeroMQ's, or a RabbitMQ of
our own. The brokers take turns in each round, and a figure is the median of the rounds. Nothing starts a broker that
was killed but what does so in AiiDA: here the next who sends, with ZeroMQ the daemon's supervisor; RabbitMQ is started
again at once, as an init system would.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import signal
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import verdi
from harness import eventually

PIPES, ZEROMQ, RABBIT = "named pipes", "ZeroMQ", "RabbitMQ"
CHAINS, PARENTS, CHILDREN, ACTED = 80, 4, 8, 20
PATIENCE = 60.0
PROCESSES = f"""{verdi.FAMILY}
import os, time
from aiida.engine import ToContext

def note(node, what):
    evidence = os.open(os.environ["EVIDENCE"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    os.write(evidence, f"{{node.pk}} {{what}} {{os.getpid()}} {{time.time()}}\\n".encode())
    os.close(evidence)

class Small(WorkChain):
    @classmethod
    def define(cls, spec):
        super().define(spec)
        spec.input("n", valid_type=orm.Int)
        spec.outline(cls.first, cls.second)

    def first(self):
        pass

    def second(self):
        pass

class Parent(Family):
    def spawn(self):
        children = {{f"child{{n}}": self.submit(Small, n=orm.Int(n).store()) for n in range({CHILDREN})}}
        return ToContext(**children)

class Waiting(Family):
    # For a child that nobody runs.
    def spawn(self):
        note(self.node, "held")
        return ToContext(child=orm.WorkChainNode().store())

    def load_instance_state(self, saved_state, load_context):
        super().load_instance_state(saved_state, load_context)
        note(self.node, "held")
"""
ORDERS = f"""
import realwork_processes as processes
from plumpy.futures import unwrap_kiwi_future

def ended(pks, seconds):
    # How many have finished well.
    end = time.monotonic() + seconds
    while True:
        query = orm.QueryBuilder().append(orm.ProcessNode, filters={{'id': {{'in': pks}}}})
        query.add_projection(orm.ProcessNode, ['attributes.process_state', 'attributes.exit_status'])
        well = sum(row == ['finished', 0] for row in query.all())
        if well == len(pks) or time.monotonic() > end:
            return well
        time.sleep(0.05)

def work(chains, parents):
    begin = time.monotonic()
    pks = [submit(processes.Small, n=orm.Int(n)).pk for n in range(chains)]
    pks += [submit(processes.Parent).pk for _ in range(parents)]
    return [pks, time.monotonic() - begin]

def hold(count):
    pks = [submit(processes.Waiting).pk for _ in range(count)]
    nodes, end = [orm.load_node(pk) for pk in pks], time.monotonic() + {PATIENCE}
    while any(node.process_state.value != 'waiting' for node in nodes):
        if time.monotonic() > end:
            raise TimeoutError(f'{{count}} processes were submitted, and not all of them wait')
        time.sleep(0.05)
    return pks

def ask(action, pk, seconds):
    # What it took, in milliseconds.
    begin = time.monotonic()
    controller = manager.get_process_controller()
    try:
        future = controller.get_status(pk) if action == 'status' else getattr(controller, f'{{action}}_process')(pk)
        unwrap_kiwi_future(future).result(seconds)
    except Exception:
        return None
    return 1e3 * (time.monotonic() - begin)

def act(action, pks):
    return [ask(action, pk, 20) for pk in pks]

def answers(pk, seconds):
    # After how long a call is answered again.
    begin = time.monotonic()
    while time.monotonic() - begin < seconds:
        if ask('status', pk, 1.0) is not None:
            return time.monotonic() - begin
        time.sleep(0.02)
    return None

def submitted():
    # After how long a process that is submitted now has finished.
    begin = time.monotonic()
    while time.monotonic() - begin < {PATIENCE}:
        try:
            pk = submit(processes.Small, n=orm.Int(1)).pk
        except Exception:
            time.sleep(0.02)
            continue
        return time.monotonic() - begin if ended([pk], {PATIENCE}) else None
    return None

def broker_pid():
    return manager.get_broker()._get_service_pid()
"""


class Turn:
    """One broker, and what is measured with it."""

    def __init__(self, aiida: verdi.Aiida, evidence: Path, server: verdi.RabbitMQ | None) -> None:
        self.aiida, self.evidence, self.server = aiida, evidence, server
        self.helper = verdi.Helper(aiida, ORDERS)
        self.figures: dict[str, float | None] = {}

    def measure(self, broker_pid: Callable[[], int]) -> dict[str, float | None]:
        """Measure everything; what ends badly comes last."""
        # The first process of a worker waits for imports.
        self.helper.ask("ended", self.helper.ask("work", 4, 0)[0], PATIENCE)
        self._work(broker_pid())
        self._act()
        self._kill_a_worker()
        self._restart_the_daemon()
        self._begin_anew()
        self._kill_the_broker(broker_pid())
        return self.figures

    def _work(self, broker: int) -> None:
        before, begin = processor_seconds(broker), time.monotonic()
        pks, submitting = self.helper.ask("work", CHAINS, PARENTS)
        finished = self.helper.ask("ended", pks, 300.0)
        self.figures["submitting 84 (s)"] = submitting
        self.figures["all 116 finished (s)"] = time.monotonic() - begin if finished == len(pks) else None
        self.figures["broker's processor time for them (s)"] = processor_seconds(broker) - before
        self.figures["broker's memory (MiB)"] = resident(broker)

    def _act(self) -> None:
        pks = self.helper.ask("hold", ACTED)
        for action in ("pause", "play", "status", "kill"):
            took = self.helper.ask("act", action, pks)
            answered = [each for each in took if each is not None]
            self.figures[f"{action} (ms)"] = statistics.median(answered) if answered else None
            self.figures[f"{action}, the slowest of {ACTED} (ms)"] = max(answered) if answered == took else None

    def _kill_a_worker(self) -> None:
        (pk,) = self.helper.ask("hold", 1)
        (pid,) = self._holders(pk)
        begin = time.time()
        os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(AssertionError):
            eventually(lambda: len(self._holders(pk)) > 1, PATIENCE)
        after = [when - begin for when in self._holders(pk).values() if when > begin]
        self.figures["a worker killed: its process goes on after (s)"] = after[0] if after else None
        self.helper.ask("act", "kill", [pk])
        eventually(lambda: len(self.aiida.workers()) == 2, PATIENCE)

    def _holders(self, pk: int) -> dict[int, float]:
        lines = self.evidence.read_text().splitlines() if self.evidence.exists() else []
        rows = [line.split() for line in lines if line.split()[0] == str(pk)]
        return {int(pid): float(when) for _, _, pid, when in rows}

    def _restart_the_daemon(self) -> None:
        begin = time.monotonic()
        pks, _ = self.helper.ask("work", 20, 2)
        self.aiida.verdi("daemon", "restart")
        finished = self.helper.ask("ended", pks, 120.0)
        took = time.monotonic() - begin
        self.figures["38 submitted, daemon restarted: all finished after (s)"] = took if finished == len(pks) else None

    def _begin_anew(self) -> None:
        """Have a helper, and workers, that have seen no restart."""
        self.helper.end()
        self.aiida.verdi("daemon", "stop")
        self.aiida.start_daemon()
        self.helper = verdi.Helper(self.aiida, ORDERS)

    def _kill_the_broker(self, broker: int) -> None:
        pks = self.helper.ask("hold", 4)
        other = verdi.Helper(self.aiida, ORDERS)
        try:
            other.ask("answers", pks[0], PATIENCE)  # It has a communicator, too.
            with concurrent.futures.ThreadPoolExecutor() as pool:
                os.kill(broker, signal.SIGKILL)
                again = pool.submit(self._again)
                answered = pool.submit(self.helper.ask, "answers", pks[0], PATIENCE)
                finished = pool.submit(other.ask, "submitted")
                self.figures["broker killed: a call is answered after (s)"] = answered.result()
                self.figures["broker killed: a process submitted then finished after (s)"] = finished.result()
                again.result()
            reached = [self.helper.ask("answers", pk, 10.0) is not None for pk in pks]
            self.figures["broker killed: of 4 running processes, reached"] = sum(reached)
        finally:
            other.end()

    def _again(self) -> None:
        if self.server is not None:
            self.server.kill()
            self.server.start()


def resident(pid: int) -> float:
    """Return a process's resident memory, in MiB (proc(5))."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def processor_seconds(pid: int) -> float:
    """Return the processor time of a process (proc(5))."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextlib.contextmanager
def turn(site: Path, broker: str) -> Iterator[dict[str, float | None]]:
    """Give the figures of one broker, with a profile that is gone afterwards."""
    with contextlib.ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="realwork")))
        home, evidence = root / "home", root / "evidence"
        home.mkdir()
        os.environ["EVIDENCE"] = str(evidence)
        server = stack.enter_context(verdi.rabbitmq(root / "rabbitmq")) if broker == RABBIT else None
        aiida = stack.enter_context(verdi.instance(site, home, vendored=True))
        configure = ["profile", "configure-broker"]
        if server is not None:
            aiida.verdi("config", "set", "warnings.rabbitmq_version", "False")
            aiida.verdi(*configure, "core.rabbitmq", "-n", "--broker-port", str(server.port), aiida.profile)
        elif broker == ZEROMQ:
            aiida.verdi(*configure, "core.zeromq", "-n", aiida.profile)
        aiida.start_daemon()
        measured = Turn(aiida, evidence, server)

        def broker_pid() -> int:
            if server is not None:
                return server.pid
            return int(measured.helper.ask("broker_pid")) if broker == ZEROMQ else aiida.coordinator_pid()

        try:
            yield measured.measure(broker_pid)
        finally:
            measured.helper.end()


def contest(rounds: int, progress: Callable[[str], None]) -> dict[str, dict[str, float | None]]:
    """Measure all in turn; return a row of brokers for each figure, None where it never came."""
    values: dict[str, dict[str, list[float | None]]] = defaultdict(lambda: defaultdict(list))
    with tempfile.TemporaryDirectory(prefix="realwork") as name:
        site = Path(name) / "site"
        verdi.install(site, vendored=True)
        (site / "realwork_processes.py").write_text(PROCESSES)
        for number in range(rounds):
            for broker in (PIPES, ZEROMQ, RABBIT):
                if broker == RABBIT and not verdi.RABBITMQ_SERVER.exists():
                    continue
                progress(f"round {number + 1} of {rounds}: {broker}")
                with turn(site, broker) as figures:
                    for figure, value in figures.items():
                        values[figure][broker].append(value)
    return {figure: {broker: _median(each) for broker, each in row.items()} for figure, row in values.items()}


def _median(values: list[Any]) -> float | None:
    """Return None where most of the rounds had none."""
    inf = float("inf")
    middle = statistics.median_high([inf if value is None else value for value in values])
    return None if middle == inf else middle


def print_rows(rows: dict[str, dict[str, float | None]]) -> None:
    """Print the table."""
    brokers = list(next(iter(rows.values())))
    print(f"| with AiiDA's daemon, two workers | {' | '.join(brokers)} |\n|---|{'---:|' * len(brokers)}")
    for figure, row in rows.items():
        shown = ["never" if row[broker] is None else _rounded(row[broker]) for broker in brokers]
        print(f"| {figure} | {' | '.join(shown)} |")


def _rounded(value: float | None) -> str:
    assert value is not None
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.{1 if value >= 1 else 2}f}"
