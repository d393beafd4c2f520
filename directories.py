"""Where things are: the three directories of a configuration, and what may be in their names.

Strategy: the pipes directory lies in /tmp, which is public, so nothing in it is used before it is looked at. Whose it
is stands in ``.config``, a symlink, which only one process can make.

Rules:
- No lock: each choice is one system call that succeeds for one caller only, and all others then see what was chosen.
- A name that comes from a user is quoted or refused, so no name ever leads to another directory. Two queues or RPC
  identifiers differ even where the file system ignores case (worker ids and profiles may not, but then a lock or
  ``.config`` keeps the second one out).
- A queue says whose it is, and in which format (``whose.py``).

This module knows nothing of messages or tasks, and of processes only whether one reads a FIFO.
"""

from __future__ import annotations

import os

if not hasattr(os, "mkfifo"):
    raise ImportError("The named pipe broker needs a platform with FIFOs, such as Linux or macOS.")

import contextlib
import errno
import functools
import re
import stat
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, unquote

if TYPE_CHECKING or not __package__:
    import files
    import whose
else:
    from . import files, whose

TASKS_INTAKE = "coordinator_tasks"
BROADCAST_INTAKE = "coordinator_broadcast"
KINDS = ("task", "rpc", "broadcast")
KEPT_SECONDS = 60.0
"""How long at least a broadcast is kept that found no coordinator."""
VERSION = "1.0.0"

_WORKER_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_REPLY = re.compile(r"reply_([0-9]{1,10})_[0-9a-f]{32}")
_BODY = re.compile(r"body_([A-Za-z0-9._-]+)\.[0-9a-f]{32}")
_QUOTED = re.compile(r"[A-Za-z0-9_~%=-][A-Za-z0-9_.~%=-]*")
_OWNER = ".config"
_LONGEST_NAME = 200

_NOBODY = whose.Owner("")

DirectoryRefused = whose.DirectoryRefused  # By this name others know it.


@dataclass(frozen=True)
class Layout:
    """The three directories of one configuration. Made by `establish` and `locate`."""

    config_path: Path
    pipes: Path
    owner: whose.Owner = _NOBODY
    """Whose they are, for whoever has established them; nobody's for who has only located them."""

    @property
    def registry(self) -> Path:
        """Holds ``coordinator.json`` and ``worker_{id}.json``."""
        return self.config_path / "pipes"

    @property
    def queue(self) -> Path:
        """Holds the default task queue, ``queues/``, ``coordinator.lock`` and ``coordinator.log``."""
        return queue_in(self.config_path)

    @property
    def paused(self) -> Path:
        """The mark that nothing new is to be started, in any queue."""
        return self.queue / "paused"

    def route(self, identifier: str) -> str:
        """Return the path of the symlink that leads to the RPC pipe serving `identifier`. (A `str`, for each call.)"""
        return f"{self.pipes}/route_{quoted(identifier)}"

    def entry(self, worker_id: str) -> Path:
        """Return the path of a worker's registry entry."""
        return self.registry / f"worker_{worker_id}.json"

    def lock(self, worker_id: str) -> Path:
        """Return the path of a worker id's lock."""
        return self.queue / "claimed" / worker_id / "lock"

    def queue_directory(self, key: str) -> Path:
        """Return the directory of a queue.

        :param key: '' for the default one, otherwise the quoted name.
        """
        return self.queue / "queues" / key if key else self.queue

    def queues(self) -> Iterator[tuple[str, Path]]:
        """Yield the queues that exist, by key, the default one first; whatever else lies there is passed over.

        :raises OSError: those with a name cannot be seen.
        """
        yield "", self.queue
        for key in files.listed(self.queue / "queues"):
            # Not `Path.is_dir`, which raises where a symlink leads to what may not be asked for.
            if is_quoted(key) and os.path.isdir(path := self.queue_directory(key)):
                yield key, path


# Directories


