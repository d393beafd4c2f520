"""`PipeCoordinator`, which shares out tasks and fans out broadcasts.

Strategy: all that it knows can be read again from the disk, so it may be killed at any instant. It rings a worker to
say that a task waits; the worker claims the task by rename(2), and says what became of it. Two workers rung for one
task is normal, since the rename decides.

Rules:
- Who is rung for which task is for ``scheduler.py`` to say; who is here, and who is dead, for ``peers.py``.
- Broadcasts are forwarded undecoded. The registrations that came before one are read before it is fanned out, and those
  that were kept while no coordinator ran are fanned out before the intake is read.
- The intakes outlive the coordinator: what comes while there is none lies there for the next one.
- Every ten seconds, in steps, it looks for what no event told it of. What cannot be done is said, and the rest is.
- Whose lock file is gone, or whose pipes directory is another's, says so and ends: the next start finds its way.
- One that nobody has started by hand ends where no communicator is any more.

This module knows neither kiwipy nor AiiDA, nor what a body says.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import random
import selectors
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING or not __package__:
    import bodies
    import burial
    import directories
    import fifo
    import files
    import frames
    import presence
    import strangers
    import taskqueue
    from peers import Peers, Queues
    from poller import Poller
    from readers import Pipes
else:
    from . import bodies, burial, directories, fifo, files, frames, presence, strangers, taskqueue
    from .peers import Peers, Queues
    from .poller import Poller
    from .readers import Pipes

HOUSEKEEPING_SECONDS = 10.0
_SLICE_SECONDS = 0.005
_PATIENCE_SECONDS = 15.0

_LOGGER = logging.getLogger("coordinator")


class PipeCoordinator:
    """Shares out tasks and fans out broadcasts for one configuration, until it is told to stop."""

    def __init__(
        self,
        profile_name: str,
        config_path: str | os.PathLike[str],
        idle: float | None = None,
        profile_uuid: str | None = None,
    ) -> None:
        """
        :param profile_name: the name of the profile; it names the pipes directory.
        :param config_path: the profile's configuration directory.
        :param idle: for how many seconds it serves on where no communicator is; `None`: as long as it may.
        :param profile_uuid: what tells this profile from another one that had its name; `None` matches all.
        :raises presence.CoordinatorError: another one runs for this configuration.
        :raises directories.DirectoryRefused: a directory is not safe to use, or cannot be used.
        :raises ValueError: the profile name cannot be used.
        """
        self.profile_name = profile_name
        self.layout = directories.establish(profile_name, config_path, profile_uuid)
        self._lock = presence.CoordinatorLock.take(self.layout)
        try:
            self._poller = Poller()
        except BaseException:
            self._lock.release()
            raise
        self._poller.descriptors.add(self._lock.descriptor)
        self._queues = Queues(self.layout, self._poller)
        self._peers = Peers(self.layout, self._poller, self._queues)
        self._intakes = Pipes(self.layout.pipes, self._poller, keep=True)
        self._stopping = False
        self._refused: directories.DirectoryRefused | None = None
        """Why it can serve nobody any more."""
        self._since = time.time()
        self.company = Company(self.layout, idle)
        self._written = ""
        self._strangers = strangers.Known(self.layout)

    def run(self, on_ready: Callable[[], None] = lambda: None, on_end: Callable[[], None] = lambda: None) -> None:
        """Serve until `stop`.

        :param on_ready: called once it serves.
        :param on_end: called when it begins to end.
        :raises presence.CoordinatorError: another one still reads the pipes.
        :raises directories.DirectoryRefused: it could serve nobody any more, as its lock or directory was taken away.
        """
        try:
            self._start()
            on_ready()
            with _said("Pipes whose configuration is gone are left"):
                directories.remove_forgotten()
            self._poller.later(random.random() * HOUSEKEEPING_SECONDS, self._look)
            while not self._stopping:
                self._queues.dispatch(self._peers.ring)
                self._poller.poll()
            if self._refused is not None:
                raise self._refused
        finally:
            on_end()
            self._end()

    def stop(self) -> None:
        """End `run` in an orderly way. Safe in any thread, and in a signal handler."""
        self.call(lambda: self.end("its own process"))

    def call(self, job: Callable[[], object]) -> None:
        """Have something done in the thread of `run`. Safe in any thread, and in a signal handler."""
        self._poller.call(job)

    def end(self, why: str) -> None:
        """End `run`, and say why. In its thread."""
        _LOGGER.info("Told to end by %s", why)
        self._stopping = True

    def _start(self) -> None:
        self._wait_for_another()
        if self._stopping:
            raise presence.CoordinatorError("it was told to stop before it served")
        self._open_intakes()
        with _said("The queue cannot be made"):
            taskqueue.TaskQueue(self.layout.queue).make()
        with _said("Not all who came are met, or not all who are dead buried"):
            for _ in self._peers.look():
                pass
        with _said("Who serves cannot be written down"):
            self._write_entry()
        self._fan_out_kept()
        _LOGGER.info("Serving %s, pid %d, pipes in %s", self.profile_name, os.getpid(), self.layout.pipes)

    def _wait_for_another(self) -> None:
        """Wait until nobody reads our pipes: one that has lost its lock does so until it looks."""
        path = self.layout.pipes / directories.TASKS_INTAKE
        with contextlib.suppress(OSError):
            gone = list[int]()
            descriptor = fifo.open_for_writing(path)
            self._poller.descriptors.add(descriptor)
            # An event for reading: POLLERR, as the last reader has gone (poll(2)).
            self._poller.watch(descriptor, selectors.EVENT_READ, gone.append)
            fifo.knock(path, {"type": "look"})
            deadline = time.monotonic() + _PATIENCE_SECONDS
            while not gone and not self._stopping and (left := deadline - time.monotonic()) > 0:
                self._poller.poll(left)
            self._poller.release(descriptor)
            if not gone and not self._stopping:
                raise presence.CoordinatorError(f"another coordinator reads {path}, and does not answer: end it")

    def _open_intakes(self) -> None:
        # They are read once `run` polls.
        read_tasks = functools.partial(self._intakes.drain, directories.TASKS_INTAKE)
        self._intakes.open(directories.TASKS_INTAKE, self._on_task_frame)
        self._intakes.open(directories.BROADCAST_INTAKE, self._on_broadcast, prepare=read_tasks)

    def _end(self) -> None:
        for step in (self._read_the_rest, lambda: self._poller.flush(1.0), self._peers.close):
            with _said("Stopping went wrong"):
                step()
        self._intakes.close(and_bodies=False)
        if self._lock.is_in_place():
            files.remove(self.layout.registry / "coordinator.json")
        _LOGGER.info("Stopped")
        # The lock goes last; the poller closes what is left of it.
        self._poller.descriptors.discard(self._lock.descriptor)
        self._poller.close()
        self._lock.release()

    def _read_the_rest(self) -> None:
        for name in (directories.TASKS_INTAKE, directories.BROADCAST_INTAKE):
            self._intakes.drain(name)
        self._peers.suspects.bury()

    def _write_entry(self) -> None:
        entry = {"profile": self.profile_name, "pid": os.getpid(), "since": self._since, "version": directories.VERSION}
        entry |= {"idle": self.company.patience, "pipes": str(self.layout.pipes), "dropped": self._peers.dropped()}
        text = json.dumps(entry, indent=1)
        path = self.layout.registry / "coordinator.json"
        if text != self._written or not path.exists():
            files.write_whole(path, text.encode())
            self._written = text

    # Frames

    def _on_task_frame(self, reader: fifo.Reader, data: bytes) -> None:
        try:
            self._on_message(bodies.unpack(data, reader.path))
        except (ValueError, KeyError, TypeError, OSError) as error:
            _LOGGER.warning("%s: a frame that cannot be used: %s: %s", reader.path, type(error).__name__, error)

    def _on_message(self, message: frames.Message) -> None:
        kind = message["type"]
        if kind == "task" and taskqueue.is_name(message["name"]):
            self._queues.add(message["queue"], message["name"])
        elif kind == "report":
            self._peers.report(message)
        elif kind == "register":
            self._peers.meet(directories.check_worker_id(message["worker"]), more=message.get("more") is True)
        elif kind == "kept":
            self._fan_out_kept()
        elif kind == "look":
            self._look_at_self()
        elif kind == "stop" and message.get("pid", 0) in (os.getpid(), 0):  # 0: whoever it is, as older ones say it.
            self.end("the command 'stop'")
        elif kind == "stop":
            pass  # It was for another one, which has been killed since.
        else:
            raise frames.Garbage(f"it is no message for the coordinator: {kind!r:.40}")

    def _on_broadcast(self, reader: fifo.Reader, data: bytes) -> None:
        self._peers.fan_out(data, reader.path)

    def _fan_out_kept(self) -> None:
        """Fan out the broadcasts that found no coordinator, oldest first."""
        for name in sorted(name for name in files.listed(self.layout.pipes) if name.startswith("kept_")):
            with _said("A broadcast that was kept cannot be fanned out"):
                self._fan_out_one(self.layout.pipes / name)

    def _fan_out_one(self, path: Path) -> None:
        intake = path.with_name(directories.BROADCAST_INTAKE)
        sent = int(path.name.split("_")[1].split("-")[0]) / 1e9
        if not stat.S_ISREG(os.lstat(path).st_mode):
            raise files.NotAFile(f"{path} is not a regular file")
        # From here on it is ours alone, and it is fanned out once.
        body = path.with_name(directories.body_name(intake.name))
        path.rename(body)
        small = frames.frame(files.read(body).decode())
        if small is not None:
            files.remove(body)
        self._peers.fan_out(small or frames.claim_check(body.name), intake, sent)

    # Housekeeping

    def _look(self) -> None:
        self._go_on(self._chores())

    def _go_on(self, chores: Iterator[None]) -> None:
        """Do a few milliseconds of housekeeping, and go on after the events that came meanwhile."""
        end = time.monotonic() + _SLICE_SECONDS
        for _ in chores:
            if time.monotonic() > end:
                self._poller.later(0.0, functools.partial(self._go_on, chores))
                return
        self._poller.later(HOUSEKEEPING_SECONDS, self._look)

    def _chores(self) -> Iterator[None]:
        chores: tuple[Callable[[], Iterator[None] | None], ...] = (
            self._look_at_self,
            self._look_for_company,
            self._peers.look,
            self._queues.look,
            self._sweep,
            self._strangers.look,
            self._fan_out_kept,
            self._write_entry,
        )
        for chore in chores:
            with _said("Housekeeping was interrupted"):
                # What is done in one step returns nothing.
                yield from chore() or (None,)

    def _look_at_self(self) -> None:
        if self._stopping:
            return
        try:
            if not self._lock.is_in_place():
                raise directories.DirectoryRefused(f"{self._lock.path} is gone")
            directories.remake(self.layout)
        except directories.DirectoryRefused as error:
            self._refused, self._stopping = error, True
            return
        self._intakes.look()

    def _look_for_company(self) -> None:
        # In this order: one that was told to stop is not to be taken for one that was left alone.
        if not self._stopping and self.company.is_missed():
            self.end(f"itself: no communicator has been here for {self.company.patience:g} s")

    def _sweep(self) -> Iterator[None]:
        for removed in burial.sweep(self.layout):
            if removed:
                _LOGGER.info("Removed %s, which a dead process left", removed)
            yield


class Company:
    """The communicators that are here, senders included: without any, whom nobody has started by hand may end."""

    def __init__(self, layout: directories.Layout, patience: float | None) -> None:
        """
        :param patience: for how many seconds their absence is borne; `None`: for ever.
        """
        self.patience = patience
        self._layout = layout
        self._seen = time.monotonic()
        self._missed = False

    def is_missed(self) -> bool:
        """Look for them; say whether they have been away for too long."""
        if self.patience is not None and not self._is_here():
            self._missed = time.monotonic() - self._seen >= self.patience
        else:
            self._seen = time.monotonic()
        return self._missed

    def has_come_back(self) -> bool:
        """Say whether one that was missed is here: it found a coordinator that was about to end."""
        return self._missed and self._is_here()

    def _is_here(self) -> bool:
        try:
            return any(True for _ in presence.communicators(self._layout))
        except OSError:
            return True  # The kernel did not say.


@contextlib.contextmanager
def _said(what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        _LOGGER.error("%s: %s: %s", what, type(error).__name__, error)
