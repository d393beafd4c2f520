"""What is said to an operator, in words.

Strategy: functions from the data that ``control*.py`` returns to lines of text, so that what is printed and what
``--json`` prints are the same.

Rules:
- Whatever came from a file or a message is printed without what a terminal would obey.
- A colour or a bar adds nothing that the words do not say.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

_UNITS = (("d", 86400), ("h", 3600), ("min", 60))
_WIDTH = 30


def plain(text: object) -> str:
    """Return text with whatever is not printable written out, line ends aside."""
    text = str(text)
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)


def flat(text: object) -> str:
    """Return text of one line, as `plain` does: nobody adds a line of his own to ours."""
    return plain(text).replace("\n", " ")


def duration(seconds: float | None) -> str:
    """Return how long something took, in one or two units."""
    if seconds is None:
        return "?"
    for unit, length in _UNITS:
        if seconds >= length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"


def local_time(seconds: Any) -> str:
    """Return a time of the clock, in seconds since the epoch, as people here write it."""
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds)) if seconds else "?"
    except (TypeError, ValueError, OverflowError, OSError):
        return "?"  # Somebody has written it by hand.


def count(number: int, what: str) -> str:
    """Return a number with its noun, as in '1 task' and '2 tasks'."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def status(answer: dict[str, Any]) -> Iterator[str]:
    """Yield the lines of ``status``."""
    if answer["running"]:
        version, pid = answer["coordinator_version"] or "unknown", answer["pid"] or "?"
        yield f"Coordinator: running, pid {pid}, since {local_time(answer['since'])}, version {version}"
        if isinstance(answer["idle"], int | float):
            yield f"             It ends when nobody has been here for {answer['idle']:g} s"
    else:
        yield "Coordinator: not running"
    if answer["paused"]:
        yield "Paused:      yes: nothing new is started in any queue, until 'resume'"
    if answer["pipes"] is None:
        yield f"Queue:       none: no broker has run in {answer['directory']} yet"
        return
    yield f"Pipes:       {answer['pipes']}"
    yield f"Queue:       {answer['directory']}/coordinator, format {answer['format']}"
    counts = answer["tasks"]
    oldest = answer["oldest_waiting_seconds"]
    yield (
        f"Tasks:       {counts['waiting']} waiting{f' (the oldest sent {duration(oldest)} ago)' if oldest else ''}, "
        f"{counts['claimed']} claimed, {counts['completed']} completed in the last 24 h "
        f"({answer['done_in_the_last_minute']} in the last minute), {counts['failed']} failed"
    )
    for queue in answer["queues"]:
        if len(answer["queues"]) > 1:
            yield (
                f"  {flat(queue['name'])}: {queue['waiting']} waiting, {queue['claimed']} claimed, "
                f"{queue['completed']} completed, {queue['failed']} failed, {count(queue['subscribers'], 'subscriber')}"
            )
    yield from _workers(answer)
    for problem in answer["unreadable"]:
        yield f"Not all is well: {flat(problem)}"
    for queue in answer["queues"]:
        if queue["waiting"] and not queue["subscribers"]:
            wait = "tasks wait" if queue["waiting"] > 1 else "task waits"
            yield f"{queue['waiting']:,} {wait} in queue {flat(queue['name'])}, and nobody subscribes to it."


def _workers(answer: dict[str, Any]) -> Iterator[str]:
    yield f"Workers:     {len(answer['workers'])}"
    for worker in answer["workers"]:
        queues = ", ".join(f"{name} (prefetch {size or 'unlimited'})" for name, size in worker["queues"].items())
        yield (
            f"  {flat(worker['worker_id'])}: pid {worker['pid']}, since {local_time(worker['since'])}, "
            f"tasks: {flat(queues) or 'none'}, RPC identifiers: {worker['rpc']}, "
            f"broadcasts: {'yes' if worker['broadcast'] else 'no'} ({worker['broadcasts_dropped']} dropped), "
            f"in hand: {worker['in_hand']}{_other_version(answer, worker)}"
        )


def _other_version(answer: dict[str, Any], worker: dict[str, Any]) -> str:
    return "" if worker["version"] == answer["version_here"] else f", version {plain(worker['version'] or 'unknown')}"


def bars(answer: dict[str, Any], *, colour: bool) -> Iterator[str]:
    """Yield the lines of ``status --watch`` in a terminal."""
    state = f"running, pid {answer['pid'] or '?'}" if answer["running"] else "not running"
    yield f"{local_time(time.time())}  coordinator {state}{', PAUSED' if answer['paused'] else ''}"
    top = max([1, *(max(queue["waiting"], queue["claimed"]) for queue in answer["queues"])])
    for queue in answer["queues"]:
        yield f"{flat(queue['name'])}"
        for label, number, code in (
            ("waiting", queue["waiting"], 33),
            ("claimed", queue["claimed"], 36),
            ("done in the last minute", queue["done_in_the_last_minute"], 32),
        ):
            yield _bar(label, number, max(top, number), code if colour else None)
    busiest = max([1, *(worker["in_hand"] for worker in answer["workers"])])
    for worker in answer["workers"]:
        yield _bar(f"{worker['worker_id']} in hand", worker["in_hand"], busiest, 36 if colour else None)


