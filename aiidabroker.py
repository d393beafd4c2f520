"""`PipeBroker`, by which AiiDA finds the named pipes: its communicator, its serializer, and its settings.

Strategy: AiiDA gets a `PipeCommunicator` that differs from the plain one in three things. What JSON lacks goes through
AiiDA's own serializer; where a process would be lost over a moment without room, it gets the one error that it takes
for passing; and a coordinator that is needed and not running is started, and lives as long as it is needed.

Rules:
- A task that was accepted is never reported as refused: whatever fails after that is a warning in AiiDA's log.
- Making a `PipeBroker` starts and makes nothing, as many commands only look at it; nor does ``verdi status``, which is
  told that no coordinator serves by the one way it knows, an error.
- Nothing here is needed without AiiDA, and nothing else in the project imports it but when asked for `PipeBroker`, to
  configure a profile, or to say what its processes are.
- Not imported at the top: ``aiida.orm`` and AiiDA's daemon, which take up to 0.8 s where AiiDA's other modules that
  stand there take nothing, since whoever loads a broker has them; and ``control``, 10 ms for the few who start one.

AiiDA 2.6 and newer: a broker's configuration fields came after 2.6, where `PipeBroker` has none.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import select
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import kiwipy
from aiida.brokers import broker as base
from aiida.common.exceptions import ConfigurationError, EntryPointError
from aiida.manage.configuration import get_config
from aiida.plugins import BrokerFactory

if TYPE_CHECKING or not __package__:
    import control_profiles
    import directories
    import pipebroker
    import presence
    import taskqueue
else:
    from . import control_profiles, directories, pipebroker, presence, taskqueue

__all__ = ("PipeBroker", "configure")

NAME = "core.namedpipe"
"""What AiiDA's profiles call it, copied into AiiDA or as a plugin."""
_SERIALIZED = "aiida.orm.utils.serialize"
_REVIVE_SECONDS = 1.0
_COMING_SECONDS = 5.0
"""For how long ``verdi status`` waits for the coordinator that a daemon's first worker starts, after some two."""
IDLE_SECONDS = 300
"""For how long a coordinator that was started here serves on where no communicator is."""

# A name below AiiDA's own, whatever this module is called, so that it goes where AiiDA's log goes.
_LOGGER = logging.getLogger("aiida.broker.namedpipe")


