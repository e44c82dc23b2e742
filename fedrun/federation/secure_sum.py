"""Secure sums: what a site does besides, so that all others see sums over the sites and no term.

Before it trains it holds the server's plan against its own; before anything of a round is sent it
has the round in its journal; and it masks what it sends, so that only the sum over all sites is
left. One masked word comes first, the number of sites with a term. It also shows whether the masks
cancel: if not, it would be one of 0 to the number of sites only by a chance of some in 2^64.

    secure.begin(plan, model)                       # before training
    secure.make_ahead(size, 32)                     # during training, where a core is free
    secure.count(clients)                           # after it: site <-> site
    aggregator.masks = secure.vector_masks(1, 32)   # for the sums that follow

In a simulation of sites there is nobody to hide from, and nothing is masked; a round is refused for
the same reasons, so that it ends as it would with sites.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import psutil
from torch import Tensor

from fedrun.common.errors import FedrunError
from fedrun.common.limits import machine_memory
from fedrun.config import FederatedConfig
from fedrun.data.sites import Sites
from fedrun.distributed.data_plane import DataPlane, Mask
from fedrun.federation.messages import RoundPlan
from fedrun.federation.schedule import Schedule
from fedrun.federation.site_keys import JournalRefused, RoundRefused
from fedrun.secure import fewest_sites
from fedrun.strategies.base import ClientReport

if TYPE_CHECKING:
    from fedrun.federation.site_keys import Leader

LARGEST_SHARE = 0.9
"""Of a round's weights, that one site may have: of more, the sum would be nearly its term."""
COUNT, VECTOR, ROWS, TAIL, HOLDOUT = "count", "vector", "rows", "tail", "holdout"
"""The masked sums of a round, in this order; the third with --client_moments average_rows, the last
in evaluated rounds with --site_holdout. A method that sums the vectors again has more of the second
kind (`vector_masks`)."""
REFUSED = "refused"
"""In place of the first, from a site that refuses the round."""
MEMORY_SHARE = 1 / 8
"""Of the machine's free memory, that a mask which is made ahead may take."""
SERVERS = ("evaluate", "save", "last", "stop", "kept")
"""What the server alone decides of a plan: nothing of the sum depends on it."""


class TooFewSites(RoundRefused):
    """Too few sites have a finite update for the sum to hide each of them."""

    code = "few"


class MasksRefused(RoundRefused):
    """The masks of the sites do not cancel."""

    code = "masks"


class PlanRefused(FedrunError):
    """The server's plan is not that of the settings, or no sum that would hide a site's term."""

    code = "plan"


