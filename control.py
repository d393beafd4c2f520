"""What an operator does with the coordinator of a profile, and asks of it: start, stop, pause, drain, status.

Strategy: what is asked is read from the disk, so it has an answer whether or not a coordinator runs; and the
coordinator's lock says whether one does. The functions return data and print nothing; ``control_line.py`` prints it.

Rules:
- No question is put to a running coordinator, so that one that hangs can be looked into as well.
- A question makes no directory and removes nothing.
- Importing this module imports neither kiwipy nor AiiDA, nor the coordinator: asking for the status is to be quick.
"""

from __future__ import annotations

import collections
import contextlib
import fcntl
import os
import select
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING or not __package__:
    import burial
    import control_profiles
    import directories
    import fifo
    import files
    import presence
    import taskqueue
else:
    from . import burial, control_profiles, directories, fifo, files, presence, taskqueue

STATES = tuple(taskqueue.PLACES)
_NAMED = "queues/"
"""What the commands call a queue that its user has called 'default', which is not the default one."""
# Longer than the ten seconds after which one whose intake was removed hears us again, the second for which it then
# sends what waits, and what else these may take on a busy machine.
_PATIENCE_SECONDS = 20.0


class TimedOut(presence.CoordinatorError):
    """What was waited for has not come about in time."""


def start(
    profile_name: str,
    config_path: str | os.PathLike[str],
    warn: Callable[[str], object] = lambda warning: None,
    idle: float | None = None,
) -> int:
    """Start a coordinator in the background, and wait until it serves.

    :param warn: told what it cannot do though it serves.
    :param idle: for how many seconds it serves on where no communicator is; `None`: as long as it may.
    :return: its pid.
    :raises presence.CoordinatorError: it did not start; the message says why.
    """
    # Run as a script even from inside a package: it needs nothing of the package, which may be large.
    script = Path(__file__).absolute().with_name("coordinator.py")
    command = [sys.executable, str(script), f"--profile={profile_name}"]
    command += [f"--config-path={os.path.abspath(config_path)}"]
    command += [f"--idle={idle}"] if idle is not None else []
    said = _launch(command)
    if not said.startswith("ready "):
        raise presence.CoordinatorError(
            said.strip() or "the coordinator ended before it served: coordinator.log beside the queue may say why"
        )
    _, pid, *warnings = said.strip().split(" ", 2)
    for warning in warnings:
        warn(warning)
    return int(pid)


def _launch(command: list[str]) -> str:
    """Run a coordinator of its own session; return what it says when it serves, or cannot."""
    import subprocess  # Not at the top, as all other commands do without it.

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
            )
        said = answer.readline()
    process.wait()
    return said


def _pipe() -> tuple[int, int]:
    """Make a pipe whose descriptors are none of the three standard ones, which may be closed here."""
    ends = os.pipe()
    try:
        read_end, write_end = (fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 3) for end in ends)
    finally:
        for end in ends:
            os.close(end)
    return read_end, write_end


def stop(config_path: str | os.PathLike[str], only: int | None = None) -> int | None:
    """Stop the coordinator of a configuration, and wait until it is gone.

    :param only: the pid of the one that is meant; `None`: whichever runs.
    :return: its pid; `None` if none was running.
    :raises presence.CoordinatorError: it is another user's, or has not ended within 20 seconds.
    """
    layout = directories.locate(config_path)
    pid = presence.coordinator_pid(layout) if layout is not None else None
    if layout is None or pid is None or only not in (None, pid):
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


def pause(config_path: str | os.PathLike[str]) -> bool:
    """Start nothing new in any queue, until `resume`; say whether it was not so already.

    :raises presence.CoordinatorError: no broker has run there.
    """
    mark = own(config_path).paused
    if os.path.lexists(mark):
        return False
    if not mark.parent.is_dir():
        raise presence.CoordinatorError(f"{mark.parent} is not there any more: 'start' makes it anew")
    files.write_whole(mark, b"", durable=True)
    files.sync_directory(mark.parent)
    return True


def resume(config_path: str | os.PathLike[str]) -> bool:
    """Go on after `pause`; say whether it was paused.

    :raises presence.CoordinatorError: no broker has run there.
    :raises OSError: the mark cannot be removed.
    """
    layout = own(config_path)
    if not os.path.lexists(layout.paused):
        return False
    try:
        os.unlink(layout.paused)
    except FileNotFoundError:
        return False  # Somebody else was faster.
    # Whoever misses this sees it at its next look.
    fifo.knock(layout.pipes / directories.TASKS_INTAKE, {"type": "look"})
    return True


