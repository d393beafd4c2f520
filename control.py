"""What an operator asks of a coordinator: start, stop, status, tasks … as functions, and their command line.

Strategy: what is asked is read from the disk, so it has an answer whether or not a coordinator runs; and the
coordinator's lock says whether one does. The functions return data and print nothing; the command line prints it.

Rules:
- No question is put to a running coordinator, so that one that hangs can be looked into as well.
- A question makes no directory and removes nothing.
- Importing this module imports neither kiwipy nor AiiDA, nor the coordinator: asking for the status is to be quick.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import fcntl
import io
import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING or not __package__:
    import directories
    import fifo
    import files
    import presence
    import taskqueue
else:
    from . import directories, fifo, files, presence, taskqueue

_STATES = tuple(taskqueue.PLACES)
_PATIENCE_SECONDS = 12.0  # Longer than the ten seconds after which one whose intake was removed hears us again.

Serve = Callable[[str, Path, int | None], None]
"""Serves in the foreground, as `coordinator.serve` does."""


def start(profile_name: str, config_path: str | os.PathLike[str]) -> int:
    """Start a coordinator in the background, and wait until it serves.

    :return: its pid.
    :raises presence.CoordinatorError: it did not start; the message says why.
    """
    # Run as a script even from inside a package: it needs nothing of the package, which may be large.
    script = Path(__file__).absolute().with_name("coordinator.py")
    command = [sys.executable, str(script), f"--profile={profile_name}"]
    command += [f"--config-path={os.path.abspath(config_path)}"]
    with contextlib.ExitStack() as stack:
        read_end, write_end = _pipe()
        answer = stack.enter_context(open(read_end, errors="surrogateescape"))
        with open(write_end, "wb", buffering=0):
            process = subprocess.Popen(
                [*command, f"--ready-descriptor={write_end}"],
                pass_fds=(write_end,),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
                cwd="/",
                # It has to find its modules beside it.
                env={name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"},
            )
        said = answer.readline()
    process.wait()
    if not said.startswith("ready "):
        raise presence.CoordinatorError(
            said.strip() or "the coordinator ended before it served: coordinator.log beside the queue may say why"
        )
    return int(said.split()[1])


def _pipe() -> tuple[int, int]:
    """Make a pipe whose descriptors are none of the three standard ones, which may be closed here."""
    ends = os.pipe()
    try:
        read_end, write_end = (fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 3) for end in ends)
    finally:
        for end in ends:
            os.close(end)
    return read_end, write_end


def stop(config_path: str | os.PathLike[str]) -> int | None:
    """Stop the coordinator of a configuration, and wait until it is gone.

    :return: its pid; `None` if none was running.
    :raises presence.CoordinatorError: it is another user's, or has not ended within 12 seconds.
    """
    layout = directories.locate(config_path)
    pid = presence.coordinator_pid(layout) if layout is not None else None
    if layout is None or pid is None:
        return None
    if os.lstat(layout.queue / "coordinator.lock").st_uid != os.geteuid():
        raise presence.CoordinatorError(f"the coordinator (pid {pid or '?'}) is another user's: stop it as that user")
    intake = layout.pipes / directories.TASKS_INTAKE
    begin, told = time.monotonic(), 0
    while presence.coordinator_pid(layout) == pid:
        # Not a signal to a pid, which may be a stranger's by now: whoever reads this pipe is the coordinator. Once a
        # second, since one that is just starting does not read yet, and the one before it may.
        if time.monotonic() - begin >= told:
            told += fifo.knock(intake, {"type": "stop", "pid": pid})
        if time.monotonic() - begin > _PATIENCE_SECONDS:
            said = f"the coordinator (pid {pid or '?'}) has not ended within {_PATIENCE_SECONDS:.0f} s."
            if pid:
                said += (
                    f" If it was stopped, let it go on by 'kill -CONT {pid}'; otherwise end it by 'kill -KILL {pid}', "
                    "which loses no task."
                )
            raise presence.CoordinatorError(said)
        # It ends when it has sent what it has to send; no descriptor tells of the end of another's child.
        select.select([], [], [], 0.02)
    return pid


def status(config_path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read from the disk how things are; the answer is what ``status --json`` prints."""
    layout = directories.locate(config_path)
    said = presence.coordinator(layout) if layout else None
    in_hand: collections.Counter[str] = collections.Counter()
    counts = dict.fromkeys(_STATES, 0)
    for queue in _existing_queues(layout).values():
        counts["waiting"] += sum(1 for _ in queue.names())
        counts["failed"] += sum(1 for _ in queue.names("failed"))
        counts["completed"] += _recently_completed(queue)
        in_hand.update(claim for claim, _ in queue.claimed())
    counts["claimed"] = in_hand.total()
    return {
        "running": said is not None,
        "pid": said.get("pid") if said else None,
        "since": said.get("since") if said else None,
        "pipes": str(layout.pipes) if layout else None,
        "tasks": counts,
        "workers": _live_workers(layout, in_hand, (said or {}).get("dropped")) if layout else [],
    }


