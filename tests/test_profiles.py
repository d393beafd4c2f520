"""Whose profile is meant, where it is, whose tasks are in its queue, and how long its coordinator stays: no AiiDA."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kiwipy
import pytest

import control
import control_doctor
import control_install
import control_profiles
import directories
import files
import frames
import pipebroker
import presence
import sharing
from harness import COORDINATOR, HOARD, TIMEOUT, Broker, eventually

OLD, NEW = "1" * 32, "2" * 32
# The latter where it has looked after itself meanwhile, and closed.
REFUSED = (directories.DirectoryRefused, kiwipy.CommunicatorClosed)


def configuration(home: Path, *names: str, current: str | None = None, uuid: str = NEW) -> Path:
    """Write what AiiDA would, into a directory of its own below `home`; return that directory."""
    directory = home / ".aiida"
    directory.mkdir(parents=True, exist_ok=True)
    profiles = {name: {"PROFILE_UUID": uuid, "storage": {}} for name in names}
    said = {"CONFIG_VERSION": {"CURRENT": 9}, "profiles": profiles, "default_profile": current}
    (directory / "config.json").write_text(json.dumps(said))
    return directory


def say(home: Path, *arguments: str, path: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run the command line as somebody whose home, or AIIDA_PATH, is elsewhere."""
    environment = {**os.environ, "HOME": str(home)}
    environment.pop("AIIDA_PATH", None)
    if path is not None:
        environment["AIIDA_PATH"] = path
    command = [*COORDINATOR, *arguments]
    said = subprocess.run(command, check=False, capture_output=True, text=True, timeout=TIMEOUT, env=environment)
    assert "Traceback" not in said.stderr
    return said


@pytest.mark.parametrize(
    ("path", "found"),
    [
        (None, "home/.aiida"),
        ("", "home/.aiida"),
        ("{tmp}/a", "a/.aiida"),
        ("{tmp}/a/.aiida", "a/.aiida"),
        ("{tmp}/none:{tmp}/a:{tmp}/b", "a/.aiida"),
        (":{tmp}/b:", "b/.aiida"),
        ("{tmp}/none:{tmp}/neither", "neither/.aiida"),
        ("~/elsewhere", "home/elsewhere/.aiida"),
    ],
)
def test_aiidas_directory_is_where_aiida_finds_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str | None, found: str
) -> None:
    for name in ("a", "b"):
        (tmp_path / name / ".aiida").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("AIIDA_PATH", raising=False)
    if path is not None:
        monkeypatch.setenv("AIIDA_PATH", path.format(tmp=tmp_path))
    assert control_profiles.aiidas_directory() == tmp_path / found


def test_a_profile_is_where_aiida_has_it(broker: Broker, tmp_path: Path) -> None:
    directory = configuration(tmp_path / "path", broker.profile, "other", current=broker.profile)
    broker.config_path = directory / "profiles" / broker.profile
    configuration(tmp_path / "home", "elsewhere")
    path = f"{tmp_path / 'none'}:{tmp_path / 'path'}"
    broker.communicator().close()
    for arguments in (["--profile", broker.profile], []):
        said = json.loads(say(tmp_path / "home", *arguments, "status", "--json", path=path).stdout)
        assert said["directory"] == str(broker.config_path)
    said = say(tmp_path / "home", "--profile", "mistyped", "start", path=path)
    assert said.returncode == 1 and f"has other, {broker.profile}." in said.stderr and "'mistyped'" in said.stderr
    assert str(directory / "config.json") in said.stderr and not (tmp_path / "home" / ".aiida" / "profiles").exists()
    # A directory that is named is anybody's.
    broker.run("status", status=3)


def test_where_a_path_has_no_configuration_nobody_elses_profile_is_meant(broker: Broker, tmp_path: Path) -> None:
    directory = configuration(tmp_path / "home", broker.profile)
    broker.config_path = directory / "profiles" / broker.profile
    broker.communicator().task_send("waits", no_reply=True)
    broker.stack.close()
    said = say(tmp_path / "home", "--profile", broker.profile, "delete", "--yes", path=str(tmp_path / "mistyped"))
    assert said.returncode == 1 and str(tmp_path / "mistyped" / ".aiida") in said.stderr
    assert len(broker.tasks("waiting")) == 1


