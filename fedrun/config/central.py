"""The settings of centralised runs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from fedrun.common.errors import require
from fedrun.config.shared import RunConfig


@dataclass(frozen=True)
class CentralConfig(RunConfig):
    """Centralised training, the baseline: one model, one optimizer, one process."""

    batches: Literal["all", "clients", "one_client"] = "all"
    """What a step trains on: a batch of all the data (all); the batches that the clients of a
    federated run would use, joined into one of --batch_size (clients); or the first client's
    batches, from its shard only (one_client)."""
    num_clients: int = 4
    """Clients of that federated run, for --batches clients and one_client."""
    outer_every: int | None = None
    """After every N optimizer steps, take what they have moved the model by for one step of an
    outer Nesterov optimizer (SNOO; DiLoCo with one client). none: no outer optimizer."""
    server_lr: float = 0.7
    """Learning rate of the outer optimizer of --outer_every, as DiLoCo's on its server."""
    server_momentum: float = 0.9
    """Momentum b of the outer optimizer, in [0, 1)."""
    server_momentum_warmup: bool = False
    """Let it grow with the outer steps t = 1, 2, ...: min(b, 1 - 1/t)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.num_clients >= 1, "--num_clients", self.num_clients, "an integer >= 1")
        require(self.outer_every is None or self.outer_every >= 1, "--outer_every",
                self.outer_every, "an integer >= 1, or none")
        require(0 < self.server_lr < math.inf, "--server_lr", self.server_lr, "> 0")
        require(0 <= self.server_momentum < 1, "--server_momentum", self.server_momentum,
                "in [0, 1)")
        require(self.batches != "clients" or self.batch_size % self.num_clients == 0,
                "--batch_size", self.batch_size,
                f"a multiple of --num_clients {self.num_clients} with --batches clients")
