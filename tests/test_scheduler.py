"""The scheduler by itself: a table of its rules, and random events against a simple model of workers and a disk."""

from __future__ import annotations

import random
import zlib
from collections import Counter
from collections.abc import Iterator

import pytest

import scheduler
from members import WINDOW, Member
from scheduler import Scheduler

# Each rule is a script. "join a 2" is member a with a prefetch of 2. "drift 1 2 | a 3" is a listing of the disk, where
# 1 and 2 wait, and a holds 3. "-> a:1,2 b:3" is what is rung then, "-> nothing" that nothing is, and "look 1.5" when to
# look again if nothing happens.
RULES = {
    "a task goes to one member, each in turn": "join a; join b; add 1; add 2; add 3; -> a:1,3 b:2",
    "the oldest first": "add 3; add 1; add 2; join a 1; -> a:1; claimed a 1; done a 1; -> a:2",
    "who has nothing in hand comes first": (
        "join a; join b; add 1; -> a:1; claimed a 1; add 2; -> b:2; claimed b 2; done a 1; add 3; add 4; -> a:3 b:4"
    ),
    "a task that waits is known once": "join a; add 1; add 1; -> a:1; add 1; -> nothing",
    "no more than the prefetch": "join a 2; add 1; add 2; add 3; -> a:1,2; claimed a 1; -> nothing; done a 1; -> a:3",
    "a larger prefetch counts at once": "join a 1; add 1; add 2; -> a:1; join a 2; -> a:2",
    "no more than the window": "join a; add 100..199; -> a:100..163; claimed a 100; claimed a 101; -> a:164,165",
    "an offer that is not claimed goes to another": "join a; add 1; -> a:1; join b; tick 0.06; -> b:1",
    "and not before its time": "join a; add 1; -> a:1; join b; tick 0.04; -> nothing; look 0.05",
    "before anything new": "join a 1; add 5; -> a:5; join b 1; add 1; tick 0.06; -> b:5",
    "also to one that has offers of its own": (
        "join a; join b; add 1; add 2; -> a:1 b:2; tick 0.03; claimed b 2; add 3; add 4; add 5; -> a:3,5 b:4; "
        "tick 0.03; -> nothing; done b 2; -> b:1; tick 0.03; -> nothing; done b 4; -> b:3; done b 1; -> b:5"
    ),
    "one that has claimed whatever it was offered takes over all": (
        "join a; add 1; add 2; add 3; -> a:1,2,3; join b 2; tick 0.06; -> b:1,2"
    ),
    "and after that no more than it has finished": (
        "join a; add 1; -> a:1; join b; tick 0.06; -> b:1; join c 1; add 2; -> c:2; tick 0.06; -> nothing"
    ),
    "who did not claim it gets nothing more": (
        "join a; add 1; -> a:1; join b; tick 0.06; -> b:1; add 2; add 3; -> b:2,3"
    ),
    "until it is heard from": (
        "join a 1; add 1; -> a:1; join b 1; tick 0.06; -> b:1; claimed b 1; add 2; -> nothing; lose a 1 False; -> a:2"
    ),
    "a lone member keeps its offers": "join a; add 1; -> a:1; tick 60; -> nothing; look never",
    "who refused it is not asked again while another has not": (
        "join a; join b; add 1; -> a:1; claimed a 1; refuse a 1; -> b:1; claimed b 1; done b 1; -> nothing"
    ),
    "a full member that has not refused is waited for": (
        "join b; add 1; -> b:1; claimed b 1; join a 1; add 2; -> a:2; claimed a 2; refuse b 1; -> nothing; look never; "
        "done a 2; -> a:1"
    ),
    "and gets that before anything new": (
        "join b; add 5; -> b:5; claimed b 5; join a 1; add 6; -> a:6; claimed a 6; refuse b 5; -> nothing; "
        "leave b; join b 1; add 1; -> b:1; add 2; -> nothing; done a 6; -> a:2"
    ),
    "a parked task goes first": (
        "join b 1; add 5; -> b:5; claimed b 5; join a 1; add 6; -> a:6; claimed a 6; refuse b 5; -> nothing; "
        "add 1; add 2; -> b:1; done a 6; -> a:5"
    ),
    "what all have refused is put off, twice as long each time": (
        "join a; add 1; -> a:1; claimed a 1; refuse a 1; -> nothing; look 1; tick 1; -> a:1; claimed a 1; refuse a 1; "
        "-> nothing; look 3; tick 2; -> a:1"
    ),
    "also if one of them does not claim it for ten seconds": (
        "join a; add 1; -> a:1; claimed a 1; refuse a 1; join b; -> b:1; tick 9; drift 1 |; -> nothing; "
        "tick 1; drift 1 |; -> nothing; look 11; tick 1; -> b:1; tick 0.06; -> a:1"
    ),
    "but not for a newcomer": (
        "join a; add 1; -> a:1; claimed a 1; refuse a 1; -> nothing; join b; -> b:1; claimed b 1; refuse b 1; "
        "-> nothing"
    ),
    "nor for one that subscribes once more": (
        "join a; add 1; -> a:1; claimed a 1; refuse a 1; -> nothing; join a; -> a:1"
    ),
    "nor when the only one who had not refused leaves": (
        "join a; join b 1; add 1; add 2; -> a:1 b:2; claimed b 2; claimed a 1; refuse a 1; -> nothing; look never; "
        "leave b; -> nothing; look 1"
    ),
    "a task given back is offered at once": "join a; add 1; -> a:1; claimed a 1; back a 1; -> a:1",
    "what was offered to one who left waits again": (
        "join a; add 1; add 2; -> a:1,2; claimed a 1; leave a; join b; -> b:2"
    ),
    "a loss counts if it was its own offer": (
        "join a; join b; add 1; -> a:1; lose b 1 False; lose a 1 True; tick 1; -> nothing"
    ),
    "what another has claimed is nobody's offer": (
        "join a; add 1; -> a:1; join b; tick 0.06; -> b:1; claimed a 1; lose b 1 False; done a 1; -> nothing"
    ),
    "drift finds what was forgotten": "join a; drift 1 2 |; -> a:1,2",
    "drift forgets what is gone": "add 1; add 2; drift 2 |; join a; -> a:2",
    "drift offers again what waits after ten seconds": (
        "join a; add 1; -> a:1; tick 9; drift 1 |; -> nothing; tick 1; drift 1 |; -> a:1"
    ),
    "drift hears of claims": (
        "join a 2; add 1; add 2; -> a:1,2; drift | a 1 2; add 3; -> nothing; drift 3 | a 2; -> a:3"
    ),
    "drift hears everybody": "join a; add 1; -> a:1; join b; tick 0.06; -> b:1; drift 1 |; add 2; -> a:2",
    "what is done once begins anew": (
        "join a; add 1; -> a:1; claimed a 1; refuse a 1; -> nothing; tick 1; -> a:1; claimed a 1; done a 1; "
        "add 1; -> a:1; claimed a 1; refuse a 1; -> nothing; look 2"
    ),
    "what came while the disk was listed stays": "begin 2 |; add 1; end; join a; -> a:1,2",
    "what was claimed meanwhile does not wait": "join a 9; begin 9 1 |; claimed a 1; end; -> a:9",
    "and is in hand": "join a 1; begin 9 |; claimed a 1; end; -> nothing",
    "what was done meanwhile is not": "join a 1; claimed a 1; begin 9 | a 1; done a 1; end; -> a:9",
    "what was given back meanwhile waits": "join a; add 1; -> a:1; claimed a 1; begin 9 |; back a 1; end; -> a:1,9",
    "also if it waited when the listing began": "join a; add 1; begin 9 |; claimed a 1; back a 1; end; -> a:1,9",
}