@pytest.mark.parametrize("command", ["status", "restart", "delete", "send"])
def test_a_directory_that_aiida_knows_is_of_the_profile_that_it_says(
    broker: Broker, tmp_path: Path, command: str
) -> None:
    directory = configuration(tmp_path, broker.profile, "other", uuid=OLD)
    broker.config_path = directory / "profiles" / broker.profile
    broker.communicator(profile_uuid=OLD).task_send("waits", no_reply=True)
    broker.stack.close()
    more = {"delete": ["--yes"], "send": ["1"]}.get(command, [])
    for name in ("other", "mistyped"):
        said = say(tmp_path, "--profile", name, "--config-path", str(broker.config_path), command, *more)
        assert said.returncode == 1 and f"belongs to the profile '{broker.profile}'" in said.stderr
    assert directories.read_format(broker.config_path)["profile"] == broker.profile
    assert len(broker.tasks("waiting")) == 1


def test_a_queue_that_was_copied_to_another_profiles_place_is_its_own_profiles(broker: Broker, tmp_path: Path) -> None:
    directory = configuration(tmp_path, broker.profile, uuid=NEW)
    broker.config_path = directory / "profiles" / broker.profile
    theirs = directories.establish("elsewhere", broker.config_path, OLD)
    for line in ("delete --yes", "status", "start", "send 1"):
        said = say(tmp_path, "--profile", broker.profile, *line.split())
        assert said.returncode == 1 and "is the queue of the profile 'elsewhere'" in said.stderr
        assert broker.queue.exists()
        # To name that one would not help: the directory is not its own.
        assert "--profile" not in said.stderr
    command = said.stderr.partition("set it aside by '")[2].rpartition("'")[0]
    subprocess.run(command, shell=True, check=True)
    assert "Started" in say(tmp_path, "--profile", broker.profile, "start").stdout
    control.stop(broker.config_path)
    directories.remove_pipes(theirs.pipes)


def test_without_aiida_any_name_will_do_but_none(tmp_path: Path) -> None:
    said = say(tmp_path, "status")
    assert said.returncode == 2 and "name it by --profile" in said.stderr
    assert say(tmp_path, "--config-path", str(tmp_path), "status").returncode == 2
    said = say(tmp_path, "--profile", "my_profile", "status")
    assert said.returncode == 1 and f"{tmp_path}/.aiida/profiles/my_profile" in said.stderr
    configuration(tmp_path, "a", "b")
    assert say(tmp_path, "status").returncode == 2


@pytest.mark.parametrize("content", ["", "{", "[]", '{"profiles": []}', "[" * 100_000])
@pytest.mark.parametrize("arguments", [["status"], ["--profile", "a", "start"]])
def test_a_configuration_that_is_none_is_said_to_be_that(tmp_path: Path, content: str, arguments: list[str]) -> None:
    (configuration(tmp_path) / "config.json").write_text(content)
    said = say(tmp_path, *arguments)
    assert said.returncode == 1 and said.stderr.count("\n") == 1
    assert f"{tmp_path}/.aiida/config.json, AiiDA's configuration," in said.stderr and "mend it" in said.stderr


# Whose tasks


def test_a_profile_that_was_made_again_does_not_get_the_tasks_of_the_old_one(broker: Broker, tmp_path: Path) -> None:
    directory = configuration(tmp_path, broker.profile, current=broker.profile, uuid=OLD)
    broker.config_path = directory / "profiles" / broker.profile
    assert "Started" in say(tmp_path, "start").stdout
    broker.communicator(profile_uuid=OLD).task_send("old", no_reply=True)
    say(tmp_path, "stop")
    configuration(tmp_path, broker.profile, current=broker.profile)
    said = say(tmp_path, "start")
    aside = f"mv {broker.queue} {broker.queue}.old"
    assert said.returncode == 1 and "belongs to another profile" in said.stderr and aside in said.stderr
    assert aside in say(tmp_path, "doctor").stdout
    assert aside in say(tmp_path, "status").stdout
    # It can still be looked at, and deleted.
    assert json.loads(say(tmp_path, "status", "--json").stdout)["tasks"]["waiting"] == 1
    broker.stack.close()
    assert say(tmp_path, "delete", "--yes").returncode == 0
    assert not broker.config_path.exists()
    assert "Started" in say(tmp_path, "start").stdout
    broker.stack.callback(control.stop, broker.config_path)
    assert directories.read_format(broker.config_path)["uuid"] == NEW


