"""What a communicator is made of, its selector thread, and its end.

Strategy: the selector thread reads what comes and hands it on: rings to the task lane, calls and broadcasts to the
message lane, answers to the futures that wait for them. It runs no user code, and ends only by tearing down. Once in
ten seconds it looks whether everything is as it should be.

Rules:
- The threads hold the `Engine` and never the `PipeCommunicator`, so that garbage collection can close it.
- A finalizer takes no lock but that of `Poller.call`, which is reentrant and never held for long: it asks the selector
  thread, since whoever it interrupts may hold any other.
- Answers that need a user's decoder are decoded on a lane of their own; the built-in codec runs where they are read.
- A forked child finds its copy closed, without any trace in the parent.

Frames that a communicator, a command or another coordinator sends, by pipe (``frames.py`` says what a frame is):

    coordinator_tasks       {"type": "task", "queue", "name"}            a task waits
                            {"type": "register", "worker", "more"}       read my registry entry; I have
                                                                         one subscriber more for tasks
                            {"type": "kept"}                             there is a broadcast in a file
                            {"type": "look"}                             look after yourself now
                            {"type": "stop", "pid"}                      end in an orderly way, if it is you
                            {"type": "report", "worker", "reply", "queue",
                             "claimed" | "done" | "lost" | "rejected" | "returned": [names]}
    coordinator_broadcast   {"body", "sender", "subject", "correlation_id"}, and the same to broadcast_{worker}
    task_{worker}           {"type": "ring", "queue", "names"}           these tasks wait; claim them
    rpc_{worker}            {"to", "body", "reply_to", "correlation_id"}
    reply_{pid}_{uuid}      {"correlation_id", "result" | "exception" | "cancelled" | "pending" | "undelivered"}
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import logging
import os
import random
import threading
import weakref
from collections.abc import Callable, Iterator, Set
from pathlib import Path
from typing import TYPE_CHECKING, Any

import kiwipy

if TYPE_CHECKING or not __package__:
    import bodies
    import burial
    import directories
    import fifo
    import files
    import frames
    import presence
    import taskqueue
    from calls import Calls, Reply
    from holding import Holdings, Reports, Side
    from lane import Lane
    from poller import Poller, say
    from post import Post
    from readers import Pipes
    from subscribers import MessageSubscribers, TaskSubscribers
    from subscriptions import Subscriptions
else:
    from . import bodies, burial, directories, fifo, files, frames, presence, taskqueue
    from .calls import Calls, Reply
    from .holding import Holdings, Reports, Side
    from .lane import Lane
    from .poller import Poller, say
    from .post import Post
    from .readers import Pipes
    from .subscribers import MessageSubscribers, TaskSubscribers
    from .subscriptions import Subscriptions

_LOGGER = logging.getLogger(__name__)
LOOK_SECONDS = 10.0
_FLUSH_SECONDS = 5.0
_PATIENCE_SECONDS = 10.0


class Receiver:
    """Hands what comes by a pipe to whom it is for. In the selector thread, but for what it puts into a lane."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def _unpacked(
        self, reader: fifo.Reader, data: bytes, tell: Callable[[frames.Message], None] = lambda _: None
    ) -> frames.Message | None:
        """Return the message in a frame; `None` if it cannot be had, or has been read already.

        :param tell: takes an answer for whoever waits, where the message cannot be parsed.
        """
        try:
            return bodies.unpack(data, reader.path, self._engine.poller)
        except FileNotFoundError:
            pass
        except (frames.Garbage, OSError) as error:
            _LOGGER.warning("%s: a frame that cannot be read: %s", reader.path, error)
            if isinstance(error, frames.Garbage) and "correlation_id" in error.envelope:
                tell({"exception": f"the message cannot be read: {error}", **error.envelope})
        return None

    def rung(self, reader: fifo.Reader, data: bytes) -> None:
        """Tasks wait."""
        message = self._unpacked(reader, data)
        if message is not None and self._engine.upkeep.may_take():
            self._use(reader, self._engine.tasks.rung, message)

    def _use(self, reader: fifo.Reader, take: Callable[[frames.Message], None], message: frames.Message) -> None:
        try:
            take(message)
        except frames.Garbage as error:
            _LOGGER.warning("%s: a frame that cannot be used: %s", reader.path, error)

    def called(self, reader: fifo.Reader, data: bytes) -> None:
        """Somebody calls an RPC subscriber."""
        # Unpacked in the lane, as that may take long.
        self._engine.messages.lane.put(functools.partial(self._serve, self._engine.messages.called, reader, data))

    def heard(self, reader: fifo.Reader, data: bytes) -> None:
        """A broadcast comes."""
        self._engine.messages.lane.put(functools.partial(self._serve, self._hear, reader, data))

    def _serve(self, serve: Callable[[frames.Message], None], reader: fifo.Reader, data: bytes) -> None:
        message = self._unpacked(reader, data, self._tell_caller)
        if message is not None:
            serve(message)

    def _hear(self, message: frames.Message) -> None:
        self._engine.subscriptions.listen_on()
        self._engine.messages.heard(message)

    def _tell_caller(self, said: frames.Message) -> None:
        self._engine.post.answer(said.get("reply_to"), said["correlation_id"], exception=said["exception"])

    def answered(self, reader: fifo.Reader, data: bytes) -> None:
        """An answer comes."""
        message = self._unpacked(reader, data, self._engine.calls.answer)
        if message is not None:
            if self._engine.codec.concerns_user(message, "result"):
                self._engine.decoding.put(functools.partial(self._use, reader, self._engine.calls.answer, message))
            else:
                self._use(reader, self._engine.calls.answer, message)