class PipeBroker(base.Broker):  # type: ignore[misc]
    """AiiDA's way to the named pipes.

    A coordinator that is not running is started by whoever asks for a communicator, and one that has died also by
    whoever sends a task or a broadcast. One that was stopped in an orderly way stays stopped until somebody asks. Of an
    older version, it is replaced when the first task subscriber comes. It ends when nobody has been there for
    ``process_control.config.idle`` seconds. With ``process_control.config.autostart`` false, all of that is left to the
    user.
    """

    if hasattr(base, "BrokerConfigField"):
        _config_fields = (
            base.BrokerConfigField(
                name="autostart",
                prompt="Start the coordinator when it is needed",
                help="Whether a coordinator is started when it is needed and not running.",
                default=True,
                param_type="bool",
            ),
            base.BrokerConfigField(
                name="idle",
                prompt="Seconds after which a coordinator that nobody uses ends (0: never)",
                help="For how many seconds a coordinator that was started so serves on where nobody is; 0: for ever.",
                default=IDLE_SECONDS,
                param_type="int",
            ),
        )

    def __init__(self, profile: Any) -> None:
        """
        :param profile: AiiDA's profile. Nothing is started or made yet, as many commands only look at the broker.
        """
        super().__init__(profile)
        self._communicator: _BrokerCommunicator | None = None
        self._mutex = threading.RLock()
        """Guards the communicator."""
        _brokers.add(self)
        self._revived = float("-inf")
        home = Path(get_config().dirpath)
        self._has_relative_home = not home.is_absolute()
        self._was_known = False
        self.config_path = Path(home, "profiles", profile.name).absolute()
        """The profile's configuration directory."""
        with contextlib.suppress(ValueError, OSError):
            self._was_known = control_profiles.of(self.config_path) is not None

    def __str__(self) -> str:
        status = self.probe_service_status()
        if "error" in status:
            return f"Named pipes @ {self.config_path} <{status['error']}>"
        tasks = f"{status['waiting']} tasks waiting, {status['claimed']} in hand"
        running = f"coordinator PID {status['pid']}" if status["connected"] else "coordinator <not running>"
        paused = f"; paused: nothing new is started until '{self._command} resume'" if status["paused"] else ""
        return f"Named pipes @ {self.config_path}: {running}, {tasks}{paused}"

    def get_communicator(self) -> pipebroker.PipeCommunicator:
        """Return the communicator; make it first, and start a coordinator, where necessary.

        :raises ConnectionError: ``verdi status`` asks, and no coordinator serves.
        """
        if _only_looks():
            self._expect_service()
        # Before it is looked for: one that is about to end as nobody is there sees this, or is not found any more.
        communicator = self._connect()
        if not self.check_service_reachable():
            if self._autostart:
                self._start_coordinator(self._idle)
            else:
                _LOGGER.warning(
                    "The coordinator is not running, so tasks wait on the disk. Start it by '%s start'.", self._command
                )
        return communicator

    def _expect_service(self) -> None:
        """:raises ConnectionError: no coordinator serves; the message says what to do."""
        said = self._said_by_service()
        if said is None and self._autostart and _daemon_runs(self._profile):
            end = time.monotonic() + _COMING_SECONDS
            while said is None and time.monotonic() < end:
                select.select([], [], [], 1.0)  # A person watches.
                said = self._said_by_service()
        if said is None:
            raise ConnectionError(
                f"no coordinator serves, so tasks wait on the disk: start one by '{self._command} start'"
            )
        if presence.is_stopped(said.get("pid")):
            raise ConnectionError(
                f"the coordinator is stopped, so tasks wait on the disk: let it go on by 'kill -CONT {said['pid']}'"
            )

    def _said_by_service(self) -> dict[str, Any] | None:
        """:raises ConnectionError: the queue there is not this profile's, or not one of this version."""
        layout = directories.locate(self.config_path)
        if layout is None:
            return None
        try:
            directories.check(layout, self._profile.name, self._uuid())
        except directories.DirectoryRefused as error:
            raise ConnectionError(str(error)) from error
        return presence.coordinator(layout)

    def iterate_tasks(self) -> Iterator[pipebroker.PipeIncomingTask]:
        """Yield the tasks that no live worker holds; those that are not processed wait again when the loop ends."""
        yield from self._connect().task_queue(pipebroker.DEFAULT_QUEUE)

    def check_service_reachable(self) -> bool:
        """Return whether a coordinator is running."""
        layout = directories.locate(self.config_path)
        return layout is not None and presence.coordinator(layout) is not None

    def probe_service_status(self) -> dict[str, Any]:
        """Return, from the disk, whether a coordinator runs, its pid, how many tasks wait or are in hand, and so on."""
        try:
            layout = directories.locate(self.config_path)
            if layout is None:
                return {"connected": False, "pid": None, "waiting": 0, "claimed": 0, "paused": False}
            said = presence.coordinator(layout)
            queue = taskqueue.TaskQueue(layout.queue)
            return {
                "connected": said is not None,
                "pid": said.get("pid") if said is not None else None,
                "waiting": sum(1 for _ in queue.names()),
                "claimed": sum(1 for _ in queue.claimed()),
                "paused": os.path.lexists(layout.paused),
                "pipes": str(layout.pipes),
            }
        except OSError as error:
            return {"connected": False, "error": f"{type(error).__name__}: {error}"}

    def disown(self) -> None:
        """Be as new, in a forked child: another thread of the parent may have had the lock."""
        self._mutex = threading.RLock()

    def close(self) -> None:
        """Close the communicator. The coordinator runs on."""
        with self._mutex:
            communicator, self._communicator = self._communicator, None
        if communicator is not None:
            communicator.close()

    def revive(self) -> None:
        """Start the coordinator again if it has died: one that was stopped has taken its entry with it.

        Nothing is raised, as what the caller has sent is accepted, and whoever heard of a failure would send it twice.
        """
        try:
            if self._has_died() and self._autostart and time.monotonic() - self._revived > _REVIVE_SECONDS:
                self._revived = time.monotonic()
                # On a thread, as whoever sends may be a worker's event loop.
                threading.Thread(target=self._start_coordinator, args=(self._idle,), daemon=True).start()
        except Exception as error:
            _LOGGER.warning("Perhaps no coordinator runs, and without one tasks wait on the disk: %s", error)

    def _has_died(self) -> bool:
        layout = directories.locate(self.config_path)
        if layout is None or directories.is_read(layout.pipes / directories.TASKS_INTAKE):
            return False
        return (layout.registry / "coordinator.json").exists()

    def renew(self) -> None:
        """Replace a coordinator of an older version, which may not know what this one does. Nothing is raised.

        One that is stopped stays, as it could not end now, and might do so when nobody is there to start another.
        """
        try:
            layout = directories.locate(self.config_path)
            said = presence.coordinator(layout) if layout is not None else None
            # One that has said nothing yet is just starting, and is of today.
            if said is None or "since" not in said or not self._autostart or not _is_older(said.get("version")):
                return
            version = said.get("version") or "unknown"
            if presence.is_stopped(said["pid"]):
                _LOGGER.warning(
                    "The coordinator has version %s, and is stopped: let it go on by 'kill -CONT %d', and then replace "
                    "it by '%s restart'", version, said["pid"], self._command
                )  # fmt: skip
                return
            _LOGGER.info("The coordinator has version %s, and is replaced", version)
            _control().stop(self.config_path, said["pid"])
            # An older one that does not say so has been started here.
            self._start_coordinator(said.get("idle", self._idle))
        except Exception as error:
            _LOGGER.warning("The coordinator is of an older version, and cannot be replaced: %s", error)

    @property
    def _autostart(self) -> bool:
        return bool((self._profile.process_control_config or {}).get("autostart", True))

    @property
    def _idle(self) -> float | None:
        seconds = (self._profile.process_control_config or {}).get("idle", IDLE_SECONDS)
        return seconds if isinstance(seconds, int | float) and seconds > 0 else None

    @property
    def _command(self) -> str:
        return control_profiles.command(self._profile.name, self.config_path)

    def _connect(self) -> _BrokerCommunicator:
        with self._mutex:
            if self._communicator is None or self._communicator.is_closed():
                self._communicator = _BrokerCommunicator(
                    self._profile, self.config_path, self._uuid(), self.revive, self.renew
                )
            return self._communicator

    def _uuid(self) -> str | None:
        """Return what tells the profile from an earlier one of its name; `None` where AiiDA does not know.

        :raises ConnectionError: AiiDA has another profile there now than this process has loaded, or none.
        """
        name, uuid = control_profiles.identity(self.config_path)
        missing = name is None and self._is_missing()
        if uuid in (None, self._profile.uuid) and not missing:
            return uuid
        if missing and not self._was_known and not self._has_relative_home:
            return str(self._profile.uuid)  # One that AiiDA has not stored, or not yet.
        if self._has_relative_home:
            raise ConnectionError(
                f"AiiDA's directory was named by a relative path, and {self.config_path} is not that of the profile "
                f"'{self._profile.name}': make AIIDA_PATH absolute"
            )
        raise ConnectionError(
            f"the profile '{self._profile.name}' that this process has loaded was deleted since: start this process "
            "again, with a profile that there is"
        )

    def _is_missing(self) -> bool:
        """Say whether the profile would stand in AiiDA's configuration, were it not deleted, new or elsewhere."""
        return self._has_relative_home or control_profiles.read(self.config_path.parent.parent) is not None

    def _start_coordinator(self, idle: float | None) -> None:
        try:
            layout = directories.establish(self._profile.name, self.config_path, self._uuid())
            # However many want to start one, one does, and the others find it running.
            try:
                if presence.coordinator(layout) is None:
                    _control().start(self._profile.name, self.config_path, idle=idle)
            except presence.CoordinatorError:
                if presence.coordinator(layout) is None:
                    raise
        except Exception as error:
            # Without it everything still works but sharing out tasks, and they are safe on the disk.
            _LOGGER.warning("The coordinator could not be started, so tasks wait on the disk: %s", error)