def test_a_queue_that_says_no_uuid_is_anybodys_who_has_its_name(broker: Broker, tmp_path: Path) -> None:
    directory = configuration(tmp_path, broker.profile)
    broker.config_path = directory / "profiles" / broker.profile
    broker.communicator().close()
    assert directories.read_format(broker.config_path)["uuid"] is None
    assert control_doctor.examine(broker.config_path) == []


def looked_after(communicator: Any) -> None:
    """Have a communicator look after itself, as it does every ten seconds, and wait until it has."""
    looked = threading.Event()
    communicator._engine.poller.call(communicator._engine.upkeep.look_once)
    communicator._engine.poller.call(looked.set)
    looked.wait(1.0)  # If it closes, nobody sets it.


def test_who_lives_on_from_the_old_profile_touches_nothing_of_the_new_one(
    broker: Broker, caplog: pytest.LogCaptureFixture
) -> None:
    old, idle = broker.communicator("old", profile_uuid=OLD), broker.communicator("idle", profile_uuid=OLD)
    received = list[Any]()
    idle.add_task_subscriber(lambda _, body: received.append(body))
    broker.queue.rename(f"{broker.queue}.old")
    new = broker.communicator("new", profile_uuid=NEW)
    with pytest.raises(REFUSED):
        old.task_send("old")
    with pytest.raises(REFUSED):
        next(iter(old.task_queue("kiwipy.tasks")))
    broker.start()
    new.task_send("new", no_reply=True)
    for communicator in (old, idle):
        looked_after(communicator)
        eventually(communicator.is_closed)
    assert "closes" in caplog.text and received == []
    assert len(broker.tasks("waiting")) == 1 and not (broker.queue / "claimed" / "idle").exists()
    assert [task.body for task in new.task_queue("kiwipy.tasks")] == ["new"]


def test_a_loop_over_a_queue_ends_where_another_profiles_has_come_in_its_place(broker: Broker) -> None:
    old = broker.communicator(profile_uuid=OLD)
    for number in range(3):
        old.task_send(number, no_reply=True)
    taken = list[Any]()
    with pytest.raises(REFUSED):
        for task in old.task_queue("kiwipy.tasks"):
            taken.append(task.body)
            with task.processing() as future:
                future.set_result(None)
            if len(taken) == 1:
                broker.queue.rename(f"{broker.queue}.old")
                broker.communicator(profile_uuid=NEW).task_send("new", no_reply=True)
    assert taken == [0] and [task["state"] for task in broker.tasks()] == ["waiting"]
    with pytest.raises(REFUSED):
        old.task_queue("stray")
    assert not (broker.queue / "queues").exists()


def test_who_is_moved_away_while_a_body_is_encoded_sends_nothing_to_the_new_one(broker: Broker) -> None:
    def encode(_: object) -> str:
        broker.queue.rename(f"{broker.queue}.old")
        broker.communicator(profile_uuid=NEW)
        return "encoded"

    with pytest.raises(REFUSED):
        broker.communicator(profile_uuid=OLD, encoder=encode).task_send(object(), no_reply=True)
    assert broker.tasks() == []