def tasks(config_path: str | os.PathLike[str], state: str | None = None) -> list[dict[str, Any]]:
    """List the tasks, oldest first; the answer is what ``tasks --json`` prints.

    A task that moves on meanwhile is listed once, in the state where it was met last.

    :param state: 'waiting', 'claimed', 'completed' or 'failed' (default: all).
    """
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    layout = directories.locate(config_path)
    for key, queue in _existing_queues(layout).items():
        name = _queue_name(layout, key) if layout is not None else ""
        for place in _STATES:
            if state in (None, place):
                rows.update(((key, row["id"]), row) for row in _rows(name, queue, place))
    return sorted(rows.values(), key=lambda row: str(row["id"]))


def requeue(config_path: str | os.PathLike[str], task_id: str) -> bool:
    """Move a failed or completed task back to waiting; say whether there was one."""
    layout = directories.locate(config_path)
    for key, queue in _existing_queues(layout).items():
        name = queue.requeue(task_id)
        if name is not None and layout is not None:
            fifo.knock(layout.pipes / directories.TASKS_INTAKE, {"type": "task", "queue": key, "name": name})
            return True
    return False


def configure(profile_name: str, *, autostart: bool = True) -> None:
    """Point an AiiDA profile at this broker.

    :param autostart: whether a coordinator is started when it is needed and not running.
    :raises presence.CoordinatorError: AiiDA is not installed here.
    :raises RuntimeError: AiiDA cannot find this broker.
    """
    # The one command that needs AiiDA; nothing else here may, as that takes long to import.
    try:
        if TYPE_CHECKING or not __package__:
            import aiidabroker
        else:
            from . import aiidabroker
        aiidabroker.configure(profile_name, autostart=autostart)
    except ImportError as error:
        raise presence.CoordinatorError(f"AiiDA is not installed here: {error}") from error


# What the answers are made of


def _existing_queues(layout: directories.Layout | None) -> dict[str, taskqueue.TaskQueue]:
    found = layout.queues() if layout is not None else ()
    return {key: taskqueue.TaskQueue(directory) for key, directory in found if directory.is_dir()}


def _queue_name(layout: directories.Layout, key: str) -> str:
    """Return a queue's name as its user wrote it."""
    with contextlib.suppress(OSError, files.NotAFile):
        if key:
            return files.read(layout.queue_directory(key) / "name").decode(errors="replace") or key
    return key or "default"


def _recently_completed(queue: taskqueue.TaskQueue) -> int:
    kept = taskqueue.COMPLETED_KEPT_SECONDS
    limit = f"{time.time_ns() - int(kept * 1e9):020d}"
    return sum(
        1
        for name in queue.names("completed")
        if name >= limit or not files.is_older(queue.file(name, "completed"), kept)
    )


