"""Which profiles AiiDA knows, and where they are, read from its ``config.json``.

Strategy: AiiDA's directory is found as AiiDA finds it (``aiida.manage.configuration.settings``), but AiiDA itself is
not imported, which would take a second: its configuration is JSON.

Rules:
- Where AiiDA has a configuration, a profile is one that stands in it. Where it has none, any name will do: its
  directory is where AiiDA would have it.
- What cannot be read is no reason to guess: one sentence says so.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING or not __package__:
    import files
else:
    from . import files


@dataclass(frozen=True)
class Profiles:
    """What AiiDA's configuration says of its profiles."""

    directory: Path
    known: dict[str, Any]
    current: str | None
    """The one that is meant where none is named."""

    def path(self, name: str) -> Path:
        """Return the directory of a profile."""
        return self.directory / "profiles" / name

    def uuid(self, name: str) -> str | None:
        """Return what tells a profile from an earlier one of its name; `None` where nothing does."""
        said = self.known.get(name)
        uuid = said.get("PROFILE_UUID") if isinstance(said, dict) else None
        return uuid if isinstance(uuid, str) and uuid else None


def aiidas_directory() -> Path:
    """Return where AiiDA has its configuration: of the directories in ``AIIDA_PATH``, the first that is there."""
    found = Path(os.path.expanduser("~"), ".aiida")
    for path in filter(None, os.environ.get("AIIDA_PATH", "").split(":")):
        named = Path(os.path.expanduser(path))
        found = named if named.name == ".aiida" else named / ".aiida"
        if found.is_dir():
            break
    return found.absolute()


def read(directory: Path) -> Profiles | None:
    """Read AiiDA's configuration; `None` where it has none.

    :raises ValueError: it is not one that AiiDA would read.
    :raises OSError: it cannot be read.
    """
    path = directory / "config.json"
    try:
        said = json.loads(files.read(path))
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}, AiiDA's configuration, is no JSON ({error}): mend it") from error
    known = said.get("profiles", {}) if isinstance(said, dict) else None
    if not isinstance(known, dict):
        raise ValueError(f"{path}, AiiDA's configuration, has no list of profiles: mend it")
    current = said.get("default_profile")
    return Profiles(directory, known, current if isinstance(current, str) and current in known else None)


def current() -> str | None:
    """Return the name of the profile that is meant where none is named; `None` where AiiDA has none.

    :raises ValueError: AiiDA's configuration is not one.
    :raises OSError: it cannot be read.
    """
    profiles = read(aiidas_directory())
    return profiles.current if profiles is not None else None


def find(name: str) -> Path:
    """Return the directory of a profile.

    :raises ValueError: the name would lead elsewhere, AiiDA does not know it, or its configuration is not one.
    :raises OSError: AiiDA's configuration cannot be read.
    """
    if name in ("", ".", "..") or "/" in name or "\0" in name:
        raise ValueError(f"{name!r} is no name of a profile; name its directory by --config-path")
    profiles = read(aiidas_directory())
    if profiles is None:
        return aiidas_directory() / "profiles" / name
    if name not in profiles.known:
        some = ", ".join(sorted(profiles.known)) or "no profiles"
        raise ValueError(
            f"AiiDA knows no profile '{name}': {profiles.directory / 'config.json'} has {some}. For one that is not "
            "AiiDA's, name its directory by --config-path"
        )
    return profiles.path(name)


def of(config_path: Path) -> tuple[Profiles, str] | None:
    """Return to which of AiiDA's profiles a directory belongs, whatever links lead there; `None`: to none.

    That is said by the ``config.json`` above it, and otherwise, as it may lie elsewhere, by that of the user.

    :raises ValueError: the ``config.json`` above it is not AiiDA's configuration.
    :raises OSError: it cannot be read.
    """
    real = Path(os.path.realpath(config_path))
    above = [path.parent.parent for path in (config_path, real) if path.parent.name == "profiles"]
    for directory in dict.fromkeys(above):
        if (found := _of(directory, real, config_path.name)) is not None:
            return found
    with contextlib.suppress(ValueError, OSError):
        return _of(aiidas_directory(), real, config_path.name)
    return None


def _of(directory: Path, real: Path, called: str) -> tuple[Profiles, str] | None:
    profiles = read(directory)
    # A link may give one directory to two.
    for name in sorted(profiles.known, key=lambda name: name != called) if profiles is not None else ():
        with contextlib.suppress(ValueError, OSError):  # A name that can be no directory's.
            if profiles is not None and os.path.realpath(profiles.path(name)) == str(real):
                return profiles, name
    return None


def identity(config_path: Path) -> tuple[str | None, str | None]:
    """Return the name of a directory's profile, and what tells it from an earlier one of its name, as far as known.

    :raises ValueError: the ``config.json`` above it is not AiiDA's configuration.
    :raises OSError: it cannot be read.
    """
    found = of(config_path)
    return (found[1], found[0].uuid(found[1])) if found else (None, None)


def uuid(config_path: Path) -> str | None:
    """Return what `identity` does of the latter."""
    return identity(config_path)[1]


def command(name: str, config_path: Path) -> str:
    """Return what the command line is called for a profile, where this broker has come from."""
    if __package__ and __package__.startswith("aiida."):
        return shlex.join(["verdi", "-p", name, "coordinator"])
    script = Path(__file__).absolute().with_name("coordinator.py")
    words = ["aiida-coordinator"] if __package__ else [sys.executable, str(script)]
    try:
        found = find(name) == config_path
    except (OSError, ValueError):
        found = False
    return shlex.join([*words, "--profile", name, *([] if found else ["--config-path", str(config_path)])])
