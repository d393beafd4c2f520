"""The members of a queue: what each has room for and has refused, whose turn it is, and who is too slow.

Strategy: what `scheduler.Scheduler` asks often is kept so that the answer costs what it finds, not what there is: whose
turn it is by lines of members, what somebody may take over by groups of names that the same members have refused.

Rules:
- Nothing here knows a clock, a disk or a pipe, or which state a name is in: the scheduler says so.
- The groups may hold a name that has gone on. Whoever comes upon it takes it out.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TypeAlias

WINDOW = 64
GRACE_SECONDS = 0.05
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 1.0, 60.0


@dataclass(eq=False)
class Member:
    """One life of a worker in one queue. Only the scheduler changes what is below the prefetch."""

    name: str
    """Its worker id."""
    prefetch: int = 0
    """How many tasks it holds at once; 0: no limit."""
    offered: dict[str, None] = field(default_factory=dict)
    """What it was rung for and has not claimed, as far as is known."""
    held: set[str] = field(default_factory=set)
    """What it has claimed."""
    refused: set[str] = field(default_factory=set)
    silent: bool = False
    """Whether an offer was taken from it, and it has not been heard from since."""

    def room(self) -> int:
        """Return how many more tasks it may be offered; 0 or less: none."""
        room = 0 if self.silent else WINDOW - len(self.offered)
        return min(room, self.prefetch - len(self.offered) - len(self.held)) if self.prefetch else room


@dataclass
class _Refusal:
    members: set[Member] = field(default_factory=set)
    pause: float = FIRST_PAUSE_SECONDS
    until: float | None = None
    """When the task is offered to anyone again, where everybody has refused it."""


class Refusals:
    """Who has refused which task, kept from both sides."""

    def __init__(self) -> None:
        self._by_name: dict[str, _Refusal] = {}

    def names(self) -> list[str]:
        """Return what somebody has refused, and what everybody has who has gone since."""
        return list(self._by_name)

    def add(self, member: Member, name: str) -> None:
        """A member refuses a task."""
        self._by_name.setdefault(name, _Refusal()).members.add(member)
        member.refused.add(name)

    def members(self, name: str) -> set[Member]:
        """Return who has refused a task."""
        refusal = self._by_name.get(name)
        return refusal.members if refusal is not None else set()

    def forgive(self, name: str) -> None:
        """Let anyone be offered a task again; the next pause is longer all the same."""
        for member in self.members(name):
            member.refused.discard(name)
        self.members(name).clear()

    def forget(self, name: str) -> None:
        """Forget a task."""
        self.forgive(name)
        self._by_name.pop(name, None)

    def take_back(self, member: Member, names: Iterable[str]) -> None:
        """A member does not refuse these any more."""
        for name in list(names):
            self.members(name).discard(member)
            member.refused.discard(name)

    def put_off(self, name: str, now: float) -> float:
        """Return until when a task that everybody has refused is offered to nobody."""
        refusal = self._by_name[name]
        if refusal.until is None or refusal.until <= now:
            refusal.until = now + refusal.pause
            refusal.pause = min(2 * refusal.pause, LONGEST_PAUSE_SECONDS)
        return refusal.until


Offered: TypeAlias = "dict[str, tuple[Member, float]]"


class Overdue:
    """What was offered and not claimed in time, by who has refused it: so a taker looks at what it may take alone.

    It may hold a name that was claimed, or offered again since; whoever looks at it takes it out.
    """

    def __init__(self) -> None:
        self._coming: deque[tuple[float, str]] = deque()
        self._by_refusers: dict[frozenset[Member], dict[str, float]] = {}

    def __bool__(self) -> bool:
        return bool(self._by_refusers)

    def expect(self, name: str, now: float) -> None:
        """A name was offered; it is overdue if that is not claimed in time."""
        self._coming.append((now, name))

    def collect(self, now: float, offered: Offered, refusals: Refusals) -> None:
        """Take in what is overdue by now."""
        while self._coming and self._coming[0][0] + GRACE_SECONDS <= now:
            since, name = self._coming.popleft()
            if offered.get(name, (None, None))[1] == since:
                self._by_refusers.setdefault(frozenset(refusals.members(name)), {})[name] = since

    def regroup(self) -> None:
        """Forget who has refused what, which is not true any more."""
        names = [(since, name) for group in self._by_refusers.values() for name, since in group.items()]
        self._coming = deque(sorted([*names, *self._coming]))
        self._by_refusers.clear()

    def take(self, taker: Member, offered: Offered) -> str | None:
        """Take out the oldest name that a member has not refused, and was not offered."""
        oldest: tuple[float, str] | None = None
        for refusers, group in list(self._by_refusers.items()):
            if taker not in refusers:
                first = self._first(group, taker, offered)
                if not group:
                    del self._by_refusers[refusers]
                elif first is not None and (oldest is None or first < oldest):
                    oldest, of = first, group
        if oldest is None:
            return None
        del of[oldest[1]]
        return oldest[1]

    @staticmethod
    def _first(group: dict[str, float], taker: Member, offered: Offered) -> tuple[float, str] | None:
        stale, first = [], None
        for name, since in group.items():
            owner, offered_since = offered.get(name, (None, None))
            if offered_since != since:
                stale.append(name)
            elif owner is not taker:
                first = (since, name)
                break
        for name in stale:
            del group[name]
        return first


class Parked:
    """What those who have capacity have refused, by who has: kept for those who are merely full, the oldest first."""

    def __init__(self) -> None:
        self.heaps: dict[frozenset[Member], list[str]] = {}
        self.count = 0
        """How many were put here, whether or not they have gone on, since all were taken out."""

    def put(self, name: str, refusers: frozenset[Member]) -> None:
        """Park a name."""
        heapq.heappush(self.heaps.setdefault(refusers, []), name)
        self.count += 1

    def take(self, taker: Member, is_parked: Callable[[str], bool]) -> str | None:
        """Take out the oldest name that a member has not refused.

        :param is_parked: says whether a name has not gone on.
        """
        oldest: list[str] | None = None
        for refusers, heap in list(self.heaps.items()):
            if taker not in refusers:
                while heap and not is_parked(heap[0]):
                    heapq.heappop(heap)
                if not heap:
                    del self.heaps[refusers]
                elif oldest is None or heap[0] < oldest[0]:
                    oldest = heap
        return heapq.heappop(oldest) if oldest else None

    def clear(self) -> list[str]:
        """Take out all, also what has gone on."""
        names = [name for heap in self.heaps.values() for name in heap]
        self.heaps.clear()
        self.count = 0
        return names


class Turns:
    """The members that have capacity, each in turn: those with nothing in hand first."""

    def __init__(self) -> None:
        self.members: set[Member] = set()
        """All, with capacity or without."""
        self._idle: dict[Member, None] = {}
        self._ready: dict[Member, None] = {}
        self.fresh: dict[Member, None] = {}
        """Those that have got capacity since somebody emptied this; all others have refused what is parked."""
        self.takers: dict[Member, int] = {}
        """Those with capacity that were heard from, and how many offers of others' each may take over."""
        self.changed: dict[Member, int] = {}
        """Those whose capacity may have changed since they were placed, and how many hands they have got free."""

    def __bool__(self) -> bool:
        return bool(self._idle or self._ready)

    def place_changed(self) -> None:
        """Put the members to whom something has happened where they belong, once for all that has."""
        changed, self.changed = self.changed, {}
        for member, free in changed.items():
            self.takers[member] = min(WINDOW, self.takers.get(member, 0) + free)
            self.place(member)

    def place(self, member: Member) -> None:
        """Put a member at the end of its line, or into none."""
        had = self._idle.pop(member, self) is None or self._ready.pop(member, self) is None
        if member in self.members and member.room() > 0:
            (self._ready if member.offered or member.held else self._idle)[member] = None
            if not had:
                self.fresh[member] = None
        else:
            self.fresh.pop(member, None)
            self.takers.pop(member, None)

    def next(self, but: set[Member]) -> Member | None:
        """Return whose turn it is, passing over at most as many as `but` holds."""
        for members in (self._idle, self._ready):
            for member in members:
                if member not in but:
                    return member
        return None

    def takeovers(self, offered: Offered, overdue: Overdue) -> list[tuple[str, Member]]:
        """Return what is overdue and can be taken over, with whoever does: the oldest first, to each in turn."""
        found, quota, line = [], dict[Member, int](), deque(self.takers if overdue else ())
        while line:
            taker = line.popleft()
            if taker not in self.takers:
                continue  # What it was offered was taken from it.
            hands = self.takers[taker]
            left = quota.get(taker, min(taker.room(), hands) if taker.offered else taker.room())
            if left <= 0:
                del self.takers[taker]
            elif (name := overdue.take(taker, offered)) is not None:
                found.append((name, taker))
                self.takers.pop(offered[name][0], None)
                quota[taker], self.takers[taker] = left - 1, max(0, hands - 1)
                line.append(taker)
        return found
