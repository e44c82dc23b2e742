"""`fedrun` with all its workers on one GPU: python -m tests.gpu.one_gpu METHOD FLAG ...

NCCL refuses two ranks on a GPU only if they are on one host too, and NCCL_HOSTID says on which host
a rank is. So several processes can go the way that they take on a machine with several GPUs; they
take turns on the GPU, and NCCL speaks through sockets, so that times mean nothing. NVIDIA calls
several ranks on one GPU unsupported.

FAULT=...: as in tests/support/faulty_fedrun.py. BAD_INDEX=RANK:STEP: in that step of its first
client, a token that is not in the vocabulary: an assertion in a kernel.
"""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Any

import torch

RANK = os.environ.get("RANK", "0")


class Properties:
    """A GPU's properties, with a UUID for each rank."""

    def __init__(self, given: Any) -> None:
        self._given = given
        self.uuid = f"{given.uuid}-rank{RANK}"

    def __getattr__(self, name: str) -> Any:
        return getattr(self._given, name)


def share_the_gpu() -> None:
    """Before anything asks for the GPU: let NCCL and fedrun take it for another one in each
    rank. The hosts that NCCL then sees are joined by the loopback interface."""
    os.environ["NCCL_HOSTID"] = f"rank{RANK}"
    for name, value in (("NCCL_NET", "Socket"), ("NCCL_SOCKET_IFNAME", "=lo"),
                        ("GLOO_SOCKET_IFNAME", "lo")):
        os.environ.setdefault(name, value)
    cuda: Any = torch.cuda
    properties = cuda.get_device_properties
    cuda.get_device_properties = lambda device=None: Properties(
        properties(torch.cuda.current_device() if device is None else device))


def spoil_a_token(step: int) -> None:
    from fedrun.federation.client import Client
    patched: Any = Client
    healthy = patched.next_batch

    def next_batch(client: Client) -> torch.Tensor:
        batch: torch.Tensor = healthy(client)
        if client.steps_done == step:
            Path(os.environ["FAULT_ONCE"]).touch()
            batch[0, 0] = 2**30
        return batch

    patched.next_batch = next_batch


def main() -> None:
    share_the_gpu()
    rank, _, step = os.environ.get("BAD_INDEX", "").partition(":")
    if rank == RANK:
        spoil_a_token(int(step))
    if "FAULT" in os.environ:
        importlib.import_module("tests.support.faulty_fedrun")  # which patches fedrun
    from fedrun.__main__ import main
    main()


if __name__ == "__main__":
    main()
