"""`fedrun` with a fault in it, for tests: FAULT=raise|nan in a client's step, counted from 0."""

from __future__ import annotations

import os

from fedrun import __main__
from fedrun.client import Client

healthy = Client.next_batch


def faulty(client: Client):  # type: ignore[no-untyped-def]
    chosen = os.environ["FAULT_CLIENT"] in (str(client.index), "all")
    if chosen and client.steps_done == int(os.environ["FAULT_STEP"]):
        if os.environ["FAULT"] == "raise":
            raise ZeroDivisionError("injected")
        client.flat.vector[7] = float("nan")
    return healthy(client)


Client.next_batch = faulty  # type: ignore[method-assign]

if __name__ == "__main__":
    __main__.run()
