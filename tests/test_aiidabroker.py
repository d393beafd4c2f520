"""`PipeBroker` and its communicator by themselves: AiiDA's modules, but no profile, storage or daemon."""

from __future__ import annotations

import errno
import importlib
import importlib.util
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import kiwipy
import pytest

import control
import directories
import pipebroker
import presence
from harness import COORDINATOR, TIMEOUT, Broker, eventually

if importlib.util.find_spec("aiida") is None:
    pytest.skip("aiida-core is not installed", allow_module_level=True)


@pytest.fixture(scope="module")
def aiidabroker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModuleType]:
    """The module, imported where AiiDA, which makes directories when it is imported, can make them."""
    with pytest.MonkeyPatch.context() as patch:
        home = tmp_path_factory.mktemp("aiida")
        (home / ".aiida").mkdir()
        patch.setenv("AIIDA_PATH", str(home))
        yield importlib.import_module("aiidabroker")


@pytest.fixture
def made(aiidabroker: ModuleType, broker: Broker, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Make a `PipeBroker` for the profile of `broker`."""
    home = broker.config_path.parent
    broker.config_path = home / "profiles" / broker.profile
    config = SimpleNamespace(dirpath=str(home), get_option=lambda *_, **__: 10)
    monkeypatch.setattr(aiidabroker, "get_config", lambda: config)

    def make(uuid: str = "1" * 32, **process_control: Any) -> Any:
        profile = SimpleNamespace(name=broker.profile, process_control_config=process_control, uuid=uuid)
        pipe_broker = aiidabroker.PipeBroker(profile)
        broker.stack.callback(pipe_broker.close)
        return pipe_broker

    return make


def refuse(*_: object, **__: object) -> None:
    raise RuntimeError("can't start new thread")


def without_descriptors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let whoever opens the coordinator's intake find no free descriptor."""
    opened = os.open

    def open_(path: Any, *arguments: Any, **options: Any) -> int:
        if os.fspath(path).endswith(directories.TASKS_INTAKE):
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), path)
        return opened(path, *arguments, **options)

    monkeypatch.setattr(os, "open", open_)


def test_asked_for_by_the_old_name(aiidabroker: ModuleType) -> None:
    assert pipebroker.PipeBroker is aiidabroker.PipeBroker
    with pytest.raises(AttributeError, match="no attribute 'PipeBrocker'"):
        pipebroker.PipeBrocker


def test_looking_makes_nothing(made: Callable[..., Any], broker: Broker) -> None:
    pipe_broker = made()
    assert not pipe_broker.check_service_reachable()
    nothing = {"connected": False, "pid": None, "waiting": 0, "claimed": 0, "paused": False}
    assert pipe_broker.probe_service_status() == nothing
    assert "not running" in str(pipe_broker)
    pipe_broker.close()
    assert not broker.config_path.exists() and not broker.pipes.exists()


@pytest.mark.parametrize("lacking", ["thread", "descriptor"])
@pytest.mark.parametrize("kind", ["task", "broadcast"])
def test_accepted_is_accepted_without_a_coordinator_to_be_had(
    made: Callable[..., Any], broker: Broker, monkeypatch: pytest.MonkeyPatch, caplog: Any, kind: str, lacking: str
) -> None:
    """Whoever heard of a failure would send the task again, and have it done twice."""
    communicator = made()._connect()
    broker.stack.callback(control.stop, broker.config_path)
    # What a coordinator that died has left.
    (broker.config_path / "pipes" / "coordinator.json").write_text(json.dumps({"pid": os.getpid()}))
    os.mkfifo(broker.pipes / directories.TASKS_INTAKE)
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        if lacking == "thread":
            patch.setattr(threading.Thread, "start", refuse)
        else:
            without_descriptors(patch)
        if kind == "task":
            communicator.task_send("once", no_reply=True)
        else:
            assert communicator.broadcast_send("once") is True
    assert ("can't start new thread" if lacking == "thread" else os.strerror(errno.EMFILE)) in caplog.text
    assert "on the disk" in caplog.text
    assert len(broker.tasks("waiting")) == (kind == "task")


