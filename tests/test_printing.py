"""What a command prints, on which stream, and what comes of it where that cannot be."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import control
import control_doctor
import directories
import taskqueue
from harness import AS_OTHER_USER, COORDINATOR, HERE, OTHER_USER, TIMEOUT, Broker, eventually
from test_operator import Terminal, root


def say(broker: Broker, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a command, whatever it exits with."""
    command = [*COORDINATOR, "--profile", broker.profile, "--config-path", broker.config_path, *arguments]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "timeout": TIMEOUT, **options}
    return subprocess.run(command, check=False, **options)


def wait(broker: Broker, count: int) -> list[str]:
    """Let so many tasks wait; return their ids."""
    queue = taskqueue.TaskQueue(broker.queue)
    with broker.communicator(fsync=False) as sender:
        for number in range(count):
            sender.task_send(number, no_reply=True)
    return sorted(queue.names())


# Streams


@pytest.mark.parametrize(
    ("arguments", "status"),
    [(["show", "nope"], 1), (["bogus"], 2), (["drain", "--timeout", "0.1"], 4), (["status", "--state"], 2)],
)
@pytest.mark.parametrize("reader", ["full", "gone", "closed"])
def test_the_status_is_the_same_where_the_complaint_cannot_be_printed(
    served: Broker, arguments: list[str], status: int, reader: str
) -> None:
    if status == 4:
        wait(served, 1)
        held = served.communicator()
        tasks = iter(held.task_queue("kiwipy.tasks"))
        assert next(tasks)
    read_end, write_end = os.pipe()
    os.close(read_end)
    try:
        with open("/dev/full", "w") as full:
            where = {"full": full, "gone": write_end, "closed": None}[reader]
            said = say(
                served,
                *arguments,
                stderr=where,
                preexec_fn=(lambda: os.close(2)) if reader == "closed" else None,
            )
    finally:
        os.close(write_end)
    assert (said.returncode, said.stdout) == (status, "")


def test_what_is_to_be_done_is_done_where_it_cannot_be_printed(broker: Broker) -> None:
    ids = wait(broker, 5)
    with open("/dev/full", "w") as full:
        said = say(broker, "remove", *ids[:3], stdout=full)
        assert said.returncode == 1 and "cannot be printed" in said.stderr
        assert [row["id"] for row in broker.tasks()] == ids[3:]
        said = say(broker, "purge", "--state", "waiting", stdout=full)
        assert said.returncode == 1 and broker.tasks() == []


def test_what_goes_wrong_is_said_once_where_there_are_few_descriptors(broker: Broker) -> None:
    broker.communicator().close()
    command = " ".join(map(str, (*COORDINATOR, "--profile", broker.profile, "--config-path", broker.config_path)))
    for number in range(5, 20):
        said = subprocess.run(
            ["bash", "-c", f"ulimit -n {number}; exec {command} send 1"],
            check=False,
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
        )
        assert "Traceback" not in said.stderr or "coordinator.py" not in said.stderr, said.stderr
        assert said.stderr.count("\n") <= 1 or said.returncode not in (0, 1), said.stderr


def test_a_script_finds_its_neighbours_where_python_hides_them(broker: Broker) -> None:
    said = say(broker, "status", env={**os.environ, "PYTHONSAFEPATH": "1"})
    assert "ModuleNotFoundError" not in said.stderr and said.returncode in (1, 3)


# Words


@pytest.mark.parametrize("content", ["{}", "[]", "null", '"x"', '{"profiles": null}', '{"profiles": 5}'])
@pytest.mark.parametrize("command", ["status", "stop", "tasks", "list", "doctor"])
def test_a_configuration_of_aiidas_without_profiles_is_none(tmp_path: Path, content: str, command: str) -> None:
    (tmp_path / ".aiida").mkdir()
    (tmp_path / ".aiida" / "config.json").write_text(content)
    said = subprocess.run(
        [*COORDINATOR, "--profile", "nix", command],
        check=False,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        env={**os.environ, "HOME": str(tmp_path), "AIIDA_PATH": ""},
    )
    assert "Traceback" not in said.stderr and said.returncode == (0 if command == "list" else 1)