class Unrung:
    """The bodies of calls whose frames were lost: those that lay there at the look before as well.

    Calls are served in the order in which they were sent, so one whose frame may be on its way waits a turn.
    """

    def __init__(self, pipes: Path) -> None:
        self._pipes = pipes
        self._seen: Set[str] = frozenset()

    def due(self) -> list[tuple[str, str]]:
        """Look; return what is to be read, each with its receiver, which may not be here."""
        found = {name: directories.body_receiver(name) for name in files.listed(self._pipes)}
        calls = {name: receiver for name, receiver in found.items() if receiver and receiver.startswith("rpc_")}
        before, self._seen = self._seen, calls.keys()
        return [(calls[name], name) for name in calls.keys() & before]


class Upkeep:
    """Looks every ten seconds whether everything of a communicator is as it should be. In the selector thread."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._unrung = Unrung(engine.layout.pipes)

    def look(self) -> None:
        """Look, and do so again in ten seconds."""
        self._engine.poller.later(LOOK_SECONDS, self.look)
        if self._engine.is_forsaken():
            self._engine.close_soon()
        self.look_once()

    def look_once(self) -> None:
        """Do each step, whatever becomes of the others; but none in a queue that is another profile's now."""
        engine = self._engine
        try:
            if not self._has_queue():
                return
        except OSError as error:
            _LOGGER.error("%s cannot see whose its queue is: %s", engine.name, error)
        for step in (
            functools.partial(directories.remake, engine.layout),
            engine.look_at_pipes,
            engine.subscriptions.look,
            engine.holdings.look,
            engine.tasks.look,
            engine.post.ways.look,
            engine.find_answers,
            self._find_calls,
            self._ask_after_recipients,
        ):
            try:
                step()
            except Exception as error:
                _LOGGER.error("%s cannot look after itself: %s: %s", engine.name, type(error).__name__, error)

    def may_take(self) -> bool:
        """Say whether a task that is offered may be taken."""
        try:
            return self._has_queue()
        except OSError as error:
            # What cannot be read for long is served as it was. A descriptor may be free in a moment.
            return error.errno not in files.NO_DESCRIPTOR

    def _has_queue(self) -> bool:
        """Say whether the queue is no other profile's; where it is, close.

        :raises OSError: it cannot be seen whose it is.
        """
        engine = self._engine
        try:
            engine.look_at_queue()
        except directories.DirectoryRefused as error:
            if not engine.closed:
                _LOGGER.error("%s closes: %s", engine.name, error)
            engine.close_soon()
            return False
        return True

    def _find_calls(self) -> None:
        for receiver, name in self._unrung.due() if self._engine.messages.rpc else ():
            self._engine.subscriptions.inject(receiver, frames.claim_check(name))

    def _ask_after_recipients(self) -> None:
        for way in self._engine.calls.ways():
            if isinstance(way, fifo.Writer):
                owner, layout = directories.pipe_owner(way.path.name) or "", self._engine.layout
                if os.path.lexists(layout.lock(owner)) and not presence.is_alive(layout, owner):
                    self._engine.on_death(way)


