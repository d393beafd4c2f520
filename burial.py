"""Removes what the dead left, and gives their tasks back.

Strategy: whoever holds the lock of a worker id owns all that stands under it. So to bury is to take the lock of a dead
worker, which the kernel gives to one process only, and to go through what it left: the pipes and routes first, so that
its identifiers are free; then its tasks, each with one more death in its name; then the entry; and the lock last.

Rules:
- This is the one way to remove what a worker left. The coordinator uses it, a new life under an old id, whoever meets a
  taken RPC identifier, whoever pulls tasks while no coordinator runs, an operator who takes a task from a dead worker,
  and whoever cleans up by hand (``discovery.py``).
- The lock goes only when nothing is claimed under the id any more, in any queue: one bad task is said, and left for the
  next time.
- Before each queue, and before entry and lock, the lock is looked at again: somebody may have removed the directory,
  and another life begun.
- Up to a hundred are buried in one pass over the routes, or as many as there are descriptors for: 300 deaths at once
  cost little more than one.
"""

from __future__ import annotations

import contextlib
import logging
import os
import stat
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING or not __package__:
    import directories
    import fifo
    import files
    import frames
    import presence
    import taskqueue
else:
    from . import directories, fifo, files, frames, presence, taskqueue

_LOGGER = logging.getLogger(__name__)
_AT_ONCE = 100
_ROUNDS = 3
_ORPHAN_SECONDS = 60.0


@dataclass
class Buried:
    """What a burial did."""

    worker_ids: list[str] = field(default_factory=list)
    """Those of whom nothing is left."""
    tasks: list[tuple[str, str]] = field(default_factory=list)
    """What waits again: the key of the queue, and the name."""


