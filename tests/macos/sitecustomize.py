"""Makes Linux as much like macOS as it can be: for each Python that starts with this directory in its path.

A name that differs from one in its directory only in case is that one: whoever looks for it finds it, and whoever makes
it finds it taken. Names with a random part are passed over, which nobody writes in another case, and so is "paused",
which is asked for before and after each claim: to list a long queue each time is the cost of this file alone.
"""

import contextlib
import fcntl
import functools
import os
import re
import select
import selectors
from collections.abc import Callable
from typing import Any

select.PIPE_BUF = 512
selectors.DefaultSelector = selectors.SelectSelector
with contextlib.suppress(AttributeError):
    del fcntl.F_SETPIPE_SZ

_OURS = ("/tmp/aiida_", "/tmp/pytest-")
_PASSED_OVER = re.compile("[0-9a-f]{8}|^paused$")
_lstat, _listdir = os.lstat, os.listdir


def _actual(path: Any) -> Any:
    text = os.fspath(path) if isinstance(path, str | os.PathLike) else ""
    if not text.startswith(_OURS) or _exists(text):
        return path
    directory, _, name = text.rpartition("/")
    directory = _actual(directory)
    if not _PASSED_OVER.search(name):
        with contextlib.suppress(OSError):
            name = next((found for found in _listdir(directory) if found.casefold() == name.casefold()), name)
    return f"{directory}/{name}"


def _exists(path: str) -> bool:
    try:
        _lstat(path)
    except (OSError, ValueError):
        return False
    return True


def _folding(function: Callable[..., Any], *positions: int) -> Callable[..., Any]:
    @functools.wraps(function)
    def folded(*arguments: Any, **options: Any) -> Any:
        given = list(arguments)
        for position in positions:
            if position < len(given):
                given[position] = _actual(given[position])
        return function(*given, **options)

    return folded


for _name in ("chmod", "listdir", "lstat", "mkdir", "mkfifo", "open", "readlink", "rmdir", "scandir", "stat", "unlink"):
    setattr(os, _name, _folding(getattr(os, _name), 0))
os.utime = _folding(os.utime, 0)
os.symlink = _folding(os.symlink, 1)
os.link, os.rename, os.replace = (_folding(function, 0, 1) for function in (os.link, os.rename, os.replace))