class Engine:
    """All of a communicator that its threads know."""

    def __init__(
        self,
        layout: directories.Layout,
        facade: Callable[[], Any],
        worker_id: str | None,
        prefetch: int,
        codec: frames.Codec,
        *,
        fsync: bool,
    ) -> None:
        """:param facade: gives the communicator, `None` once it has been collected."""
        self.layout = layout
        self.closed = False
        self._facade = facade
        self.codec = codec
        self.reply = directories.reply_pipe()
        self.name = worker_id or self.reply
        self._done = False
        self.upkeep = Upkeep(self)
        self._callbacks = Lane(f"pipebroker callbacks {self.name}")
        self.decoding = Lane(f"pipebroker decoding {self.name}")
        self.poller = Poller()
        try:
            self._assemble(fsync)
        except BaseException:
            self.poller.close()
            raise
        self._begin(worker_id, prefetch)

    def _begin(self, worker_id: str | None, prefetch: int) -> None:
        _engines.add(self)
        try:
            self.default = self.subscriptions.side(None, prefetch)
            self._pipes.open(self.reply, self._receiver.answered)
            if worker_id is not None:
                self.subscriptions.live(worker_id)
            self.poller.call_later(random.random() * LOOK_SECONDS, self.upkeep.look)
            self._thread.start()
        except BaseException:
            _engines.discard(self)
            if self._thread.ident is None:
                self._done = True
                self._tear_down()
            self.close()
            raise

    def _assemble(self, fsync: bool) -> None:
        self._thread = threading.Thread(target=self._run, name=f"pipebroker {self.name}", daemon=True)
        # The lane is started where the caller can be told that there is no room for a thread.
        prepare = self.decoding.start if self.codec.runs_user_code else lambda: None
        self.calls = Calls(self._callbacks, self.codec.decode, prepare, self.poller.call_later)
        self.post = Post(self.layout, self.poller, self.codec, self.on_death)
        self._reports = Reports(
            self.post, self.poller, lambda: {"worker": self.subscriptions.worker_id, "reply": self.reply}
        )
        self.holdings = Holdings(self.post, self._reports, Lane(f"pipebroker tasks {self.name}"))
        self.tasks = TaskSubscribers(self.holdings, self._reports, self.post, self.codec, self._facade)
        self.messages = MessageSubscribers(
            self.post, self.codec, Lane(f"pipebroker messages {self.name}"), self._facade
        )
        self._lanes = (self.tasks.lane, self.messages.lane, self.decoding, self._callbacks)
        self._receiver = receiver = Receiver(self)
        handlers = {"task": receiver.rung, "rpc": receiver.called, "broadcast": receiver.heard}
        self._pipes = Pipes(self.layout.pipes, self.poller)
        self.subscriptions = Subscriptions(
            self.layout, self.poller, self.post, self.holdings, self.messages, self.reply, handlers, fsync=fsync
        )

    # Sending

    def send_task(self, side: Side, body: Any, no_reply: bool) -> Reply | None:
        """Put a task on the disk and ring the coordinator."""
        self.subscriptions.ensure_open()
        correlation_id, future = (None, None) if no_reply else self.calls.expect(None)
        try:
            document = {"body": body, "no_reply": bool(no_reply), "reply_to": None, "correlation_id": correlation_id}
            text = self.codec.encode(document if no_reply else {**document, "reply_to": self.reply})
            task_id = taskqueue.new_id()
            self.layout.owner.keep(self.layout.queue)
            side.queue.put(task_id, text, lambda: self.post.ring_task(side.key, task_id))
        except BaseException:
            self.calls.forget(correlation_id)
            raise
        return future

    def send_rpc(self, recipient: Any, body: Any) -> Reply:
        """Send a call straight to its recipient."""
        self.subscriptions.ensure_open()
        try:
            directories.quoted(str(recipient))
        except ValueError as error:
            raise kiwipy.UnroutableError(f"no RPC subscriber can be called '{recipient}': {error}") from None
        return self.post.call(self.calls, self.reply, str(recipient), body)

    def send_broadcast(self, body: Any, sender: Any, subject: Any, correlation_id: Any) -> None:
        """Send a broadcast to the coordinator, or keep it for the next one."""
        self.subscriptions.ensure_open()
        self.post.broadcast({"body": body, "sender": sender, "subject": subject, "correlation_id": correlation_id})

    # Pulling tasks

    def pull(self, side: Side) -> taskqueue.Task | None:
        """Claim the oldest waiting task; `None` if none waits."""
        self.look_at_queue()
        self.subscriptions.hold(side)
        bury = functools.partial(burial.bury_claimants, self.layout, side.queue)
        task = self.holdings.pull(side, bury)
        if task is None and self.poller.catch_up():  # What was dropped waits again once that thread has seen to it.
            task = self.holdings.pull(side, bury)
        self.subscriptions.ensure_open()  # Whoever has closed meanwhile gets nothing, though something waits.
        return task

    def pull_each(self, side: Side) -> Iterator[taskqueue.Task]:
        """Claim waiting tasks, oldest first, until there are none that have not been offered."""
        self.look_at_queue()
        self.subscriptions.hold(side)
        self.poller.catch_up()
        burial.bury_claimants(self.layout, side.queue)
        return self.holdings.pull_each(side, self._look_before_each)

    def _look_before_each(self) -> None:
        self.subscriptions.ensure_open()
        self.look_at_queue()

    def drain(self, timeout: float | None) -> bool:
        """Take no new tasks, and wait until those in hand are done; say whether they are."""
        self.subscriptions.ensure_open()
        for side in list(self.holdings.sides.values()):
            for identifier in list(side.subscribers):
                with contextlib.suppress(ValueError):  # Somebody else has taken it out.
                    self.subscriptions.remove_task(side, identifier)
        idle = self.holdings.wait_until_idle(timeout)
        self.subscriptions.ensure_open()
        return idle

    # The selector thread

    def look_at_queue(self) -> None:
        """:raises directories.DirectoryRefused: another profile's has come in its place."""
        self.layout.owner.look(self.layout.queue)

    def is_forsaken(self) -> bool:
        """Say whether the communicator is gone: a signal handler has raised where it was made."""
        return self._facade() is None

    def look_at_pipes(self) -> None:
        """Make our reply pipe again, should somebody have removed it."""
        self._pipes.look()

    def find_answers(self) -> None:
        """Take the answers that were left on the disk for us."""
        if self.calls:
            self._pipes.find_bodies(self.reply)

    def _run(self) -> None:
        try:
            while not self._done:
                self.poller.poll()
        finally:
            self._tear_down()

    def on_death(self, writer: fifo.Writer) -> None:
        """Fail the calls to somebody who has died, once what it has answered is read."""
        if writer in self.calls.ways():
            # What the recipient wrote before it died is in our pipe by now, or on the disk.
            self._pipes.drain(self.reply)
            try:
                self.find_answers()
            except OSError as error:
                _LOGGER.error("%s cannot look for answers now: %s", self.name, error)
                self.poller.later(1.0, functools.partial(self.on_death, writer))
                return
            fail = functools.partial(self.calls.fail, writer, kiwipy.DeliveryFailed("the recipient died or closed"))
            if self.codec.runs_user_code:
                self.decoding.put(fail)  # After the answers that are still being decoded.
            else:
                fail()

    # The end

    def close_soon(self) -> None:
        """Close in the selector thread; safe to be called by the garbage collector in any thread."""
        # Each time, as a signal handler that raises may have interrupted the last.
        self.closed = self.subscriptions.closed = True
        self.poller.call(self._stop)

    def close(self) -> None:
        """Close, and wait until it is done.

        But not for ever: the caller may be a signal handler that has interrupted somebody who holds a lock that closing
        takes. It is done then when that one goes on.
        """
        self.close_soon()
        if self._thread.ident is not None and threading.current_thread() is not self._thread:
            self._thread.join(_PATIENCE_SECONDS)
            if self._thread.is_alive():
                return  # Nobody has told the lanes to end.
            self.calls.end_the_rest()
            for lane in self._lanes:
                lane.join()

    def disown(self) -> None:
        """Be closed, in a forked child; the poller has closed its copies itself."""
        self.closed = self._done = True
        for part in (self.subscriptions, self.holdings, self._reports, self.post.ways, *self._lanes, self.calls):
            part.disown()

    def _stop(self) -> None:
        self._done = True

    def _tear_down(self) -> None:
        # From the outside in: first nobody gives us anything more, then we give back, then we vanish.
        steps: list[Callable[[], object]] = [
            self.subscriptions.leave,
            self._reports.send,
            lambda: self.poller.flush(_FLUSH_SECONDS),
            self.post.ways.close,
            self.subscriptions.end,
            lambda: self._pipes.close(and_bodies=True),
            self.poller.close,
            self.decoding.finish,
            self.calls.close,
        ]
        for step in steps:
            try:
                step()
            except Exception:
                say("Closing %s went wrong", self.name)
        self.tasks.lane.stop()
        self.messages.lane.stop()
        self._callbacks.finish()


_engines: weakref.WeakSet[Engine] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    for engine in list(_engines):
        engine.close()


def _disown_copies() -> None:
    for engine in list(_engines):
        engine.disown()


os.register_at_fork(after_in_child=_disown_copies)