def test_who_closes_leaves_what_another_has_by_its_id_now(broker: Broker, caplog: pytest.LogCaptureFixture) -> None:
    old = broker.communicator("w1", profile_uuid=OLD)
    old.add_rpc_subscriber(lambda _, body: "old", "identifier")
    old.add_task_subscriber(lambda _, body: "old")
    broker.queue.rename(f"{broker.queue}.old")
    new = broker.communicator("w1", profile_uuid=NEW)
    new.add_rpc_subscriber(lambda _, body: "new", "identifier")
    caller = broker.communicator(profile_uuid=NEW)
    assert caller.rpc_send("identifier", 1).result(TIMEOUT) == "new"
    # However often it is told, and by whomever.
    ring = frames.frame(frames.encode({"type": "ring", "queue": "", "names": []}))
    assert ring is not None
    for reader in old._engine.subscriptions._life.pipes._readers["task_w1"]:
        old._engine.poller.call(lambda reader=reader: [old._engine._receiver.rung(reader, ring) for _ in range(50)])
    old._engine._thread.join(TIMEOUT)
    assert old.is_closed() and caplog.text.count("closes:") == 1
    assert caller.rpc_send("identifier", 1).result(TIMEOUT) == "new"
    assert (broker.config_path / "pipes" / "worker_w1.json").exists()


def test_a_worker_without_a_descriptor_to_look_with_takes_nothing(broker: Broker) -> None:
    broker.config_path.mkdir(parents=True)
    child = broker.spawn(
        HOARD
        + """
worker = communicator("w1", profile_uuid="1" * 32)
worker.add_task_subscriber(lambda _, body: print("took", body))
upkeep = worker._engine.upkeep
print(upkeep.may_take()); sys.stdin.readline()
use_up()
said = upkeep.may_take()
free()
print(said, worker.is_closed())
print(upkeep.may_take(), worker.is_closed())
"""
    )
    assert child.line() == "True"
    broker.queue.rename(f"{broker.queue}.old")
    broker.communicator(profile_uuid=NEW)
    child.tell("go on")
    assert [child.line(), child.line()] == ["False False", "False True"]


def test_a_spoilt_format_keeps_no_task_from_anybody(broker: Broker, caplog: pytest.LogCaptureFixture) -> None:
    communicator = broker.communicator("w1", profile_uuid=OLD)
    (broker.queue / "format").unlink()
    (broker.queue / "format").mkdir()
    broker.stack.callback((broker.queue / "format").rmdir)
    communicator.task_send("waits", no_reply=True)
    looked_after(communicator)
    assert [task.body for task in communicator.task_queue("kiwipy.tasks")] == ["waits"]
    assert caplog.text == "" and list(broker.queue.glob(".format*")) == []


def test_a_coordinator_knows_the_queue_of_a_renamed_profile(broker: Broker) -> None:
    for name in (broker.profile, "renamed", broker.profile):
        directories.establish(name, broker.config_path, OLD)
    made = sharing.PipeCoordinator("renamed", broker.config_path, profile_uuid=OLD)
    made.run(made.stop)
    assert directories.read_format(broker.config_path)["profile"] == "renamed"


@pytest.mark.parametrize("how", ["send", "look"])
def test_whoever_makes_a_queue_again_says_whose_it_is(broker: Broker, how: str) -> None:
    old = broker.communicator("old", profile_uuid=OLD)
    broker.queue.rename(f"{broker.queue}.old")
    if how == "send":
        old.task_send("old", no_reply=True)
    else:
        looked_after(old)
    assert (broker.queue / "claimed" / "old").exists() == (how == "look")
    assert directories.read_format(broker.config_path)["uuid"] == OLD
    with pytest.raises(directories.DirectoryRefused, match="when nothing of that one runs any more"):
        broker.communicator(profile_uuid=NEW)


def test_the_command_that_sets_a_queue_aside_can_be_pasted(tmp_path: Path) -> None:
    config_path = tmp_path / "it's $HOME; a profile"
    pipebroker.PipeCommunicator("pasted", config_path, profile_uuid=OLD).close()
    with pytest.raises(directories.DirectoryRefused) as refused:
        pipebroker.PipeCommunicator("pasted", config_path, profile_uuid=NEW)
    command = str(refused.value).partition("set it aside by '")[2].partition("', or delete it")[0]
    subprocess.run(command, shell=True, check=True)
    assert sorted(os.listdir(config_path)) == ["coordinator.old", "pipes"]
    pipebroker.PipeCommunicator("pasted", config_path, profile_uuid=NEW).close()
    directories.remove_pipes(Path("/tmp/aiida_pasted_pipes"))


