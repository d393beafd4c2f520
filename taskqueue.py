"""The life of a task on disk.

Strategy: as in a maildir, a state is a directory and a change of state is one rename(2), which succeeds for exactly one
caller. So any process may die at any instant, and the next one reads from the disk what is to be done.

    task_{id}.json                       waiting
    claimed/{worker_id}/task_{id}.json   being worked on
    completed/task_{id}.json             done
    failed/task_{id}.json                given up on
    completed/ or failed/task_{id}.reason   why: what the subscriber raised, or what was wrong with the task

Rules:
- A task appears under its name only when it is whole, and is on the disk itself before `TaskQueue.put` returns, unless
  its sender has chosen to do without.
- Only whoever holds the lock of a worker id touches what lies in its claim directories (``presence.py``). A worker
  that dies while it holds a task leaves it to be given back with one more death in its name:
  ``task_{id}.{deaths}.json``.
- A directory that somebody has removed is made again where it is needed.
- ``id`` sorts by time of submission, and strictly within one process, even if the clock steps back.

The name of a task is its id with its deaths: what stands between ``task_`` and ``.json``. This module knows neither
pipes nor processes.
"""

from __future__ import annotations

import contextlib
import functools
import heapq
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING or not __package__:
    import files
    import frames
else:
    from . import files, frames

_LOGGER = logging.getLogger(__name__)
MAX_DEATHS = 20
COMPLETED_KEPT_SECONDS = 24 * 3600.0
COMPLETED_KEPT = 10_000
PLACES = {"waiting": "", "claimed": "claimed", "completed": "completed", "failed": "failed"}
"""The words for the states, everywhere, and the directory of each."""
_FILE = re.compile(r"task_(([0-9A-Za-z_-]{1,80})(?:\.([0-9]{1,4}))?)\.json")
_REASON = re.compile(_FILE.pattern.replace("json", "reason"))

_clock = threading.RLock()
_last_time = 0


def _renew_clock() -> None:
    global _clock
    _clock = threading.RLock()  # Another thread of the parent may have had it.


os.register_at_fork(after_in_child=_renew_clock)


def new_id() -> str:
    """Return a new task id, which sorts after every earlier one of this process."""
    global _last_time
    with _clock:
        _last_time = max(time.time_ns(), _last_time + 1)
        return f"{_last_time:020d}-{os.urandom(4).hex()}"


@functools.lru_cache(maxsize=4096)  # It comes about three times in a row.
def is_name(name: object) -> bool:
    """Say whether this can be the name of a task."""
    return isinstance(name, str) and _FILE.fullmatch(f"task_{name}.json") is not None


def is_file(name: str) -> bool:
    """Say whether a file of this name is a task, or the reason beside one."""
    return _FILE.fullmatch(name) is not None or _REASON.fullmatch(name) is not None


class Unreadable(ValueError):
    """A task file does not hold a task."""

    def __init__(self, why: str, envelope: frames.Message | None = None) -> None:
        super().__init__(why)
        self.envelope = envelope or {}
        """Who sent it, as far as it can be known: ``reply_to`` and ``correlation_id``."""


@dataclass(frozen=True, eq=False)
class Task:
    """A task as it was sent. Each time that it is taken, it is another one of these."""

    name: str
    message: dict[str, Any]
    """Its document: ``body``, ``no_reply``, ``reply_to`` and ``correlation_id``."""

    @classmethod
    def read(cls, path: Path | str, name: str) -> Task:
        """Read a task file.

        :raises Unreadable: it does not hold a task.
        :raises OSError: it could not be read now; it may be readable later.
        """
        try:
            message = frames.parse(files.read(path))
        except frames.Garbage as error:
            raise Unreadable(f"it is not a task: {error}", error.envelope) from error
        except files.NotAFile as error:
            raise Unreadable(f"it is not a task: {error}") from error
        if "body" not in message:
            raise Unreadable("it is not a task: it has no body", message)
        return cls(name, message)

    @property
    def no_reply(self) -> bool:
        """Whether its sender wants no outcome."""
        return bool(self.message.get("no_reply"))

    @property
    def reply_to(self) -> Any:
        """The name of its sender's reply pipe; unchecked."""
        return self.message.get("reply_to")

    @property
    def correlation_id(self) -> Any:
        """What its sender knows it by."""
        return self.message.get("correlation_id")


