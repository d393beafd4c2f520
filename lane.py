"""A thread that runs jobs one after the other, for code that is not ours and may take any time.

Strategy: subscribers, callbacks of futures and a user's decoder each have a lane of their own, so that none of them
ever runs on the selector thread, and each may wait for a reply. The thread is started when it is first needed, in
whoever is about to need it, who can be told that the system has no room for one."""

from __future__ import annotations

import collections
import queue
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING or not __package__:
    from poller import patient, say
else:
    from .poller import patient, say

_PATIENCE_SECONDS = 5.0


class Lane:
    """A thread that runs jobs one after the other. Safe in any thread; `_mutex` decides what is before the end."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._jobs: collections.deque[Callable[[], object]] = collections.deque()
        self._bell: queue.SimpleQueue[None] = queue.SimpleQueue()
        """Rung for each job, and at the end. What interrupts whoever waits for it loses no job with it."""
        self._thread: threading.Thread | None = None
        self._begun = False
        self._ticket = collections.deque([True])
        """Only the thread that takes it runs jobs."""
        self._mutex = threading.RLock()
        self._busy = False
        self._finishing = False
        self._ended = False
        self._stopped = False

    def start(self) -> None:
        """Start the thread, where that has not been done.

        :raises RuntimeError: the system has no room for another thread.
        """
        if self._begun:
            return
        with self._mutex:
            if not self._begun and not self._ended and not self._stopped:
                self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
                self._begun = True
                try:
                    self._thread.start()
                except BaseException:
                    # What a signal handler raises does not tell whether the thread runs. If it does, the next one
                    # finds no ticket.
                    self._begun = False
                    raise

    def put(self, job: Callable[[], object]) -> None:
        """Run a job after those that wait; at once where the lane has finished, and never where it was stopped."""
        with patient(self._mutex):
            if not self._ended:
                self._jobs.append(job)
                self._bell.put(None)
                return
        self._try(job)

    def is_empty(self) -> bool:
        """Say whether no job waits."""
        return not self._jobs

    def stop(self) -> None:
        """Start no job any more."""
        with self._mutex:
            self._stopped = True
            self._bell.put(None)

    def finish(self) -> None:
        """Run the jobs that wait, and then end; jobs that come later run where they come from."""
        with self._mutex:
            self._finishing = True
            self._ended = not self._begun
            self._bell.put(None)

    def disown(self) -> None:
        """Run nothing, in a forked child, which has no such thread."""
        self._mutex = threading.RLock()  # Another thread of the parent may have had it.
        self._stopped = True

    def join(self) -> None:
        """After `stop` or `finish`, wait for the thread's end, but not for user code that may take any time."""
        thread = self._thread
        if thread is not None and thread.ident not in (None, threading.get_ident()) and not self._busy:
            thread.join(_PATIENCE_SECONDS)

    def _run(self) -> None:
        try:
            self._ticket.pop()
        except IndexError:
            return
        self._thread, self._begun = threading.current_thread(), True
        waits = True
        while True:
            try:
                while True:
                    try:
                        if not self._run_one(waits=waits):
                            return
                        waits = True
                    except BaseException:
                        # Somebody has set it in this thread, as a watchdog does, and his job was over. It may have come
                        # between a ring and its job.
                        self._busy, waits = False, not self._jobs
                        say("Error in %s", self._name)
            except BaseException:
                self._busy, waits = False, not self._jobs  # Once more, in the middle of that.

    def _run_one(self, *, waits: bool) -> bool:
        """Say whether there may be more to run."""
        if waits:
            self._bell.get()
        if self._stopped:
            return False
        job = self._jobs.popleft() if self._jobs else None
        if self._finishing:
            with self._mutex:
                self._ended = not self._jobs
        self._busy = job is not None
        if job is not None:
            self._try(job)
        del job  # It may hold the last reference to a communicator.
        self._busy = False
        return not (self._ended or self._stopped)  # Or the job has forked, and this is the child.

    def _try(self, job: Callable[[], object]) -> None:
        try:
            job()
        except BaseException:
            say("Error in %s", self._name)
