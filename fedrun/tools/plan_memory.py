"""What the ranks of a run hold in memory, by item.

The objects of a worker are built by their own classes on the meta device, where tensors have shapes
and no memory, and make a round there; what they allocate is counted (plan_counting.py). What does
not show there is added after the code that allocates it: the states of clients in their store,
copies for a checkpoint, and what the server holds.
"""

from __future__ import annotations

from collections import Counter
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor

from fedrun.aggregation.base import Aggregator
from fedrun.aggregation.int8 import Int8Aggregator, residual_of
from fedrun.aggregation.keeping import KeepingAggregator
from fedrun.aggregation.making import make_aggregator
from fedrun.aggregation.update import ServerUpdate
from fedrun.aggregation.weiszfeld import WeiszfeldAggregator
from fedrun.config import FederatedConfig
from fedrun.distributed.data_plane import DataPlane
from fedrun.federation.client import Client
from fedrun.federation.client_store import InMemory, OnDevice, OnDisk, kind_of_store
from fedrun.federation.global_state import GlobalState
from fedrun.federation.placement import Placement, assign_clients
from fedrun.federation.reported import reported_vectors
from fedrun.model.build import DTYPES, uninitialised_model
from fedrun.model.mamba2 import Mamba2LM
from fedrun.tools.plan_counting import LOSS_HEAD, AsOnGpu, Counting
from fedrun.training.evaluate import BATCH_SEQUENCES
from fedrun.training.fisher import FisherEstimate
from fedrun.training.optimizer import LocalOptimizer
from fedrun.training.params import FlatParams

PARAMETERS, GRADIENTS, MOMENTS = "parameters", "gradients", "optimizer's moments"
GLOBAL_MODEL, SERVERS, AVERAGED = "global model", "the server's own vectors", "averaged moments"
BUFFER, SCRATCH, FISHER = "sum buffer", "scratch slices", "Fisher information"
UPDATES, CENTRE = "updates of single clients", "the mean they are weighed by"
OWN, TEMPORARY, ACTIVATIONS = "the client's own vectors", "temporary vectors", "activations"
EVALUATION = "activations of an evaluation"
STATES, CHECKPOINT = "states of other clients", "copies for a checkpoint"
LIBRARIES = "Python and its libraries"
SERVER_MODEL, TRACKED = "the server's model", "tracked parameters"
WRITTEN, RECEIVED = "a model that is written", "the next model, received meanwhile"
OF_A_MACHINE = {GLOBAL_MODEL, SERVERS, AVERAGED, CENTRE}
"""Items of which workers on the CPUs of a machine have one together."""
ITEMS = (PARAMETERS, GRADIENTS, MOMENTS, OWN, GLOBAL_MODEL, SERVERS, AVERAGED, BUFFER, SCRATCH,
         UPDATES, CENTRE, FISHER, ACTIVATIONS, EVALUATION, LOSS_HEAD, TEMPORARY, STATES, CHECKPOINT,
         SERVER_MODEL, TRACKED, WRITTEN, RECEIVED, LIBRARIES)
"""All of them, in the order in which they are shown."""


