"""What an operator asks of tasks, and does to them: list, show, requeue, remove, purge.

Strategy: a task is a file whose directory is its state, so to list is to list directories, and to change something is
one rename, which a worker that claims the task at the same moment either wins or loses.

Rules:
- No body is read but of the task that is shown or removed, or where AiiDA's processes are asked for.
- What a live worker holds is that worker's: it is not touched. What a dead one holds is given back first.
- Whoever sent a task that is removed before it is done is told so. No moment of that is one in which a kill loses it.
- What cannot be read, or done, hides and hinders nothing else.
"""

from __future__ import annotations

import contextlib
import dataclasses
import heapq
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING or not __package__:
    import burial
    import control
    import directories
    import files
    import presence
    import taskqueue
else:
    from . import burial, control, directories, files, presence, taskqueue


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


Warn: TypeAlias = Callable[[Exception], object]
"""Told of what cannot be read, which hides nothing else."""
Done: TypeAlias = tuple[str, "Exception | None"]
"""A task's id, and what kept it from being done."""
_LONGEST_PK = 12
_EVERYWHERE = (*control.STATES, "waiting")
"""What waits is looked at once more at the end, for what was given back when its place had been looked at."""


def _all(
    layout: directories.Layout, states: tuple[str, ...], queue: str | None = None, warn: Warn = lambda error: None
) -> Iterator[Found]:
    """Yield the tasks in some states; one that moves on meanwhile may be met twice."""
    for key, known in control.queues(layout).items():
        if queue in (None, control.queue_name(layout, key)):
            for state in states:
                try:
                    if state == "claimed":
                        yield from (Found(name, state, key, known, worker) for worker, name in known.claimed(warn))
                    else:
                        yield from (
                            Found(name, state, key, known, None) for name in known.names(taskqueue.PLACES[state])
                        )
                except OSError as error:
                    warn(error)


def tasks(
    config_path: str | os.PathLike[str],
    state: str | None = None,
    queue: str | None = None,
    *,
    errors: bool = False,
    limit: int | None = None,
    processes: bool = False,
    warn: Warn = lambda error: None,
) -> list[dict[str, Any]]:
    """List the tasks, oldest first; the answer is what ``tasks --json`` prints.

    A task that moves on meanwhile is listed once, in the state where it was met last.

    :param state: 'waiting', 'claimed', 'completed' or 'failed' (default: all).
    :param queue: the name of a queue, as its user wrote it (default: all; 'default' is the default one).
    :param errors: only those whose subscriber raised, or that were given up on.
    :param limit: the oldest so many.
    :param processes: look up the process that each is for, in AiiDA.
    :param warn: told of what cannot be read, which hides nothing else.
    :raises presence.CoordinatorError: no broker has run there, or there is no such queue.
    """
    layout = control.find(config_path)
    _expect_queue(layout, queue)
    found = {(each.key, each.task_id): each for each in _all(layout, (state,) if state else _EVERYWHERE, queue, warn)}
    chosen = [each for each in found.values() if not errors or _has_reason(each)]
    oldest = heapq.nsmallest(len(chosen) if limit is None else limit, chosen, key=lambda each: each.name)
    names = {key: control.queue_name(layout, key) for key in {each.key for each in oldest}}
    rows = [_row(each, names[each.key]) for each in oldest]
    if processes:
        pks = [_pk(each) for each in oldest]
        known: dict[int, dict[str, Any]] = {}
        try:
            known = control.processes(Path(config_path), filter(None, pks))
        except RuntimeError as error:
            warn(error)
        for row, pk in zip(rows, pks, strict=True):
            row["process"] = None if pk is None else known.get(pk, {"pk": pk, "label": None, "state": None})
    return rows


def _pk(found: Found) -> int | None:
    """Return which process a task is for, as far as it can be read."""
    with contextlib.suppress(OSError, taskqueue.Unreadable):
        return _process(taskqueue.Task.read(found.path, found.name).message.get("body"))
    return None


def _process(body: object) -> int | None:
    """Return which of AiiDA's processes a body starts or continues (`plumpy.process_comms`); `None`: none."""
    arguments = body.get("args") if isinstance(body, dict) else None
    number = arguments.get("pid") if isinstance(arguments, dict) else None
    return number if isinstance(number, int) and not isinstance(number, bool) else None


def _expect_queue(layout: directories.Layout, queue: str | None) -> None:
    known = [control.queue_name(layout, key) for key in control.queues(layout)]
    if queue is not None and queue not in known:
        raise presence.CoordinatorError(f"there is no queue {queue}; there are {', '.join(sorted(known))}")