def _live_workers(
    layout: directories.Layout, in_hand: collections.Counter[str], dropped: object
) -> list[dict[str, Any]]:
    routes = collections.Counter(
        presence.route_target(layout.pipes / name) for name in files.listed(layout.pipes) if name.startswith("route_")
    )
    return [
        {
            "worker_id": worker.worker_id,
            "pid": worker.pid,
            "since": worker.since,
            "queues": {_queue_name(layout, key): prefetch for key, prefetch in worker.queues.items()},
            "rpc": routes[f"rpc_{worker.worker_id}"],
            "broadcast": worker.broadcast,
            "in_hand": in_hand[worker.worker_id],
            "broadcasts_dropped": dropped.get(worker.worker_id, 0) if isinstance(dropped, dict) else 0,
        }
        for worker in presence.workers(layout)
        if _is_alive(layout, worker.worker_id)
    ]


def _is_alive(layout: directories.Layout, worker_id: str) -> bool:
    try:
        return presence.is_alive(layout, worker_id)
    except OSError:
        return False  # Somebody has put something else where its lock should be.


def _rows(queue_name: str, queue: taskqueue.TaskQueue, state: str) -> Iterator[dict[str, Any]]:
    found: Iterator[tuple[str | None, str]]
    if state == "claimed":
        found = iter(queue.claimed())
    else:
        found = ((None, name) for name in queue.names(taskqueue.PLACES[state]))
    for worker_id, name in found:
        task_id, deaths = taskqueue.split(name)
        yield {
            "id": task_id,
            "state": state,
            "queue": queue_name,
            "deaths": deaths,
            "worker": worker_id,
            "reason": queue.reason(name, "failed") if state == "failed" else None,
        }


# The command line


