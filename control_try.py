"""What an operator sends to see whether it all works: a task, a call, a broadcast.

Strategy: a communicator like any other, made for one message.

Rules:
- kiwipy is imported only when something is to be sent.
- What ends an operator's wait ends no task: it is on the disk, and its outcome is dropped.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import kiwipy

if TYPE_CHECKING or not __package__:
    import control
    import control_profiles
    import presence
    from pipebroker import PipeCommunicator
else:
    from . import control, control_profiles, presence
    from .pipebroker import PipeCommunicator


def send(
    profile_name: str,
    config_path: str | os.PathLike[str],
    body: Any,
    queue: str | None = None,
    *,
    wait: bool,
    timeout: float | None = None,
) -> Any:
    """Send a task, and wait for its outcome if that is wanted.

    :param queue: the name of a queue; `None`: the default one.
    :param timeout: for how many seconds at most; `None`: as long as it takes.
    :return: the outcome; `None` where it is not waited for.
    :raises control.TimedOut: it has not come in time; the task is there all the same.
    :raises presence.CoordinatorError: the task failed.
    """
    with _communicator(profile_name, config_path) as communicator:
        sender: Any = communicator
        if queue not in (None, "default"):
            sender = communicator.task_queue(control.meant(str(queue)))
        future = sender.task_send(body, no_reply=not wait)
        with _in_words("the task was accepted, and its outcome has not come"):
            return _outcome(future, timeout) if wait else None


def call(
    profile_name: str, config_path: str | os.PathLike[str], identifier: str, body: Any, timeout: float | None = None
) -> Any:
    """Call an RPC subscriber, and return what it answers.

    :param timeout: for how many seconds at most; `None`: as long as it takes.
    :raises control.TimedOut: no answer has come in time.
    :raises presence.CoordinatorError: nobody has this identifier, or it raised or died.
    """
    with _communicator(profile_name, config_path) as communicator, _in_words("no answer has come"):
        return _outcome(communicator.rpc_send(identifier, body), timeout)


def broadcast(
    profile_name: str, config_path: str | os.PathLike[str], body: Any, sender: str | None, subject: str | None
) -> None:
    """Send a broadcast; it is kept for the next coordinator if none runs."""
    with _communicator(profile_name, config_path) as communicator:
        communicator.broadcast_send(body, sender=sender, subject=subject)


@contextlib.contextmanager
def _communicator(profile_name: str, config_path: str | os.PathLike[str]) -> Iterator[PipeCommunicator]:
    control.find(config_path)  # A mistyped profile is not to be made.
    profile_uuid = control_profiles.uuid(Path(config_path))
    with PipeCommunicator(profile_name, config_path, profile_uuid=profile_uuid) as communicator:
        yield communicator


def _outcome(future: Any, timeout: float | None) -> Any:
    deadline = None if timeout is None else time.monotonic() + timeout
    while isinstance(future, concurrent.futures.Future):
        # Whoever answers with a future is asked once more.
        future = future.result(None if deadline is None else max(0.0, deadline - time.monotonic()))
    return future


@contextlib.contextmanager
def _in_words(what: str) -> Iterator[None]:
    try:
        yield
    except (concurrent.futures.TimeoutError, TimeoutError):
        raise control.TimedOut(f"{what} in time") from None
    except (kiwipy.UnroutableError, kiwipy.DeliveryFailed) as error:
        raise presence.CoordinatorError(str(error)) from None
    except (kiwipy.RemoteException, kiwipy.CancelledError) as error:
        raise presence.CoordinatorError(f"whoever got it raised: {error}") from None