@pytest.mark.parametrize("autostart", [True, False])
def test_a_coordinator_that_died_is_started_by_whoever_sends(
    made: Callable[..., Any], broker: Broker, autostart: bool
) -> None:
    pipe_broker = made(autostart=autostart)
    communicator = pipe_broker._connect()
    first = broker.start()
    os.kill(first, signal.SIGKILL)
    eventually(lambda: not pipe_broker.check_service_reachable(), 5)
    threads = threading.active_count()
    communicator.task_send("wake", no_reply=True)
    if autostart:
        eventually(lambda: pipe_broker.probe_service_status()["pid"] not in (None, first), 10)
    assert autostart or threading.active_count() == threads
    assert pipe_broker.check_service_reachable() is autostart


def test_a_coordinator_that_was_stopped_stays_stopped_until_somebody_asks(
    made: Callable[..., Any], broker: Broker
) -> None:
    pipe_broker = made()
    communicator = pipe_broker._connect()
    broker.start()
    control.stop(broker.config_path)
    threads = threading.active_count()
    communicator.task_send("waits", no_reply=True)
    communicator.broadcast_send("waits")
    # One that is started is started on a thread.
    assert threading.active_count() == threads
    assert not pipe_broker.check_service_reachable()
    assert pipe_broker.get_communicator() is communicator
    assert pipe_broker.check_service_reachable()


