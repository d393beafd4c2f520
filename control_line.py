"""The command line of an operator: ``python coordinator.py --profile NAME COMMAND``.

Strategy: one table of commands. Each is a generator of its answers, and an answer is both words and data: the words are
printed, or with ``--json`` the data, one object a line. Its value is the exit status.

Rules:
- Whoever made a mistake gets one sentence on stderr that says what to do, and never a traceback.
- An exit status means the same everywhere: 0 done, 1 something is wrong, 2 usage, 3 not running, 4 timed out, and 130
  Ctrl-C.
- What only some commands need is imported by them: asking for the status is to be quick.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import select
import shutil
import sys
from collections.abc import Callable, Generator, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING or not __package__:
    import control
    import control_log
    import control_print
    import control_tasks
    import control_words as words
    import directories
    import presence
else:
    from . import control, control_log, control_print, control_tasks, directories, presence
    from . import control_words as words

Serve = Callable[[str, Path, int | None], None]
"""Serves in the foreground, as `coordinator.serve` does."""
Answer: TypeAlias = Generator[tuple["str | Iterable[str]", dict[str, Any]], None, "int | None"]
"""Each time a text, or its lines, and the data for whoever reads JSON."""
FAILED, NOT_RUNNING, TIMED_OUT, INTERRUPTED = 1, 3, 4, 130
_WITHOUT_PROFILE = ("list",)
_LONGEST_SECONDS = 1e8  # Three years: what the system can wait has a limit.


def main(arguments: list[str] | None, serve: Serve, prog: str) -> int:
    """Run the command line; return the exit status.

    :param serve: what serves in the foreground.
    :param prog: what its user has called, for usage and errors.
    """
    control_print.prepare()
    try:
        return _obey(_options(arguments, prog), serve)
    except control.TimedOut as error:
        return control_print.complain(prog, error, TIMED_OUT)
    except (RuntimeError, OSError, ValueError) as error:
        return control_print.complain(prog, error, FAILED)
    except KeyboardInterrupt:
        return INTERRUPTED


def _options(arguments: list[str] | None, prog: str) -> argparse.Namespace:
    parser = _parser(prog)
    blank = argparse.Namespace(profile=None, config_path=None, json=False, prog=prog)
    # What argparse does where its help or its complaint cannot be printed depends on the Python.
    printed, complaint = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(complaint):
            options = parser.parse_args(arguments, blank)
            if options.profile is None and options.command not in _WITHOUT_PROFILE:
                parser.error("the profile is missing: name it by --profile")
            return options
    except SystemExit:
        control_print.ask(complaint.getvalue())
        with contextlib.suppress(control_print.SeenEnough):
            control_print.answer(printed.getvalue())
        raise


def _obey(options: argparse.Namespace, serve: Serve) -> int:
    """Carry out a command, and print what it says; return the exit status."""
    if options.command not in _WITHOUT_PROFILE:
        options.directory = _config_path(options)
    if options.command is None or (options.command == "start" and options.foreground):
        serve(options.profile, options.directory, options.ready_descriptor)
        return 0
    answer = options.obey(options)
    endless = getattr(options, "watch", False) or getattr(options, "follow", False)
    trouble: Exception | None = None
    while True:
        try:
            text, data = next(answer)
        except StopIteration as end:
            if isinstance(trouble, presence.CoordinatorError):
                raise trouble from None
            return end.value or 0
        try:
            if trouble is not None:
                continue  # What was to be done is done, whether or not anybody reads of it.
            if options.json:
                control_print.answer(json.dumps({"version": 1, **data}, default=str))
            else:
                control_print.answer(text if isinstance(text, str) else "\n".join(map(words.plain, text)))
        except (control_print.SeenEnough, presence.CoordinatorError) as error:
            if endless and isinstance(error, control_print.SeenEnough):
                return 0
            if endless:
                raise
            trouble = error


def _config_path(options: argparse.Namespace) -> Path:
    """Return the profile's directory.

    :raises ValueError: the name would lead elsewhere, or the directory is another profile's.
    """
    name = options.profile
    if options.config_path == "":
        raise ValueError("--config-path is empty; name the profile's directory by it")
    if options.config_path is None and (name in ("", ".", "..") or "/" in name or "\0" in name):
        raise ValueError(f"{name!r} is no name of a profile; name its directory by --config-path")
    config_path = Path(options.config_path or f"~/.aiida/profiles/{name}").expanduser().absolute()
    known = directories.read_format(config_path).get("profile", name)
    if known != name and options.command is not None:
        raise ValueError(f"{config_path} belongs to the profile '{known}', not to '{name}'")
    return config_path


# The coordinator


def _start(options: argparse.Namespace, done: str = "Started") -> Answer:
    warnings: list[str] = []
    pid = control.start(options.profile, options.directory, warnings.append)
    yield f"{done} the coordinator, pid {pid}.", {"pid": pid, "warnings": warnings}
    for warning in warnings:
        control_print.complain(options.prog, RuntimeError(f"it serves, but {warning}"), 0)
    return 0


def _stop(options: argparse.Namespace) -> Answer:
    control.expect(options.directory)
    pid = control.stop(options.directory)
    text = "The coordinator is not running." if pid is None else f"Stopped the coordinator, pid {pid or '?'}."
    yield text, {"pid": pid or None}
    return 0


def _restart(options: argparse.Namespace) -> Answer:
    control.stop(options.directory)
    return (yield from _start(options, "Restarted"))


def _status(options: argparse.Namespace) -> Answer:
    control.expect(options.directory)
    while True:
        said = control.status(options.directory)
        if not options.watch:
            yield words.status(said), said
            return 0 if said["running"] else NOT_RUNNING
        if sys.stdout is not None and sys.stdout.isatty():
            lines = list(words.bars(said, colour="NO_COLOR" not in os.environ))
            _, height = _screen()
            # Each line is written over the last one, and what is below it removed, so that nothing flickers.
            yield "\033[H" + "".join(f"{line}\033[K\n" for line in lines[: height - 1]) + "\033[J", said
        else:
            yield words.one_line(said), said
        # A person watches, once a second.
        select.select([], [], [], 1.0)


def _screen() -> tuple[int, int]:
    """Return the terminal's columns and lines; one that says 0, as a new one does, is taken for the usual one."""
    size = shutil.get_terminal_size()
    return size.columns or 80, size.lines or 24  # Before 3.11, Python hands a 0 on.