def test_no_two_queues_have_the_same_name(broker: Broker) -> None:
    with broker.communicator() as sender:
        sender.task_send(0, no_reply=True)
        names = ("default", "queues/default", "queues/x", "x")
        for name in names:
            sender.task_queue(name).task_send(name, no_reply=True)
    layout = directories.locate(broker.config_path)
    assert layout is not None
    shown = {control.queue_name(layout, key) for key in control.queues(layout)}
    assert shown == {"default", "queues/default", "queues/queues/default", "queues/queues/x", "x"}
    for name in sorted(shown - {"default"}):
        broker.run("send", json.dumps(control.meant(name)), "--queue", name)
        assert "2 waiting tasks removed" in broker.run("purge", "--state", "waiting", "--queue", name)
    assert [row["queue"] for row in broker.tasks()] == ["default"]


def test_a_terminal_is_told_nothing_that_it_obeys(tmp_path: Path) -> None:
    broker = Broker(tmp_path)
    broker.profile, broker.config_path = "test-\033[31mred\nline", tmp_path / "dir\033[31m"
    try:
        broker.start()
        with broker.communicator() as sender:
            sender.task_send(1, no_reply=True)
        shown = [say(broker, *line.split()) for line in ("status", "logs", "show 0", "show 1", "doctor", "tasks")]
        shown.append(say(broker, "delete", input="n\n"))
    finally:
        broker.stack.close()
    shown.append(say(broker, "delete", "--yes"))
    assert not any("\033" in said.stdout + said.stderr for said in shown)


