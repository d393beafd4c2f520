"""Finds what lies in the broker's directories and is none of its own, so that it can be said.

Strategy: all other code looks for what it knows, by name and kind, and passes over the rest. That is safe, but whoever
put a file there, or restored half a backup, would never hear of it. Here each directory has one rule for what may lie
in it.

Rules:
- Nothing is opened: what kind a thing is, its directory says (readdir(3)), so a FIFO cannot block.
- Names that begin with a dot are drafts, or a file manager's: they are nobody's concern. A task is known by its name
  alone: one that cannot be read is given up on with a reason.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING or not __package__:
    import directories
    import taskqueue
else:
    from . import directories, taskqueue

Entry: TypeAlias = "os.DirEntry[str]"

_LOGGER = logging.getLogger(__name__)
_NAMED_AT_ONCE = 10
_INTAKES = (directories.TASKS_INTAKE, directories.BROADCAST_INTAKE)
_QUEUE = re.compile(r"claimed|completed|failed|name")
_DEFAULT_QUEUE = re.compile(r"claimed|completed|failed|queues|format|paused|coordinator\.lock|coordinator\.log(\.\d)?")


class Known:
    """Those that were there at the last look: each is named in the log once."""

    def __init__(self, layout: directories.Layout) -> None:
        self._layout = layout
        self._known: set[str] = set()

    def look(self) -> Iterator[None]:
        """Look, in steps, and name those that are new."""
        found = set()
        for path in strangers(self._layout):
            if path:
                found.add(path)
            yield
        new = sorted(found - self._known)
        self._known = found
        if new:
            some = ", ".join(map(repr, new[:_NAMED_AT_ONCE]))
            more = f" and {len(new) - _NAMED_AT_ONCE} more" if len(new) > _NAMED_AT_ONCE else ""
            _LOGGER.warning("Passed over, as it is none of ours: %s%s", some, more)


def strangers(layout: directories.Layout) -> Iterator[str]:
    """Look through the directories in steps: yields after each thing its path if it is a stranger, otherwise ''."""
    yield from _look(layout.pipes, _is_pipe_or_message)
    yield from _look(layout.registry, _is_entry)
    yield from _look(layout.queue / "queues", lambda found: found.is_dir() and directories.is_quoted(found.name))
    with contextlib.suppress(OSError):
        for key, queue in layout.queues():
            yield from _look_through_queue(queue, is_default=not key)


def _look_through_queue(queue: Path, *, is_default: bool) -> Iterator[str]:
    yield from _look(queue, _part_of(_DEFAULT_QUEUE if is_default else _QUEUE))
    yield from _look(queue / "claimed", lambda found: found.is_dir() and directories.is_worker_id(found.name))
    for state in ("completed", "failed"):
        yield from _look(queue / state, _part_of(None))
    with contextlib.suppress(OSError):
        for worker_id in filter(directories.is_worker_id, taskqueue.TaskQueue(queue).claims()):
            yield from _look(queue / "claimed" / worker_id, _is_task_or_lock if is_default else _part_of(None))


def _look(directory: Path, is_ours: Callable[[Entry], bool]) -> Iterator[str]:
    # Whoever needs a directory that cannot be read says so.
    with contextlib.suppress(OSError), os.scandir(directory) as entries:
        for found in entries:
            ours = found.name.startswith(".")
            with contextlib.suppress(OSError):  # A symlink may lead to what may not be asked for.
                ours = ours or is_ours(found)
            yield "" if ours else found.path


def _is_task_or_lock(found: Entry) -> bool:
    return taskqueue.is_file(found.name) or (found.name == "lock" and found.is_file(follow_symlinks=False))


def _is_pipe_or_message(found: Entry) -> bool:
    if found.is_file(follow_symlinks=False):
        return found.name.startswith("kept_") or directories.body_receiver(found.name) is not None
    if found.is_symlink():
        return found.name.startswith("route_")
    pipe = found.name in _INTAKES or directories.pipe_owner(found.name) or directories.is_reply_pipe(found.name)
    return bool(pipe) and not found.is_dir()


def _is_entry(found: Entry) -> bool:
    if found.is_symlink():
        return found.name == "directory"
    worker_id = found.name.removeprefix("worker_").removesuffix(".json")
    known = found.name == "coordinator.json" or found.name == f"worker_{worker_id}.json"
    return known and directories.is_worker_id(worker_id) and found.is_file()


def _part_of(names: re.Pattern[str] | None) -> Callable[[Entry], bool]:
    return lambda found: (
        taskqueue.is_file(found.name) or (names is not None and names.fullmatch(found.name) is not None)
    )
