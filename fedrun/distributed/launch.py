"""How this process was started: by torchrun, by SLURM's srun, or alone. Reads the environment only,
and needs no torch, so that an error can be told before it is loaded."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass

from fedrun.common.errors import InputError

# Below the ports that Linux hands out to outgoing connections (32768 and up).
FIRST_PORT, PORTS = 20000, 10000


@dataclass(frozen=True)
class Launch:
    """Which process of how many this is, and which on its machine."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    on_first_node: bool = True
    """Whether rank 0 runs on this machine."""
    attempt: int = 0
    """How often torchrun has restarted this job in place."""

    @property
    def alone(self) -> bool:
        return self.world_size == 1


def detect(env: Mapping[str, str]) -> Launch:
    """The launch that the environment describes: torchrun's, before a step of srun, before alone.

    A batch script, a shell in an allocation and `srun --pty` have many of SLURM's variables too,
    SLURM_PROCID and SLURM_NTASKS among them: plain Python there is alone and waits for no peers.
    """
    if "RANK" in env and "WORLD_SIZE" in env:
        rank, local_rank = int(env["RANK"]), int(env.get("LOCAL_RANK", env["RANK"]))
        world = int(env["WORLD_SIZE"])
        return Launch(rank, world, local_rank, int(env.get("LOCAL_WORLD_SIZE", world)),
                      on_first_node=rank == local_rank,  # ranks are numbered node by node
                      attempt=int(env.get("TORCHELASTIC_RESTART_COUNT", "0")))
    if in_slurm_step(env):
        node = int(env["SLURM_NODEID"])
        return Launch(int(env["SLURM_PROCID"]), int(env["SLURM_STEP_NUM_TASKS"]),
                      int(env["SLURM_LOCALID"]),
                      tasks_per_node(env["SLURM_STEP_TASKS_PER_NODE"])[node],
                      on_first_node=node == 0)
    return Launch()


def in_slurm_step(env: Mapping[str, str]) -> bool:
    """Whether srun started this process beside others."""
    return "SLURM_STEP_ID" in env and int(env.get("SLURM_STEP_NUM_TASKS", "1")) > 1


def tasks_per_node(text: str) -> list[int]:
    """SLURM's short form written out: "2(x3),1" is [2, 2, 2, 1]."""
    counts: list[int] = []
    for part in text.split(","):
        found = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        assert found, text
        counts += [int(found[1])] * int(found[2] or 1)
    return counts


def rendezvous(env: Mapping[str, str]) -> dict[str, str]:
    """Values for MASTER_ADDR and MASTER_PORT that neither launcher nor user has set.

    In a step of SLURM: its first host, where rank 0 runs, and a port that job and step number
    choose, so that steps side by side, or one started after a killed one, do not meet.
    ValueError, naming the variable, where they cannot be known: a guess such as localhost would
    let every machine wait for itself.
    """
    names = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in env]
    if names and not in_slurm_step(env):
        raise InputError(f"{names[0]}: not set, though {env.get('WORLD_SIZE')} processes were "
                         "started; torchrun sets it, or set it to rank 0's host name (MASTER_ADDR) "
                         "and a free port there (MASTER_PORT)")
    found = {}
    if "MASTER_ADDR" in names:
        found["MASTER_ADDR"] = first_host(env["SLURM_STEP_NODELIST"])
    if "MASTER_PORT" in names:
        number = int(env["SLURM_JOB_ID"]) * 16 + int(env["SLURM_STEP_ID"])
        found["MASTER_PORT"] = str(FIRST_PORT + number % PORTS)
    return found


def first_host(nodelist: str) -> str:
    """The first host of SLURM's short form of a list, such as "gpu[07-09],login1"."""
    try:
        told = subprocess.run(["scontrol", "show", "hostnames", nodelist], check=True, text=True,
                              capture_output=True, timeout=60)
        return told.stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError) as error:
        raise InputError(f"MASTER_ADDR: not set, and `scontrol show hostnames {nodelist}` does not "
                         f"tell the first host of this step ({error}); set it to that host's name"
                         ) from None
