"""Finding the dead without a coordinator, by hand: where the specification has this function.

Strategy: it is a burial of everybody who is dead (``burial.py``), and a sweep of what nobody can use any more.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING or not __package__:
    import burial
    import directories
else:
    from . import burial, directories


def cleanup_dead_processes(config_path: str | os.PathLike[str]) -> int:
    """Remove what dead processes left: pipes, routes and registry entries; their tasks wait again.

    :param config_path: the profile's configuration directory.
    :return: how many dead workers and coordinators were found.
    """
    layout = directories.locate(config_path)
    return burial.clean_up(layout) if layout is not None else 0
