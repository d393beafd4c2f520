"""Messages too large for a frame: a file beside the pipe, named in the frame (the claim check pattern).

Strategy: what does not fit a frame is written to ``body_{receiver}.{uuid}``, and whoever receives it unlinks it. The
name carries the receiver, so that it is known whose it is, and that it is an orphan once its receiver is dead.

Rules:
- A receiver may look for bodies itself, so one appears under its name only when it is whole.
- A broadcast's body is linked once for each receiver, and copied for none.
- A name that came in a frame is used only where it is that of a body for this very receiver.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING or not __package__:
    import directories
    import files
    import frames
    from poller import Poller
else:
    from . import directories, files, frames
    from .poller import Poller


def pack(text: str, receiver: Path) -> bytes:
    """Put a message's text into a frame for `receiver`, by way of a file where it is too large.

    :raises OSError: the file cannot be written (no room, say); nothing is left of it.
    """
    return frames.frame(text) or pack_body(text, receiver)


def pack_body(text: str, receiver: Path) -> bytes:
    """Put a message's text into a file for `receiver`, and return the frame that names it.

    :raises OSError: the file cannot be written; nothing is left of it.
    """
    body = receiver.with_name(directories.body_name(receiver.name))
    # Its receiver may look for bodies itself, and must not meet half of one.
    files.write_whole(body, text.encode())
    return frames.claim_check(body.name)


def readdress(data: bytes, receiver: Path, source: Path) -> bytes:
    """Return the frame for one more receiver: the same bytes, but that a large body gets a link for each.

    :raises OSError: the body is not there, or cannot be linked.
    """
    body = claimed_body(data, source)
    if body is None:
        return data
    link = receiver.with_name(directories.body_name(receiver.name))
    os.link(body, link, follow_symlinks=False)
    return frames.claim_check(link.name)


def claimed_body(data: bytes, receiver: Path) -> Path | None:
    """Return the file that a frame for `receiver` names; `None` if the message is in the frame itself."""
    name = frames.claimed(data)
    return receiver.with_name(name) if name and directories.body_receiver(name) == receiver.name else None


def discard(data: bytes, receiver: Path) -> None:
    """Drop a frame that will not be delivered, and the file it names."""
    body = claimed_body(data, receiver)
    if body is not None:
        with contextlib.suppress(OSError):
            body.unlink()


def unpack(data: bytes, receiver: Path, poller: Poller | None = None) -> frames.Message:
    """Return the message in a frame, and unlink the file it named.

    :param poller: whose spare descriptor is used where there is no other.
    :raises frames.Garbage: it is no JSON object, or names a file that is not one of this receiver's.
    :raises FileNotFoundError: the file it names has been read already, or removed.
    :raises OSError: the file cannot be read now; it stays.
    """
    message = frames.parse(data[frames.HEADER_SIZE :])
    if "body_file" not in message:
        return message
    body = claimed_body(data, receiver)
    if body is None:
        raise frames.Garbage("it names a file that is not for this pipe")
    text = _read_body(body, poller)
    with contextlib.suppress(OSError):
        body.unlink()
    return frames.parse(text)


def _read_body(body: Path, poller: Poller | None) -> bytes:
    try:
        return files.read(body)
    except files.NotAFile as error:
        raise frames.Garbage("it names something that is not a regular file") from error
    except OSError as error:
        if poller is None or error.errno not in files.NO_DESCRIPTOR:
            raise
        with poller.spare_descriptor():
            return _read_body(body, None)


def size(data: bytes, receiver: Path) -> int:
    """Return how many bytes the file that a frame names has; 0 if there is none."""
    body = claimed_body(data, receiver)
    try:
        return os.lstat(body).st_size if body is not None else 0
    except OSError:
        return 0