def test_a_profile_keeps_its_queue_when_it_is_renamed(broker: Broker, tmp_path: Path) -> None:
    directory = configuration(tmp_path, broker.profile, current=broker.profile, uuid=OLD)
    broker.config_path = directory / "profiles" / broker.profile
    broker.communicator(profile_uuid=OLD).task_send("waits", no_reply=True)
    broker.stack.close()
    directories.remove_pipes(broker.pipes)
    broker.profile += "-renamed"
    configuration(tmp_path, broker.profile, current=broker.profile, uuid=OLD)
    broker.config_path = broker.config_path.rename(directory / "profiles" / broker.profile)
    assert json.loads(say(tmp_path, "status", "--json").stdout)["tasks"]["waiting"] == 1
    assert "belongs to" not in say(tmp_path, "doctor").stdout
    assert say(tmp_path, "send", "1").stdout == "Sent.\n"
    assert "Started" in say(tmp_path, "start").stdout
    broker.stack.callback(control.stop, broker.config_path)
    assert directories.read_format(broker.config_path)["profile"] == broker.profile
    assert [task.body for task in broker.communicator(profile_uuid=OLD).task_queue("kiwipy.tasks")] == ["waits", 1]


@pytest.mark.parametrize("line", ["send 1", "call somebody 1", "broadcast 1"])
def test_a_profile_that_was_made_again_sends_nothing_to_the_old_one(broker: Broker, tmp_path: Path, line: str) -> None:
    directory = configuration(tmp_path, broker.profile, current=broker.profile, uuid=NEW)
    broker.config_path = directory / "profiles" / broker.profile
    broker.communicator(profile_uuid=OLD).close()
    said = say(tmp_path, *line.split())
    assert said.returncode == 1 and "set it aside by 'mv" in said.stderr, said
    assert broker.tasks("waiting") == [] and not list(broker.pipes.glob("kept_*"))


def test_a_profile_that_no_broker_has_served_yet_is_healthy_and_has_nothing_to_delete(tmp_path: Path) -> None:
    configuration(tmp_path, "fresh", current="fresh")
    for command, status in (["doctor"], 0), (["delete", "--yes"], 0), (["status"], 3):
        said = say(tmp_path, *command)
        assert (said.returncode, said.stderr) == (status, "") and "no broker has run in" in said.stdout


def test_a_file_where_the_profile_should_be_is_said_to_be_that(tmp_path: Path) -> None:
    directory = configuration(tmp_path, "fresh", current="fresh")
    (directory / "profiles").mkdir()
    (directory / "profiles" / "fresh").write_text("mine")
    for command in ("doctor", "delete", "status"):
        said = say(tmp_path, command)
        assert (said.returncode, said.stdout) == (1, "") and "fresh is no directory" in said.stderr


def test_what_is_wrong_with_aiidas_configuration_is_said_by_start(broker: Broker, tmp_path: Path) -> None:
    directory = configuration(tmp_path, broker.profile)
    (directory / "config.json").write_text("{")
    config_path = str(directory / "profiles" / broker.profile)
    said = say(tmp_path, "--profile", broker.profile, "--config-path", config_path, "start")
    assert said.returncode == 1 and said.stderr.count("\n") == 1 and "mend it" in said.stderr