_brokers: weakref.WeakSet[PipeBroker] = weakref.WeakSet()


def _disown_copies() -> None:
    for broker in list(_brokers):
        broker.disown()


os.register_at_fork(after_in_child=_disown_copies)


def _control() -> Any:
    if TYPE_CHECKING or not __package__:
        import control
    else:
        from . import control
    return control


def _only_looks() -> bool:
    """Say whether this is ``verdi status``."""
    click = sys.modules.get("click")  # Which has not been imported where no verdi runs.
    context = click.get_current_context(silent=True) if click is not None else None
    if context is None or context.parent is None or context.parent.parent is not None:
        return False
    return (context.parent.command.name, context.command.name) == ("verdi", "status")


def _is_older(version: object) -> bool:
    def number(text: object) -> list[int]:
        return [int(part) for part in re.findall(r"\d+", str(text or ""))]

    return number(version) < number(directories.VERSION)


class _BrokerCommunicator(pipebroker.PipeCommunicator):
    """A communicator in the hands of plumpy, which lets a process except on anything but a `kiwipy.TimeoutError`."""

    def __init__(
        self,
        profile: Any,
        config_path: Path,
        uuid: str | None,
        revive: Callable[[], None],
        renew: Callable[[], None],
    ) -> None:
        super().__init__(
            profile.name,
            config_path,
            task_prefetch_count=get_config().get_option("daemon.worker_process_slots", scope=profile.name),
            encoder=_encode,
            decoder=_decode,
            profile_uuid=uuid,
        )
        self._revive = revive
        self._renew = renew

    def add_task_subscriber(self, subscriber: Callable[..., Any], identifier: Any = None) -> Any:
        """Do what `PipeCommunicator.add_task_subscriber` does, and see to it that the coordinator is as new as this."""
        identifier = super().add_task_subscriber(subscriber, identifier)
        self._renew()
        return identifier

    def task_send(self, task: Any, no_reply: bool = False) -> kiwipy.Future | None:
        """Do what `PipeCommunicator.task_send` does, and see to it that there is somebody to share the task out."""
        future = super().task_send(task, no_reply)
        self._revive()
        return future

    def broadcast_send(self, body: Any, sender: Any = None, subject: Any = None, correlation_id: Any = None) -> bool:
        """:raises kiwipy.TimeoutError: it could not be sent."""
        with _as_timeout():
            super().broadcast_send(body, sender, subject, correlation_id)
        self._revive()
        return True

    def add_rpc_subscriber(self, subscriber: Callable[..., Any], identifier: Any = None) -> Any:
        """:raises kiwipy.TimeoutError: the system has no room for another pipe or name."""
        with _as_timeout():
            return super().add_rpc_subscriber(subscriber, identifier)

    def add_broadcast_subscriber(self, subscriber: Callable[..., Any], identifier: Any = None) -> Any:
        """:raises kiwipy.TimeoutError: the system has no room for another pipe or name."""
        with _as_timeout():
            return super().add_broadcast_subscriber(subscriber, identifier)


