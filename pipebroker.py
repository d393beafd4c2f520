"""`PipeCommunicator`, a `kiwipy.Communicator` on named pipes, and its task queues: the public face.

Strategy: the disk holds the truth, and the pipes are doorbells. A task is a file from before `task_send` returns until
it is done; a frame only says "look". RPC and replies go straight from process to process; only tasks to be shared out
and broadcasts to be fanned out pass the coordinator. What does all that is the `Engine` (``engine.py``).

Rules:
- Whatever code runs on ``kiwipy.rmq.RmqThreadCommunicator`` runs on `PipeCommunicator` with only its construction
  changed, but for what is AMQP's own: ``server_properties``, ``loop`` and ``add_close_callback``.
- A task that was taken and is not finished waits again: when its context or loop ends, when the future of its outcome
  is dropped, when the communicator is closed or collected, and when the process dies."""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import os
import weakref
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import kiwipy

if TYPE_CHECKING or not __package__:
    import directories
    import frames
    import taskqueue
    from calls import RemoteTraceback, failure
    from engine import Engine
    from holding import Side
else:
    from . import directories, frames, taskqueue
    from .calls import RemoteTraceback, failure
    from .engine import Engine
    from .holding import Side

__all__ = ("DEFAULT_QUEUE", "PipeCommunicator", "PipeIncomingTask", "PipeTaskQueue", "RemoteTraceback")

DEFAULT_QUEUE = "kiwipy.tasks"
"""The name by which `PipeCommunicator.task_queue` gives the default queue, as in ``kiwipy.rmq.defaults``."""