def test_what_is_shown_fits_the_screen(broker: Broker) -> None:
    wait(broker, 0)
    with broker.communicator() as sender:
        sender.task_send(["x" * 199] * 30, no_reply=True)
    (row,) = broker.tasks()
    terminal = Terminal(broker, "show", row["id"], LINES="24", COLUMNS="80")
    assert terminal.end() == 0
    rows = [-(-len(line) // 80) or 1 for line in terminal.shown.replace("\r", "").rstrip("\n").split("\n")]
    assert sum(rows) <= 24 and "all of it with --full" in terminal.shown


def test_what_is_watched_does_not_scroll(served: Broker) -> None:
    sender = served.communicator(fsync=False)
    for number in range(10):
        sender.task_queue(f"queue{number}").task_send(1, no_reply=True)
    terminal = Terminal(served, "status", "--watch", LINES="24", COLUMNS="80")
    terminal.until("\033[J")
    assert terminal.shown.split("\033[J")[0].count("\n") == 23
    terminal.until("\033[J\033[H")
    terminal.type("\x03")
    terminal.end()


def test_a_profile_may_be_called_what_is_no_utf_8(tmp_path: Path) -> None:
    command = [*COORDINATOR, "--profile", b"test-\xff", "--config-path", tmp_path / "it"]
    said = subprocess.run([*command, "status"], check=False, capture_output=True, timeout=TIMEOUT)
    assert b"Traceback" not in said.stderr and b"codec" not in said.stderr
    with pytest.raises(ValueError, match="too long for a file name"):
        directories.establish("ü" * 40, tmp_path / "other")
    with pytest.raises(ValueError, match="UTF-8 has not all of it"):
        directories.quoted("\udcff")


def test_a_coordinator_that_does_not_say_its_pid_has_none(served: Broker) -> None:
    lock = served.queue / "coordinator.lock"
    said = lock.read_text()
    os.truncate(lock, 0)
    assert served.status()["pid"] is None and "pid ?" in served.run("status")
    lock.write_text(said)


def test_show_says_what_it_can_of_what_it_may_not_see(broker: Broker, monkeypatch: pytest.MonkeyPatch) -> None:
    import control_tasks
    import control_words

    (task_id,) = wait(broker, 1)
    lstat = os.lstat

    def refuses(path: Any) -> os.stat_result:
        if str(path).endswith(".json"):
            raise PermissionError(13, "Permission denied", str(path))
        return lstat(path)

    monkeypatch.setattr(os, "lstat", refuses)
    said = control_tasks.show(broker.config_path, task_id)
    assert said["size"] is None and said["since"] is None and "? bytes" in "\n".join(control_words.task(said, None))


# The log


def test_a_log_that_has_been_moved_and_not_begun_anew_is_followed(served: Broker) -> None:
    log = served.queue / "coordinator.log"
    log.rename(log.with_name("coordinator.log.1"))
    command = ["timeout", "30", *COORDINATOR, "--profile", served.profile, "--config-path", served.config_path]
    command += ["logs", "--follow"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, bufsize=1) as process:
        assert process.stdout is not None and "Serving" in process.stdout.readline()
        os.kill(served.status()["pid"], signal.SIGHUP)
        line = process.stdout.readline()
        while "SIGHUP" not in line:
            assert line
            line = process.stdout.readline()
        process.kill()


def test_a_log_is_read_the_same_in_every_locale(broker: Broker) -> None:
    broker.communicator().close()
    (broker.queue / "coordinator.log").write_text("é line\f with a form feed\nlast\n", encoding="utf-8")
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    assert say(broker, "logs", "-n", "2", env=environment).stdout == "\\xe9 line\\x0c with a form feed\nlast\n"


@pytest.mark.parametrize("name", ["SIGALRM", "SIGVTALRM", "SIGPROF", "SIGIO", "SIGUSR1", "SIGUSR2"])
def test_a_signal_that_means_nothing_leaves_a_line_and_no_more(served: Broker, name: str) -> None:
    pid = served.status()["pid"]
    os.kill(pid, getattr(signal, name))
    eventually(lambda: re.search("Passed over SIG", served.log()))
    assert served.status()["pid"] == pid


# The doctor

EXAMINE = """
for found in control_doctor.examine(sys.argv[1]):
    print(found.what, "-", found.remedy)
"""


@root
@pytest.mark.parametrize("state", ["claimed", "completed", "failed", "queues/q", "queues/q/failed"])
def test_the_doctor_finds_a_directory_that_cannot_be_written(state: str) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as name:
        broker = Broker(Path(name))
        try:
            with broker.communicator() as sender:
                sender.task_queue("q")
                subprocess.run(["chown", "-R", str(OTHER_USER), name, broker.pipes], check=True)
                (broker.queue / state).chmod(0o500)
                said = subprocess.run(
                    [sys.executable, "-c", AS_OTHER_USER + EXAMINE, broker.config_path],
                    check=False,
                    capture_output=True,
                    text=True,
                    timeout=TIMEOUT,
                )
            assert f"{broker.queue / state} may not be" in said.stdout and said.stderr == "", said
        finally:
            broker.stack.close()
            subprocess.run(["rm", "-rf", broker.pipes], check=True)


@root
def test_the_doctor_sends_another_user_away(broker: Broker) -> None:
    broker.communicator().close()
    subprocess.run(["chown", "-R", str(OTHER_USER), broker.queue], check=True)
    (found,) = control_doctor.examine(broker.config_path)
    assert "run this as that user" in found.remedy
    subprocess.run(["chown", "-R", "0", broker.queue], check=True)


def test_a_body_that_is_cut_says_so(broker: Broker) -> None:
    with broker.communicator() as sender:
        sender.task_send("\u200b" * 850 + "THE END", no_reply=True)
    shown = broker.run("show", broker.tasks()[0]["id"])
    assert "THE END" not in shown and "all of it with --full" in shown


def test_an_empty_log_has_no_lines(broker: Broker) -> None:
    broker.communicator().close()
    (broker.queue / "coordinator.log").touch()
    assert broker.run("logs") == ""


def test_a_script_that_is_a_link_finds_the_modules_beside_what_it_leads_to(broker: Broker, tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    os.symlink(HERE / "coordinator.py", tmp_path / "bin" / "coordinator.py")
    (tmp_path / "bin" / "bodies.py").write_text("raise SystemExit(9)")
    for safe in ("", "1"):
        said = subprocess.run(
            [sys.executable, tmp_path / "bin" / "coordinator.py", "--version"],
            check=False,
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONSAFEPATH": safe},
            timeout=TIMEOUT,
        )
        assert (said.returncode, said.stdout.strip()) == (0, directories.VERSION)


def test_a_command_may_be_called_where_the_streams_are_closed(broker: Broker) -> None:
    script = (
        "import sys, control_line; sys.stdout.close(); sys.stderr.close(); sys.exit(control_line.main(%r, None, 'x'))"
    )
    for arguments, status in ((["--profile=x", "--config-path=/nowhere", "status"], 1), (["bogus"], 2)):
        said = subprocess.run([sys.executable, "-c", script % arguments], check=False, cwd=HERE, timeout=TIMEOUT)
        assert said.returncode in (status, 120)
