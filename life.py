"""Coming and going: the life of a worker under its id.

Strategy: a communicator that only sends has a reply pipe. One that was given a worker id, subscribes or holds tasks has
a life as a worker too: the lock of its id first, before anything else of it exists, then pipes, entry and routes, and
the lock last when it goes. Every ten seconds, and when it stumbles over it, it looks whether all that is in place, and
makes again what is not. Nobody has to tell it.

Rules:
- What the last life under the id left is buried before this one begins, with the lock in hand.
- Who finds another's lock under its id has lost the id, and what it claimed with it: it begins a new life.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import kiwipy

if TYPE_CHECKING or not __package__:
    import burial
    import directories
    import files
    import presence
    from fifo import open_for_writing
    from poller import Poller, no_fork, patient
    from readers import Pipes
else:
    from . import burial, directories, files, presence
    from .fifo import open_for_writing
    from .poller import Poller, no_fork, patient
    from .readers import Pipes

_LOGGER = logging.getLogger(__name__)
_PATIENCE_SECONDS = 5.0
_FIRST_PAUSE_SECONDS = 0.001


def _patiently() -> Iterator[None]:
    """Yield at once, and then after pauses, for as long as whoever buries the dead may take."""
    deadline, pause = time.monotonic() + _PATIENCE_SECONDS, _FIRST_PAUSE_SECONDS
    while time.monotonic() < deadline:
        yield
        # flock(2) has no time limit, and a thread that waits in it cannot be ended.
        threading.Event().wait(pause)
        pause *= 2


class Life:
    """One life of a worker. Used under its owner's lock."""

    def __init__(
        self,
        layout: directories.Layout,
        poller: Poller,
        worker_id: str | None,
        ring: Callable[[str, str], None],
    ) -> None:
        """Take the lock of the id, and bury what its last life left.

        :param worker_id: `None`: one is made up.
        :param ring: told what waits again because we buried somebody: the key of the queue, and the name.
        :raises kiwipy.DuplicateSubscriberIdentifier: a live worker has it.
        :raises OSError: the lock cannot be made.
        """
        self.worker_id = worker_id or f"{os.getpid()}-{uuid.uuid4().hex[:12]}"
        self.since = time.time()
        self.routes: set[str] = set()
        self.pipes = Pipes(layout.pipes, poller)
        self._layout = layout
        self._poller = poller
        self._ring = ring
        self._locks = [self._take_patiently()]
        """The one in place is the last; those before it may come back with a directory that was moved away."""
        if worker_id is not None:
            buried = burial.Buried()
            burial.bury_owned(layout, {worker_id: self._locks[-1]}, buried, keep=True)
            self._ring_given_back(buried)

    def _take_patiently(self) -> presence.Lock:
        """Take the lock; whoever buries the last life has it for a moment."""
        for _ in _patiently():
            lock = self._take()
            if lock is not None:
                return lock
            if self._is_served():
                break
        raise kiwipy.DuplicateSubscriberIdentifier(f"worker id '{self.worker_id}' is taken by a live worker")

    def _take(self) -> presence.Lock | None:
        self._layout.owner.keep(self._layout.queue)
        with patient(no_fork):
            lock = presence.WorkerLock.take(self._layout, self.worker_id, make=True)
            if lock is not None:
                self._poller.descriptors.add(lock.descriptor)
        return lock

    def _is_served(self) -> bool:
        with contextlib.suppress(OSError, ValueError):
            reply = presence.Worker.read(self._layout.entry(self.worker_id)).reply
            return directories.is_read(self._layout.pipes / reply)
        return False

    def is_registered(self, worker: presence.Worker) -> bool:
        """Say whether this is what the registry entry says."""
        with contextlib.suppress(OSError, ValueError):
            return worker == presence.Worker.read(self._layout.entry(self.worker_id))
        return False

    def claim_route(self, identifier: str) -> bool:
        """Lead an RPC identifier to this worker; say whether no live one has it.

        :raises OSError: the route cannot be made.
        """
        for _ in _patiently():
            owner = presence.claim_route(self._layout, identifier, self.worker_id)
            if owner is None:
                self.routes.add(identifier)
                return True
            buried = burial.bury(self._layout, [owner])
            self._ring_given_back(buried)
            # Its lock may be in the hands of somebody who buries it, or has only looked.
            if not buried.worker_ids and directories.is_read(self._layout.pipes / f"rpc_{owner}"):
                return False
        return False

    def _ring_given_back(self, buried: burial.Buried) -> None:
        for key, name in buried.tasks:
            self._ring(key, name)

    def release_route(self, identifier: str) -> None:
        """Take an RPC identifier back."""
        self.routes.discard(identifier)
        presence.release_route(self._layout, identifier, self.worker_id)

    def look(self) -> bool:
        """Make again what is not in place; say whether this life still has its id.

        :raises OSError: something cannot be made.
        """
        if not self._is_locked():
            return False
        self.pipes.look()
        for identifier in list(self.routes):
            try:
                self._look_at_route(identifier)
            except OSError as error:
                _LOGGER.error("The RPC identifier '%s' cannot be served now: %s", identifier, error)
        return True

    def _is_locked(self) -> bool:
        """See to it that a lock is in place; say whether another's is not."""
        self._locks.sort(key=presence.Lock.is_in_place)
        if self._locks[-1].is_in_place():
            if len(self._locks) > 1:
                self._let_go(presence.Lock.is_gone)
            return True
        try:
            lock = self._take()
        except OSError as error:
            # Of all else something may be mended.
            _LOGGER.error("The lock of worker %s cannot be made again now: %s", self.worker_id, error)
            return True
        if lock is None:
            return not os.path.lexists(self._layout.lock(self.worker_id))
        _LOGGER.warning("The lock of worker %s had vanished, and is made again", self.worker_id)
        self._let_go(presence.Lock.is_gone)
        self._locks.append(lock)
        return True

    def _look_at_route(self, identifier: str) -> None:
        route = self._layout.route(identifier)
        if presence.route_target(route) == f"rpc_{self.worker_id}":
            os.utime(route, follow_symlinks=False)
        elif not self.claim_route(identifier):
            self.routes.discard(identifier)

    def leave(self) -> None:
        """Vanish, but for what was claimed, and the lock; what has our id now, and is another's, stays."""
        if self._is_taken():
            return
        for identifier in list(self.routes):
            self.release_route(identifier)
        files.remove(self._layout.entry(self.worker_id))

    def _is_taken(self) -> bool:
        """Say whether another has the id: its lock is in place, and none of ours."""
        in_place = any(map(presence.Lock.is_in_place, self._locks))
        return not in_place and os.path.lexists(self._layout.lock(self.worker_id))

    def end(self) -> None:
        """Close the pipes, and let go of the lock. In the selector thread."""
        if self._is_taken():
            self.abandon()
            return
        try:
            self.pipes.close(and_bodies=True)
            self._locks.sort(key=presence.Lock.is_in_place)
            burial.remove_claims(self._layout, self.worker_id, self._locks[-1])
        finally:
            self._let_go()

    def abandon(self) -> None:
        """Close what another has now: nothing on the disk is ours any more. In the selector thread."""
        self.pipes.close(and_bodies=False)
        self._let_go()

    def _let_go(self, which: Callable[[presence.Lock], bool] = lambda lock: True) -> None:
        with patient(no_fork):
            for lock in filter(which, self._locks[:]):
                self._locks.remove(lock)
                self._poller.descriptors.discard(lock.descriptor)
                lock.release()


class Intake:
    """The coordinator's broadcast intake, held open for writing by whoever listens.

    What lies in a FIFO outlives its reader as long as somebody has it open: the next coordinator reads it.
    """

    def __init__(self, layout: directories.Layout, poller: Poller) -> None:
        self._path = layout.pipes / directories.BROADCAST_INTAKE
        self._poller = poller
        self._descriptor: int | None = None

    @property
    def is_held(self) -> bool:
        """Whether one is open; it may be an old one."""
        return self._descriptor is not None

    def hold(self) -> None:
        """Open it, where somebody reads it and we do not have it open."""
        if self._descriptor is not None and files.is_in_place(self._path, self._descriptor):
            return
        with patient(no_fork), contextlib.suppress(OSError):
            descriptor = open_for_writing(self._path)
            self._poller.descriptors.add(descriptor)
            old, self._descriptor = self._descriptor, descriptor
            if old is not None:
                self._poller.descriptors.discard(old)
                os.close(old)
