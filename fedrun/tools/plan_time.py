"""How long a run takes: from a short step that is measured here, or from published rates."""

from __future__ import annotations

import dataclasses
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
from fedrun.data.sites import read_sites
from fedrun.data.tokens import TokenData
from fedrun.distributed.data_plane import DataPlane
from fedrun.experiment import Experiment
from fedrun.federation.client import Client
from fedrun.federation.global_state import GlobalState
from fedrun.federation.messages import RoundPlan
from fedrun.federation.noise import Noise
from fedrun.federation.private_gradient import PrivateGradient
from fedrun.federation.reported import reported_vectors
from fedrun.model import transformers_lm
from fedrun.model.config import ModelConfig, ModelShape, TransformersShape
from fedrun.privacy.client_level import ClientLevel, update_bound
from fedrun.privacy.example_level import ExampleLevel
from fedrun.strategies.base import ServerRound
from fedrun.tools.plan_machine import LINK, UTILISATION, Rates
from fedrun.tools.plan_memory import Trains, Worker, gradient
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
    noise: float = 0.0
    """With --dp client: drawing the noise of a round, by all workers together."""
    masks: float = 0.0
    """With --secure_sum: making a site's masks of a round, beside the training where a core is
    free."""

    def of_round(self, config: RunConfig, layout: Layout) -> float:
        """Of a round, or of a central run's step; without an evaluation. With --overlap of one
        beside which the sum of the round before travels."""
        if not isinstance(config, FederatedConfig):
            return self.step
        training, wire = self._training(config, layout), self.wire or 0.0
        return ((max(training, wire) if config.overlap else training + wire)
                + layout.turns(config) * self.term + self.noise)

    def waited_for(self, config: FederatedConfig, layout: Layout) -> tuple[float, float]:
        """What workers wait for a sum with --overlap: in a round, for that of the round before it;
        and after the last round, for its own, besides what `of_round` counts: no sum travels beside
        the first round, and no training beside the last sum."""
        training, wire = self._training(config, layout), self.wire or 0.0
        return max(0.0, wire - training), min(training, wire)

    def _training(self, config: FederatedConfig, layout: Layout) -> float:
        return layout.turns(config) * config.local_updates * self.step


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


def protected(config: RunConfig, found: Trains, layout: Layout, device: torch.device,
              seconds: Seconds) -> Seconds:
    """The same with what --dp and --secure_sum take besides, measured here on short vectors; noise
    and masks are a processor's work wherever workers compute."""
    if not isinstance(config, FederatedConfig) or not isinstance(found, Worker):
        return seconds
    times = found.flat.size / ELEMENTS
    if isinstance(found.level, ExampleLevel):
        step = seconds.step + times * _private_gradient(config, found.level, device)
        seconds = dataclasses.replace(seconds, step=step)
    elif found.level is not None:
        clip, noise = _clip_and_noise(config, found.level, device)
        if config.sites is not None and layout.sites is None:  # a simulation draws all shares
            noise *= len(read_sites(config.sites).sites)
        seconds = dataclasses.replace(seconds, term=seconds.term + times * clip,
                                      noise=times * noise / layout.team)
    if layout.sites and config.secure_sum:
        integers, bits = found.aggregator.layout
        masks = _masks(len(layout.sites.sites) - 1, bits) * integers / ELEMENTS
        seconds = dataclasses.replace(seconds, masks=masks)
    return seconds


def measured(config: RunConfig, vocab_size: int, found: Trains, device: torch.device) -> Seconds:
    """From a step of the run's model on this device, or of one layer of it and one sequence where
    the step would take long; and from a sum of short vectors. Without noise and masks."""
    tried, scale, how = _open(config), 1.0, "measured here"
    if found.flop > LONGEST:
        model, layers = one_layer(config.model)
        tried = dataclasses.replace(tried, model=model, batch_size=1, micro_batch=None)
        one = gradient(tried, vocab_size, 1, device.type == "cuda").flop
        scale = (found.flop + found.muon_flop) / (one + found.muon_flop / layers)
        how += f" on 1 of {layers} layers and 1 sequence, and scaled by FLOP"
    elif isinstance(config, FederatedConfig) and config.dp == "example":
        tried, scale = dataclasses.replace(tried, batch_size=1), float(config.batch_size)
        how += " on 1 sequence after the other"
    shape = measure(_experiment(tried, vocab_size), device)
    # Fisher information of single sequences and parts computes as many gradients.
    whole = _open(config)
    term = _term(whole, device) * found.flat.shared_size / ELEMENTS if isinstance(
        whole, FederatedConfig) else 0.0
    return Seconds(shape.step * scale, term, None,
                   shape.evaluation if tried.model is config.model else None, how)


