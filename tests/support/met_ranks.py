"""How many connections ranks have when they have met, and when all has been said that is ever said.

Started as a program on any number of ranks: python -m tests.support.met_ranks. Rank 0 prints both
numbers of each rank, as JSON.
"""

from __future__ import annotations

import json
import os
import sys

import psutil
import torch

from fedrun.distributed.launch import detect
from fedrun.distributed.runtime import connect


def connections() -> int:
    """Those of this process to other ranks; the ones to the store are not counted."""
    store = int(os.environ["MASTER_PORT"])
    return sum(found.status == psutil.CONN_ESTABLISHED and store not in (found.laddr.port,
                                                                         found.raddr.port)
               for found in psutil.Process().net_connections("tcp"))


def main() -> None:
    torch.set_num_threads(1)
    launch = detect(os.environ)
    with connect(launch, True, 60.0) as control:
        counts = [connections()]
        control.gather("a report")
        control.share("a plan" * 1000)
        control.share_vector(None if control.rank else torch.ones(100_000), 100_000, torch.float32)
        if control.rank == launch.world_size - 1:
            control.copy_to_server(torch.ones(100_000))
            control.wait_for_copy()
        if control.rank == 0:
            control.receive_copy(100_000, torch.float32, launch.world_size - 1)
        counts.append(connections())
        found = control.gather(counts)
        control.share()  # nobody leaves before all have counted
    if launch.rank == 0:
        sys.stdout.write(f"results {json.dumps(found)}\n")


if __name__ == "__main__":
    main()
