"""Many at once: what an event costs does not grow with what it does not concern. Calls are counted, not seconds."""

from __future__ import annotations

import collections
import os
import shutil
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import directories
import discovery
import presence
import taskqueue
from harness import FORKER, HOLDER, Broker, eventually, recorded
from members import Member
from peers import Queues
from poller import Poller
from scheduler import Scheduler

Counter = collections.Counter[str]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter:
    """Counts this process's calls that look at the disk."""
    counts: Counter = collections.Counter()

    def count(name: str) -> None:
        real: Callable[..., Any] = getattr(os, name)

        def counting(*arguments: Any, **options: Any) -> Any:
            counts[name] += 1
            return real(*arguments, **options)

        monkeypatch.setattr(os, name, counting)

    for name in ("scandir", "listdir", "readlink", "lstat", "stat", "unlink", "open", "rename"):
        count(name)
    return counts


def leave_dead(broker: Broker, layout: directories.Layout, number: int, routes: int) -> None:
    """Leave what so many workers leave that are killed."""
    for worker in range(number):
        worker_id, reply = f"dead{worker}", directories.reply_pipe()
        presence.Worker(worker_id, 1, time.time(), reply, {"": 0}, rpc=True).register(layout)
        layout.lock(worker_id).parent.mkdir(parents=True)
        layout.lock(worker_id).touch()
        for name in (reply, f"task_{worker_id}", f"rpc_{worker_id}"):
            os.mkfifo(layout.pipes / name)
        for route in range(routes):
            presence.claim_route(layout, f"{worker}.{route}", worker_id)


def test_burial_of_many_costs_little_more_than_their_files(broker: Broker, calls: Counter) -> None:
    layout = directories.establish(broker.profile, broker.config_path)
    cost = {}
    for number in (10, 40):
        leave_dead(broker, layout, number, 20)
        calls.clear()
        assert discovery.cleanup_dead_processes(broker.config_path) == number
        cost[number] = calls.total()
        assert not list(layout.pipes.glob("*dead*")) and not list(layout.pipes.glob("route_*"))
    assert cost[40] < 5 * cost[10]


def test_those_who_come_look_at_nothing_of_the_others(broker: Broker, calls: Counter) -> None:
    layout = directories.establish(broker.profile, broker.config_path)
    cost = []
    for number in (1, 100):
        leave_dead(broker, layout, number, 10)
        calls.clear()
        with broker.communicator("comes") as communicator:
            communicator.add_task_subscriber(lambda *_: None)
            cost.append(calls.total())
        discovery.cleanup_dead_processes(broker.config_path)
    # A worker id that was used before is buried, which is one pass over the pipes.
    assert cost[1] - cost[0] < 2 * 100 * 10


def test_hundred_workers_die_at_once(served: Broker, tmp_path: Path) -> None:
    record = tmp_path / "record"
    script = FORKER + 'worker.add_rpc_subscriber(lambda *_: 1, f"worker{line.strip()}")\nnote(os.getpid())\n'
    forker = served.child(script + "time.sleep(1000)\n", record)
    for number in range(100):
        forker.tell(str(number))
    eventually(lambda: len(recorded(record)) == 100, 60)
    for pid in recorded(record):
        os.kill(int(pid), 9)
    eventually(lambda: not list(served.pipes.glob("route_*")))
    with served.communicator() as communicator:
        for number in range(100):
            communicator.add_rpc_subscriber(lambda *_: 2, f"worker{number}")


# The scheduler and the queues


def cost_of(scheduler: Scheduler, event: Callable[[], object]) -> int:
    """Return how many functions an event calls, sharing out included."""
    count = 0

    def profile(*_: object) -> None:
        nonlocal count
        count += 1

    sys.setprofile(profile)
    try:
        event()
        scheduler.dispatch(0.5)
    finally:
        sys.setprofile(None)
    return count


def test_event_costs_what_it_changes() -> None:
    costs = []
    for members, parked in ((3, 20), (100, 2000)):
        scheduler, crowd = Scheduler(), [Member(f"m{number}", prefetch=1) for number in range(members)]
        for member in crowd:
            scheduler.join(member)
        for number in range(members - 1):
            scheduler.add(f"0{number:05}")
        for member, names in scheduler.dispatch(0.0)[0].items():
            for name in names:
                scheduler.claimed(member, name)
        # All but one are full, and that one refuses everything.
        free = next(member for member in crowd if not member.held)
        for number in range(parked):
            scheduler.add(f"1{number:05}")
        for _ in range(parked):
            ((member, (name,)),) = scheduler.dispatch(0.0)[0].items()
            assert member is free
            scheduler.refuse(member, name)
        scheduler.dispatch(0.5)  # Which also looks once at each offer of the past.
        busy = next(member for member in crowd if member.held)
        costs.append(cost_of(scheduler, lambda busy=busy: scheduler.done(busy, next(iter(busy.held)))))
    assert costs[1] < costs[0] + 20


