"""What the torture calls a fault and what it does not, as nobody can see in a run that goes well."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import pytest

from harness import HERE

sys.path.append(str(HERE / "tools"))
import fire
import torture


@pytest.mark.parametrize(
    ("lines", "wrong"),
    [
        ("5 first a|5 second a|6 first b", 0),
        ("5 first a|- dies a|5 first b", 0),
        ("- dies a|5 first a|5 first b", 0),  # It was killed a moment after that was written.
        ("5 first a|5 first b", 1),
        ("5 first a|5 first b|- dies a", 1),
        ("5 first a|- dies b|5 first b", 1),
        ("5 first a|5 first a|- dies a|5 first b", 1),
        ("5 first a|- dies a|5 first a", 1),
        ("- pause 5|5 first a|- kill_worker 12:00:00|- dies a|5 first b|5 first b", 1),
    ],
)
def test_a_step_may_run_again_after_a_death_only(tmp_path: Path, lines: str, wrong: int) -> None:
    evidence = fire.Evidence(tmp_path / "evidence")
    evidence.path.write_text(lines.replace("|", "\n") + "\n")
    assert len(evidence.repeated()) == wrong


@pytest.mark.parametrize(
    ("lines", "again", "unexplained"),
    [
        ("1 a|2 a", 0, 0),
        ("1 a|killed a|1 b", 1, 0),
        ("1 a|1 b|killed a", 0, 1),
        ("1 a|1 a|killed a", 0, 1),
        ("1 a|killed a|1 a", 0, 1),
    ],
)
def test_a_task_may_be_done_again_after_a_kill_only(lines: str, again: int, unexplained: int) -> None:
    found = torture.done_again([line.split() for line in lines.split("|")])
    assert (len(found[1]), len(found[2])) == (again, unexplained)


@pytest.mark.parametrize(
    ("answers", "wrong"),
    [
        ({"pause Small: True": 9, "play Parent: UnroutableError": 1, "pause add: RemoteException": 1}, 0),
        ({"pause Small: True": 9, "pause Small: TimeoutError": 2}, 1),
        ({"play Small: TimeoutError": 1, "pause Parent: TimeoutError": 1}, 2),
        ({"kill ArithmeticAddCalculation: TimeoutError": 9}, 0),
    ],
)
def test_what_is_asked_under_fire_is_answered(answers: dict[str, int], wrong: int) -> None:
    assert len(fire.unanswered(Counter(answers))) == wrong
