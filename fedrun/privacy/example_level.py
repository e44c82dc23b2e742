"""The Gaussian mechanism of a local step that protects a sequence: grid, sensitivity, noise, cost.

A step is that of DP-SGD (Abadi et al. 2016, "Deep Learning with Differential Privacy"): each
sequence of a client is in it with the same probability, drawn in secret and for itself; gradients
are clipped one by one, rounded to a grid of s steps a unit, and summed; integer noise is added; and
the denominator is fixed, however many there were. Neighbours: one sequence's gradients replaced by
zeros (how many sequences a client has is public), in all steps. What is made of the noised
gradients, an update or a moment, costs nothing more.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, ClassVar

from fedrun.common.errors import InputError, require
from fedrun.privacy.accountant import (
    example_epsilon,
    example_noise_for,
    grid_variance,
    require_accounting,
)
from fedrun.privacy.client_level import ROUNDING, SMALLEST_SIGMA, participations, sampler_of
from fedrun.privacy.discrete_gaussian import WIDEST, DiscreteGaussian

GRID_BITS = 26
"""Bits of the clip, or of the noise's standard deviation if that is more, in grid steps: as many as
the sampler of the noise can give, and two more than a gradient in fp32 has. A sum has 64 bits: it
holds 2^36 sequences."""
OF_SAMPLER = 1e-6
"""Share of --dp_delta that is kept for the sampler, which is not exactly the discrete Gaussian."""


def multiplier(config: Any, rounds: int, sizes: Sequence[int]) -> float:
    """The noise multiplier of a run of this many rounds: --dp_noise, or what --dp_epsilon leads to
    where a client has the smallest shard and trains as often as any.

    config: a FederatedConfig with --dp example; sizes: of the shards, in sequences. InputError for
    a --dp_delta that is too large, and where the package is missing that computes what noise costs.
    """
    require_accounting()
    largest = max(sizes)
    require(config.dp_delta < 1 / largest, "--dp_delta", f"{config.dp_delta:g}",
            f"below 1/{largest} with --dp example, whose largest shard has that many sequences: at "
            "more, to publish one of them would count as private")
    if config.dp_noise is not None:
        return float(config.dp_noise)
    steps = config.local_updates * participations(rounds, config.num_clients, config.cohort_size)
    return _noise_for(config.dp_epsilon, config.dp_delta, config.batch_size / min(sizes), steps)


@functools.lru_cache(maxsize=16)
def _noise_for(epsilon: float, delta: float, rate: float, steps: int) -> float:
    """In whole millionths, so that the last bits of other processors make no other run."""
    noise = example_noise_for(epsilon, (1 - OF_SAMPLER) * delta, rate, steps)
    noise = math.ceil(noise * 1e6) / 1e6
    while _epsilon(noise, rate, steps, delta) > epsilon:
        noise = math.ceil(noise * 1.0001 * 1e6) / 1e6
    return noise


@functools.lru_cache(maxsize=256)
def _epsilon(noise: float, rate: float, steps: int, delta: float) -> float:
    return example_epsilon(noise, rate, steps, (1 - OF_SAMPLER) * delta)


@dataclass(frozen=True)
class ExampleLevel:
    """The mechanism of every local step of a run."""

    clip: float
    noise: float
    """The multiplier Z: sigma in units of the sensitivity."""
    size: int
    """Elements D of the model."""
    batch_size: int
    """The denominator: how many sequences are in a step on average."""
    steps: int
    """Local steps of a client in a round."""
    rates: tuple[float, ...]
    """For each client, the probability with which a sequence is in a step: batch_size over the
    sequences of its shard."""
    unit: ClassVar[str] = "sequence"

    @property
    def scale(self) -> float:
        """Grid steps of one, a power of two: products with it are exact."""
        return 2.0 ** (GRID_BITS - math.ceil(math.log2(self.clip * max(1.0, self.noise))))

    @property
    def sensitivity(self) -> float:
        """How far, in L2 norm and grid steps, the sum of a step moves if one sequence's gradient
        becomes zero: by its clipped gradient, and half a step for each of D elements that are
        rounded."""
        return self.clip * self.scale * (1 + ROUNDING) + math.sqrt(self.size) / 2

    @property
    def variance(self) -> Fraction:
        """Of the noise of an element of the sum, in squared steps: a whole number, rounded up, that
        may be charged as continuous noise. InputError if the grid cannot have it."""
        sigma = self.noise * self.sensitivity
        if not SMALLEST_SIGMA <= sigma < WIDEST:
            larger = "larger" if sigma < WIDEST else "smaller"
            raise InputError(f"--dp_noise {self.noise:g}, or what --dp_epsilon leads to: must be "
                             f"{larger}: the noise would be {sigma:.2g} steps of the grid, which "
                             f"takes from {SMALLEST_SIGMA:g} to {WIDEST:.2g}")
        return Fraction(math.ceil(grid_variance(self.noise, self.sensitivity)))

    @property
    def sampler(self) -> DiscreteGaussian:
        """Draws the noise of an element, in steps."""
        return sampler_of(self.variance)

    @property
    def distance(self) -> float:
        """Statistical distance of the noise of a round of a client from the discrete Gaussian."""
        return self.steps * self.size * self.sampler.distance

    @property
    def element(self) -> float:
        """Standard deviation of the noise of an element of a step's mean gradient."""
        return math.sqrt(self.variance) / self.scale / self.batch_size

    def sampled(self, cohort: Sequence[int]) -> tuple[tuple[float, ...], int]:
        """What a release has besides its cohort and multiplier: these clients' rates, their steps.
        """
        return tuple(self.rates[client] for client in cohort), self.steps

    def spent(self, delta: float) -> SpentOnSequences:
        """What nothing has cost yet. delta: --dp_delta."""
        return SpentOnSequences(self, delta)

    def snr(self, norm: float) -> float:
        """Signal-to-noise ratio of a step whose mean gradient, with its noise, has this norm."""
        noise = self.element * math.sqrt(self.size)
        return math.sqrt(max(0.0, norm**2 - noise**2)) / noise


