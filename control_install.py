"""What an operator asks of all installations at once, and how one goes: list, delete.

Strategy: what runs is found by its pipes directory in /tmp, which names its configuration; what does not, by the
profiles that AiiDA's ``config.json`` names. AiiDA itself is not imported: its configuration is JSON.

Rules:
- Nothing is removed where anybody lives, and nothing but what the broker has made, with the profile's directory around
  it where that is left empty.
- Whose a pipes directory is, is asked again before it is removed: the note of where it lies may have been edited.
- One configuration that cannot be read hides no other.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING or not __package__:
    import control
    import control_profiles
    import directories
    import files
    import presence
    import strangers
else:
    from . import control, control_profiles, directories, files, presence, strangers


def installations(warn: Callable[[Exception], object] = lambda error: None) -> list[dict[str, Any]]:
    """Return the profiles of this user that have used the broker; the answer is what ``list --json`` prints.

    :param warn: told of what cannot be read, which hides nothing else.
    """
    rows = []
    for config in dict.fromkeys([*(config for _, config in directories.configurations()), *_of_aiida()]):
        try:
            layout = directories.locate(config)
            if layout is not None:
                rows.append(_row(layout))
        except (OSError, ValueError) as error:
            warn(error)
    return sorted(rows, key=lambda row: (str(row["profile"]), row["directory"]))


def _row(layout: directories.Layout) -> dict[str, Any]:
    said = presence.coordinator(layout)
    queues = control.queues(layout).values()
    return {
        "profile": _profile(layout.config_path),
        "running": said is not None,
        "pid": said["pid"] if said else None,
        "waiting": sum(1 for queue in queues for _ in queue.names()),
        "claimed": sum(1 for queue in queues for _ in queue.claimed()),
        "failed": sum(1 for queue in queues for _ in queue.names("failed")),
        "directory": str(layout.config_path),
        "pipes": str(layout.pipes),
    }


def _profile(config_path: Path) -> str | None:
    name = directories.read_format(config_path).get("profile")
    return control_profiles.identity(config_path)[0] if name is None else str(name)


def _of_aiida() -> Iterator[Path]:
    """Yield the directories of the profiles that AiiDA knows."""
    with contextlib.suppress(OSError, ValueError):
        profiles = control_profiles.read(control_profiles.aiidas_directory())
        if profiles is None:
            return
        for name in profiles.known:
            with contextlib.suppress(OSError, ValueError):  # A name that can be no directory's.
                yield Path(os.path.realpath(profiles.path(name)))


def delete(config_path: str | os.PathLike[str]) -> tuple[list[Path], list[Path]]:
    """Remove the queue of a profile, with all its tasks, and its pipes; a coordinator is stopped.

    :return: the directories that are gone, and what is left in them as it is none of the broker's.
    :raises presence.CoordinatorError: somebody uses it, or the coordinator does not end.
    :raises OSError: something cannot be removed.
    """
    layout = control.own(config_path)
    _refuse_inhabited(layout)
    control.stop(config_path)
    _refuse_inhabited(layout)
    # Asked before anything is removed, as what is what depends on where it lies.
    strange = {path for path in strangers.strangers(layout) if path}
    pipes = [layout.pipes] if (layout.pipes, layout.config_path) in directories.configurations() else []
    if not pipes:
        with contextlib.suppress(OSError):  # One that was interrupted may have left it empty, and nobody's.
            layout.pipes.rmdir()
    removed, left = [], []
    for directory in (*pipes, layout.registry, layout.queue):
        if directory.is_dir():
            left += _remove(directory, strange)
            if not os.path.lexists(directory):
                removed.append(directory)
    if layout.config_path.parent.name == "profiles":
        with contextlib.suppress(OSError):  # AiiDA makes none: whoever has something to put there does.
            layout.config_path.rmdir()
            removed.append(layout.config_path)
    return removed, left


def _remove(directory: Path, strange: set[str]) -> list[Path]:
    """Remove a directory and all in it that is the broker's; return what is not."""
    left = []
    # What says whose a directory is goes last: what is interrupted can be done again.
    for path in sorted(directory.iterdir(), key=lambda path: path.name in ("format", ".config")):
        ours = not path.name.startswith(".") or path.name == ".config" or files.is_draft(path.name)
        if str(path) in strange or not ours:
            left.append(path)
        elif path.is_dir() and not path.is_symlink():
            left += _remove(path, strange)
        else:
            path.unlink()
    if not left:
        directory.unlink() if directory.is_symlink() else directory.rmdir()
    return left


def _refuse_inhabited(layout: directories.Layout) -> None:
    pids = sorted(set(presence.communicators(layout)))
    if pids:
        some = ", ".join(str(pid or "?") for pid in pids[:10]) + (
            f" and {len(pids) - 10} more" if len(pids) > 10 else ""
        )
        raise presence.CoordinatorError(f"{layout.config_path} is in use: end the processes {some} first")