class PipeCommunicator(kiwipy.Communicator):  # type: ignore[misc]
    """A `kiwipy.Communicator` on named pipes: what ``kiwipy.rmq.RmqThreadCommunicator`` is on RabbitMQ.

    It is thread-safe, and a context manager. It needs no running coordinator to be made, to send tasks (they wait on
    the disk) or for RPC; only tasks that are to reach a subscriber and broadcasts need one.

    Once it is closed, whatever sends, subscribes or unsubscribes raises `kiwipy.CommunicatorClosed`. Where the system
    has no descriptor, room or thread left, what needs one raises `OSError` or `RuntimeError`.
    """

    def __init__(
        self,
        profile_name: str,
        config_path: str | os.PathLike[str],
        worker_id: str | None = None,
        *,
        task_prefetch_count: int = 0,
        encoder: Callable[[Any], Any] | None = None,
        decoder: Callable[[dict[str, Any]], Any] | None = None,
        fsync: bool = True,
        profile_uuid: str | None = None,
    ) -> None:
        """
        :param profile_name: the name of the profile; it names the pipes directory.
        :param config_path: the profile's configuration directory; all who name the same one talk to each other.
        :param worker_id: a name of letters, digits, '.', '_' and '-', for the log and the registry (default: made up).
        :param task_prefetch_count: how many tasks of the default queue this communicator holds at once (0: no limit).
        :param encoder: the ``default`` of `json.dumps`, called for what JSON cannot express, in place of our own, which
            knows what ``frames.py`` lists.
        :param decoder: the ``object_hook`` of `json.loads`, called for each JSON object in a body or result.
        :param fsync: whether `task_send` waits until the task would survive a loss of power.
        :param profile_uuid: what tells this profile from an earlier one of its name; `None` matches all.
        :raises ValueError: a name, or the prefetch, cannot be used.
        :raises directories.DirectoryRefused: a directory is not safe to use, or cannot be used.
        :raises kiwipy.DuplicateSubscriberIdentifier: a live worker has this id.
        """
        if worker_id is not None:
            directories.check_worker_id(worker_id)
        _check_prefetch(task_prefetch_count)
        layout = directories.establish(profile_name, config_path, profile_uuid)
        codec = frames.Codec(encoder, decoder)
        self._engine = Engine(layout, weakref.ref(self), worker_id, task_prefetch_count, codec, fsync=fsync)
        weakref.finalize(self, self._engine.close_soon).atexit = False

    def __str__(self) -> str:
        return f"PipeCommunicator({self._engine.subscriptions.worker_id}, {self._engine.layout.pipes})"

    @property
    def worker_id(self) -> str:
        """The name under which the registry knows this communicator."""
        return self._engine.subscriptions.worker_id

    def is_closed(self) -> bool:
        """Return whether the communicator was closed."""
        return self._engine.closed

    def close(self) -> None:
        """Send what was accepted, give unfinished tasks back, and remove the pipes, routes and registry entry.

        Futures that are still pending get `kiwipy.CommunicatorClosed`. A subscriber that is running is not waited for.
        """
        self._engine.close()

    def drain(self, timeout: float | None = None) -> bool:
        """Take no new tasks, and wait until those in hand are done; calls and broadcasts are answered on.

        It unsubscribes from all task queues. Not for a subscriber, which would wait for itself, nor for a signal
        handler, which may have interrupted what it waits for. A task that a subscriber has cancelled is in hand until
        `close`.

        :param timeout: for how many seconds at most; `None`: as long as it takes.
        :return: whether nothing is in hand any more. If not, `close` gives it back.
        """
        return self._engine.drain(timeout)

    def add_rpc_subscriber(self, subscriber: Callable[..., Any], identifier: Any = None) -> Any:
        """Answer the calls for an identifier with ``subscriber(communicator, body)``.

        :param identifier: of any type, compared as `str` (default: made up).
        :return: the identifier.
        :raises kiwipy.DuplicateSubscriberIdentifier: a live communicator of this configuration has it.
        :raises TypeError: the subscriber cannot be called.
        """
        return self._engine.subscriptions.add_rpc(subscriber, identifier)

    def remove_rpc_subscriber(self, identifier: Any) -> None:
        """Stop answering the calls for an identifier.

        :raises ValueError: there is no such subscriber.
        """
        self._engine.subscriptions.remove_rpc(identifier)

    def add_task_subscriber(self, subscriber: Callable[..., Any], identifier: Any = None) -> Any:
        """Work on tasks of the default queue with ``subscriber(communicator, body)``.

        If it returns a future, the task is held until that future is done. If it raises `kiwipy.TaskRejected`, the task
        goes to the next subscriber, then to the next worker.

        :return: the identifier.
        :raises kiwipy.DuplicateSubscriberIdentifier: a subscriber of this communicator has it.
        """
        return self._engine.subscriptions.add_task(self._engine.default, subscriber, identifier)

    def remove_task_subscriber(self, identifier: Any) -> None:
        """Stop working on tasks of the default queue.

        :raises ValueError: there is no such subscriber.
        """
        self._engine.subscriptions.remove_task(self._engine.default, identifier)

    def add_broadcast_subscriber(self, subscriber: Callable[..., Any], identifier: Any = None) -> Any:
        """Receive all broadcasts with ``subscriber(communicator, body, sender, subject, correlation_id)``.

        :return: the identifier.
        :raises kiwipy.DuplicateSubscriberIdentifier: a subscriber of this communicator has it.
        """
        return self._engine.subscriptions.add_broadcast(subscriber, identifier)

    def remove_broadcast_subscriber(self, identifier: Any) -> None:
        """Stop receiving broadcasts.

        :raises ValueError: there is no such subscriber.
        """
        self._engine.subscriptions.remove_broadcast(identifier)

    def task_send(self, task: Any, no_reply: bool = False) -> kiwipy.Future | None:
        """Add a task to the default queue; when this returns, it is on the disk.

        :param task: the body.
        :param no_reply: do not ask for the outcome.
        :return: a future of the outcome; `None` with `no_reply`.
        :raises TypeError: JSON cannot express the body.
        :raises OSError: the task could not be written (the disk is full, say); nothing is left of it.
        """
        return self._engine.send_task(self._engine.default, task, no_reply)

    def task_queue(self, queue_name: str, prefetch_size: int = 0, prefetch_count: int = 0) -> PipeTaskQueue:
        """Return a named task queue, made where it is not there; `DEFAULT_QUEUE` is the default one.

        :param queue_name: any text.
        :param prefetch_size: must be 0, as with RabbitMQ.
        :param prefetch_count: how many tasks of the queue this communicator holds at once (0: as many as before, and no
            limit at first).
        :raises ValueError: the prefetch is no number of tasks, or the name is empty.
        :raises NotImplementedError: `prefetch_size` is not 0.
        """
        self._engine.subscriptions.ensure_open()
        if prefetch_size:
            raise NotImplementedError("prefetch_size must be 0: prefetching by size is not implemented")
        _check_prefetch(prefetch_count)
        name = None if queue_name == DEFAULT_QUEUE else queue_name
        return PipeTaskQueue(self, self._engine.subscriptions.side(name, prefetch_count))

    def rpc_send(self, recipient_id: Any, msg: Any) -> kiwipy.Future:
        """Call the RPC subscriber of an identifier.

        :return: a future of the answer; it gets `kiwipy.DeliveryFailed` if the recipient dies before it answers.
        :raises kiwipy.UnroutableError: no live communicator has the identifier.
        :raises kiwipy.DeliveryFailed: its recipient does not read, and too many calls wait for it already.
        :raises TypeError: JSON cannot express the message.
        """
        return self._engine.send_rpc(recipient_id, msg)

    def broadcast_send(self, body: Any, sender: Any = None, subject: Any = None, correlation_id: Any = None) -> bool:
        """Send a message to all broadcast subscribers; without a coordinator it is kept for one, at least 60 seconds.

        :return: `True`.
        :raises TypeError: JSON cannot express the message.
        :raises OSError: it could be neither sent nor kept.
        """
        self._engine.send_broadcast(body, sender, subject, correlation_id)
        return True