def _has_reason(found: Found) -> bool:
    return found.state == "failed" or (
        found.state == "completed" and os.path.lexists(f"{found.path.removesuffix('.json')}.reason")
    )


def _row(found: Found, queue: str) -> dict[str, Any]:
    task_id, deaths = taskqueue.split(found.name)
    return {
        "id": task_id,
        "age_seconds": control.age(task_id),
        "state": found.state,
        "queue": queue,
        "worker": found.worker,
        "deaths": deaths,
        "outcome": _outcome(found),
    }


def _outcome(found: Found) -> str | None:
    """Return in one line how a task ended; `None` if it has not."""
    if found.state not in ("completed", "failed"):
        return None
    reason = found.queue.reason(found.name, found.state).strip()
    # A traceback, whose last line is the exception; but that may have several, which are not indented either.
    lines = reason.rsplit("Traceback (most recent call last):\n", 1)[-1].split("\n")
    last = next((line for line in lines if line and not line.startswith(" ")), lines[-1])
    return last or ("done" if found.state == "completed" else "given up on")


def _find(layout: directories.Layout, task_id: str) -> Found:
    """Find a task by its id or, where that is unique, the beginning or end of it, or by the pk of its process.

    :raises NoSuchTask: there is none, or more than one.
    """
    found = _find_each(layout, [task_id])[task_id]
    if isinstance(found, NoSuchTask):
        raise found
    return found


def _find_each(layout: directories.Layout, task_ids: Iterable[str]) -> dict[str, Found | NoSuchTask]:
    """Find several tasks, all before anything is done to one: what is ambiguous stays so."""
    found: dict[str, Found | NoSuchTask] = {}
    wanted = set(task_ids)
    there = {(each.key, each.task_id): each for each in _all(layout, _EVERYWHERE)}
    for each in there.values():
        found |= {task_id: each for task_id in {each.name, each.task_id} & wanted}
    # Bodies are read for a number alone. Of a process that has had several tasks it is the newest.
    numbers = any(_may_be_pk(task_id) for task_id in wanted - found.keys())
    by_pk = {str(_pk(each)): each for each in sorted(there.values(), key=lambda each: each.name)} if numbers else {}
    for task_id in wanted - found.keys():
        matching = [
            each
            for each in there.values()
            if task_id and (each.task_id.startswith(task_id) or each.task_id.endswith(task_id))
        ]
        if _may_be_pk(task_id):
            # Never a part of an id, which would be that of another process.
            none = f"no task is called {task_id}, nor is one that of a process with this pk; "
            part = f"of the id {matching[0].task_id} give more than a number" if matching else "'tasks' lists them"
            found[task_id] = by_pk.get(task_id, NoSuchTask(none + part))
            continue
        told = f"{len(matching)} tasks have ids that begin or end with" if matching else "no task is called"
        problem = NoSuchTask(f"{told} {task_id or repr(task_id)}; 'tasks' lists them")
        found[task_id] = matching[0] if len(matching) == 1 else problem
    return found


def _may_be_pk(text: str) -> bool:
    return text.isdecimal() and len(text) <= _LONGEST_PK and not text.startswith("0")


def show(config_path: str | os.PathLike[str], task_id: str) -> dict[str, Any]:
    """Return all that is known of one task; the answer is what ``show --json`` prints.

    :param task_id: its id, the beginning or end of it, or the pk of its process.
    :raises NoSuchTask: there is none, or more than one.
    """
    layout = control.find(config_path)
    found = _find(layout, task_id)
    answer = {**_row(found, control.queue_name(layout, found.key)), "file": found.path, "unreadable": None}
    answer |= {"size": None, "since": None}
    try:
        status = os.lstat(found.path)
        answer["size"], answer["since"] = status.st_size, status.st_ctime
        message = taskqueue.Task.read(found.path, found.name).message
    except FileNotFoundError:
        raise NoSuchTask(f"task {found.task_id} has moved on meanwhile: ask again") from None
    except taskqueue.Unreadable as error:
        message, answer["unreadable"] = error.envelope, str(error)
    except OSError as error:
        message, answer["unreadable"] = {}, files.told(error)
    reply_to = message.get("reply_to")
    answer |= {key: message.get(key) for key in ("body", "no_reply", "reply_to", "correlation_id")}
    answer["sender_lives"] = directories.is_reply_pipe(reply_to) and _is_read(layout.pipes / str(reply_to))
    answer["worker_pid"] = _pid(layout, found.worker) if found.worker else None
    answer["reason"] = found.queue.reason(found.name, found.place) or None
    pk = _process(message.get("body"))
    answer["process"] = None if pk is None else {"pk": pk, "label": None, "state": None}
    if pk is not None:
        with contextlib.suppress(RuntimeError, OSError, ValueError):  # The rest is said all the same.
            answer["process"] = control.processes(Path(config_path), [pk]).get(pk, answer["process"])
    return answer