@dataclass(frozen=True)
class Layout:
    """The processes of a run."""

    processes: int
    machines: int
    colocated: bool
    gpu: bool
    """Whether workers compute on GPUs."""

    @property
    def workers(self) -> int:
        return self.processes if self.colocated or self.processes == 1 else self.processes - 1

    @property
    def workers_here(self) -> int:
        """Workers on the machine with the most of them."""
        rest = -(-self.processes // self.machines)
        return min(self.workers, rest)

    def hosted(self, clients: int) -> int:
        """Clients of the worker with the most of them."""
        return max(map(len, assign_clients([1] * clients, self.workers)))

    def most(self, config: FederatedConfig) -> int:
        """The most clients that a worker may have to train in a round."""
        return Placement.of(config, self.workers).most(config.cohort_size)


@dataclass(frozen=True)
class Gradient:
    """What the gradient of some sequences takes above parameters and gradients."""

    items: Counter[str]
    """Bytes when all of them together are the most."""
    flop: int


@dataclass(frozen=True)
class Worker:
    """A worker, in the round in which it takes the most."""

    flat: FlatParams
    aggregator: Aggregator
    items: Counter[str]
    """Bytes on its device, but for states of other clients."""
    state: dict[str, Tensor]
    """Of a client between its turns: on the meta device, as all tensors here."""
    kept: dict[str, Tensor]
    """The global state."""
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


def bytes_of(tensors: dict[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


# ---- a gradient ----------------------------------------------------------------------------------

def gradient(config: FederatedConfig, vocab_size: int, sequences: int, gpu: bool) -> Gradient:
    """The gradient of this many sequences."""
    return _counted(config, vocab_size, sequences, gpu, trains=True)


def evaluation(config: FederatedConfig, vocab_size: int, gpu: bool) -> Gradient:
    """The loss of a batch of the validation split."""
    return _counted(config, vocab_size, BATCH_SEQUENCES, gpu, trains=False)


def _counted(config: FederatedConfig, vocab_size: int, sequences: int, gpu: bool, trains: bool
             ) -> Gradient:
    length = config.sequence_length
    with Counting() as count, _way(gpu):
        with count.item(PARAMETERS):
            model = _model(config, vocab_size)
            FlatParams(model)  # whose vectors the model keeps
        few = sequences
        if trains:  # more than what is computed at a time, and once again, takes no more
            few = min(sequences, 2 * model.at_a_time_on_gpu(sequences, length) if gpu else sum(
                model.at_a_time_on_cpu(length, add) for add in (False, True, True)))
        ids = torch.zeros(few, length, dtype=torch.int64, device="meta")
        count.name(PARAMETERS, ids)
        count.begin()
        with count.item(ACTIVATIONS if trains else EVALUATION):
            if trains:
                model.compute_grad(ids)
            else:
                with torch.no_grad():
                    model.loss(ids)
    items = count.peak
    del items[PARAMETERS]
    return Gradient(items, count.flop * sequences // few)


def _model(config: FederatedConfig, vocab_size: int) -> Mamba2LM:
    with torch.device("meta"):
        return uninitialised_model(config, vocab_size).to(DTYPES[config.dtype])


def _way(gpu: bool) -> AbstractContextManager[object]:
    return AsOnGpu() if gpu else nullcontext()


# ---- a worker ------------------------------------------------------------------------------------

class _Trained:
    """In place of a model whose gradients were counted."""

    def __init__(self, count: Counting, counted: dict[int, Gradient]) -> None:
        self.count, self.counted, self.flop = count, counted, 0

    def compute_grad(self, batch: Tensor) -> tuple[Tensor, int]:
        found = self.counted[len(batch)]
        self.count.besides(found.items)
        self.flop += found.flop
        return torch.zeros((), device="meta"), batch[:, 1:].numel()


class _Resting(LocalOptimizer):
    """Makes no step: AdamW's on a CPU take slices alone, hundreds of thousands of large models."""

    def update(self, rate: float | Tensor) -> None:
        if self.muon:
            super().update(rate)


def worker(config: FederatedConfig, vocab_size: int, gpu: bool, most: int | None = None
           ) -> Worker:
    """A worker while a client trains and reports, and while it evaluates. most: how many of a
    round's clients it may have to train; None: all."""
    most = config.cohort_size if most is None else most
    counted = {n: gradient(config, vocab_size, n, gpu) for n in _sequences(config)}
    evaluated, strategy = evaluation(config, vocab_size, gpu), config.strategy
    with Counting() as count, _way(gpu):
        with count.item(PARAMETERS):
            flat = FlatParams(_model(config, vocab_size))
        count.name(GRADIENTS, flat.grad)
        plane = DataPlane()
        with count.item(SCRATCH):
            aggregator = make_aggregator(config, flat.vector, plane, most)
            count.name(BUFFER, aggregator.buffer)
            if isinstance(aggregator, KeepingAggregator):
                count.name(UPDATES, *aggregator.rows)
            if isinstance(aggregator, WeiszfeldAggregator):
                count.name(CENTRE, aggregator.centre)
            state = GlobalState(config, flat.vector, plane, aggregator)
            ServerUpdate(strategy, aggregator)
        count.name(GLOBAL_MODEL, state.model)
        count.name(SERVERS, *state.server.values())
        count.name(AVERAGED, *(state.moments or {}).values())
        with count.item(FISHER):
            fisher = FisherEstimate(flat, strategy.fisher_settings
                                    ) if "fisher" in strategy.inputs else None
        with count.item(SCRATCH):
            client = _client(config, flat, gpu)
        if config.clips_to_median:  # of this and the round's others, until the median is known
            waiting = [torch.empty_like(flat.vector) for _ in range(most)]
            count.name(UPDATES, *waiting)
        if strategy.trains:
            with count.item(MOMENTS):
                client.optimizer.begin_at(1)
        model: Any = _Trained(count, counted)
        with count.item(TEMPORARY):
            if strategy.trains:
                client.train(model, 2, 0, anchor=state.model, prox_mu=config.prox_mu, fisher=fisher)
            else:
                client.gradient(model)
        muon_flop = count.flop  # a counted gradient is not computed again
        with count.item(OWN):
            if config.sync == "epoch":
                client.keep_parameters()
            for name in _residuals(client, aggregator):
                client.residual(name)
        with count.item(TEMPORARY):
            reported_vectors(client, strategy, aggregator, state.moments is not None, fisher)
        count.besides(evaluated.items)
    steps = 2 if strategy.trains else 1
    return Worker(flat, aggregator, +count.peak, dict(client.state()), state.named(),
                  model.flop // steps, muon_flop // steps)


def _sequences(config: FederatedConfig) -> set[int]:
    """The sizes of the batches whose gradients a client computes."""
    if "fisher" not in config.strategy.inputs:
        return {config.batch_size}
    settings = config.strategy.fisher_settings
    return {{"batch": config.batch_size, "sequence": 1,
             "corrected": config.batch_size // settings.microbatches}[settings.estimate]}


def _client(config: FederatedConfig, flat: FlatParams, gpu: bool) -> Client:
    batch = config.batch_size
    tokens = np.zeros((batch, config.sequence_length), np.uint16)
    optimizer = (LocalOptimizer if gpu else _Resting)(flat, config, 2)
    return Client(0, np.arange(batch), tokens, flat, config, optimizer, config.keeps_moments)


def _residuals(client: Client, aggregator: Aggregator) -> list[str]:
    """The vectors that a client keeps of what it has not sent, with --aggregation int8."""
    if not isinstance(aggregator, Int8Aggregator):
        return []
    return [residual_of(name) for name in ("delta", *aggregator.moment_steps)]


# ---- the ranks -----------------------------------------------------------------------------------

@dataclass(frozen=True)
class Rank:
    """What a process holds, in bytes by item."""

    name: str
    device: Counter[str]
    """On its GPU; empty on a CPU."""
    host: Counter[str]

    @property
    def shared(self) -> int:
        """Of the host's, what the workers of a machine have together."""
        return 0 if self.device else sum(self.host[item] for item in OF_A_MACHINE)


def ranks(config: FederatedConfig, found: Worker, layout: Layout) -> list[Rank]:
    """The server, and the worker that hosts the most clients; one process may be both."""
    libraries = Counter({LIBRARIES: psutil.Process().memory_info().rss})
    device, host = of_worker(config, found, layout.hosted(config.num_clients), layout.gpu)
    server = of_server(config, found)
    if layout.processes == 1:
        return [Rank("the process", device, libraries + host + server)]
    worker = Rank("a worker", device, libraries + host)
    if layout.colocated:
        return [Rank("rank 0, server and worker", device, libraries + host + server), worker]
    return [Rank("the server", Counter(), libraries + server), worker]


def on_machine(found: list[Rank], layout: Layout) -> int:
    """Bytes of the host's memory on the machine of the server, all processes together."""
    worker, here = found[-1], layout.workers_here
    if layout.machines > 1 and not layout.colocated:
        here = min(here, -(-layout.processes // layout.machines) - 1)
    total = here * worker.host.total() - max(0, here - 1) * worker.shared
    if len(found) == 1:
        return total
    first = found[0].host.total()
    return total + first - (worker.host.total() if layout.colocated else 0)


def of_worker(config: FederatedConfig, found: Worker, hosted: int, gpu: bool
              ) -> tuple[Counter[str], Counter[str]]:
    """On its GPU and on the host, if it hosts this many clients. On a CPU the first is empty."""
    device, host, state = found.items.copy(), Counter[str](), found.state_bytes
    kind = kind_of_store(config, hosted, gpu)
    if not config.keeps_states:
        hosted = 0
    elif kind is OnDevice:
        device[STATES] = (hosted - 1) * state
    else:  # the next one's is fetched, or the last one's stored, while a client trains
        device[STATES] = state
        host[STATES] = hosted * state if kind is InMemory else 2 * state * gpu
    if config.checkpoint_freq is not None:
        host[CHECKPOINT] = bytes_of(found.kept) + (0 if kind is OnDisk else hosted * state)
    if config.offload == "global":
        host.update({item: device.pop(item, 0) for item in (GLOBAL_MODEL, SERVERS, AVERAGED)})
    if config.save_client_deltas:
        host[TRACKED] = 4 * found.tracked_bytes  # the start, now, the change, and the file
    return (+device, +host) if gpu else (Counter(), device + host)


def of_server(config: FederatedConfig, found: Worker) -> Counter[str]:
    """On the host: its model for sample texts, with gradients that it does not use, and the copies
    that it receives and writes (records/recorder.py)."""
    model, tracked = found.parameter_bytes, found.tracked_bytes
    items = Counter({SERVER_MODEL: 2 * model, TRACKED: 2 * tracked,
                     # The copy, and while it is written its file's bytes, or a snapshot's.
                     WRITTEN: model + max(model, 2 * tracked)})
    if config.rounds is None or config.rounds > 1:
        items[RECEIVED] = model
    return items