def _check_prefetch(count: object) -> None:
    if not isinstance(count, int) or count < 0:
        raise ValueError(f"a prefetch is 0 (no limit) or how many tasks are held at once, not {count!r}")


class PipeTaskQueue:
    """A task queue, as ``kiwipy.rmq.RmqThreadTaskQueue``. Made by `PipeCommunicator.task_queue`."""

    def __init__(self, communicator: PipeCommunicator, side: Side) -> None:
        self._communicator = communicator  # Which garbage collection would close.
        self._engine = communicator._engine
        self._side = side

    def __iter__(self) -> Iterator[PipeIncomingTask]:
        """Yield the waiting tasks, oldest first; those that are not processed wait again when the loop ends."""
        offered: list[PipeIncomingTask] = []
        with _afterwards(self._engine, functools.partial(_give_back, offered)):
            for task in self._engine.pull_each(self._side):
                offered.append(PipeIncomingTask(self._communicator, self._side, task))
                yield offered[-1]

    def task_send(self, task: Any, no_reply: bool = False) -> kiwipy.Future | None:
        """Add a task to this queue, as `PipeCommunicator.task_send` does to the default one."""
        return self._engine.send_task(self._side, task, no_reply)

    def add_task_subscriber(self, subscriber: Callable[..., Any], identifier: Any = None) -> Any:
        """Work on tasks of this queue, as `PipeCommunicator.add_task_subscriber` does on those of the default one."""
        return self._engine.subscriptions.add_task(self._side, subscriber, identifier)

    def remove_task_subscriber(self, subscriber: Any) -> None:
        """Stop working on tasks of this queue.

        :param subscriber: its identifier, whose name here is kiwipy's.
        :raises ValueError: there is no such subscriber.
        """
        self._engine.subscriptions.remove_task(self._side, subscriber)

    @contextlib.contextmanager
    def next_task(self, timeout: float = 5.0, fail: bool = True) -> Iterator[PipeIncomingTask | None]:
        """Take the oldest waiting task; if it is not processed, it waits again when the context ends.

        :param timeout: not used, as the disk answers at once; it is here because RabbitMQ's communicator has it.
        :param fail: raise if there is none; otherwise the context has `None`.
        :raises kiwipy.QueueEmpty: no task waits.
        """
        task = self._engine.pull(self._side)
        if task is None:
            if fail:
                raise kiwipy.QueueEmpty(f"no task waits in {self._side.queue.directory}")
            yield None
            return
        incoming = PipeIncomingTask(self._communicator, self._side, task)
        with _afterwards(self._engine, functools.partial(_give_back, [incoming])):
            yield incoming


@contextlib.contextmanager
def _afterwards(engine: Engine, action: Callable[[], None]) -> Iterator[None]:
    """Do something when a context or loop ends; in the selector thread, where the garbage collector ends it.

    The collector may interrupt anybody, who may hold any lock.
    """
    run = action
    try:
        yield
    except GeneratorExit:
        run = functools.partial(engine.poller.call, action)
        raise
    finally:
        run()


