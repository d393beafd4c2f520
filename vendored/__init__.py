"""A message broker for AiiDA on named pipes: see the README of aiida-namedpipe."""

from typing import Any

from . import discovery
from .pipebroker import PipeCommunicator

__all__ = ('PipeCommunicator', 'discovery')


def __getattr__(name: str) -> Any:
    # These two are made when asked for: the first imports AiiDA, and few need the second.
    if name == 'PipeBroker':
        from .aiidabroker import PipeBroker

        return PipeBroker
    if name == 'PipeCoordinator':
        from .coordinator import PipeCoordinator

        return PipeCoordinator
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
