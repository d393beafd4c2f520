"""The command line of an operator: ``python coordinator.py --profile NAME COMMAND``.

Strategy: one parser, whoever asks: this script, ``aiida-coordinator`` or ``verdi coordinator``. Each command is a
function of ``control_commands.py``, which has its name and its description.

Rules:
- Whoever made a mistake gets one sentence on stderr that says what to do, and never a traceback.
- What was to be done is done, whether or not anybody reads what is said of it.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING or not __package__:
    import control
    import control_commands as commands
    import control_print
    import control_profiles
    import control_words as words
    import directories
    import presence
    import whose
else:
    from . import control, control_print, control_profiles, directories, presence, whose
    from . import control_commands as commands
    from . import control_words as words

Serve = Callable[..., None]
"""Serves in the foreground, as `coordinator.serve` does and takes it."""
Where: TypeAlias = tuple[str, Path]
"""A profile's name and directory."""
_WITHOUT_PROFILE = ("list",)
_LONGEST_SECONDS = 1e8  # Three years: what the system can wait has a limit.


def main(arguments: list[str] | None, serve: Serve, prog: str, where: Where | None = None) -> int:
    """Run the command line; return the exit status.

    :param serve: what serves in the foreground.
    :param prog: what its user has called, for usage and errors.
    :param where: which profile is meant, where that is not for these arguments to say.
    """
    control_print.prepare()
    try:
        return _obey(_options(arguments, prog, where), serve)
    except control.TimedOut as error:
        return control_print.complain(prog, error, commands.TIMED_OUT)
    except (RuntimeError, OSError, ValueError) as error:
        return control_print.complain(prog, error, commands.FAILED)
    except KeyboardInterrupt:
        return commands.INTERRUPTED


