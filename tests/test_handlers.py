"""What runs inside our functions and is not ours: signal handlers that send, wait or raise, log handlers that raise,
subscribers that fork, and threads that subscribe while the communicator is closed.
"""

from __future__ import annotations

import queue
import re
import subprocess
import sys
import threading
import time

import kiwipy
import pytest

from harness import ECHO, HOLDER, TIMEOUT, Broker, eventually
from lane import Lane
from test_calls import locked
from test_mending import look

# Each says how it went by its last line. A hang is the end of the test's patience.
PATIENCE = 40.0


def outcome(broker: Broker, script: str, *arguments: object) -> str:
    """Run a script to its end, and return what it prints after `ready`."""
    child = broker.spawn(script, *arguments)
    try:
        out, _ = child.process.communicate(timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        child.kill()
        raise AssertionError("it hangs") from None
    return out.decode() if isinstance(out, bytes) else out


# The handler completes tasks, or subscribes, while the main thread sends; another thread completes tasks too.
WITHIN = """
import signal, threading
with communicator(fsync=False) as worker:
    held, ended, within, count = [], threading.Event(), [], [0]
    completes = arguments[0] == "completes"
    queue = worker.task_queue("kiwipy.tasks" if completes else "other")
    if completes:
        worker.add_task_subscriber(lambda *_: held.append(kiwipy.Future()) or held[-1])
    def complete():
        while not ended.wait(0.0005):
            while held:
                held.pop().set_result(1)
    def subscribe():
        while not ended.wait(0.0002):
            worker.remove_task_subscriber(worker.add_task_subscriber(lambda *_: kiwipy.Future()))
    thread = threading.Thread(target=complete if completes else subscribe)
    thread.start()
    def handle(*_):
        if within:
            return
        within.append(1)
        count[0] += 1
        if completes:
            try:
                held.pop(0).set_result(2)
            except IndexError:
                pass
        else:
            worker.remove_rpc_subscriber(worker.add_rpc_subscriber(lambda *_: 1, f"id{count[0]}"))
        within.clear()
    signal.signal(signal.SIGALRM, handle)
    signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
    end, sent = time.monotonic() + 6, 0
    while time.monotonic() < end:
        queue.task_send(sent, no_reply=True)
        sent += 1
    signal.setitimer(signal.ITIMER_REAL, 0)
    ended.set()
    thread.join()
    print("handled", count[0] > 100)
"""


@pytest.mark.parametrize("what", ["completes", "subscribes"])
def test_handler_and_another_thread_do_not_wait_for_each_other(served: Broker, what: str) -> None:
    assert outcome(served, WITHIN, what).endswith("handled True\n")


# The handler waits for an answer while the main thread sends and pulls.
WAITS = """
import signal
with communicator(fsync=False) as sender:
    queue, within, waited, lost = sender.task_queue("pulled"), [], [0], [0]
    def handle(*_):
        if not within:
            within.append(1)
            waited[0] += 1
            try:
                sender.rpc_send("slow", 1).result(5)
            except Exception:
                lost[0] += 1
            within.clear()
    signal.signal(signal.SIGALRM, handle)
    end, sent = time.monotonic() + 6, 0
    while time.monotonic() < end and not lost[0]:
        queue.task_send(sent, no_reply=True)
        sent += 1
        signal.setitimer(signal.ITIMER_REAL, 0.0002 + sent % 40 * 0.00001)
        with queue.next_task() as task, task.processing() as outcome:
            outcome.set_result(None)
    signal.setitimer(signal.ITIMER_REAL, 0)
    print("waited", waited[0] > 50, "lost", lost[0])
"""
SLOW = """
with communicator() as server:
    server.add_rpc_subscriber(lambda _, body: time.sleep(0.03) or body, "slow")
    print("ready"); sys.stdin.read()
"""


def test_handler_that_waits_for_an_answer_gets_it(served: Broker) -> None:
    served.child(SLOW)
    assert outcome(served, WAITS).endswith("waited True lost 0\n")


# A handler raises while the outcome of a task is set.
COMPLETES = """
import collections, logging, signal
logging.disable(logging.CRITICAL)
class Interrupt(BaseException): pass
def handle(*_): raise Interrupt
signal.signal(signal.SIGALRM, handle)
with communicator(fsync=False) as worker, communicator(fsync=False) as sender:
    held, runs, number = [], collections.Counter(), 300
    def subscriber(_, body):
        runs[body] += 1
        held.append((body, kiwipy.Future()))
        return held[-1][1]
    worker.add_task_subscriber(subscriber)
    sent = [sender.task_send(body) for body in range(number)]
    end, done = time.monotonic() + 10, 0
    while done < number and time.monotonic() < end:
        try:
            body, future = held.pop(0)
        except IndexError:
            continue
        done += 1
        try:
            signal.setitimer(signal.ITIMER_REAL, 0.00002 + done % 60 * 0.000005)
            future.set_result(body)
        except Interrupt:
            pass
        finally:
            try:
                signal.setitimer(signal.ITIMER_REAL, 0)
            except Interrupt:
                pass
        if future._condition._is_owned():
            future._condition.release()  # Python's own: it was interrupted where it was about to do that.
        if not future.done():
            future.set_result(body)  # Whoever is told by an exception does it again.
    outcomes = [future.result(15).result(15) for future in sent]
    print("right", outcomes == list(range(number)), "again", sum(runs.values()) - number)
"""


def test_a_lane_is_not_held_up_by_a_handler_that_waits_in_a_report(served: Broker) -> None:
    worker, sender = served.communicator("worker"), served.communicator()
    worker.add_task_subscriber(lambda _, body: body)
    reports = worker._engine._reports
    with reports._mutex:  # As whoever is interrupted in the middle of it has it.
        reports._sending = True
        for number in range(40):
            assert sender.task_send(number).result(TIMEOUT) == number
        reports._sending = False


def test_future_that_an_interruption_has_left_locked_keeps_nobody_from_the_others(served: Broker) -> None:
    worker, sender, held = served.communicator("worker"), served.communicator(), kiwipy.Future()
    worker.add_task_subscriber(lambda _, body: held if body == "held" else body)
    sender.task_send("held")
    eventually(lambda: any(side.awaited for side in worker._engine.holdings.sides.values()))
    held._condition.acquire()
    try:
        look(worker)
        assert sender.task_send("other").result(TIMEOUT) == "other"
    finally:
        held._condition.release()


def test_handler_that_raises_while_a_task_is_completed_neither_loses_nor_repeats_it(served: Broker) -> None:
    assert outcome(served, COMPLETES).endswith("right True again 0\n")


PULLS = """
import signal
class Interrupt(BaseException): pass
def handle(*_): raise Interrupt
signal.signal(signal.SIGALRM, handle)
with communicator(fsync=False) as puller:
    queue, number, interrupted, bodies = puller.task_queue("pulled"), 200, 0, set()
    for body in range(number):
        queue.task_send(body, no_reply=True)
    with queue.next_task():
        pass
    for each in range(number):
        try:
            signal.setitimer(signal.ITIMER_REAL, 0.00002 + each % 100 * 0.000003)
            with queue.next_task(fail=False):
                pass
        except Interrupt:
            interrupted += 1
        finally:
            try:
                signal.setitimer(signal.ITIMER_REAL, 0)
            except Interrupt:
                pass
    end = time.monotonic() + 25
    while len(bodies) < number and time.monotonic() < end:
        with queue.next_task(fail=False) as task:
            if task is not None:
                bodies.add(task.body)
                with task.processing() as outcome:
                    outcome.set_result(None)
    print("interrupted", interrupted > 5, "done", len(bodies))
"""


def test_task_whose_pull_was_interrupted_waits_again(broker: Broker) -> None:
    assert outcome(broker, PULLS).endswith("interrupted True done 200\n")


# Log handlers that raise

LOGS = """
import logging, threading
class Raises(logging.Handler):
    def emit(self, record): raise RuntimeError("no log")
ended = []
threading.excepthook = lambda said: ended.append(said.thread.name)
worker, sender, heard = communicator(), communicator(), threading.Event()
def hears(*_):
    heard.set()
    raise ValueError("broadcast")
def works(_, body):
    if body == "bad": raise ValueError("task")
    return body
worker.add_rpc_subscriber(lambda _, body: body, "rpc")
worker.add_broadcast_subscriber(hears)
worker.add_task_subscriber(works)
logging.getLogger().addHandler(Raises())
sender.broadcast_send("x")
heard.wait(10)
bad = sender.task_send("bad")
said = type(bad.exception(10)).__name__, sender.rpc_send("rpc", 2).result(10), sender.task_send("ok").result(10)
worker.close()
sender.close()
print(*said, ended)
"""


def test_log_handler_that_raises_ends_no_thread(served: Broker) -> None:
    assert outcome(served, LOGS).endswith("RemoteException 2 ok []\n")


# Forks and threads

FORKS = """
import os
with communicator() as worker, communicator() as sender:
    worker.add_task_subscriber(lambda *_: os.fork())
    pid = sender.task_send("fork").result(10)
    # As a thread of the child that has no work, it ends; and so does the child, which has no other.
    print("ended", os.waitpid(pid, 0)[0] == pid)
"""


def test_child_of_a_subscriber_that_forks_ends(served: Broker) -> None:
    assert re.search("ended True", outcome(served, FORKS))


CLOSES = """
import threading
left = []
for number in range(30):
    made, go = communicator(), threading.Event()
    def subscribe(kind):
        go.wait()
        try:
            for each in range(200):
                if kind:
                    made.add_rpc_subscriber(lambda *_: 1, f"{number}-{kind}-{each}")
                else:
                    made.task_queue("q").add_task_subscriber(lambda *_: 1)
        except kiwipy.CommunicatorClosed:
            pass
    threads = [threading.Thread(target=subscribe, args=(kind,)) for kind in range(5)]
    for thread in threads: thread.start()
    go.set()
    time.sleep(number % 11 * 0.0007)
    made.close()
    for thread in threads: thread.join()
    registry, pipes = os.path.join(config_path, "pipes"), os.readlink(os.path.join(config_path, "pipes", "directory"))
    left += [name for name in os.listdir(registry) if name.startswith("worker_")]
    left += [name for name in os.listdir(pipes) if name.startswith(("rpc_", "task_", "route_", "reply_"))]
print("left", left)
"""


def test_who_subscribes_beside_close_leaves_nothing(served: Broker) -> None:
    assert outcome(served, CLOSES).endswith("left []\n")


def test_a_future_that_an_interruption_has_left_locked_keeps_no_other_from_its_answer(served: Broker) -> None:
    served.child(ECHO, "w1")
    served.child(HOLDER, "w2")
    caller = served.communicator()
    locked, unanswered = caller.rpc_send("w1", 1), caller.rpc_send("w2", 2).result(TIMEOUT)
    for future in (locked, unanswered):
        future._condition.acquire()  # As `threading.Condition.__exit__` leaves it where a handler raises.
    for number in range(3):
        assert caller.rpc_send("w1", number).result(TIMEOUT) == number
    began = time.monotonic()
    caller.close()
    assert time.monotonic() - began < 5.0
    assert locked.result(0) == 1 and isinstance(unanswered.exception(0), kiwipy.CommunicatorClosed)
    for future in (locked, unanswered):
        future._condition.release()


WAITS_WITHIN = """
import signal
caller = communicator()
def handle(*_):
    assert caller.rpc_send("w1", "handler's").result(20) == "handler's"
signal.signal(signal.SIGALRM, handle)
for number in range(300):
    future = caller.rpc_send("w1", number)
    signal.setitimer(signal.ITIMER_REAL, 0.0001)
    while not future.done():
        pass
    signal.setitimer(signal.ITIMER_REAL, 0)
    assert future.result() == number
print("done")
"""


def test_a_handler_that_waits_may_interrupt_whoever_looks_at_a_future(served: Broker) -> None:
    served.child(ECHO, "w1")
    assert served.spawn(WAITS_WITHIN).line(TIMEOUT) == "done"


SUBSCRIBES = """
import random, signal, threading
class Interrupt(BaseException): pass
def handle(*_): raise Interrupt
signal.signal(signal.SIGALRM, handle)
random.seed(1)
worst = 0
for number in range(60):
    made = communicator()
    inside = []
    def subscriber(_, body):
        global worst
        inside.append(1); worst = max(worst, len(inside)); time.sleep(0.005); inside.pop(); return body
    try:
        signal.setitimer(signal.ITIMER_REAL, random.uniform(0.00005, 0.0004))
        made.add_rpc_subscriber(subscriber, "e")
    except Interrupt:
        pass
    except RuntimeError as raised:
        # Python's own: Thread.start waits for the thread, and was interrupted where it had let go of its lock.
        if not isinstance(raised.__context__, Interrupt):
            raise
    finally:
        try:
            signal.setitimer(signal.ITIMER_REAL, 0)
        except Interrupt:
            pass
    try:
        made.add_rpc_subscriber(subscriber, "e")
    except kiwipy.DuplicateSubscriberIdentifier:
        pass
    for future in [made.rpc_send("e", body) for body in range(3)]:
        future.result(20)
    made.close()
# What was interrupted before it was begun stays in Python's list, and never runs.
left = [each for each in threading.enumerate() if each is not threading.main_thread() and each.is_alive()]
for thread in left:
    thread.join(5)
print("at once", worst, "left", sum(thread.is_alive() for thread in left))
"""


def test_an_interrupted_subscription_leaves_one_thread_at_most(served: Broker) -> None:
    assert served.spawn(SUBSCRIBES).line(2 * TIMEOUT) == "at once 1 left 0"
    for draft in (*served.pipes.glob(".rpc_*"), *served.queue.glob("claimed/.*")):
        draft.unlink()  # Or the coordinator does so, after an hour.


def test_a_lane_runs_on_where_it_was_begun_twice() -> None:
    lane, ran = Lane("twice"), queue.SimpleQueue[str]()
    lane.start()
    lane._begun = False  # As where a handler raises while the thread begins.
    lane.start()
    for _ in range(10):
        lane.put(lambda: ran.put(threading.current_thread().name + str(threading.get_ident())))
    assert len({ran.get(timeout=TIMEOUT) for _ in range(10)}) == 1
    lane.stop()
    eventually(lambda: not any(thread.name == "twice" for thread in threading.enumerate()))


WATCHED = """
import ctypes, threading
class TooLong(Exception): pass
worker, sender = communicator(), communicator()
begun, threads = threading.Event(), set()
def end(ident):
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(ident), ctypes.py_object(TooLong))
def subscriber(_, body):
    threads.add(threading.get_ident())
    if body == "spin":
        begun.set()
        while True: pass
    return body
worker.add_task_subscriber(subscriber)
worker.add_rpc_subscriber(subscriber, "r")
for send in (sender.task_send, lambda body: sender.rpc_send("r", body)):
    begun.clear(); threads.clear()
    future = send("spin")
    begun.wait(20)
    end(*threads)
    assert "TooLong" in str(future.exception(20).__cause__)
    time.sleep(0.2)
    end(*threads)  # Too late: it comes when the thread is rung for the next one.
    assert [send(number).result(20) for number in range(3)] == [0, 1, 2]
print("answered")
"""


@pytest.mark.skipif(sys.implementation.name != "cpython", reason="only CPython has it")
def test_a_watchdog_ends_a_subscriber_and_no_lane(served: Broker) -> None:
    assert served.spawn(WATCHED).line(2 * TIMEOUT) == "answered"


def test_a_watchdog_that_is_late_again_and_again_ends_no_lane(monkeypatch: pytest.MonkeyPatch) -> None:
    lane, ran, late = Lane("lane"), threading.Event(), [1, 2]

    def say(*_: object) -> None:
        if late:
            late.pop()
            raise KeyboardInterrupt

    monkeypatch.setattr("lane.say", say)
    lane.start()
    lane.put(lambda: 1 // 0)
    lane.put(ran.set)
    try:
        assert ran.wait(5) and not late
    finally:
        lane.finish()
        lane.join()


FORKS_WHILE_IT_WAITS = """
served = communicator("server")
served.add_rpc_subscriber(lambda _, body: kiwipy.Future(), "never")
caller = communicator()
future = caller.rpc_send("never", 1).result(20)
parent = os.getpid()
future.add_done_callback(lambda _: os.getpid() == parent or print("called back in the child"))
pid = os.fork()
if not pid:
    print(type(future.exception(5)).__name__)
    sys.stdout.flush()
    os._exit(0)
os.waitpid(pid, 0)
print(future.done())
served.close(); caller.close()
"""


def test_what_a_forked_child_waits_for_ends(served: Broker) -> None:
    child = served.spawn(FORKS_WHILE_IT_WAITS)
    assert [child.line(), child.line()] == ["CommunicatorClosed", "False"]


CLOSES_BESIDE = """
import threading
server = communicator("server")
server.add_rpc_subscriber(lambda _, body: body, "echo")
queue = server.task_queue("q")
for number in range(200):
    queue.task_send(number, no_reply=True)
wrong = []
def calls(caller):
    try:
        while True:
            caller.rpc_send("echo", 1)
    except kiwipy.CommunicatorClosed:
        pass
    except Exception as error:
        wrong.append(repr(error))
def pulls(caller):
    try:
        pulled = caller.task_queue("q")
        while True:
            with pulled.next_task() as task:
                task.body
    except kiwipy.CommunicatorClosed:
        pass
    except Exception as error:
        wrong.append(repr(error))
for number in range(30):
    caller = communicator(fsync=False)
    threads = [threading.Thread(target=target, args=(caller,)) for target in (calls, calls, pulls, pulls)]
    for thread in threads:
        thread.start()
    time.sleep(0.005)
    caller.close()
    for thread in threads:
        thread.join()
server.close()
# It does not wait for a subscriber that is just answering, and whose draft would be left where this process ends.
for thread in threading.enumerate():
    if thread is not threading.main_thread():
        thread.join(10)
print(sorted(set(wrong)))
"""


def test_whoever_closes_is_told_so_and_not_that_nobody_is_there(served: Broker) -> None:
    assert served.spawn(CLOSES_BESIDE).line(2 * TIMEOUT) == "[]"


def test_an_engine_that_nobody_owns_ends_when_it_looks_at_itself(served: Broker) -> None:
    made = served.communicator("w1")
    engine = made._engine
    engine._facade = lambda: None  # As where a handler raises in the constructor, after the engine is made.
    engine.poller.call(engine.upkeep.look)
    eventually(lambda: not engine._thread.is_alive())
    served.communicator("w1").close()


@pytest.mark.parametrize("how", ["close", "collected"])
def test_a_future_that_is_looked_at_while_its_communicator_goes_ends(served: Broker, how: str) -> None:
    served.child(HOLDER, "w1")
    caller = served.communicator()
    future = caller.rpc_send("w1", 1).result(TIMEOUT)
    lets_go = locked(future)
    if how == "close":
        caller.close()
    else:
        engine = caller._engine
        engine.close_soon()  # As the garbage collector does, after which nobody calls anything.
        eventually(lambda: not engine._thread.is_alive())
    lets_go.set()
    assert isinstance(future.exception(TIMEOUT), kiwipy.CommunicatorClosed)
    eventually(lambda: not any(thread.name == "pipebroker endings" for thread in threading.enumerate()))


def test_a_future_that_is_locked_for_ever_puts_off_no_other(served: Broker) -> None:
    served.child(ECHO, "w1")
    caller = served.communicator()
    stuck = caller.rpc_send("w1", 0)
    forever = locked(stuck)
    calls = caller._engine.calls
    eventually(lambda: stuck in calls._unended or stuck._state == "FINISHED")
    for number in range(3):
        future = caller.rpc_send("w1", number)
        lets_go = locked(future)
        lets_go.set()
        assert future.result(2.0) == number
    forever.set()
    assert stuck.result(TIMEOUT) == 0


CALLS_BACK_AT_THE_END = """
import threading
server = communicator("server")
server.add_rpc_subscriber(lambda _, body: {"a": 1}, "x")
def decoder(value):
    time.sleep(1)
    return value
caller, out = communicator(decoder=decoder), []
future = caller.rpc_send("x", 1)
def called_back(future):
    found = []
    thread = threading.Thread(target=lambda: found.append(type(future.exception()).__name__), daemon=True)
    thread.start()
    thread.join(5)
    print(found)
future.add_done_callback(called_back)
time.sleep(0.5)
caller.close()
future.exception(20)
time.sleep(1)
server.close()
"""


def test_a_callback_holds_no_lock_of_its_future(served: Broker) -> None:
    assert served.spawn(CALLS_BACK_AT_THE_END).line() == "['CommunicatorClosed']"


FORKS_WHILE_IT_DECODES = """
server = communicator("server")
server.add_rpc_subscriber(lambda _, body: {"a": 1}, "x")
def decoder(value):
    time.sleep(2)
    return value
caller = communicator(decoder=decoder)
futures = [caller.rpc_send("x", number) for number in range(2)]
end = time.monotonic() + 20
while not caller._engine.calls._taken:
    assert time.monotonic() < end
    time.sleep(0.01)
pid = os.fork()
if not pid:
    print(*(type(future.exception(5)).__name__ for future in futures))
    sys.stdout.flush()
    os._exit(0)
os.waitpid(pid, 0)
caller.close(); server.close()
"""


def test_what_is_being_decoded_ends_in_a_forked_child(served: Broker) -> None:
    assert served.spawn(FORKS_WHILE_IT_DECODES).line() == "CommunicatorClosed CommunicatorClosed"
