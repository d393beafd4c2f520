"""Broadcasts to all who listen."""

from pathlib import Path

from pipebroker import PipeCommunicator

with PipeCommunicator("my_profile", Path.home() / ".aiida" / "profiles" / "my_profile") as communicator:
    for subject, message in (
        ("announcement.first", "Hello, workers!"),
        ("gossip", "Nobody listens to this."),
        ("announcement.last", "Goodbye!"),
    ):
        communicator.broadcast_send({"message": message, "last": subject.endswith("last")}, "main", subject)
    print("Sent")