def _pause(options: argparse.Namespace) -> Answer:
    was = not control.pause(options.directory)
    yield "It was paused already." if was else "Paused: nothing new is started, until 'resume'.", {"was_paused": was}
    return 0


def _resume(options: argparse.Namespace) -> Answer:
    was = control.resume(options.directory)
    yield "Resumed." if was else "It was not paused.", {"was_paused": was}
    return 0


def _drain(options: argparse.Namespace) -> Answer:
    busy = control.drain(options.directory, options.timeout)
    if not busy:
        yield "Nothing is in hand, and nothing new is started, until 'resume'.", {"busy": []}
        return 0
    if options.json:
        yield "", {"busy": busy}
    number = sum(worker["in_hand"] for worker in busy)
    held = ", ".join(
        f"worker {worker['worker_id']} (pid {worker['pid'] or '?'}): {worker['in_hand']}" for worker in busy
    )
    verb = "is" if number == 1 else "are"
    raise control.TimedOut(f"{words.count(number, 'task')} {verb} still in hand, and it stays paused: {held}")


def _logs(options: argparse.Namespace) -> Answer:
    if options.follow:
        for line in control_log.follow(options.directory, options.number):
            yield [line], {"lines": [line]}
    lines = control_log.last(options.directory, options.number)
    if lines:
        yield lines, {"lines": lines}
    return 0


# Tasks


def _tasks(options: argparse.Namespace) -> Answer:
    problems: list[OSError] = []
    only = {"errors": options.errors, "limit": options.limit, "warn": problems.append}
    rows = control_tasks.tasks(options.directory, options.state, options.queue, **only)
    yield words.tasks(rows), {"tasks": rows}
    for problem in problems:
        control_print.complain(options.prog, problem, FAILED)
    return FAILED if problems else 0


def _show(options: argparse.Namespace) -> Answer:
    said = control_tasks.show(options.directory, options.task_id)
    width, height = _screen()
    yield words.task(said, None if options.full else (height - 12, width)), said
    return 0


def _each(options: argparse.Namespace, each: Iterable[control_tasks.Done], done: str) -> Answer:
    """Say what became of each task."""
    number, status = 0, 0
    for task_id, problem in each:
        if problem is None:
            number += 1
            yield f"{done} {task_id}.", {done.lower(): task_id}
        else:
            status = control_print.complain(options.prog, problem, FAILED)
    if options.command == "purge":
        yield f"{words.count(number, f'{options.state} task')} removed.", {"number": number}
    return status


def _requeue(options: argparse.Namespace) -> Answer:
    return (yield from _each(options, control_tasks.requeue(options.directory, options.task_ids), "Requeued"))


