"""The Gaussian mechanism of a round that protects a client: grid, sensitivity, noise, its cost.

A round releases the sum over a cohort of K clipped updates, each times 1/K and rounded to a grid of
s steps a unit, plus integer noise. Neighbours: one client's term replaced by zero (who trains when,
and how much text each has, are public). The denominator is K, whoever is missing, so that the sum
moves by the term alone (McMahan et al. 2018, "Learning Differentially Private Recurrent Language
Models", with a fixed denominator and cohorts that are not drawn in secret).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, ClassVar

from fedrun.common.errors import InputError
from fedrun.privacy.accountant import (
    gaussian_epsilon,
    grid_variance,
    noise_for,
    zcdp_noise_for,
)
from fedrun.privacy.discrete_gaussian import DiscreteGaussian

GRID_BITS = 30
"""Bits of the largest element of a sum on the grid, one of 32 to spare."""
ROUNDING = 2.0**-20
"""More than fp32 adds to the norm of a scaled update: four roundings of 2^-24 each, of the factor
that clips, of the clipped element, of the factor that scales to the grid, of the scaled element."""
TAIL = 8.0
"""Standard deviations of noise that the grid has room for; its spare bit has as many again."""
SMALLEST_SIGMA = 10.0
"""In grid steps: what `accountant.grid_variance` adds for the grid is then a fiftieth of it."""
OF_SAMPLER = 0.01
"""Share of --dp_delta that --dp_epsilon keeps for the sampler, which is not exactly the discrete
Gaussian: noise follows before the size of the model is known. More is never charged than spent."""
ROOM = 0.125
"""Most that rounding to the grid may add to the sensitivity, as a share of it."""


def participations(rounds: int, clients: int, cohort: int) -> int:
    """Most rounds that one client trains in, of this many, by the balanced schedule."""
    return -(-rounds * cohort // clients)


def multiplier(config: Any, rounds: int) -> float:
    """The noise multiplier of a run of this many rounds: --dp_noise, or what --dp_epsilon leads to.

    config: a FederatedConfig with --dp client.
    """
    if config.dp_noise is not None:
        return float(config.dp_noise)
    needed = noise_for if config.sites is None else zcdp_noise_for  # see shares.py
    return needed(config.dp_epsilon, (1 - OF_SAMPLER) * config.dp_delta,
                  participations(rounds, config.num_clients, config.cohort_size))


def update_bound(clip: float, noise: float, cohort: int) -> float:
    """No element of a round's mean is larger, noise included: what fixes the grid of the sum."""
    return clip * (1 + ROUNDING + TAIL * noise * (1 + ROUNDING + ROOM) / cohort)


sampler_of = functools.lru_cache(maxsize=2)(DiscreteGaussian)
"""One for all rounds, and for all runs of a process: its tables take most of a second."""


