"""FedGeometricMedian: the point with the smallest weighted sum of distances to the clients' updates
(RFA).

    z_0 = 0;  p_k = w_k min(1, nu / |d_k - z_i|);  z_(i+1) = sum_k p_k d_k / sum_k p_k
    w <- w + z_R

Pillutla, Kakade & Harchaoui (2022), "Robust Aggregation for Federated Learning", algorithm 2, the
smoothed Weiszfeld algorithm, whose weights w_k / max(nu, |d_k - z_i|) are these times nu. It holds
where hostile clients have less than half of the weights w_k.

Each step is a weighted mean, whose weights every client works out for itself from its update and
the mean before, so sums over the clients are all that it needs. nu is SMOOTHING of the longest
update of a round (its bound in every element), and depends on nothing that clients send. With the
usual betas that is a five hundredth of an update whose elements all move by --lr at every step, so
nu matters to those that all but agree with the mean, and where the learning rate falls far below.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fedrun.common.errors import require
from fedrun.strategies.fed_avg import FedAvg
from fedrun.strategies.robust import require_kept_updates

SMOOTHING = 2.0**-12
"""nu, as a share of the longest update of a round. A client keeps at least half of this share of
its planned weight, so a mean loses at most 13 of the grid's 30 bits. What is left is as fine as
the fp32 parameters that the mean is added to."""
MOST_STEPS = 32


@dataclass(frozen=True)
class FedGeometricMedian(FedAvg):
    """The geometric median of the clients' updates, which holds while hostile clients have less
    than half of the weights: a few weighted sums of the same updates in each round."""

    weiszfeld_steps: int = 3
    """Steps of Weiszfeld's algorithm towards the median, 1 to 32. Each is a sum of its own, of 4
    bytes a parameter. With --secure_sum a round needs clients of two more sites than this."""

    @property
    def reweighted(self) -> int:
        return self.weiszfeld_steps

    def check(self, config: Any) -> None:
        super().check(config)
        require(1 <= self.weiszfeld_steps <= MOST_STEPS, "--weiszfeld_steps", self.weiszfeld_steps,
                f"an integer from 1 to {MOST_STEPS}")
        require(config.dp == "none", "--dp", config.dp, f"none with {config.method}, whose weights "
                "depend on the updates")
        require_kept_updates(config)