def _remove(options: argparse.Namespace) -> Answer:
    return (yield from _each(options, control_tasks.remove(options.directory, options.task_ids), "Removed"))


def _purge(options: argparse.Namespace) -> Answer:
    return (yield from _each(options, control_tasks.purge(options.directory, options.state, options.queue), "Removed"))


# To try it


def _trial() -> Any:
    try:
        import kiwipy  # noqa: F401
    except ImportError as error:
        raise presence.CoordinatorError(f"kiwipy is not installed for {sys.executable}: {error}") from None
    if TYPE_CHECKING or not __package__:
        import control_try
    else:
        from . import control_try
    return control_try


def _send(options: argparse.Namespace) -> Answer:
    to = (options.profile, options.directory, options.body, options.queue)
    result = _trial().send(*to, wait=options.wait, timeout=options.timeout)
    yield words.pretty(result) if options.wait else "Sent.", {"result": result}
    return 0


def _call(options: argparse.Namespace) -> Answer:
    result = _trial().call(options.profile, options.directory, options.identifier, options.body, options.timeout)
    yield words.pretty(result), {"result": result}
    return 0


def _broadcast(options: argparse.Namespace) -> Answer:
    _trial().broadcast(options.profile, options.directory, options.body, options.sender, options.subject)
    yield "Sent.", {}
    return 0


# Installations


def _installing() -> Any:
    if TYPE_CHECKING or not __package__:
        import control_install
    else:
        from . import control_install
    return control_install


def _list(options: argparse.Namespace) -> Answer:
    rows = _installing().installations()
    yield words.installations(rows), {"profiles": rows}
    return 0


def _delete(options: argparse.Namespace) -> Answer:
    counts = control.status(control.find(options.directory).config_path)["tasks"]
    if not options.yes:
        question = f"Delete {options.directory}/coordinator with {words.counts(counts)}? [y/N] "
        control_print.ask(words.plain(question))
        if sys.stdin is None or sys.stdin.readline().strip().lower() not in ("y", "yes"):
            raise presence.CoordinatorError("nothing was deleted: answer 'y', or give --yes")
    removed, left = _installing().delete(options.directory)
    for path in removed:
        yield [f"Deleted {path}."], {"deleted": str(path)}
    for path in left:
        yield [f"Left {path}, which is none of the broker's."], {"left": str(path)}
    return 0


def _doctor(options: argparse.Namespace) -> Answer:
    if TYPE_CHECKING or not __package__:
        import control_doctor
    else:
        from . import control_doctor
    found = control_doctor.examine(options.directory)
    rows = [{"what": each.what, "remedy": each.remedy, "problem": each.problem} for each in found]
    yield words.findings(rows), {"findings": rows}
    return FAILED if any(each.problem for each in found) else 0


def _configure(options: argparse.Namespace) -> Answer:
    control.configure(options.profile, autostart=options.autostart)
    said = f"Profile {options.profile} uses the named pipe broker now. Restart its daemon if it runs."
    yield said, {"profile": options.profile}
    return 0


# What it understands


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 <= value < float("inf"):
        raise ValueError
    return min(value, _LONGEST_SECONDS)


def _number(text: str) -> int:
    value = int(text)
    if value < 0:
        raise ValueError
    return value


def _body(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no JSON ({error}); a string is '\"text\"'") from None


Add = Callable[[str, Callable[[argparse.Namespace], Answer], str], argparse.ArgumentParser]


def _parser(prog: str) -> argparse.ArgumentParser:
    # Before the command or after it; what is not given after it does not undo what was given before.
    common, default = argparse.ArgumentParser(add_help=False), argparse.SUPPRESS
    common.add_argument("--profile", default=default, metavar="NAME", help="the profile's name")
    common.add_argument(
        "--config-path", default=default, metavar="DIR", help="its directory (default: ~/.aiida/profiles/NAME)"
    )
    common.add_argument("--json", default=default, action="store_true", help="print JSON, one object a line")
    parser = argparse.ArgumentParser(
        prog=prog,
        parents=[common],
        description="Shares out tasks and fans out broadcasts between the processes of one profile. "
        "Without a command it runs in the foreground.",
        epilog="Exit status: 0 done, 1 something is wrong, 2 usage, 3 not running, 4 timed out, 130 Ctrl-C.",
    )
    parser.add_argument("--version", action="version", version=directories.VERSION)
    parser.add_argument("--ready-descriptor", type=int, help=argparse.SUPPRESS)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")

    def add(name: str, obey: Callable[[argparse.Namespace], Answer], text: str) -> argparse.ArgumentParser:
        command: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text, parents=[common])
        command.set_defaults(obey=obey)
        return command

    _add_coordinator(add)
    _add_tasks(add)
    _add_trials(add)
    _add_installations(add)
    return parser