@contextlib.contextmanager
def _as_timeout() -> Iterator[None]:
    try:
        yield
    except (OSError, BufferError, RuntimeError, kiwipy.CommunicatorClosed) as error:
        raise kiwipy.TimeoutError(f"{type(error).__name__}: {error}") from error


def _encode(value: Any) -> dict[str, str]:
    """Express what JSON lacks, such as a node, with AiiDA's own serializer."""
    from aiida.orm.utils import serialize

    try:
        return {_SERIALIZED: serialize.serialize(value)}
    except Exception as error:
        raise TypeError(f"AiiDA cannot serialize {value!r}: {error}") from error


def _decode(mapping: dict[str, Any]) -> Any:
    if mapping.keys() != {_SERIALIZED}:
        return mapping
    from aiida.orm.utils import serialize

    return serialize.deserialize_unsafe(mapping[_SERIALIZED])


def configure(
    profile_name: str, config_path: Path, *, autostart: bool = True, idle: float = IDLE_SECONDS
) -> bool | None:
    """Point an AiiDA profile at this broker.

    :param config_path: the profile's directory, which is to be AiiDA's own.
    :param autostart: whether a coordinator is started when it is needed and not running.
    :param idle: for how many seconds one that was started so serves on where nobody is; 0: for ever.
    :return: whether the profile's daemon runs; `None` if that cannot be known.
    :raises RuntimeError: AiiDA cannot find this broker, or the profile.
    """
    try:
        BrokerFactory(NAME)
    except EntryPointError as error:
        raise RuntimeError(
            f"AiiDA does not have one broker '{NAME}': run 'pip install .' or vendor.py; where both were run, 'pip "
            f"uninstall aiida-namedpipe' takes one out ({error})"
        ) from error
    try:
        config = get_config()
        profile = config.get_profile(profile_name)
    except (ConfigurationError, AttributeError, TypeError, KeyError) as error:  # The latter, if it is edited by hand.
        raise RuntimeError(f"AiiDA's configuration cannot be read: {error}") from error
    own = Path(config.dirpath, "profiles", profile_name)
    if os.path.realpath(own) != os.path.realpath(config_path):
        raise RuntimeError(
            f"{config_path} is not where AiiDA has this profile, which is {own}: AIIDA_PATH chooses that"
        )
    profile.set_process_controller(name=NAME, config={"autostart": autostart, "idle": idle})
    config.update_profile(profile)
    config.store()
    return _daemon_runs(profile)


