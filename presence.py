"""Who is here: the lock of a worker id, the registry, and RPC routes.

Strategy: a name in a directory is a claim, and the kernel has the proof. A worker lives as long as somebody holds the
lock of its id (flock(2)), and a communicator that only sends as long as somebody reads its reply pipe
(``open(O_WRONLY | O_NONBLOCK)`` says so with ``ENXIO``, fifo(7)). Neither answer can be stale, because the kernel lets
go of both at any death. Nothing here asks whether a process id lives, or how old something is.

Rules:
- Whoever holds the lock of a worker id owns everything under that id: pipes, routes, entry, and claimed tasks.
- A lock that is not there proves nothing, and any error but ``EWOULDBLOCK`` neither.
- What lies in the registry and is no entry is passed over, and never opened so that it could block.

This module knows nothing of messages or tasks.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING or not __package__:
    import files
    from directories import Layout, is_quoted, is_read, is_reply_pipe, is_worker_id, pipe_owner
else:
    from . import files
    from .directories import Layout, is_quoted, is_read, is_reply_pipe, is_worker_id, pipe_owner


class CoordinatorError(RuntimeError):
    """A coordinator cannot serve, or could not be started or stopped; the message says why."""


class Lock:
    """A lock file (flock(2)) in the hands of this process."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path = path
        self.descriptor = descriptor

    def is_in_place(self) -> bool:
        """Say whether the lock still has its name."""
        return files.is_in_place(self.path, self.descriptor)

    def is_gone(self) -> bool:
        """Say whether it has no name any more, anywhere."""
        return os.fstat(self.descriptor).st_nlink == 0

    def release(self) -> None:
        """Let go of the lock. A forked child's copy of the descriptor does not keep it."""
        with contextlib.suppress(OSError):
            fcntl.flock(self.descriptor, fcntl.LOCK_UN)
        os.close(self.descriptor)


def _open_lock(path: Path) -> int | None:
    """Open a lock file and lock it; `None` if somebody has it.

    :raises FileNotFoundError: there is none.
    :raises OSError: the kernel did not say.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return descriptor
    except BaseException as error:
        os.close(descriptor)
        if isinstance(error, BlockingIOError):
            return None
        raise


@contextlib.contextmanager
def _draft(path: Path, draft: Path, text: str) -> Iterator[Lock]:
    """Make a lock file that has no name yet, and lock it, so that nobody ever meets it free.

    Whoever gives it its name has it from then on; it is let go where something is raised.
    """
    descriptor = os.open(draft, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    lock = Lock(path, descriptor)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        try:
            files.write_all(descriptor, text.encode(), path)
        except OSError as error:
            # Where the disk is full, somebody has to work off what is on it; the pid is for people.
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
        yield lock
    except BaseException:
        lock.release()  # In place or not: nobody gets it.
        raise
    finally:
        files.remove(draft)


class WorkerLock(Lock):
    """The lock of a worker id. Whoever has it owns everything under the id."""

    @classmethod
    def take(cls, layout: Layout, worker_id: str, *, make: bool) -> Lock | None:
        """Take the lock, without waiting.

        :param make: make one where there is none; otherwise that proves nothing, and is an answer.
        :return: the lock; `None` if somebody holds it, or there is none.
        :raises OSError: the kernel did not say.
        """
        path = layout.lock(worker_id)
        for _ in range(10):
            try:
                descriptor = _open_lock(path)
            except (FileNotFoundError, NotADirectoryError):
                if not make:
                    return None
                made = cls._make(path)
                if made is not None:
                    return made
                continue
            if descriptor is None:
                return None
            lock = cls(path, descriptor)
            if lock.is_in_place():
                return lock
            lock.release()  # Whoever had it before has removed it since we opened it.
        return None

    @classmethod
    def _make(cls, path: Path) -> Lock | None:
        # The disk need not have it: a loss of power ends this life too.
        files.make_directories(path.parent, durable=False)
        draft = path.parent.with_name(f".{path.parent.name}.{uuid.uuid4().hex}")
        with contextlib.suppress(FileExistsError, FileNotFoundError), _draft(path, draft, "") as lock:
            os.link(draft, path)
            return lock
        return None


class CoordinatorLock(Lock):
    """The lock of a configuration's coordinator. It holds the pid of whoever made it, from before it had its name."""

    @classmethod
    def take(cls, layout: Layout) -> Lock:
        """Take the lock.

        :raises CoordinatorError: another coordinator runs.
        :raises OSError: it cannot be made.
        """
        path = layout.queue / "coordinator.lock"
        draft = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
        with _draft(path, draft, str(os.getpid())) as lock:
            for _ in range(100):
                with contextlib.suppress(FileExistsError):
                    os.link(draft, path)
                    return lock
                if cls._replace(path, draft):
                    return lock
                pid = coordinator_pid(layout)
                if pid is not None:
                    raise CoordinatorError(
                        f"a coordinator for {layout.config_path} is running already, with pid {pid or '?'}"
                    )
        raise CoordinatorError(f"the lock {path} cannot be had: others come and go all the time")

    @staticmethod
    def _replace(path: Path, draft: Path) -> bool:
        """Put our lock in the place of a dead one's, whose own lock we hold meanwhile."""
        with contextlib.suppress(FileNotFoundError):
            descriptor = _open_lock(path)
            if descriptor is not None:
                dead = Lock(path, descriptor)
                try:
                    if dead.is_in_place():
                        os.rename(draft, path)
                        return True
                finally:
                    dead.release()
        return False


def coordinator_pid(layout: Layout) -> int | None:
    """Return the pid of the running coordinator, 0 if it does not say; `None` if none is running.

    The pid stands in the very file that is locked, so it is never another one's.
    """
    try:
        text = _said_by_holder(layout.queue / "coordinator.lock")
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO):
            return None
        raise
    return None if text is None else int(text) if text.isdigit() else 0


