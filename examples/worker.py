"""Works on tasks until Ctrl-C."""

import threading
from pathlib import Path

from pipebroker import PipeCommunicator


def handle(communicator, task):
    print(f"Received task: {task}", flush=True)
    return {"result": "success"}


with PipeCommunicator("my_profile", Path.home() / ".aiida" / "profiles" / "my_profile") as communicator:
    communicator.add_task_subscriber(handle)
    print("Waiting for tasks", flush=True)
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        print("Closed")
