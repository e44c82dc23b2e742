"""How what a client has trained gets into a worker's part of a round's sum."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fedrun.aggregation.base import Aggregator
from fedrun.aggregation.bounds import bound_exceeded
from fedrun.aggregation.clipping import shorten_
from fedrun.aggregation.keeping import KeepingAggregator
from fedrun.aggregation.slices import max_abs, norm, subtract_
from fedrun.config import FederatedConfig
from fedrun.federation.client import Client
from fedrun.federation.global_state import GlobalState
from fedrun.federation.messages import RoundPlan
from fedrun.federation.noise import Noise
from fedrun.federation.reported import reported_vectors
from fedrun.federation.row_averages import RowAverages
from fedrun.strategies.base import ClientReport
from fedrun.training.fisher import FisherEstimate

PERSONAL_NOT_FINITE = "its personal parameters are not finite"


class Terms:
    """Adds the terms of a worker's clients, clipped where that is asked for.

        report = terms.add(client, planned, plan, report)    # for each client, after its training
        terms.add_waiting(clip)                              # before the sum
    """

    def __init__(self, config: FederatedConfig, aggregator: Aggregator, state: GlobalState,
                 fisher: FisherEstimate | None, rows: RowAverages | None = None) -> None:
        self.config, self.aggregator, self.state, self.fisher = config, aggregator, state, fisher
        self._rows = rows
        self._waiting: list[tuple[int, Tensor, float, float]] = []  # client, update, norm, weight

    def begin(self, turns: Sequence[Sequence[int]], aggregator: Aggregator) -> None:
        """Before a round's first client. turns: the clients that each worker trains; aggregator:
        what the round's terms are added to."""
        self._waiting.clear()
        self.aggregator = aggregator
        if isinstance(self.aggregator, KeepingAggregator):
            self.aggregator.expect(turns)

    @property
    def used(self) -> list[list[float]]:
        """After the sum: `RoundReport.used`. With sites nothing of a single client leaves."""
        aggregator = self.aggregator
        if not isinstance(aggregator, KeepingAggregator) or self.config.sites is not None:
            return []
        return [[client, share] for client, share in aggregator.used.items()
                if client in aggregator.kept]

    def add(self, client: Client, planned: float, plan: RoundPlan, report: ClientReport,
            origin: Tensor, noise: Noise | None = None) -> ClientReport:
        """Add a client's term; returns its report with its weight and norm, or with the reason why
        it is left out. origin: what its update is the difference from, (shared_size,): of the
        global model, unless with --overlap. noise: with --dp client."""
        if noise is not None:
            self._add_private(client, planned, noise)
            return report
        own = client.flat.own
        if own.numel() and not bool(torch.isfinite(own).all()):
            return replace(report, left_out=PERSONAL_NOT_FINITE)
        if report.entropy is not None and not math.isfinite(report.entropy):
            return replace(report, entropy=None, left_out="entropy not finite")
        try:
            weight = self.config.strategy.client_weight(planned, report, plan.entropy_reference)
        except ValueError as error:
            return replace(report, left_out=str(error))
        if self.config.client_clip is not None or isinstance(self.aggregator, KeepingAggregator):
            return self._add_checked(client, weight, plan, report)
        if self._rows is not None and (left_out := self._rows.take(client)):
            return replace(report, left_out=left_out)
        vectors = reported_vectors(client, self.config.strategy, self.aggregator, self.fisher)
        if left_out := self.aggregator.add(vectors, weight, start=origin):
            return replace(report, left_out=left_out)
        if self._rows is not None:
            self._rows.add(weight)
        report = replace(report, weight=weight)
        if not plan.evaluate:
            return report
        first = next(iter(vectors))
        return replace(report, norm=norm(vectors[first],
                                         origin if first == "parameters" else None))

    def _add_private(self, client: Client, weight: float, noise: Noise) -> None:
        """With --dp client: add its update, clipped; zeros for one that is not finite, of which
        nobody hears."""
        update = subtract_(client.flat.shared, self.state.shared)
        if not noise.clip(client.index, update):
            client.forget()
        self._add_update(client.index, update, weight)

    def _add_checked(self, client: Client, weight: float, plan: RoundPlan, report: ClientReport
                     ) -> ClientReport:
        """With --client_clip, or for a method that keeps single updates. What exceeds the round's
        bound is not clipped but left out, as it is without: such a client is broken, and is to be
        seen."""
        update = subtract_(client.flat.shared, self.state.shared)
        bound = plan.bound if self.config.aggregation == "exact" else math.inf
        if left_out := bound_exceeded("delta", max_abs(update), bound):
            return replace(report, left_out=left_out)
        report, longest = replace(report, weight=weight), self.config.longest_update
        if self.config.clips_to_median:  # it is known once all have trained
            length = norm(update)
            self._waiting.append((client.index, update.clone(), length, weight))
            return replace(report, norm=length)
        if longest is not None:
            length = norm(update)
            used = shorten_(update, length, longest)
            report = replace(report, clipped=used < 1, used=used, norm=used * length)
        elif plan.evaluate:
            report = replace(report, norm=norm(update))
        self._add_update(client.index, update, weight)
        return report if plan.evaluate else replace(report, norm=None)

    def add_waiting(self, clip: float | None) -> None:
        """With --client_clip median, once it is known: add the updates that wait for it."""
        for client, update, length, weight in self._waiting:
            assert clip is not None
            shorten_(update, length, clip)
            self._add_update(client, update, weight)
        self._waiting.clear()

    def _add_update(self, client: int, update: Tensor, weight: float) -> None:
        if isinstance(self.aggregator, KeepingAggregator):
            self.aggregator.keep(client, update, weight)
            return
        left_out = self.aggregator.add({"delta": update}, weight)
        assert not left_out, left_out