def _is_read(pipe: Path) -> bool:
    with contextlib.suppress(OSError):
        return directories.is_read(pipe)
    return False


def _pid(layout: directories.Layout, worker_id: str) -> int | None:
    """Return the pid of a live worker, 0 if that is not known; `None` if it is dead."""
    try:
        if not presence.is_alive(layout, worker_id):
            return None
        return presence.Worker.read(layout.entry(worker_id)).pid
    except (OSError, ValueError):
        return 0


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


def requeue(config_path: str | os.PathLike[str], task_ids: Iterable[str]) -> Iterator[Done]:
    """Move failed or completed tasks back to waiting.

    :param task_ids: their ids, or the beginnings or ends of them.
    :raises presence.CoordinatorError: no broker has run there.
    """
    return _each(control.own(config_path), task_ids, _requeue)


def remove(config_path: str | os.PathLike[str], task_ids: Iterable[str]) -> Iterator[Done]:
    """Remove tasks, whatever their states, unless a live worker holds them; their senders get an exception.

    :param task_ids: their ids, or the beginnings or ends of them.
    :raises presence.CoordinatorError: no broker has run there.
    """
    return _each(control.own(config_path), task_ids, _remove)


def purge(config_path: str | os.PathLike[str], state: str, queue: str | None = None) -> Iterator[Done]:
    """Remove the tasks in a state.

    :param state: 'waiting', 'completed' or 'failed'.
    :param queue: the name of a queue (default: all).
    :raises presence.CoordinatorError: no broker has run there, or there is no such queue.
    """
    layout = control.own(config_path)
    _expect_queue(layout, queue)
    problems: list[Exception] = []
    for found in list(_all(layout, (state,), queue, problems.append)):
        # One that has moved on meanwhile is none of these any more.
        with contextlib.suppress(NoSuchTask):
            yield _done(layout, found, _remove)
    yield from ((state, problem) for problem in problems)


def _each(
    layout: directories.Layout, task_ids: Iterable[str], act: Callable[[directories.Layout, Found], None]
) -> Iterator[Done]:
    done = set[tuple[str, str]]()
    given = list(dict.fromkeys(task_ids))
    resolved = _find_each(layout, given)
    for task_id in given:
        found = resolved[task_id]
        try:
            if isinstance(found, NoSuchTask):
                raise found
            if (found.key, found.task_id) not in done:  # It may have been named twice.
                done.add((found.key, found.task_id))
                yield _done(layout, found, act)
        except NoSuchTask as problem:
            yield task_id, problem


def _done(layout: directories.Layout, found: Found, act: Callable[[directories.Layout, Found], None]) -> Done:
    try:
        act(layout, found)
    except OSError as problem:
        return found.task_id, problem
    return found.task_id, None


def _requeue(layout: directories.Layout, found: Found) -> None:
    given_back = _let_go(layout, found)
    if given_back.state == "waiting" and found.state == "waiting":
        raise NoSuchTask(f"task {found.task_id} waits already")
    name = given_back.name if given_back.state == "waiting" else given_back.queue.requeue(given_back.name)
    if name is None:
        raise NoSuchTask(f"task {found.task_id} has moved on meanwhile: ask again")
    control.ring(layout, found.key, name)


def _remove(layout: directories.Layout, found: Found) -> None:
    found = _let_go(layout, found)
    if os.path.isdir(found.path) and not os.path.islink(found.path):
        raise NoSuchTask(f"{found.path} is a directory, and none of the broker's: move it elsewhere")
    # By way of failed/: whoever is interrupted here, or killed, leaves it where everybody sees it, and why.
    if found.state == "waiting":
        if not found.queue.fail(found.name, "", "it was being removed: do so again, or requeue it"):
            raise NoSuchTask(f"task {found.task_id} has moved on meanwhile: ask again")
        found = dataclasses.replace(found, state="failed")
    if found.state == "failed":
        with contextlib.suppress(FileNotFoundError):  # It has moved on, as is said below.
            burial.tell_sender(layout, found.path, f"task {found.task_id} was removed from the queue")
    try:
        os.unlink(found.path)
    except FileNotFoundError:
        raise NoSuchTask(f"task {found.task_id} has moved on meanwhile: ask again") from None
    found.queue.forget_reason(found.name, found.place)
