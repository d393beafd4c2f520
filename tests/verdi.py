"""A real AiiDA in a directory of its own, with this broker copied in or as a plugin, and a RabbitMQ beside it."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness import HERE, eventually

SPEC = importlib.util.find_spec("aiida")
RABBITMQ = Path("/usr/lib/rabbitmq/bin/rabbitmq-server")
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
        rows = self.python(script)
        assert [row for row in rows if row[1:] != ["finished", 0]] == []

    def workers(self) -> list[int]:
        """Return the pids of the daemon's workers."""
        info = self.python("answer(manager.get_daemon_client().get_worker_info())")["info"]
        return [int(pid) for pid in info]

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


def install(directory: Path, *, vendored: bool) -> None:
    """Make a directory of packages that goes before the installed: an AiiDA with the broker in it, or the plugin."""
    if vendored:
        assert SPEC is not None and SPEC.origin is not None
        package = Path(SPEC.origin).parent
        shutil.copytree(package, directory / "aiida")
        metadata = next(package.parent.glob("aiida_core-*.dist-info"))
        shutil.copytree(metadata, directory / metadata.name)
        subprocess.run([sys.executable, HERE / "vendor.py", directory / "aiida"], check=True)
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
        if (home / ".aiida" / "daemon" / f"circus-{profile}.pid").exists():
            made.verdi("daemon", "stop")
        made.coordinator("stop")
        shutil.rmtree(f"/tmp/aiida_{profile}_pipes", ignore_errors=True)


@contextlib.contextmanager
def rabbitmq(home: Path) -> Iterator[int]:
    """A RabbitMQ of our own, on the loopback interface only; gives its port."""
    port = 20000 + os.getpid() % 10000
    home.mkdir()
    (home / "rabbitmq.conf").write_text(f"listeners.tcp.1 = 127.0.0.1:{port}\nconsumer_timeout = 36000000000\n")
    env = {
        **os.environ,
        "HOME": str(home),
        "RABBITMQ_NODENAME": f"test{port}@localhost",
        "RABBITMQ_MNESIA_BASE": f"{home}/mnesia",
        "RABBITMQ_LOG_BASE": f"{home}/log",
        "RABBITMQ_CONFIG_FILE": f"{home}/rabbitmq.conf",
        "RABBITMQ_CONF_ENV_FILE": f"{home}/none",
        "RABBITMQ_ENABLED_PLUGINS_FILE": f"{home}/enabled_plugins",
        "RABBITMQ_GENERATED_CONFIG_DIR": f"{home}/config",
        "RABBITMQ_FEATURE_FLAGS_FILE": f"{home}/feature_flags",
        "RABBITMQ_PID_FILE": f"{home}/pid",
        "RABBITMQ_DIST_PORT": str(port + 20000),
        "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "-kernel inet_dist_use_interface {127,0,0,1}",
        "ERL_EPMD_ADDRESS": "127.0.0.1",
        "ERL_EPMD_PORT": str(port + 1),
    }
    # The server would start a port mapper that outlives it.
    mapper = subprocess.Popen(["epmd"], env=env)
    server = subprocess.Popen([RABBITMQ], env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        eventually(lambda: f"127.0.0.1:{port}" in _connectable(port), 60)
        yield port
    finally:
        server.terminate()
        server.wait(30)
        mapper.kill()
        mapper.wait()


def _connectable(port: int) -> str:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return f"127.0.0.1:{port}"
    return ""