def establish(profile_name: str, config_path: str | os.PathLike[str], profile_uuid: str | None = None) -> Layout:
    """Find the directories of a configuration, and make what is missing.

    The pipes directory is ``/tmp/aiida_{profile}_pipes`` unless another configuration has it, and then the same with a
    digest in its name. The choice is kept in ``{config_path}/pipes/directory``, so every process comes to the same one,
    whatever happens to the other's directory.

    :param profile_name: any name; what cannot stand in a file name is percent-encoded.
    :param config_path: the profile's configuration directory.
    :param profile_uuid: what tells this profile from another one that had its name; `None` matches all.
    :raises ValueError: the profile name is empty, or too long for a file name.
    :raises DirectoryRefused: a directory cannot be made, is not safe to use, or is another profile's.
    """
    if not profile_name or len(_quoted_profile(profile_name)) > _LONGEST_NAME:
        raise ValueError(f"{profile_name!r} cannot be a profile's name: it is empty, or too long for a file name")
    config = _real(config_path)
    try:
        for directory in (config / "pipes", queue_in(config)):
            files.make_directories(directory)
            # Of what a symlink leads to as well: a queue may lie on another disk, but not in another's hands.
            if {os.lstat(directory).st_uid, os.stat(directory).st_uid} != {os.geteuid()}:
                raise DirectoryRefused(f"{directory} belongs to another user: run this as that user.")
        owner, queue = whose.Owner(profile_name, profile_uuid), queue_in(config)
        if whose.read(queue) is None:
            _adopt(queue)
        owner.take(queue)
        recorded = _recorded(config)
        if recorded is None or not _belongs(recorded, config):
            recorded = _choose(profile_name, config)
        return Layout(config, recorded, owner)
    except DirectoryRefused:
        raise
    except OSError as error:
        if error.errno in files.NO_DESCRIPTOR:
            raise
        raise DirectoryRefused(
            f"the directory {config} cannot be used: {error.strerror} ({error.filename2 or error.filename or config}). "
            "Make it writable for this user, or name another configuration directory."
        ) from error


def remake(layout: Layout) -> None:
    """Make the directories again, should somebody have removed them.

    :raises OSError: they cannot be made.
    :raises DirectoryRefused: another configuration has taken the pipes directory.
    """
    files.make_directories(layout.registry)
    # Again, as somebody may go on removing them.
    for _ in range(3):
        layout.pipes.mkdir(mode=0o700, exist_ok=True)
        with contextlib.suppress(FileExistsError, FileNotFoundError):
            os.symlink(layout.config_path, layout.pipes / _OWNER)
        if _belongs(layout.pipes, layout.config_path):
            break
    else:
        raise DirectoryRefused(f"{layout.pipes} belongs to another configuration now: restart this process.")
    if _recorded(layout.config_path) != layout.pipes:
        files.replace_symlink(layout.pipes, layout.registry / "directory")


def locate(config_path: str | os.PathLike[str]) -> Layout | None:
    """Find the directories of a configuration without making any; `None` where no broker has ever run."""
    config = _real(config_path)
    recorded = _recorded(config)
    if recorded is not None and not _is_anothers(recorded, config):
        return Layout(config, recorded)
    # Somebody may have removed {config}/pipes; the queue is still there to be looked at.
    said = read_format(config)
    if not said:
        return None
    plain, own = _candidates(str(said.get("profile")), config)
    return Layout(config, own if _is_anothers(plain, config) or _belongs(own, config) else plain)


def queue_in(config_path: Path) -> Path:
    """Return where a configuration directory has its queue."""
    return config_path / "coordinator"