def _daemon_runs(profile: Any) -> bool | None:
    """Say whether a profile's daemon runs; `None` if that cannot be known."""
    try:
        from aiida.engine.daemon.client import DaemonClient  # Half a second, for this alone.

        return bool(DaemonClient(profile).is_daemon_running)
    except Exception:
        return None


def processes(config_path: Path, pks: Iterable[int]) -> dict[int, dict[str, Any]]:
    """Return what AiiDA says of processes, by their pks: ``pk``, ``label`` and ``state``; of those that it knows.

    :raises RuntimeError: the profile is none of AiiDA's, or AiiDA cannot be asked.
    """
    found = control_profiles.of(config_path)
    if found is None:
        raise RuntimeError(f"{config_path} is no profile of AiiDA's, so no process can be looked up")
    try:
        own = get_config().dirpath
        if os.path.samefile(own, found[0].directory):
            from aiida import load_profile, orm

            load_profile(found[1])
            builder = orm.QueryBuilder().append(
                orm.ProcessNode,
                filters={"id": {"in": list(pks) or [0]}},
                project=["id", "attributes.process_label", "attributes.process_state"],
            )
            return {
                number: {"pk": number, "label": label, "state": state} for number, label, state in builder.iterall()
            }
    except Exception as error:
        raise RuntimeError(f"AiiDA cannot be asked: {type(error).__name__}: {error}") from error
    raise RuntimeError(f"AiiDA has its profiles in {own}: AIIDA_PATH says where it looks")
