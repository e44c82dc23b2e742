"""Robust rules written from their definitions, in float64 on whole matrices of updates."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from fedrun.strategies.fed_krum import FedKrum
from fedrun.strategies.fed_median import FedMedian
from fedrun.strategies.fed_trimmed_mean import FedTrimmedMean
from fedrun.strategies.robust import Robust

Rule = Callable[[np.ndarray], np.ndarray]


def trimmed(cut: int) -> Rule:
    return lambda updates: np.sort(updates, 0)[cut:len(updates) - cut].mean(0)


def krum(byzantine: int, taken: int) -> Rule:
    """Blanchard et al. (2017), from the definition."""
    def rule(updates: np.ndarray) -> np.ndarray:
        scores = []
        for k, one in enumerate(updates):
            others = [float(((one - other) ** 2).sum())
                      for j, other in enumerate(updates) if j != k]
            scores.append(sum(sorted(others)[:len(updates) - byzantine - 2]))
        best = sorted(range(len(updates)), key=lambda k: scores[k])[:taken]
        return np.asarray(updates[best].mean(0))
    return rule


CASES: dict[str, tuple[Robust, int, Rule]] = {
    "median of an odd number": (FedMedian(), 7, lambda updates: np.median(updates, 0)),
    "median of an even number": (FedMedian(), 8, lambda updates: np.median(updates, 0)),
    "median of three": (FedMedian(), 3, lambda updates: np.median(updates, 0)),
    "trimmed mean": (FedTrimmedMean(2), 9, trimmed(2)),
    "trimmed mean to one": (FedTrimmedMean(3), 7, trimmed(3)),
    "Krum": (FedKrum(2, krum_clients=1), 8, krum(2, 1)),
    "multi-Krum": (FedKrum(2), 8, krum(2, 4)),
    "multi-Krum of as many as may be": (FedKrum(1, krum_clients=6), 7, krum(1, 6))}
"""A method, as many clients, and what it has to make of their updates, (clients, size)."""