@pytest.mark.parametrize("link", ["profile", "profiles", "elsewhere", ".."])
def test_whatever_links_lead_to_a_profile_it_is_the_same(broker: Broker, tmp_path: Path, link: str) -> None:
    directory = configuration(tmp_path, broker.profile, current=broker.profile, uuid=OLD)
    profile = directory / "profiles" / broker.profile
    if link in ("profile", "profiles"):
        linked = profile if link == "profile" else profile.parent
        (tmp_path / "disk").mkdir()
        linked.parent.mkdir(exist_ok=True)
        linked.symlink_to(tmp_path / "disk")
    profile.mkdir(parents=True, exist_ok=True)
    broker.config_path = profile
    broker.communicator(profile_uuid=OLD).close()
    configuration(tmp_path, broker.profile, current=broker.profile, uuid=NEW)
    (tmp_path / "link").symlink_to(profile)
    given = {"elsewhere": tmp_path / "link", "..": profile / "pipes" / ".."}.get(link)
    where = ["--profile", broker.profile, "--config-path", str(given)] if given is not None else []
    aside = f"mv {profile.resolve()}/coordinator "
    for command in ("start", "send 1", "restart", "status", "doctor"):
        said = say(tmp_path, *where, *command.split())
        assert said.returncode in (1, 3) and aside in (said.stdout + said.stderr).replace(str(given), str(profile))


def test_of_two_names_that_lead_to_one_directory_the_one_that_is_asked_for_is_meant(tmp_path: Path) -> None:
    profiles = configuration(tmp_path, "one", "two", uuid=OLD) / "profiles"
    (profiles / "one").mkdir(parents=True)
    (profiles / "two").symlink_to("one")
    assert [control_profiles.identity(profiles / name)[0] for name in ("one", "two")] == ["one", "two"]


def test_a_queue_may_be_set_aside_again_and_again(broker: Broker, tmp_path: Path) -> None:
    broker.config_path = configuration(tmp_path, broker.profile) / "profiles" / broker.profile
    for number in range(4):
        uuid = str(number) * 32
        configuration(tmp_path, broker.profile, current=broker.profile, uuid=uuid)
        if number:
            said = say(tmp_path, "send", "1").stderr
            subprocess.run(said[said.index("mv ") :].split("'")[0].split(), check=True)
        broker.communicator(profile_uuid=uuid).close()
    kept = sorted(path.name for path in broker.config_path.glob("coordinator*"))
    assert kept == ["coordinator", "coordinator.old", "coordinator.old1", "coordinator.old2"]


def test_a_delete_that_is_interrupted_can_be_done_again(broker: Broker, monkeypatch: pytest.MonkeyPatch) -> None:
    left = 0

    def interrupted(call: Callable[[Path], None]) -> Callable[[Path], None]:
        def remove(path: Path) -> None:
            nonlocal left
            left -= 1
            if not left:
                raise KeyboardInterrupt
            call(path)

        return remove

    for step in range(1, 100):
        with broker.communicator() as sender:
            sender.task_send("waits", no_reply=True)
        left = step
        with monkeypatch.context() as patch:
            patch.setattr(Path, "unlink", interrupted(Path.unlink))
            patch.setattr(Path, "rmdir", interrupted(Path.rmdir))
            with contextlib.suppress(KeyboardInterrupt):
                control_install.delete(broker.config_path)
        if left > 0:
            break
        with contextlib.suppress(presence.CoordinatorError):  # It was to remove but the queue's empty directory.
            control_install.delete(broker.config_path)
        assert not broker.pipes.exists() and not list(files.listed(broker.queue)), step
    assert step > 10 and not broker.queue.exists()


def test_what_is_left_of_a_queue_that_was_set_aside_can_be_deleted(broker: Broker, tmp_path: Path) -> None:
    directory = configuration(tmp_path, broker.profile, current=broker.profile)
    broker.config_path = directory / "profiles" / broker.profile
    broker.communicator(profile_uuid=NEW).close()
    broker.queue.rename(broker.queue.with_name("coordinator.old"))
    rows = json.loads(say(tmp_path, "list", "--json").stdout)["profiles"]
    assert broker.profile in [row["profile"] for row in rows]
    said = say(tmp_path, "pause")
    assert said.returncode == 1 and "'start' makes it anew" in said.stderr
    said = say(tmp_path, "delete", "--yes")
    assert said.returncode == 0 and not broker.pipes.exists()
    assert sorted(os.listdir(broker.config_path)) == ["coordinator.old"]


