"""What a command prints: its answers on standard output, its complaints on standard error.

Strategy: each is written out at once, so that what cannot be printed is known while something can be said about it.

Rules:
- What is for a stream that is closed goes nowhere, and never to the other one.
- A stream that cannot be written is led to nowhere: Python would complain of it at its end, by a status of its own.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING or not __package__:
    import control_words as words
    import files
    import presence
else:
    from . import control_words as words
    from . import files, presence


class SeenEnough(Exception):
    """Whoever reads what we print has gone, as `head` does."""


def prepare() -> None:
    """Let all be printed that may be in a name, whether or not the terminal has it; and what is logged go nowhere."""
    logging.lastResort = logging.NullHandler()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            with contextlib.suppress(OSError, ValueError):  # It is closed.
                stream.reconfigure(errors="backslashreplace")


def answer(text: str) -> None:
    """Print a text, and the end of its line if it has none.

    :raises presence.CoordinatorError: that cannot be done.
    :raises SeenEnough: nobody reads it any more.
    """
    try:
        _write(sys.stdout, text if text.endswith(("\n", "\033[J")) else f"{text}\n" if text else "")
    except BrokenPipeError:
        raise SeenEnough from None
    except OSError as error:
        raise presence.CoordinatorError(f"what it has to say cannot be printed: {error.strerror}") from error


def complain(prog: str, error: Exception, status: int) -> int:
    """Say what is wrong, as far as somebody reads it; return the status.

    :param prog: what its user has called.
    """
    ask(f"{prog}: {words.flat(files.told(error))}\n")
    return status


def ask(text: str) -> None:
    """Print something for whoever watches, as far as somebody does."""
    with contextlib.suppress(OSError):
        _write(sys.stderr, text)


def _write(stream: TextIO | None, text: str) -> None:
    if stream is None or stream.closed:
        return
    try:
        stream.write(text)
        stream.flush()
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        with contextlib.suppress(OSError, AttributeError):  # It has no descriptor.
            os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
        raise
