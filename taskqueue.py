"""The life of a task on disk.

Strategy: as in a maildir, a state is a directory and a change of state is one rename(2), which succeeds for exactly one
caller. So any process may die at any instant, and the next one reads from the disk what is to be done.

    task_{id}.json                               waiting
    claimed/{worker_id}.{nonce}/task_{id}.json   being worked on
    claimed/{worker_id}.{nonce}/lock             held with flock(2) by that worker as long as it lives
    completed/task_{id}.json                     done
    failed/task_{id}.json                        given up on; task_{id}.reason says why

Rules:
- A task appears under its name only when it is whole, and is on the disk itself before `TaskQueue.put` returns.
- Whoever gets the lock of a claim directory may give its tasks back, and nobody else. A worker that dies while it holds
  a task leaves it with one more death in its name: ``task_{id}.{deaths}.json``.
- ``id`` sorts by time of submission, and strictly within one process, even if the clock steps back.

The name of a task is its id with its deaths: what stands between ``task_`` and ``.json``. This module knows neither
pipes nor processes.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import json
import os
import re
import stat
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MAX_DEATHS = 20
COMPLETED_KEPT_SECONDS = 24 * 3600.0
COMPLETED_KEPT = 10_000
_DRAFT_KEPT_SECONDS = 3600.0
_FILE = re.compile(r"task_(([0-9A-Za-z_-]{1,80})(?:\.([0-9]{1,4}))?)\.json")

_clock_lock = threading.Lock()
_last_time = 0


def new_id() -> str:
    """Return a new task id, which sorts after every earlier one of this process."""
    global _last_time
    with _clock_lock:
        _last_time = max(time.time_ns(), _last_time + 1)
        return f"{_last_time:020d}-{uuid.uuid4().hex[:8]}"


class Unreadable(ValueError):
    """A task file does not hold a task."""


@dataclass(frozen=True)
class Task:
    """A task as it was sent."""

    name: str
    body: Any
    no_reply: bool
    reply_to: str | None
    correlation_id: str | None

    @classmethod
    def read(cls, path: Path | str, name: str) -> Task:
        """Read a task file.

        :raises Unreadable: it does not hold a task.
        :raises OSError: it could not be read now; it may be readable later.
        """
        try:
            document = json.loads(_read(path))
            return cls(
                name,
                document["body"],
                bool(document.get("no_reply")),
                document.get("reply_to"),
                document.get("correlation_id"),
            )
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise Unreadable(f"it is not a task: {type(error).__name__}: {error}") from error


class TaskQueue:
    """One queue: a directory with the states of its tasks."""

    def __init__(self, directory: Path, *, fsync: bool = True, make: bool = True) -> None:
        """
        :param make: whether to make the directories that are missing; who only reads does not.
        :param fsync: whether `put` waits until the task would survive a loss of power.
        """
        self.directory = directory
        self._root = str(directory)
        self._fsync = fsync
        if make:
            self._make()

    def path(self, name: str, state: str = "") -> Path:
        """Return where a task is kept in a state: '' (waiting), 'completed', 'failed' or 'claimed/…'."""
        return Path(self.file(name, state))

    def file(self, name: str, state: str = "") -> str:
        """Return the same as `path`; making a `Path` takes as long as the system call that it is for."""
        return os.path.join(self._root, state, f"task_{name}.json")

    def put(self, task_id: str, text: str, announce: Callable[[], None]) -> None:
        """Add a task: when this returns, it would survive a loss of power.

        :param text: its JSON document, with ``body``, ``no_reply``, ``reply_to`` and ``correlation_id``.
        :param announce: called once a worker may claim the task, while the disk still writes. Until `put` returns, a
            loss of power may leave the task, half of it or nothing; a worker finds it whole.
        :raises OSError: it could not be written, and nothing is left of it.
        """
        path, draft = self.file(task_id), f"{self._root}/.{task_id}"
        try:
            descriptor = self._create(draft)
            with open(descriptor, "wb", buffering=0) as file:
                data = memoryview(text.encode())
                while data:
                    data = data[file.write(data) :]
                os.rename(draft, path)
                announce()
                if self._fsync:
                    os.fsync(descriptor)
                    _fsync_directory(self.directory)
        except OSError:
            for left in (draft, path):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(left)
            raise

    def _create(self, path: str) -> int:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        try:
            return os.open(path, flags, 0o600)
        except FileNotFoundError:
            self._make()  # Somebody has removed the directory.
            return os.open(path, flags, 0o600)

    def _make(self) -> None:
        for state in ("claimed", "completed", "failed"):
            (self.directory / state).mkdir(mode=0o700, parents=True, exist_ok=True)

    def names(self, state: str = "") -> Iterator[str]:
        """Yield the names of the tasks in a state, in no order, as the disk gives them."""
        with contextlib.suppress(FileNotFoundError), os.scandir(self.directory / state) as entries:
            for entry in entries:
                match = _FILE.fullmatch(entry.name)
                if match:
                    yield match[1]

    def claimed(self) -> Iterator[tuple[str, str]]:
        """Yield the claimed tasks: the name of the claim directory, and the task's."""
        for claim in _listed(self.directory / "claimed"):
            for name in self.names(f"claimed/{claim}"):
                yield claim, name

    def is_waiting(self, name: str) -> bool:
        """Say whether a task waits under this name."""
        return os.path.lexists(self.file(name))

    def reason(self, name: str) -> str:
        """Return why a task failed; '' if that is not known."""
        with contextlib.suppress(OSError):
            return self.path(name, "failed").with_suffix(".reason").read_text()
        return ""

    def requeue(self, task_id: str) -> str | None:
        """Move a failed or completed task back to waiting, its deaths forgotten.

        :return: its new name; `None` if there is no such task.
        """
        for state in ("failed", "completed"):
            for name in self.names(state):
                if task_id in (name, _split(name)[0]):
                    new = _split(name)[0]
                    self.path(name, state).rename(self.path(new))
                    self.path(name, state).with_suffix(".reason").unlink(missing_ok=True)
                    return new
        return None

    def fail(self, path: Path, reason: str) -> None:
        """Move a task file to ``failed/``, with the reason beside it."""
        target = self.directory / "failed" / path.name
        with contextlib.suppress(OSError):
            target.with_suffix(".reason").write_text(reason)
        path.rename(target)

    def recover(self, is_dead: Callable[[str], bool], dying: str | None = None) -> Iterator[tuple[str, Task | None]]:
        """Give back the tasks of dead workers.

        :param is_dead: whether the pipes of the life that made a claim directory are closed too. A dying process loses
            its lock and its pipes one by one; a task that came back in between would find its RPC identifier taken.
        :param dying: the id of a worker whose pipes are closed: wait until its locks are free as well.
        Yields for each its new name and `None`; or, if too many workers died of it, its name and the task that failed.
        """
        for claim in _listed(self.directory / "claimed"):
            directory = self.directory / "claimed" / claim
            try:
                if not is_dead(claim):
                    continue
                lock = os.open(directory / "lock", os.O_RDWR)
            except FileNotFoundError:
                # Whoever removed the directory was killed after the lock, which goes last.
                with contextlib.suppress(OSError):
                    directory.rmdir()
                continue
            except OSError:
                continue
            try:
                wait = claim.rpartition(".")[0] == dying
                fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
                for name in sorted(self.names(f"claimed/{claim}")):
                    recovered = self._give_back_counted(directory, name)
                    if recovered:
                        yield recovered
                _remove_claim(directory)
            except OSError:
                continue
            finally:
                os.close(lock)

    def _give_back_counted(self, directory: Path, name: str) -> tuple[str, Task | None] | None:
        path = directory / f"task_{name}.json"
        task_id, deaths = _split(name)
        if deaths + 1 < MAX_DEATHS:
            new = f"{task_id}.{deaths + 1}"
            path.rename(self.path(new))
            return new, None
        try:
            task = Task.read(path, name)
        except Unreadable:
            task = None
        self.fail(path, f"{MAX_DEATHS} workers died while they held it")
        return (name, task) if task else None

    def sweep(self) -> Iterator[int]:
        """Remove old completed tasks and what writers left half-written.

        A generator, so that it can be run in slices: it yields after each file the number that it removed, 0 or 1.
        """
        now = time.time()
        for place, mine in ((self.directory, "."), (self.directory / "claimed", ".")):
            for entry in list(itertools.islice(os.scandir(place), 1_000_000)):
                if entry.name.startswith(mine):
                    yield _remove_older(place / entry.name, now - _DRAFT_KEPT_SECONDS)
        names = sorted(self.names("completed"))
        for index, name in enumerate(names):
            excess = index < len(names) - COMPLETED_KEPT
            yield _remove_older(self.path(name, "completed"), now if excess else now - COMPLETED_KEPT_SECONDS)


