"""A client: a shard of the data, and the local training on it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from fedrun.config import RunConfig
from fedrun.data.batches import make_batches
from fedrun.model.base import Model
from fedrun.training.batch_memory import BatchMemory
from fedrun.training.fisher import FisherEstimate
from fedrun.training.optimizer import LocalOptimizer
from fedrun.training.params import FlatParams

ADAMW = "adamw."  # prefix of the optimizer's tensors among a client's
STEPS_DONE = "steps_done"
OWN_PART = "own_part"
ClientState = Mapping[str, Tensor]


@dataclass
class LocalLosses:
    """Losses of local training: their sum in nats, and the number of tokens."""

    loss_sum: Tensor
    """0-dim, still on the device. Reading it is the only wait for a GPU, after the last step. 0
    with --dp example, where it is nobody's to know."""
    tokens: int
    """With --dp example: on average."""


class Gradients(Protocol):
    """Makes the gradients of local steps in another way than from the client's next batch."""

    def write(self, model: Model, client: Client) -> None:
        """Write the gradient of the client's next step to flat.grad."""


class Client:
    """One owner of data. Its batches depend on (seed, client) alone, never on its worker.

    The clients of a worker share its model and its optimizer. Only the state is a client's own: it
    is loaded for the client's turn and released after it, and client_store.py keeps it in between.
    It includes the optimizer's moments unless `keeps_moments` is false.
    """

    def __init__(self, index: int, shard: np.ndarray, sequences: np.ndarray, flat: FlatParams,
                 config: RunConfig, optimizer: LocalOptimizer, keeps_moments: bool = True,
                 memory: BatchMemory | None = None) -> None:
        """memory: of the worker, for its clients' batches; None: of this client's own."""
        self.index = index
        self.shard = shard
        self.sequences = sequences
        self.flat = flat
        self.config = config
        self.optimizer = optimizer
        self.keeps_moments = keeps_moments
        self.memory = memory or BatchMemory(flat.vector.device)
        self.batches = make_batches(config.sampling, len(shard), config.batch_size, config.seed,
                                    index)
        self.steps_done = 0
        self.vectors: dict[str, Tensor] = {}
        """More of its state by name. (shared_size,): `parameters`, its own model between rounds
        that do not start from the global one; `residual`, the part of its updates that was not sent
        yet, and others of averaged moments (see aggregation/int8.py); `own_part`, its part of the
        mean update that travels (see overlap.py). `personal`: the values of --personal parameters
        after the last round in which its update was used."""

    def keep_parameters(self) -> None:
        """Keep the worker's shared parameters as this client's own, for a round that starts from
        them."""
        self._keep("parameters", self.flat.shared)

    def keep_personal(self) -> None:
        """Keep the worker's values of personal parameters as this client's."""
        if self.flat.own.numel():
            self._keep("personal", self.flat.own)

    def _keep(self, name: str, values: Tensor) -> None:
        if name not in self.vectors:
            self.vectors[name] = torch.empty_like(values)
        self.vectors[name].copy_(values)

    def begin_round(self, model: Tensor, own: Tensor | None = None) -> None:
        """Load where local training starts: the global model, (size,), or in place of its shared
        parameters `own`, (shared_size,); personal ones, of which `model` has what the run started
        from, are the client's own in any case."""
        shared = self.flat.shared_size
        self.flat.shared.copy_(model[:shared] if own is None else own, non_blocking=True)
        self.flat.own.copy_(self.vectors.get("personal", model[shared:]), non_blocking=True)

    def residual(self, name: str) -> Tensor:
        """One of the client's residuals, (shared_size,); zeros at first."""
        if name not in self.vectors:
            self.vectors[name] = torch.zeros_like(self.flat.shared)
        return self.vectors[name]

    def forget(self) -> None:
        """Reset what local training leaves behind, because the update was left out. The residual of
        earlier updates stays, and so do personal parameters as they were before."""
        for name in ("parameters", OWN_PART):
            dropped = self.vectors.pop(name, None)
            if dropped is not None and dropped.is_cuda:
                # Its memory is of the store's stream, which must not reuse it while training may
                # still read it: nobody waits for that here, as the store does before it frees a
                # state.
                dropped.record_stream(torch.cuda.current_stream())
        self.optimizer.reset()

    def state(self) -> ClientState:
        """Everything the client needs to resume, by name: its position in its data, AdamW's state,
        and its own vectors. The tensors themselves, not copies."""
        state = {STEPS_DONE: torch.tensor(self.steps_done), **self.vectors}
        if self.keeps_moments:
            return state | {ADAMW + name: t for name, t in self.optimizer.state.items()}
        return state | {ADAMW + name: t for name, t in self.optimizer.own_state().items()}

    def load_state(self, state: ClientState) -> None:
        """Restore a saved state; tensors already on the device are used in place."""
        self.steps_done = int(state[STEPS_DONE])
        self.vectors = {name: t.to(self.flat.vector.device) for name, t in state.items()
                        if name != STEPS_DONE and not name.startswith(ADAMW)}
        moments = {name.removeprefix(ADAMW): t for name, t in state.items()
                   if name.startswith(ADAMW)}
        if self.keeps_moments:
            self.optimizer.load_state(moments)
        else:
            self.optimizer.load_own_state(moments)

    def release_state(self) -> ClientState:
        """Return `state` and keep no reference to it."""
        state, self.vectors = self.state(), {}
        if self.keeps_moments:
            self.optimizer.load_state({})
        return state

    def train(self, model: Model, steps: int, first_step: int,
              between_steps: Callable[[], None] = lambda: None, *, anchor: Tensor | None = None,
              prox_mu: float = 0.0, fisher: FisherEstimate | None = None,
              gradients: Gradients | None = None) -> LocalLosses:
        """`steps` optimizer steps from where the worker's parameters are, on the next batches.

        first_step: index of the first of them in the run, counted from 0, for the schedule.
        With prox_mu, the loss has the term (prox_mu / 2) |w - anchor|^2 (Li et al. 2020, "Federated
        Optimization in Heterogeneous Networks", equation 2), of shared parameters alone; anchor:
        (shared_size,). `fisher` estimates the Fisher diagonal
        from the same gradients, without that term. gradients: with --dp example.
        """
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.flat.vector.device)
        tokens = 0
        for step in range(steps):
            between_steps()
            loss, count = self._gradient(model, fisher, gradients)
            if prox_mu:
                assert anchor is not None
                away = anchor.to(self.flat.vector.device, non_blocking=True)
                away = torch.sub(self.flat.shared, away, out=None if away is anchor else away)
                self.flat.grad[:len(away)].add_(away, alpha=prox_mu)
            self.optimizer.step(first_step + step)
            loss_sum += loss
            tokens += count
        return LocalLosses(loss_sum, tokens)

    def gradient(self, model: Model, gradients: Gradients | None = None) -> LocalLosses:
        """The gradient of the next batch's mean loss in flat.grad; no step. gradients: with --dp
        example."""
        loss, tokens = self._gradient(model, None, gradients)
        return LocalLosses(loss.double(), tokens)

    def _gradient(self, model: Model, fisher: FisherEstimate | None, gradients: Gradients | None
                  ) -> tuple[Tensor, int]:
        """Write the gradient of the next step to flat.grad; its batch's summed loss and tokens."""
        if gradients is not None:
            gradients.write(model, self)
            self.steps_done += 1
            tokens = self.config.batch_size * (self.sequences.shape[1] - 1)
            return self.flat.vector.new_zeros(()), tokens
        batch = self.next_batch()
        return model.compute_grad(batch) if fisher is None else fisher.gradient(model, batch)

    def next_batch(self) -> Tensor:
        """(batch_size, sequence_length) token ids, in memory that the next batch overwrites;
        advances the client's position."""
        batch = self.batches.read(self.steps_done, self.sequences, self.shard)
        self.steps_done += 1
        return self.on_device(batch)

    def on_device(self, batch: np.ndarray) -> Tensor:
        """A batch of token ids, (sequences, sequence_length) int64, in memory that the next one of
        its shape overwrites."""
        return self.memory.load(torch.from_numpy(batch))
