"""Clipping of a client's update to a norm, for differential privacy."""

from __future__ import annotations

import math

from torch import Tensor

from fedrun.aggregation.slices import norm

SMALLEST_FACTOR = 2.0**-100
"""A smaller factor would not be a normal number of fp32, or its products would not be."""


def clip_(update: Tensor, longest: float) -> bool:
    """Scale an update (size,) in place to the norm `longest` if it is longer; zeros if an element
    is not finite, or it is longer than 2^100 times that. Whether it was neither.

    The norm is taken in double precision over all slices. The result may be longer than `longest`
    by fp32's rounding, of the factor and of each product: 2^-23 of it.
    """
    found = norm(update)
    if not math.isfinite(found) or found * SMALLEST_FACTOR > longest:
        update.zero_()
        return False
    if found > longest:
        update.mul_(longest / found)
    return True
