"""Which GPUs the runs of a study take. Does not import torch.

Every process of a study makes some runs at the same time (`jobs`), each on one GPU, or with
`--workers N` on N of them. The processes that torchrun or srun has started on a machine number
these places in the order of their local ranks, and give each the next GPUs.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Mapping, Sequence

from fedrun.common.errors import require
from fedrun.distributed.launch import Launch

VISIBLE = "CUDA_VISIBLE_DEVICES"
_DEVICE = re.compile(r"\d+|(GPU|MIG)-.+")


def visible_gpus(env: Mapping[str, str], count: Callable[[], int]) -> list[str]:
    """The GPUs that a process sees, by the names that CUDA_VISIBLE_DEVICES may hold: numbers or
    UUIDs.

    count: how many there are if that variable is not set. As in CUDA, a name that can be none, such
    as -1 or SLURM's NoDevFiles, ends the list.
    """
    if VISIBLE not in env:
        return [str(number) for number in range(count())]
    names = (name.strip() for name in env[VISIBLE].split(","))
    return list(itertools.takewhile(_DEVICE.fullmatch, names))


def places(launch: Launch, jobs: int, visible: Sequence[str], workers: int) -> list[str | None]:
    """CUDA_VISIBLE_DEVICES for each of the runs that this process makes at the same time; None
    where it sees no GPU.

    Where there are too few GPUs, places share them from the first on. So do the tasks of a
    scheduler that shows each task its own GPUs alone: every one finds all of its places there.
    InputError if there are too few GPUs for the workers of one run.
    """
    groups = len(visible) // workers
    if not visible:
        return [None] * jobs
    require(groups > 0, "--workers", workers,
            f"at most {len(visible)}, the number of GPUs that are visible here")
    first = [(launch.local_rank * jobs + job) % groups * workers for job in range(jobs)]
    return [",".join(visible[gpu:gpu + workers]) for gpu in first]


def remark(launch: Launch, jobs: int, visible: Sequence[str], workers: int) -> str:
    """A warning for GPUs that are idle, or that several runs share; empty if there is none."""
    runs, groups = launch.local_world_size * jobs, len(visible) // workers
    own = launch.local_world_size > 1 and groups <= jobs  # perhaps: each task sees others
    if runs < groups:
        return (f"{len(visible) - runs * workers} of {len(visible)} GPUs are idle: launch/run.sh "
                "study ... uses all of them")
    if visible and runs > groups and not own:
        return f"{runs} runs at a time share {groups * workers} GPUs"
    return ""
