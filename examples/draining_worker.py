"""Works on tasks; on SIGTERM it takes no new ones, finishes those in hand, and ends. None of them is begun twice."""

import signal
import time
from pathlib import Path

from pipebroker import PipeCommunicator

signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])  # Before any thread is there, which inherits this.


def handle(communicator, task):
    print(f"Began {task}", flush=True)
    time.sleep(1)
    print(f"Finished {task}", flush=True)
    return task


with PipeCommunicator("my_profile", Path.home() / ".aiida" / "profiles" / "my_profile") as communicator:
    communicator.add_task_subscriber(handle)
    print("Waiting for tasks", flush=True)
    signal.sigwait([signal.SIGTERM])
    print("Told to end", flush=True)
    print(f"Nothing is in hand: {communicator.drain(timeout=60)}")
