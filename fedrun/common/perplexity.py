"""Perplexity from a loss. Needs no torch."""

from __future__ import annotations

import math

LARGEST_LOSS = 700.0  # nats; a float overflows at exp(710)


def perplexity(loss: float) -> float:
    """exp(loss) of a mean loss in nats; infinite from LARGEST_LOSS on and for nan.

    For the difference of two losses, it is the ratio of their perplexities.
    """
    return math.exp(loss) if loss < LARGEST_LOSS else math.inf
