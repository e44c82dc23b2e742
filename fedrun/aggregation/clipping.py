"""Clipping of a client's update to a norm: for differential privacy, and for --client_clip."""

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
    return shorten_(update, norm(update), longest) > 0


def shorten_(update: Tensor, length: float, longest: float) -> float:
    """The same of an update whose norm is `length`. Returns what it was multiplied by: 1 if it was
    not too long, 0 if it is zeros now."""
    if not math.isfinite(length) or length * SMALLEST_FACTOR > longest:
        update.zero_()
        return 0.0
    if length <= longest:
        return 1.0
    update.mul_(longest / length)
    return longest / length