class Script:
    """Runs a rule of the table."""

    def __init__(self) -> None:
        self.scheduler, self.members, self.now = Scheduler(), dict[str, Member](), 0.0
        self.look: float | None = None
        self.drift: Iterator[None] = iter(())

    def run(self, step: str) -> None:
        word, *rest = step.split()
        if word == "add":
            for name in names(rest[0]):
                self.scheduler.add(name)
        elif word == "join":
            member = self.members.setdefault(rest[0], Member(rest[0]))
            member.prefetch = int(rest[1]) if rest[1:] else 0
            self.scheduler.join(member)
        elif word == "leave":
            self.scheduler.leave(self.members.pop(rest[0]))
        elif word == "tick":
            self.now += float(rest[0])
        elif word == "look":
            assert self.look == (None if rest[0] == "never" else pytest.approx(float(rest[0])))
        elif word in ("drift", "begin"):
            waiting, _, held = step.removeprefix(word).partition("|")
            whose, *what = held.split() or [""]
            pairs = [(self.members[whose], what)] if whose else []
            pairs += [(member, []) for name, member in self.members.items() if name != whose]
            self.drift = self.scheduler.drift(self.now, waiting.split(), iter(pairs))
            for _ in self.drift:
                if word == "begin":
                    return
        elif word == "end":
            for _ in self.drift:
                pass
            assert self.scheduler._touched is None
        elif word == "->":
            rings, self.look = self.scheduler.dispatch(self.now)
            wanted = [part.split(":") for part in rest if part != "nothing"]
            assert {member.name: got for member, got in rings.items()} == {
                name: [one for some in what.split(",") for one in names(some)] for name, what in wanted
            }
        else:
            call = {"claimed": "claimed", "done": "done", "refuse": "refuse", "back": "give_back", "lose": "lose"}[word]
            answer = getattr(self.scheduler, call)(self.members[rest[0]], rest[1])
            assert str(answer) == (rest[2] if rest[2:] else "None")
        check(self.scheduler)


