"""A site of secure_sum.py: one worker, which sums with the other sites on command (see ranks.py).

    RANK=... python -m tests.benchmarks.secure_sum_ranks --elements 27000000

A sum is what a run does with its terms: `Session.mask` and `DataPlane.reduce`, which adds the mask
in this process and then sends to the other sites. Every result is compared with the true one.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fedrun.distributed.control_plane import ControlPlane
from fedrun.distributed.data_plane import DataPlane
from fedrun.secure.identity import Identity
from fedrun.secure.masks import Session
from tests.benchmarks.ranks import Commands, end_with_parent

TIMEOUT = timedelta(minutes=5)


def exchange(control: ControlPlane, value: str) -> dict[str, bytes]:
    """What each site says, in hexadecimal, by the site's name."""
    said = control.share(control.gather(value))
    return {f"site {rank}": bytes.fromhex(one) for rank, one in enumerate(said)}


def session_of(control: ControlPlane) -> Session:
    """This site's part, with keys that it shares with the others."""
    name = f"site {control.rank}"
    with tempfile.TemporaryDirectory(prefix="fedrun-benchmark-") as folder:
        identity = Identity.create(Path(folder) / "key")
    session = Session(name, identity, exchange(control, identity.public.hex()))
    public, signature = session.offer("benchmark", exchange(control, session.nonce.hex()), b"")
    publics, signatures = (exchange(control, one.hex()) for one in (public, signature))
    session.agree({site: (publics[site], signatures[site]) for site in publics})
    return session


def term(elements: int, rank: int) -> Tensor:
    """(elements,) int32: terms whose sum over all sites fits."""
    return (torch.arange(elements, dtype=torch.int32) * (2 * rank + 1)) % 2**28 - 2**27


class Site:
    """This process's vector, and the sum of all."""

    def __init__(self, elements: int, control: ControlPlane) -> None:
        self.plane = DataPlane(of_site=True)
        self.plane.leaders_group = dist.group.WORLD
        self.session, self.number = session_of(control), 0
        self.term = term(elements, control.rank)
        self.expected = torch.zeros_like(self.term)
        for rank in range(control.world_size):
            self.expected += term(elements, rank)
        self.parts = self.plane.allocate(elements, torch.int32, torch.device("cpu"))

    def sum(self, masked: bool) -> dict[str, float]:
        """One sum: when it began and ended here, and seconds of all this process's threads."""
        self.parts[0].copy_(self.term)
        self.number += 1
        dist.barrier()
        began, used = time.monotonic(), time.process_time()
        mask = self.session.mask(self.number, "vector", 32) if masked else None
        total, = self.plane.reduce(self.parts, mask)
        found = {"began": began, "ended": time.monotonic(), "cpu": time.process_time() - used}
        if not torch.equal(total, self.expected):
            raise AssertionError("the sum is wrong")
        return found


def main() -> None:
    commands = Commands()
    end_with_parent()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--elements", type=int, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=TIMEOUT)
    control = ControlPlane(dist.group.WORLD, timeout=TIMEOUT)
    site = Site(arguments.elements, control)
    while True:
        command: Any = control.share(commands.next() if control.rank == 0 else None)
        if command is None:
            break
        everybody = control.gather(site.sum(command["masked"]))
        if everybody is not None:
            commands.answer({
                "seconds": max(one["ended"] for one in everybody)
                - min(one["began"] for one in everybody),
                "cpu": sum(one["cpu"] for one in everybody) / len(everybody)})
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