class Claims:
    """The tasks that one life of a worker holds in one queue. Safe in any thread."""

    def __init__(self, queue: TaskQueue, claim: str) -> None:
        """Make the claim directory, which appears with its lock held.

        :param claim: its name, ``{worker_id}.{nonce}``.
        """
        self.queue = queue
        self.claim = claim
        self.directory = queue.directory / "claimed" / claim
        self._held: set[str] = set()
        self._mutex = threading.RLock()
        self._closed = False
        self._state = f"claimed/{claim}"
        draft = self.directory.with_name(f".{claim}")
        draft.mkdir(mode=0o700)
        with contextlib.ExitStack() as undo:
            undo.callback(draft.rmdir)
            undo.callback((draft / "lock").unlink, missing_ok=True)
            self.descriptor = os.open(draft / "lock", os.O_RDWR | os.O_CREAT, 0o600)
            undo.callback(os.close, self.descriptor)
            fcntl.flock(self.descriptor, fcntl.LOCK_EX)
            draft.rename(self.directory)
            undo.pop_all()

    def take(self, name: str) -> Task | None:
        """Claim a waiting task; `None` if somebody else has it (losing that race is normal).

        :raises Unreadable: it was no task; it is in ``failed/`` now.
        :raises OSError: it could not be read now, and it waits again.
        """
        path, waiting = self.queue.file(name, self._state), self.queue.file(name)
        with self._mutex:
            if self._closed:
                return None
            try:
                os.rename(waiting, path)
            except FileNotFoundError:
                return None
            try:
                task = Task.read(path, name)
            except Unreadable as error:
                self.queue.fail(Path(path), str(error))
                raise
            except OSError:
                os.rename(path, waiting)
                raise
            self._held.add(name)
            return task

    def settle(self, name: str, before: Callable[[], None], state: str = "completed") -> bool:
        """Move a held task on, after `before` has been called; both or neither, as seen by `close`.

        :param state: 'completed', or '' to give it back.
        :return: whether it was still held.
        """
        with self._mutex:
            if name not in self._held:
                return False
            before()
            path = self.queue.file(name, self._state)
            with contextlib.suppress(FileNotFoundError):
                if state:
                    os.utime(path)  # When it was done; housekeeping goes by that.
                os.rename(path, self.queue.file(name, state))
            self._held.discard(name)
            return True

    def close(self) -> list[str]:
        """Give back what is held, and remove the claim directory.

        :return: the names that wait again.
        """
        with self._mutex:
            self._closed = True
            names = sorted(self._held)
            for name in names:
                with contextlib.suppress(OSError):
                    os.rename(self.queue.file(name, self._state), self.queue.file(name))
            self._held.clear()
            with contextlib.suppress(OSError):
                _remove_claim(self.directory)
            os.close(self.descriptor)
            return names


