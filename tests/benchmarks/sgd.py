"""Local training for all frameworks: plain SGD on our model with the same batches.

A batch depends only on (client, round, step). Needs nothing but torch and numpy.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedrun.model.config import ModelConfig
from fedrun.model.mamba2 import Mamba2LM
from fedrun.training.params import FlatParams


@dataclass(frozen=True)
class Task:
    """The model, its data and its training."""

    model: dict[str, Any] = field(default_factory=dict)
    """Settings of ModelConfig."""
    vocabulary: int = 4096
    steps: int = 2
    """Local updates in a round."""
    batch: int = 4
    length: int = 128
    lr: float = 0.5

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> Task:
        return Task(**json.loads(text))

    def build(self, dtype: torch.dtype = torch.float32) -> tuple[Mamba2LM, FlatParams]:
        """The initial model."""
        model = Mamba2LM(ModelConfig(**self.model), self.vocabulary, dtype)
        model.init_weights(0)
        model.to(dtype)
        return model, FlatParams(model)

    def train(self, model: Mamba2LM, flat: FlatParams, client: int, number: int) -> Tensor:
        """A client's local updates in round `number`, in place; returns the summed loss, 0-dim."""
        total = torch.zeros((), dtype=torch.float64)
        for step in range(self.steps):
            loss, _ = model.compute_grad(self._batch(client, number, step))
            flat.vector.add_(flat.grad, alpha=-self.lr)
            total += loss
        return total

    def _batch(self, client: int, number: int, step: int) -> Tensor:
        """(batch, length). Each client prefers some tokens, so that there is something to learn."""
        draws = np.random.default_rng((client, number, step))
        rare = draws.random((self.batch, self.length)) ** 3
        return torch.from_numpy((rare * self.vocabulary).astype(np.int64) + client
                                ).remainder(self.vocabulary)


def serial(task: Task, clients: int, rounds: int, dtype: torch.dtype) -> np.ndarray:
    """Federated averaging in one loop: the global model (size,) after `rounds` rounds."""
    model, flat = task.build(dtype)
    now = flat.vector.clone()
    for number in range(1, rounds + 1):
        total = torch.zeros_like(now)
        for client in range(clients):
            flat.vector.copy_(now)
            task.train(model, flat, client, number)
            total += flat.vector - now
        now += total / clients
    return now.numpy()
