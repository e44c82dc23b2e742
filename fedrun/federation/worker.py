"""A worker: the clients of one process on one device.

It holds one model, whose parameters each hosted client trains in turn, the global model as a second
vector (one for all workers on the CPUs of a machine), and one buffer to which the clients' terms
are added. Hundreds of clients cost little more memory than one, except for their states, which are
kept in a store between their turns.
"""

from __future__ import annotations

import time
from dataclasses import replace

from fedrun.aggregation.bounds import Bounds
from fedrun.aggregation.making import make_aggregator
from fedrun.aggregation.update import ServerUpdate
from fedrun.config import FederatedConfig
from fedrun.data.partition import Shards
from fedrun.data.tokens import TokenData
from fedrun.distributed.runtime import Runtime
from fedrun.federation import replicas
from fedrun.federation.client import Client
from fedrun.federation.client_measures import ClientMeasures
from fedrun.federation.client_store import make_store
from fedrun.federation.counted_store import Counted
from fedrun.federation.global_state import GlobalState, layout
from fedrun.federation.messages import RoundPlan, RoundReport, WorkerReport
from fedrun.federation.noise import Noise
from fedrun.federation.overlap import Overlap
from fedrun.federation.placement import Placement, hosted_clients
from fedrun.federation.row_averages import RowAverages
from fedrun.federation.schedule import Schedule
from fedrun.federation.secure_sum import TAIL, PlanRefused, SecureSum
from fedrun.federation.sequence_noise import SequenceNoise
from fedrun.federation.site_holdout import sum_of_sites
from fedrun.federation.tail import Tail
from fedrun.federation.terms import Terms
from fedrun.model.base import Model
from fedrun.records.checkpoint import GLOBAL, Checkpoint
from fedrun.records.checkpoint_writer import CheckpointWriter
from fedrun.records.folders import Folders
from fedrun.records.site_states import SiteStates
from fedrun.strategies.base import ClientReport, ServerRound
from fedrun.training import averaged_moments
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
                 model: Model, runtime: Runtime, checkpoint: Checkpoint | None = None,
                 site_states: SiteStates | None = None) -> None:
        """model: the run's model at its start, on this worker's device. site_states: at a real
        site."""
        assert runtime.worker is not None
        self.config, self.data, self.shards, self.schedule = config, data, shards, schedule
        self.runtime = runtime
        self.site_states = site_states
        self.folders = Folders.of(config) if site_states is None else site_states.folders
        self.strategy = config.strategy
        self.model = model
        self.flat = FlatParams(model, config.personal)
        plane, vector = runtime.data_plane, self.flat.vector
        self.placement = Placement.of(config, len(runtime.workers))
        hosted = hosted_clients(shards, runtime) if config.keeps_states else []
        # A site's clients are on its own workers.
        most = min(config.cohort_size, len(hosted)) if config.sites else \
            self.placement.most(config.cohort_size)
        self.aggregator = make_aggregator(config, self.flat.shared, plane, most)
        odd = make_aggregator(config, self.flat.shared, plane, most) if config.overlap else None
        self.rows = RowAverages(config, self.flat, plane) if config.rows_every else None
        self.global_state = GlobalState(config, vector, plane, self.aggregator, odd,
                                        None if self.rows is None else self.rows.means)
        self.global_model = self.global_state.model
        self.server_update = ServerUpdate(self.strategy, self.aggregator)
        self.overlap = None if odd is None else Overlap(
            self.global_state, (self.server_update, ServerUpdate(self.strategy, odd)))
        """With --overlap: the sum that travels while clients train (see overlap.py)."""
        self.fisher = FisherEstimate(self.flat, self.strategy.fisher_settings
                                     ) if "fisher" in self.strategy.inputs else None
        self.terms = Terms(config, self.aggregator, self.global_state, self.fisher, self.rows)
        self.measures = ClientMeasures(config, data, shards, self.folders, model, self.flat,
                                       self.global_model, self._check_peers)
        self._memory = BatchMemory(vector.device)
        self.optimizer = LocalOptimizer(self.flat, config, schedule.rounds * config.local_updates)
        self.clients = {k: self._new_client(k) for k in hosted}
        """Those whose states are here; clients without one are made for their turn."""
        self.store = make_store(config, self.folders, {
            k: c.state() for k, c in self.clients.items()}, runtime.device
            ) if config.keeps_states else Counted(schedule)
        self.checkpoint_writer = CheckpointWriter(None if site_states is None else
                                                  site_states.seal)
        self.secure: SecureSum | None = None
        """With --secure_sum: what is done besides (see secure_sum.py)."""
        self.noise: Noise | None = None
        """With --dp: what hides each client in the sum (see noise.py), or each sequence in the
        gradients (see sequence_noise.py)."""
        self._trained: list[ClientReport] = []  # of this round
        self._added: list[int] = []  # clients whose terms are in this round's sum
        self._ready = 0  # the round that was trained to its end
        if checkpoint is not None:
            self.global_state.load(checkpoint, warns=self._index == 0)
            self.store.load(checkpoint)
            if self.overlap is not None:
                self.overlap.load(checkpoint, self._bounds(schedule.plan(checkpoint.step, 0.0)),
                                  self._server_round(checkpoint.step))

    def _new_client(self, index: int) -> Client:
        """A client, which shares the worker's model, optimizer and memory for a batch."""
        return Client(index, self.shards.train[index], self.shards.text_of(index, self.data),
                      self.flat, self.config, self.optimizer,
                      keeps_moments=self.config.keeps_moments, memory=self._memory)

    @property
    def _index(self) -> int:
        """This worker's place among the workers."""
        assert self.runtime.worker is not None
        return self.runtime.worker

    def _bounds(self, plan: RoundPlan) -> Bounds:
        return Bounds(plan.bound, plan.gradient_bound, self.config.grad_clip or 1.0)

    def _server_round(self, number: int) -> ServerRound:
        config = self.config
        return ServerRound(number, scheduled_lr(config, number - 1, self.schedule.rounds),
                           config.beta1, config.beta2, config.weight_decay, config.eps)

    # ---- local training --------------------------------------------------------------------------

    def train(self, plan: RoundPlan) -> WorkerReport:
        """Train the hosted clients of the cohort and add each one's term; nothing is sent."""
        began, self._ready = time.monotonic(), 0
        self.keep(plan.kept)
        if self.overlap is not None:
            self.aggregator = self.overlap.aggregator(plan.round)
        self.aggregator.begin(self._bounds(plan), self.schedule.moments(plan.round))
        if self.rows is not None:
            self.rows.begin(self.schedule.averages_rows(plan.round))
        self.terms.begin(self.placement.turns(plan.cohort), self.aggregator)
        if self.secure is not None:
            self.secure.begin(plan, self.global_model)
            self.secure.make_ahead(*self.aggregator.layout)
        weights = dict(zip(plan.cohort, plan.weights, strict=True))
        self.store.begin(plan.round)
        turns = self._hosted(plan.cohort)
        reports = []
        for turn, index in enumerate(turns, 1):
            client = self.clients.get(index) or self._new_client(index)
            client.load_state(self.store.checkout(index))
            if turn < len(turns):
                self.store.prefetch(turns[turn])
            reports.append(self._train_client(client, weights[index], plan))
            self.store.checkin(index, client.release_state())
        self._trained = reports
        self._added = [report.client for report in reports if not report.left_out]
        self._ready = plan.round
        return WorkerReport([] if self.config.sites or self.config.dp == "client" else reports,
                            bytes=len(reports) * self._bytes_of_client,
                            local_training_seconds=time.monotonic() - began)

    @property
    def _bytes_of_client(self) -> int:
        """Payload of this round for a client that has a worker to itself, there and back."""
        rows = 0 if self.rows is None else 2 * self.rows.bytes_sent
        return self.aggregator.bytes_sent + self.aggregator.bytes_received + rows

    def _hosted(self, cohort: list[int]) -> list[int]:
        """The clients of a cohort that train here: those whose states are here; without states, an
        equal part."""
        if self.config.keeps_states:
            return [k for k in cohort if k in self.clients]
        return self.placement.turns(cohort)[self._index]

    def _train_client(self, client: Client, planned: float, plan: RoundPlan) -> ClientReport:
        """One client's part of a round: train, measure its model, add its term."""
        origin = self.global_state.shared  # what its update is the difference from
        own = None if plan.start_from_global else client.vectors.get("parameters")
        if self.overlap is not None:
            own = origin = self.overlap.start(client, plan.round > 1 and client.index
                                              in self.schedule.cohort(plan.round - 1))
        client.begin_round(self.global_model, own)
        hidden = self.noise if isinstance(self.noise, SequenceNoise) else None
        gradients = None if hidden is None else hidden.gradients
        if self.strategy.trains:
            moments = self.config.client_moments
            if moments == "reset" or (moments == "reset_epoch"
                                      and self.schedule.in_epoch(plan.round) == 0):
                client.optimizer.reset()
            if self.global_state.moments is not None:
                averaged_moments.load(client.optimizer, self.global_state.moments, plan.first_step,
                                      self.schedule.moments(plan.round - 1))
            if self.rows is not None and plan.round > 1 and (
                    self.schedule.averages_rows(plan.round - 1)
                    or client.index not in self.schedule.cohort(plan.round - 1)):
                self.rows.scale(client)
            if self.fisher is not None:
                self.fisher.begin()
            if hidden is not None:
                hidden.begin(client, plan.round)
            losses = client.train(self.model, plan.steps, plan.first_step, self._check_peers,
                                  anchor=origin, prox_mu=self.config.prox_mu,
                                  fisher=self.fisher, gradients=gradients)
        else:
            self._check_peers()
            if hidden is not None:
                hidden.begin(client, plan.round)
            losses = client.gradient(self.model, gradients)
        if hidden is not None:
            hidden.note_steps(client)
        if self.config.sync == "epoch":
            client.keep_parameters()
        report = ClientReport(client.index, losses.tokens, losses.loss_sum.item(),
                              self.measures.entropy(client))
        if plan.evaluate:
            report = self.measures.add(client, report, plan.round)
        report = self.terms.add(client, planned, plan, report, origin,
                                self.noise if self.config.dp == "client" else None)
        if report.left_out:
            client.forget()
        else:
            client.keep_personal()
            if self.overlap is not None:
                self.overlap.keep(client, origin, report.weight)
        if hidden is not None:  # of its text nothing is known but how long it is
            report = replace(report, tokens=0, noised_norm=hidden.gradients.norm)
        return report

    # ---- aggregation -----------------------------------------------------------------------------

    def aggregate(self, plan: RoundPlan) -> RoundReport:
        """Workers: sum the terms and update the global model, unless the sum cannot be used.

        PlanRefused unless this worker has trained all its clients in this round, whatever the
        server has decided: beside the round's sum, one without some of them would show their terms.
        """
        if plan.round != self._ready:
            raise PlanRefused(f"round {plan.round}: the server continues, but this worker has not "
                              "trained its clients")
        began = time.monotonic()
        tail = self._sum(plan) if self.overlap is None else None
        words = tail.words() if tail is not None and self._index == 0 else []
        if tail is not None and tail.diverged:
            return RoundReport(tail=words, failure="diverged")
        if not plan.last and (turns := self._hosted(self.schedule.cohort(plan.round + 1))):
            self.store.prefetch(turns[0])
        context, state = self._server_round(plan.round), self.global_state
        if self.rows is not None:
            self.rows.renew(self.aggregator.total_weight())
        measured = self.server_update.apply(
            state.model, state.server, context, state.moments, measure=plan.evaluate
            ) if self.overlap is None else self.overlap.aggregate(context, plan)
        return RoundReport(aggregation_seconds=time.monotonic() - began, measured=measured,
                           tail=words, used=self.terms.used,
                           charged=self.noise is not None and self.noise.charged)

    def _sum(self, plan: RoundPlan) -> Tail | None:
        """Workers: sum the terms; in runs with sites also what the server records of the clients.
        RoundRefused on all of them if no sum is made."""
        secure, aggregator = self.secure, self.aggregator
        if secure is not None:
            secure.count(self._added)
            aggregator.masks = secure.vector_masks(aggregator.collectives, aggregator.layout[1])
        if self.noise is not None:
            self.noise.add_to(aggregator, plan, self.global_model)
        aggregator.reduce()
        if self.rows is not None:
            self.rows.reduce(secure)
        if not self.config.sites or self.config.dp == "client":
            return None
        own = Tail.of(self._trained, len(plan.cohort))
        return Tail.from_words(self.runtime.data_plane.sum_words(
            own.words(), None if secure is None else secure.mask(TAIL, 64)))

    # ---- evaluation and checkpoints --------------------------------------------------------------

    def evaluate(self, report: RoundReport) -> RoundReport:
        """Evaluate the global model on this worker's part of the validation split, and with the
        other workers on what the sites hold out."""
        began = time.monotonic()
        self.flat.vector.copy_(self.global_model)
        losses = self._validate(self._index, len(self.runtime.workers))
        if self.config.site_holdout is not None:
            assert self.secure is not None
            words = sum_of_sites(self.secure, self.shards.held_out, self.model, self.runtime.device,
                                 self._check_peers)
            report = replace(report, site_losses=words if self._index == 0 else [])
        return replace(report, validation=losses, evaluation_seconds=time.monotonic() - began)

    def _validate(self, part: int, parts: int) -> list[Piece]:
        return validation_pieces(self.model, self.data.validation, self.runtime.device, part, parts,
                                 self._check_peers)

    def check_replicas(self, report: RoundReport, saves: bool = False) -> RoundReport:
        """Digests of all that every worker holds (see replicas.py), from the workers that hold a
        replica of their own. saves: with --overlap, of the sum that a checkpoint will hold too."""
        first = self.runtime.data_plane.node_rank == 0
        held = self.overlap.held(first) if saves and self.overlap is not None else {}
        if not first:
            return report
        state = self.global_state.replicated()
        return replace(report, replicas=replicas.digests(state | held),
                       not_finite=replicas.not_finite(state))

    def save(self, plan: RoundPlan) -> None:
        """Workers: start to write this worker's files of a checkpoint, with everything as it is
        now."""
        self.aggregator.complete()
        first = self._index == 0 if self.site_states is None else self.site_states.process == 0
        held = {} if self.overlap is None else self.overlap.held(first)
        files = {GLOBAL: self.global_state.named() | held} if first else {}
        self.store.save(self.checkpoint_writer, self.folders.step(plan.round), plan.round, files)

    def announce_state(self, report: RoundReport) -> RoundReport:
        """In a run of real sites, in a round that is saved, with what the first worker sends next:
        the global state."""
        if self.site_states is None or self._index > 0:
            return report
        return replace(report, state=layout(self.global_state.named()))

    def keep(self, steps: list[int]) -> None:
        """At a real site: keep the states of these steps alone."""
        if self.site_states is not None:
            self.site_states.keep(steps)

    def finish(self, plan: RoundPlan) -> RoundReport:
        """After the last round: save it, if that is planned, and wait until all is written."""
        if plan.save and plan.last:
            self.save(plan)
        report = RoundReport(written=self.checkpoint_writer.written(wait=True))
        self.store.close(self.config.timeout)
        return report

    def _check_peers(self) -> None:
        if self.runtime.control.peer_failed():
            raise PeerFailed