def _open(config: RunConfig) -> RunConfig:
    """The same run without noise, masks and sites."""
    if not isinstance(config, FederatedConfig):
        return config
    return dataclasses.replace(
        config, sites=None, secure_sum=False, site_holdout=None, dp="none", dp_clip=None,
        dp_noise=None, dp_epsilon=None, dp_delta=None, dp_colluding=1, max_epsilon=None)


def _experiment(config: RunConfig, vocab_size: int) -> Experiment:
    """With random tokens for a text."""
    random, length = np.random.default_rng(0), config.sequence_length
    train, validation = (random.integers(vocab_size, size=(count, length), dtype=np.int32)
                         for count in (2 * config.batch_size, BATCH_SEQUENCES))
    data = TokenData(train, validation, vocab_size, {}, Path())
    return Experiment(config, data, Shards([np.arange(len(train))]), None, {})


def one_layer(shape: ModelShape) -> tuple[ModelShape, int]:
    """The same shape with one layer, and how many it has."""
    if isinstance(shape, TransformersShape):
        return transformers_lm.one_layer(shape)
    assert isinstance(shape, ModelConfig)
    return dataclasses.replace(shape, n_layer=1), shape.n_layer


class _Vector(nn.Module):
    """A model of one parameter, whose gradient is 0."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(ELEMENTS, device=device))

    def compute_grad(self, batch: Tensor) -> tuple[Tensor, int]:
        return torch.zeros((), device=self.weight.device), batch[:, 1:].numel()


def _private_gradient(config: FederatedConfig, level: ExampleLevel, device: torch.device) -> float:
    """Seconds that a step of ELEMENTS spends on clipping, integers and noise: as many sequences as
    are in it on average."""
    model: Any = _Vector(device)
    flat = FlatParams(model)
    gradients = PrivateGradient(dataclasses.replace(level, size=flat.size), flat)
    gradients.begin(bytes(32))
    tokens = np.zeros((config.batch_size, 2), np.uint16)
    client = Client(0, np.arange(len(tokens)), tokens, flat, config,
                    LocalOptimizer(flat, config, 2))
    gradients.write(model, client)
    began = time.monotonic()
    gradients.write(model, client)
    return time.monotonic() - began


def _clip_and_noise(config: FederatedConfig, level: ClientLevel, device: torch.device
                    ) -> tuple[float, float]:
    """Seconds of clipping the update of a client, of ELEMENTS, and of a round's noise of one share.
    """
    level = dataclasses.replace(level, size=ELEMENTS)
    update, plane = torch.ones(ELEMENTS, device=device), DataPlane()
    aggregator = make_aggregator(config, update, plane, config.cohort_size)
    bound = update_bound(level.clip, level.spread, level.cohort)
    aggregator.begin(Bounds(bound))
    noise = Noise(level, plane, None)
    plan = RoundPlan(1, 1, 0, [0], [1.0], bound, 1.0, 0.0, True, evaluate=False, save=False,
                     last=True)
    seconds = []
    for work in (lambda: noise.clip(0, update),
                 lambda: noise.add_to(aggregator, plan, update)):
        work()
        began = time.monotonic()
        work()
        seconds.append(time.monotonic() - began)
    return seconds[0], seconds[1]


def _masks(others: int, bits: int) -> float:
    """Seconds of a site's mask of ELEMENTS integers, with this many other sites."""
    from fedrun.secure.masks import Mask

    vector, mask = np.zeros(ELEMENTS, f"i{bits // 8}"), Mask([(True, bytes(32))] * others, bits)
    began = time.monotonic()
    mask.add_to(vector)
    return time.monotonic() - began


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
        vectors = reported_vectors(client, strategy, aggregator, fisher)
        aggregator.add(vectors, 1 / config.cohort_size, start=state.model)
        aggregator.reduce()
        update.apply(state.model, state.server, ServerRound(number), state.moments)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = time.monotonic() - began
    return seconds