def test_what_a_doctor_that_was_killed_has_left_is_the_brokers(broker: Broker, monkeypatch: pytest.MonkeyPatch) -> None:
    broker.communicator().close()
    with monkeypatch.context() as patch:
        patch.setattr(files, "remove", lambda _: None)
        control_doctor.examine(broker.config_path)
    assert [path for path in broker.queue.iterdir() if ".doctor" in path.name]
    assert control_install.delete(broker.config_path)[1] == []


def test_a_directory_of_another_name_says_which_profile_to_name(broker: Broker) -> None:
    broker.communicator().close()
    said = say(broker.config_path, "--profile", "other", "--config-path", str(broker.config_path), "status")
    assert said.returncode == 1 and f"belongs to the profile '{broker.profile}'" in said.stderr
    assert "name that one by --profile" in said.stderr


# How long it stays


def test_who_is_started_for_others_ends_when_nobody_is_there(broker: Broker) -> None:
    sender = broker.communicator()
    assert "Started" in broker.run("start", "--idle", "0.5")
    broker.stack.callback(control.stop, broker.config_path)
    said = broker.status()
    assert said["idle"] == 0.5 and "It ends when nobody has been here for 0.5 s" in broker.run("status")
    sender.task_send("waits", no_reply=True)
    sender.close()
    eventually(lambda: not broker.status()["running"], 2 * TIMEOUT)
    assert "no communicator has been here for 0.5 s" in broker.log()
    assert len(broker.tasks("waiting")) == 1


def test_who_is_started_again_ends_as_the_one_before_it_would(broker: Broker) -> None:
    broker.communicator()
    assert "Started" in broker.run("start", "--idle", "300")
    broker.stack.callback(control.stop, broker.config_path)
    broker.run("restart")
    assert broker.status()["idle"] == 300.0
    broker.run("stop")
    broker.run("restart")
    assert broker.status()["idle"] is None


@pytest.mark.parametrize("who", ["sender", "worker without pipes"])
def test_it_stays_as_long_as_anybody_is_there(broker: Broker, monkeypatch: pytest.MonkeyPatch, who: str) -> None:
    monkeypatch.setattr(sharing, "HOUSEKEEPING_SECONDS", 0.01)
    communicator = broker.communicator("worker")
    if who != "sender":
        communicator.add_task_subscriber(lambda *_: None)
    company = sharing.Company(communicator._engine.layout, 0.0)
    for pipe in broker.pipes.glob("reply_*") if who != "sender" else ():
        pipe.unlink()
    assert not company.is_missed()
    communicator.close()
    assert company.is_missed() and not company.has_come_back()
    broker.communicator()
    assert company.has_come_back()


COMES_AT_THE_END = """
import coordinator, service, sharing, pathlib
sharing.HOUSEKEEPING_SECONDS = 0.02
came = []
def notify(state):
    print(state)
    if state == "STOPPING=1" and not came:
        came.append(communicator())  # It finds a coordinator whose lock is held.
    elif state == "READY=1" and came:
        print(came[0].task_send("x", no_reply=True))
        came[0].close()
service.notify = notify
coordinator.serve(profile, pathlib.Path(config_path), idle=0.05)
print("ended")
"""


def test_who_comes_at_the_last_moment_is_served(broker: Broker) -> None:
    child = broker.spawn(COMES_AT_THE_END)
    lines = [child.line() for _ in range(6)]
    assert lines == ["READY=1", "STOPPING=1", "READY=1", "None", "STOPPING=1", "ended"]


def test_one_that_is_told_to_end_is_not_taken_for_one_that_was_left_alone(broker: Broker) -> None:
    broker.communicator()
    served = sharing.PipeCoordinator(broker.profile, broker.config_path, idle=0.0)
    thread = threading.Thread(target=served.run)
    thread.start()
    served.stop()
    thread.join(TIMEOUT)
    assert not thread.is_alive() and not served.company.has_come_back()


def test_stop_of_another_one_than_is_meant_is_none(served: Broker) -> None:
    pid = served.status()["pid"]
    assert control.stop(served.config_path, pid + 1) is None and served.status()["running"]
    assert control.stop(served.config_path, pid) == pid