def bury(layout: directories.Layout, worker_ids: Iterable[str], *, lost: bool = False) -> Buried:
    """Remove what the dead among some worker ids left, and give their tasks back.

    :param lost: they have lost their locks, and are known to be dead all the same.
    """
    buried, waiting, at_once = Buried(), deque(worker_ids), _AT_ONCE
    while waiting:
        some = [waiting.popleft() for _ in range(min(at_once, len(waiting)))]
        with contextlib.ExitStack() as stack:
            locks, all_taken = _take(layout, some, stack, lost=lost)
            if all_taken:
                bury_owned(layout, locks, buried, keep=False)
            else:
                # Each lock is a descriptor, and what is done with them needs some as well.
                waiting.extendleft(reversed(some))
                at_once = max(1, len(locks) // 2)
    return buried


def _take(
    layout: directories.Layout, worker_ids: list[str], stack: contextlib.ExitStack, *, lost: bool
) -> tuple[dict[str, presence.Lock], bool]:
    """Return the locks of the dead among some worker ids, and whether there were descriptors for all."""
    locks: dict[str, presence.Lock] = {}
    # One more is needed for what is done with them.
    with _logged("Nobody can be buried"), open(os.devnull, "rb"):
        for worker_id in worker_ids:
            with _logged(f"Worker {worker_id} could not be buried"):
                try:
                    lock = presence.WorkerLock.take(layout, worker_id, make=lost)
                except OSError as error:
                    if error.errno in files.NO_DESCRIPTOR and len(worker_ids) > 1:
                        return locks, False
                    raise
                if lock is not None:
                    stack.callback(lock.release)
                    locks[worker_id] = lock
    return locks, True


def bury_owned(layout: directories.Layout, locks: dict[str, presence.Lock], buried: Buried, *, keep: bool) -> None:
    """Do what `bury` does for ids whose locks this process holds.

    :param keep: keep the locks: a new life begins under the id.
    """
    if not locks:
        return
    for pipe in (pipe for worker_id in locks for pipe in _pipes(layout, worker_id)):
        files.remove(pipe)
    _remove_routes_and_bodies(layout, {f"{kind}_{worker_id}" for worker_id in locks for kind in directories.KINDS})
    queues, all_seen = _queues(layout)
    for worker_id, lock in locks.items():
        clean = all_seen
        for key, queue in queues.items():
            clean = lock.is_in_place() and _give_back_all(layout, key, queue, worker_id, buried) and clean
        if clean and lock.is_in_place():
            files.remove(layout.entry(worker_id))
            buried.worker_ids.append(worker_id)
            if not keep:
                with _logged(f"The lock of worker {worker_id} is left"):
                    _remove_claims(layout, queues, worker_id, lock)


def seems_lost(layout: directories.Layout, worker_id: str) -> bool:
    """Say whether a worker id has no lock, which proves nothing, and nobody reads any of its pipes.

    :raises OSError: the kernel did not say.
    """
    return not os.path.lexists(layout.lock(worker_id)) and not any(map(directories.is_read, _pipes(layout, worker_id)))


def remove_claims(layout: directories.Layout, worker_id: str, lock: presence.Lock) -> None:
    """Remove the claim directories of a worker id, and its lock last, unless there are tasks in them.

    :raises OSError: one of them cannot be read.
    """
    queues, all_seen = _queues(layout)
    if all_seen:
        _remove_claims(layout, queues, worker_id, lock)


def _remove_claims(
    layout: directories.Layout, queues: dict[str, taskqueue.TaskQueue], worker_id: str, lock: presence.Lock
) -> None:
    if any(True for queue in queues.values() for _ in queue.names(f"claimed/{worker_id}")):
        return
    if lock.is_in_place():
        files.remove(lock.path)
    elif os.path.lexists(lock.path):
        return
    for queue in queues.values():
        with contextlib.suppress(OSError):
            os.rmdir(queue.directory / "claimed" / worker_id)


def _queues(layout: directories.Layout) -> tuple[dict[str, taskqueue.TaskQueue], bool]:
    """Return the queues, by key, and whether these are all."""
    queues: dict[str, taskqueue.TaskQueue] = {}
    with _logged("Not all queues can be seen"):
        for key, directory in layout.queues():
            queues[key] = taskqueue.TaskQueue(directory)
        return queues, True
    return queues, False


def _pipes(layout: directories.Layout, worker_id: str) -> list[Path]:
    """Return the pipes of a worker id, as far as they are known."""
    names = [f"{kind}_{worker_id}" for kind in directories.KINDS]
    with contextlib.suppress(OSError, ValueError):
        names.append(presence.Worker.read(layout.entry(worker_id)).reply)
    return [layout.pipes / name for name in names]


def _remove_routes_and_bodies(layout: directories.Layout, pipes: set[str]) -> None:
    root = str(layout.pipes)
    for name in files.listed(root):
        pipe = presence.route_target(f"{root}/{name}") if name.startswith("route_") else directories.body_receiver(name)
        if pipe in pipes:
            files.remove(f"{root}/{name}")


def _give_back_all(
    layout: directories.Layout, key: str, queue: taskqueue.TaskQueue, worker_id: str, buried: Buried
) -> bool:
    """Say whether nothing is left."""
    left: list[str] | None = None
    with _logged(f"Tasks of dead worker {worker_id} cannot be given back"):
        left = sorted(queue.names(f"claimed/{worker_id}"))
    for name in left or ():
        try:
            new = _give_back(layout, queue, worker_id, name)
        except OSError as error:
            _LOGGER.error("Task %s of dead worker %s cannot be given back: %s", name, worker_id, error)
            left = None
        else:
            buried.tasks += [(key, new)] if new else []
    return left is not None


def _give_back(layout: directories.Layout, queue: taskqueue.TaskQueue, worker_id: str, name: str) -> str | None:
    """Return the name under which a task waits again; `None` if it does not."""
    task_id, deaths = taskqueue.split(name)
    state, new = f"claimed/{worker_id}", f"{task_id}.{deaths + 1}"
    if deaths + 1 < taskqueue.MAX_DEATHS:
        if not queue.move(name, state, "", new):
            return None
        _LOGGER.warning("Task %s waits again: its worker died (%s)", new, worker_id)
        return new
    reason = f"{taskqueue.MAX_DEATHS} workers died while they held it"
    tell_sender(layout, queue.file(name, state), reason)
    queue.fail(name, state, reason)
    _LOGGER.error("Task %s failed: %s", name, reason)
    return None


def tell_sender(layout: directories.Layout, path: str, exception: str) -> None:
    """Tell whoever sent the task in a file that it will not be done.

    :raises OSError: the file cannot be read, or the message neither sent nor left.
    """
    try:
        said = taskqueue.Task.read(path, "").message
    except taskqueue.Unreadable as error:
        said = error.envelope
    reply_to = said.get("reply_to")
    if not said.get("no_reply") and directories.is_reply_pipe(reply_to) and _may_hear(layout, str(reply_to)):
        text = frames.encode({"correlation_id": said.get("correlation_id"), "exception": exception})
        fifo.leave(text, layout, str(reply_to))


def _may_hear(layout: directories.Layout, reply: str) -> bool:
    """Say whether a sender may still be there; whose process is gone does not make the pipes again."""
    return layout.pipes.is_dir() or presence.is_there(directories.reply_pid(reply))


def bury_claimants(layout: directories.Layout, queue: taskqueue.TaskQueue) -> None:
    """Do the coordinator's work where none runs: give back what dead workers hold of a queue."""
    if not directories.is_read(layout.pipes / directories.TASKS_INTAKE):
        bury(layout, filter(directories.is_worker_id, queue.claims()))


@contextlib.contextmanager
def _logged(what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        _LOGGER.error("%s: %s", what, error)


def everybody(layout: directories.Layout) -> set[str]:
    """Return every worker id that something is left of."""
    found = {worker.worker_id for worker in presence.workers(layout)}
    for queue in _queues(layout)[0].values():
        with _logged(f"The claims in {queue.directory} cannot be read"):
            found.update(_claimants(layout, queue))
    for name in files.listed(layout.pipes):
        pipe = presence.route_target(layout.pipes / name) if name.startswith("route_") else name
        owner = directories.pipe_owner(pipe or "")
        with contextlib.suppress(OSError):  # It has gone meanwhile.
            if owner is not None and (pipe != name or stat.S_ISFIFO(os.lstat(layout.pipes / name).st_mode)):
                found.add(owner)
    return found


def _claimants(layout: directories.Layout, queue: taskqueue.TaskQueue) -> Iterator[str]:
    for worker_id in filter(directories.is_worker_id, queue.claims()):
        with _logged(f"It is not known what worker {worker_id} has claimed"):
            has_claims = any(True for _ in queue.names(f"claimed/{worker_id}"))
            if has_claims or os.path.lexists(layout.lock(worker_id)):
                yield worker_id
            else:
                with contextlib.suppress(OSError):  # What a stranger has put there is none of ours.
                    os.rmdir(queue.directory / "claimed" / worker_id)


class Undertaker:
    """Finds the dead of whom no event told, and those who lost their locks. It lives in the coordinator's thread."""

    def __init__(self, layout: directories.Layout) -> None:
        self._layout = layout
        self._lost: dict[str, int] = {}
        """In how many rounds a worker id had no lock, and none of its pipes was read."""

    def round(self) -> Buried:
        """Bury whoever is dead."""
        ids = everybody(self._layout)
        buried = bury(self._layout, ids)
        left = ids.difference(buried.worker_ids)
        self._lost = {worker_id: self._lost.get(worker_id, 0) + 1 for worker_id in left if self._seems_lost(worker_id)}
        lost = [worker_id for worker_id, rounds in self._lost.items() if rounds >= _ROUNDS]
        again = bury(self._layout, lost, lost=True)
        return Buried(buried.worker_ids + again.worker_ids, buried.tasks + again.tasks)

    def _seems_lost(self, worker_id: str) -> bool:
        with _logged(f"It is not known whether worker {worker_id} lives"):
            return seems_lost(self._layout, worker_id)
        return False


def sweep(layout: directories.Layout) -> Iterator[str]:
    """Remove from the pipes directory what nobody can use any more and no worker id owns, and old drafts, in steps.

    Yields after each file the name of what was removed, or ''.
    """
    for name in list(files.listed(layout.pipes)):
        try:
            orphan = _is_orphan(layout.pipes / name)
        except OSError:
            continue  # Gone meanwhile, or the kernel did not say: the next time will tell.
        yield name if orphan and files.remove(layout.pipes / name) else ""
    for removed in files.sweep_drafts(layout.pipes):
        yield "a draft" if removed else ""
    for _ in files.sweep_drafts(layout.registry):
        yield ""


def _is_orphan(path: Path) -> bool:
    receiver = directories.body_receiver(path.name)
    if path.name.startswith("kept_") or receiver == directories.BROADCAST_INTAKE:
        return files.is_older(path, 2 * directories.KEPT_SECONDS)
    if receiver is not None:
        pipe = path.with_name(receiver)
        # Where the pipe has lost its name, its reader may live, and makes it again when it looks after itself: perhaps
        # while we look.
        was_there = pipe.is_fifo() and not pipe.is_symlink()
        return not directories.is_read(pipe) and (was_there or files.is_older(path, _ORPHAN_SECONDS))
    if directories.is_reply_pipe(path.name):
        return stat.S_ISFIFO(os.lstat(path).st_mode) and not directories.is_read(path)
    # One that leads to no pipe of ours is no one's, as nobody else may write here; what is no symlink is no route.
    return path.name.startswith("route_") and path.is_symlink() and presence.route_target(path) is None


def clean_up(layout: directories.Layout) -> int:
    """Bury whoever is dead and remove what nobody can use, without a coordinator; return how many were dead."""
    dead = set(bury(layout, everybody(layout)).worker_ids)
    for _ in sweep(layout):
        pass
    said = layout.registry / "coordinator.json"
    return len(dead) + (presence.coordinator(layout) is None and files.remove(said))
