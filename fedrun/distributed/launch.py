"""How this process was started: by torchrun, by SLURM's srun, or alone.

Reads only the environment. Does not import torch, so that errors are reported before it is loaded.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass

from fedrun.common.errors import InputError

# Ports for SLURM steps, below those that Linux gives to outgoing connections (32768 and up).
FIRST_PORT, PORTS = 20000, 10000
# What torchrun and srun tell a rank of itself and of the others.
_OF_RANKS = re.compile(r"((GROUP|LOCAL|ROLE)_)?(RANK|WORLD_SIZE)|ROLE_NAME|MASTER_(ADDR|PORT)|"
                       r"TORCHELASTIC_\w+|SLURM_(STEP_\w+|PROCID|LOCALID|NODEID)")


@dataclass(frozen=True)
class Launch:
    """The rank of this process in the run and on its machine."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    on_first_node: bool = True
    """Whether rank 0 runs on this machine."""
    attempt: int = 0
    """How many times torchrun has restarted this job in place."""

    @property
    def alone(self) -> bool:
        """Whether this is the only process of the run."""
        return self.world_size == 1


def detect(env: Mapping[str, str]) -> Launch:
    """The launch that the environment describes: torchrun's if there is one, else srun's, else a
    single process.

    Batch scripts, shells in an allocation and `srun --pty` also have many of SLURM's variables,
    including SLURM_PROCID and SLURM_NTASKS. Plain Python there is a single process and must not
    wait for other ranks.
    """
    if "RANK" in env and "WORLD_SIZE" in env:
        rank, local_rank = int(env["RANK"]), int(env.get("LOCAL_RANK", env["RANK"]))
        world = int(env["WORLD_SIZE"])
        return Launch(rank, world, local_rank, int(env.get("LOCAL_WORLD_SIZE", world)),
                      on_first_node=rank == local_rank,  # ranks count node by node
                      attempt=int(env.get("TORCHELASTIC_RESTART_COUNT", "0")))
    if in_slurm_step(env):
        node = int(env["SLURM_NODEID"])
        return Launch(int(env["SLURM_PROCID"]), int(env["SLURM_STEP_NUM_TASKS"]),
                      int(env["SLURM_LOCALID"]),
                      tasks_per_node(env["SLURM_STEP_TASKS_PER_NODE"])[node],
                      on_first_node=node == 0)
    return Launch()


def in_slurm_step(env: Mapping[str, str]) -> bool:
    """Whether srun started this process together with others."""
    return "SLURM_STEP_ID" in env and int(env.get("SLURM_STEP_NUM_TASKS", "1")) > 1


def without_rank(env: Mapping[str, str]) -> dict[str, str]:
    """The environment without what makes this process a rank, for those that it starts by itself:
    there `detect` finds a single process. The SLURM job stays that of the run."""
    return {name: value for name, value in env.items() if not _OF_RANKS.fullmatch(name)}


def tasks_per_node(text: str) -> list[int]:
    """Expand SLURM's short form: "2(x3),1" is [2, 2, 2, 1]."""
    counts: list[int] = []
    for part in text.split(","):
        found = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        assert found, text
        counts += [int(found[1])] * int(found[2] or 1)
    return counts


def rendezvous(env: Mapping[str, str]) -> dict[str, str]:
    """Values for those of MASTER_ADDR and MASTER_PORT that neither launcher nor user has set.

    In a SLURM step: the step's first host, where rank 0 runs, and `step_port`. InputError, naming
    the variable, if they are unknown: with a guess such as localhost every machine would wait for
    itself.
    """
    names = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in env]
    if names and not in_slurm_step(env):
        raise InputError(f"{names[0]}: not set, though {env.get('WORLD_SIZE')} processes were "
                         "started. torchrun sets it; otherwise set MASTER_ADDR to the host name of "
                         "rank 0 and MASTER_PORT to a free port there")
    found = {}
    if "MASTER_ADDR" in names:
        found["MASTER_ADDR"] = first_host(env["SLURM_STEP_NODELIST"])
    if "MASTER_PORT" in names:
        found["MASTER_PORT"] = str(step_port(env))
    return found


def step_port(env: Mapping[str, str]) -> int:
    """The port of a SLURM step's store. Job and step number determine it, so that steps that run
    side by side, or one started after another was killed, use different ports."""
    number = int(env["SLURM_JOB_ID"]) * 16 + int(env["SLURM_STEP_ID"])
    return FIRST_PORT + number % PORTS


def first_host(nodelist: str) -> str:
    """The first host of a list in SLURM's short form, such as "gpu[07-09],login1"."""
    try:
        hosts = subprocess.run(["scontrol", "show", "hostnames", nodelist], check=True, text=True,
                               capture_output=True, timeout=60)
        return hosts.stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError) as error:
        raise InputError(f"MASTER_ADDR: not set, and `scontrol show hostnames {nodelist}` failed "
                         f"({error}); set it to the name of this step's first host") from None