def queue_directories(root: Path) -> dict[str, Path]:
    """Return the queues that exist, by key: '' for the default one, otherwise the quoted name."""
    named = {name: root / "queues" / name for name in _listed(root / "queues")}
    return {"": root, **named}


def _split(name: str) -> tuple[str, int]:
    task_id, _, deaths = name.partition(".")
    return task_id, int(deaths or 0)


def _listed(directory: Path) -> list[str]:
    try:
        return [name for name in os.listdir(directory) if not name.startswith(".")]
    except (FileNotFoundError, NotADirectoryError):
        return []


def _read(path: Path | str) -> bytes:
    # As few system calls as it takes: this is done for each task.
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO):
            raise Unreadable("it is not a regular file") from error
        raise
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise Unreadable("it is not a regular file")
        parts = [os.read(descriptor, status.st_size)]
        while sum(map(len, parts)) < status.st_size and parts[-1]:
            parts.append(os.read(descriptor, status.st_size))
        return b"".join(parts)
    finally:
        os.close(descriptor)


def _remove_claim(directory: Path) -> None:
    # The lock goes last, so that a directory with tasks in it always has one.
    if os.listdir(directory) == ["lock"]:
        (directory / "lock").unlink()
        directory.rmdir()


def _remove_older(path: Path, limit: float) -> int:
    with contextlib.suppress(OSError):
        if os.lstat(path).st_mtime < limit:
            if path.is_dir() and not path.is_symlink():
                (path / "lock").unlink(missing_ok=True)
                path.rmdir()
            else:
                path.unlink()
            return 1
    return 0


def _fsync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
