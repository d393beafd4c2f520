"""The broker under real AiiDA: its daemon, storage and commands, no mocks; each test has an AIIDA_PATH of its own."""

from __future__ import annotations

import fcntl
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import directories
import pipebroker
import verdi
from harness import HERE, eventually
from verdi import PRELUDE, Aiida

if importlib.util.find_spec("aiida") is None:
    pytest.skip("aiida-core is not installed", allow_module_level=True)


@pytest.fixture(scope="module", params=["vendored", "plugin"])
def site(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bool]:
    """A directory of packages, and whether AiiDA is there with the broker in it, or the plugin alone."""
    directory = tmp_path_factory.mktemp("site")
    verdi.install(directory, vendored=request.param == "vendored")
    return directory, request.param == "vendored"


@pytest.fixture
def aiida(site: tuple[Path, bool], tmp_path: Path) -> Iterator[Aiida]:
    with verdi.instance(site[0], tmp_path, vendored=site[1]) as made:
        yield made


@pytest.fixture
def rabbitmq(tmp_path: Path) -> Iterator[int]:
    if not verdi.RABBITMQ_SERVER.exists():
        pytest.skip("rabbitmq-server is not installed")
    with verdi.rabbitmq(tmp_path / "rabbitmq") as server:
        yield server.port


def test_commands(aiida: Aiida) -> None:
    assert "not running" in aiida.coordinator("status", status=3)
    assert "not running" in aiida.coordinator("status", status=3)
    aiida.coordinator("start")
    first = aiida.coordinator_pid()
    assert str(first) in aiida.coordinator("status")
    status = aiida.verdi("status")
    assert "✔ broker" in status and str(first) in status
    aiida.coordinator("restart")
    assert aiida.coordinator_pid() != first
    aiida.coordinator("stop")
    assert "not running" in aiida.coordinator("status", status=3)


def test_status_is_red_when_nobody_serves_and_starts_nothing(aiida: Aiida) -> None:
    status = aiida.verdi("status", status=1)
    command = (
        f"verdi -p {aiida.profile} coordinator" if aiida.vendored else f"aiida-coordinator --profile {aiida.profile}"
    )
    assert "✘ broker" in status and f"'{command} start'" in status
    assert not (aiida.config_path / "coordinator").exists()
    # What it says works, and so does a submit without.
    subprocess.run([*command.split(), "start"], env=aiida.env, check=True, timeout=60, cwd=aiida.home)
    assert "✔ broker" in aiida.verdi("status")
    aiida.coordinator("stop")
    (pk,) = aiida.submit(1)
    assert aiida.tasks() and pk


def test_commands_without_autostart(aiida: Aiida) -> None:
    assert aiida.process_control() == {"autostart": True, "idle": 300}
    said = aiida.coordinator("configure", "--no-autostart", "--idle", "60")
    assert f"'verdi -p {aiida.profile} daemon start'" in said
    assert aiida.process_control() == {"autostart": False, "idle": 60}
    aiida.verdi("status", status=1)
    asked = aiida.python("manager.get_communicator(); answer(manager.get_broker().probe_service_status()['pid'])")
    assert asked is None
    assert "not running" in aiida.coordinator("status", status=3)


def test_a_profile_that_aiida_does_not_know_is_said_to_be_that(aiida: Aiida) -> None:
    command = ["aiida-coordinator", "--profile", "mistyped"]
    if aiida.vendored:
        command = [sys.executable, "-m", "aiida.brokers.namedpipe.coordinator", *command[1:]]
    for arguments in (
        ["start"],
        ["configure"],
        ["configure", "--config-path", str(aiida.home / "profiles" / "mistyped")],
    ):
        said = subprocess.run(
            [*command, *arguments], env=aiida.env, capture_output=True, text=True, timeout=60, cwd=aiida.home
        )
        assert said.returncode == 1 and said.stderr.count("\n") == 1 and "mistyped" in said.stderr, said
    assert not (aiida.home / ".aiida" / "profiles" / "mistyped").exists()