Cost = tuple[float, float, int]
"""Noise multiplier, rate, and steps of a client."""


class SpentOnSequences:
    """What the releases so far have cost the sequences of each client. No sequence is of two
    clients, so that the largest counts.

    Where the steps of a client had different noise or rates, all count as having had the least
    noise and the highest rate.
    """

    def __init__(self, level: ExampleLevel, delta: float) -> None:
        self.by_client: dict[int, Cost] = {}
        self.releases = 0
        self._level, self._delta = level, delta

    def add(self, cohort: Iterable[int], noise: float, rates: Sequence[float] = (), steps: int = 1
            ) -> None:
        """These clients made this many steps, with this noise multiplier and these rates."""
        self.releases += 1
        for client, rate in zip(cohort, rates, strict=True):
            least, highest, before = self.by_client.get(client, (noise, rate, 0))
            self.by_client[client] = min(least, noise), max(highest, rate), before + steps

    def after(self, noise: float, *cohorts: Sequence[int]) -> SpentOnSequences:
        """What it would be after a round of each of these cohorts too."""
        found = SpentOnSequences(self._level, self._delta)
        found.by_client, found.releases = dict(self.by_client), self.releases
        for cohort in cohorts:
            found.add(cohort, noise, *self._level.sampled(cohort))
        return found

    def over(self, limit: float) -> bool:
        """Whether it is more than this epsilon. Asked again and again, it computes little."""
        return any(_limit(noise, rate, self._delta, limit).passed_by(steps)
                   for noise, rate, steps in self._worst()) or not self._sampled_well(limit)

    @property
    def epsilon(self) -> float:
        """Of the sequences that have paid most, at --dp_delta; infinite if that is more than the
        noise as it is drawn can vouch for."""
        found = max((_epsilon(noise, rate, steps, self._delta)
                     for noise, rate, steps in self._worst()), default=0.0)
        return found if self._sampled_well(found) else math.inf

    def _sampled_well(self, epsilon: float) -> bool:
        """Drawing from another distribution costs (1 + e^epsilon) its distance."""
        return (epsilon < 600 and (1 + math.exp(epsilon)) * self.releases * self._level.distance
                <= OF_SAMPLER * self._delta)

    def _worst(self) -> Iterator[Cost]:
        """Those that no other is worse than in all respects: among clients with the same noise, a
        lower rate counts only with more steps."""
        most: dict[float, int] = {}
        for noise, rate, steps in sorted(set(self.by_client.values()), key=lambda cost: (
                cost[0], -cost[1], -cost[2])):
            if steps > most.get(noise, 0):
                most[noise] = steps
                yield noise, rate, steps


class _Limit:
    """The steps that cost no more than an epsilon, found out as far as it is asked for."""

    def __init__(self, noise: float, rate: float, delta: float, limit: float) -> None:
        self._within, self._beyond = 0, math.inf
        self._noise, self._rate, self._delta, self._epsilon = noise, rate, delta, limit

    def passed_by(self, steps: int) -> bool:
        """Whether this many steps cost more. Epsilon grows with them: each answer counts for all
        that are fewer, or more, and in between the middle is asked first."""
        while self._within < steps < self._beyond:
            asked = steps
            if self._beyond < math.inf:
                asked = max(steps, (self._within + int(self._beyond)) // 2)
            if _epsilon(self._noise, self._rate, asked, self._delta) > self._epsilon:
                self._beyond = asked
            else:
                self._within = asked
        return steps >= self._beyond


_limit = functools.lru_cache(maxsize=64)(_Limit)
