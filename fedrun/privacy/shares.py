"""The mechanism of a round between sites: each of them adds a share of the noise to its own term,
and only the sum of all terms, with all shares, is read.

Whoever puts together what several sites know can take their shares off. What is left is enough: of
n sites, T + 1 may be among them (T is --dp_colluding), and n - 1 - T shares have the variance that
the noise multiplier asks for. Shares are accounted for as sums of discrete Gaussians (Kairouz, Liu
& Steinke 2021): zero-concentrated differential privacy, whose rho adds up over rounds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

from fedrun.common.errors import InputError
from fedrun.privacy.accountant import zcdp_epsilon, zcdp_of_sum
from fedrun.privacy.client_level import SMALLEST_SIGMA, ClientLevel, Spent


def spread(noise: float, sites: int, colluding: int) -> float:
    """Standard deviation of all shares together, in units of the sensitivity. noise: that of the
    shares which are counted on."""
    return noise * math.sqrt(sites / (sites - 1 - colluding))


@dataclass(frozen=True)
class SharedLevel(ClientLevel):
    """The mechanism of one round. `noise`: the multiplier Z of the shares that are counted on;
    `variance`, `sampler`: of one share."""

    sites: int
    colluding: int
    """T: all but n - 1 - T shares may be known."""

    @property
    def hidden(self) -> int:
        """Shares that are counted on."""
        return self.sites - 1 - self.colluding

    @property
    def spread(self) -> float:
        """See ClientLevel: of all shares together."""
        return spread(self.noise, self.sites, self.colluding)

    @property
    def variance(self) -> Fraction:
        """Of one share, in squared steps, a whole number: as many as are counted on have at least
        what `ClientLevel.variance` has. InputError if the grid is too coarse."""
        share = Fraction(math.ceil(super().variance / self.hidden))
        if share < SMALLEST_SIGMA**2:
            raise InputError(f"--dp_noise {self.noise:g}, or what --dp_epsilon leads to: must be "
                             "larger: each site's share of the noise would be "
                             f"{math.sqrt(share):.2g} steps of the grid, and needs "
                             f"{SMALLEST_SIGMA:g}")
        return share

    @property
    def distance(self) -> float:
        """See ClientLevel: of the shares that are counted on; more of them only add noise."""
        return self.hidden * super().distance

    @property
    def element(self) -> float:
        """See ClientLevel: of all shares together."""
        return math.sqrt(self.sites * self.variance) / self.scale

    @property
    def rho(self) -> float:
        """What a round costs a client of its cohort: rho-zCDP. At most 1 / (2 Z^2), which is
        charged, since the log has the multiplier."""
        return zcdp_of_sum(self.sensitivity, math.sqrt(self.variance), self.hidden, self.size)

    def spent(self, delta: float) -> Spent:
        """See ClientLevel."""
        return SpentOnShares(delta, self.distance)


class SpentOnShares(Spent):
    """What the releases so far have cost each client: 2 rho, of zCDP, the sum of 1/Z^2."""

    @property
    def epsilon(self) -> float:
        """See Spent."""
        most = max(self.by_client.values(), default=0.0)
        return zcdp_epsilon(most / 2, self._delta, self.releases * self._distance) if most else 0.0
