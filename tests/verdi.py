"""A real AiiDA in a directory of its own, with this broker copied in or as a plugin, and a RabbitMQ beside it."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness import HERE, eventually

SPEC = importlib.util.find_spec("aiida")
RABBITMQ_SERVER = Path("/usr/lib/rabbitmq/bin/rabbitmq-server")
PRELUDE = """
import json, os, sys, time
from aiida import load_profile, orm
from aiida.engine import submit
from aiida.manage import get_manager
from aiida.plugins import CalculationFactory, WorkflowFactory
load_profile()
manager = get_manager()

def code():
    found = orm.QueryBuilder().append(orm.InstalledCode).first(flat=True)
    return found or orm.InstalledCode(
        label='bash', computer=orm.load_computer('localhost'), filepath_executable='/bin/bash',
        default_calc_job_plugin='core.arithmetic.add',
    ).store()

def add(x, prepend=''):
    options = {'resources': {'num_machines': 1}, 'prepend_text': prepend}
    inputs = {'code': code(), 'x': orm.Int(x), 'y': orm.Int(1), 'metadata': {'options': options}}
    return submit(CalculationFactory('core.arithmetic.add'), **inputs).pk

def chain(x):
    return submit(
        WorkflowFactory('core.arithmetic.multiply_add'), x=orm.Int(x), y=orm.Int(2), z=orm.Int(3), code=code()
    ).pk

def answer(value):
    print('ANSWER', json.dumps(value), flush=True)
"""
FAMILY = """
from aiida import orm
from aiida.engine import WorkChain

class Family(WorkChain):
    # Has children in its context, which is for `spawn` to see to.
    @classmethod
    def define(cls, spec):
        super().define(spec)
        spec.outline(cls.spawn, cls.collect)
        spec.exit_code(400, "ERROR_CHILD", message="a child did not finish")

    def collect(self):
        if not all(child.is_finished_ok for child in self.ctx.values()):
            return self.exit_codes.ERROR_CHILD
"""
OBEY = """
answer('ready')
for line in sys.stdin:
    what, *arguments = json.loads(line)
    answer(globals()[what](*arguments))
"""


@dataclass
class Aiida:
    """An AiiDA profile in a directory of its own."""

    home: Path
    env: dict[str, str]
    profile: str
    vendored: bool

    @property
    def config_path(self) -> Path:
        return self.home / ".aiida" / "profiles" / self.profile

    def verdi(self, *arguments: str, status: int = 0) -> str:
        result = subprocess.run(
            ["verdi", *arguments], env=self.env, capture_output=True, text=True, timeout=120, cwd=self.home
        )
        assert result.returncode == status, f"{arguments}: {result.returncode}\n{result.stdout}\n{result.stderr}"
        return result.stdout + result.stderr

    def make(self) -> None:
        """Make the profile, and point it at the broker."""
        without = ["--no-broker"] if "--no-broker" in self.verdi("presto", "--help") else []
        self.verdi("presto", "--non-interactive", "--profile-name", self.profile, *without)
        self.coordinator("configure")

    def start_daemon(self, workers: int = 2) -> None:
        """Start workers, with more patience for them than AiiDA's 2 seconds, which a busy machine exceeds."""
        self.verdi("config", "set", "daemon.timeout", "60")
        self.verdi("daemon", "start", str(workers))

    def coordinator(self, *arguments: str, status: int = 0) -> str:
        """Run `verdi coordinator` or, where that is not there, `aiida-coordinator`."""
        if self.vendored:
            return self.verdi("coordinator", *arguments, status=status)
        result = subprocess.run(
            ["aiida-coordinator", *arguments], env=self.env, capture_output=True, text=True, timeout=60, cwd=self.home
        )
        assert result.returncode == status, f"{arguments}: {result.returncode}\n{result.stdout}\n{result.stderr}"
        return result.stdout + result.stderr

    def python(self, script: str) -> Any:
        """Run a script after `PRELUDE`; return what it gave to `answer`."""
        result = subprocess.run(
            [sys.executable, "-c", PRELUDE + script], env=self.env, capture_output=True, text=True, timeout=300,
            cwd=self.home,
        )  # fmt: skip
        assert result.returncode == 0, result.stdout + result.stderr
        answers = [line.removeprefix("ANSWER ") for line in result.stdout.splitlines() if line.startswith("ANSWER ")]
        return json.loads(answers[-1]) if answers else None

    def submit(self, calculations: int, chains: int = 0, prepend: str = "") -> list[int]:
        return self.python(
            f"answer([add(i, {prepend!r}) for i in range({calculations})] + [chain(i) for i in range({chains})])"
        )

    def wait(self, pks: list[int], seconds: float) -> None:
        """Wait until the processes have finished, with exit status 0."""
        script = f"""
nodes, end = [orm.load_node(pk) for pk in {pks}], time.monotonic() + {seconds}
while not all(node.is_terminated for node in nodes) and time.monotonic() < end:
    time.sleep(0.2)
answer([[node.pk, node.process_state.value, node.exit_status] for node in nodes])
"""
        rows = [row for row in self.python(script) if row[1:] != ["finished", 0]]
        assert not rows, rows

    def workers(self) -> list[int]:
        """Return the pids of the daemon's workers."""
        # Its circus answers with an error, and no "info", where it looks at a process that is just ending.
        script = "answer(manager.get_daemon_client().get_worker_info())"
        return [int(pid) for pid in eventually(lambda: self.python(script).get("info"), 60)]

    def coordinator_pid(self) -> int:
        return int(json.loads((self.config_path / "pipes" / "coordinator.json").read_text())["pid"])

    def process_control(self) -> Any:
        """Return the settings of the profile's broker, which is this one."""
        said = json.loads((self.home / ".aiida" / "config.json").read_text())["profiles"][self.profile]
        assert said["process_control"]["backend"] == "core.namedpipe"
        return said["process_control"]["config"]

    def repaired(self) -> bool:
        return "No inconsistencies" in self.verdi("process", "repair")

    def tasks(self) -> list[Path]:
        return sorted((self.config_path / "coordinator").glob("task_*.json"))