class SecureSum:
    """A worker's part in the secure sums of a run."""

    def __init__(self, config: FederatedConfig, sites: Sites, schedule: Schedule, vocab_size: int,
                 plane: DataPlane, done: int, leader: Leader | None = None, processes: int = 1
                 ) -> None:
        """done: rounds before the first that is to come. leader: on the first worker of each site;
        None on the others, and in a simulation. processes: of the run, on this machine."""
        self.config, self.sites, self.schedule, self.plane = config, sites, schedule, plane
        self.leader = leader
        plane.masked = leader is not None
        self._reference = config.strategy.first_entropy_reference(vocab_size, config.cohort_size)
        self._processes = processes
        self._fewest = fewest_sites(config.strategy.reweighted)
        self._round = done
        self._plan: RoundPlan | None = None

    def begin(self, plan: RoundPlan, model: Tensor) -> None:
        """Before training: PlanRefused unless the plan is the next round's, and one whose sum hides
        each site's term. model: the global model, (size,)."""
        self._require_planned(plan)
        self._require_hidden(plan)
        self._require_fitting(plan)
        self._round, self._plan = plan.round, plan
        if self.leader is not None:
            self.leader.begin(model)

    def make_ahead(self, size: int, bits: int) -> None:
        """After `begin`: make the mask of the round's vector of this many integers beside the
        training. Not where the clients' threads have all cores that this process may use, nor where
        the mask, as long as the vector (4 or 8 bytes an element), is much of the free memory: then
        it is made when it is added, piece by piece.

        Sites whose processes share a machine do not see each other's threads.
        """
        if self.leader is None:
            return
        free_cores = len(os.sched_getaffinity(0)) - self._processes * self.config.threads
        free_memory = min(psutil.virtual_memory().available, machine_memory())
        if free_cores > 0 and size * bits // 8 <= MEMORY_SHARE * free_memory:
            self.leader.make_ahead(self._round, VECTOR, size, bits)

    def close(self) -> None:
        """At the end of a run, also by an error: the thread makes no more masks."""
        if self.leader is not None:
            self.leader.close()

    def _require_planned(self, plan: RoundPlan) -> None:
        """The settings alone decide who trains in a round, from what and with which weights."""
        number = self._round + 1
        own = self.schedule.plan(number, self._reference)
        for name in (each.name for each in dataclasses.fields(plan)):
            theirs, ours = getattr(plan, name), getattr(own, name)
            if name not in SERVERS and theirs != ours:
                raise PlanRefused(f"round {number}: the server's plan has {name} {theirs}, but the "
                                  f"settings give {ours}")

    def _require_hidden(self, plan: RoundPlan) -> None:
        shares: dict[str, float] = {}
        for client, weight in zip(plan.cohort, plan.weights, strict=True):
            owner = self.sites.site_of(client)
            shares[owner] = shares.get(owner, 0.0) + weight
        if len(shares) < self._fewest:
            raise PlanRefused(f"round {plan.round}: its clients are of {len(shares)} sites "
                              f"({', '.join(shares)}); must be of {self._fewest} at least")
        largest = max(shares, key=lambda name: shares[name])
        share = shares[largest] / math.fsum(plan.weights)
        if share > LARGEST_SHARE:
            raise PlanRefused(f"round {plan.round}: {largest} has {share:.3g} of the weights; must "
                              f"be at most {LARGEST_SHARE}, or the sum is nearly its own")

    def _require_fitting(self, plan: RoundPlan) -> None:
        """Masked sums wrap around by design: the sum of all terms has to fit by itself."""
        config, strategy = self.config, self.config.strategy
        tokens = plan.steps * config.batch_size * (config.sequence_length - 1)
        most = math.fsum(strategy.client_weight(weight, ClientReport(client, tokens, 0.0),
                                                plan.entropy_reference)
                         for client, weight in zip(plan.cohort, plan.weights, strict=True))
        fits = 2.0**strategy.weight_headroom
        if not most <= fits * (1 + 1e-9) or len(plan.cohort) >= 1 << 29:
            raise PlanRefused(f"round {plan.round}: its weights may sum to {most:g}, more than the "
                              f"{fits:g} that the integers of the sum have room for")

    def count(self, clients: Sequence[int]) -> None:
        """Workers: how many sites have a term in the sum. RoundRefused on all of them if they are
        too few, or if one of them must not take part. With --dp client all have one, of noise: who
        is finite nobody hears of.

        clients: those of this worker whose terms are in the sum.
        """
        assert self._plan is not None
        private = self.config.dp == "client"
        finite = [sum(k in self.sites.clients_of(name) for k in clients)
                  for name in self.sites.names]
        if not self.plane.of_site:
            if private:
                return
            self._require_enough(sum(count > 0 for count in self.plane.sum_words(finite)))
            return
        own = private or any(self.plane.sum_in_site(finite))
        refused, mask = None, None
        if self.leader is not None:
            try:
                self.leader.record(self._plan, self._plan.first_step,
                                   self.config.strategy.reweighted)
                mask = self.mask(COUNT, 64)
            except JournalRefused as error:
                # The others wait for a word. Under another mask nothing cancels, and if all refuse
                # the sum is below zero: they see it, and send no more.
                refused, mask = error, self.mask(REFUSED, 64)
        word = 0 if self.leader is None else -1 if refused else int(own)
        found, = self.plane.sum_words([word], mask)
        if refused is not None:
            raise refused
        count = len(self.sites.sites)
        if not (count if private else 0) <= found <= count:
            raise MasksRefused("the masks of the sites do not cancel: one of them refuses the sum, "
                               "or has other keys")
        self._require_enough(found)

    def _require_enough(self, found: int) -> None:
        if found < self._fewest:
            raise TooFewSites(f"{found} sites have a finite update; a sum needs {self._fewest}")

    def vector_masks(self, sums: int, bits: int) -> list[Mask | None]:
        """This site's masks for this many sums of vectors in the round, each of a name of its own.
        """
        return [self.mask(VECTOR if number == 1 else f"{VECTOR} {number}", bits)
                for number in range(1, sums + 1)]

    def mask(self, name: str, bits: int) -> Mask | None:
        """This site's mask for one of the round's sums, of integers of 32 or 64 bits; None where
        another worker masks."""
        return None if self.leader is None else self.leader.mask(self._round, name, bits)

