"""FedFisher: each parameter is averaged with weights proportional to its Fisher information.

    w <- w + sum_k p_k (F_k + phi) d_k / sum_k p_k (F_k + phi)      elementwise

F_k is the diagonal of client k's (empirical) Fisher information, estimated during its local steps
(see fedrun/training/fisher.py). The floor phi keeps the quotient defined; where F is far below it,
the method is the plain average. The merging rule is that of Matena & Raffel (2022), "Merging Models
with Fisher-Weighted Averaging", equation 5. (A method of 2024 is also called FedFisher; it is
one-shot, and finds the global model by further training on the server.)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from fedrun.common.errors import require
from fedrun.strategies.base import BoundExponents, FisherSettings, ServerRound
from fedrun.strategies.fed_avg import FedAvg

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class FedFisher(FedAvg):
    """Fisher-weighted averaging: a parameter follows the clients that are most certain of it."""

    fisher: Literal["batch", "sequence", "corrected"] = "batch"
    """Estimate of the Fisher diagonal, averaged over local steps: the squared gradient of the
    batch's mean loss (batch); the mean over sequences of the squared gradient of their summed
    log-likelihood (sequence); or, from microbatches of B sequences, mean(g^2) + (B-1) Var(g), which
    estimates the mean squared gradient of single sequences' mean loss (corrected)."""
    fisher_microbatches: int = 2
    """Microbatches that a batch is split into for --fisher corrected; at least 2."""
    fisher_floor: float = 1e-8
    """Added to every element of the Fisher diagonal: above 0, at most 1."""
    fisher_floor_mode: Literal["absolute", "relative"] = "absolute"
    """Whether the floor is a number (absolute) or a multiple of the cohort's mean of F (relative;
    this sums a third vector)."""
    fisher_scope: Literal["all", "untied", "mixers"] = "all"
    """Parameters that are weighted by their Fisher information, while the others are averaged
    plainly: all, all but the embedding that is tied to the head (untied), or those of the mixers
    only (mixers)."""

    inputs: ClassVar[tuple[str, ...]] = ("delta", "fisher")
    diagnostics: ClassVar[tuple[str, ...]] = ("under_floor",)

    def __post_init__(self) -> None:
        require(0 < self.fisher_floor <= 1, "--fisher_floor", self.fisher_floor,
                "in (0, 1]")
        require(self.fisher != "corrected" or self.fisher_microbatches >= 2,
                "--fisher_microbatches", self.fisher_microbatches,
                "an integer >= 2 (--fisher corrected needs a variance)")

    @property
    def relative(self) -> bool:
        return self.fisher_floor_mode == "relative"

    @property
    def sums(self) -> Mapping[str, BoundExponents]:
        sums = {"fisher_delta": BoundExponents(update=1, gradient=2),
                "fisher": BoundExponents(gradient=2)}
        return sums | ({"delta": BoundExponents(update=1)} if self.relative else {})

    @property
    def global_means(self) -> tuple[str, ...]:  # type: ignore[override]
        return ("fisher",) if self.relative else ()

    @property
    def fisher_settings(self) -> FisherSettings:
        return FisherSettings(self.fisher, self.fisher_microbatches, self.fisher_scope)

    def client_term(self, client: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        delta, fisher = client["delta"], client["fisher"]
        if self.relative:  # the cohort's mean, and so the floor, is known only after the sum
            return fisher * delta, fisher, delta
        floored = fisher + self.fisher_floor
        return floored * delta, floored

    def server_update(self, model: Tensor, state: Mapping[str, Tensor], mean: Mapping[str, Tensor],
                      context: ServerRound) -> None:
        numerator, denominator = mean["fisher_delta"], mean["fisher"]
        if self.relative:
            assert context.global_mean is not None
            # If all of F is zero, any floor gives the plain average.
            floor = self.fisher_floor * context.global_mean["fisher"] or 1.0
            numerator.add_(mean["delta"], alpha=floor)
            denominator.add_(floor)
        model.addcdiv_(numerator, denominator)

    def count_diagnostics(self, mean: Mapping[str, Tensor], context: ServerRound
                          ) -> Mapping[str, Tensor]:
        """Elements whose mean F is below the floor, where the result is near the plain average."""
        if self.relative:
            assert context.global_mean is not None
            limit = self.fisher_floor * context.global_mean["fisher"]
        else:
            limit = 2 * self.fisher_floor  # because `fisher` already contains the floor once
        return {"under_floor": (mean["fisher"] < limit).sum()}
