"""What one life of a worker has claimed of one queue, and how it leaves its hands.

Strategy: what is in hand is known by a name and an object, so that nobody settles what another holds; and what is on
its way out of our hands is known until the disk says that it has left, so that nothing is forgotten on the way.

Rules:
- A task leaves in one place, `Claims._leave`: first its outcome is on its way, then it is moved.
- As long as a task's file is claimed, it is not forgotten: what failed is tried again at the next look. An outcome that
  finds no room keeps its task claimed until it does.
- A signal handler may raise between any two lines.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING or not __package__:
    import taskqueue
    from poller import HELD_UP_SECONDS
else:
    from . import taskqueue
    from .poller import HELD_UP_SECONDS

_LOGGER = logging.getLogger(__name__)


def _nothing() -> None:
    pass


class Claims:
    """The tasks that one life of a worker holds in one queue.

    `_mutex` guards it; it is reentrant, as a signal handler or a finalizer may settle a task. Such a handler may also
    raise, between any two lines here. So a name stands in `_leaving` before its outcome is sent and its file is moved,
    and until both are where they belong: what was interrupted, or could not be done, is done at the next look, if need
    be a second time. A task that nobody refers to any more is given back there: something raised before it came into
    anybody's hands.
    """

    def __init__(self, queue: taskqueue.TaskQueue, worker_id: str, paused: Path) -> None:
        """
        :param paused: the mark that nothing new is to be started.
        """
        self.queue = queue
        self._paused = str(paused)
        self.worker_id = worker_id
        self._state = f"claimed/{worker_id}"
        self._directory = queue.directory / self._state
        self._held: dict[str, tuple[int, Callable[[], taskqueue.Task | None]]] = {}
        """What is in hand: its `id`, and itself, which is `None` once whoever had it has lost it."""
        self._leaving: dict[str, tuple[str, Callable[[], None]]] = {}
        """What may be claimed and is in nobody's hands: the state it goes to, and what is to be done before."""
        self._said: set[str] = set()
        """Of what cannot leave, what has been said."""
        self._mutex = threading.RLock()
        self._closed = False

    def __len__(self) -> int:
        """How many somebody works on, as the prefetch counts them."""
        return len(self._held)

    def is_empty(self) -> bool:
        """Say whether nothing is claimed, be it that somebody works on it or that it is about to leave."""
        return not self._held and not self._leaving

    def is_paused(self) -> bool:
        """Say whether nothing new is to be started."""
        return os.path.lexists(self._paused)

    def take(self, name: str, tell: Callable[[taskqueue.Unreadable], None]) -> taskqueue.Task | None:
        """Claim a waiting task; `None` if somebody else has it (losing that race is normal), or all is paused.

        :param tell: puts on its way what the sender of something that is no task is told.
        :return: the task, which is in hand only as long as somebody refers to it.
        :raises taskqueue.Unreadable: it was no task; it goes to ``failed/``.
        :raises OSError: it could not be read now, and it waits again.
        """
        with self._mutex:
            if self._closed or name in self._held or name in self._leaving or self.is_paused():
                return None
            self._leaving[name] = ("", _nothing)
            try:
                if not self._claim(name):
                    del self._leaving[name]
                    return None
                # Asked again once the task is ours: whoever has paused sees in our claims all that is not given back.
                if self.is_paused():
                    self._leave(name, "")
                    return None
                task = taskqueue.Task.read(self.queue.file(name, self._state), name)
            except taskqueue.Unreadable as error:
                self.queue.note(name, "failed", str(error))
                self._leave(name, "failed", functools.partial(tell, error))
                raise
            except OSError:
                self._leave(name, "")
                raise
            self._held[name] = (id(task), weakref.ref(task))
            del self._leaving[name]
            return task

    def _claim(self, name: str) -> bool:
        try:
            os.rename(self.queue.file(name), self.queue.file(name, self._state))
            return True
        except FileNotFoundError:
            # Hardly ever is it the claim directory that is gone.
            return not self._directory.is_dir() and self.queue.move(name, "", self._state)

    def settle(self, task: taskqueue.Task, before: Callable[[], None], state: str, reason: str = "") -> bool:
        """Let go of a task, as whoever works on it says.

        :param before: puts its outcome on its way; called first, and does not wait. If it is interrupted, or raises an
            `OSError`, it is called again, since one outcome too many does no harm.
        :param state: where it goes: 'completed', or '' to wait again.
        :param reason: what its subscriber raised; kept beside it.
        :return: whether it was still held; if not, nothing was done.
        """
        with self._mutex:
            # Not the reference, which the garbage collector clears before it ends the context of a pull.
            if self._held.get(task.name, (None,))[0] != id(task):
                return False

            def finish() -> None:
                before()
                if reason:
                    self.queue.note(task.name, state, reason)

            self._leaving[task.name] = (state, finish)
            del self._held[task.name]
            self._leave(task.name, state, finish)
            return True

    def _leave(self, name: str, state: str, before: Callable[[], None] = _nothing) -> None:
        self._leaving[name] = (state, before)
        try:
            before()
            self._leaving[name] = (state, _nothing)
            self.queue.move(name, self._state, state)
            del self._leaving[name]
        except OSError as error:
            if name not in self._said:
                self._said.add(name)
                _LOGGER.error("Task %s cannot leave the claims of %s yet: %s", name, self.worker_id, error)
        else:
            self._said.discard(name)

    @contextlib.contextmanager
    def _unless_held_up(self) -> Iterator[bool]:
        """Hold the mutex, for a thread that a signal handler may wait for; give whether we do."""
        held = self._mutex.acquire(timeout=HELD_UP_SECONDS)
        try:
            yield held
        finally:
            if held:
                self._mutex.release()

    def look(self) -> list[str]:
        """Finish what could not be finished before, and give back what was lost.

        :return: the names of what was lost, which wait again.
        """
        lost = []
        with self._unless_held_up() as held:
            for name, (state, before) in list(self._leaving.items()) if held else ():
                try:
                    self._leave(name, state, before)
                except Exception as error:
                    _LOGGER.error("Task %s cannot be finished now: %s: %s", name, type(error).__name__, error)
            for name in [name for name, (_, task) in self._held.items() if task() is None] if held else ():
                self._leaving[name] = ("", _nothing)
                del self._held[name]
                self._leave(name, "")
                lost.append(name)
        return lost

    def give_back_strays(self) -> None:
        """Let wait again what lies among our claims and nobody has: an earlier life under this id may have brought it.

        For whoever knows that the id is still ours.

        :raises OSError: the claims cannot be listed.
        """
        with self._unless_held_up() as held:
            for name in list(self.queue.names(self._state)) if held else ():
                if name not in self._held and name not in self._leaving:
                    self._leave(name, "")

    def disown(self) -> None:
        """Hold nothing, in a forked child: all of it is the parent's."""
        self._mutex = threading.RLock()  # Another thread of the parent may have had it.
        self._closed = True
        self._held.clear()
        self._leaving.clear()

    def close(self) -> list[str]:
        """Give back what is held.

        :return: the names that wait again.
        """
        with self._mutex:
            self._closed = True
            self.look()
            # What is done and has an outcome that found no room is done again: better than to count a death.
            untold = [name for name, (_, before) in self._leaving.items() if before is not _nothing]
            names = sorted([*self._held, *untold])
            for name in names:
                self._leaving[name] = ("", _nothing)
                self._held.pop(name, None)
                self._leave(name, "")
            return [name for name in names if name not in self._leaving]
