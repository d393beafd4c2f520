"""Hears broadcasts, those about announcements alone, until one says that it is the last."""

import threading
from pathlib import Path

import kiwipy

from pipebroker import PipeCommunicator

over = threading.Event()


def hear(communicator, body, sender, subject, correlation_id):
    print(f"Broadcast from {sender}: {body}", flush=True)
    if body["last"]:
        over.set()


with PipeCommunicator("my_profile", Path.home() / ".aiida" / "profiles" / "my_profile") as communicator:
    communicator.add_broadcast_subscriber(kiwipy.BroadcastFilter(hear, subject="announcement.*"))
    print("Listening", flush=True)
    over.wait()