@dataclass(frozen=True)
class ClientLevel:
    """The mechanism of one round."""

    clip: float
    noise: float
    """The multiplier Z: sigma in units of the sensitivity."""
    cohort: int
    """Clients K in a round."""
    size: int
    """Elements D of the model."""
    unit: ClassVar[str] = "client"

    @property
    def spread(self) -> float:
        """Standard deviation of the sum's noise, in units of the sensitivity."""
        return self.noise

    @property
    def scale(self) -> float:
        """Grid steps of one, a power of two, as the aggregator makes it of the round's bound."""
        bound = update_bound(self.clip, self.spread, self.cohort)
        return 2.0 ** (GRID_BITS - math.ceil(math.log2(bound)))

    @property
    def sensitivity(self) -> float:
        """How far, in L2 norm and grid steps, the sum moves if one client's term becomes zero: by
        its clipped update, and half a step for each of D elements that are rounded. If the term
        becomes another, at most twice as far."""
        return self.clip / self.cohort * self.scale * (1 + ROUNDING) + math.sqrt(self.size) / 2

    @property
    def variance(self) -> Fraction:
        """Of the noise of an element, in squared steps: a whole number, rounded up, that may be
        charged as continuous noise. InputError if the grid is too coarse."""
        flag = f"--dp_noise {self.noise:g}, or what --dp_epsilon leads to"
        if not math.isfinite(update_bound(self.clip, self.noise, self.cohort)):
            raise InputError(f"{flag}: there is no such noise: must be less, or --dp_epsilon or "
                             "--dp_delta more")
        sigma = self.noise * self.sensitivity
        if sigma < SMALLEST_SIGMA:
            raise InputError(f"{flag}: must be larger: the noise would be {sigma:.2g} steps of the "
                             f"grid, and needs {SMALLEST_SIGMA:g}")
        if math.sqrt(self.size) / 2 > ROOM * self.clip / self.cohort * self.scale:
            cause = "with so much noise"
            if self.cohort > TAIL * self.noise:
                flag, cause = f"--cohort {self.cohort}", "for so many clients"
            raise InputError(f"{flag}: must be smaller: {cause} the grid of the sum is too coarse")
        return Fraction(math.ceil(grid_variance(self.noise, self.sensitivity)))

    @property
    def sampler(self) -> DiscreteGaussian:
        """Draws the noise of an element, in steps."""
        return sampler_of(self.variance)

    @property
    def distance(self) -> float:
        """Statistical distance of a round's noise from the discrete Gaussian."""
        return self.size * self.sampler.distance

    @property
    def element(self) -> float:
        """Standard deviation of the noise of an element of the mean."""
        return math.sqrt(self.variance) / self.scale

    def spent(self, delta: float) -> Spent:
        """What nothing has cost yet. delta: --dp_delta."""
        return Spent(delta, self.distance)

    def sampled(self, cohort: Sequence[int]) -> tuple[()]:
        """What a release has besides its cohort and multiplier: nothing."""
        return ()

    def snr(self, norm: float, rounds: float = 1) -> float:
        """Signal-to-noise ratio of the sum of this many rounds' means, whose norm this is: the norm
        of the signal in it, estimated, over that of the noise."""
        noise = self.element * math.sqrt(rounds * self.size)
        return math.sqrt(max(0.0, norm**2 - noise**2)) / noise


class Spent:
    """What the releases so far have cost each client: mu^2 of the Gaussian mechanism that they
    compose to (Dong, Roth & Su 2022), the sum of 1/Z^2."""

    def __init__(self, delta: float, distance: float, spent: Mapping[int, float] | None = None,
                 releases: int = 0) -> None:
        """delta: --dp_delta. distance: statistical distance of one sum's noise from the discrete
        Gaussian. spent: mu^2 by client; releases: how many sums that was."""
        self.by_client, self.releases = dict(spent or {}), releases
        self._delta, self._distance = delta, distance

    def add(self, cohort: Iterable[int], noise: float, rates: Sequence[float] = (), steps: int = 1
            ) -> None:
        """A sum over these clients was released, with this noise multiplier. rates, steps: of a
        release that is of sequences, and never here."""
        assert not rates
        self.releases += 1
        for client in cohort:
            self.by_client[client] = self.by_client.get(client, 0.0) + noise**-2

    def after(self, noise: float, *cohorts: Iterable[int]) -> Spent:
        """What it would be after sums over these cohorts too."""
        found = type(self)(self._delta, self._distance, self.by_client, self.releases)
        for cohort in cohorts:
            found.add(cohort, noise)
        return found

    def over(self, limit: float) -> bool:
        """Whether it is more than this epsilon."""
        return self.epsilon > limit

    @property
    def epsilon(self) -> float:
        """Of the client that has paid most, at --dp_delta; infinite if that is more than the noise
        as it is drawn can vouch for."""
        most = max(self.by_client.values(), default=0.0)
        if most == 0:
            return 0.0
        return gaussian_epsilon(math.sqrt(most), self._delta, self.releases * self._distance)
