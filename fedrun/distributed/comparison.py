"""Whether the ranks of a run match: the same settings, versions and text, and a GPU for each."""

from __future__ import annotations

import json
from collections.abc import Mapping

import torch

from fedrun.common.errors import FedrunError
from fedrun.common.log import WARNING, log
from fedrun.distributed.control_plane import ControlPlane


def compare(control: ControlPlane, workers: tuple[int, ...], device: torch.device,
            identity: Mapping[str, str], host: str, of_sites: bool = False) -> None:
    """All ranks: raise the same FedrunError if ranks do not match, or if two use the same GPU.

    host: what the others call this machine. of_sites: the ranks have several owners, who do not
    show each other their GPUs.
    """
    # Not on a machine whose GPUs are none of this run's business: asking for them opens them.
    seen = gpus_seen() if not of_sites and identity.get("--device") != json.dumps("cpu") else []
    gpu = {"gpu": seen[device.index], "gpus here": str(len(seen))} if (
        device.type == "cuda" and not of_sites) else {}
    mine = {**identity, "worker device": device.type, "host": host, **gpu,
            "gpus seen": " ".join(seen)}
    everyone = control.gather(mine)
    message = "" if everyone is None else difference(everyone, workers)
    if everyone is not None and of_sites and not message and (
            everyone[workers[0]]["worker device"] != "cpu"):
        message = "--device cuda: workers of sites sum on CPUs alone so far; must be cpu"
    message = control.share(message)
    if message:
        raise FedrunError(message)
    if everyone is not None:
        for warning in idle_gpus(everyone):
            log(warning, WARNING)


def gpus_seen() -> list[str]:
    """The UUIDs of the GPUs that this process may use, by index. A dedicated server uses none, and
    sees those that its launcher has given to it."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    devices = (torch.device("cuda", index) for index in range(count))
    return [str(torch.cuda.get_device_properties(device).uuid) for device in devices]


def difference(everyone: list[dict[str, str]], workers: tuple[int, ...]) -> str:
    """Why these ranks cannot train together, in one line; empty if they can."""
    for name in everyone[workers[0]]:
        if name in ("host", "gpu", "gpus here", "gpus seen"):
            continue
        ranks = workers if name.startswith("worker") else range(len(everyone))
        values = {rank: everyone[rank].get(name) for rank in ranks}
        if len(set(values.values())) > 1:
            return (f"ranks differ in {name}: {values}; use the same command and the same "
                    "installation on all ranks")
    owner: dict[str, int] = {}
    for rank in workers:
        gpu = everyone[rank].get("gpu")
        if gpu is not None and owner.setdefault(gpu, rank) != rank:
            gpus = everyone[rank]["gpus here"]
            return (f"ranks {owner[gpu]} and {rank} use the same GPU {gpu} on "
                    f"{everyone[rank]['host']}, which has {gpus}: start one worker per GPU (and "
                    "the server); each worker then hosts more clients")
    return ""


def idle_gpus(everyone: list[dict[str, str]]) -> list[str]:
    """A warning for each machine with GPUs that no worker uses, if workers use GPUs at all."""
    used: dict[str, set[str]] = {}  # by host
    seen: dict[str, set[str]] = {}
    for rank in everyone:
        used.setdefault(rank["host"], set()).update({rank["gpu"]} if "gpu" in rank else ())
        seen.setdefault(rank["host"], set()).update(rank["gpus seen"].split())
    found = []
    for host in seen if any(used.values()) else ():
        idle, there = seen[host] - used[host], len(seen[host])
        if idle == {everyone[0]["gpus seen"]}:  # as srun --gpus-per-task 1 gives them out
            found.append(f"1 of {there} GPUs on {host} is idle, the only one that the server sees: "
                         "--server colocated uses it")
        elif idle:
            found.append(f"{len(idle)} of {there} GPUs on {host} are idle: raise --nproc-per-node "
                         f"by {len(idle)} to use them")
    return found
