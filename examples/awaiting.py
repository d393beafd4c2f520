"""Awaits tasks in asyncio: each outcome is a future that its event loop can wait for."""

import asyncio
from pathlib import Path

from pipebroker import PipeCommunicator


async def main():
    with PipeCommunicator("my_profile", Path.home() / ".aiida" / "profiles" / "my_profile") as communicator:
        # From a thread, as `task_send` waits for the disk, and the loop is not to wait with it.
        sent = [await asyncio.to_thread(communicator.task_send, number) for number in range(3)]
        for outcome in await asyncio.gather(*map(asyncio.wrap_future, sent)):
            print(outcome)


asyncio.run(main())
