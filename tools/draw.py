#!/usr/bin/env python3
"""Draws the life of a task and the life of a worker, from tables that the tests compare with what is done.

    python tools/draw.py DIRECTORY

writes ``task.svg`` and ``worker.svg`` there. `TASK` has every move of a task's file that the code makes, and `COMING`
and `GOING` the order in which a worker's names appear and vanish (``tests/test_protocol.py``).
"""

from __future__ import annotations

import sys
from itertools import pairwise
from pathlib import Path
from xml.sax.saxutils import escape

TASK = {
    ("", "waiting"): ("sent", 0),
    ("waiting", "claimed"): ("claimed", -40),
    ("claimed", "waiting"): ("given back, or buried", -40),
    ("claimed", "completed"): ("done", 0),
    ("claimed", "failed"): ("no task, or the 20th death", 0),
    ("completed", "waiting"): ("requeued", 150),
    ("failed", "waiting"): ("requeued", -150),
    ("waiting", "failed"): ("being removed", 70),
    ("waiting", ""): ("could not be sent", 0),
    ("completed", ""): ("old, or removed", 0),
    ("failed", ""): ("removed", 0),
}
"""What a move from one state to another means, and how far its arrow is bent. Each is one rename(2); from '', where
there is no such file, it is that of a draft, and to '' an unlink(2)."""
COMING = [
    ("reply pipe", "PIPES/reply_{pid}_{hex}", "whose death will tell of its own"),
    ("lock", "QUEUE/claimed/{id}/lock", "its life begins"),
    ("other pipes", "PIPES/task_{id}, rpc_{id} …", "where it is rung and called"),
    ("entry", "REGISTRY/worker_{id}.json", "what it subscribes to"),
    ("register", "to coordinator_tasks", "read my entry"),
]
"""What a worker makes, in this order; where, and what it is for."""
GOING = [
    ("entry", "REGISTRY/worker_{id}.json", "nobody finds it any more"),
    ("register", "to coordinator_tasks", "it is not there any more"),
    ("tasks", "QUEUE/", "given back, without a death"),
    ("other pipes", "PIPES/task_{id}, rpc_{id} …", "what lies in them has been read"),
    ("lock", "QUEUE/claimed/{id}/lock", "its life is over"),
    ("reply pipe", "PIPES/reply_{pid}_{hex}", "its last way to hear"),
]
"""What it takes away where it goes in an orderly way, in this order. Who buries it where it is dead does the same, but
counts a death for each task, and takes away the entry after them."""

_WIDTH, _HEIGHT = 168, 46
_STATES = {"waiting": (250, 190), "claimed": (560, 190), "completed": (870, 100), "failed": (870, 280)}
_WHERE = {"waiting": "", "claimed": "claimed/{worker}/", "completed": "completed/", "failed": "failed/"}
_BEGIN = (60, 190)
_ENDS = {"waiting": (100, 290), "completed": (1060, 100), "failed": (1060, 280)}
Point = tuple[float, float]


def _text(x: float, y: float, text: str, size: int = 12, colour: str = "#222") -> str:
    return f'<text x="{x:g}" y="{y:g}" font-size="{size}" text-anchor="middle" fill="{colour}">{escape(text)}</text>'


def _box(x: float, y: float, name: str, below: str, colour: str = "#eef4fb") -> list[str]:
    corner = f'x="{x - _WIDTH / 2:g}" y="{y - _HEIGHT / 2:g}" width="{_WIDTH}" height="{_HEIGHT}"'
    return [
        f'<rect {corner} rx="6" fill="{colour}" stroke="#37628c"/>',
        _text(x, y - 2, name, 14),
        _text(x, y + 14, below, 10, "#555"),
    ]


def _dot(point: Point) -> str:
    return f'<circle cx="{point[0]:g}" cy="{point[1]:g}" r="7" fill="#37628c"/>'


def _edge(of: Point, towards: Point, is_box: bool) -> Point:
    """Return where a line from the middle of a box, or a dot, leaves it."""
    dx, dy = towards[0] - of[0], towards[1] - of[1]
    half = (_WIDTH / 2, _HEIGHT / 2) if is_box else (8, 8)
    scale = min(half[0] / abs(dx) if dx else 1e9, half[1] / abs(dy) if dy else 1e9)
    return of[0] + dx * scale, of[1] + dy * scale


def _arrow(start: Point, end: Point, label: str, bend: float, boxes: tuple[bool, bool] = (True, True)) -> list[str]:
    dx, dy = end[0] - start[0], end[1] - start[1]
    length = (dx * dx + dy * dy) ** 0.5
    via = (start[0] + dx / 2 - dy / length * bend, start[1] + dy / 2 + dx / length * bend)
    (x1, y1), (x2, y2) = _edge(start, via, boxes[0]), _edge(end, via, boxes[1])
    curve = f"M{x1:.0f},{y1:.0f} Q{via[0]:.0f},{via[1]:.0f} {x2:.0f},{y2:.0f}"
    middle = (0.25 * x1 + 0.5 * via[0] + 0.25 * x2, 0.25 * y1 + 0.5 * via[1] + 0.25 * y2)
    return [
        f'<path d="{curve}" fill="none" stroke="#37628c" marker-end="url(#head)"/>',
        _text(middle[0], middle[1] - 5, label),
    ]


def _picture(width: int, height: int, parts: list[str]) -> str:
    head = '<marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" orient="auto">'
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif">',
            f'<defs>{head}<path d="M0,0 L8,4 L0,8 z" fill="#37628c"/></marker></defs>',
            '<rect width="100%" height="100%" fill="white"/>',
            *parts,
            "</svg>\n",
        ]
    )


def task() -> str:
    """Return the drawing of a task's life."""
    parts = [part for name, (x, y) in _STATES.items() for part in _box(x, y, name, f"QUEUE/{_WHERE[name]}")]
    for (source, target), (label, bend) in TASK.items():
        start = _STATES[source] if source else _BEGIN
        end = _STATES[target] if target else _ENDS[source]
        parts += [_dot(point) for point, name in ((start, source), (end, target)) if not name]
        parts += _arrow(start, end, label, bend, (bool(source), bool(target)))
    return _picture(1120, 400, parts)


def worker() -> str:
    """Return the drawing of a worker's life."""
    parts: list[str] = []
    for row, (title, steps) in enumerate((("comes", COMING), ("goes", GOING))):
        y = 60 + 110 * row
        middles = [(170.0 + 196 * column, float(y)) for column in range(len(steps))]
        parts.append(_text(40, y + 4, title, 14))
        for (x, _), (name, where, why) in zip(middles, steps, strict=True):
            parts += [*_box(x, y, name, where), _text(x, y + 40, why, 11, "#555")]
        for start, end in pairwise(middles):
            parts += _arrow(start, end, "", 0)
    return _picture(1250, 230, parts)


if __name__ == "__main__":
    for picture in (task, worker):
        Path(sys.argv[1], f"{picture.__name__}.svg").write_text(picture())