def read_format(config_path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return what the queue in a configuration directory says of itself (``format``); nothing, if it says nothing."""
    return whose.read(queue_in(_real(config_path))) or {}


def configurations() -> Iterator[tuple[Path, Path]]:
    """Yield the pipes directories of this user, each with the configuration that it is for."""
    for name in sorted(files.listed("/tmp")):
        if name.startswith("aiida_") and "_pipes" in name:
            pipes = Path("/tmp", name)
            with contextlib.suppress(OSError):
                status = os.lstat(pipes)
                if stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid():
                    yield pipes, Path(os.readlink(pipes / _OWNER))


def remove_forgotten() -> None:
    """Remove the pipes directories of this user whose configuration is gone."""
    for pipes, config in configurations():
        with contextlib.suppress(OSError):
            if config.is_absolute() and not files.is_there(config) and not any(map(is_read, pipes.iterdir())):
                remove_pipes(pipes)


def remove_pipes(pipes: Path) -> None:
    """Remove a pipes directory and what lies in it.

    :raises OSError: something cannot be removed, as a directory that a stranger has put there; the rest is.
    """
    for path in pipes.iterdir():
        if path.name != _OWNER:
            files.remove(path)
    if all(path.name == _OWNER for path in pipes.iterdir()):
        (pipes / _OWNER).unlink()
    pipes.rmdir()


def _real(config_path: str | os.PathLike[str]) -> Path:
    return Path(os.path.realpath(Path(config_path).expanduser()))


def _adopt(queue: Path) -> None:
    """Take over a queue from before there was a format: names of queues were quoted with capitals then."""
    for name in list(files.listed(queue / "queues")):
        with contextlib.suppress(OSError, ValueError):
            new = name if name.startswith("=") else quoted(unquote(name, errors="strict"))
            if new != name:
                os.rename(queue / "queues" / name, queue / "queues" / new)


def _recorded(config: Path) -> Path | None:
    try:
        return Path(os.readlink(config / "pipes" / "directory"))
    except OSError:
        return None


def _is_anothers(pipes: Path, config: Path) -> bool:
    """Say whether a directory is marked as another configuration's: this one has been copied from there."""
    try:
        return os.readlink(pipes / _OWNER) != str(config)
    except OSError:
        return False


def _candidates(profile: str, config: Path) -> tuple[Path, Path]:
    import hashlib  # Here, as few need it, and it takes long to load.

    digest = hashlib.sha256(f"{os.geteuid()}:".encode() + os.fsencode(config)).hexdigest()[:16]
    plain = Path(f"/tmp/aiida_{_quoted_profile(profile)}_pipes")
    return plain, Path(f"{plain}_{digest}")


def _quoted_profile(name: str) -> str:
    return quote(name, safe="", errors="surrogateescape")  # A command line may have what is no UTF-8.


def _choose(profile: str, config: Path) -> Path:
    plain, own = _candidates(profile, config)
    recorded = _recorded(config)
    candidates = [plain, own] if not _belongs(own, config) else [own]
    if recorded in candidates:
        candidates.insert(0, recorded)
    for pipes in candidates:
        with contextlib.suppress(FileExistsError):
            pipes.mkdir(mode=0o700)
        if os.lstat(pipes).st_uid == os.geteuid():
            _refuse_unsafe(pipes)
            # Whose it is, is decided by this one call: it fails with EEXIST for all but one.
            with contextlib.suppress(FileExistsError):
                os.symlink(config, pipes / _OWNER)
        if _belongs(pipes, config):
            if recorded != pipes:
                files.replace_symlink(pipes, config / "pipes" / "directory")
            return pipes
    raise DirectoryRefused(f"{own} belongs to somebody else: remove it, or ask the administrator to.")


def _belongs(pipes: Path, config: Path) -> bool:
    """Say whether a directory is this configuration's; refuse one that is, but that others could tamper with."""
    try:
        if os.lstat(pipes).st_uid != os.geteuid() or os.readlink(pipes / _OWNER) != str(config):
            return False
    except (FileNotFoundError, NotADirectoryError):
        return False
    _refuse_unsafe(pipes)
    return True


def check_format(layout: Layout) -> None:
    """Look whether the queue is one that this version knows.

    :raises DirectoryRefused: it is not; the message says what to do.
    """
    said = whose.read(layout.queue)
    if said is not None:
        whose.check_format(layout.queue, said)


def check(layout: Layout, profile_name: str | None, profile_uuid: str | None) -> None:
    """Look whether the directories of a configuration may be used, without making any.

    :param profile_name: whose they are to be; `None`: whose they say.
    :param profile_uuid: what tells the profile from another one that had its name; `None` matches all.
    :raises DirectoryRefused: one may not; the message says why, and what to do.
    """
    said = whose.read(layout.queue)
    if said is not None:
        name = str(said.get("profile")) if profile_name is None else profile_name
        whose.Owner(name, profile_uuid).check(layout.queue, said)
    if os.path.lexists(layout.pipes) and not _belongs(layout.pipes, layout.config_path):
        raise DirectoryRefused(f"{layout.pipes} belongs to somebody else now: restart all that runs here.")


def _refuse_unsafe(pipes: Path) -> None:
    mode = os.lstat(pipes).st_mode
    if not stat.S_ISDIR(mode):
        raise DirectoryRefused(f"{pipes} is not a directory: remove it.")
    if mode & 0o077:
        raise DirectoryRefused(f"{pipes} is open to other users: run 'chmod 700 {pipes}'.")


# Names


@functools.lru_cache(maxsize=1024)
def quoted(name: str) -> str:
    """Turn any text into something that can stand in a file name, different for different text.

    :raises ValueError: the text is empty, or has no UTF-8 form (a lone surrogate).
    """
    if not name:
        raise ValueError("a name must have at least one character")
    try:
        text = quote(name, safe="")
    except UnicodeEncodeError:
        raise ValueError(f"{name!r} cannot be a name: UTF-8 has not all of it") from None
    # Capitals are quoted too, as some file systems take 'A' for 'a'.
    text = re.sub("%..|([A-Z])", lambda m: f"%{ord(m[1]):x}" if m[1] else m[0].lower(), text)
    if text.startswith("."):
        text = "%2e" + text[1:]
    # '=' is never left unquoted, so a digest is never the quoted form of another name.
    if len(text) <= _LONGEST_NAME:
        return text
    import hashlib

    return "=" + hashlib.sha256(name.encode()).hexdigest()


def check_worker_id(worker_id: object) -> str:
    """Return the worker id.

    :raises ValueError: it cannot be one.
    """
    if not is_worker_id(worker_id):
        raise ValueError(
            f"{worker_id!r} cannot be a worker id: use 1 to 100 letters, digits, '.', '_' or '-', the first of them a "
            "letter or digit"
        )
    return str(worker_id)


def is_worker_id(name: object) -> bool:
    """Say whether this can be a worker id."""
    return isinstance(name, str) and _WORKER_ID.fullmatch(name) is not None


def is_quoted(name: object) -> bool:
    """Say whether a name that came in a message could have come from `quoted`, or is that of a task."""
    return isinstance(name, str) and _is_quoted(name)


@functools.lru_cache(maxsize=4096)  # The name of a task comes about three times in a row.
def _is_quoted(name: str) -> bool:
    return len(name) <= _LONGEST_NAME and _QUOTED.fullmatch(name) is not None


def is_reply_pipe(name: object) -> bool:
    """Say whether a name that came in a message is that of a reply pipe."""
    return isinstance(name, str) and _REPLY.fullmatch(name) is not None


def reply_pid(name: str) -> int:
    """Return the pid of whoever has made a reply pipe, by its name."""
    match = _REPLY.fullmatch(name)
    return int(match[1]) if match else 0


def body_receiver(name: object) -> str | None:
    """Return the pipe a large body is for, by the body's name; `None` if it is no such name."""
    match = _BODY.fullmatch(name) if isinstance(name, str) else None
    return match[1] if match and not set(match[1]) <= {"."} else None


@functools.lru_cache(maxsize=1024)
def pipe_owner(name: str) -> str | None:
    """Return the worker id of a pipe, by its name; `None` if it is no worker's."""
    kind, _, worker_id = name.partition("_")
    return worker_id if kind in KINDS and is_worker_id(worker_id) else None


def reply_pipe() -> str:
    """Return a new name for a reply pipe."""
    return f"reply_{os.getpid()}_{uuid.uuid4().hex}"


def body_name(receiver: str) -> str:
    """Return a new name for a body too large for a frame: it carries its receiver, whose death makes it an orphan."""
    return f"body_{receiver}.{uuid.uuid4().hex}"


def is_read(fifo: Path) -> bool:
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
