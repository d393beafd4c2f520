"""What a coordinator owes to whoever runs it: its log, word that it serves, and an answer to each signal.

Strategy: a shell, systemd's user manager and logrotate each have one way to ask for something, and to be told; here
they meet the coordinator, which knows none of them.

Rules:
- A signal is answered in the coordinator's own loop, and never without a line in the log.
- What ends: SIGTERM, SIGINT, SIGQUIT, and SIGHUP where standard error is a terminal, which is gone then. Elsewhere
  SIGHUP opens the log anew, as logrotate wants it. SIGUSR1 and others that would kill mean nothing.
- A full disk keeps no coordinator from serving, and nor does a terminal that is not read. Whoever starts it is told.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import logging
import logging.handlers
import os
import resource
import select
import signal
import stat
import sys
from collections.abc import Callable
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING or not __package__:
    import directories
else:
    from . import directories

_LOGGER = logging.getLogger("coordinator")


_MEANINGLESS = (
    *(signal.SIGUSR1, signal.SIGUSR2, signal.SIGALRM, signal.SIGVTALRM, signal.SIGPROF, signal.SIGIO),
    *(getattr(signal, name) for name in ("SIGPWR", "SIGSTKFLT") if hasattr(signal, name)),
    *(range(signal.SIGRTMIN, signal.SIGRTMAX + 1) if hasattr(signal, "SIGRTMIN") else ()),
)
"""What would end us by default (signal(7)), and nobody sends in earnest."""


class Log(logging.handlers.RotatingFileHandler):
    """The coordinator's log: ``coordinator.log`` and the three before it, of 1 MB each."""

    def __init__(self, file: Path) -> None:
        """
        :raises directories.DirectoryRefused: it is no file that could be written.
        """
        self._path = file
        if os.path.lexists(file) and not file.is_file():
            raise directories.DirectoryRefused(f"{file} is not a regular file: remove it.")
        try:
            self._open().close()
        except OSError as error:
            raise directories.DirectoryRefused(
                f"{file} cannot be written: {error.strerror}. Mend or remove it."
            ) from error
        super().__init__(file, maxBytes=1_000_000, backupCount=3, delay=True)
        self.trouble = ""
        """What kept the last line from being written; '' if nothing."""

    def _open(self) -> TextIOWrapper:
        """Open the file, as it may have been replaced: a FIFO does not block, and is refused.

        :raises OSError: it cannot be opened.
        """
        descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK, 0o600)
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise OSError(errno.EINVAL, "it is not a regular file", str(self._path))
        return os.fdopen(descriptor, "a", encoding="utf-8", errors="backslashreplace")

    def emit(self, record: logging.LogRecord) -> None:
        """Write a line, as `logging.Handler.emit` does."""
        self.trouble = ""
        super().emit(record)

    def doRollover(self) -> None:
        """Begin a new file; where the old ones are in the way, go on in this one."""
        try:
            super().doRollover()
        except OSError as error:
            self.trouble = str(error)
            self.stream = self._open()

    def reopen(self) -> None:
        """Let the next line open the file anew."""
        with contextlib.suppress(OSError):  # What could not be written has been said.
            self.close()

    def handleError(self, record: logging.LogRecord) -> None:
        """Keep what went wrong: a disk that is full later is no reason to print tracebacks."""
        self.trouble = str(sys.exc_info()[1])


class Terminal(logging.Handler):
    """What is logged, for whoever watches; a reader that does not read holds nobody up, and misses it."""

    def __init__(self, descriptor: int) -> None:
        """:param descriptor: of standard error."""
        super().__init__()
        with contextlib.suppress(OSError):
            # Opened once more, to be written to without blocking: other processes share standard error.
            descriptor = os.open(os.ttyname(descriptor), os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY)
        self._descriptor = descriptor

    def emit(self, record: logging.LogRecord) -> None:
        """Write of a line what can be written now."""
        line = f"{self.format(record)}\n".encode(errors="backslashreplace")
        with contextlib.suppress(OSError):  # It is full, or closed.
            while line and select.select([], [self._descriptor], [], 0.0)[1]:
                line = line[os.write(self._descriptor, line[: select.PIPE_BUF]) :]


def log_to(file: Path, *, terminal: bool) -> Log:
    """Write what is logged to a file, and to the terminal if that is wanted.

    :raises directories.DirectoryRefused: it is no file that could be written.
    """
    log = Log(file)
    handlers: list[logging.Handler] = [log]
    if terminal and sys.stderr is not None:
        handlers.append(Terminal(sys.stderr.fileno()))
    logging.raiseExceptions = False  # Whoever closes the terminal is not to be told so.
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", handlers=handlers)
    return log


def notify(state: str) -> None:
    """Tell systemd, where it has started us and waits for it, how we are (sd_notify(3)).

    :param state: ``READY=1`` or ``STOPPING=1``.
    """
    address = os.environ.get("NOTIFY_SOCKET", "")
    if address:
        import socket

        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ours:
            # One that begins with '@' is no file (unix(7), abstract).
            ours.connect(f"\0{address[1:]}" if address.startswith("@") else address)
            ours.send(state.encode())


def answer_signals(log: Log, call: Callable[[Callable[[], object]], None], stop: Callable[[str], object]) -> None:
    """Answer each signal that would end us without a word.

    :param call: has something done in the coordinator's loop; safe in a signal handler.
    :param stop: ends the coordinator, and is told why. In its loop.
    """

    def reopen(name: str) -> None:
        log.reopen()
        _LOGGER.info("%s: the log was opened anew", name)

    def pass_over(name: str) -> None:
        _LOGGER.info("Passed over %s, which means nothing here", name)

    has_terminal = sys.stderr is not None and sys.stderr.isatty()
    for number, action in (
        (signal.SIGTERM, stop),
        (signal.SIGINT, stop),
        (signal.SIGQUIT, stop),
        (signal.SIGHUP, stop if has_terminal else reopen),
        *((each, pass_over) for each in _MEANINGLESS),
    ):
        if (
            signal.getsignal(number) is not signal.SIG_IGN
        ):  # As nohup has it, or a shell for what it runs behind itself.
            signal.signal(number, functools.partial(_ask, call, action))


def _ask(
    call: Callable[[Callable[[], object]], None], action: Callable[[str], object], number: int, _frame: object
) -> None:
    names = {each.value: each.name for each in signal.Signals}  # Most real-time signals have none.
    call(functools.partial(action, names.get(number, f"signal {number}")))


def raise_limit() -> None:
    """Allow as many descriptors as the system gives: macOS says "infinity", and refuses that."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    for wanted in (hard, 1 << 20, 1 << 16, 10240):
        if wanted == resource.RLIM_INFINITY or (hard != resource.RLIM_INFINITY and wanted > hard):
            continue
        if soft != resource.RLIM_INFINITY and wanted > soft:
            with contextlib.suppress(ValueError, OSError):
                resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
                return