def names(text: str) -> list[str]:
    first, _, last = text.partition("..")
    return [str(number) for number in range(int(first), int(last or first) + 1)]


@pytest.mark.parametrize("rule", RULES)
def test_rule(rule: str) -> None:
    script = Script()
    for step in RULES[rule].split(";"):
        script.run(step.strip())


def test_busy_members_are_not_rung_for_all_that_others_have_not_begun() -> None:
    tested, members = Scheduler(), [Member(str(number)) for number in range(100)]
    for member in members:
        tested.join(member)
    for number in range(100 * 100):
        tested.add(f"{number:05}")
    tested.dispatch(0.0)
    rung = 0
    for number, member in enumerate(members):
        tested.done(member, next(iter(member.offered)))
        rings, _ = tested.dispatch(10.0 + number)
        rung += sum(map(len, rings.values()))
    assert rung <= 2 * len(members)


def test_pulled_tasks_leave_nothing_behind() -> None:
    tested, full = Scheduler(), Member("full", 1)
    tested.join(full)
    tested.claimed(full, "0")
    for number in range(10_000):
        tested.add(f"{number}")
        tested.dispatch(0.0)
        tested.withdraw(f"{number}")
    assert len(tested._waiting) < 100


def check(tested: Scheduler) -> None:
    """Look whether everything that is kept twice agrees."""
    state, offered = tested._state, tested._offered
    assert {name for name in state if state[name] == scheduler._OFFERED} == offered.keys()
    assert Counter(offered.keys()) == Counter(name for member in tested.members for name in member.offered)
    assert all(name in member.offered for name, (member, _) in offered.items())
    assert [since for _, since in offered.values()] == sorted(since for _, since in offered.values())
    assert set(tested._waiting) >= {name for name in state if state[name] == scheduler._WAITING}
    parked = {name for heap in tested._parked.heaps.values() for name in heap}
    assert parked >= {name for name in state if state[name] == scheduler._PARKED}
    assert {name for _, name in tested._put_off} >= {name for name in state if state[name] == scheduler._PUT_OFF}
    for name in tested._refusals.names():
        assert all(name in member.refused for member in tested._refusals.members(name))
        assert tested._refusals.members(name) <= tested.members
    for member in tested.members:
        assert len(member.offered) <= WINDOW
        assert all(member in tested._refusals.members(name) for name in member.refused)
    turns = tested._turns
    for member in {*tested.members, *turns._idle, *turns._ready} - turns.changed.keys():
        has_turn = member in tested.members and member.room() > 0
        in_hand = bool(member.offered or member.held)
        assert (member in turns._idle, member in turns._ready) == (has_turn and not in_hand, has_turn and in_hand)
        assert has_turn or member not in turns.takers


