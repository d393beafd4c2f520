"""Sends a task, and waits for its outcome."""

from pathlib import Path

from pipebroker import PipeCommunicator

with PipeCommunicator("my_profile", Path.home() / ".aiida" / "profiles" / "my_profile") as communicator:
    future = communicator.task_send({"command": "process", "data": 123})
    print(f"Task result: {future.result(timeout=10)}")
