"""What each command of an operator does, and says.

Strategy: each is a generator of its answers, and an answer is both words and data: the words are printed, or with
``--json`` the data, one object a line. Its value is the exit status.

Rules:
- What a command is to do is done in ``control.py`` and its like, which know nothing of words; and the words are in
  ``control_words.py``, which does nothing. Here they meet.
- An exit status means the same everywhere: 0 done, 1 something is wrong, 2 usage, 3 not running, 4 timed out, and 130
  Ctrl-C.
- What only some commands need is imported by them: asking for the status is to be quick.
"""

from __future__ import annotations

import argparse
import os
import select
import shlex
import shutil
import sys
from collections.abc import Generator, Iterable
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING or not __package__:
    import control
    import control_log
    import control_print
    import control_profiles
    import control_tasks
    import control_words as words
    import directories
    import presence
    import whose
else:
    from . import control, control_log, control_print, control_profiles, control_tasks, directories, presence, whose
    from . import control_words as words

Answer: TypeAlias = Generator[tuple["str | Iterable[str]", dict[str, Any]], None, "int | None"]
"""Each time a text, or its lines, and the data for whoever reads JSON."""
FAILED, NOT_RUNNING, TIMED_OUT, INTERRUPTED = 1, 3, 4, 130


# The coordinator


def start(options: argparse.Namespace, done: str = "Started") -> Answer:
    """Start it in the background, and return when it serves."""
    warnings: list[str] = []
    control_profiles.uuid(options.directory)  # What is wrong with AiiDA's configuration, only we can tell.
    pid = control.start(options.profile, options.directory, warnings.append, options.idle)
    yield f"{done} the coordinator, pid {pid}.", {"pid": pid, "warnings": warnings}
    for warning in warnings:
        control_print.complain(options.prog, RuntimeError(f"it serves, but {warning}"), 0)
    return 0


def stop(options: argparse.Namespace) -> Answer:
    """Stop it, and return when it is gone."""
    control.expect(options.directory)
    pid = control.stop(options.directory)
    text = "The coordinator is not running." if pid is None else f"Stopped the coordinator, pid {pid or '?'}."
    yield text, {"pid": pid or None}
    return 0


def restart(options: argparse.Namespace) -> Answer:
    """Stop it if it runs, and start one that ends when that one would have ended."""
    layout = directories.locate(options.directory)
    if layout is not None:
        # Before it is stopped, as it could not be started again.
        directories.check(layout, options.profile, control_profiles.uuid(options.directory))
        idle = (presence.coordinator(layout) or {}).get("idle")
        options.idle = idle if isinstance(idle, int | float) else None
    control.stop(options.directory)
    return (yield from start(options, "Restarted"))


def status(options: argparse.Namespace) -> Answer:
    """Say how things are; exit status 0 if it runs, 3 if not."""
    control.expect(options.directory)
    while True:
        said = control.status(options.directory)
        if not options.watch:
            yield words.status(said), said
            if said["format"] not in (None, whose.FORMAT):
                return FAILED
            return 0 if said["running"] else NOT_RUNNING
        if sys.stdout is not None and sys.stdout.isatty():
            lines = list(words.bars(said, colour="NO_COLOR" not in os.environ))
            _, height = _screen()
            # Each line is written over the last one, and what is below it removed, so that nothing flickers.
            shown = "".join(f"{line}\033[K\n" for line in lines[: height - 1])
            # Where a line is too long, its end is not shown: it would take another one's place.
            yield f"\033[H\033[?7l{shown}\033[?7h\033[J", said
        else:
            yield words.one_line(said), said
        # A person watches, once a second.
        select.select([], [], [], 1.0)


def _screen() -> tuple[int, int]:
    """Return the terminal's columns and lines; one that says 0, as a new one does, is taken for the usual one."""
    size = shutil.get_terminal_size()
    return size.columns or 80, size.lines or 24  # Before 3.11, Python hands a 0 on.


def pause(options: argparse.Namespace) -> Answer:
    """Start nothing new, in any queue, until 'resume'."""
    was = not control.pause(options.directory)
    yield "It was paused already." if was else "Paused: nothing new is started, until 'resume'.", {"was_paused": was}
    return 0


