"""A worker: the clients of one process on one device.

It holds one model, whose parameters every hosted client trains in its turn, the global model as a
second vector (one for all workers on the CPUs of a machine), and one buffer that the clients' terms
are added to: hundreds of clients cost little more memory than one, but for their states, which rest
in a store between their turns.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fedrun.aggregation.base import Aggregator, norm
from fedrun.aggregation.bounds import Bounds
from fedrun.aggregation.exact import MOMENTS, ExactAggregator
from fedrun.aggregation.int8 import Int8Aggregator
from fedrun.config import FederatedConfig
from fedrun.data.tokens import TokenData
from fedrun.distributed.runtime import Runtime
from fedrun.federation import replicas
from fedrun.federation.client import Client, mean_entropy
from fedrun.federation.client_store import make_store
from fedrun.federation.placement import assign_clients
from fedrun.federation.plan import RoundPlan, Schedule, Shards
from fedrun.model.build import new_model
from fedrun.records.checkpoint import GLOBAL, Checkpoint, folder_of
from fedrun.records.checkpoint_writer import CheckpointWriter
from fedrun.records.snapshots import save_snapshot, tracked_parameters
from fedrun.strategies.base import ClientReport, ServerRound
from fedrun.strategies.fed_fisher import FedFisher
from fedrun.training.evaluate import Piece, validation_pieces
from fedrun.training.fisher import FisherEstimate
from fedrun.training.optimizer import LocalOptimizer, scheduled_lr
from fedrun.training.params import FlatParams


class Worker:
    """Local training, aggregation and a part of the evaluation; communicates only to aggregate."""

    def __init__(self, config: FederatedConfig, data: TokenData, runtime: Runtime,
                 checkpoint: Checkpoint | None = None) -> None:
        assert runtime.worker is not None
        self.config = config
        self.data = data
        self.runtime = runtime
        self.strategy = config.strategy
        self.model = new_model(config, data.vocab_size, runtime.device)
        self.flat = FlatParams(self.model)
        plane = runtime.data_plane
        self.global_model = plane.replicated(self.flat.vector)
        self.state = {name: plane.replicated(torch.full_like(self.flat.vector, value))
                      for name, value in self.strategy.state.items()}
        average = config.client_state == "average"
        self.moments = {name: plane.replicated(torch.zeros_like(self.flat.vector)) for name in MOMENTS
                        } if average else None
        """AdamW's moments, averaged over the last cohort, where clients share them."""
        self.terms: Aggregator
        if config.wire == "int8":
            self.terms = Int8Aggregator(self.strategy, self.flat.size, self.flat.vector,
                                 config.cohort_size, plane)
        else:
            self.terms = ExactAggregator(self.strategy, self.flat.size, self.flat.vector,
                                 config.reduce == "exact", average, plane)
        self.fisher = FisherEstimate(self.flat, self.strategy
                                     ) if isinstance(self.strategy, FedFisher) else None
        self.shards = Shards(config, data)
        self.schedule = Schedule(config, self.shards.sizes)
        self.clients = self._host_clients()
        self.store = make_store(config, {k: c.state() for k, c in self.clients.items()},
                                runtime.device)
        self.start = tracked_parameters(self.flat.views(self.global_model))
        self.saver = CheckpointWriter()
        self._added: list[int] = []  # clients whose terms are in this round's sum
        if checkpoint:
            self._load(checkpoint)

    def _host_clients(self) -> dict[int, Client]:
        """This worker's clients, which share its model and its optimizer."""
        config = self.config
        work = [config.local_updates * config.batch_size] * config.num_clients  # of a round
        optimizer = LocalOptimizer(self.flat, config, self.schedule.rounds * config.local_updates)
        return {k: Client(k, self.shards.train[k], self.data.train, self.flat, config, optimizer,
                          keeps_moments=config.client_state == "keep")
                for k in assign_clients(work, len(self.runtime.workers))[self.runtime.worker or 0]}

    def train(self, plan: RoundPlan) -> dict[str, Any]:
        """Train the hosted clients of the cohort, adding each one's term; nothing travels."""
        began = time.monotonic()
        self.terms.begin(Bounds(plan.bound, plan.gradient_bound))
        weights = dict(zip(plan.cohort, plan.weights, strict=True))
        turns = self._hosted(plan.cohort)
        clients, client_pieces = [], {}
        for turn, index in enumerate(turns, 1):
            client = self.clients[index]
            client.load_state(self.store.checkout(index))
            if turn < len(turns):
                self.store.prefetch(turns[turn])
            clients.append(self._turn(client, weights[index], plan))
            self.store.checkin(index, client.release_state())
            if plan.evaluate and self.config.eval_clients:
                client_pieces[index] = clients[-1].pop("pieces")
        self._added = [client["client"] for client in clients if not client["left_out"]]
        # Bytes as if every client were a worker of its own: its term there, and the sum back.
        return {"clients": clients, "client_pieces": client_pieces,
                "bytes": 2 * len(clients) * self.terms.wire_bytes,
                "local_training_seconds": time.monotonic() - began}

    def _hosted(self, cohort: list[int]) -> list[int]:
        return [k for k in cohort if k in self.clients]

    def _turn(self, client: Client, planned: float, plan: RoundPlan) -> dict[str, Any]:
        """One client's part of a round: train, look at its model, add its term."""
        report: dict[str, Any] = {"client": client.index}
        own = None if plan.start_from_global else client.vectors.get("parameters")
        self.flat.vector.copy_(self.global_model if own is None else own)
        steps = self.config.local_updates
        if "gradient" in self.strategy.inputs:
            self._look_at_peers()
            losses = client.gradient(self.model)
        else:
            if self.config.client_state == "reset":
                client.optimizer.reset()
            if self.moments is not None:
                client.optimizer.load_moments(self.moments, (plan.round - 1) * steps)
            if self.fisher:
                self.fisher.begin()
            losses = client.train(self.model, steps, (plan.round - 1) * steps, self._look_at_peers,
                                  anchor=self.global_model, prox_mu=self.config.prox_mu,
                                  fisher=self.fisher)
        if self.config.sync == "epoch":
            client.keep_parameters()
        if self.strategy.holdout:
            report["entropy"] = mean_entropy(self.model, self.data.train,
                                             self.shards.holdout[client.index],
                                             self.config.batch_size, self.strategy.holdout_batches)
        if plan.evaluate and self.config.eval_clients:
            report["pieces"] = self._pieces(0, 1)
        if plan.evaluate and self.config.save_client_deltas:
            save_snapshot(self.config.run_dir / f"client_{client.index}", plan.round,
                          tracked_parameters(self.flat.views(self.flat.vector)), self.start)
        vectors = self._vectors(client)
        left_out = self._add(vectors, planned, plan, report, losses.tokens)
        if left_out:
            client.forget()
        elif plan.evaluate:
            first = self.strategy.inputs[0]
            report["norm"] = norm(vectors[first], self.global_model if first == "delta" else None)
        return report | {"loss_sum": losses.loss_sum.item(), "tokens": losses.tokens,
                         "left_out": left_out}

    def _add(self, vectors: dict[str, Tensor], planned: float, plan: RoundPlan, report: dict[str, Any],
             tokens: int) -> str:
        """Add a client's term, its weight into the report; why not, where it is left out."""
        entropy = report.get("entropy")
        if entropy is not None and not math.isfinite(entropy):
            return "entropy not finite"
        try:
            report["weight"] = self.strategy.client_weight(planned, ClientReport(tokens, entropy),
                                                           plan.reference)
        except ValueError as error:
            return str(error)
        return self.terms.add(vectors, report["weight"], start=self.global_model)

    def _vectors(self, client: Client) -> dict[str, Tensor]:
        """What the method's terms are made of, for the client that has just trained."""
        known = {"delta": self.flat.vector, "gradient": self.flat.grad}  # its update, not yet taken
        if self.fisher:
            known["fisher"] = self.fisher.finish()
        vectors = {name: known[name] for name in self.strategy.inputs}
        if self.config.wire == "int8":
            vectors["residual"] = client.residual()
        return vectors if self.moments is None else vectors | client.optimizer.bias_corrected_moments()

    def aggregate(self, plan: RoundPlan) -> dict[str, Any]:
        """Workers: sum the terms and update the global model; seconds it took, and norms."""
        began = time.monotonic()
        self.terms.reduce(self._residuals())
        if not plan.last and (turns := self._hosted(self.schedule.cohort(plan.round + 1))):
            self.store.prefetch(turns[0])
        config = self.config
        context = ServerRound(plan.round, scheduled_lr(config, plan.round - 1,
                                                       self.schedule.rounds),
                              config.beta1, config.beta2, config.weight_decay)
        norms = self.terms.apply(self.global_model, self.state, context, self.moments,
                                 measure=plan.evaluate)
        return {"aggregation_seconds": time.monotonic() - began, "server": norms}

    def _residuals(self) -> Iterator[Tensor]:
        """What each client owes whose term was added; kept again when the next one is asked for."""
        for turn, index in enumerate(self._added, 1):
            state = self.store.checkout(index)
            if turn < len(self._added):
                self.store.prefetch(self._added[turn])
            yield state["residual"]
            self.store.checkin(index, state)

    def _global_state(self) -> dict[str, Tensor]:
        """What is the same on every worker, by name: the tensors themselves."""
        return {"model": self.global_model} | {
            f"server.{name}": t for name, t in self.state.items()} | {
            f"moments.{name}": t for name, t in (self.moments or {}).items()}

    def examine(self) -> dict[str, Any]:
        """What this worker tells of the global model and all else that every worker has: see
        replicas.py. Nothing where it looks at a replica that another one tells of."""
        first = self.runtime.data_plane.node_rank == 0
        return replicas.examine(self._global_state()) if first else {}

    def save(self, plan: RoundPlan) -> None:
        """Begin to write this worker's files of a checkpoint, as everything is here and now."""
        files = {GLOBAL: self._global_state()} if self.runtime.worker == 0 else {}
        self.store.save(self.saver, folder_of(self.config.run_dir, plan.round), plan.round, files)

    def _load(self, checkpoint: Checkpoint) -> None:
        held = checkpoint.tensors(GLOBAL)
        for name, tensor in self._global_state().items():
            self.runtime.data_plane.write(tensor, held[name])
        self.store.load(checkpoint)

    def end(self, plan: RoundPlan) -> list[dict[str, Any]]:
        """After the last round: save it, where that is planned, and wait until all is written.
        What `CheckpointWriter.written` tells."""
        if plan.save and plan.last:
            self.save(plan)
        written = self.saver.written(wait=True)
        self.store.close(self.config.timeout)
        return written

    def evaluate(self) -> tuple[list[Piece], float]:
        """This worker's part of the validation split under the global model; seconds it took."""
        began = time.monotonic()
        self.flat.vector.copy_(self.global_model)
        return self._pieces(self.runtime.worker or 0, len(self.runtime.workers)), \
            time.monotonic() - began

    def _pieces(self, part: int, parts: int) -> list[Piece]:
        return validation_pieces(self.model, self.data.validation, self.runtime.device, part, parts,
                                 self._look_at_peers)

    def _look_at_peers(self) -> None:
        if self.runtime.control.peer_failed():
            raise PeerFailed


class PeerFailed(Exception):
    """Local work was broken off because another rank has failed."""
