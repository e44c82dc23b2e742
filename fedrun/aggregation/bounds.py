"""How large an element of a client's vectors can be, which fixes the grid of a round."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fedrun.strategies.base import BoundExponents, Strategy, adamw_ratio, muon_scale

# For a mean loss: gradient norms are around one and exceed this only in runs that diverge.
LARGEST_GRADIENT = 16.0
LARGEST_PARAMETER = 64.0
MUON_SINGULAR = 1.21  # the largest singular value of what Muon makes of a gradient


@dataclass(frozen=True)
class Bounds:
    """No element of a client's update or gradient is larger in a round."""

    update: float
    gradient: float = 1.0
    clip: float = 1.0
    """--grad_clip: the largest norm of a gradient, and so the largest element of its averages."""

    def of(self, exponents: BoundExponents) -> float:
        """The bound of a vector with these exponents."""
        return (self.update**exponents.update * self.gradient**exponents.gradient
                * self.clip**exponents.clip)


def bound_exceeded(name: str, peak: float, bound: float) -> str:
    """Why a client is left out whose vector `name` has an element of this size; empty if it is
    within the bound."""
    if not math.isfinite(peak):
        return f"{name} not finite"
    return f"{name} exceeds its bound: {peak:g} > {bound:g}" if peak > bound else ""


def update_bound(steps: int, lr: float, weight_decay: float, beta1: float, beta2: float,
                 muon_side: int = 0) -> float:
    """The largest element of an update after this many steps of AdamW, and with Muon of matrices
    whose sides are at most `muon_side` (0: without Muon)."""
    return steps * max(adamw_step_bound(lr, weight_decay, beta1, beta2),
                       muon_step_bound(lr, weight_decay, muon_side))


def gradient_bound(strategy: Strategy, batch_size: int, sequence_length: int) -> float:
    """The largest element of a gradient (squared: of a Fisher diagonal) that the method sums."""
    return LARGEST_GRADIENT * strategy.gradient_scale(batch_size, sequence_length)


def adamw_step_bound(lr: float, weight_decay: float, beta1: float, beta2: float) -> float:
    """How far one AdamW step can move an element whose size is at most 64.

    By Cauchy-Schwarz |m_t| <= (1 - b1) sqrt(sum_j b2^j g_(t-j)^2) sqrt(sum_j (b1^2 / b2)^j), so
    |m_t| / sqrt(v_t) <= B = (1 - b1) / sqrt((1 - b2) (1 - b1^2 / b2)), 7.3 at the usual betas;
    early steps, with their bias correction, stay below. Kingma & Ba (2015), section 2.1, argue
    likewise. Moments averaged over clients keep within it too (Jensen: the mean of roots is at most
    the root of the mean).

    It holds as well where m and s = sqrt(v) were averaged in different rounds, on a grid, as long
    as |m| <= c_t s is made true after each loading, with c_t = B sqrt(1 - r^t), r = b1^2 / b2, and
    t the steps so far (`adamw_ratio`):
    - A step keeps it. By Cauchy-Schwarz |b1 m + (1 - b1) g| is at most
      sqrt((b1^2 / b2) c_t^2 + (1 - b1)^2 / (1 - b2)) sqrt(b2 s^2 + (1 - b2) g^2), where the second
      root is the next s, and the first is c_(t+1), since (1 - b1)^2 / (1 - b2) = (1 - r) B^2.
    - Averaging over clients keeps it: |sum p m| <= sum p |m| <= c_t sum p s.
    - Bias correction divides m by 1 - b1^t and s by sqrt(1 - b2^t). As r b2 = b1^2, and r^t + b2^t
      is at least 2 b1^t, (1 - r^t) (1 - b2^t) <= (1 - b1^t)^2. So the corrected ratio, of which a
      step is made, is at most B, in early steps too.
    """
    return lr * (max(1.0, adamw_ratio(beta1, beta2)) + LARGEST_PARAMETER * weight_decay)


def muon_step_bound(lr: float, weight_decay: float, side: int) -> float:
    """How far one Muon step can move an element whose size is at most 64, of a matrix whose longer
    side is at most `side`.

    No element of a matrix exceeds its largest singular value. Muon divides by the Frobenius norm,
    so singular values begin in [0, 1], and each iteration maps them by
    p(s) = 3.4445 s - 4.775 s^3 + 2.0315 s^5. On s >= 0 the largest value of p before it grows for
    good is p(0.5545) = 1.2024, its smallest after that p(1.0502) = 0.682, and p(1.2024) = 0.946: so
    p maps [0, 1.2024] into itself, however many iterations there are. MUON_SINGULAR leaves half a
    per cent to rounding. No tighter bound holds: a gradient may be one element.

    It is 0.24 sqrt(side) times the learning rate: as much as AdamW's at the usual betas for a side
    of 900, twice that at 3,600, 3.4 times at 10,576 (mamba2_2_7b).
    """
    return lr * (MUON_SINGULAR * muon_scale(side) + LARGEST_PARAMETER * weight_decay)