def _give_back(offered: list[PipeIncomingTask]) -> None:
    for incoming in offered:
        if incoming.state == "pending" and not incoming.is_closed:
            incoming.requeue()


class PipeIncomingTask:
    """A task taken from a queue, as ``kiwipy.rmq.RmqThreadIncomingTask``."""

    def __init__(self, communicator: PipeCommunicator, side: Side, task: taskqueue.Task) -> None:
        self._communicator = communicator
        self._engine = communicator._engine
        self._side = side
        self._task = task
        self._state = "pending"
        self._dropped: weakref.finalize[..., kiwipy.Future] | None = None

    @functools.cached_property
    def body(self) -> Any:
        """What was sent; :raises Exception: whatever the decoder raises."""
        return self._engine.codec.decode(self._task.message, "body")

    @property
    def no_reply(self) -> bool:
        """Whether the sender asked for no outcome."""
        return self._task.no_reply

    @property
    def state(self) -> str:
        """One of 'pending', 'processing', 'finished' and 'requeued'."""
        return self._state

    @property
    def is_closed(self) -> bool:
        """Whether the communicator is closed, which has given the task back."""
        return self._engine.closed

    def process(self) -> kiwipy.Future:
        """Start processing; the task is done when the future that this returns is, and waits again if it is dropped.

        :raises asyncio.InvalidStateError: the task is not pending.
        """
        self._begin()
        outcome = kiwipy.Future()
        outcome.add_done_callback(self._finish)
        # Not a reference of ours to the future, which would die with us where both are garbage at once.
        dropped = functools.partial(_drop, weakref.ref(self), self._engine, self._side, self._task)
        self._dropped = weakref.finalize(outcome, dropped)
        self._dropped.atexit = False
        return outcome

    @contextlib.contextmanager
    def processing(self) -> Iterator[kiwipy.Future]:
        """Process the task in a context, which gives the future of its outcome; if that is not done, it waits again.

        :raises asyncio.InvalidStateError: the task is not pending.
        """
        self._begin()
        outcome = kiwipy.Future()
        with _afterwards(self._engine, functools.partial(self._end, outcome)):
            try:
                yield outcome
            except Exception as error:
                with contextlib.suppress(concurrent.futures.InvalidStateError):
                    outcome.set_exception(error)
                raise

    def _end(self, outcome: kiwipy.Future) -> None:
        if outcome.done():
            self._finish(outcome)
        else:
            self._give_back()

    def requeue(self) -> None:
        """Let the task wait again; when this returns, it does.

        :raises asyncio.InvalidStateError: the task is finished or requeued.
        """
        if self._state not in ("pending", "processing"):
            self._refuse()
        self._give_back()

    def _begin(self) -> None:
        if self._state != "pending":
            self._refuse()
        self._state = "processing"

    def _refuse(self) -> None:
        # What RabbitMQ's communicator raises; asyncio takes long to import, and only mistaken code gets here.
        import asyncio

        raise asyncio.InvalidStateError(f"The task is {self._state}")

    def _give_back(self) -> None:
        self._state = "requeued"
        self._engine.holdings.give_back(self._side, self._task)

    def _finish(self, outcome: kiwipy.Future) -> None:
        if outcome.cancelled():
            self._state = "pending"
            if self._dropped is not None:
                self._dropped.detach()
            return
        error = outcome.exception()
        answer = failure(error) if error is not None else {"result": outcome.result()}
        self._engine.holdings.finish(self._side, self._task, answer)
        self._state = "finished"


def _drop(incoming: weakref.ReferenceType[PipeIncomingTask], engine: Engine, side: Side, task: taskqueue.Task) -> None:
    """Let a task wait again whose future was dropped. It changes nothing where the task is finished or requeued."""
    known = incoming()
    if known is not None and known._state == "processing":
        known._state = "requeued"
    # We are in a finalizer, which takes no lock.
    engine.poller.call(functools.partial(engine.holdings.give_back, side, task))


def __getattr__(name: str) -> Any:
    """Give `PipeBroker` to whoever asks for it here (PEP 562), so that importing this module does not import AiiDA."""
    if name != "PipeBroker":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if TYPE_CHECKING or not __package__:
        import aiidabroker
    else:
        from . import aiidabroker
    return aiidabroker.PipeBroker
