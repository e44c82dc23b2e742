"""How what a client has trained gets into a worker's part of a round's sum."""

from __future__ import annotations

import math
from dataclasses import replace

from torch import Tensor

from fedrun.aggregation.base import Aggregator
from fedrun.aggregation.bounds import bound_exceeded
from fedrun.aggregation.clipping import shorten_
from fedrun.aggregation.slices import max_abs, norm
from fedrun.config import FederatedConfig
from fedrun.federation.client import Client
from fedrun.federation.global_state import GlobalState
from fedrun.federation.messages import RoundPlan
from fedrun.federation.noise import Noise
from fedrun.federation.reported import reported_vectors
from fedrun.strategies.base import ClientReport
from fedrun.training.fisher import FisherEstimate


class Terms:
    """Adds the terms of a worker's clients, clipped where that is asked for.

        report = terms.add(client, planned, plan, report)    # for each client, after its training
        terms.add_waiting(clip)                              # before the sum
    """

    def __init__(self, config: FederatedConfig, aggregator: Aggregator, state: GlobalState,
                 fisher: FisherEstimate | None) -> None:
        self.config, self.aggregator, self.state, self.fisher = config, aggregator, state, fisher
        self._waiting: list[tuple[Tensor, float, float]] = []  # update, norm, weight

    def begin(self) -> None:
        """Before a round's first client."""
        self._waiting.clear()

    def add(self, client: Client, planned: float, plan: RoundPlan, report: ClientReport,
            noise: Noise | None = None) -> ClientReport:
        """Add a client's term; returns its report with its weight and norm, or with the reason why
        it is left out. noise: with --dp client."""
        if noise is not None:
            self._add_private(client, planned, noise)
            return report
        if report.entropy is not None and not math.isfinite(report.entropy):
            return replace(report, entropy=None, left_out="entropy not finite")
        try:
            weight = self.config.strategy.client_weight(planned, report, plan.entropy_reference)
        except ValueError as error:
            return replace(report, left_out=str(error))
        if self.config.client_clip is not None:
            return self._add_clipped(client, weight, plan, report)
        vectors = reported_vectors(client, self.config.strategy, self.aggregator,
                                   self.state.moments is not None, self.fisher)
        if left_out := self.aggregator.add(vectors, weight, start=self.state.model):
            return replace(report, left_out=left_out)
        report = replace(report, weight=weight)
        if not plan.evaluate:
            return report
        first = next(iter(vectors))
        origin = self.state.model if first == "parameters" else None
        return replace(report, norm=norm(vectors[first], origin))

    def _add_private(self, client: Client, weight: float, noise: Noise) -> None:
        """With --dp client: add its update, clipped; zeros for one that is not finite, of which
        nobody hears."""
        update = client.flat.vector.sub_(self.state.model)
        if not noise.clip(client.index, update):
            client.forget()
        self._add_update(update, weight)

    def _add_clipped(self, client: Client, weight: float, plan: RoundPlan, report: ClientReport
                     ) -> ClientReport:
        """With --client_clip. What exceeds the round's bound is not clipped but left out, as it is
        without: such a client is broken, and is to be seen."""
        update = client.flat.vector.sub_(self.state.model)
        bound = plan.bound if self.config.aggregation == "exact" else math.inf
        if left_out := bound_exceeded("delta", max_abs(update), bound):
            return replace(report, left_out=left_out)
        length, longest = norm(update), self.config.longest_update
        if longest is None:  # the median, which is known once all have trained
            self._waiting.append((update.clone(), length, weight))
            return replace(report, weight=weight, norm=length)
        used = shorten_(update, length, longest)
        self._add_update(update, weight)
        return replace(report, weight=weight, used=used,
                       norm=used * length if plan.evaluate else None)

    def add_waiting(self, clip: float | None) -> None:
        """With --client_clip median, once it is known: add the updates that wait for it."""
        for update, length, weight in self._waiting:
            assert clip is not None
            shorten_(update, length, clip)
            self._add_update(update, weight)
        self._waiting.clear()

    def _add_update(self, update: Tensor, weight: float) -> None:
        left_out = self.aggregator.add({"delta": update}, weight)
        assert not left_out, left_out