def commands() -> dict[str, str]:
    """Return the commands, each with what it does, for a command line that has them as its own."""
    found: dict[str, str] = {}

    def note(name: str, obey: Callable[[argparse.Namespace], Answer], text: str) -> argparse.ArgumentParser:
        found[name] = text
        return argparse.ArgumentParser()

    for add_some in (_add_coordinator, _add_tasks, _add_trials, _add_installations):
        add_some(note)
    return found


def _add_coordinator(add: Add) -> None:
    add("start", _start, "start it in the background, and return when it serves").add_argument(
        "--foreground", action="store_true", help="stay in the foreground, and log to the terminal too"
    )
    add("stop", _stop, "stop it, and return when it is gone")
    add("restart", _restart, "stop it if it runs, and start it")
    command = add("status", _status, "say how things are; exit status 0 if it runs, 3 if not")
    command.add_argument("--watch", action="store_true", help="again each second, until Ctrl-C")
    add("pause", _pause, "start nothing new, in any queue, until 'resume'")
    add("resume", _resume, "go on after 'pause' or 'drain'")
    command = add("drain", _drain, "pause, and wait until nothing is in hand; exit status 4 if something still is")
    command.add_argument("--timeout", type=_seconds, metavar="S", help="for so many seconds at most")
    command = add("logs", _logs, "print the newest lines of the coordinator's log")
    command.add_argument("-n", dest="number", type=_number, default=20, metavar="N", help="how many (default: 20)")
    command.add_argument("--follow", action="store_true", help="and those that come, until Ctrl-C")


def _add_tasks(add: Add) -> None:
    command = add("tasks", _tasks, "list the tasks, oldest first")
    command.add_argument("--state", choices=control.STATES, help="only these")
    command.add_argument("--queue", metavar="NAME", help="only those of a queue, as its user calls it")
    command.add_argument("--errors", action="store_true", help="only those that raised or were given up on")
    command.add_argument("--limit", type=_number, metavar="N", help="the oldest so many")
    command = add("show", _show, "say all that is known of a task")
    command.add_argument("task_id", metavar="ID", help="as 'tasks' prints it, or the beginning or end of it")
    command.add_argument("--full", action="store_true", help="the whole body, and not just a screenful")
    for name, obey, text in (
        ("requeue", _requeue, "move failed or completed tasks back to waiting"),
        ("remove", _remove, "remove tasks, whatever their state, unless a live worker holds them"),
    ):
        command = add(name, obey, text)
        command.add_argument("task_ids", nargs="+", metavar="ID", help="the id, or the beginning or end of it")
    command = add("purge", _purge, "remove all tasks of a state")
    states = [state for state in control.STATES if state != "claimed"]
    command.add_argument("--state", choices=states, required=True, help="which")
    command.add_argument("--queue", metavar="NAME", help="only those of a queue")


def _add_trials(add: Add) -> None:
    command = add("send", _send, "send a task")
    command.add_argument("body", type=_body, metavar="JSON", help="its body")
    command.add_argument("--queue", metavar="NAME", help="to a queue (default: the default one)")
    command.add_argument("--wait", action="store_true", help="wait for its outcome, and print it")
    command.add_argument("--timeout", type=_seconds, metavar="S", help="for so many seconds at most")
    command = add("call", _call, "call an RPC subscriber, and print its answer")
    command.add_argument("identifier", metavar="IDENTIFIER", help="whom")
    command.add_argument("body", type=_body, metavar="JSON", help="with what")
    command.add_argument("--timeout", type=_seconds, metavar="S", help="wait for so many seconds at most")
    command = add("broadcast", _broadcast, "send a broadcast")
    command.add_argument("body", type=_body, metavar="JSON", help="its body")
    command.add_argument("--sender", metavar="TEXT", help="who it says it is from")
    command.add_argument("--subject", metavar="TEXT", help="what it says it is about")


def _add_installations(add: Add) -> None:
    add("list", _list, "list the profiles of this user that have used the broker")
    command = add("delete", _delete, "delete the queue of the profile, with all its tasks, and its pipes")
    command.add_argument("--yes", action="store_true", help="without a question")
    add("doctor", _doctor, "look for what goes wrong in practice; exit status 1 if something does")
    add("configure", _configure, "point the AiiDA profile of this name at this broker").add_argument(
        "--no-autostart", dest="autostart", action="store_false", help="start no coordinator when one is needed"
    )
