"""Pulls tasks from a queue by hand: does one, puts one back, looks through the rest. It needs no coordinator."""

from pathlib import Path

import kiwipy

from pipebroker import PipeCommunicator

with PipeCommunicator("my_profile", Path.home() / ".aiida" / "profiles" / "my_profile") as communicator:
    queue = communicator.task_queue("by hand")
    first, second, third = (queue.task_send(number) for number in (1, 2, 3))
    with queue.next_task() as task, task.processing() as outcome:
        print(f"Doing {task.body}")
        outcome.set_result("done")
    print(first.result(timeout=5))
    with queue.next_task() as task:
        print(f"Not doing {task.body}: it waits again")
    for task in queue:
        print(f"Doing {task.body}")
        task.process().set_result(f"{task.body} in the loop")
    print(second.result(timeout=5), "and", third.result(timeout=5))
    try:
        with queue.next_task():
            pass
    except kiwipy.QueueEmpty:
        print("Nothing is left")