def _bar(label: str, number: int, top: int, code: int | None) -> str:
    bar = "#" * (-(-_WIDTH * number // top)) if number else ""
    bar = f"{bar:{_WIDTH}}"
    shown = f"\033[{code}m{bar}\033[0m" if code else bar
    return f"  {label[:32]:32} {shown} {number:,}"


def one_line(answer: dict[str, Any]) -> str:
    """Return the line of ``status --watch`` where it is no terminal that reads it."""
    counts = answer["tasks"]
    return (
        f"{local_time(time.time())} {'running' if answer['running'] else 'not running'}"
        f"{', paused' if answer['paused'] else ''}, {counts['waiting']} waiting, {counts['claimed']} claimed, "
        f"{answer['done_in_the_last_minute']} done in the last minute, {len(answer['workers'])} workers"
    )


def pretty(value: Any) -> str:
    """Return a value that came in a message, as JSON for people."""
    return plain(json.dumps(value, indent=2, ensure_ascii=False, default=str))


def counts(number: dict[str, int]) -> str:
    """Return how many tasks there are, for whoever is about to lose them."""
    alive = number["waiting"] + number["claimed"]
    return f"{count(sum(number.values()), 'task')}, of which {alive:,} {'is' if alive == 1 else 'are'} not done"


def installations(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Yield the lines of ``list``."""
    yield from _table(
        ("profile", "coordinator", "waiting", "claimed", "failed", "directory", "pipes"),
        [{**row, "coordinator": f"pid {row['pid'] or '?'}" if row["running"] else "-"} for row in rows],
    )


def findings(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Yield the lines of ``doctor``."""
    for row in rows:
        yield plain(f"{'PROBLEM' if row['problem'] else 'remark '}  {row['what']}\n         {row['remedy']}")
    if not rows:
        yield "Nothing was found."


_COLUMNS = ("id", "age", "state", "queue", "worker", "deaths", "outcome")


def tasks(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Yield the lines of ``tasks``: a heading, and a line for each."""
    cells = [
        {**row, "age": duration(row["age_seconds"]), "worker": row["worker"] or "-", "outcome": row["outcome"] or ""}
        for row in rows
    ]
    if not any("process" in row for row in rows):
        yield from _table(_COLUMNS, cells)
        return
    for cell in cells:
        process = cell["process"] or {}
        cell |= {"pk": process.get("pk") or "-", "label": process.get("label") or "-"}
        cell["process"] = process.get("state") or "-"
    yield from _table((*_COLUMNS[:-1], "pk", "label", "process", "outcome"), cells)


def _table(columns: tuple[str, ...], rows: list[dict[str, Any]]) -> Iterator[str]:
    lines = [tuple(map(str.upper, columns))]
    lines += [tuple(flat(row[column]) for column in columns) for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        yield "  ".join(f"{text:{width}}" for text, width in zip(line, widths, strict=True)).rstrip()


def task(answer: dict[str, Any], screen: tuple[int, int] | None) -> Iterator[str]:
    """Yield the lines of ``show``.

    :param screen: how many lines of the body fit, and how many characters a line has; `None`: all.
    """
    yield f"Task:     {answer['id']}"
    yield f"State:    {answer['state']}, since {local_time(answer['since'])}"
    yield f"Queue:    {flat(answer['queue'])}"
    yield f"Sent:     {duration(answer['age_seconds'])} ago, {_sender(answer)}"
    if answer["worker"]:
        lives = "which is dead" if answer["worker_pid"] is None else f"pid {answer['worker_pid'] or '?'}"
        yield f"Worker:   {flat(answer['worker'])}, {lives}"
    yield f"Deaths:   {answer['deaths']}"
    yield f"File:     {flat(answer['file'])}, {'? bytes' if answer['size'] is None else count(answer['size'], 'byte')}"
    if answer["process"]:
        process = answer["process"]
        known = f" ({flat(process['label'])}), {flat(process['state'])}" if process["label"] else ""
        yield f"Process:  pk {process['pk']}{known}"
    if answer["outcome"]:
        yield f"Outcome:  {flat(answer['outcome'])}"
    if answer["unreadable"]:
        yield f"It cannot be read: {flat(answer['unreadable'])}"
    else:
        yield "Body:"
        lines = [plain(line) for line in json.dumps(answer["body"], indent=2, ensure_ascii=False).split("\n")]
        shown = lines if screen is None else _cut(lines, *screen)
        yield from shown
        if len("".join(shown)) < len("".join(lines)):
            yield f"... cut here, of {count(len(lines), 'line')}; all of it with --full"
    if answer["reason"]:
        yield "Reason:"
        yield plain(answer["reason"]).rstrip()


def _cut(lines: list[str], rows: int, width: int) -> list[str]:
    """Return as much as fits, a line at least."""
    shown, left = list[str](), max(1, rows)
    for line in lines:
        if left <= 0:
            break
        shown.append(line[: left * width])
        left -= max(1, -(-len(line) // width))
    return shown


def _sender(answer: dict[str, Any]) -> str:
    if answer["unreadable"] and not answer["reply_to"]:
        return "by whom is not known"
    if answer["no_reply"] or not answer["reply_to"]:
        return "by somebody who wants no outcome"
    return f"by {flat(answer['reply_to'])}, which {'lives' if answer['sender_lives'] else 'is gone'}"
