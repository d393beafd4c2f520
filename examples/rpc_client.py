"""Calls, and meets each thing that may come of it."""

from pathlib import Path

import kiwipy

from pipebroker import PipeCommunicator

with PipeCommunicator("my_profile", Path.home() / ".aiida" / "profiles" / "my_profile") as client:
    print(client.rpc_send("rpc_server", {"divide": [1, 4]}).result(timeout=5))
    try:
        client.rpc_send("rpc_server", {"request": "data"}).result(timeout=5)
    except kiwipy.RemoteException as error:
        print(f"It raised: {error}")
    try:
        client.rpc_send("nobody", {})
    except kiwipy.UnroutableError:
        print("Nobody is called 'nobody'")
    print(client.rpc_send("rpc_server", "stop").result(timeout=5))
