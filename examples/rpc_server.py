"""Answers calls until it is asked to stop."""

import threading
from pathlib import Path

from pipebroker import PipeCommunicator

over = threading.Event()


def handle(communicator, message):
    print(f"RPC call: {message}", flush=True)
    if message == "stop":
        over.set()
        return "stopping"
    if "divide" not in message:
        raise ValueError("there is nothing to divide")
    dividend, divisor = message["divide"]
    return {"quotient": dividend / divisor}


with PipeCommunicator("my_profile", Path.home() / ".aiida" / "profiles" / "my_profile", "rpc_server") as server:
    server.add_rpc_subscriber(handle, identifier="rpc_server")
    print("Serving", flush=True)
    over.wait()
