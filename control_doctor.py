"""What goes wrong in practice, looked for: ``doctor``.

Strategy: each examination is a function that yields what it finds, and for each what to do about it. One that cannot be
made is a finding itself.

Rules:
- Nothing is changed, and nothing is written but probes of whether something can be.
- A problem keeps messages from somebody, or will; a remark is for those who wonder.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import os
import re
import resource
import stat
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING or not __package__:
    import control
    import control_profiles
    import directories
    import files
    import presence
    import strangers
    import taskqueue
else:
    from . import control, control_profiles, directories, files, presence, strangers, taskqueue

_NETWORK = re.compile(
    r"nfs4?|cifs|smb3|smbfs|afs|ceph|lustre|gpfs|beegfs|glusterfs|fuse\.(sshfs|glusterfs)|9p|afpfs|webdav"
)
_ROOM_BYTES, _ROOM_FILES = 100 << 20, 1000
_READ_AT_MOST = 1000
_TMPFILES = ("/etc/tmpfiles.d", "/run/tmpfiles.d", "/usr/lib/tmpfiles.d")


@dataclass(frozen=True)
class Finding:
    """Something that is not as it should be."""

    what: str
    remedy: str
    problem: bool = True
    """Whether it keeps messages from somebody, or will."""


def examine(config_path: str | os.PathLike[str]) -> list[Finding]:
    """Look for what goes wrong in practice; an empty list says that nothing was found.

    :raises presence.CoordinatorError: it is no profile's directory, as far as can be known.
    """
    control.expect(Path(config_path))
    layout = directories.locate(config_path)
    if layout is None:
        return [Finding(f"no broker has run in {config_path} yet", "start what uses it", problem=False)]
    owner = os.stat(layout.queue).st_uid if layout.queue.exists() else os.geteuid()
    if owner != os.geteuid():
        return [Finding(f"{layout.queue} belongs to user {owner}", "run this as that user")]
    found: list[Finding] = []
    for examination in _EXAMINATIONS:
        try:
            found += examination(layout)
        except (OSError, ValueError, RuntimeError) as error:
            found.append(Finding(files.told(error), "do what it says, or ask whoever owns it"))
    return found


def _directories(layout: directories.Layout) -> Iterator[Finding]:
    directories.check(layout, *control_profiles.identity(layout.config_path))
    queues = [each.directory for each in control.queues(layout).values()]
    states = (queue / state for queue in queues for state in ("claimed", "completed", "failed"))
    for directory in (layout.config_path, layout.queue, layout.registry, layout.pipes, *queues, *states):
        try:
            status = os.stat(directory)
        except FileNotFoundError:
            continue  # Whoever comes next makes it.
        if status.st_uid != os.geteuid():
            yield Finding(f"{directory} belongs to user {status.st_uid}", f"run 'chown {os.geteuid()} {directory}'")
        elif not os.access(directory, os.R_OK | os.W_OK | os.X_OK):
            yield Finding(f"{directory} may not be listed, entered or written", f"run 'chmod 700 {directory}'")
        elif status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            yield Finding(f"others may write to {directory}", f"run 'chmod go-w {directory}'")


def _coordinator(layout: directories.Layout) -> Iterator[Finding]:
    said = control.status(layout.config_path)
    if not said["running"] and said["tasks"]["waiting"]:
        yield Finding(f"no coordinator runs, and {said['tasks']['waiting']} tasks wait", "start one by 'start'")
    if said["paused"]:
        yield Finding("all is paused: nothing new is started", "go on by 'resume'", problem=False)
    for queue in said["queues"]:
        if queue["waiting"] and not queue["subscribers"]:
            yield Finding(
                f"tasks wait in queue {queue['name']}, and nobody subscribes to it",
                "start a worker, unless somebody pulls from it",
                problem=queue["name"] == "default",
            )
        if queue["failed"]:
            yield Finding(
                f"{queue['failed']} tasks of queue {queue['name']} were given up on",
                "see why by 'tasks --errors', then 'requeue' or 'remove' them",
                problem=False,
            )
    for worker in said["workers"]:
        if worker["broadcasts_dropped"]:
            yield Finding(
                f"worker {worker['worker_id']} (pid {worker['pid']}) has missed {worker['broadcasts_dropped']} "
                "broadcasts, as it did not read them",
                "see what keeps its broadcast subscriber, or whether it is stopped",
            )


def _versions(layout: directories.Layout) -> Iterator[Finding]:
    said = presence.coordinator(layout)
    if said is not None and "since" in said and said.get("version") != directories.VERSION:
        yield Finding(
            f"the coordinator has version {said.get('version') or 'unknown'}, and this is {directories.VERSION}",
            "run 'restart'",
        )
    for worker in presence.workers(layout):
        if worker.version != directories.VERSION and presence.is_alive(layout, worker.worker_id):
            yield Finding(
                f"worker {worker.worker_id} (pid {worker.pid}) has version {worker.version or 'unknown'}, and this is "
                f"{directories.VERSION}",
                "restart it",
            )


def _strangers(layout: directories.Layout) -> Iterator[Finding]:
    found = list(itertools.islice(filter(None, strangers.strangers(layout)), 11))
    for path in found[:10]:
        yield Finding(f"{path} is none of the broker's, and is passed over", "move it elsewhere", problem=False)
    if len(found) > 10:
        yield Finding("there are more of them", "see the log, by 'logs'", problem=False)
    for directory in (layout.pipes, layout.registry, layout.queue):
        for name in files.listed(directory):
            with contextlib.suppress(FileNotFoundError):  # It has moved on.
                if os.lstat(directory / name).st_uid != os.geteuid():
                    yield Finding(f"{directory / name} is another user's", "have it removed")


def _own_files(layout: directories.Layout) -> Iterator[Finding]:
    """Whether what the broker needs is of the right kind: something else there keeps it from serving."""
    for path, kind, remedy in (
        *((layout.queue / name, stat.S_IFREG, "remove it") for name in ("format", "coordinator.lock")),
        (layout.queue / "coordinator.log", stat.S_IFREG, "remove it"),
        *((path, stat.S_IFDIR, "move it elsewhere") for path in (layout.pipes, layout.registry, layout.queue)),
        *(
            (each.directory / state, stat.S_IFDIR, "move it elsewhere")
            for each in control.queues(layout).values()
            for state in ("claimed", "completed", "failed")
        ),
    ):
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            if stat.S_IFMT((os.stat if kind == stat.S_IFDIR else os.lstat)(path).st_mode) != kind:
                yield Finding(f"{path} is no {'directory' if kind == stat.S_IFDIR else 'regular file'}", remedy)
    if os.path.lexists(layout.queue / "format") and "profile" not in directories.read_format(layout.config_path):
        yield Finding(f"{layout.queue / 'format'} does not say whose queue it is", "remove it")


def _stopped(layout: directories.Layout) -> Iterator[Finding]:
    """Whether a process is stopped, as far as the kernel tells."""
    pids = {"the coordinator": (presence.coordinator(layout) or {}).get("pid")}
    for worker in presence.workers(layout):
        if presence.is_alive(layout, worker.worker_id):
            pids[f"worker {worker.worker_id}"] = worker.pid
    for who, pid in pids.items():
        if presence.is_stopped(pid):
            yield Finding(f"{who} (pid {pid}) is stopped", f"let it go on by 'kill -CONT {pid}'")


def _tasks(layout: directories.Layout) -> Iterator[Finding]:
    for queue in control.queues(layout).values():
        for name in heapq.nsmallest(_READ_AT_MOST, queue.names()):
            try:
                taskqueue.Task.read(queue.file(name), name)
            except FileNotFoundError:
                continue
            except (OSError, taskqueue.Unreadable) as error:
                remedy = "move it elsewhere" if os.path.isdir(queue.file(name)) else f"remove it by 'remove {name}'"
                yield Finding(f"{queue.file(name)} cannot be read: {error}", remedy)


def _room(layout: directories.Layout) -> Iterator[Finding]:
    for directory in (layout.queue, layout.pipes):
        if not directory.is_dir():
            continue
        room = os.statvfs(directory)
        if room.f_bavail * room.f_frsize < _ROOM_BYTES:
            yield Finding(f"less than {_ROOM_BYTES >> 20} MiB are free for {directory}", "make room on that disk")
        if room.f_files > 0 and room.f_favail < _ROOM_FILES:
            yield Finding(f"there is hardly room for more files in {directory}", "remove files from that disk")
        probe = directory / f".doctor.{uuid.uuid4().hex}"
        try:
            files.write_whole(probe, b"probe")
        finally:
            files.remove(probe)


def _descriptors(layout: directories.Layout) -> Iterator[Finding]:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    # A coordinator holds a few for each worker, and a communicator some 14.
    wanted = 4 * sum(1 for _ in presence.workers(layout)) + 100
    if hard not in (resource.RLIM_INFINITY, -1) and hard < max(wanted, 256):
        yield Finding(
            f"a process may open {hard} files here, and a coordinator may want {max(wanted, 256)}",
            "raise it by 'ulimit -Hn', or in /etc/security/limits.conf",
        )


def _forgetful_tmp(layout: directories.Layout) -> Iterator[Finding]:
    """Whether something removes what is old in /tmp (tmpfiles.d(5)); what is gone is made again within ten seconds."""
    rules: dict[str, Path] = {}
    for directory in reversed(_TMPFILES):  # What comes first in the list hides files of the same name behind it.
        rules |= {name: Path(directory, name) for name in files.listed(directory) if name.endswith(".conf")}
    lines = [
        line.split()
        for path in rules.values()
        if path.is_file()
        for line in path.read_text(errors="replace").splitlines()
    ]
    ages = [line[5] for line in lines if len(line) > 5 and line[1] == "/tmp" and line[0][0] in "qQdDv"]
    kept = any(line[0][0] in "xX" and line[1].startswith("/tmp/aiida_") for line in lines if len(line) > 1)
    if any(age != "-" for age in ages) and not kept and os.path.isdir("/run/systemd/system"):
        yield Finding(
            "systemd removes what is old from /tmp, pipes too",
            "nothing is lost by that; to keep them, put 'x /tmp/aiida_*_pipes' into /etc/tmpfiles.d/aiida.conf",
            problem=False,
        )


def _file_system(layout: directories.Layout) -> Iterator[Finding]:
    for directory in (layout.queue, layout.pipes):
        kind = _kind(os.path.realpath(directory))
        if _NETWORK.fullmatch(kind):
            yield Finding(
                f"{directory} is on a network file system ({kind}), which is not supported",
                "name a directory on a disk of this machine by --config-path, or use RabbitMQ",
            )


def _kind(path: str) -> str:
    """Return the kind of file system that a path lies on, as far as the kernel tells (proc(5), mounts)."""
    try:
        mounts = [line.split() for line in Path("/proc/self/mounts").read_text(errors="replace").splitlines()]
    except OSError:
        return ""
    # A space, a tab, a line end and a backslash stand there as octal numbers.
    places = [(re.sub(r"\\([0-7]{3})", lambda digits: chr(int(digits[1], 8)), mount[1]), mount[2]) for mount in mounts]
    matching = [(len(place), kind) for place, kind in places if f"{path}/".startswith(f"{place.rstrip('/')}/")]
    return max(matching, default=(0, ""))[1]


_EXAMINATIONS: tuple[Callable[[directories.Layout], Iterator[Finding]], ...] = (
    _directories,
    _own_files,
    _coordinator,
    _stopped,
    _versions,
    _strangers,
    _tasks,
    _room,
    _descriptors,
    _forgetful_tmp,
    _file_system,
)