def test_doors(aiida: Aiida) -> None:
    if not aiida.vendored or "configure-broker" not in aiida.verdi("profile", "--help"):
        pytest.skip("AiiDA's own commands know the broker where it is copied into 2.9 or newer")
    settings = aiida.process_control()
    aiida.verdi("profile", "configure-broker", "none", "--non-interactive")
    said = aiida.verdi("profile", "configure-broker", "core.namedpipe", "--non-interactive", "--idle", "7")
    assert "uses the named pipe broker now" in said and aiida.process_control() == {**settings, "idle": 7}
    for number, command in enumerate((
        ["presto", "--use-namedpipe", "--non-interactive", "--profile-name"],
        ["profile", "setup", "core.sqlite_dos", "--non-interactive", "--email", "a@b.c", "--broker", "core.namedpipe",
         "--no-set-as-default", "--profile-name"],
    )):  # fmt: skip
        other = Aiida(aiida.home, aiida.env, f"{aiida.profile}-{number}", aiida.vendored)
        aiida.verdi(*command, other.profile)
        assert other.process_control() == settings
        aiida.verdi("-p", other.profile, "coordinator", "start")
        assert aiida.verdi("-p", other.profile, "status").count("✔ broker") == 1
        lock = (other.config_path / "coordinator" / "coordinator.lock").open()
        aiida.verdi("profile", "delete", "--force", "--delete-data", other.profile)
        assert not Path(f"/tmp/aiida_{other.profile}_pipes").exists()
        assert not (other.config_path / "coordinator").exists()
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # Whoever had it has ended.
        lock.close()
    aiida.start_daemon(1)
    said = aiida.verdi("daemon", "status")
    assert f"coordinator PID {aiida.coordinator_pid()}" in said


def test_a_profile_that_is_deleted_while_somebody_uses_it_says_what_to_remove(aiida: Aiida) -> None:
    if not aiida.vendored or "configure-broker" not in aiida.verdi("profile", "--help"):
        pytest.skip("AiiDA's own commands know the broker where it is copied into 2.9 or newer")
    other = Aiida(aiida.home, aiida.env, f"{aiida.profile}-1", aiida.vendored)
    aiida.verdi("presto", "--use-namedpipe", "--non-interactive", "--profile-name", other.profile)
    aiida.verdi("-p", other.profile, "coordinator", "start")
    with pipebroker.PipeCommunicator(other.profile, other.config_path):
        said = aiida.verdi("profile", "delete", "--force", "--keep-data", other.profile)
    pipes = Path(f"/tmp/aiida_{other.profile}_pipes")
    assert f"end the processes {os.getpid()} first" in said and pipes.exists()
    (remove,) = re.findall("`(rm -r [^`]+)`", said.replace("\n", " "))
    with (other.config_path / "coordinator" / "coordinator.lock").open() as lock:
        subprocess.run(remove, shell=True, check=True)
        assert not pipes.exists() and not list(other.config_path.iterdir())
        eventually(lambda: is_free(lock.fileno()))  # The coordinator has seen it, and has ended.


@pytest.mark.long
def test_a_profile_that_is_deleted_takes_its_own_along(aiida: Aiida) -> None:
    if not aiida.vendored or "configure-broker" not in aiida.verdi("profile", "--help"):
        pytest.skip("AiiDA's own commands know the broker where it is copied into 2.9 or newer")
    for what in ("set aside", "another's"):
        other = Aiida(aiida.home, aiida.env, f"{aiida.profile}-1", aiida.vendored)
        aiida.verdi("presto", "--use-namedpipe", "--non-interactive", "--profile-name", other.profile)
        queue, pipes = other.config_path / "coordinator", Path(f"/tmp/aiida_{other.profile}_pipes")
        aiida.verdi("-p", other.profile, "coordinator", "start")
        aiida.verdi("-p", other.profile, "coordinator", "stop")
        if what == "set aside":
            queue.rename(queue.with_name("coordinator.old"))
        else:
            said = json.loads((queue / "format").read_text())
            (queue / "format").write_text(json.dumps({**said, "profile": "one", "uuid": None}))
        told = aiida.verdi("profile", "delete", "--force", "--delete-data", other.profile)
        if what == "set aside":
            assert "is left" not in told and not pipes.exists()
        else:
            assert "the queue of the profile 'one'" in " ".join(told.split()) and (queue / "format").exists()
            directories.remove_pipes(pipes)


