"""Files and directories that others may have replaced, removed or left half done.

Strategy: read what is there as if a stranger had put it there, and write so that nobody ever meets half of it.

Rules:
- A file appears under its name only when it is whole: it is written under a dot-name and renamed.
- What is read is no symlink, directory or socket, and reading it never blocks: a FIFO may lie where a file should.
- A directory that is not there, or is none, is empty.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

NO_DESCRIPTOR = (errno.EMFILE, errno.ENFILE)
"""What the system says of a file that cannot be opened as too many are: it may be, a moment later."""
_READ_SIZE = 1 << 16
_DRAFT_KEPT_SECONDS = 3600.0
_DRAFT = re.compile(r"\..+\.[0-9a-f]{32}|\.\d{20}-[0-9a-f]{8}")


class NotAFile(ValueError):
    """Something that is not a regular file lies where one should."""


def read(path: Path | str) -> bytes:
    """Return what a file holds, with as few system calls as it takes: this is done for each task.

    :raises NotAFile: it is a directory, a symlink or a socket. (A FIFO holds what lies in it.)
    :raises OSError: it cannot be read now.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO):
            raise NotAFile(f"{path} is not a regular file") from error
        raise
    try:
        data = os.read(descriptor, _READ_SIZE)
        if len(data) < _READ_SIZE:
            return data
        parts = [data]
        while parts[-1]:
            parts.append(os.read(descriptor, 16 * _READ_SIZE))
        return b"".join(parts)
    except IsADirectoryError as error:
        raise NotAFile(f"{path} is not a regular file") from error
    except BlockingIOError:
        return b""
    finally:
        os.close(descriptor)


def write_whole(path: Path, data: bytes, *, durable: bool = False) -> None:
    """Write a file so that nobody ever meets half of it.

    :param durable: wait until the disk has what is in it.
    :raises OSError: it cannot be written; nothing is left of it.
    """
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with open(descriptor, "wb", buffering=0) as file:
            write_all(file.fileno(), data, path)
            if durable:
                sync(file.fileno())
        draft.rename(path)
    except BaseException:
        with contextlib.suppress(OSError):
            draft.unlink()
        raise


def write_all(descriptor: int, data: bytes, path: Path | str) -> None:
    """Write all of it, in as many calls as it takes.

    :param path: what it is for, to be named by the exception.
    :raises OSError: it cannot be written.
    """
    left = memoryview(data)
    try:
        while left:
            left = left[os.write(descriptor, left) :]
    except OSError as error:
        error.filename = str(path)  # Of which write(2) knows nothing.
        raise


def told(error: Exception) -> str:
    """Return in one sentence what was wrong; of what the system refused, where."""
    if isinstance(error, OSError) and error.strerror:
        where = error.filename2 or error.filename  # Of two, as a rename has, it is the new one that cannot be made.
        return f"{where}: {error.strerror}" if where else error.strerror
    return str(error)


def replace_symlink(target: Path | str, link: Path) -> None:
    """Make a symlink, in one step even where there is one already."""
    draft = link.with_name(f".{link.name}.{uuid.uuid4().hex}")
    os.symlink(target, draft)
    try:
        draft.rename(link)
    except BaseException:
        remove(draft)
        raise


def sync(descriptor: int) -> None:
    """Wait until the disk has it: macOS's fsync(2) only hands it to the drive, and its F_FULLFSYNC waits (fcntl(2))."""
    if hasattr(fcntl, "F_FULLFSYNC"):
        with contextlib.suppress(OSError):
            fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
            return
    os.fsync(descriptor)


def sync_directory(directory: Path | str) -> None:
    """Wait until the disk has a directory's entries."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        sync(descriptor)
    finally:
        os.close(descriptor)


def make_directories(directory: Path, *, durable: bool = True) -> None:
    """Make a directory, and its parents, for this user alone (`os.makedirs` leaves parents open to others).

    :param durable: wait until the disk has those that are made.
    """
    if directory.is_dir():
        return
    make_directories(directory.parent, durable=durable)
    with contextlib.suppress(FileExistsError):
        directory.mkdir(mode=0o700)
    if durable:
        sync_directory(directory.parent)


def listed(directory: Path | str, *, hidden: bool = False) -> Iterator[str]:
    """Yield the names in a directory as the disk gives them, one by one: there may be 100,000.

    :param hidden: those that begin with a dot, rather than the others.
    """
    try:
        with os.scandir(directory) as entries:
            for entry in entries:
                if entry.name.startswith(".") == hidden:
                    yield entry.name
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            raise


def is_in_place(path: Path | str, descriptor: int) -> bool:
    """Say whether a name still leads to what a descriptor has open."""
    try:
        ours, there = os.fstat(descriptor), os.lstat(path)
    except OSError:
        return False
    return (ours.st_dev, ours.st_ino) == (there.st_dev, there.st_ino)


def is_there(path: Path | str) -> bool:
    """Say whether something has this name.

    :raises OSError: the kernel did not say, as where a directory may not be entered: that is no proof.
    """
    try:
        os.lstat(path)
        return True
    except (FileNotFoundError, NotADirectoryError):
        return False


def is_older(path: Path | str, seconds: float) -> bool:
    """Say whether something was last moved or changed so long ago; what is gone is not."""
    try:
        return os.lstat(path).st_ctime < time.time() - seconds
    except OSError:
        return False


def remove(path: Path | str) -> bool:
    """Remove a file; say whether this call did."""
    try:
        os.unlink(path)
        return True
    except OSError:
        return False


def is_draft(name: str) -> bool:
    """Say whether a name is one that something half written has here, and no dot-file of somebody else's."""
    return _DRAFT.fullmatch(name) is not None


def sweep_drafts(directory: Path) -> Iterator[bool]:
    """Remove what writers that died left half written, in steps: it yields whether it has removed something."""
    for name in filter(is_draft, listed(directory, hidden=True)):
        path = directory / name
        try:
            old = os.lstat(path).st_mtime < time.time() - _DRAFT_KEPT_SECONDS
        except OSError:
            continue
        yield old and remove(path)