ANSWER_SECONDS = 600.0


class Helper:
    """A process that has AiiDA loaded and obeys orders, so that not each of them waits for AiiDA's start."""

    def __init__(self, aiida: Aiida, orders: str) -> None:
        """`orders` defines functions."""
        self._said = aiida.home / f"helper-{uuid.uuid4().hex[:8]}.log"
        with self._said.open("w") as said:
            self.process = subprocess.Popen(
                [sys.executable, "-c", PRELUDE + orders + OBEY],
                env=aiida.env,
                cwd=aiida.home,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=said,
                text=True,
            )
        self._answer()

    def ask(self, what: str, *arguments: Any) -> Any:
        """Have a function called; return what it returned."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([what, *arguments]) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        late = threading.Timer(ANSWER_SECONDS, self.process.kill)
        late.start()
        try:
            for line in self.process.stdout:
                if line.startswith("ANSWER "):
                    return json.loads(line.removeprefix("ANSWER "))
        finally:
            late.cancel()
            late.join()
        raise AssertionError(f"the helper has ended, or gave no answer: {self._said.read_text()[-2000:]}")

    def end(self) -> None:
        """End it."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(60)


def install(directory: Path, *, vendored: bool) -> None:
    """Make a directory of packages that goes before the installed: an AiiDA with the broker in it, or the plugin."""
    if vendored:
        assert SPEC is not None and SPEC.origin is not None
        package = Path(SPEC.origin).parent
        shutil.copytree(package, directory / "aiida")
        metadata = next(package.parent.glob("aiida_core-*.dist-info"))
        shutil.copytree(metadata, directory / metadata.name)
        command = [sys.executable, HERE / "vendor.py", directory / "aiida"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    else:
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(directory), str(HERE)]
        subprocess.run(pip, check=True)


@contextlib.contextmanager
def instance(site: Path, home: Path, *, vendored: bool) -> Iterator[Aiida]:
    """Make a profile in a directory; end all that runs for it afterwards."""
    env = {
        **os.environ,
        "AIIDA_PATH": str(home),
        "PYTHONPATH": str(site),
        "PATH": os.pathsep.join([str(site / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]]),
        "PYTHONWARNINGS": "ignore",
    }
    profile = f"test-{uuid.uuid4().hex[:8]}"
    made = Aiida(home, env, profile, vendored)
    made.make()
    try:
        yield made
    finally:
        try:
            if (home / ".aiida" / "daemon" / f"circus-{profile}.pid").exists():
                made.verdi("daemon", "stop")
        finally:
            made.coordinator("stop")
            shutil.rmtree(f"/tmp/aiida_{profile}_pipes", ignore_errors=True)


class RabbitMQ:
    """A RabbitMQ of our own, on the loopback interface only."""

    def __init__(self, home: Path) -> None:
        """`home` is a directory that is not there yet."""
        self.home, self.port = home, 20000 + os.getpid() % 10000
        home.mkdir()
        listener = f"listeners.tcp.1 = 127.0.0.1:{self.port}\n"
        (home / "rabbitmq.conf").write_text(listener + "consumer_timeout = 36000000000\n")
        self.env = {
            **os.environ,
            "HOME": str(home),
            "RABBITMQ_NODENAME": f"test{self.port}@localhost",
            "RABBITMQ_MNESIA_BASE": f"{home}/mnesia",
            "RABBITMQ_LOG_BASE": f"{home}/log",
            "RABBITMQ_CONFIG_FILE": f"{home}/rabbitmq.conf",
            "RABBITMQ_CONF_ENV_FILE": f"{home}/none",
            "RABBITMQ_ENABLED_PLUGINS_FILE": f"{home}/enabled_plugins",
            "RABBITMQ_GENERATED_CONFIG_DIR": f"{home}/config",
            "RABBITMQ_FEATURE_FLAGS_FILE": f"{home}/feature_flags",
            "RABBITMQ_PID_FILE": f"{home}/pid",
            "RABBITMQ_DIST_PORT": str(self.port + 20000),
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "-kernel inet_dist_use_interface {127,0,0,1}",
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "ERL_EPMD_PORT": str(self.port + 1),
        }
        self._server: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """Of Erlang's machine, which the server's command is not."""
        return int((self.home / "pid").read_text())

    def start(self) -> None:
        """Start it, and wait until it listens."""
        quiet = subprocess.DEVNULL
        self._server = subprocess.Popen([RABBITMQ_SERVER], env=self.env, stdout=quiet, stderr=quiet)
        eventually(self._listens, 60)

    def kill(self) -> None:
        """Kill it, so that `start` is a start after a crash."""
        assert self._server is not None
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        self._server.wait(30)

    def stop(self) -> None:
        """End it."""
        if self._server is not None:
            self._server.terminate()
            self._server.wait(30)

    def _listens(self) -> bool:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
            return True
        return False


@contextlib.contextmanager
def rabbitmq(home: Path) -> Iterator[RabbitMQ]:
    """Run a RabbitMQ of our own."""
    server = RabbitMQ(home)
    # The server would start a port mapper that outlives it.
    mapper = subprocess.Popen(["epmd"], env=server.env)
    try:
        server.start()
        yield server
    finally:
        server.stop()
        mapper.kill()
        mapper.wait()
