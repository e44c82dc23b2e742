"""What a worker of a run holds in memory, by item.

Its objects are built by their own classes on the meta device, where tensors have shapes and no
memory, and make a round there; what they allocate is counted (plan_counting.py). What does not show
there is added in plan_ranks.py.
"""

from __future__ import annotations

from collections import Counter
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedrun.aggregation.base import Aggregator
from fedrun.aggregation.blocks import residual_of
from fedrun.aggregation.keeping import KeepingAggregator
from fedrun.aggregation.making import make_aggregator
from fedrun.aggregation.update import ServerUpdate
from fedrun.aggregation.weiszfeld import WeiszfeldAggregator
from fedrun.common.errors import InputError, one_line
from fedrun.config import FederatedConfig, RunConfig
from fedrun.distributed.data_plane import DataPlane
from fedrun.federation.client import OWN_PART, Client
from fedrun.federation.global_state import GlobalState
from fedrun.federation.noise_keeper import Level, level_of
from fedrun.federation.overlap import SUM
from fedrun.federation.private_gradient import PrivateGradient
from fedrun.federation.reported import reported_vectors
from fedrun.federation.row_averages import RowAverages
from fedrun.federation.schedule import Schedule
from fedrun.model.build import outlined_model
from fedrun.model.mamba2 import Mamba2LM
from fedrun.model.transformers_lm import TransformersLM
from fedrun.privacy.example_level import ExampleLevel
from fedrun.tools.plan_counting import LOSS_HEAD, AsOnGpu, Counting
from fedrun.training.evaluate import BATCH_SEQUENCES
from fedrun.training.fisher import FisherEstimate
from fedrun.training.optimizer import LocalOptimizer
from fedrun.training.params import FlatParams

PARAMETERS, GRADIENTS, MOMENTS = "parameters", "gradients", "optimizer's moments"
GLOBAL_MODEL, SERVERS, AVERAGED = "global model", "the server's own vectors", "averaged moments"
SERVER_RESIDUAL, EXCHANGED = "the server's residual", "sections that are exchanged"
COMPARED, OUTER = "gradients of earlier steps", "the outer optimizer's vectors"
CLIPPED, DIGESTED = "sum of clipped gradients", "a copy whose digest is made"
MASK, MASKED = "a mask, made ahead", "what is sent, while it is masked"
OF_SITES = "the global state, of a checkpoint"
BUFFER, SCRATCH, FISHER = "sum buffer", "scratch slices", "Fisher information"
UPDATES, CENTRE = "updates of single clients", "the mean they are weighed by"
OWN, TEMPORARY, ACTIVATIONS = "the client's own vectors", "temporary vectors", "activations"
EVALUATION = "activations of an evaluation"
STATES, CHECKPOINT = "states of other clients", "copies for a checkpoint"
LIBRARIES = "Python and its libraries"
SERVER_MODEL, TRACKED = "the server's model", "tracked parameters"
WRITTEN, RECEIVED = "a model that is written", "the next model, received meanwhile"
OF_A_MACHINE = {GLOBAL_MODEL, SERVERS, AVERAGED, SERVER_RESIDUAL, EXCHANGED, CENTRE}
"""Items of which workers on the CPUs of a machine have one together."""
ITEMS = (PARAMETERS, GRADIENTS, MOMENTS, OWN, COMPARED, OUTER, GLOBAL_MODEL, SERVERS, AVERAGED,
         SERVER_RESIDUAL, BUFFER, EXCHANGED, SCRATCH, CLIPPED, UPDATES, CENTRE, FISHER, ACTIVATIONS,
         EVALUATION, LOSS_HEAD, TEMPORARY, STATES, CHECKPOINT, DIGESTED, MASK, MASKED, SERVER_MODEL,
         TRACKED, WRITTEN, RECEIVED, OF_SITES, LIBRARIES)
"""All of them, in the order in which they are shown."""


@dataclass(frozen=True)
class Gradient:
    """What the gradient of some sequences takes above parameters and gradients."""

    items: Counter[str]
    """Bytes when all of them together are the most."""
    flop: int


@dataclass(frozen=True)
class Trains:
    """A process that trains, when it takes the most."""

    flat: FlatParams
    items: Counter[str]
    """Bytes on its device, but for states of other clients."""
    state: dict[str, Tensor]
    """Of a client between its turns: on the meta device, as all tensors here."""
    kept: dict[str, Tensor]
    """The global state, as a checkpoint holds it."""
    flop: int
    """Of the gradients of a local step of one client."""
    muon_flop: int
    """Of the step's other products: Muon's of all matrices."""

    @property
    def parameter_bytes(self) -> int:
        return self.flat.vector.nbytes

    @property
    def tracked_bytes(self) -> int:
        """Of the parameters whose snapshots a run saves, as float32."""
        tracked = self.flat.names.tracked
        return 4 * sum(p.stop - p.start for p in self.flat.slices if p.name in tracked)

    @property
    def state_bytes(self) -> int:
        return bytes_of(self.state)