class TaskQueue:
    """One queue: a directory with the states of its tasks. It has no state but the disk's."""

    def __init__(self, directory: Path, name: str | None = None, *, fsync: bool = True) -> None:
        """
        :param name: as its user wrote it, to be kept in it; `None` where it has none, or that is not known.
        :param fsync: whether `put` waits until the task would survive a loss of power.
        """
        self.directory = directory
        self._name = name
        self._root = str(directory)
        self._fsync = fsync

    def make(self) -> None:
        """Make what is missing.

        :raises OSError: it cannot be made.
        """
        for state in ("claimed", "completed", "failed"):
            files.make_directories(self.directory / state)
        self.keep_name()

    def keep_name(self) -> None:
        """Write its name anew where it has vanished from a queue that is there."""
        if self._name is not None and os.path.isdir(self._root) and not os.path.lexists(self.directory / "name"):
            with contextlib.suppress(OSError):
                files.write_whole(self.directory / "name", self._name.encode())

    def file(self, name: str, state: str = "") -> str:
        """Return where a task is kept in a state: '' (waiting), 'completed', 'failed' or 'claimed/…'.

        Not a `Path`, since making one takes as long as the system call that it is for.
        """
        return f"{self._root}/{state}/task_{name}.json" if state else f"{self._root}/task_{name}.json"

    def put(self, task_id: str, text: str, announce: Callable[[], None]) -> None:
        """Add a task: when this returns, it would survive a loss of power.

        :param text: its JSON document, with ``body``, ``no_reply``, ``reply_to`` and ``correlation_id``.
        :param announce: called once a worker may claim the task, while the disk still writes. Until `put` returns, a
            loss of power may leave the task, half of it or nothing; a worker finds it whole.
        :raises OSError: it could not be written, and will not run. Once somebody has claimed it, it does run, and
            nothing is raised.
        """
        path, draft = self.file(task_id), f"{self._root}/.{task_id}"
        visible, opened = False, list[int]()
        try:
            try:
                opened.append(self._create(draft))
                files.write_all(opened[0], text.encode(), path)
                if self._fsync:
                    # Before a worker can have the task, as there may be no descriptor for this.
                    opened.append(os.open(self._root, os.O_RDONLY | os.O_DIRECTORY))
                visible = True
                os.rename(draft, path)
                announce()
                for descriptor in opened if self._fsync else ():
                    files.sync(descriptor)
            finally:
                for descriptor in opened:
                    os.close(descriptor)
        except BaseException as error:
            files.remove(draft)
            known = visible and isinstance(error, OSError)
            if files.remove(path) or not known or not self._is_known(task_id):
                raise

    def _create(self, path: str) -> int:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        try:
            return os.open(path, flags, 0o600)
        except FileNotFoundError:
            self.make()  # Somebody has removed the directory.
            return os.open(path, flags, 0o600)

    def _is_known(self, task_id: str) -> bool:
        """Say whether a task is somewhere after all: claimed, done, given back or given up on.

        What cannot be looked into may have it.
        """
        try:
            claimed = [f"claimed/{worker_id}" for worker_id in self.claims()]
            places = [*claimed, *(place for place in PLACES.values() if place != "claimed")]
            return any(split(name)[0] == task_id for place in places for name in self.names(place))
        except OSError:
            return True

    def names(self, state: str = "") -> Iterator[str]:
        """Yield the names of the tasks in a state, in no order, as the disk gives them."""
        for name in files.listed(f"{self._root}/{state}"):
            match = _FILE.fullmatch(name)
            if match:
                yield match[1]

    def claims(self) -> Iterator[str]:
        """Yield the worker ids that have a claim directory."""
        return files.listed(f"{self._root}/claimed")

    def claimed(self, warn: Callable[[OSError], object] = lambda error: None) -> Iterator[tuple[str, str]]:
        """Yield the claimed tasks: the worker id, and the task's name.

        :param warn: told of what cannot be read, which stops nobody from seeing the rest.
        """
        for worker_id in self.claims():
            try:
                for name in self.names(f"claimed/{worker_id}"):
                    yield worker_id, name
            except OSError as error:
                warn(error)

    def is_waiting(self, name: str) -> bool:
        """Say whether a task waits under this name."""
        return os.path.lexists(self.file(name))

    def move(self, name: str, source: str, target: str, new: str | None = None) -> bool:
        """Move a task from one state to another.

        :param new: its new name, if it gets one.
        :return: whether it was there.
        :raises OSError: it could not be moved, and is where it was.
        """
        here, there = self.file(name, source), self.file(new or name, target)
        try:
            os.rename(here, there)
        except OSError:
            # Either it is gone, or the directory that it goes to.
            if not files.is_there(here):
                return False
            files.make_directories(Path(there).parent)
            try:
                os.rename(here, there)
            except FileNotFoundError:
                if files.is_there(here):
                    raise
                return False  # Somebody else was faster.
        return True

    def reason(self, name: str, state: str) -> str:
        """Return why a task is where it is; '' if that is not known."""
        with contextlib.suppress(OSError, files.NotAFile):
            return files.read(self._reason(name, state)).decode(errors="replace")
        return ""

    def note(self, name: str, state: str, reason: str) -> None:
        """Write down why a task is going to a state, as far as the disk has room."""
        path = self._reason(name, state)
        with contextlib.suppress(OSError):
            files.make_directories(path.parent)
            files.write_whole(path, reason.encode(errors="replace"))

    def forget_reason(self, name: str, state: str) -> None:
        """Remove what was written down of why a task is where it is."""
        files.remove(self._reason(name, state))

    def _reason(self, name: str, state: str) -> Path:
        return Path(self._root, state, f"task_{name}.reason")

    def fail(self, name: str, source: str, reason: str) -> bool:
        """Give a task up.

        :return: whether it was there.
        :raises OSError: it could not be moved, and is where it was.
        """
        self.note(name, "failed", reason)
        if self.move(name, source, "failed"):
            return True
        self.forget_reason(name, "failed")
        return False

    def requeue(self, task_id: str) -> str | None:
        """Move a failed or completed task back to waiting, its deaths forgotten.

        :return: its new name; `None` if there is no such task.
        """
        for state in ("failed", "completed"):
            for name in self.names(state):
                new = split(name)[0]
                if task_id in (name, new) and not self.is_waiting(new) and self._requeue(name, state, new):
                    return new
        return None

    def _requeue(self, name: str, state: str, new: str) -> bool:
        reason = self._reason(name, state)
        try:
            before = os.lstat(reason)
        except OSError:
            return self.move(name, state, "", new)
        moved = self.move(name, state, "", new)
        # Its next life may have ended by now, and have a reason of that name.
        with contextlib.suppress(OSError):
            if moved and os.path.samestat(before, os.lstat(reason)):
                reason.unlink()
        return moved

    def sweep(self) -> Iterator[bool]:
        """Remove old completed tasks and what writers left half-written, in steps.

        Yields after each file whether it was removed.
        """
        chores = [files.sweep_drafts(self.directory / place) for place in PLACES.values()]
        chores += [self._sweep_completed(), self._sweep_reasons("completed"), self._sweep_reasons("failed")]
        for chore in chores:
            try:
                yield from chore
            except OSError as error:
                _LOGGER.error("Not all that is old could be removed: %s", error)

    def _sweep_completed(self) -> Iterator[bool]:
        # What was sent less than a day ago was not done longer ago: no need to ask for its time.
        now, count = time.time_ns(), 0
        begin, end = f"{now - int(COMPLETED_KEPT_SECONDS * 1e9):020d}", f"{now:020d}"
        for name in self.names("completed"):
            old = not begin <= name <= end and files.is_older(self.file(name, "completed"), COMPLETED_KEPT_SECONDS)
            count += not old
            yield old and self._remove_completed(name)
        # What raised is kept longest, so that no error is lost from sight among many that went well.
        newest: list[tuple[bool, float, str]] = []
        for name in self.names("completed") if count > COMPLETED_KEPT else ():
            with contextlib.suppress(FileNotFoundError):
                raised = os.path.lexists(f"{self._root}/completed/task_{name}.reason")
                heapq.heappush(newest, (raised, os.lstat(self.file(name, "completed")).st_ctime, name))
            yield len(newest) > COMPLETED_KEPT and self._remove_completed(heapq.heappop(newest)[2])

    def _remove_completed(self, name: str) -> bool:
        self.forget_reason(name, "completed")
        return files.remove(self.file(name, "completed"))

    def _sweep_reasons(self, state: str) -> Iterator[bool]:
        for found in files.listed(f"{self._root}/{state}"):
            yield _REASON.fullmatch(found) is not None and self._sweep_reason(f"{self._root}/{state}/{found}")

    @staticmethod
    def _sweep_reason(path: str) -> bool:
        # It comes before its task, so a young one may be about to get it.
        task = f"{path.removesuffix('.reason')}.json"
        return not os.path.lexists(task) and files.is_older(path, 60.0) and files.remove(path)


def split(name: str) -> tuple[str, int]:
    """Return a task's id and its deaths."""
    task_id, _, deaths = name.partition(".")
    return task_id, int(deaths or 0)
