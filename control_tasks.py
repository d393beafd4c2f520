"""What an operator asks of tasks, and does to them: list, show, requeue, remove, purge.

Strategy: a task is a file whose directory is its state, so to list is to list directories, and to change something is
one rename, which a worker that claims the task at the same moment either wins or loses.

Rules:
- No body is read but of the task that is shown or removed.
- What a live worker holds is that worker's: it is not touched. What a dead one holds is given back first.
- Whoever sent a task that is removed before it is done is told so.
"""

from __future__ import annotations

import contextlib
import heapq
import os
import stat
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING or not __package__:
    import burial
    import control
    import directories
    import files
    import frames
    import presence
    import taskqueue
else:
    from . import burial, control, directories, files, frames, presence, taskqueue


@dataclass(frozen=True)
class Found:
    """A task on the disk."""

    name: str
    state: str
    key: str
    """Of its queue."""
    queue: taskqueue.TaskQueue
    worker: str | None

    @property
    def task_id(self) -> str:
        """The part of its name that never changes."""
        return taskqueue.split(self.name)[0]

    @property
    def place(self) -> str:
        """The directory it lies in, as `taskqueue.TaskQueue` has it."""
        return f"claimed/{self.worker}" if self.worker else taskqueue.PLACES[self.state]

    @property
    def path(self) -> str:
        """Its file."""
        return self.queue.file(self.name, self.place)


class NoSuchTask(presence.CoordinatorError):
    """There is no task of that id, or nothing can be done to it; the message says which, and what to do."""


def _all(layout: directories.Layout, states: tuple[str, ...], queue: str | None = None) -> Iterator[Found]:
    """Yield the tasks in some states; one that moves on meanwhile may be met twice."""
    for key, known in control.queues(layout).items():
        if queue in (None, control.queue_name(layout, key)):
            for state in states:
                if state == "claimed":
                    yield from (Found(name, state, key, known, worker_id) for worker_id, name in known.claimed())
                else:
                    yield from (Found(name, state, key, known, None) for name in known.names(taskqueue.PLACES[state]))


def tasks(
    config_path: str | os.PathLike[str],
    state: str | None = None,
    queue: str | None = None,
    *,
    errors: bool = False,
    limit: int | None = None,
) -> list[dict[str, Any]]:
    """List the tasks, oldest first; the answer is what ``tasks --json`` prints.

    A task that moves on meanwhile is listed once, in the state where it was met last.

    :param state: 'waiting', 'claimed', 'completed' or 'failed' (default: all).
    :param queue: the name of a queue, as its user wrote it (default: all; 'default' is the default one).
    :param errors: only those whose subscriber raised, or that were given up on.
    :param limit: the oldest so many.
    :raises presence.CoordinatorError: no broker has run there.
    """
    layout = control.find(config_path)
    # What waits is listed once more at the end, for what was given back when its place had been looked at.
    states = (state,) if state else (*control.STATES, "waiting")
    found = {(each.key, each.task_id): each for each in _all(layout, states, queue)}
    chosen = [each for each in found.values() if not errors or _has_reason(each)]
    oldest = heapq.nsmallest(len(chosen) if limit is None else limit, chosen, key=lambda each: each.name)
    return [_row(layout, each) for each in oldest]


def _has_reason(found: Found) -> bool:
    return found.state == "failed" or (
        found.state == "completed" and os.path.lexists(f"{found.path.removesuffix('.json')}.reason")
    )


def _row(layout: directories.Layout, found: Found) -> dict[str, Any]:
    task_id, deaths = taskqueue.split(found.name)
    return {
        "id": task_id,
        "age_seconds": control.age(task_id),
        "state": found.state,
        "queue": control.queue_name(layout, found.key),
        "worker": found.worker,
        "deaths": deaths,
        "outcome": _outcome(found),
    }


def _outcome(found: Found) -> str | None:
    """Return in one line how a task ended; `None` if it has not."""
    if found.state not in ("completed", "failed"):
        return None
    reason = found.queue.reason(found.name, found.state).strip()
    return reason.rsplit("\n", 1)[-1] or ("done" if found.state == "completed" else "given up on")


def _find(layout: directories.Layout, task_id: str) -> Found:
    """Find a task by its id or, where that is unique, the beginning or end of it.

    :raises NoSuchTask: there is none, or more than one.
    """
    found: dict[tuple[str, str], Found] = {}
    for each in _all(layout, control.STATES):
        if task_id in (each.name, each.task_id):
            return each
        if task_id and (each.task_id.startswith(task_id) or each.task_id.endswith(task_id)):
            found[each.key, each.task_id] = each
    if len(found) != 1:
        told = f"{len(found)} tasks have ids that begin or end with" if found else "no task is called"
        raise NoSuchTask(f"{told} {task_id}; 'tasks' lists them")
    return found.popitem()[1]


