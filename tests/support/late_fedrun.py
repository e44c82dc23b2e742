"""`fedrun` with a slow worker, for tests: python late_fedrun.py METHOD FLAG ...

LATE_RANK sleeps around everything it does with memory that the workers of a machine share. A
neighbour that does not wait for it has changed that memory by then, or has read it too early.
"""

from __future__ import annotations

import os
import time
from typing import Any

from fedrun import __main__
from fedrun.aggregation.update import ServerUpdate
from fedrun.distributed.data_plane import DataPlane
from fedrun.federation import client_measures
from fedrun.federation.worker import Worker

SECONDS = 0.25


def late(owner: Any, name: str, after: bool = False) -> None:
    """Sleep before each call of a function, or after it."""
    original = getattr(owner, name)

    def delayed(*args: Any, **kwargs: Any) -> Any:
        time.sleep(0 if after else SECONDS)
        result = original(*args, **kwargs)
        time.sleep(SECONDS if after else 0)
        return result

    setattr(owner, name, delayed)


if os.environ["RANK"] == os.environ["LATE_RANK"]:
    late(DataPlane, "barrier", after=True)
    late(client_measures, "tracked_parameters")  # copies the model at the start
    late(ServerUpdate, "apply")
    late(Worker, "evaluate")

if __name__ == "__main__":
    __main__.main()