class Worker:
    """A worker in the model: it claims from the disk, and tells the scheduler by reports that come late or never."""

    def __init__(self, number: int, chance: random.Random) -> None:
        self.member = Member(f"w{number}", chance.choice([0, 0, 1, 3, 20]))
        self.inbox: list[str] = []
        self.reports: list[tuple[str, str]] = []
        self.held: list[str] = []
        self.stopped = False
        self.mute = chance.random() < 0.1
        self.picky = chance.random() < 0.3

    def has_room(self) -> bool:
        return not self.member.prefetch or len(self.held) < self.member.prefetch


class World:
    """Workers, the disk as a set of names, and a scheduler that hears of it what a coordinator would."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        self.scheduler = Scheduler()
        self.now = 0.0
        self.waiting: set[str] = set()
        self.done: set[str] = set()
        self.runs = Counter[str]()
        self.sent = 0
        self.born = 0
        self.workers: list[Worker] = []
        self.drift: Iterator[None] | None = None
        self.look: float | None = None

    def step(self) -> None:
        actions = (self.send, self.send, self.dispatch, self.dispatch, self.work, self.work, self.work, self.finish,
                   self.finish, self.report, self.report, self.pass_time, self.drift_on, self.drift_on)  # fmt: skip
        self.chance.choice(self.rare if self.chance.random() < 0.02 else actions)()

    @property
    def rare(self) -> tuple:
        return (self.come, self.come, self.die, self.stop_or_go_on, self.stop_or_go_on, self.pull, self.subscribe_again)

    def send(self) -> None:
        if len(self.waiting) < 300:
            self.sent += 1
            name = f"{self.sent:08d}"
            self.waiting.add(name)
            if self.chance.random() < 0.99:
                self.scheduler.add(name)

    def dispatch(self) -> None:
        rings, self.look = self.scheduler.dispatch(self.now)
        assert self.look is None or self.look > self.now
        for worker in self.workers:
            got = rings.pop(worker.member, [])
            assert not worker.member.prefetch or len(worker.member.offered) <= worker.member.prefetch
            if self.chance.random() < 0.995:
                worker.inbox += got
        assert not rings, "somebody was rung who is gone"
        state = self.scheduler._state
        if any(member.room() > 0 for member in self.scheduler.members):
            assert scheduler._WAITING not in state.values()
        for refusers, heap in self.scheduler._parked.heaps.items():
            if any(state.get(name) == scheduler._PARKED for name in heap):
                assert not [member for member in self.scheduler.members - refusers if member.room() > 0]

    def some(self) -> Worker | None:
        going = [worker for worker in self.workers if not worker.stopped]
        return self.chance.choice(going) if going else None

    def take_up(self, worker: Worker) -> None:
        name = worker.inbox.pop(0)
        if name in self.waiting:
            self.waiting.discard(name)
            worker.held.append(name)
            worker.reports.append(("claimed", name))
        else:
            worker.reports.append(("lose", name))

    def work(self) -> None:
        worker = self.some()
        while worker and worker.inbox and worker.has_room() and self.chance.random() < 0.9:
            self.take_up(worker)

    def finish(self) -> None:
        worker = self.some()
        if worker and worker.held:
            name = worker.held.pop(self.chance.randrange(len(worker.held)))
            kind = self.chance.random()
            if worker.picky and zlib.crc32(f"{name} {worker.member.name}".encode()) % 3 == 0:
                self.waiting.add(name)
                worker.reports.append(("refuse", name))
            elif kind < 0.02:
                self.waiting.add(name)
                worker.reports.append(("give_back", name))
            else:
                self.runs[name] += 1
                self.done.add(name)
                worker.reports.append(("done", name))

    def report(self) -> None:
        worker = self.some()
        while worker and worker.reports and self.chance.random() < 0.8:
            self.tell(worker, *worker.reports.pop(0))

    def tell(self, worker: Worker, kind: str, name: str) -> None:
        if not worker.mute and self.chance.random() < 0.995:
            look = getattr(self.scheduler, kind)(worker.member, name)
            if look and name in self.waiting:
                self.scheduler.add(name)

    def pass_time(self) -> None:
        self.now += self.chance.choice([0.001, 0.01, 0.06, 1.0])

    def drift_on(self) -> None:
        if self.drift is None:
            listing = sorted(self.waiting, key=lambda _: self.chance.random())
            self.drift = self.scheduler.drift(self.now, iter(listing), self.held())
        for _ in range(self.chance.randrange(200)):
            if next(self.drift, self) is self:
                self.drift = None
                return

    def held(self) -> Iterator[tuple[Member, list[str]]]:
        for worker in list(self.workers):
            if worker in self.workers:
                yield worker.member, list(worker.held)

    def come(self) -> None:
        if len(self.workers) < 12:
            self.born += 1
            self.workers.append(Worker(self.born, self.chance))
            self.scheduler.join(self.workers[-1].member)

    def subscribe_again(self) -> None:
        worker = self.some()
        if worker:
            self.scheduler.join(worker.member)

    def die(self) -> None:
        if len(self.workers) > 1:
            worker = self.workers.pop(self.chance.randrange(len(self.workers)))
            self.scheduler.leave(worker.member)
            self.waiting.update(worker.held)
            for name in worker.held:
                self.scheduler.add(name)

    def stop_or_go_on(self) -> None:
        if self.workers:
            worker = self.chance.choice(self.workers)
            worker.stopped = not worker.stopped

    def pull(self) -> None:
        """Somebody who does not subscribe takes the oldest, and says so."""
        if self.waiting:
            name = min(self.waiting)
            self.waiting.discard(name)
            self.runs[name] += 1
            self.done.add(name)
            if self.chance.random() < 0.9:
                self.scheduler.withdraw(name)

    def settle(self) -> None:
        """Let everybody who is left do what is left; nothing may be forgotten, and it may not take for ever."""
        if not self.workers:
            self.come()
        for worker in self.workers:
            worker.stopped = worker.picky = worker.mute = False
        while len(self.done) < self.sent:
            begun = len(self.done)
            end = self.now + 130.0
            while self.now < end and len(self.done) < self.sent:
                self.dispatch()
                for worker in self.workers:
                    self.run_dry(worker)
                self.now += 1.0
                if int(self.now) % 10 == 0:
                    for _ in self.drift or self.scheduler.drift(self.now, sorted(self.waiting), self.held()):
                        pass
                    self.drift = None
            assert len(self.done) > begun, f"{self.sent - begun} tasks are never done"

    def run_dry(self, worker: Worker) -> None:
        for _ in range(200):
            self.work()
        while worker.held:
            name = worker.held.pop()
            self.runs[name] += 1
            self.done.add(name)
            worker.reports.append(("done", name))
        while worker.inbox and worker.has_room():
            self.take_up(worker)
        while worker.reports:
            self.tell(worker, *worker.reports.pop(0))


@pytest.mark.parametrize("seed", range(10))
def test_random_events(seed: int) -> None:
    world = World(seed)
    for number in range(25_000):
        world.step()
        if number % 100 == 0:
            check(world.scheduler)
    assert world.sent > 1000
    world.settle()
    check(world.scheduler)
    assert len(world.done) == world.sent and not world.waiting
    assert set(world.runs.values()) == {1}, "the disk lets nobody do a task twice, whatever the scheduler says"
    for _ in world.drift or ():
        pass
    assert world.scheduler._touched is None
    assert len(world.scheduler._waiting) < 1000 and len(world.scheduler._put_off) < 1000