@pytest.mark.parametrize("lacking", ["room", "communicator"])
def test_a_broadcast_that_cannot_be_sent_is_a_timeout(
    made: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, lacking: str
) -> None:
    communicator = made(autostart=False)._connect()
    opened = os.open

    def open_(path: Any, *arguments: Any, **options: Any) -> int:
        if "kept_" in os.fspath(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
        return opened(path, *arguments, **options)

    if lacking == "room":
        monkeypatch.setattr(os, "open", open_)
    else:
        communicator.close()
    with pytest.raises(kiwipy.TimeoutError):
        communicator.broadcast_send("body")


def test_prefetch_is_the_slots_of_a_daemons_worker(
    aiidabroker: ModuleType, made: Callable[..., Any], broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {("daemon.worker_process_slots", broker.profile): 3}
    config = SimpleNamespace(
        dirpath=str(broker.config_path.parent.parent), get_option=lambda name, scope: options[name, scope]
    )
    monkeypatch.setattr(aiidabroker, "get_config", lambda: config)
    made(autostart=False)._connect().add_task_subscriber(lambda _, body: body)
    (worker,) = control.status(broker.config_path)["workers"]
    assert worker["queues"] == {"default": 3}


def test_one_communicator_until_it_is_closed(made: Callable[..., Any]) -> None:
    pipe_broker = made(autostart=False)
    communicator = pipe_broker.get_communicator()
    assert pipe_broker.get_communicator() is communicator
    for close in (communicator.close, pipe_broker.close):
        close()
        another = pipe_broker.get_communicator()
        assert another is not communicator and not another.is_closed()
        assert pipe_broker.get_communicator() is another
        communicator = another


class Command:
    """What click says is asked for."""

    def __init__(self, *names: str) -> None:
        self.parent = None
        for name in names:
            context = SimpleNamespace(command=SimpleNamespace(name=name), parent=self.parent)
            self.parent = context

    def __call__(self, silent: bool) -> Any:
        assert silent
        return self.parent


@pytest.fixture
def verdi_status(aiidabroker: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("click.get_current_context", Command("verdi", "status"))


@pytest.fixture
def daemon_runs(aiidabroker: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aiida.engine.daemon.client.DaemonClient", lambda _: SimpleNamespace(is_daemon_running=True))


@pytest.mark.usefixtures("verdi_status")
def test_verdi_status_starts_nothing_and_says_that_nobody_serves(made: Callable[..., Any], broker: Broker) -> None:
    pipe_broker = made()
    with pytest.raises(ConnectionError, match=rf"start one by '.*coordinator.*{broker.profile}.* start'"):
        pipe_broker.get_communicator()
    assert not broker.config_path.exists()
    broker.start()
    assert not pipe_broker.get_communicator().is_closed()


@pytest.mark.usefixtures("verdi_status", "daemon_runs")
def test_verdi_status_waits_for_the_coordinator_that_a_starting_daemon_starts(
    aiidabroker: ModuleType, made: Callable[..., Any], broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(aiidabroker, "_COMING_SECONDS", TIMEOUT)
    worker = threading.Thread(target=broker.start)
    worker.start()
    assert not made().get_communicator().is_closed()
    worker.join()


@pytest.mark.usefixtures("verdi_status", "daemon_runs")
def test_verdi_status_is_red_where_a_daemon_runs_and_no_coordinator_comes(
    aiidabroker: ModuleType, made: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(aiidabroker, "_COMING_SECONDS", 1.0)
    with pytest.raises(ConnectionError, match="no coordinator serves"):
        made().get_communicator()


@pytest.mark.usefixtures("verdi_status")
def test_verdi_status_says_that_the_coordinator_is_stopped(made: Callable[..., Any], broker: Broker) -> None:
    pid = broker.start()
    os.kill(pid, signal.SIGSTOP)
    try:
        eventually(lambda: presence.is_stopped(pid))
        with pytest.raises(ConnectionError, match=f"'kill -CONT {pid}'"):
            made().get_communicator()
    finally:
        os.kill(pid, signal.SIGCONT)
    assert not made().get_communicator().is_closed()


@pytest.mark.usefixtures("verdi_status")
def test_verdi_status_starts_and_advises_nothing_in_another_profiles_queue(
    made: Callable[..., Any], broker: Broker
) -> None:
    pipe_broker = made(uuid="2" * 32)
    broker.communicator(profile_uuid="1" * 32).close()
    configuration = broker.config_path.parent.parent / "config.json"
    configuration.write_text(json.dumps({"profiles": {broker.profile: {"PROFILE_UUID": "2" * 32}}}))
    with pytest.raises(ConnectionError, match="belongs to another profile"):
        pipe_broker.get_communicator()
    # Nor where it was copied from another one's directory.
    format_file = broker.queue / "format"
    format_file.write_text(json.dumps({**json.loads(format_file.read_text()), "profile": "other"}))
    with pytest.raises(ConnectionError, match=f"belongs to the profile 'other', not to '{broker.profile}'"):
        pipe_broker.get_communicator()


def test_a_relative_home_is_kept_or_missed_where_a_process_goes_elsewhere(
    aiidabroker: ModuleType,
    made: Callable[..., Any],
    broker: Broker,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    home = broker.config_path.parent.parent
    (home / "config.json").write_text(json.dumps({"profiles": {broker.profile: {"PROFILE_UUID": "1" * 32}}}))
    monkeypatch.chdir(home.parent)
    monkeypatch.setattr(aiidabroker.get_config(), "dirpath", home.name)
    broker.stack.callback(control.stop, broker.config_path)
    made().get_communicator()
    pipe_broker = made()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert not pipe_broker.get_communicator().is_closed()
    with pytest.raises(ConnectionError, match="make AIIDA_PATH absolute"):
        made().get_communicator()
    assert not list(elsewhere.iterdir())


def test_a_child_that_is_forked_while_another_thread_asks_can_close(made: Callable[..., Any]) -> None:
    pipe_broker, asked, go_on = made(autostart=False), threading.Event(), threading.Event()

    def hold() -> None:
        with pipe_broker._mutex:
            asked.set()
            go_on.wait(TIMEOUT)

    thread = threading.Thread(target=hold)
    thread.start()
    assert asked.wait(TIMEOUT)
    child = os.fork()
    if child == 0:
        signal.alarm(int(TIMEOUT))
        pipe_broker.close()
        os._exit(0)
    go_on.set()
    thread.join(TIMEOUT)
    assert os.waitpid(child, 0)[1] == 0


def test_many_threads_that_ask_at_once_get_one_communicator(made: Callable[..., Any]) -> None:
    pipe_broker, together = made(autostart=False), threading.Barrier(16)
    found = list[Any]()

    def ask() -> None:
        together.wait(TIMEOUT)
        found.append(pipe_broker.get_communicator())

    threads = [threading.Thread(target=ask) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT)
    assert len(found) == 16 and len(set(map(id, found))) == 1


@pytest.mark.parametrize("names", [("verdi", "process", "status"), ("verdi", "run"), ("other", "status"), ()])
def test_any_other_command_starts_a_coordinator_that_ends_when_it_is_not_needed(
    made: Callable[..., Any], broker: Broker, monkeypatch: pytest.MonkeyPatch, names: tuple[str, ...]
) -> None:
    monkeypatch.setattr("click.get_current_context", Command(*names))
    broker.stack.callback(control.stop, broker.config_path)
    made(idle=17).get_communicator()
    assert broker.status()["idle"] == 17


@pytest.mark.parametrize(("idle", "said"), [(0, None), ("x", None), (None, None), (2.5, 2.5)])
def test_what_is_set_by_hand_is_taken_as_far_as_it_can_be(
    made: Callable[..., Any], broker: Broker, idle: object, said: object
) -> None:
    broker.stack.callback(control.stop, broker.config_path)
    made(idle=idle).get_communicator()
    assert broker.status()["idle"] == said


@pytest.mark.parametrize("idle", [30.0, None])
def test_an_older_coordinator_is_replaced_when_the_first_worker_comes(
    aiidabroker: ModuleType,
    made: Callable[..., Any],
    broker: Broker,
    monkeypatch: pytest.MonkeyPatch,
    idle: float | None,
) -> None:
    first = control.start(broker.profile, broker.config_path, idle=idle)
    broker.stack.callback(control.stop, broker.config_path)
    pipe_broker = made()
    waiting = broker.communicator()
    future = waiting.task_send("waits")
    # As if that one had been started before an update.
    monkeypatch.setattr(aiidabroker.directories, "VERSION", "1.10.0")
    communicator = pipe_broker.get_communicator()
    assert broker.status()["pid"] == first
    communicator.add_task_subscriber(lambda _, body: body)
    eventually(lambda: broker.status()["pid"] not in (first, None))
    second = broker.status()
    assert second["idle"] == idle
    assert future.result(TIMEOUT) == "waits"
    # Whoever is of today, or newer, stays.
    monkeypatch.setattr(aiidabroker.directories, "VERSION", "0.9.9")
    communicator.add_task_subscriber(lambda _, body: body)
    assert broker.status()["pid"] == second["pid"]


def test_an_older_coordinator_that_is_stopped_is_not_waited_for_and_serves_when_it_goes_on(
    aiidabroker: ModuleType,
    made: Callable[..., Any],
    broker: Broker,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    pipe_broker = made()
    pid = broker.start()
    monkeypatch.setattr(aiidabroker.directories, "VERSION", "1.10.0")
    os.kill(pid, signal.SIGSTOP)
    try:
        eventually(lambda: presence.is_stopped(pid))
        monkeypatch.setattr(control, "stop", refuse)
        communicator = pipe_broker.get_communicator()
        communicator.add_task_subscriber(lambda _, body: body)
        future = communicator.task_send("waits")
    finally:
        os.kill(pid, signal.SIGCONT)
        monkeypatch.undo()
    assert future.result(TIMEOUT) == "waits" and broker.status()["pid"] == pid
    assert f"'kill -CONT {pid}'" in caplog.text and "restart'" in caplog.text


@pytest.mark.parametrize("what", ["no autostart", "nothing said"])
def test_a_coordinator_that_is_not_known_to_be_older_is_left_alone(
    aiidabroker: ModuleType, made: Callable[..., Any], broker: Broker, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    first = broker.start()
    if what == "nothing said":
        (broker.config_path / "pipes" / "coordinator.json").unlink()
    monkeypatch.setattr(aiidabroker.directories, "VERSION", "2.0.0")
    made(autostart=what != "no autostart").get_communicator().add_task_subscriber(lambda _, body: body)
    assert control.stop(broker.config_path, first) == first


def test_a_broker_that_is_paused_says_so(made: Callable[..., Any], broker: Broker) -> None:
    broker.start()
    control.pause(broker.config_path)
    assert re.search(rf"; paused: nothing new is started until '.*{broker.profile}.* resume'$", str(made()))
    control.resume(broker.config_path)
    assert "; paused" not in str(made())


def known(broker: Broker, *uuids: str | None) -> None:
    """Let AiiDA's configuration have the profile with one UUID, with none, or not have it."""
    profiles = {broker.profile: {"PROFILE_UUID": uuid} for uuid in uuids}
    (broker.config_path.parent.parent / "config.json").write_text(json.dumps({"profiles": profiles}))


def test_the_profiles_uuid_tells_it_from_an_earlier_one_of_its_name(made: Callable[..., Any], broker: Broker) -> None:
    broker.communicator().close()
    known(broker, "1" * 32)
    old = made(autostart=False)
    old.get_communicator().task_send("old", no_reply=True)
    old.close()
    known(broker, "2" * 32)
    with pytest.raises(directories.DirectoryRefused, match="belongs to another profile"):
        made(uuid="2" * 32, autostart=False).get_communicator()


@pytest.mark.parametrize("again", [True, False])
@pytest.mark.parametrize("was_there", [True, False])
def test_who_has_loaded_a_profile_that_was_deleted_since_sends_nothing_to_the_next_of_its_name(
    made: Callable[..., Any], broker: Broker, caplog: pytest.LogCaptureFixture, was_there: bool, again: bool
) -> None:
    broker.communicator(profile_uuid="1" * 32).close()
    known(broker, "1" * 32)
    old = made()
    if was_there:
        made(autostart=False).get_communicator()
    shutil.rmtree(broker.config_path)
    known(broker, *(["2" * 32] if again else []))
    with pytest.raises(ConnectionError, match=f"'{broker.profile}' that this process has loaded was deleted"):
        old.get_communicator()
    with caplog.at_level(logging.WARNING):
        old._start_coordinator(None)
    assert "was deleted since" in caplog.text
    assert not broker.config_path.exists()
    if again:
        assert not made(uuid="2" * 32, autostart=False).get_communicator().is_closed()


def test_a_profile_that_aiida_has_not_stored_yet_is_the_same_when_it_has(
    made: Callable[..., Any], broker: Broker
) -> None:
    broker.config_path.mkdir(parents=True)
    known(broker)
    made(autostart=False).get_communicator().task_send("waits", no_reply=True)
    known(broker, "1" * 32)
    assert not made(autostart=False).get_communicator().is_closed()
    known(broker, "2" * 32)
    with pytest.raises(directories.DirectoryRefused, match="belongs to another profile"):
        made(uuid="2" * 32, autostart=False).get_communicator()


def test_a_profile_without_a_uuid_is_known_by_its_name(
    aiidabroker: ModuleType, made: Callable[..., Any], broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    broker.communicator().close()
    known(broker, None)
    home = broker.config_path.parent.parent
    monkeypatch.chdir(home.parent)
    monkeypatch.setattr(aiidabroker.get_config(), "dirpath", home.name)
    assert not made(uuid="3" * 32, autostart=False).get_communicator().is_closed()


def test_aiida_that_cannot_be_asked_is_said_to_be_that(
    aiidabroker: ModuleType, made: Callable[..., Any], broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    made()
    known(broker, None)

    def get_config() -> None:
        raise LookupError("of version 99")

    monkeypatch.setattr(aiidabroker, "get_config", get_config)
    with pytest.raises(RuntimeError, match=r"AiiDA cannot be asked: .*of version 99"):
        aiidabroker.processes(broker.config_path, [1])


def test_aiida_that_cannot_be_imported_is_said_to_be_that() -> None:
    command = [*COORDINATOR, "--profile", "any", "configure"]
    environment = {**os.environ, "AIIDA_PATH": "/proc/none"}
    said = subprocess.run(command, check=False, capture_output=True, text=True, timeout=TIMEOUT, env=environment)
    assert said.returncode == 1 and "Traceback" not in said.stderr, said
    # Before it, AiiDA warns. One before 2.8 can be imported, and does not find the plugin.
    assert re.match("coordinator.py: AiiDA (cannot be used here|does not have)", said.stderr.splitlines()[-1])
