"""A rank of the runs and sums of overlap.py, each as if on a machine of its own.

    python -m tests.benchmarks.overlap_ranks run LATE fed_avg FLAG ...     # fedrun
    python -m tests.benchmarks.overlap_ranks sum LATE ELEMENTS             # a bare all-reduce

LATE: seconds that every sum of more than a megabyte takes longer, as by a network's delay, where
the kernel has no netem to make one.
"""

from __future__ import annotations

import os
import statistics
import sys
import threading
import time
from typing import Any

import torch
import torch.distributed as dist

from fedrun import cli
from fedrun.distributed import data_plane, runtime
from tests.benchmarks.common import seconds
from tests.benchmarks.ranks import end_with_parent

LARGE = 1 << 20  # bytes
SUMS = 4  # the first is not counted


class Late:
    """A collective that is done some time after the last byte has come, which a thread waits for.
    """

    def __init__(self, work: dist.Work, late: float) -> None:
        self._thread = threading.Thread(target=self._finish, args=(work, late), daemon=True)
        self._thread.start()

    def _finish(self, work: dist.Work, late: float) -> None:
        work.wait()
        time.sleep(late)

    def wait(self) -> None:
        self._thread.join()


def hold_back(late: float) -> None:
    """From now on large sums of the data plane take this much longer, waited for or not."""
    healthy = dist.all_reduce

    def all_reduce(vector: torch.Tensor, **options: Any) -> Any:
        work = healthy(vector, **options)
        return Late(work, late) if vector.nbytes > LARGE else work

    patched: Any = data_plane.dist
    patched.all_reduce = all_reduce


def bare(elements: int) -> float:
    """Median seconds of an all-reduce of as many int32."""
    dist.init_process_group("gloo")
    vector = torch.ones(elements, dtype=torch.int32)
    taken = []
    for _ in range(SUMS):
        dist.barrier()
        taken.append(seconds(lambda: dist.all_reduce(vector, async_op=True).wait()))
    return statistics.median(taken[1:])


def main() -> int:
    end_with_parent()
    what, late, *rest = sys.argv[1:]
    if float(late):
        hold_back(float(late))
    if what == "sum":
        print(bare(int(rest[0])))
        return 0
    patched: Any = runtime
    patched.machine_id = lambda: 1 + int(os.environ["RANK"])
    return cli.main(rest)


if __name__ == "__main__":
    sys.exit(main())
