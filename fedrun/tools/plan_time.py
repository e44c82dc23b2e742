"""How long a run takes: from a short step that is measured here, or from published rates."""

from __future__ import annotations

import dataclasses
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedrun.aggregation.bounds import Bounds
from fedrun.aggregation.keeping import KeepingAggregator
from fedrun.aggregation.making import make_aggregator
from fedrun.aggregation.update import ServerUpdate
from fedrun.config import FederatedConfig, RunConfig
from fedrun.data.partition import Shards
from fedrun.data.tokens import TokenData
from fedrun.distributed.data_plane import DataPlane
from fedrun.experiment import Experiment
from fedrun.federation.client import Client
from fedrun.federation.global_state import GlobalState
from fedrun.federation.reported import reported_vectors
from fedrun.model.config import ModelConfig
from fedrun.strategies.base import ServerRound
from fedrun.tools.plan_machine import LINK, UTILISATION, Rates
from fedrun.tools.plan_memory import Trains, gradient
from fedrun.tools.plan_ranks import Layout
from fedrun.tools.study_cost import measure
from fedrun.training.evaluate import BATCH_SEQUENCES
from fedrun.training.fisher import FisherEstimate
from fedrun.training.optimizer import LocalOptimizer
from fedrun.training.params import FlatParams

LONGEST = 3e11  # FLOP of a step that is measured as it is
ELEMENTS = 2**21  # of the vectors whose sum is measured
ADAMW_BYTES, TERM_BYTES = 28, 40  # that a step and a client's term move through memory, a parameter


@dataclass(frozen=True)
class Seconds:
    """Of the parts of a round."""

    step: float
    """A local step of one client."""
    term: float
    """Adding a client's term to the sum, and the update, once a client."""
    wire: float | None
    """The sum between workers; None if it is not known."""
    evaluation: float | None
    """The loss of a batch of 16 sequences; None if it is not known."""
    how: str
    """Where they come from."""

    def of_round(self, config: RunConfig, layout: Layout) -> float:
        """Of a round, or of a central run's step; without an evaluation."""
        if not isinstance(config, FederatedConfig):
            return self.step
        turns = math.ceil(config.cohort_size / layout.workers)
        return turns * (config.local_updates * self.step + self.term) + (self.wire or 0.0)


def published(config: RunConfig, found: Trains, layout: Layout, sent: float, name: str,
              rates: Rates) -> Seconds:
    """From a device's published rates. sent: bytes of a term."""
    size, shared = found.flat.size, found.flat.shared_size
    products = rates.bf16 if config.dtype == "bf16" else rates.fp32
    wire = 2 * (layout.workers - 1) / layout.workers * sent / LINK
    return Seconds(
        found.flop / (products * UTILISATION) + found.muon_flop / (rates.fp32 * UTILISATION)
        + ADAMW_BYTES * size / rates.memory,
        TERM_BYTES * shared / rates.memory, wire, None,
        f"NOT MEASURED: from {name}'s published {products / 1e12:g} TFLOP/s in {config.dtype}, of "
        f"which {UTILISATION:.0%} are assumed, its {rates.memory / 1e12:g} TB/s of memory, and "
        f"{LINK / 1e9:g} GB/s each way between workers, assumed")


def measured(config: RunConfig, vocab_size: int, found: Trains, device: torch.device) -> Seconds:
    """From a step of the run's model on this device, or of one layer of it and one sequence where
    the step would take long; and from a sum of short vectors."""
    tried, scale, how = config, 1.0, "measured here"
    if found.flop > LONGEST:
        assert isinstance(config.model, ModelConfig)
        tried = dataclasses.replace(config, model=dataclasses.replace(config.model, n_layer=1),
                                    batch_size=1, micro_batch=None)
        one = gradient(tried, vocab_size, 1, device.type == "cuda").flop
        scale = (found.flop + found.muon_flop) / (one + found.muon_flop / config.model.n_layer)
        how += f" on 1 of {config.model.n_layer} layers and 1 sequence, and scaled by FLOP"
    shape = measure(_experiment(tried, vocab_size), device)
    # Fisher information of single sequences and parts computes as many gradients.
    term = _term(config, device) * found.flat.shared_size / ELEMENTS if isinstance(
        config, FederatedConfig) else 0.0
    return Seconds(shape.step * scale, term, None,
                   shape.evaluation if tried is config else None, how)


def _experiment(config: RunConfig, vocab_size: int) -> Experiment:
    """With random tokens for a text."""
    random, length = np.random.default_rng(0), config.sequence_length
    train, validation = (random.integers(vocab_size, size=(count, length), dtype=np.int32)
                         for count in (2 * config.batch_size, BATCH_SEQUENCES))
    data = TokenData(train, validation, vocab_size, {}, Path())
    return Experiment(config, data, Shards([np.arange(len(train))]), None, {})


class _Vector(nn.Module):
    """A model of one parameter, whose gradient is 0."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(ELEMENTS, device=device))

    def compute_grad(self, batch: Tensor) -> tuple[Tensor, int]:
        return torch.zeros((), device=self.weight.device), batch[:, 1:].numel()


def _term(config: FederatedConfig, device: torch.device) -> float:
    """Seconds of a client's term and a server update for vectors of ELEMENTS, the second time."""
    model: Any = _Vector(device)
    flat, strategy, plane = FlatParams(model), config.strategy, DataPlane()
    aggregator = make_aggregator(config, flat.vector, plane, config.cohort_size)
    state, update = GlobalState(config, flat.vector, plane, aggregator), ServerUpdate(strategy,
                                                                                     aggregator)
    fisher = FisherEstimate(flat, strategy.fisher_settings) if "fisher" in strategy.inputs else None
    tokens = np.zeros((config.batch_size, 2), np.uint16)
    client = Client(0, np.arange(len(tokens)), tokens, flat, config,
                    LocalOptimizer(flat, config, 2))
    seconds = 0.0
    for number in (1, 2):
        client.optimizer.begin_at(number)
        if fisher is not None:
            fisher.begin()
            fisher.gradient(model, client.next_batch())
        aggregator.begin(Bounds(1.0, 1.0, config.grad_clip or 1.0))
        began = time.monotonic()
        flat.vector.copy_(state.model)
        if isinstance(aggregator, KeepingAggregator):  # a rule takes all clients together
            aggregator.expect([range(config.cohort_size)])
            for index in range(config.cohort_size):
                aggregator.keep(index, flat.vector, 1 / config.cohort_size)
            aggregator.reduce()
            update.apply(state.model, state.server, ServerRound(number))
            seconds = (time.monotonic() - began) / config.cohort_size
            continue
        vectors = reported_vectors(client, strategy, aggregator, state.moments is not None, fisher)
        aggregator.add(vectors, 1 / config.cohort_size, start=state.model)
        aggregator.reduce()
        update.apply(state.model, state.server, ServerRound(number), state.moments)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = time.monotonic() - began
    return seconds
