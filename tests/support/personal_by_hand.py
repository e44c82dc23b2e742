"""Rounds of FedAvg whose clients keep some parameters, in dictionaries and float64, as a reference.

It shares nothing with the protocol but the model's forward pass and the tokens, and has an AdamW of
its own, since averaged moments count the run's steps and those that stay at home the client's.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

LOCAL_UPDATES, BATCH, LENGTH, LR, DECAY = 2, 2, 32, 2e-3, 0.01
BETAS = 0.9, 0.999
Values = dict[str, Tensor]


class HandClient:
    """What a client has from round to round, by the names of the parameters."""

    def __init__(self, shard: np.ndarray, index: int, start: Values) -> None:
        seed = np.random.SeedSequence([0, index, 0])
        self.shard = shard
        self.order = np.random.Generator(np.random.PCG64(seed)).permutation(len(shard))
        self.values = {name: value.clone() for name, value in start.items()}
        self.moments = [{name: torch.zeros_like(value) for name, value in start.items()}
                        for _ in BETAS]
        self.steps = dict.fromkeys(start, 0)
        self.batches = 0

    def train(self, model: nn.Module) -> None:
        """The local updates of a round."""
        parameters = dict(model.named_parameters())
        for _ in range(LOCAL_UPDATES):
            rows = self.order[self.batches * BATCH:(self.batches + 1) * BATCH]
            self.batches += 1
            tokens = torch.from_numpy(self.shard[rows].astype(np.int64))
            with torch.no_grad():
                for name, parameter in parameters.items():
                    parameter.copy_(self.values[name])
            model.zero_grad()
            logits = model(tokens)[:, :-1].double()
            cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
            for name, parameter in parameters.items():
                assert parameter.grad is not None
                self._adamw(name, parameter.grad)

    def _adamw(self, name: str, grad: Tensor) -> None:
        self.steps[name] += 1
        for moments, beta, value in zip(self.moments, BETAS, (grad, grad**2), strict=True):
            moments[name] = beta * moments[name] + (1 - beta) * value
        m, v = self.corrected(name)
        self.values[name] = self.values[name] * (1 - LR * DECAY) - LR * m / (v.sqrt() + 1e-8)

    def corrected(self, name: str) -> list[Tensor]:
        return [moments[name] / (1 - beta**self.steps[name])
                for moments, beta in zip(self.moments, BETAS, strict=True)]


def _mean(weights: Sequence[float], values: Sequence[Tensor]) -> Tensor:
    return torch.stack([w * value for w, value in zip(weights, values, strict=True)]).sum(0)


def rounds_by_hand(model: nn.Module, sequences: np.ndarray, clients: int,
                   cohorts: Sequence[Sequence[int]], stays: Callable[[str], bool], average: bool
                   ) -> tuple[Values, list[Values]]:
    """The global model after rounds of these cohorts, and each client's parameters that stay.

    model: at its start, in float64. sequences: the training text (n, LENGTH), dealt to clients in
    order, with seed 0. stays: whether a parameter never leaves its client. average: whether moments
    of the others are averaged too.
    """
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    bounds = [k * len(sequences) // clients for k in range(clients + 1)]
    them = [HandClient(sequences[a:b], k, start)
            for k, (a, b) in enumerate(itertools.pairwise(bounds))]
    shared = [name for name in start if not stays(name)]
    world = {name: value.clone() for name, value in start.items()}
    averages: dict[str, list[Tensor]] = {}
    for number, cohort in enumerate(cohorts):
        total = sum(len(them[k].shard) for k in cohort)
        for k in cohort:
            for name in shared:
                them[k].values[name] = world[name].clone()
                if average:
                    them[k].steps[name] = number * LOCAL_UPDATES
                    for moments, beta, mean in zip(
                            them[k].moments, BETAS,
                            averages.get(name, [torch.zeros_like(start[name])] * 2), strict=True):
                        moments[name] = mean * (1 - beta**them[k].steps[name])
            them[k].train(model)
        weights = [len(them[k].shard) / total for k in cohort]
        taken = [them[k] for k in cohort]
        for name in shared:
            world[name] = _mean(weights, [client.values[name] for client in taken])
            averages[name] = [_mean(weights, [client.corrected(name)[i] for client in taken])
                              for i in range(2)]
    return world, [{name: value for name, value in client.values.items() if stays(name)}
                   for client in them]
