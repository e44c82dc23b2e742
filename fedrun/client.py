"""A client: a shard of the data, and the local training on it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedrun.config import FederatedConfig, RunConfig
from fedrun.data.shards import Batches
from fedrun.model.mamba2 import Mamba2LM
from fedrun.params import FlatParams
from fedrun.sums import adamw_step_bound

BETAS = (0.9, 0.999)
WEIGHT_DECAY = 0.01


@dataclass
class LocalLosses:
    """What local training reports: summed losses in nats, and over how many tokens."""

    loss_sum: float
    tokens: int


class Client:
    """One owner of data. Its batches depend on (seed, client) alone, never on where it is hosted.

    Several clients share a worker's model: between a client's turns only its AdamW moments (and,
    under --sync epoch, its parameters) are kept.
    """

    def __init__(self, index: int, shard: range, sequences: np.ndarray, flat: FlatParams,
                 config: RunConfig) -> None:
        self.index = index
        self.shard = shard
        self.sequences = sequences
        self.flat = flat
        self.config = config
        self.batches = Batches(len(shard), config.batch_size, config.seed, index)
        self.steps_done = 0
        self.parameters: Tensor | None = None
        """The client's own model between rounds that do not begin with the global one."""
        self.optimizer = self.new_optimizer()

    def new_optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([self.flat.parameter()], lr=self.config.lr, betas=BETAS,
                                 weight_decay=WEIGHT_DECAY, fused=True)

    def reset_moments(self) -> None:
        """Start AdamW anew."""
        self.optimizer = self.new_optimizer()

    def keep_parameters(self) -> None:
        """Keep the worker's parameters as this client's own, for a round that goes on from them."""
        if self.parameters is None:
            self.parameters = torch.empty_like(self.flat.vector)
        self.parameters.copy_(self.flat.vector)

    def forget(self) -> None:
        """Drop all that local training has left behind, after an update that was not finite."""
        self.parameters = None
        self.reset_moments()

    def train(self, model: Mamba2LM, steps: int, between_steps: Callable[[], None] = lambda: None
              ) -> LocalLosses:
        """`steps` optimizer steps from where the worker's parameters are, on the next batches."""
        device = self.flat.vector.device
        loss_sum = torch.zeros((), dtype=torch.float64, device=device)
        tokens = 0
        for _ in range(steps):
            between_steps()
            batch = self.next_batch().to(device, non_blocking=True)
            self.flat.grad.zero_()
            loss, count = model.loss(batch)
            (loss / count).backward()
            self.optimizer.step()
            loss_sum += loss.detach()
            tokens += count
        return LocalLosses(loss_sum.item(), tokens)

    def next_batch(self) -> Tensor:
        """(batch_size, sequence_length) token ids; the client's position moves on."""
        batch = self.batches.read(self.steps_done, self.sequences, self.shard)
        self.steps_done += 1
        return torch.from_numpy(batch)


def update_bound(config: FederatedConfig, local_steps: int) -> float:
    """The largest element of an update after so many local steps (fixes the grid of the sums)."""
    return local_steps * adamw_step_bound(config.lr, WEIGHT_DECAY, *BETAS)