def _options(arguments: list[str] | None, prog: str, where: Where | None) -> argparse.Namespace:
    parser, parts = parsers(prog, with_profile=where is None)
    profile, config_path = where or (None, None)
    blank = argparse.Namespace(profile=profile, config_path=config_path, json=False, idle=None, prog=prog)
    blank.aiida = where is not None
    # What argparse does where its help or its complaint cannot be printed depends on the Python.
    printed, complaint = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(complaint):
            options, unknown = parser.parse_known_args(arguments, blank)
            if unknown:
                # With the usage of the command, which `parse_args` would not show.
                parts.get(options.command, parser).error(f"unrecognized arguments: {' '.join(unknown)}")
            if options.profile is None and options.command not in _WITHOUT_PROFILE:
                options.profile = control_profiles.current() if options.config_path is None else None
                if options.profile is None:
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
        uuid = control_profiles.uuid(options.directory)
        given = {"profile_uuid": uuid, "idle": options.idle, "ready": options.ready_descriptor}
        serve(options.profile, options.directory, **given)
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

    :raises ValueError: AiiDA does not know the name, or the directory is another profile's.
    :raises OSError: AiiDA's configuration cannot be read.
    """
    name = options.profile
    if options.config_path == "":
        raise ValueError("--config-path is empty; name the profile's directory by it")
    if options.config_path is None:
        config_path = control_profiles.find(name)
    else:
        config_path = Path(options.config_path).expanduser().absolute()
    # Without a command it is for the queue itself to refuse.
    said = directories.read_format(config_path) if options.command is not None else {}
    _check_profile(config_path, name, said)
    return config_path


def _check_profile(config_path: Path, name: str, said: dict[str, Any]) -> None:
    """Refuse a directory that is another profile's: where AiiDA has it, AiiDA knows, and its queue says whose it is.

    :param said: what the queue says of itself.
    :raises ValueError: it is another's.
    """
    found = None
    with contextlib.suppress(ValueError, OSError):  # Whoever needs AiiDA's configuration says what is wrong with it.
        found = control_profiles.of(config_path)
    owner = str(said.get("profile", name))
    if found is not None and found[1] == name:
        if said and not whose.Owner(name, found[0].uuid(name)).is_of(said):
            queue = directories.queue_in(config_path)
            raise ValueError(
                f"{queue} is the queue of the profile '{owner}', in the directory of '{name}': when nothing of that "
                f"one runs here any more, set it aside by '{whose.set_aside(queue)}'"
            )
        return
    owner = found[1] if found is not None else owner
    if owner != name:
        raise ValueError(f"{config_path} belongs to the profile '{owner}', not to '{name}': name that one by --profile")


# What it understands


def _seconds(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 <= (value := float(text)) < float("inf"):
            return min(value, _LONGEST_SECONDS)
    raise argparse.ArgumentTypeError(f"{text!r:.80} is no number of seconds")


def _number(text: str) -> int:
    with contextlib.suppress(ValueError):
        if (value := int(text)) >= 0:
            return value
    raise argparse.ArgumentTypeError(f"{text!r:.80} is no number")


def _body(text: str) -> Any:
    def refuse(constant: str) -> None:
        raise ValueError(f"it has {constant}")

    try:
        return json.loads(text, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise argparse.ArgumentTypeError(f"{text!r:.80} is no JSON ({error}); a string is '\"text\"'") from None


Obey: TypeAlias = Callable[[argparse.Namespace], commands.Answer]
Add: TypeAlias = Callable[[Obey], argparse.ArgumentParser]


def parsers(prog: str, *, with_profile: bool) -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """Return what understands a command line, and each command's own part of it, for whoever has them as its own.

    :param with_profile: it says itself which profile is meant.
    """
    # Before the command or after it; what is not given after it does not undo what was given before.
    common, default = argparse.ArgumentParser(add_help=False), argparse.SUPPRESS
    if with_profile:
        _add_profile(common)
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
    parser.add_argument("--idle", type=_seconds, default=default, help=argparse.SUPPRESS)
    those = parser.add_subparsers(dest="command", metavar="COMMAND")
    found: dict[str, argparse.ArgumentParser] = {}

    def add(obey: Obey) -> argparse.ArgumentParser:
        name, text = obey.__name__.rstrip("_"), obey.__doc__
        found[name] = those.add_parser(name, help=text, description=text, parents=[common])
        found[name].set_defaults(obey=obey)
        return found[name]

    for add_some in (_add_coordinator, _add_tasks, _add_trials, _add_installations):
        add_some(add)
    return parser, found


def _add_profile(common: argparse.ArgumentParser) -> None:
    default = argparse.SUPPRESS
    common.add_argument("--profile", default=default, metavar="NAME", help="its name (default: AiiDA's current one)")
    where = "its directory (default: where AiiDA has it, or would have it)"
    common.add_argument("--config-path", default=default, metavar="DIR", help=where)


def _add_coordinator(add: Add) -> None:
    command = add(commands.start)
    command.add_argument("--foreground", action="store_true", help="stay here, and log to the terminal too")
    idle = "end when no communicator, senders included, has been there for so many seconds"
    command.add_argument("--idle", type=_seconds, default=argparse.SUPPRESS, metavar="S", help=idle)
    add(commands.stop)
    add(commands.restart)
    command = add(commands.status)
    command.add_argument("--watch", action="store_true", help="again each second, until Ctrl-C")
    add(commands.pause)
    add(commands.resume)
    command = add(commands.drain)
    command.add_argument("--timeout", type=_seconds, metavar="S", help="for so many seconds at most")
    command = add(commands.logs)
    command.add_argument("-n", dest="number", type=_number, default=20, metavar="N", help="how many (default: 20)")
    command.add_argument("--follow", action="store_true", help="and those that come, until Ctrl-C")


def _add_tasks(add: Add) -> None:
    command = add(commands.tasks)
    command.add_argument("--state", choices=control.STATES, help="only these")
    command.add_argument("--queue", metavar="NAME", help="only those of a queue, as its user calls it")
    command.add_argument("--errors", action="store_true", help="only those that raised or were given up on")
    command.add_argument("--limit", type=_number, metavar="N", help="the oldest so many")
    processes = "with the pk, label and state of AiiDA's processes"
    command.add_argument("--aiida", action="store_true", default=argparse.SUPPRESS, help=processes)
    command = add(commands.show)
    which = "as 'tasks' prints it, or the beginning or end of it, or the pk of its process"
    command.add_argument("task_id", metavar="ID", help=which)
    command.add_argument("--full", action="store_true", help="the whole body, and not just a screenful")
    for several in (commands.requeue, commands.remove):
        command = add(several)
        command.add_argument("task_ids", nargs="+", metavar="ID", help=which)
    command = add(commands.purge)
    states = [state for state in control.STATES if state != "claimed"]
    command.add_argument("--state", choices=states, required=True, help="which")
    command.add_argument("--queue", metavar="NAME", help="only those of a queue")


def _add_trials(add: Add) -> None:
    command = add(commands.send)
    command.add_argument("body", type=_body, metavar="JSON", help="its body")
    command.add_argument("--queue", metavar="NAME", help="to a queue (default: the default one)")
    command.add_argument("--wait", action="store_true", help="wait for its outcome, and print it")
    command.add_argument("--timeout", type=_seconds, metavar="S", help="for so many seconds at most")
    command = add(commands.call)
    command.add_argument("identifier", metavar="IDENTIFIER", help="whom")
    command.add_argument("body", type=_body, metavar="JSON", help="with what")
    command.add_argument("--timeout", type=_seconds, metavar="S", help="wait for so many seconds at most")
    command = add(commands.broadcast)
    command.add_argument("body", type=_body, metavar="JSON", help="its body")
    command.add_argument("--sender", metavar="TEXT", help="who it says it is from")
    command.add_argument("--subject", metavar="TEXT", help="what it says it is about")


def _add_installations(add: Add) -> None:
    add(commands.list_)
    command = add(commands.delete)
    command.add_argument("--yes", action="store_true", help="without a question")
    add(commands.doctor)
    command = add(commands.configure)
    no = "start no coordinator when one is needed"
    command.add_argument("--no-autostart", dest="autostart", action="store_false", help=no)
    idle = "let one that is started so end when nobody has been there for so many seconds (0: never; default: 300)"
    command.add_argument("--idle", type=_seconds, default=argparse.SUPPRESS, metavar="S", help=idle)