def show(config_path: str | os.PathLike[str], task_id: str) -> dict[str, Any]:
    """Return all that is known of one task; the answer is what ``show --json`` prints.

    :param task_id: its id, or the beginning or end of it.
    :raises NoSuchTask: there is none, or more than one.
    """
    layout = control.find(config_path)
    found = _find(layout, task_id)
    answer = {**_row(layout, found), "file": found.path, "reason": None, "unreadable": None}
    try:
        status = os.lstat(found.path)
        answer["size"], answer["since"] = status.st_size, status.st_ctime
        message = frames.parse(files.read(found.path)) if stat.S_ISREG(status.st_mode) else {}
    except FileNotFoundError:
        raise NoSuchTask(f"task {found.task_id} has moved on meanwhile: ask again") from None
    except (ValueError, OSError) as error:
        message, answer["unreadable"] = {}, str(error)
    reply_to = message.get("reply_to")
    answer |= {key: message.get(key) for key in ("body", "no_reply", "reply_to", "correlation_id")}
    answer["sender_lives"] = directories.is_reply_pipe(reply_to) and _is_read(layout.pipes / str(reply_to))
    answer["worker_pid"] = _pid(layout, found.worker) if found.worker else None
    if found.state in ("completed", "failed"):
        answer["reason"] = found.queue.reason(found.name, found.state) or None
    return answer


def _is_read(pipe: Path) -> bool:
    with contextlib.suppress(OSError):
        return directories.is_read(pipe)
    return False


def _pid(layout: directories.Layout, worker_id: str) -> int | None:
    """Return the pid of a live worker; `None` if it is dead."""
    with contextlib.suppress(OSError, ValueError):
        if presence.is_alive(layout, worker_id):
            return presence.Worker.read(layout.entry(worker_id)).pid
    return None


def _let_go(layout: directories.Layout, found: Found) -> Found:
    """Have a task out of the hands of a dead worker.

    :raises NoSuchTask: it is in the hands of a live one.
    """
    if found.worker is None:
        return found
    burial.bury(layout, [found.worker])
    again = _find(layout, found.task_id)
    if again.worker is not None:
        pid = _pid(layout, again.worker)
        how = f"end that worker first ('kill {pid}')" if pid else "end that worker first"
        raise NoSuchTask(f"task {again.task_id} is in the hands of worker {again.worker}, pid {pid or '?'}: {how}")
    return again


def requeue(config_path: str | os.PathLike[str], task_id: str) -> str:
    """Move a failed or completed task back to waiting.

    :param task_id: its id, or the beginning or end of it.
    :return: its id.
    :raises NoSuchTask: there is none, or it waits already, or a worker has it.
    """
    layout = control.find(config_path)
    found = _let_go(layout, _find(layout, task_id))
    if found.state == "waiting":
        raise NoSuchTask(f"task {found.task_id} waits already")
    name = found.queue.requeue(found.name)
    if name is None:
        raise NoSuchTask(f"task {found.task_id} has moved on meanwhile: ask again")
    control.ring(layout, found.key, name)
    return name


def remove(config_path: str | os.PathLike[str], task_id: str) -> str:
    """Remove a task, whatever its state, unless a live worker holds it; its sender gets an exception.

    :param task_id: its id, or the beginning or end of it.
    :return: its id.
    :raises NoSuchTask: there is none, or a live worker has it.
    """
    layout = control.find(config_path)
    found = _let_go(layout, _find(layout, task_id))
    if not _remove(layout, found):
        raise NoSuchTask(f"task {found.task_id} has moved on meanwhile: ask again")
    return found.task_id


def purge(config_path: str | os.PathLike[str], state: str, queue: str | None = None) -> Iterator[str]:
    """Remove the tasks in a state; yields the id of each.

    :param state: 'waiting', 'completed' or 'failed'.
    :param queue: the name of a queue (default: all).
    """
    layout = control.find(config_path)
    for found in list(_all(layout, (state,), queue)):
        if _remove(layout, found):
            yield found.task_id


def _remove(layout: directories.Layout, found: Found) -> bool:
    """Say whether it was still there."""
    # First it is taken away, so that no worker claims it while its sender is told; and put back if that cannot be done.
    draft = f"{found.queue.directory}/.{found.name}.{uuid.uuid4().hex}"
    try:
        os.rename(found.path, draft)
    except FileNotFoundError:
        return False
    try:
        if found.state == "waiting":
            with contextlib.suppress(OSError):  # Where the pipes are gone, nobody waits.
                burial.tell_sender(layout, draft, f"task {found.task_id} was removed from the queue")
    except BaseException:
        os.rename(draft, found.path)
        raise
    files.remove(draft)
    files.remove(f"{found.path.removesuffix('.json')}.reason")
    return True
