#!/usr/bin/env python3
"""The script of the coordinator: ``python coordinator.py --profile NAME``, and a command where one is given.

Strategy: what serves is `PipeCoordinator`, of ``sharing.py``. Here it becomes a process: in the foreground, or in the
background for whoever has started it and waits to hear that it serves.

Rules:
- Whoever has started it hears one thing: that it serves, or why it does not.
- One that has ended as it was left alone looks for communicators one last time when it has let go of everything: who
  comes and finds no lock starts another, and who found one is found.
- A script is compiled anew each time that it is run, so it is short; and what serves is loaded where it is to serve.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if not __package__ and (_here := os.path.dirname(os.path.realpath(__file__))) not in sys.path:
    sys.path.insert(0, _here)  # Where PYTHONSAFEPATH keeps a script from its neighbours.

if TYPE_CHECKING or not __package__:
    import directories
    import files
    import presence
else:
    from . import directories, files, presence

_LOGGER = logging.getLogger("coordinator")


def serve(
    profile_name: str,
    config_path: Path,
    *,
    profile_uuid: str | None = None,
    idle: float | None = None,
    ready: int | None = None,
) -> None:
    """Serve in the foreground until a signal ends it (``service.py``).

    :param profile_uuid: what tells this profile from another one that had its name; `None` matches all.
    :param idle: for how many seconds it serves on where no communicator is; `None`: as long as it may.
    :param ready: a descriptor for whoever waits in another process; this one then goes to the background. It is told
        ``ready {pid} {warning}``, or why it does not serve, and is closed.
    :raises presence.CoordinatorError: another one runs for this configuration.
    :raises OSError: a directory, the log or a pipe cannot be used (`directories.DirectoryRefused` among them).
    :raises ValueError: the profile name cannot be used.
    """
    starter = _Starter(ready)
    try:
        if ready is not None and os.fork():
            os._exit(0)  # It is nobody's child: it outlives whoever started it, and whoever kills all its children.
        if ready is not None:
            # What waits there, if anything does, waits for word of whoever has started us.
            os.environ.pop("NOTIFY_SOCKET", None)
        # Before it has its lock, which would be taken for that of one that serves.
        layout = directories.establish(profile_name, config_path, profile_uuid)
        _serve(profile_name, layout, idle, starter)
    except Exception as error:
        starter.tell(files.told(error))
        raise


class _Starter:
    """Whoever has started us, and waits in another process to hear whether we serve; it hears one thing."""

    def __init__(self, descriptor: int | None) -> None:
        self.is_here = descriptor is None
        """It is a person or a supervisor that runs us in the foreground."""
        self._waiting = [] if descriptor is None else [descriptor]

    def tell(self, text: str) -> None:
        # Once, as its number may be another file's afterwards; and whoever waited may be gone.
        while self._waiting:
            descriptor = self._waiting.pop()
            with contextlib.suppress(BrokenPipeError):
                # One line, as somebody who was forked meanwhile may keep the other end open.
                os.write(descriptor, text.replace("\n", " ").encode(errors="surrogateescape") + b"\n")
            os.close(descriptor)


def _serve(profile_name: str, layout: directories.Layout, idle: float | None, starter: _Starter) -> None:
    if TYPE_CHECKING or not __package__:
        import service
        from sharing import PipeCoordinator
    else:
        from . import service
        from .sharing import PipeCoordinator

    file = layout.queue / "coordinator.log"
    log = service.log_to(file, terminal=starter.is_here)
    service.raise_limit()

    def on_ready() -> None:
        trouble = f"{file} cannot be written: {log.trouble}" if log.trouble else ""
        if trouble:
            _LOGGER.warning("%s", trouble)  # For the terminal.
        starter.tell(f"ready {os.getpid()} {trouble}")
        service.notify("READY=1")

    ended = False
    while not ended:
        coordinator = PipeCoordinator(profile_name, layout.config_path, idle, layout.owner.uuid)
        service.answer_signals(log, coordinator.call, coordinator.end)
        try:
            coordinator.run(on_ready, lambda: service.notify("STOPPING=1"))
        except Exception as error:
            expected = isinstance(error, presence.CoordinatorError | directories.DirectoryRefused)
            _LOGGER.error("The coordinator ends: %s", files.told(error), exc_info=not expected)
            raise
        ended = not coordinator.company.has_come_back()


def main(arguments: list[str] | None = None, prog: str = "", where: tuple[str, Path] | None = None) -> int:
    """Run the command line; return the exit status.

    :param prog: what its user has called, where that is more than the name of a script.
    :param where: the name and directory of the profile, where these arguments are not to say which.
    """
    # Not at the top: it is no part of what serves. It is told how to serve, since what runs as a script is called
    # `__main__`, and importing it by its name would load it a second time.
    if TYPE_CHECKING or not __package__:
        import control_line
    else:
        from . import control_line
    return control_line.main(arguments, serve, prog or os.path.basename(sys.argv[0]) or "coordinator.py", where)


def __getattr__(name: str) -> Any:
    """Give `PipeCoordinator` to whoever asks for it here (PEP 562)."""
    if name != "PipeCoordinator":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if TYPE_CHECKING or not __package__:
        import sharing
    else:
        from . import sharing
    return sharing.PipeCoordinator


if __name__ == "__main__":
    sys.exit(main())
