"""Who is rung for which task: a state machine without clock, disk or pipe.

Strategy: one `Scheduler` for each queue that has subscribers. Its caller tells it what happened, gives it the time and
the listings of the disk, and sends the rings that `Scheduler.dispatch` returns. It may be wrong, and it may forget: a
ring too many costs a failed rename(2), and what is forgotten is found again on the disk by `Scheduler.drift`.

Rules:
- A name that waits is offered to ONE member: to one with nothing in hand first, and otherwise to each in turn.
- A member has at most `WINDOW` offers that it has not claimed, and no more offers and tasks in hand than its prefetch.
- An offer that was not claimed within `GRACE_SECONDS` goes to anybody else who has capacity, before anything new does.
  Whoever it was taken from gets nothing more until it is heard from: a stopped worker holds up `WINDOW` tasks, once.
  (Were only those with no offers of their own to take it over, it would wait behind every newer one, for ever.)
- Who has offers that it has not claimed itself takes over no more of others' than it has finished or passed over.
  (Were it to take all that it has room for, 100 busy workers would be rung 45 times for each task, and not 3 times.)
- Who refused a task is not offered it again before everybody has refused it. As long as somebody is merely full, it is
  parked for him. (Were those who have capacity now asked only, one full worker would keep all others from it.) When
  everybody has, busy or not, it is put off: for `FIRST_PAUSE_SECONDS`, and twice as long each time. Who does not claim
  in `FORGOTTEN_SECONDS` what others have refused counts as one of them: it may have been stopped.
- An event costs what it changes. What would cost more is done in `dispatch`, once for all events that came together, or
  in `drift`, in steps.

A name is known from when it waits until somebody has claimed it, and in one of four states. The heaps may hold a name
that has gone on to another state, or hold it twice: whoever takes one out looks whether it still belongs there.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

WINDOW = 64
GRACE_SECONDS = 0.05
FORGOTTEN_SECONDS = 10.0
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 1.0, 60.0

_WAITING, _OFFERED, _PARKED, _PUT_OFF = range(4)


@dataclass(eq=False)
class Member:
    """One life of a worker in one queue. Only the scheduler changes what is below the prefetch."""

    name: str
    """For the log."""
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


class _Refusals:
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

    def forget_member(self, member: Member) -> None:
        """Forget what a member has refused."""
        for name in member.refused:
            self._by_name[name].members.discard(member)
        member.refused.clear()

    def put_off(self, name: str, now: float) -> float:
        """Return until when a task that everybody has refused is offered to nobody."""
        refusal = self._by_name[name]
        if refusal.until is None or refusal.until <= now:
            refusal.until = now + refusal.pause
            refusal.pause = min(2 * refusal.pause, LONGEST_PAUSE_SECONDS)
        return refusal.until


class _Turns:
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

    def takeovers(
        self, offered: dict[str, tuple[Member, float]], refusals: _Refusals, now: float
    ) -> list[tuple[str, Member]]:
        """Return what is overdue and can be taken over, with whoever does."""
        found, quota = [], dict[Member, int]()
        for name, (owner, since) in offered.items():
            if since + GRACE_SECONDS > now or not self.takers:
                break
            but = {owner, *refusals.members(name)}
            while (taker := next((member for member in self.takers if member not in but), None)) is not None:
                hands = self.takers.pop(taker)
                left = quota.get(taker, min(taker.room(), hands) if taker.offered else taker.room())
                if left > 0:
                    found.append((name, taker))
                    self.takers.pop(owner, None)
                    quota[taker], self.takers[taker] = left - 1, max(0, hands - 1)
                    break
        return found


class Scheduler:
    """Shares the waiting tasks of one queue out among its members. It lives in one thread, its caller's."""

    def __init__(self) -> None:
        self._turns = _Turns()
        self.members = self._turns.members
        self._state: dict[str, int] = {}
        self._waiting: list[str] = []
        self._offered: dict[str, tuple[Member, float]] = {}
        self._parked: dict[frozenset[Member], list[str]] = {}
        self._put_off: list[tuple[float, str]] = []
        self._grace_ends: deque[float] = deque()
        self._refusals = _Refusals()
        self._regroup = False
        """Whether members came or went, so that what is parked or put off is to be judged again."""
        self._touched: set[str] | None = None
        """What events said something of since the listing that `drift` reads began."""

    # Events

    def add(self, name: str) -> None:
        """A task waits."""
        self._touch(name)
        if name not in self._state:
            self._wait(name)

    def withdraw(self, name: str) -> None:
        """A task does not wait any more."""
        self._touch(name)
        self._forget(name)

    def join(self, member: Member) -> None:
        """A worker subscribes, or does so once more, or with another prefetch: it may take what it refused before."""
        self.members.add(member)
        self._forgive(member)

    def leave(self, member: Member) -> None:
        """A worker is gone: what it was offered waits again. What it held is for its caller to add, from the disk."""
        self.members.discard(member)
        for name in list(member.offered):
            self._forget(name)
            self.add(name)
        self._forgive(member)

    def _forgive(self, member: Member) -> None:
        self._refusals.forget_member(member)
        self._regroup = True
        self._turns.changed.setdefault(member, 0)

    def claimed(self, member: Member, name: str) -> None:
        """A worker has claimed a task."""
        self.withdraw(name)
        member.held.add(name)
        self._hear(member, 0)

    def done(self, member: Member, name: str) -> None:
        """A worker has finished a task."""
        self.withdraw(name)
        member.held.discard(name)
        self._refusals.forget(name)
        self._hear(member)

    def refuse(self, member: Member, name: str) -> None:
        """A worker has given a task back, since it does not want it."""
        self._refusals.add(member, name)
        self.give_back(member, name)

    def give_back(self, member: Member, name: str) -> None:
        """A worker has given a task back."""
        member.held.discard(name)
        self.withdraw(name)
        self.add(name)
        self._hear(member)

    def lose(self, member: Member, name: str) -> bool:
        """A worker could not claim a task, which it found gone.

        :return: whether it was this worker's offer: then the caller looks whether it waits after all, and adds it.
        """
        mine = name in member.offered
        if mine:
            self.withdraw(name)
        self._hear(member)
        return mine

    # Sharing out

    def dispatch(self, now: float) -> tuple[dict[Member, list[str]], float | None]:
        """Offer what waits to those who have capacity.

        :param now: in seconds, of a clock that does not step.
        :return: the names to ring each member for, and when to call this again though nothing happens before.
        """
        rings: dict[Member, list[str]] = {}
        self._turns.place_changed()
        if self._regroup:
            self._judge_again()
        self._end_pauses(now)
        self._take_over(now, rings)
        self._offer_parked(now, rings)
        while self._waiting and self._turns:
            name = heapq.heappop(self._waiting)
            if self._state.get(name) != _WAITING:
                continue
            member = self._turns.next(self._refusals.members(name))
            if member is not None:
                self._offer(member, name, now, rings)
            else:
                self._park(name, now)
        if rings and (not self._grace_ends or self._grace_ends[-1] < now + GRACE_SECONDS):
            self._grace_ends.append(now + GRACE_SECONDS)
        return rings, self._next_look(now)

    def _judge_again(self) -> None:
        self._regroup = False
        names = [name for heap in self._parked.values() for name in heap if self._state.get(name) == _PARKED]
        names += [name for _, name in self._put_off if self._state.get(name) == _PUT_OFF]
        self._parked.clear()
        self._put_off.clear()
        for name in names:
            self._wait(name)

    def _end_pauses(self, now: float) -> None:
        while self._put_off and self._put_off[0][0] <= now:
            _, name = heapq.heappop(self._put_off)
            if self._state.get(name) == _PUT_OFF:
                self._refusals.forgive(name)
                self._wait(name)

    def _take_over(self, now: float, rings: dict[Member, list[str]]) -> None:
        for name, taker in self._turns.takeovers(self._offered, self._refusals, now):
            owner, _ = self._offered[name]
            self._forget(name)
            owner.silent = True
            self._turns.place(owner)
            self._offer(taker, name, now, rings)

    def _offer_parked(self, now: float, rings: dict[Member, list[str]]) -> None:
        while self._turns.fresh:
            member = next(iter(self._turns.fresh))
            while member.room() > 0 and (name := self._unrefused(member)) is not None:
                self._offer(member, name, now, rings)
            self._turns.fresh.pop(member, None)

    def _unrefused(self, member: Member) -> str | None:
        """Take out the oldest parked name that a member has not refused."""
        oldest: list[str] | None = None
        for refusers, heap in list(self._parked.items()):
            if member not in refusers:
                while heap and self._state.get(heap[0]) != _PARKED:
                    heapq.heappop(heap)
                if not heap:
                    del self._parked[refusers]
                elif oldest is None or heap[0] < oldest[0]:
                    oldest = heap
        return heapq.heappop(oldest) if oldest else None

    def _offer(self, member: Member, name: str, now: float, rings: dict[Member, list[str]]) -> None:
        self._state[name] = _OFFERED
        self._offered[name] = (member, now)
        member.offered[name] = None
        rings.setdefault(member, []).append(name)
        self._turns.place(member)

    def _park(self, name: str, now: float) -> None:
        """Keep a name for those who have not refused it and have no capacity now; put it off if there are none."""
        refusers = frozenset(self._refusals.members(name))
        if len(refusers) < len(self.members):
            self._state[name] = _PARKED
            heapq.heappush(self._parked.setdefault(refusers, []), name)
        else:
            self._state[name] = _PUT_OFF
            heapq.heappush(self._put_off, (self._refusals.put_off(name, now), name))

    def _next_look(self, now: float) -> float | None:
        while self._grace_ends and self._grace_ends[0] <= now:
            self._grace_ends.popleft()
        due = [when for when, _ in self._put_off[:1]]
        if self._offered and self._turns.takers and self._grace_ends:
            due.append(self._grace_ends[0])  # What is overdue and could not be taken over waits for an event.
        return min(due, default=None)

    # What the disk says

    def drift(self, now: float, waiting: Iterable[str], held: Iterable[tuple[Member, Iterable[str]]]) -> Iterator[None]:
        """Compare what is believed with listings of the disk, and believe them, in steps, while events go on.

        :param waiting: the names that wait, as they are listed.
        :param held: what each member has claimed, read when it is asked for.
        """
        self._touched = touched = set[str]()
        try:
            unseen = set(self._state)
            for name in waiting:
                unseen.discard(name)
                if name not in touched:
                    self._find(name, now)
                yield
            for member, names in held:
                on_disk = set(names) - touched
                for name in on_disk:
                    self._forget(name)
                member.held = on_disk | (member.held & touched)
                self._hear(member)
                yield
            for name in unseen:
                if name not in touched:
                    self._forget(name)
                yield
            in_hand = set[str]().union(*(member.held for member in self.members))
            for name in self._refusals.names():
                if name not in self._state and name not in in_hand:
                    self._refusals.forget(name)
                yield
        finally:
            self._touched = None

    def _find(self, name: str, now: float) -> None:
        member, since = self._offered.get(name, (None, now))
        if since + FORGOTTEN_SECONDS <= now:
            if member is not None and self._refusals.members(name):
                # Those who have refused it are not to wait for one that has been stopped.
                self._refusals.add(member, name)
            self._forget(name)
        if name not in self._state:
            self._wait(name)

    # States

    def _touch(self, name: str) -> None:
        if self._touched is not None:
            self._touched.add(name)

    def _hear(self, member: Member, free: int = 1) -> None:
        member.silent = False
        self._turns.changed[member] = self._turns.changed.get(member, 0) + free

    def _wait(self, name: str) -> None:
        self._state[name] = _WAITING
        heapq.heappush(self._waiting, name)
        if len(self._waiting) > 2 * len(self._state) + WINDOW:
            # Mostly names that somebody has pulled while no member had room.
            self._waiting = sorted(name for name in self._state if self._state[name] == _WAITING)

    def _forget(self, name: str) -> None:
        self._state.pop(name, None)
        member, _ = self._offered.pop(name, (None, 0.0))
        if member is not None:
            del member.offered[name]
            self._turns.changed.setdefault(member, 0)