def test_one_task_is_rung_at_one_worker() -> None:
    scheduler, crowd = Scheduler(), [Member(f"m{number}") for number in range(10)]
    for member in crowd:
        scheduler.join(member)
    scheduler.add("task")
    rings = scheduler.dispatch(0.0)[0]
    for member in crowd[1:]:
        scheduler.join(member)
        rings |= scheduler.dispatch(0.01)[0]
    assert [names for names in rings.values()] == [["task"]]


def test_names_of_a_queue_that_is_only_pulled_are_not_kept(broker: Broker) -> None:
    layout = directories.establish(broker.profile, broker.config_path)
    taskqueue.TaskQueue(layout.queue_directory("pulled")).make()
    poller = Poller()
    queues = Queues(layout, poller)
    tracemalloc.start()
    try:
        queues.add("pulled", "first")
        before = tracemalloc.get_traced_memory()[0]
        for number in range(10_000):
            queues.add("pulled", f"{number:020d}-00000000")
        assert tracemalloc.get_traced_memory()[0] - before < 10_000
    finally:
        tracemalloc.stop()
        poller.close()


# The disk


def fill(queue: taskqueue.TaskQueue, state: str, number: int) -> None:
    queue.make()
    for _ in range(number):
        Path(queue.file(taskqueue.new_id(), state)).write_text('{"body": 1, "no_reply": true}')


def test_pulling_lists_the_directory_once(broker: Broker, calls: Counter) -> None:
    communicator = broker.communicator()
    queue = communicator.task_queue("pulled")
    directory = directories.locate(broker.config_path).queue_directory("pulled")
    fill(taskqueue.TaskQueue(directory), "", 300)
    bodies = []
    calls.clear()
    for _ in range(300):
        with queue.next_task() as task, task.processing() as outcome:
            bodies.append(task.body)
            outcome.set_result(None)
    assert bodies == [1] * 300
    assert calls["scandir"] + calls["listdir"] < 10


def test_sweep_asks_for_the_time_of_nothing_that_is_young(tmp_path: Path, calls: Counter) -> None:
    queue = taskqueue.TaskQueue(tmp_path)
    fill(queue, "completed", 500)
    fill(queue, "", 500)
    calls.clear()
    assert not any(queue.sweep())
    assert calls.total() < 50


def test_sweep_goes_in_small_steps(tmp_path: Path) -> None:
    queue = taskqueue.TaskQueue(tmp_path)
    fill(queue, "completed", taskqueue.COMPLETED_KEPT + 5000)
    steps = queue.sweep()
    tracemalloc.start()
    try:
        count = sum(1 for _ in steps)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # The names that are kept with their times, and no others.
    assert count > taskqueue.COMPLETED_KEPT and peak < 300 * taskqueue.COMPLETED_KEPT


def test_drift_goes_in_small_steps_and_keeps_no_second_list(tmp_path: Path) -> None:
    scheduler = Scheduler()
    scheduler.join(Member("m"))
    for number in range(1000):
        scheduler.add(f"{number:05}")
    scheduler.dispatch(0.0)

    def listing() -> Iterator[str]:
        yield from (f"{number:05}" for number in range(1000))

    assert sum(1 for _ in scheduler.drift(1.0, listing(), [])) >= 1000


# Directories that were forgotten


def test_coordinator_that_starts_removes_pipes_whose_configuration_is_gone(broker: Broker, tmp_path: Path) -> None:
    made = {name: Broker(tmp_path) for name in ("gone", "read", "there")}
    try:
        for other in made.values():
            directories.establish(other.profile, other.config_path)
            (other.pipes / f"body_reply_1_{'0' * 32}.{'0' * 32}").write_text("{}")
        reader = made["read"].child(HOLDER, "holder")
        stranger = made["there"].pipes.with_name(f"aiida_{made['there'].profile}_pipes_of_another")
        stranger.mkdir()
        for name in ("gone", "read"):
            shutil.rmtree(made[name].config_path)
        broker.start()
        eventually(lambda: not made["gone"].pipes.exists())
        assert made["read"].pipes.exists() and made["there"].pipes.exists() and stranger.is_dir()
        reader.kill()
    finally:
        for other in made.values():
            other.stack.close()
            shutil.rmtree(other.pipes, ignore_errors=True)
        stranger.rmdir()