def main(arguments: list[str] | None, serve: Serve) -> int:
    """Run the command line; return the exit status.

    :param serve: what serves in the foreground.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            with contextlib.suppress(OSError):
                stream.reconfigure(errors="backslashreplace")  # A name may have what the terminal has not.
    try:
        status, answer = _obey(_options(arguments), serve)
        _print(answer)
        return status
    except (RuntimeError, OSError, ValueError) as error:
        if sys.stderr is not None:  # As it is where somebody has closed it.
            print(f"coordinator.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _options(arguments: list[str] | None) -> argparse.Namespace:
    try:
        return _parser().parse_args(arguments)
    except SystemExit:
        _print("")  # It may have printed its help.
        raise


def _print(answer: str) -> None:
    """Print an answer, and write out what is printed.

    :raises presence.CoordinatorError: that cannot be done, unless whoever read it has seen enough.
    """
    if sys.stdout is None:
        return
    try:
        print(answer, end="\n" if answer else "", flush=True)
    except OSError as error:
        # Nor may Python complain of it when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            raise presence.CoordinatorError(f"what it has to say cannot be printed: {error.strerror}") from error


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
    known = directories.read_profile(config_path)
    if known not in (None, name) and options.command is not None:
        raise ValueError(f"{config_path} belongs to the profile '{known}', not to '{name}'")
    return config_path


def _obey(options: argparse.Namespace, serve: Serve) -> tuple[int, str]:
    """Carry out a command; return the exit status, and what is to be printed."""
    config_path = _config_path(options)
    if options.command is None or (options.command == "start" and options.foreground):
        serve(options.profile, config_path, options.ready_descriptor)
        return 0, ""
    if options.command == "start":
        return 0, f"Started the coordinator, pid {start(options.profile, config_path)}."
    if options.command == "stop":
        pid = stop(config_path)
        return 0, "The coordinator is not running." if pid is None else f"Stopped the coordinator, pid {pid}."
    if options.command == "restart":
        stop(config_path)
        return 0, f"Restarted the coordinator, pid {start(options.profile, config_path)}."
    if options.command == "status":
        said = status(config_path)
        text = json.dumps(said, indent=1) if options.json else _status_text(said, config_path)
        return 0 if said["running"] else 3, text
    if options.command == "tasks":
        rows = tasks(config_path, options.state)
        return 0, json.dumps(rows, indent=1) if options.json else "\n".join(map(_row_text, rows))
    if options.command == "requeue":
        wanted = dict.fromkeys(options.task_ids)
        unknown = [task_id for task_id in wanted if not requeue(config_path, task_id)]
        if unknown:
            raise presence.CoordinatorError(f"no failed or completed task is called {', '.join(unknown)}")
        return 0, ""
    configure(options.profile, autostart=options.autostart)
    return 0, f"Profile {options.profile} uses the named pipe broker now. Restart its daemon if it runs."


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="coordinator.py",
        description="Shares out tasks and fans out broadcasts between the processes of one profile. "
        "Without a command it runs in the foreground.",
    )
    parser.add_argument("--profile", required=True, metavar="NAME", help="the profile's name")
    parser.add_argument(
        "--config-path", metavar="DIR", help="the profile's directory (default: ~/.aiida/profiles/NAME)"
    )
    parser.add_argument("--ready-descriptor", type=int, help=argparse.SUPPRESS)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    command = commands.add_parser("start", help="start it in the background, and return when it serves")
    command.add_argument(
        "--foreground", action="store_true", help="stay in the foreground, and log to the terminal too"
    )
    commands.add_parser("stop", help="stop it, and return when it is gone")
    commands.add_parser("restart", help="stop it if it runs, and start it")
    command = commands.add_parser("status", help="say how things are; exit status 0 if it runs, 3 if not")
    command.add_argument("--json", action="store_true", help="print JSON")
    command = commands.add_parser("tasks", help="list the tasks on disk, oldest first")
    command.add_argument("--state", choices=_STATES, help="only these")
    command.add_argument("--json", action="store_true", help="print JSON")
    command = commands.add_parser("configure", help="point the AiiDA profile of this name at this broker")
    command.add_argument(
        "--no-autostart", dest="autostart", action="store_false", help="start no coordinator when one is needed"
    )
    command = commands.add_parser("requeue", help="move failed or completed tasks back to waiting")
    command.add_argument("task_ids", nargs="+", metavar="TASK_ID", help="as the command 'tasks' prints it")
    return parser


def _status_text(answer: dict[str, Any], config_path: Path) -> str:
    state = (
        f"running, pid {answer['pid']}, since {_local_time(answer['since'])}" if answer["running"] else "not running"
    )
    if answer["pipes"] is None:
        return f"Coordinator: not running; no broker has run in {config_path} (is this the profile's directory?)"
    counts = answer["tasks"]
    lines = [
        f"Coordinator: {state}",
        f"Pipes:       {answer['pipes']}",
        f"Tasks:       {counts['waiting']} waiting, {counts['claimed']} claimed, "
        f"{counts['completed']} completed in the last 24 h, {counts['failed']} failed",
        f"Workers:     {len(answer['workers'])}",
    ]
    for worker in answer["workers"]:
        queues = ", ".join(f"{name} (prefetch {count or 'unlimited'})" for name, count in worker["queues"].items())
        lines.append(
            f"  {worker['worker_id']}: pid {worker['pid']}, since {_local_time(worker['since'])}, "
            f"tasks: {queues or 'none'}, RPC identifiers: {worker['rpc']}, "
            f"broadcasts: {'yes' if worker['broadcast'] else 'no'} ({worker['broadcasts_dropped']} dropped), "
            f"in hand: {worker['in_hand']}"
        )
    return "\n".join(lines)


def _row_text(row: dict[str, Any]) -> str:
    details = [f"queue {row['queue']}", f"deaths {row['deaths']}"]
    details += [f"worker {row['worker']}"] if row["worker"] else []
    details += [row["reason"]] if row["reason"] else []
    return f"{row['id']}  {row['state']:9}  {', '.join(details)}"


def _local_time(seconds: float | None) -> str:
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds)) if seconds else "?"
    except (TypeError, ValueError, OverflowError, OSError):
        return "?"  # Somebody has written it by hand.
