"""The tail of a round: sums over its clients of what they report besides vectors.

In runs with sites nothing of a single client reaches the server. Each number of a client is rounded
to fixed point and integers are summed, modulo 2^64 where they are masked: the same bits wherever
the clients are, and whether or not anything is masked.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass
from typing import Self

from fedrun.records.history import CohortSums
from fedrun.strategies.base import ClientReport

LOSS_BITS = 20
"""Bits of a sum of losses, in nats, behind the point."""
BITS = 40
"""The same of weights, of norms, and of their products."""
_LARGEST = 1 << 62  # a tail's sum stays below this in size, so that it is not taken for a negative


@dataclass(frozen=True)
class Tail:
    """Sums over clients, as the integers that are summed.

    w: the weights of the clients taken, n: the norms of their updates or gradients, 0 in rounds
    that are not evaluated.
    """

    taken: int = 0
    """Clients whose terms are in the sum."""
    not_finite: int = 0
    """Clients left out because something of them is not finite."""
    beyond_bound: int = 0
    """The same because an element exceeds its bound."""
    otherwise: int = 0
    """The same for another reason."""
    clamped: int = 0
    """Numbers that were too large, and are in the sums as the largest that fits."""
    clipped: int = 0
    """Clients taken whose update was longer than --client_clip."""
    tokens: int = 0
    """Tokens in the losses."""
    losses: int = 0
    """Sum of the losses, LOSS_BITS behind the point."""
    weights: int = 0
    """Sum of w; this and the others with BITS behind the point."""
    squared_weights: int = 0
    """Sum of w^2."""
    norms: int = 0
    """Sum of w n."""
    squared_norms: int = 0
    """Sum of w^2 n^2."""
    mean_squares: int = 0
    """Sum of w n^2."""
    noised: int = 0
    """With --dp example: sum of the squared norms of the last steps' gradients, with their noise;
    LOSS_BITS behind the point."""

    @classmethod
    def of(cls, reports: Iterable[ClientReport], cohort: int) -> Self:
        """The tail of these clients. cohort: as many as the whole round has at most."""
        return cls(*map(sum, zip(astuple(cls()), *(_words(one, cohort) for one in reports),
                                 strict=True)))

    def words(self) -> list[int]:
        """Its numbers in order, to be summed over workers or sites."""
        return list(astuple(self))

    @classmethod
    def from_words(cls, words: Sequence[int]) -> Self:
        """The tail of such sums."""
        return cls(*words)

    @property
    def left_out(self) -> dict[str, int]:
        """The numbers of clients that are left out, by reason."""
        found = {"not finite": self.not_finite, "exceeds its bound": self.beyond_bound,
                 "other": self.otherwise}
        return {why: count for why, count in found.items() if count}

    @property
    def reasons(self) -> str:
        """The same in words."""
        return ", ".join(f"{why}: {count}" for why, count in self.left_out.items())

    @property
    def loss_sum(self) -> float:
        """Sum of the losses, in nats."""
        return math.ldexp(self.losses, -LOSS_BITS)

    @property
    def total_weight(self) -> float:
        """Sum of the weights, not normalised."""
        return math.ldexp(self.weights, -BITS)

    @property
    def noised_norm(self) -> float:
        """With --dp example: root mean square of those norms, over the clients taken."""
        return math.sqrt(math.ldexp(self.noised, -LOSS_BITS) / self.taken)

    @property
    def diverged(self) -> bool:
        """Whether more than half of the round's clients are left out, which ends the run."""
        return sum(self.left_out.values()) > self.taken

    def sums(self) -> CohortSums:
        """What a record of the round is made of."""
        w = self.weights
        return CohortSums(self.squared_weights * 2**BITS / w**2, self.norms / w,
                          self.squared_norms * 2**BITS / w**2, self.mean_squares / w)


def _words(client: ClientReport, cohort: int) -> tuple[int, ...]:
    """One client's part of a tail."""
    if client.left_out:
        not_finite = client.left_out.endswith("not finite")
        beyond = not not_finite and "exceeds its bound" in client.left_out
        return astuple(Tail(not_finite=int(not_finite), beyond_bound=int(beyond),
                            otherwise=int(not not_finite and not beyond)))
    w, n = client.weight, client.norm or 0.0
    largest, clamped = _LARGEST // cohort, 0
    fixed = []
    for value, bits in ((client.tokens, 0), (client.loss_sum, LOSS_BITS), (w, BITS), (w * w, BITS),
                        (w * n, BITS), (w * n * w * n, BITS), (w * n * n, BITS),
                        ((client.noised_norm or 0.0)**2, LOSS_BITS)):
        fits = abs(value) < largest / 2**bits  # of NaN too
        fixed.append(round(value * 2**bits) if fits else largest)
        clamped += not fits
    return 1, 0, 0, 0, clamped, int(client.clipped), *fixed
