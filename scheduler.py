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
  everybody has, busy or not, it is put off: for `FIRST_PAUSE_SECONDS`, and twice as long each time, up to
  `LONGEST_PAUSE_SECONDS`. Who does not claim
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
from typing import TYPE_CHECKING

if TYPE_CHECKING or not __package__:
    from members import GRACE_SECONDS, WINDOW, Member, Offered, Overdue, Parked, Refusals, Turns
else:
    from .members import GRACE_SECONDS, WINDOW, Member, Offered, Overdue, Parked, Refusals, Turns

FORGOTTEN_SECONDS = 10.0

_WAITING, _OFFERED, _PARKED, _PUT_OFF = range(4)


class Scheduler:
    """Shares the waiting tasks of one queue out among its members. It lives in one thread, its caller's."""

    def __init__(self) -> None:
        self._turns = Turns()
        self.members = self._turns.members
        self._state: dict[str, int] = {}
        self._waiting: list[str] = []
        self._offered: Offered = {}
        self._overdue = Overdue()
        self._parked = Parked()
        self._put_off: list[tuple[float, str]] = []
        self._grace_ends: deque[float] = deque()
        self._refusals = Refusals()
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
        self.forgive(member, member.refused)

    def leave(self, member: Member) -> None:
        """A worker is gone: what it was offered waits again. What it held is for its caller to add, from the disk."""
        self.members.discard(member)
        for name in list(member.offered):
            self._forget(name)
            self.add(name)
        self.forgive(member, member.refused)

    def forgive(self, member: Member, names: Iterable[str]) -> None:
        """A worker may be offered again what it has refused."""
        self._refusals.take_back(member, names)
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
        self._overdue.regroup()
        names = [name for name in self._parked.clear() if self._state.get(name) == _PARKED]
        names += [name for _, name in self._put_off if self._state.get(name) == _PUT_OFF]
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
        self._overdue.collect(now, self._offered, self._refusals)
        for name, taker in self._turns.takeovers(self._offered, self._overdue):
            owner, _ = self._offered[name]
            self._forget(name)
            owner.silent = True
            self._turns.place(owner)
            self._offer(taker, name, now, rings)

    def _offer_parked(self, now: float, rings: dict[Member, list[str]]) -> None:
        while self._turns.fresh:
            member = next(iter(self._turns.fresh))
            while member.room() > 0 and (name := self._parked.take(member, self._is_parked)) is not None:
                self._offer(member, name, now, rings)
            self._turns.fresh.pop(member, None)

    def _is_parked(self, name: str) -> bool:
        return self._state.get(name) == _PARKED

    def _offer(self, member: Member, name: str, now: float, rings: dict[Member, list[str]]) -> None:
        self._state[name] = _OFFERED
        self._offered[name] = (member, now)
        self._overdue.expect(name, now)
        member.offered[name] = None
        rings.setdefault(member, []).append(name)
        self._turns.place(member)

    def _park(self, name: str, now: float) -> None:
        """Keep a name for those who have not refused it and have no capacity now; put it off if there are none."""
        refusers = self._refusals.members(name)
        if len(refusers) < len(self.members):
            self._state[name] = _PARKED
            self._parked.put(name, frozenset(refusers))
            # Mostly names that somebody has pulled while no member had room.
            self._regroup = self._regroup or self._parked.count > 2 * len(self._state) + WINDOW
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