def is_free(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def test_which_profile_is_meant_is_for_verdi_to_say(aiida: Aiida) -> None:
    if not aiida.vendored:
        pytest.skip("aiida-coordinator says it itself")
    for option in ("--profile=other", "--config-path=/tmp", "--prof=other"):
        said = aiida.verdi("coordinator", "status", option, status=2)
        assert "usage: verdi coordinator status" in said and "unrecognized arguments" in said
    assert "usage: verdi coordinator tasks" in aiida.verdi("coordinator", "tasks", "--help")
    aiida.coordinator("start")
    assert "Sent" in aiida.verdi("coordinator", "send", "--", "-1.5e3")
    assert aiida.tasks()
    assert "Removed" in aiida.verdi("coordinator", "purge", "--state", "waiting")


def test_tasks_are_known_by_their_processes(aiida: Aiida) -> None:
    first, second = aiida.submit(2)
    said = aiida.coordinator("tasks", "--aiida")
    assert re.search(rf" {first} +ArithmeticAddCalculation +created", said)
    rows = json.loads(aiida.coordinator("tasks", "--aiida", "--json"))["tasks"]
    assert rows[1]["process"] == {"pk": second, "label": "ArithmeticAddCalculation", "state": "created"}
    assert f"pk {second} (ArithmeticAddCalculation), created" in aiida.coordinator("show", str(second))
    assert ("process" in json.loads(aiida.coordinator("tasks", "--json"))["tasks"][0]) == aiida.vendored
    # Given up on, as by its twentieth death.
    (queue := aiida.config_path / "coordinator" / "failed").mkdir(exist_ok=True)
    task = aiida.tasks()[0]
    task.rename(queue / task.name)
    assert "Requeued" in aiida.coordinator("requeue", str(first))
    aiida.start_daemon(1)
    aiida.wait([first, second], 60)


def test_what_stands_before_a_command_and_what_needs_no_profile(aiida: Aiida, tmp_path: Path) -> None:
    if not aiida.vendored:
        pytest.skip("aiida-coordinator is the script itself")
    assert re.fullmatch(r"\d+\.\d+\.\d+\n", aiida.verdi("coordinator", "--version"))
    assert json.loads(aiida.verdi("coordinator", "--json", "status", status=3))["version"] == 1
    assert str(aiida.config_path) in aiida.verdi("coordinator", "call", "--", "-h", "1", status=1)
    aiida.verdi("profile", "configure-broker", "core.namedpipe", "-n", "--idle", "nan", status=2)
    home = tmp_path / "nobody"
    home.mkdir()
    nobody = Aiida(home, {**aiida.env, "HOME": str(home), "AIIDA_PATH": str(home)}, "", vendored=True)
    assert "usage: verdi coordinator start" in nobody.verdi("coordinator", "start", "--help")
    assert "usage: verdi coordinator list" in nobody.verdi("coordinator", "list", "--help")
    nobody.verdi("coordinator", "list")
    assert "No profile loaded" in nobody.verdi("coordinator", "status", status=1)


def test_completion_knows_each_command_and_option(aiida: Aiida) -> None:
    if not aiida.vendored:
        pytest.skip("aiida-coordinator has no completion")

    def complete(*words: str) -> str:
        env = {**aiida.env, "_VERDI_COMPLETE": "bash_complete", "COMP_CWORD": str(len(words)), "COMP_WORDS": ""}
        env["COMP_WORDS"] = " ".join(["verdi", *words])
        return subprocess.run(["verdi"], env=env, capture_output=True, text=True, check=True, timeout=60).stdout

    assert "plain,status" in complete("coordinator", "st") and "plain,requeue" in complete("coordinator", "re")
    assert "plain,--state" in complete("coordinator", "tasks", "--st")
    assert complete("coordinator", "tasks", "--state", "c").split() == ["plain,claimed", "plain,completed"]
    assert "--profile" not in complete("coordinator", "tasks", "--")


def test_a_profile_that_was_made_again_does_not_get_the_old_tasks(aiida: Aiida) -> None:
    aiida.submit(1)
    aiida.coordinator("stop")
    before = aiida.tasks()
    aiida.verdi("profile", "delete", "--force", "--keep-data", aiida.profile)
    aiida.make()
    if not aiida.tasks():
        return  # Deleting it has taken them along.
    assert f"mv {aiida.config_path}/coordinator" in aiida.coordinator("start", status=1)
    assert "belongs to another profile" in aiida.coordinator("doctor", status=1)
    script = """
try:
    add(1)
    answer("accepted")
except OSError as error:
    answer(str(error))
"""
    assert "belongs to another profile" in aiida.python(script)
    aiida.coordinator("delete", "--yes")
    aiida.coordinator("start")
    assert before and not aiida.tasks()


def test_one_coordinator_however_many_ask(aiida: Aiida) -> None:
    ask = PRELUDE + "manager.get_communicator(); answer(manager.get_broker().probe_service_status()['pid'])"
    asking = [
        subprocess.Popen([sys.executable, "-c", ask], env=aiida.env, stdout=subprocess.PIPE, text=True)
        for _ in range(5)
    ]
    assert len({process.communicate(timeout=60)[0] for process in asking}) == 1
    assert aiida.coordinator_pid()


@pytest.mark.long
def test_processes_finish_and_chains_do_not_poll(aiida: Aiida) -> None:
    aiida.verdi("config", "set", "runner.poll.interval", "3600")
    aiida.start_daemon()
    aiida.wait(aiida.submit(50, 10), 180)
    aiida.verdi("daemon", "stop")
    assert aiida.repaired()


def test_control(aiida: Aiida) -> None:
    aiida.start_daemon()
    answers = aiida.python("""
from plumpy.futures import unwrap_kiwi_future
pk = add(1, 'sleep 60')
node = orm.load_node(pk)
while node.get_state() is None or node.get_state().value != 'withscheduler':
    time.sleep(0.1)
controller = manager.get_process_controller()
actions = controller.pause_process, controller.play_process, controller.kill_process
done = [unwrap_kiwi_future(action(pk)).result(30) for action in actions]
while not node.is_terminated:
    time.sleep(0.1)
answer([done, node.process_state.value])
""")
    assert answers == [[True, True, True], "killed"]


def test_process_of_a_dead_worker_is_unreachable_at_once(aiida: Aiida) -> None:
    # Not under circus, which would replace the worker before we could look.
    log = (aiida.home / "worker.log").open("w")
    worker = subprocess.Popen(["verdi", "daemon", "worker"], env=aiida.env, stdout=log, stderr=log)
    try:
        (pk,) = aiida.submit(1, prepend="sleep 60")
        route = Path(f"/tmp/aiida_{aiida.profile}_pipes/route_{pk}")
        eventually(lambda: os.path.lexists(route) and list(aiida.config_path.glob("coordinator/claimed/*/task_*")), 20)
    finally:
        worker.kill()
        worker.wait()
    # The call itself raises; there is nothing to wait for.
    said = aiida.python(f"""
import kiwipy
try:
    manager.get_process_controller().pause_process({pk})
except kiwipy.UnroutableError:
    answer('unroutable')
""")
    assert said == "unroutable"
    assert "unreachable" in aiida.verdi("process", "kill", str(pk))


def test_worker_killed(aiida: Aiida) -> None:
    aiida.start_daemon()
    ran = aiida.home / "ran"
    pks = aiida.submit(10, 2, prepend=f"echo $PWD >> {ran}; sleep 8")
    # A worker killed inside a process function leaves a node that runs for ever, with any broker.
    aiida.python("""
while sum(node.is_finished for node in orm.QueryBuilder().append(orm.CalcFunctionNode).all(flat=True)) < 2:
    time.sleep(0.1)
""")
    victim = aiida.workers()[0]
    in_hand = eventually(lambda: list(aiida.config_path.glob(f"coordinator/claimed/{victim}-*/task_*")), 10)
    os.kill(victim, signal.SIGKILL)
    aiida.wait(pks, 120)
    jobs = ran.read_text().split()
    assert len(set(jobs)) == 10
    # AiiDA submits a job again if its worker died between the submission and the checkpoint.
    assert len(jobs) - 10 <= len(in_hand)
    aiida.verdi("daemon", "stop")
    assert aiida.repaired()


def test_coordinator_killed(aiida: Aiida) -> None:
    aiida.start_daemon()
    before = aiida.submit(5, 2, prepend="sleep 2")
    first = aiida.coordinator_pid()
    os.kill(first, signal.SIGKILL)
    after = aiida.submit(5, 2)
    aiida.wait(before + after, 120)
    assert aiida.coordinator_pid() != first
    aiida.verdi("daemon", "stop")
    assert aiida.repaired()


@pytest.mark.long
def test_coordinator_killed_while_chains_run(aiida: Aiida) -> None:
    """Nobody asks for a communicator here but the workers have one: they see to it themselves."""
    aiida.verdi("config", "set", "runner.poll.interval", "3600")
    aiida.start_daemon()
    pks = aiida.submit(0, 4)
    os.kill(aiida.coordinator_pid(), signal.SIGKILL)
    aiida.wait(pks, 60)


@pytest.mark.long
def test_submitted_while_the_daemon_is_down(aiida: Aiida) -> None:
    aiida.start_daemon(1)
    aiida.verdi("daemon", "stop")
    pks = aiida.submit(5, 1)
    aiida.start_daemon(1)
    aiida.wait(pks, 60)


@pytest.mark.parametrize("coordinator", ["up", "down"])
def test_repair(aiida: Aiida, coordinator: str) -> None:
    pks = aiida.submit(3)
    if coordinator == "down":
        aiida.coordinator("stop")
    assert aiida.repaired()
    tasks = {json.loads(task.read_text())["body"]["args"]["pid"]: task for task in aiida.tasks()}
    tasks[pks[0]].unlink()
    assert f"Revived process `{pks[0]}`" in aiida.verdi("process", "repair")
    assert aiida.repaired()
    # A second task of an active process: repair reports it, and the worker that gets it drops it (AiiDA's launcher).
    shutil.copy(tasks[pks[1]], tasks[pks[1]].with_name(f"task_{'9' * 20}-copy.json"))
    assert "There are duplicates" in aiida.verdi("process", "repair")
    aiida.start_daemon()
    aiida.wait(pks, 60)
    eventually(lambda: not aiida.tasks() and not list(aiida.config_path.glob("coordinator/claimed/*/task_*")), 20)
    aiida.verdi("daemon", "stop")
    assert aiida.repaired()
    # A task of a process that has ended: repair removes it.
    done = next((aiida.config_path / "coordinator" / "completed").glob("task_*.json"))
    shutil.copy(done, aiida.config_path / "coordinator" / f"task_{'9' * 20}-stale.json")
    assert "Acknowledged task" in aiida.verdi("process", "repair")
    assert aiida.repaired()


def test_repair_sees_tasks_of_a_dead_worker(aiida: Aiida) -> None:
    log = (aiida.home / "worker.log").open("w")
    worker = subprocess.Popen(["verdi", "daemon", "worker"], env=aiida.env, stdout=log, stderr=log)
    try:
        aiida.submit(1, prepend="sleep 5")
        eventually(lambda: list(aiida.config_path.glob("coordinator/claimed/*/task_*")), 20)
        os.kill(aiida.coordinator_pid(), signal.SIGKILL)
    finally:
        worker.kill()
        worker.wait()
    assert aiida.repaired()


def test_values_that_json_lacks(aiida: Aiida) -> None:
    same = aiida.python("""
import datetime
from plumpy import ProcessState
communicator, node = manager.get_communicator(), orm.Int(5).store()
sent = {'state': ProcessState.FINISHED, 'time': datetime.datetime.now(), 'text': 'x'}
communicator.add_rpc_subscriber(lambda _, body: body, 'echo')
received = communicator.rpc_send('echo', {**sent, 'node': node}).result(5)
# A node belongs to the database session of the thread that loaded it, so only its identity is compared.
answer(received.pop('node').uuid == node.uuid and received == sent)
""")
    assert same is True


@pytest.mark.long
def test_to_rabbitmq_and_back(aiida: Aiida, rabbitmq: int) -> None:
    aiida.verdi("config", "set", "warnings.rabbitmq_version", "False")
    newer = "configure-broker" in aiida.verdi("profile", "--help")
    configure = ["configure-broker", "core.rabbitmq", "-n"] if newer else ["configure-rabbitmq"]
    aiida.start_daemon()
    pks = aiida.submit(4, 2, prepend="sleep 8")
    time.sleep(2)
    aiida.verdi("daemon", "stop")
    aiida.verdi("profile", *configure, "--broker-port", str(rabbitmq), aiida.profile)
    assert "Revived process" in aiida.verdi("process", "repair")
    aiida.start_daemon()
    pks += aiida.submit(4, 2, prepend="sleep 8")
    time.sleep(2)
    aiida.verdi("daemon", "stop")
    aiida.coordinator("configure")
    aiida.verdi("process", "repair")
    aiida.start_daemon()
    aiida.wait(pks, 120)


FORGETS = """
import asyncio, threading
from aiida.engine import ToContext, WorkChain
from aiida.engine.utils import instantiate_process
from aiida.orm.utils.serialize import deserialize_unsafe

class Waits(WorkChain):
    @classmethod
    def define(cls, spec):
        super().define(spec)
        spec.outline(cls.spawn, cls.collect)
    def spawn(self):
        return ToContext(child=orm.WorkChainNode().store())
    def collect(self):
        pass

runner, controller, communicator = manager.get_runner(), manager.get_process_controller(), manager.get_communicator()
loop, runner._poll_interval = runner.loop, 3600

async def until(true, seconds):
    end = time.monotonic() + seconds
    while not true() and time.monotonic() < end:
        await asyncio.sleep(0.05)

async def busy():
    while True:
        time.sleep(0.2)
        await asyncio.sleep(0)

def outlived(seconds):
    # What comes in at intervals of one turn of a busy loop: a pause, and the end of the child.
    process = instantiate_process(runner, Waits)
    asyncio.set_event_loop(loop)
    loop.create_task(process.step_until_terminated())
    loop.run_until_complete(until(lambda: process.state.value == 'waiting', 20))
    (child,) = [awaitable.pk for awaitable in process._awaitables]
    orm.load_node(child).set_process_state('finished')
    def from_outside():
        controller.pause_process(process.pid)
        time.sleep(seconds)
        communicator.broadcast_send(None, sender=child, subject='state_changed.waiting.finished')
    outside, work = threading.Thread(target=from_outside), loop.create_task(busy())
    outside.start()
    loop.run_until_complete(until(lambda: process.paused or process.has_terminated(), 20))
    outside.join()
    work.cancel()
    process.play()
    loop.run_until_complete(until(process.has_terminated, 5))
    return process

for turns in (1.2, 1.5, 1.0, 1.8, 0.8, 2.0) * 3:
    process = outlived(turns * 0.2)
    if not process.has_terminated():
        break
checkpoint = deserialize_unsafe(orm.load_node(process.pid).checkpoint)
answer([process.state.value, process.paused, process._awaitables, checkpoint['_awaitables']])
"""


DIES = """
import os
from aiida import orm
from aiida.engine import WorkChain, calcfunction

@calcfunction
def dies(x):
    if not os.path.exists('died'):
        open('died', 'x').close()
        os.kill(os.getpid(), 9)
    return orm.Int(x + 1)

class Calls(WorkChain):
    @classmethod
    def define(cls, spec):
        super().define(spec)
        spec.outline(cls.calls)
    def calls(self):
        dies(orm.Int(1))
"""


def with_broker(aiida: Aiida, backend: str, port: int) -> None:
    if backend == "core.rabbitmq":
        aiida.verdi("config", "set", "warnings.rabbitmq_version", "False")
        aiida.verdi("profile", "configure-broker", backend, "-n", "--broker-port", str(port), aiida.profile)


# What UPSTREAM.md lists: when AiiDA has mended it, it goes from there, and from tools/fire.py.


@pytest.mark.long
@pytest.mark.parametrize("site", ["vendored"], indirect=True)
@pytest.mark.parametrize("backend", ["core.namedpipe", "core.rabbitmq"])
def test_aiida_forgets_a_process_paused_as_its_last_child_ends(aiida: Aiida, rabbitmq: int, backend: str) -> None:
    with_broker(aiida, backend, rabbitmq)
    assert aiida.python(FORGETS) == ["waiting", False, [], []]


@pytest.mark.long
@pytest.mark.parametrize("site", ["vendored"], indirect=True)
@pytest.mark.parametrize("backend", ["core.namedpipe", "core.rabbitmq"])
def test_aiida_forgets_a_function_that_died_with_its_worker(aiida: Aiida, rabbitmq: int, backend: str) -> None:
    with_broker(aiida, backend, rabbitmq)
    (aiida.home / "dying.py").write_text(DIES.replace("'died'", repr(str(aiida.home / "died"))))
    aiida.env["PYTHONPATH"] += os.pathsep + str(aiida.home)
    aiida.start_daemon()
    pk = aiida.python("import dying\nanswer(submit(dying.Calls).pk)")
    aiida.wait([pk], 120)
    ended = f"answer([node.is_terminated for node in orm.load_node({pk}).called])"
    assert sorted(aiida.python(ended)) == [False, True]
    aiida.verdi("daemon", "stop")
    assert "Revived process" in aiida.verdi("process", "repair")
    aiida.start_daemon()
    eventually(lambda: aiida.python(ended) == [True, True], 60)
    excepted = f"answer([node.is_excepted for node in orm.load_node({pk}).called])"
    assert sorted(aiida.python(excepted)) == [False, True]


@pytest.mark.long
@pytest.mark.parametrize("variant", ["vendored", "plugin"])
def test_from_nothing_to_a_running_daemon(tmp_path: Path, variant: str) -> None:
    readme = (HERE / "README.md").read_text()
    of_both = [each for each in re.findall(r"```bash\n(.*?)```", readme, re.DOTALL) if "verdi presto" in each]
    (commands,) = (each for each in of_both if ("vendor.py" in each) == (variant == "vendored"))
    assert len(commands.splitlines()) == 5
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    home = tmp_path / "home"
    (home / ".aiida").mkdir(parents=True)
    # The AiiDA that is tested here, and nothing of whoever runs this.
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "AIIDA_PATH")}
    environment |= {"HOME": str(home), "PATH": f"{tmp_path / 'venv' / 'bin'}:{os.environ['PATH']}"}
    environment |= {"PYTHONWARNINGS": "ignore", "PIP_CONSTRAINT": str(tmp_path / "constraint.txt")}
    version = importlib.metadata.version("aiida-core")
    (tmp_path / "constraint.txt").write_text(f"aiida-core=={version}\n")
    tree = tmp_path / "tree"
    shutil.copytree(HERE, tree, ignore=shutil.ignore_patterns(".git", "__pycache__"))
    presto = Path(importlib.util.find_spec("aiida").origin).parent / "cmdline" / "commands" / "cmd_presto.py"
    if variant == "vendored" and "--use-zeromq" not in presto.read_text():
        pytest.skip("AiiDA's own commands know the broker in 2.9 or newer")

    def run(script: str) -> str:
        said = subprocess.run(
            ["bash", "-e", "-c", script], env=environment, cwd=tree, capture_output=True, text=True, timeout=400
        )
        assert said.returncode == 0, said.stdout + said.stderr
        return said.stdout

    try:
        run(commands.replace("verdi daemon start", "verdi config set daemon.timeout 60\nverdi daemon start"))
        status = run("verdi status")
        assert "✔ broker:      Named pipes" in status and "✔ daemon" in status
        assert "tasks: default" in run(
            "aiida-coordinator status" if variant == "plugin" else "verdi coordinator status"
        )
        asked = run(f"python -c '{PRELUDE.replace(chr(39), chr(34))}\nanswer(add(1))'")
        (pk,) = re.findall(r"ANSWER (\d+)", asked)
        eventually(lambda: "Finished [0]" in run("verdi process list -a -p 1"), 90)
        assert pk
    finally:
        run("verdi daemon stop")
        run("aiida-coordinator delete --yes" if variant == "plugin" else "verdi coordinator delete --yes")
