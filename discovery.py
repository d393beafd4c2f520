"""Who is here, and where: directories, file names, registration, and the kernel's answer to "is it alive?".

Strategy: a name in a directory is a claim, and a FIFO's reader is its proof. A process is alive exactly while it holds
the reading end of its reply pipe; ``open(O_WRONLY | O_NONBLOCK)`` says so with ``ENXIO`` (fifo(7)) and the answer
cannot be stale, because the kernel closes the reading end at any death. Nothing here compares process ids or ages.

Rules:
- Nothing is used before it is looked at: the pipes directory lies in /tmp, which is public.
- A file appears under its name only when it is whole: it is written under a dot-name and renamed.
- Whoever removes what another process left does so in ``exclusive()``, and looks again inside it.
- A name that comes from a user is quoted or refused, so no name ever leads to another directory.

This module knows nothing of messages.
"""

from __future__ import annotations

import os

if not hasattr(os, "mkfifo"):
    raise ImportError("The named pipe broker needs a platform with FIFOs, such as Linux or macOS.")

import contextlib
import errno
import fcntl
import functools
import hashlib
import json
import re
import stat
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

TASKS_INTAKE = "coordinator_tasks"
BROADCAST_INTAKE = "coordinator_broadcast"
KINDS = ("task", "rpc", "broadcast")

_WORKER_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_CLAIM = re.compile(rf"{_WORKER_ID.pattern}\.[0-9a-f]{{32}}")
_REPLY = re.compile(r"reply_\d+_[0-9a-f]{32}")
_RPC = re.compile(rf"rpc_{_WORKER_ID.pattern}")
_BODY = re.compile(r"body_([A-Za-z0-9._-]+)\.[0-9a-f]{32}")
_QUOTED = re.compile(r"[A-Za-z0-9_~%=-][A-Za-z0-9_.~%=-]*")
_OWNER = ".config"
_LONGEST_NAME = 200
_DRAFT_KEPT_SECONDS = 3600.0


class DirectoryRefused(OSError):
    """A directory is not safe to use, or cannot be used; the message says what to do about it."""


class CoordinatorError(RuntimeError):
    """A coordinator could not be started or stopped; the message says why."""


@dataclass(frozen=True)
class Layout:
    """The three directories of one configuration. Made by `establish` and `locate`."""

    config_path: Path
    pipes: Path

    @property
    def registry(self) -> Path:
        """Holds ``coordinator.json`` and ``worker_{id}.json``."""
        return self.config_path / "pipes"

    @property
    def queue(self) -> Path:
        """Holds the default task queue, ``queues/``, ``coordinator.lock`` and ``coordinator.log``."""
        return self.config_path / "coordinator"

    def route(self, identifier: str) -> Path:
        """Return the path of the symlink that leads to the RPC pipe serving `identifier`."""
        return self.pipes / f"route_{quoted(identifier)}"

    def entry(self, worker_id: str) -> Path:
        """Return the path of a worker's registry entry."""
        return self.registry / f"worker_{worker_id}.json"


