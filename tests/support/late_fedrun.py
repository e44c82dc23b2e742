"""`fedrun` with a worker that is late, for tests: python late_fedrun.py METHOD FLAG ...

LATE_RANK waits at whatever it does with what the workers of a machine have in
common: a neighbour that goes on too early has changed it by then, or has read too little.
"""

from __future__ import annotations

import os
import time
from typing import Any

from fedrun import __main__
from fedrun.aggregation.base import Aggregator
from fedrun.distributed.data_plane import DataPlane
from fedrun.federation import worker

SECONDS = 0.25


def late(owner: Any, name: str, after: bool = False) -> None:
    """Wait before a function is called, or after it."""
    prompt = getattr(owner, name)

    def delayed(*args: Any, **kwargs: Any) -> Any:
        time.sleep(0 if after else SECONDS)
        result = prompt(*args, **kwargs)
        time.sleep(SECONDS if after else 0)
        return result

    setattr(owner, name, delayed)


if os.environ["RANK"] == os.environ["LATE_RANK"]:
    late(DataPlane, "barrier", after=True)
    late(worker, "tracked_parameters")  # copies the model at the start
    late(Aggregator, "apply")
    late(worker.Worker, "evaluate")

if __name__ == "__main__":
    __main__.main()
