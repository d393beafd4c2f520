"""The process that a task of AiiDA's is for: its pk, and from AiiDA's database its label and state.

Strategy: a task says in its body which process it starts or continues (`plumpy.process_comms`), and the database is
asked once for all of them.

Rules:
- AiiDA is imported when it is asked, as that takes a second, and it is asked only where the profile is one of its own.
- A task whose body is none of AiiDA's is for no process.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING or not __package__:
    import control_profiles
    import presence
else:
    from . import control_profiles, presence


def pk(body: object) -> int | None:
    """Return which process a task is for, by its body; `None` if it is for none."""
    arguments = body.get("args") if isinstance(body, dict) else None
    number = arguments.get("pid") if isinstance(arguments, dict) else None
    return number if isinstance(number, int) and not isinstance(number, bool) else None


def describe(config_path: Path, pks: Iterable[int]) -> dict[int, dict[str, Any]]:
    """Return what AiiDA says of processes, by their pks: ``pk``, ``label`` and ``state``; of those that it knows.

    :raises presence.CoordinatorError: the profile is none of AiiDA's, or AiiDA cannot be asked.
    """
    found = control_profiles.of(config_path)
    if found is None:
        raise presence.CoordinatorError(f"{config_path} is no profile of AiiDA's, so no process can be looked up")
    try:
        from aiida import load_profile, orm
        from aiida.manage.configuration import get_config

        own = get_config().dirpath
        if not os.path.samefile(own, found[0].directory):
            raise presence.CoordinatorError(f"AiiDA has its profiles in {own}: AIIDA_PATH says where it looks")
        load_profile(found[1])
        builder = orm.QueryBuilder().append(
            orm.ProcessNode,
            filters={"id": {"in": list(pks) or [0]}},
            project=["id", "attributes.process_label", "attributes.process_state"],
        )
        return {number: {"pk": number, "label": label, "state": state} for number, label, state in builder.iterall()}
    except ImportError as error:
        raise presence.CoordinatorError(f"AiiDA is not installed here: {error}") from error
    except presence.CoordinatorError:
        raise
    except Exception as error:
        raise presence.CoordinatorError(f"AiiDA cannot be asked: {type(error).__name__}: {error}") from error