@dataclass(frozen=True)
class Worker:
    """A registry entry: one life of one communicator that subscribes to something or holds tasks."""

    worker_id: str
    pid: int
    since: float
    """Seconds since the epoch."""
    reply: str
    """The name of its reply pipe, which it holds open as long as it lives; no other life has the same."""
    claim: str
    """The name of its claim directories, ``{worker_id}.{nonce}``."""
    queues: dict[str, int] = field(default_factory=dict)
    """The task queues it subscribes to, each with its prefetch (0: unlimited)."""
    rpc: bool = False
    broadcast: bool = False

    @classmethod
    def read(cls, path: Path) -> Worker:
        """Read an entry.

        :raises ValueError: it is not one.
        :raises OSError: it cannot be read.
        """
        try:
            worker = cls(**json.loads(path.read_text()))
            valid = (
                _WORKER_ID.fullmatch(worker.worker_id) is not None
                and _REPLY.fullmatch(worker.reply) is not None
                and _CLAIM.fullmatch(worker.claim) is not None
                and worker.claim.rpartition(".")[0] == worker.worker_id
                and isinstance(worker.pid, int)
                and isinstance(worker.since, int | float)
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
        write_whole(layout.entry(self.worker_id), json.dumps(asdict(self), indent=1))

    def is_alive(self, layout: Layout) -> bool:
        """Say whether this very life still runs."""
        return is_alive(layout.pipes / self.reply)


def establish(profile_name: str, config_path: str | os.PathLike[str]) -> Layout:
    """Find the directories of a configuration, and make what is missing.

    The pipes directory is ``/tmp/aiida_{profile}_pipes`` unless another configuration has it, and then the same with a
    digest in its name. The choice is kept in ``{config_path}/pipes/directory``, so every process comes to the same one,
    whatever happens to the other's directory.

    :param profile_name: any name; what cannot stand in a file name is percent-encoded.
    :param config_path: the profile's configuration directory.
    :raises ValueError: the profile name is empty, or too long for a file name.
    :raises DirectoryRefused: a directory cannot be made, or is not safe to use.
    """
    if not profile_name or len(quote(profile_name, safe="")) > _LONGEST_NAME:
        raise ValueError(f"a profile name has 1 to {_LONGEST_NAME} characters, not {len(profile_name)}")
    config = Path(os.path.realpath(Path(config_path).expanduser()))
    try:
        for directory in (config / "pipes", config / "coordinator"):
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        recorded = _recorded(config)
        if recorded is not None and _belongs(recorded, config):
            return Layout(config, recorded)
        with exclusive(config / "pipes"):
            return Layout(config, _choose(profile_name, config))
    except DirectoryRefused:
        raise
    except OSError as error:
        raise DirectoryRefused(
            f"the directory {config} cannot be used: {error.strerror} ({error.filename or config}). "
            "Make it writable for this user, or name another configuration directory."
        ) from error


def remake(layout: Layout) -> None:
    """Make the directories again, should somebody have removed them.

    :raises OSError: they cannot be made.
    :raises DirectoryRefused: another configuration has taken the pipes directory.
    """
    if _recorded(layout.config_path) == layout.pipes and _belongs(layout.pipes, layout.config_path):
        return
    layout.registry.mkdir(mode=0o700, parents=True, exist_ok=True)
    with exclusive(layout.registry):
        layout.pipes.mkdir(mode=0o700, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            os.symlink(layout.config_path, layout.pipes / _OWNER)
        if not _belongs(layout.pipes, layout.config_path):
            raise DirectoryRefused(f"{layout.pipes} belongs to another configuration now: restart this process.")
        replace_symlink(layout.pipes, layout.registry / "directory")


def locate(config_path: str | os.PathLike[str]) -> Layout | None:
    """Find the directories of a configuration without making any; `None` where no broker has ever run."""
    config = Path(os.path.realpath(Path(config_path).expanduser()))
    recorded = _recorded(config)
    return None if recorded is None else Layout(config, recorded)


def _recorded(config: Path) -> Path | None:
    try:
        return Path(os.readlink(config / "pipes" / "directory"))
    except OSError:
        return None


def _choose(profile_name: str, config: Path) -> Path:
    digest = hashlib.sha256(f"{os.geteuid()}:{config}".encode("utf-8", "surrogateescape")).hexdigest()[:16]
    plain = Path(f"/tmp/aiida_{quote(profile_name, safe='')}_pipes")
    own = Path(f"{plain}_{digest}")
    recorded = _recorded(config)
    candidates = [plain, own] if not _belongs(own, config) else [own]
    if recorded in candidates:
        candidates.insert(0, recorded)
    for pipes in candidates:
        with contextlib.suppress(FileExistsError):
            pipes.mkdir(mode=0o700)
        if os.lstat(pipes).st_uid == os.geteuid():
            _refuse_unsafe(pipes)
            with contextlib.suppress(FileExistsError):
                os.symlink(config, pipes / _OWNER)
        if _belongs(pipes, config):
            if recorded != pipes:
                replace_symlink(pipes, config / "pipes" / "directory")
            return pipes
    raise DirectoryRefused(f"{own} belongs to somebody else: remove it, or ask the administrator to.")


def _belongs(pipes: Path, config: Path) -> bool:
    """Say whether a directory is this configuration's; refuse one that is, but that others could tamper with."""
    try:
        if os.lstat(pipes).st_uid != os.geteuid():
            return False
        _refuse_unsafe(pipes)
        return os.readlink(pipes / _OWNER) == str(config)
    except FileNotFoundError:
        return False


def _refuse_unsafe(pipes: Path) -> None:
    mode = os.lstat(pipes).st_mode
    if not stat.S_ISDIR(mode):
        raise DirectoryRefused(f"{pipes} is not a directory: remove it.")
    if mode & 0o077:
        raise DirectoryRefused(f"{pipes} is open to other users: run 'chmod 700 {pipes}'.")


@functools.lru_cache(maxsize=1024)
def quoted(name: str) -> str:
    """Turn any text into something that can stand in a file name, different for different text.

    :raises ValueError: the text is empty, or has no UTF-8 form (a lone surrogate).
    """
    if not name:
        raise ValueError("a name must have at least one character")
    text = quote(name, safe="")
    if text.startswith("."):
        text = "%2E" + text[1:]
    # '=' is never left unquoted, so a digest is never the quoted form of another name.
    return text if len(text) <= _LONGEST_NAME else "=" + hashlib.sha256(name.encode()).hexdigest()


def check_worker_id(worker_id: str) -> str:
    """Return the worker id.

    :raises ValueError: it cannot be one.
    """
    if not isinstance(worker_id, str) or not _WORKER_ID.fullmatch(worker_id):
        raise ValueError(
            f"{worker_id!r} cannot be a worker id: use 1 to 100 letters, digits, '.', '_' or '-', the first of them a "
            "letter or digit"
        )
    return worker_id


def is_quoted(name: object) -> bool:
    """Say whether a name that came in a message could have come from `quoted`."""
    return isinstance(name, str) and len(name) <= _LONGEST_NAME and _QUOTED.fullmatch(name) is not None


def is_reply_pipe(name: object) -> bool:
    """Say whether a name that came in a message is that of a reply pipe."""
    return isinstance(name, str) and _REPLY.fullmatch(name) is not None


def body_receiver(name: object) -> str | None:
    """Return the pipe a large body is for, by the body's name; `None` if it is no such name."""
    match = _BODY.fullmatch(name) if isinstance(name, str) else None
    return match and match[1]


def reply_pipe() -> str:
    """Return a new name for a reply pipe."""
    return f"reply_{os.getpid()}_{uuid.uuid4().hex}"


def body_name(receiver: str) -> str:
    """Return a new name for a body too large for a frame: it carries its receiver, whose death makes it an orphan."""
    return f"body_{receiver}.{uuid.uuid4().hex}"


def is_alive(fifo: Path) -> bool:
    """Say whether somebody reads a FIFO.

    :raises OSError: the kernel did not say (no free descriptors, say): that is no proof of death.
    """
    try:
        if not stat.S_ISFIFO(os.lstat(fifo).st_mode):
            return False
        os.close(os.open(fifo, os.O_WRONLY | os.O_NONBLOCK | os.O_NOFOLLOW))
        return True
    except OSError as error:
        if error.errno in (errno.ENXIO, errno.ENOENT, errno.ENOTDIR):
            return False
        raise


@contextlib.contextmanager
def exclusive(directory: Path, *, wait: bool = True) -> Iterator[None]:
    """Hold the directory's lock (flock(2)) against every other process; for what happens once in a process's life.

    :raises BlockingIOError: somebody has it, and `wait` is false.
    """
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def write_whole(path: Path, text: str) -> None:
    """Write a file so that nobody ever meets half of it."""
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        draft.write_text(text)
        draft.rename(path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


def replace_symlink(target: Path | str, link: Path) -> None:
    """Make a symlink, in one step even where there is one already."""
    draft = link.with_name(f".{link.name}.{uuid.uuid4().hex}")
    os.symlink(target, draft)
    draft.rename(link)


def claim_route(layout: Layout, identifier: str, worker_id: str) -> bool:
    """Lead an RPC identifier to a worker's pipe; say whether that worked, or a live one has it (symlink(2): EEXIST)."""
    route, pipe = layout.route(identifier), f"rpc_{worker_id}"
    with contextlib.suppress(FileExistsError):
        os.symlink(pipe, route)
        return True
    with exclusive(layout.registry), contextlib.suppress(FileExistsError):
        if _route_is_dead(route):
            route.unlink(missing_ok=True)
        os.symlink(pipe, route)
        return True
    return False


def route_target(route: Path) -> str | None:
    """Return the name of the RPC pipe a route leads to; `None` if there is no such route."""
    try:
        target = os.readlink(route)
    except OSError:
        return None
    return target if _RPC.fullmatch(target) else None


def release_route(layout: Layout, identifier: str, worker_id: str) -> None:
    """Take an RPC identifier back, if it is still this worker's."""
    route = layout.route(identifier)
    if route_target(route) == f"rpc_{worker_id}":
        route.unlink(missing_ok=True)


def workers(layout: Layout) -> list[Worker]:
    """Return the registered workers, dead ones included; files that are not entries are passed over."""
    found = []
    for path in sorted(layout.registry.glob("worker_*.json")):
        with contextlib.suppress(ValueError, OSError):
            found.append(Worker.read(path))
    return found


def coordinator(layout: Layout) -> dict[str, Any] | None:
    """Return what the running coordinator says of itself (``coordinator.json``); `None` if none is running."""
    if not is_alive(layout.pipes / TASKS_INTAKE):
        return None
    with contextlib.suppress(OSError, ValueError):
        said = json.loads((layout.registry / "coordinator.json").read_text())
        if isinstance(said, dict):
            return said
    return {}


def remove_dead(layout: Layout, worker_id: str) -> bool:
    """Remove what the last life of a worker id left: its entry, pipes, routes and bodies. Not its tasks.

    :return: whether there was no live one, so that the id is free.
    :raises BlockingIOError: somebody registers just now; a process that was stopped while it did must not hold us up.
    """
    with exclusive(layout.registry, wait=False):
        return remove_dead_locked(layout, worker_id)


def remove_dead_locked(layout: Layout, worker_id: str) -> bool:
    """Do what `remove_dead` does, for a caller inside ``exclusive(layout.registry)``."""
    entry = layout.entry(worker_id)
    with contextlib.suppress(ValueError, OSError):
        worker = Worker.read(entry)
        if worker.is_alive(layout):
            return False
        (layout.pipes / worker.reply).unlink(missing_ok=True)
    pipes = [f"{kind}_{worker_id}" for kind in KINDS]
    if any(is_alive(layout.pipes / pipe) for pipe in pipes):
        return False
    for name in _listed(layout.pipes):
        path = layout.pipes / name
        if name in pipes or body_receiver(name) in pipes or route_target(path) in pipes:
            path.unlink(missing_ok=True)
    entry.unlink(missing_ok=True)
    return True


def is_registered(layout: Layout, worker: Worker) -> bool:
    """Say whether this very life still has its entry."""
    try:
        return Worker.read(layout.entry(worker.worker_id)).claim == worker.claim
    except (OSError, ValueError):
        return False


def claim_is_dead(layout: Layout, claim: str) -> bool:
    """Say whether no pipe of the life that made this claim directory is read any more."""
    worker_id = claim.rpartition(".")[0]
    try:
        worker = Worker.read(layout.entry(worker_id))
    except (OSError, ValueError):
        return True
    return worker.claim != claim or not any(
        is_alive(layout.pipes / name) for name in (worker.reply, *(f"{kind}_{worker_id}" for kind in KINDS))
    )


def sweep(layout: Layout, broadcasts_kept: float) -> Iterator[str]:
    """Remove what the dead left in the pipes directory, and touch what the living use.

    A generator, so that it can be run in slices: it yields after each file the name of what it removed, or ''.

    :param broadcasts_kept: seconds for which a sender keeps a broadcast; a body for the coordinator, whose pipe
        outlives it, is an orphan when it is older than twice that.
    """
    for name in _listed(layout.pipes):
        path = layout.pipes / name
        yield name if _swept(layout, path, broadcasts_kept) else ""


def _swept(layout: Layout, path: Path, broadcasts_kept: float) -> bool:
    try:
        if not _is_orphan(path, broadcasts_kept):
            return False
        with exclusive(layout.registry, wait=False):
            if _is_orphan(path, broadcasts_kept):
                path.unlink()
                return True
    except OSError:
        pass  # Gone meanwhile, or the kernel did not say: the next time will tell.
    return False


def _is_orphan(path: Path, broadcasts_kept: float) -> bool:
    """Say whether nobody can use a file in the pipes directory any more; touch it if somebody does."""
    status, receiver = os.lstat(path), body_receiver(path.name)
    age = time.time() - status.st_mtime
    if receiver == BROADCAST_INTAKE:
        return age > 2 * broadcasts_kept
    if receiver is not None:
        orphan = not is_alive(path.with_name(receiver))
    elif stat.S_ISFIFO(status.st_mode):
        orphan = not is_alive(path)
        if orphan and path.name.startswith("."):
            return age > _DRAFT_KEPT_SECONDS  # Somebody may be about to open and rename it.
    else:
        orphan = path.name.startswith("route_") and _route_is_dead(path)
    if not orphan:
        os.utime(path, follow_symlinks=False)
    return orphan


def _route_is_dead(route: Path) -> bool:
    target = route_target(route)
    return target is None or not is_alive(route.with_name(target))


def cleanup_dead_processes(config_path: str | os.PathLike[str]) -> int:
    """Remove the registry entries, pipes and routes that dead processes left; their tasks stay where they are.

    :param config_path: the profile's configuration directory.
    :return: how many dead processes were found.
    """
    layout = locate(config_path)
    if layout is None:
        return 0
    count = 0
    for worker in workers(layout):
        if not worker.is_alive(layout):
            with contextlib.suppress(BlockingIOError):
                count += remove_dead(layout, worker.worker_id)
    said = layout.registry / "coordinator.json"
    if said.exists() and coordinator(layout) is None:
        said.unlink(missing_ok=True)
        count += 1
    return count


def _listed(directory: Path) -> list[str]:
    try:
        return os.listdir(directory)
    except FileNotFoundError:
        return []
