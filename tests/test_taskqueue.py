"""The life of a task on disk, without any other process."""

from __future__ import annotations

from pathlib import Path

import pytest

import taskqueue
from claims import Claims


def put(queue: taskqueue.TaskQueue) -> str:
    task_id = taskqueue.new_id()
    queue.put(task_id, '{"body": 1, "no_reply": true}', lambda: None)
    return task_id


def complete(queue: taskqueue.TaskQueue, number: int) -> list[str]:
    names = [put(queue) for _ in range(number)]
    claims = Claims(queue, "worker", queue.directory / "paused")
    for name in names:
        task = claims.take(name, print)
        assert task is not None and claims.settle(task, lambda: None, "completed", f"reason {name}")
    return names


def test_completed_tasks_are_kept_up_to_a_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(taskqueue, "COMPLETED_KEPT", 3)
    queue = taskqueue.TaskQueue(tmp_path, fsync=False)
    names = complete(queue, 8)
    assert sum(queue.sweep()) == 5
    assert sorted(queue.names("completed")) == names[5:]
    assert [bool(queue.reason(name, "completed")) for name in names] == [False] * 5 + [True] * 3
    assert sum(queue.sweep()) == 0


def test_completed_tasks_are_kept_for_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    queue = taskqueue.TaskQueue(tmp_path, fsync=False)
    names = complete(queue, 3)
    assert sum(queue.sweep()) == 0
    monkeypatch.setattr(taskqueue, "COMPLETED_KEPT_SECONDS", -1.0)
    assert sum(queue.sweep()) == 3
    assert not list(queue.names("completed")) and not any(queue.reason(name, "completed") for name in names)


def test_tasks_of_others_do_not_end_by_our_hand(tmp_path: Path) -> None:
    queue = taskqueue.TaskQueue(tmp_path, fsync=False)
    name = put(queue)
    first, second = (Claims(queue, worker_id, tmp_path / "paused") for worker_id in ("first", "second"))
    task = first.take(name, print)
    assert task is not None and second.take(name, print) is None
    assert first.settle(task, lambda: None, "")
    again = second.take(name, print)
    assert again is not None and not first.settle(task, lambda: None, "completed")
    assert [name for _, name in queue.claimed()] == [name]
    assert second.settle(again, lambda: None, "completed")


def test_task_that_cannot_be_moved_is_not_forgotten(tmp_path: Path) -> None:
    queue = taskqueue.TaskQueue(tmp_path, fsync=False)
    name = put(queue)
    claims = Claims(queue, "worker", tmp_path / "paused")
    task = claims.take(name, print)
    (tmp_path / "completed").write_text("in the way")
    assert task is not None and claims.settle(task, lambda: None, "completed")
    assert [name for _, name in queue.claimed()] == [name]
    (tmp_path / "completed").unlink()
    claims.look()
    assert list(queue.names("completed")) == [name]


def test_nothing_is_claimed_while_all_is_paused(tmp_path: Path) -> None:
    queue = taskqueue.TaskQueue(tmp_path, fsync=False)
    name = put(queue)
    paused = tmp_path / "paused"
    claims = Claims(queue, "worker", paused)
    paused.touch()
    assert claims.take(name, print) is None and not len(claims)
    assert list(queue.names()) == [name] and not list(queue.claimed())
    paused.unlink()
    assert claims.take(name, print) is not None