@dataclass(frozen=True)
class Worker(Trains):
    """A worker, in the round in which it takes the most."""

    aggregator: Aggregator
    level: Level | None
    """With --dp."""
    rows: RowAverages | None


def bytes_of(tensors: dict[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


# ---- a gradient ----------------------------------------------------------------------------------

def gradient(config: RunConfig, vocab_size: int, sequences: int, gpu: bool) -> Gradient:
    """The gradient of this many sequences."""
    return _counted(config, vocab_size, sequences, gpu, trains=True)


def evaluation(config: RunConfig, vocab_size: int, gpu: bool) -> Gradient:
    """The loss of a batch of the validation split."""
    return _counted(config, vocab_size, BATCH_SEQUENCES, gpu, trains=False)


def _counted(config: RunConfig, vocab_size: int, sequences: int, gpu: bool, trains: bool
             ) -> Gradient:
    length, model = config.sequence_length, outlined_model(config, vocab_size)
    with Counting() as count, way_of(gpu):
        with count.item(PARAMETERS):
            FlatParams(model)  # whose vectors the model keeps
        few = sequences
        if trains:  # more than what is computed at a time, and once again, takes no more
            few = min(sequences, _enough(model, sequences, length, gpu))
        ids = torch.zeros(few, length, dtype=torch.int64, device="meta")
        count.name(PARAMETERS, ids)
        count.begin()
        with count.item(ACTIVATIONS if trains else EVALUATION):
            try:
                if trains:
                    model.compute_grad(ids)
                else:
                    with torch.no_grad():
                        model.loss(ids)
            except RuntimeError as error:
                if isinstance(model, Mamba2LM):
                    raise
                where = f"--config {config.config}" if config.init_from is None else \
                    f"--init_from {config.init_from}"
                raise InputError(f"{where}: a model of this architecture cannot be planned: torch "
                                 f"does not compute it without memory ({one_line(error)})"
                                 ) from error
    items = count.peak
    del items[PARAMETERS]
    return Gradient(items, count.flop * sequences // few)


def _enough(model: Mamba2LM | TransformersLM, sequences: int, length: int, gpu: bool) -> int:
    """Sequences that take as much as any larger batch."""
    if not isinstance(model, Mamba2LM):
        return 2 * model.at_a_time(length, gpu)
    return 2 * model.at_a_time_on_gpu(sequences, length) if gpu else sum(
        model.at_a_time_on_cpu(length, add) for add in (False, True, True))


def way_of(gpu: bool) -> AbstractContextManager[object]:
    return AsOnGpu() if gpu else nullcontext()


# ---- a worker ------------------------------------------------------------------------------------

class Trained:
    """In place of a model whose gradients were counted."""

    def __init__(self, count: Counting, counted: dict[int, Gradient]) -> None:
        self.count, self.counted, self.flop = count, counted, 0

    def compute_grad(self, batch: Tensor) -> tuple[Tensor, int]:
        found = self.counted[len(batch)]
        self.count.besides(found.items)
        self.flop += found.flop
        return torch.zeros((), device="meta"), batch[:, 1:].numel()


class _Singles:
    """In place of the gradients of --dp example: those of as many single sequences as are in a step
    on average. What is clipped, rounded and drawn meanwhile is small pieces."""

    def __init__(self, level: ExampleLevel, flat: FlatParams) -> None:
        self._sequences, self._kept = level.batch_size, PrivateGradient(level, flat)

    def write(self, model: Trained, client: Client) -> None:
        one = client.on_device(client.sequences[:1].astype(np.int64))
        for _ in range(self._sequences):
            model.compute_grad(one)


class _Resting(LocalOptimizer):
    """Makes no step: AdamW's on a CPU take slices alone, hundreds of thousands of large models."""

    def update(self, rate: float | Tensor) -> None:
        if self.muon:
            super().update(rate)


def worker(config: FederatedConfig, vocab_size: int, gpu: bool, most: int | None = None,
           schedule: Schedule | None = None) -> Worker:
    """A worker while a client trains and reports, and while it evaluates. most: how many of a
    round's clients it may have to train; None: all. schedule: of the run, with --dp."""
    most = config.cohort_size if most is None else most
    counted = {n: gradient(config, vocab_size, n, gpu) for n in _sequences(config)}
    evaluated, strategy = evaluation(config, vocab_size, gpu), config.strategy
    outlined = outlined_model(config, vocab_size)
    with Counting() as count, way_of(gpu):
        with count.item(PARAMETERS):
            flat = FlatParams(outlined, config.personal)
        count.name(GRADIENTS, flat.grad)
        plane = DataPlane()
        with count.item(SCRATCH):
            aggregator = make_aggregator(config, flat.shared, plane, most)
            count.name(BUFFER, *aggregator.memory)
            if isinstance(aggregator, KeepingAggregator):
                count.name(UPDATES, *aggregator.rows)
            if isinstance(aggregator, WeiszfeldAggregator):
                count.name(CENTRE, aggregator.centre)
            odd = make_aggregator(config, flat.shared, plane, most) if config.overlap else None
            rows = RowAverages(config, flat, plane) if config.rows_every else None
            state = GlobalState(config, flat.vector, plane, aggregator, odd,
                                None if rows is None else rows.means)
            ServerUpdate(strategy, aggregator)
            if odd is not None:
                count.name(BUFFER, *odd.memory)
                ServerUpdate(strategy, odd)
        count.name(GLOBAL_MODEL, state.model)
        count.name(SERVERS, *state.server.values())
        count.name(SERVER_RESIDUAL, *state.sections.values())
        count.name(AVERAGED, *(state.moments or {}).values())
        if rows is not None:
            count.name(BUFFER, rows.buffer)
        with count.item(FISHER):
            fisher = FisherEstimate(flat, strategy.fisher_settings
                                    ) if "fisher" in strategy.inputs else None
        with count.item(SCRATCH):
            client = client_of(config, flat, gpu, config.keeps_moments)
        if config.clips_to_median:  # of this and the round's others, until the median is known
            waiting = [torch.empty_like(flat.shared) for _ in range(most)]
            count.name(UPDATES, *waiting)
        level = None if schedule is None or not config.private else level_of(
            config, schedule, flat.size)
        with count.item(CLIPPED):
            singles: Any = _Singles(level, flat) if isinstance(level, ExampleLevel) else None
        if strategy.trains:
            with count.item(MOMENTS):
                client.optimizer.begin_at(1)
        model: Any = Trained(count, counted)
        with count.item(TEMPORARY):
            if strategy.trains:
                client.train(model, 2, 0, anchor=state.shared, prox_mu=config.prox_mu,
                             fisher=fisher, gradients=singles)
            else:
                client.gradient(model, singles)
        muon_flop = count.flop  # a counted gradient is not computed again
        with count.item(OWN):
            if config.sync == "epoch":
                client.keep_parameters()
            client.keep_personal()
            for name in _residuals(client, aggregator):
                client.residual(name)
            if config.overlap:
                client.vectors[OWN_PART] = torch.empty_like(flat.shared)
        with count.item(TEMPORARY):
            reported_vectors(client, strategy, aggregator, fisher)
        count.besides(evaluated.items)
    steps = 2 if strategy.trains else 1
    kept = state.named() | ({SUM: aggregator.buffer} if config.overlap else {})
    return Worker(flat, +count.peak, dict(client.state()), kept, model.flop // steps,
                  muon_flop // steps, aggregator, level, rows)


def _sequences(config: FederatedConfig) -> set[int]:
    """The sizes of the batches whose gradients a client computes."""
    if config.dp == "example":
        return {1}
    if "fisher" not in config.strategy.inputs:
        return {config.batch_size}
    settings = config.strategy.fisher_settings
    return {{"batch": config.batch_size, "sequence": 1,
             "corrected": config.batch_size // settings.microbatches}[settings.estimate]}


def client_of(config: RunConfig, flat: FlatParams, gpu: bool, keeps_moments: bool = True
              ) -> Client:
    batch = config.batch_size
    tokens = np.zeros((batch, config.sequence_length), np.uint16)
    optimizer = (LocalOptimizer if gpu else _Resting)(flat, config, 2)
    return Client(0, np.arange(batch), tokens, flat, config, optimizer, keeps_moments)


def _residuals(client: Client, aggregator: Aggregator) -> list[str]:
    """The vectors that a client keeps of what it has not sent, with --aggregation int8 or int4."""
    every = dict.fromkeys((*aggregator.residuals, *aggregator.moment_steps))
    return [residual_of(name) for name in every]