def is_alive(layout: Layout, worker_id: str) -> bool:
    """Say whether somebody holds the lock of a worker id.

    :raises OSError: the kernel did not say.
    """
    return _said_by_holder(layout.lock(worker_id)) is not None


def is_there(pid: int) -> bool:
    """Say whether there is a process with a pid, which may be another one's by now (kill(2))."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


def is_stopped(pid: object) -> bool:
    """Say whether a process is stopped (proc(5), stat); where the kernel does not tell, it is not."""
    try:
        # The name of the program, in parentheses, may be anything.
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0] in (b"T", b"t")
    except (OSError, IndexError):
        return False


def _said_by_holder(path: Path) -> bytes | None:
    """Return what stands in a lock file that somebody holds; `None` if nobody does."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        # Shared, so that two who only ask never take each other for the owner.
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return None
    except BlockingIOError:
        return os.read(descriptor, 20)
    finally:
        os.close(descriptor)


@dataclass(frozen=True)
class Worker:
    """A registry entry: one life of one communicator that subscribes to something or holds tasks."""

    worker_id: str
    pid: int
    since: float
    """Seconds since the epoch."""
    reply: str
    """The name of its reply pipe, which no other life has."""
    queues: dict[str, int] = field(default_factory=dict)
    """The task queues it subscribes to, each with its prefetch (0: unlimited)."""
    rpc: bool = False
    broadcast: bool = False
    listens_since: float = 0.0
    """Since when it subscribes to broadcasts, in seconds since the epoch."""
    version: str = ""
    """Of the broker that it runs with; '' if that is an old one."""

    @classmethod
    def read(cls, path: Path) -> Worker:
        """Read an entry; fields that are not known are passed over.

        :raises ValueError: it is not one.
        :raises OSError: it cannot be read.
        """
        try:
            said = json.loads(files.read(path))
            worker = cls(**{known.name: said[known.name] for known in fields(cls) if said.get(known.name) is not None})
            valid = (
                is_worker_id(worker.worker_id)
                and is_reply_pipe(worker.reply)
                and isinstance(worker.pid, int)
                and isinstance(worker.version, str)
                and all(isinstance(at, int | float) and 0 <= at < 1e11 for at in (worker.since, worker.listens_since))
                and all(key == "" or is_quoted(key) for key in worker.queues)
                and all(isinstance(count, int) and count >= 0 for count in worker.queues.values())
            )
        except (TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{path} is not a worker's entry: {error}") from None
        if not valid or path.name != f"worker_{worker.worker_id}.json":
            raise ValueError(f"{path} is not a worker's entry: a field is out of range")
        return worker

    def register(self, layout: Layout) -> None:
        """Write the entry."""
        files.write_whole(layout.entry(self.worker_id), json.dumps(asdict(self), indent=1).encode())


def workers(layout: Layout) -> Iterator[Worker]:
    """Yield the registered workers, dead ones included; files that are not entries are passed over."""
    for name in sorted(files.listed(layout.registry)):
        if name.startswith("worker_") and name.endswith(".json"):
            with contextlib.suppress(ValueError, OSError):
                yield Worker.read(layout.registry / name)


def coordinator(layout: Layout) -> dict[str, Any] | None:
    """Return what the running coordinator says of itself (``coordinator.json``), its pid, `None` if it does not say.

    `None` if none is running.

    :raises OSError: the kernel did not say.
    """
    pid = coordinator_pid(layout)
    if pid is None:
        return None
    with contextlib.suppress(OSError, ValueError, RecursionError):
        said = json.loads(files.read(layout.registry / "coordinator.json"))
        if isinstance(said, dict) and said.get("pid") == pid:
            return said
    return {"pid": pid or None}


def communicators(layout: Layout) -> Iterator[int]:
    """Yield the pid of each communicator that is here, senders included: 0 where it is not known; some come twice.

    Those whose reply pipes are read, and workers, whose pipes somebody may have removed, by the locks of their ids.

    :raises OSError: the kernel did not say.
    """
    for name in files.listed(layout.pipes):
        if is_reply_pipe(name) and is_read(layout.pipes / name):
            yield int(name.split("_")[1])
    for worker_id in filter(is_worker_id, files.listed(layout.queue / "claimed")):
        if is_alive(layout, worker_id):
            try:
                yield Worker.read(layout.entry(worker_id)).pid
            except (OSError, ValueError):
                yield 0


# Routes


def claim_route(layout: Layout, identifier: str, worker_id: str) -> str | None:
    """Lead an RPC identifier to a worker's pipe (symlink(2): EEXIST), unless it is led there already.

    :return: `None`; or the id of the worker that has it.
    """
    route, pipe = layout.route(identifier), f"rpc_{worker_id}"
    for _ in range(10):
        with contextlib.suppress(FileExistsError):
            os.symlink(pipe, route)
            return None
        target = route_target(route)
        if target is not None:
            return target.removeprefix("rpc_") if target != pipe else None
        if os.path.lexists(route):
            os.unlink(route)  # It leads to no pipe of ours, so nobody can have made it who may.
    return ""


def route_target(route: Path | str) -> str | None:
    """Return the name of the RPC pipe a route leads to; `None` if there is no such route."""
    try:
        target = os.readlink(route)
    except OSError:
        return None
    return target if target.startswith("rpc_") and pipe_owner(target) else None


def release_route(layout: Layout, identifier: str, worker_id: str) -> None:
    """Take an RPC identifier back, if it is still this worker's."""
    route = layout.route(identifier)
    if route_target(route) == f"rpc_{worker_id}":
        files.remove(route)