def drain(config_path: str | os.PathLike[str], timeout: float | None = None) -> list[dict[str, Any]]:
    """Pause, stay paused, and wait until nothing is in the hands of a live worker.

    :param timeout: for how many seconds at most; `None`: as long as it takes.
    :return: the workers that still hold tasks: ``worker_id``, ``pid`` (`None`: not known) and ``in_hand``.
    :raises presence.CoordinatorError: no broker has run there, or somebody has resumed meanwhile.
    :raises OSError: what is in hand cannot be seen.
    """
    layout = own(config_path)
    pause(config_path)
    deadline = None if timeout is None else time.monotonic() + timeout
    while os.path.lexists(layout.paused):
        in_hand = collections.Counter(
            worker_id for queue in queues(layout).values() for worker_id, _ in queue.claimed(_refuse)
        )
        busy = [_busy(layout, *each) for each in in_hand.items() if _may_live(layout, each[0])]
        left = 1.0 if deadline is None else min(1.0, deadline - time.monotonic())
        if not busy or left <= 0:
            return busy
        # No event tells of another's claims, and a person watches.
        select.select([], [], [], left)
    raise presence.CoordinatorError("somebody has resumed meanwhile: new tasks are started")


def _refuse(error: OSError) -> None:
    raise error


def status(config_path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read from the disk how things are; the answer is what ``status --json`` prints, and ``OPERATING.md`` explains."""
    layout = directories.locate(config_path)
    said = (presence.coordinator(layout) if layout else None) or {}
    in_hand: collections.Counter[str] = collections.Counter()
    rows, unreadable = [], list[str]()
    if layout is not None:
        try:
            directories.check(layout, *control_profiles.identity(layout.config_path))
        except (OSError, ValueError) as error:
            unreadable.append(files.told(error))
        for key, queue in queues(layout).items():
            try:
                rows.append({"name": queue_name(layout, key), **_queue_row(queue, in_hand, unreadable)})
            except OSError as error:  # One that cannot be read hides no other.
                unreadable.append(files.told(error))
    workers = _live_workers(layout, in_hand, said.get("dropped")) if layout else []
    for row in rows:
        row["subscribers"] = sum(1 for worker in workers if row["name"] in worker["queues"])
    return {
        "running": bool(said),
        "pid": said.get("pid"),
        "since": said.get("since"),
        "idle": said.get("idle"),
        "coordinator_version": said.get("version"),
        "version_here": directories.VERSION,
        "format": directories.read_format(config_path).get("format"),
        "paused": layout is not None and os.path.lexists(layout.paused),
        "pipes": str(layout.pipes) if layout else None,
        "directory": str(layout.config_path) if layout else str(config_path),
        "tasks": {state: sum(row[state] for row in rows) for state in STATES},
        "done_in_the_last_minute": sum(row["done_in_the_last_minute"] for row in rows),
        "oldest_waiting_seconds": max((row["oldest_waiting_seconds"] or 0 for row in rows), default=0) or None,
        "queues": rows,
        "workers": workers,
        "unreadable": unreadable,
    }


def configure(profile_name: str, config_path: Path, **settings: Any) -> bool | None:
    """Point an AiiDA profile at this broker, as `aiidabroker.configure` does.

    :return: whether the profile's daemon runs; `None` if that cannot be known.
    :raises presence.CoordinatorError: AiiDA is not installed here.
    :raises RuntimeError: AiiDA cannot find this broker, or the profile.
    """
    running: bool | None = _aiida().configure(profile_name, config_path, **settings)
    return running


def processes(config_path: Path, pks: Iterable[int]) -> dict[int, dict[str, Any]]:
    """Return what AiiDA says of processes, as `aiidabroker.processes` does.

    :raises presence.CoordinatorError: AiiDA is not installed here.
    :raises RuntimeError: AiiDA cannot be asked.
    """
    found: dict[int, dict[str, Any]] = _aiida().processes(config_path, pks)
    return found


def _aiida() -> Any:
    # Only what needs AiiDA asks for this, as it takes long to import, and may not be there.
    try:
        if TYPE_CHECKING or not __package__:
            import aiidabroker
        else:
            from . import aiidabroker
        return aiidabroker
    except ImportError as error:
        raise presence.CoordinatorError(f"AiiDA is not installed here: {error}") from error
    except Exception as error:  # It makes directories when it is imported, for example.
        raise presence.CoordinatorError(f"AiiDA cannot be used here: {error}") from error


# What the answers are made of


def find(config_path: str | os.PathLike[str]) -> directories.Layout:
    """Return where things are.

    :raises presence.CoordinatorError: no broker has run there.
    :raises directories.DirectoryRefused: the queue has a format that this version does not know.
    """
    layout = directories.locate(config_path)
    if layout is None:
        raise presence.CoordinatorError(f"no broker has ever run in {config_path}: is this the profile's directory?")
    directories.check_format(layout)
    return layout


def own(config_path: str | os.PathLike[str]) -> directories.Layout:
    """Return where things are that are about to be changed.

    :raises presence.CoordinatorError: no broker has run there, or it is another user's: its files would become ours.
    :raises directories.DirectoryRefused: the queue has a format that this version does not know.
    """
    layout = find(config_path)
    # Where the queue was set aside, its pipes are still there.
    owned = layout.queue if layout.queue.exists() else layout.registry
    if os.stat(owned).st_uid != os.geteuid():
        raise presence.CoordinatorError(f"{owned} is another user's: do this as that user")
    return layout


def expect(config_path: Path) -> None:
    """Look whether a directory is a profile's, though no broker may have run there yet.

    :raises presence.CoordinatorError: it is none, as far as can be known.
    :raises OSError: it cannot be looked at.
    :raises ValueError: AiiDA's configuration is not one.
    """
    if os.path.lexists(config_path) and not config_path.is_dir():
        raise presence.CoordinatorError(f"{config_path} is no directory: rename what lies there")
    if directories.locate(config_path) is None and not config_path.is_dir() and not control_profiles.of(config_path):
        find(config_path)


def queues(layout: directories.Layout) -> dict[str, taskqueue.TaskQueue]:
    """Return the queues that there are, by key."""
    return {key: taskqueue.TaskQueue(directory) for key, directory in layout.queues() if directory.is_dir()}


def queue_name(layout: directories.Layout, key: str) -> str:
    """Return a queue's name as its user wrote it.

    But after 'queues/' where that would be the default queue's name, or begins so: no two have the same name.
    """
    if not key:
        return "default"
    name = key
    with contextlib.suppress(OSError, files.NotAFile):
        name = files.read(layout.queue_directory(key) / "name").decode(errors="replace") or key
    return f"{_NAMED}{name}" if name == "default" or name.startswith(_NAMED) else name


def meant(name: str) -> str:
    """Return which named queue `queue_name` calls so.

    :raises presence.CoordinatorError: it calls none so.
    """
    named = name.removeprefix(_NAMED)
    if named != name and named != "default" and not named.startswith(_NAMED):
        raise presence.CoordinatorError(f"no queue is called {name}; do you mean {named}?")
    return named


def ring(layout: directories.Layout, key: str, name: str) -> None:
    """Tell the coordinator that a task waits; if it does not hear, it sees it at its next look."""
    fifo.knock(layout.pipes / directories.TASKS_INTAKE, {"type": "task", "queue": key, "name": name})


def age(task_id: str) -> float | None:
    """Return how many seconds ago a task was sent, by its id; `None` if that does not say."""
    sent = task_id[:20]
    return max(0.0, time.time() - int(sent) / 1e9) if len(sent) == 20 and sent.isdecimal() else None


def _queue_row(queue: taskqueue.TaskQueue, in_hand: collections.Counter[str], unreadable: list[str]) -> dict[str, Any]:
    waiting, oldest = 0, "~"
    for name in queue.names():
        waiting += 1
        oldest = min(oldest, name)
    held = collections.Counter(
        worker_id for worker_id, _ in queue.claimed(lambda error: unreadable.append(files.told(error)))
    )
    in_hand.update(held)
    day, minute = _recently_completed(queue)
    return {
        "waiting": waiting,
        "claimed": held.total(),
        "completed": day,
        "failed": sum(1 for _ in queue.names("failed")),
        "done_in_the_last_minute": minute,
        "oldest_waiting_seconds": age(oldest) if waiting else None,
    }


def _recently_completed(queue: taskqueue.TaskQueue) -> tuple[int, int]:
    """Return how many tasks are completed, and how many of them in the last minute, as far as they are kept."""
    now, day, minute = time.time(), 0, 0
    for name in queue.names("completed"):
        with contextlib.suppress(OSError):
            ago = now - os.lstat(queue.file(name, "completed")).st_ctime
            day += ago < taskqueue.COMPLETED_KEPT_SECONDS
            minute += ago < 60.0
    return day, minute


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
            "version": worker.version,
            "queues": {queue_name(layout, key): prefetch for key, prefetch in worker.queues.items()},
            "rpc": routes[f"rpc_{worker.worker_id}"],
            "broadcast": worker.broadcast,
            "in_hand": in_hand[worker.worker_id],
            "broadcasts_dropped": dropped.get(worker.worker_id, 0) if isinstance(dropped, dict) else 0,
        }
        for worker in presence.workers(layout)
        if _is_alive(layout, worker.worker_id)
    ]


def _busy(layout: directories.Layout, worker_id: str, in_hand: int) -> dict[str, Any]:
    # By its lock, as somebody may have removed its entry.
    pid = None
    with contextlib.suppress(OSError, ValueError):
        pid = presence.Worker.read(layout.entry(worker_id)).pid
    return {"worker_id": worker_id, "pid": pid, "in_hand": in_hand}


def _may_live(layout: directories.Layout, worker_id: str) -> bool:
    """Say whether a worker is not known to be dead: a lock that is not there, or cannot be asked, proves nothing."""
    try:
        if os.path.lexists(layout.lock(worker_id)):
            return presence.is_alive(layout, worker_id)
        return not burial.seems_lost(layout, worker_id)
    except OSError:
        return True


def _is_alive(layout: directories.Layout, worker_id: str) -> bool:
    try:
        return presence.is_alive(layout, worker_id)
    except OSError:
        return False  # Somebody has put something else where its lock should be.
