"""README.md: what it shows runs as it is written, from the clone and from outside of it, and what it names is there."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import directories
from harness import HERE, TIMEOUT, Broker, at_home
from test_layout import MODULES

README = (HERE / "README.md").read_text()
IMPORT = "from pipebroker import PipeCommunicator\n"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def block(containing: str) -> str:
    (found,) = (each for each in blocks("python") if containing in each)
    return str(found)


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Path]:
    with at_home(tmp_path) as made:
        yield made


def package(directory: Path) -> None:
    """Make a package of the modules, as an installation does."""
    directory.mkdir(parents=True)
    (directory / "__init__.py").write_text((HERE / "vendored" / "__init__.py").read_text())
    for name in MODULES:
        (directory / name).write_text((HERE / name).read_text())


@pytest.fixture(params=["pipebroker", "aiida_namedpipe", "aiida_namedpipe.pipebroker", "aiida.brokers.namedpipe"])
def imports(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Path]:
    """The statement that imports the broker, and where Python is to look for it."""
    name = str(request.param)
    if name == "pipebroker":
        return IMPORT, HERE
    site = tmp_path / "site"
    parts = name.removesuffix(".pipebroker").split(".")
    package(site.joinpath(*parts))
    for depth in range(1, len(parts)):
        (site.joinpath(*parts[:depth]) / "__init__.py").touch()
    return f"from {name} import PipeCommunicator\n", site


def begin(script: str, home: Path, imports: tuple[str, Path]) -> subprocess.Popen[str]:
    """Run a script somewhere else than here."""
    assert script.count(IMPORT) == 1
    outside = home / "outside"
    outside.mkdir(exist_ok=True)
    return subprocess.Popen(
        [sys.executable, "-u", "-c", script.replace(IMPORT, imports[0])],
        cwd=outside,
        env={**os.environ, "HOME": str(home), "PYTHONPATH": str(imports[1])},
        stdout=subprocess.PIPE,
        text=True,
    )


def said(script: str, home: Path, imports: tuple[str, Path]) -> str:
    """Run a script to its end; return what it prints."""
    with begin(script, home, imports) as process:
        out, _ = process.communicate(timeout=TIMEOUT)
        assert process.returncode == 0
        return out


def test_the_worker_and_the_sender(home: Path, imports: tuple[str, Path]) -> None:
    with begin(block("my_task_handler"), home, imports) as worker:
        assert said(block("task_send"), home, imports) == "{'result': 'success'}\n"
        assert worker.stdout is not None
        assert worker.stdout.readline() == "Received task: {'command': 'process', 'data': 123}\n"
        worker.send_signal(signal.SIGINT)
        assert worker.wait(TIMEOUT) == 0


def test_broadcasts_and_calls(home: Path, imports: tuple[str, Path]) -> None:
    assert said(block("broadcast_send"), home, imports) == "Broadcast from main: {'message': 'Hello, workers!'}\n"
    assert said(block("rpc_send"), home, imports) == "{'response': 'processed'}\n"


def test_every_python_block_is_run_here() -> None:
    run = [block(each) for each in ("my_task_handler", "task_send", "broadcast_send", "rpc_send", "drain()")]
    assert sorted(run) == sorted(blocks("python"))


def test_the_commands_of_a_coordinator(tmp_path: Path) -> None:
    (script,) = (each for each in blocks("bash") if "my_profile start" in each)
    environment = {**os.environ, "HOME": str(tmp_path)}
    for line in script.splitlines():
        words = shlex.split(line.partition("#")[0])
        command = [sys.executable, *words[1:]]
        subprocess.run(command, check=True, cwd=HERE, env=environment, stdout=subprocess.DEVNULL, timeout=TIMEOUT)
    layout = directories.locate(tmp_path / ".aiida" / "profiles" / "my_profile")
    assert layout is not None
    directories.remove_pipes(layout.pipes)


def test_what_it_names_is_there() -> None:
    for name in re.findall(r"`([A-Z]+\.md|tools/\w+\.\w+|examples/|tests/\w+\.py)", README):
        assert (HERE / name).exists(), name
    order = README[README.index("The modules, in the order") :]
    listed = set(re.findall(r"`(\w+\.py)`", order.partition("Who asks")[0]))
    assert listed | {name for name in MODULES if name.startswith("control_")} == {*MODULES, "vendor.py"}


def test_every_figure_names_the_command_that_prints_it() -> None:
    for text in (README, (HERE / "FIGURES.md").read_text()):
        before = text
        for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
            if re.search(r"\| [\d.,]+ \|", table):
                before = text[: text.index(table)]
                assert re.search(r"`(python tools/\w+\.py[^`]*|strace[^`]*)`", before), table


def test_the_readmes_worker_finishes_what_it_has_when_it_is_told_to_end(served: Broker) -> None:
    script = block("drain()")
    ours = script.replace("'my_profile', Path", f"{served.profile!r}, Path")
    ours = ours.replace("Path.home() / '.aiida' / 'profiles' / 'my_profile'", repr(str(served.config_path)))
    ours = ours.replace(
        'lambda communicator, task: {"result": "success"}', "lambda _, task: print(task) or time.sleep(1)"
    )
    assert ours.count(served.profile) == 2 and "time.sleep(1)" in ours
    child = served.spawn(ours.replace("signal.sigwait", "print('ready'); signal.sigwait"))
    assert child.line() == "ready"
    sender = served.communicator()
    for number in range(2):
        sender.task_send(number, no_reply=True)
    assert child.line() == "0"
    child.process.terminate()
    assert child.process.wait(TIMEOUT) == 0
    rows = {row["state"]: row["deaths"] for row in served.tasks()}
    assert rows["completed"] == 0 and set(rows.values()) == {0}


def test_the_demo_loses_nothing(tmp_path: Path) -> None:
    demo = subprocess.run(
        [sys.executable, HERE / "demo.py"],
        check=False,
        capture_output=True,
        text=True,
        timeout=8 * TIMEOUT,
        cwd=tmp_path,
    )
    assert (demo.returncode, demo.stderr) == (0, "") and demo.stdout.endswith("Nothing was lost.\n")