def resume(options: argparse.Namespace) -> Answer:
    """Go on after 'pause' or 'drain'."""
    was = control.resume(options.directory)
    yield "Resumed." if was else "It was not paused.", {"was_paused": was}
    return 0


def drain(options: argparse.Namespace) -> Answer:
    """Pause, and wait until nothing is in hand; exit status 4 if something still is."""
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


def logs(options: argparse.Namespace) -> Answer:
    """Print the newest lines of the coordinator's log."""
    if options.follow:
        for line in control_log.follow(options.directory, options.number):
            yield [line], {"lines": [line]}
    lines = control_log.last(options.directory, options.number)
    if lines:
        yield lines, {"lines": lines}
    return 0


# Tasks


def tasks(options: argparse.Namespace) -> Answer:
    """List the tasks, oldest first."""
    problems: list[Exception] = []
    only = {"errors": options.errors, "limit": options.limit, "processes": options.aiida, "warn": problems.append}
    rows = control_tasks.tasks(options.directory, options.state, options.queue, **only)
    yield words.tasks(rows), {"tasks": rows}
    for problem in problems:
        control_print.complain(options.prog, problem, FAILED)
    return FAILED if problems else 0


def show(options: argparse.Namespace) -> Answer:
    """Say all that is known of a task."""
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


def requeue(options: argparse.Namespace) -> Answer:
    """Move failed or completed tasks back to waiting."""
    return (yield from _each(options, control_tasks.requeue(options.directory, options.task_ids), "Requeued"))


def remove(options: argparse.Namespace) -> Answer:
    """Remove tasks, whatever their state, unless a live worker holds them."""
    return (yield from _each(options, control_tasks.remove(options.directory, options.task_ids), "Removed"))


def purge(options: argparse.Namespace) -> Answer:
    """Remove all tasks of a state."""
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


def send(options: argparse.Namespace) -> Answer:
    """Send a task."""
    to = (options.profile, options.directory, options.body, options.queue)
    result = _trial().send(*to, wait=options.wait, timeout=options.timeout)
    yield words.pretty(result) if options.wait else "Sent.", {"result": result}
    return 0


def call(options: argparse.Namespace) -> Answer:
    """Call an RPC subscriber, and print its answer."""
    result = _trial().call(options.profile, options.directory, options.identifier, options.body, options.timeout)
    yield words.pretty(result), {"result": result}
    return 0


def broadcast(options: argparse.Namespace) -> Answer:
    """Send a broadcast."""
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


def list_(options: argparse.Namespace) -> Answer:
    """List the profiles of this user that have used the broker."""
    problems: list[Exception] = []
    rows = _installing().installations(problems.append)
    yield words.installations(rows), {"profiles": rows}
    for problem in problems:
        control_print.complain(options.prog, problem, FAILED)
    return FAILED if problems else 0


def delete(options: argparse.Namespace) -> Answer:
    """Delete the queue of the profile, with all its tasks, and its pipes."""
    control.expect(options.directory)
    if directories.locate(options.directory) is None:
        yield f"There is nothing to delete: no broker has run in {options.directory} yet.", {"deleted": None}
        return 0
    counts = control.status(control.own(options.directory).config_path)["tasks"]
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


def doctor(options: argparse.Namespace) -> Answer:
    """Look for what goes wrong in practice; exit status 1 if something does."""
    if TYPE_CHECKING or not __package__:
        import control_doctor
    else:
        from . import control_doctor
    found = control_doctor.examine(options.directory)
    rows = [{"what": each.what, "remedy": each.remedy, "problem": each.problem} for each in found]
    yield words.findings(rows), {"findings": rows}
    return FAILED if any(each.problem for each in found) else 0


def configure(options: argparse.Namespace) -> Answer:
    """Point the AiiDA profile of this name at this broker."""
    settings = {"autostart": options.autostart, **({} if options.idle is None else {"idle": options.idle})}
    running = control.configure(options.profile, options.directory, **settings)
    daemon = f"verdi -p {shlex.quote(options.profile)} daemon"
    yield (
        f"Profile {options.profile} uses the named pipe broker now. "
        + {
            True: f"Its daemon runs with what it used before: '{daemon} restart'.",
            False: f"Its daemon does not run: '{daemon} start' starts it.",
            None: f"If its daemon runs, restart it: '{daemon} restart'.",
        }[running],
        {"profile": options.profile, "daemon_running": running},
    )
    return 0
