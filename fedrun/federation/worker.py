"""A worker: the clients of one process on one device.

It holds one model, whose parameters each hosted client trains in turn, the global model as a second
vector (one for all workers on the CPUs of a machine), and one buffer to which the clients' terms
are added. Hundreds of clients cost little more memory than one, except for their states, which are
kept in a store between their turns.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedrun.aggregation.base import Aggregator
from fedrun.aggregation.bounds import Bounds
from fedrun.aggregation.exact import MOMENTS, ExactAggregator
from fedrun.aggregation.int8 import Int8Aggregator
from fedrun.aggregation.slices import norm
from fedrun.aggregation.update import ServerUpdate
from fedrun.config import FederatedConfig
from fedrun.data.partition import Shards
from fedrun.data.tokens import TokenData
from fedrun.distributed.runtime import Runtime
from fedrun.federation import replicas
from fedrun.federation.client import Client, mean_entropy
from fedrun.federation.client_store import make_store
from fedrun.federation.messages import RoundPlan, RoundReport, WorkerReport
from fedrun.federation.placement import assign_clients
from fedrun.federation.schedule import Schedule
from fedrun.model.base import Model
from fedrun.records.checkpoint import GLOBAL, Checkpoint, folder_of
from fedrun.records.checkpoint_writer import CheckpointWriter
from fedrun.records.snapshots import save_snapshot, tracked_parameters
from fedrun.strategies.base import ClientReport, ServerRound
from fedrun.training.batch_memory import BatchMemory
from fedrun.training.evaluate import Piece, validation_pieces
from fedrun.training.fisher import FisherEstimate
from fedrun.training.optimizer import LocalOptimizer, scheduled_lr
from fedrun.training.params import FlatParams


class PeerFailed(Exception):
    """Local training was interrupted because another rank has failed."""


class Worker:
    """Local training, aggregation and a part of the evaluation. It communicates only to aggregate.
    """

    def __init__(self, config: FederatedConfig, data: TokenData, shards: Shards, schedule: Schedule,
                 model: Model, runtime: Runtime, checkpoint: Checkpoint | None = None) -> None:
        """model: the run's model at its start, on this worker's device."""
        assert runtime.worker is not None
        self.config, self.data, self.shards, self.schedule = config, data, shards, schedule
        self.runtime = runtime
        self.strategy = config.strategy
        self.model = model
        self.flat = FlatParams(model)
        plane, vector = runtime.data_plane, self.flat.vector
        self.global_model = plane.replicated(vector)
        self.state = {name: plane.replicated(torch.full_like(vector, value))
                      for name, value in self.strategy.state.items()}
        average = config.client_moments == "average"
        self.moments = {name: plane.replicated(torch.zeros_like(vector)) for name in MOMENTS
                        } if average else None
        """AdamW's moments averaged over the last cohort, if clients share them."""
        self.aggregator: Aggregator
        if config.aggregation == "int8":
            self.aggregator = Int8Aggregator(self.strategy, self.flat.size, vector,
                                             config.cohort_size, plane)
        else:
            self.aggregator = ExactAggregator(self.strategy, self.flat.size, vector,
                                              config.aggregation == "exact", average, plane)
        self.server_update = ServerUpdate(self.strategy, self.aggregator)
        self.fisher = FisherEstimate(self.flat, self.strategy.fisher_settings
                                     ) if "fisher" in self.strategy.inputs else None
        self.clients = self._host_clients()
        self.store = make_store(config, {k: c.state() for k, c in self.clients.items()},
                                runtime.device)
        self.start = tracked_parameters(self.flat, self.global_model
                                        ) if config.save_client_deltas else {}
        self.checkpoint_writer = CheckpointWriter()
        self._added: list[int] = []  # clients whose terms are in this round's sum
        if checkpoint is not None:
            self._load(checkpoint)

    def _host_clients(self) -> dict[int, Client]:
        """This worker's clients, which share its model, its optimizer and memory for a batch."""
        config, memory = self.config, BatchMemory(self.flat.vector.device)
        work = [config.local_updates * config.batch_size] * config.num_clients  # in a round
        optimizer = LocalOptimizer(self.flat, config, self.schedule.rounds * config.local_updates)
        hosted = assign_clients(work, len(self.runtime.workers))[self._index]
        return {k: Client(k, self.shards.train[k], self.data.train, self.flat, config, optimizer,
                          keeps_moments=config.client_moments in ("keep", "reset_epoch"),
                          memory=memory)
                for k in hosted}

    @property
    def _index(self) -> int:
        """This worker's place among the workers."""
        assert self.runtime.worker is not None
        return self.runtime.worker

    # ---- local training --------------------------------------------------------------------------

    def train(self, plan: RoundPlan) -> WorkerReport:
        """Train the hosted clients of the cohort and add each one's term; nothing is sent."""
        began = time.monotonic()
        self.aggregator.begin(Bounds(plan.bound, plan.gradient_bound))
        weights = dict(zip(plan.cohort, plan.weights, strict=True))
        turns = self._hosted(plan.cohort)
        reports = []
        for turn, index in enumerate(turns, 1):
            client = self.clients[index]
            client.load_state(self.store.checkout(index))
            if turn < len(turns):
                self.store.prefetch(turns[turn])
            reports.append(self._train_client(client, weights[index], plan))
            self.store.checkin(index, client.release_state())
        self._added = [report.client for report in reports if not report.left_out]
        return WorkerReport(reports, bytes=2 * len(reports) * self.aggregator.bytes_sent,
                            local_training_seconds=time.monotonic() - began)

    def _hosted(self, cohort: list[int]) -> list[int]:
        return [k for k in cohort if k in self.clients]

    def _train_client(self, client: Client, planned: float, plan: RoundPlan) -> ClientReport:
        """One client's part of a round: train, measure its model, add its term."""
        own = None if plan.start_from_global else client.vectors.get("parameters")
        self.flat.vector.copy_(self.global_model if own is None else own)
        steps = self.config.local_updates
        first_step = (plan.round - 1) * steps
        if self.strategy.trains:
            moments = self.config.client_moments
            if moments == "reset" or (moments == "reset_epoch"
                                      and self.schedule.in_epoch(plan.round) == 0):
                client.optimizer.reset()
            if self.moments is not None:
                client.optimizer.load_moments(self.moments, first_step)
            if self.fisher is not None:
                self.fisher.begin()
            losses = client.train(self.model, steps, first_step, self._check_peers,
                                  anchor=self.global_model, prox_mu=self.config.prox_mu,
                                  fisher=self.fisher)
        else:
            self._check_peers()
            losses = client.gradient(self.model)
        if self.config.sync == "epoch":
            client.keep_parameters()
        report = ClientReport(client.index, losses.tokens, losses.loss_sum.item(),
                              self._entropy(client))
        if plan.evaluate:
            report = self._measure(client, report, plan.round)
        report = self._add(client, planned, plan, report)
        if report.left_out:
            client.forget()
        return report

    def _entropy(self, client: Client) -> float | None:
        """The mean entropy of its trained model on its holdout, or without one on the validation
        split, if the method measures it."""
        if not self.strategy.holdout_batches:
            return None
        sequences, rows = self.data.validation, np.arange(len(self.data.validation))
        if self.strategy.holdout:
            sequences, rows = self.data.train, self.shards.holdout[client.index]
        return mean_entropy(self.model, sequences, rows, self.config.batch_size,
                            self.strategy.holdout_batches)

    def _measure(self, client: Client, report: ClientReport, number: int) -> ClientReport:
        """In rounds that are evaluated: what the flags ask for of a client's own model."""
        if self.config.save_client_deltas:
            save_snapshot(self.config.run_dir / f"client_{client.index}", number,
                          tracked_parameters(self.flat, self.flat.vector), self.start)
        if self.config.eval_clients:
            return replace(report, validation=self._validate(0, 1))
        return report

    def _add(self, client: Client, planned: float, plan: RoundPlan, report: ClientReport
             ) -> ClientReport:
        """Add a client's term; returns its report with its weight and norm, or with the reason why
        it is left out."""
        if report.entropy is not None and not math.isfinite(report.entropy):
            return replace(report, entropy=None, left_out="entropy not finite")
        try:
            weight = self.strategy.client_weight(planned, report, plan.entropy_reference)
        except ValueError as error:
            return replace(report, left_out=str(error))
        vectors = self._vectors(client)
        if left_out := self.aggregator.add(vectors, weight, start=self.global_model):
            return replace(report, left_out=left_out)
        report = replace(report, weight=weight)
        if not plan.evaluate:
            return report
        first = next(iter(vectors))
        origin = self.global_model if first == "parameters" else None
        return replace(report, norm=norm(vectors[first], origin))

    def _vectors(self, client: Client) -> dict[str, Tensor]:
        """What the client that has just trained reports, by name, (size,) each; its trained
        `parameters` stand for its update `delta`."""
        vectors: dict[str, Tensor] = {}
        moments: dict[str, Tensor] = {}
        if self.moments is not None:
            moments = client.optimizer.bias_corrected_moments()
        elif set(MOMENTS) & set(self.strategy.inputs):  # the client's own, which it keeps using
            moments = client.optimizer.bias_corrected_moments(copy=True)
        for name in self.strategy.inputs:
            if name == "delta":
                vectors["parameters"] = self.flat.vector
            elif name == "gradient":
                vectors[name] = self.flat.grad
            elif name == "fisher":
                assert self.fisher is not None
                vectors[name] = self.fisher.finish()
            else:
                vectors[name] = moments[name]
        if self.config.aggregation == "int8":
            vectors["residual"] = client.residual()
        return vectors if self.moments is None else vectors | moments

    # ---- aggregation -----------------------------------------------------------------------------

    def aggregate(self, plan: RoundPlan) -> RoundReport:
        """Workers: sum the terms and update the global model."""
        began = time.monotonic()
        self.aggregator.reduce(self._residuals())
        if not plan.last and (turns := self._hosted(self.schedule.cohort(plan.round + 1))):
            self.store.prefetch(turns[0])
        config = self.config
        context = ServerRound(plan.round, scheduled_lr(config, plan.round - 1,
                                                       self.schedule.rounds),
                              config.beta1, config.beta2, config.weight_decay)
        measured = self.server_update.apply(self.global_model, self.state, context, self.moments,
                                            measure=plan.evaluate)
        return RoundReport(aggregation_seconds=time.monotonic() - began, measured=measured)

    def _residuals(self) -> Iterator[Tensor]:
        """Yield the residual of each client in the sum in turn. Its state goes back to the store
        when the generator advances."""
        for turn, index in enumerate(self._added, 1):
            state = self.store.checkout(index)
            if turn < len(self._added):
                self.store.prefetch(self._added[turn])
            yield state["residual"]
            self.store.checkin(index, state)

    # ---- evaluation and checkpoints --------------------------------------------------------------

    def evaluate(self, report: RoundReport) -> RoundReport:
        """Evaluate the global model on this worker's part of the validation split."""
        began = time.monotonic()
        self.flat.vector.copy_(self.global_model)
        losses = self._validate(self._index, len(self.runtime.workers))
        return replace(report, validation=losses, evaluation_seconds=time.monotonic() - began)

    def _validate(self, part: int, parts: int) -> list[Piece]:
        return validation_pieces(self.model, self.data.validation, self.runtime.device, part, parts,
                                 self._check_peers)

    def check_replicas(self, report: RoundReport) -> RoundReport:
        """Digests of all that every worker holds (see replicas.py), from the workers that hold a
        replica of their own."""
        if self.runtime.data_plane.node_rank > 0:
            return report
        state = self._global_state()
        return replace(report, replicas=replicas.digests(state),
                       not_finite=replicas.not_finite(state))

    def _global_state(self) -> dict[str, Tensor]:
        """What is the same on every worker, by name: the tensors themselves."""
        return {"model": self.global_model} | {
            f"server.{name}": t for name, t in self.state.items()} | {
            f"moments.{name}": t for name, t in (self.moments or {}).items()}

    def save(self, plan: RoundPlan) -> None:
        """Start to write this worker's files of a checkpoint, with everything as it is now."""
        files = {GLOBAL: self._global_state()} if self._index == 0 else {}
        self.store.save(self.checkpoint_writer, folder_of(self.config.run_dir, plan.round),
                        plan.round, files)

    def written(self, wait: bool = False) -> list[dict[str, Any]]:
        """What `CheckpointWriter.written` returns."""
        return self.checkpoint_writer.written(wait)

    def _load(self, checkpoint: Checkpoint) -> None:
        tensors = checkpoint.tensors(GLOBAL)
        for name, tensor in self._global_state().items():
            self.runtime.data_plane.write(tensor, tensors[name])
        self.store.load(checkpoint)

    def finish(self, plan: RoundPlan) -> RoundReport:
        """After the last round: save it, if that is planned, and wait until all is written."""
        if plan.save and plan.last:
            self.save(plan)
        report = RoundReport(written=self.written(wait=True))
        self.store.close(self.config.timeout)
        return report

    def _check_peers(self) -> None:
        if self.runtime.control.peer_failed():
            raise PeerFailed
