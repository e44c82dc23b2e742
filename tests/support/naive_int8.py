"""Sums in eight bits by the formulas of aggregation/int8.py: float64 numpy, a block at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


class Naive:
    """One vector of a run in which all clients of a cohort stay the same."""

    def __init__(self, weights: list[float], size: int, turns: int = 1, first: float = 1 / 4
                 ) -> None:
        """turns: cohorts that the run's clients make; first: step, as a share of what equal clients
        need."""
        count = len(weights)
        self.shrink = 0.75 ** (1 / turns)
        self.weights = weights
        self.levels = [1 + math.floor((127 - count) * w) for w in weights]
        assert sum(self.levels) <= 127
        self.equal = 1 / (count * (1 + math.floor((127 - count) * (1 / count))))
        self.steps = [first * self.equal] * -(-size // 256)
        self.residuals = [np.zeros(size) for _ in weights]

    def round(self, deltas: list[np.ndarray], bound: float | np.ndarray) -> np.ndarray:
        """The weighted mean. bound: what the steps are shares of, of all blocks or of each."""
        mean = np.zeros(len(deltas[0]))
        for residual, weight, delta in zip(self.residuals, self.weights, deltas, strict=True):
            residual += weight * delta
        bounds = np.broadcast_to(bound, len(self.steps))
        for number, share in enumerate(self.steps):
            block = slice(256 * number, 256 * (number + 1))
            step, clipped, full = share * bounds[number], 0, 0
            for residual, levels in zip(self.residuals, self.levels, strict=True):
                ratios = residual[block] / step
                clipped += bool(np.any(np.abs(ratios) > levels + 0.5))
                full += bool(np.any(np.abs(ratios) > 0.7 * (levels + 0.5)))
                sent = step * np.clip(np.round(ratios), -levels, levels)
                residual[block] -= sent
                mean[block] += sent
            share *= 2 if clipped else 1 if full else self.shrink
            largest = 2 / (127 - len(self.weights))
            self.steps[number] = min(max(share, self.equal / 256), largest)
        return mean / sum(self.weights)


class NaiveMoments:
    """Averages of two moments that travel as differences: `m` and `s`, the root of the second."""

    def __init__(self, weights: list[float], size: int, clip: float) -> None:
        self.weights, self.clip = weights, clip
        self.averages = {name: np.zeros(size) for name in "ms"}
        self.sums = {name: Naive(weights, size, first=1.0) for name in "ms"}
        self.scales = np.zeros(-(-size // 256))

    def round(self, clients: dict[str, list[np.ndarray]], moving: Sequence[str]) -> None:
        """clients: all their moments after a round, by name, and as `sizes` what a block's scale is
        the largest of; moving: those that are averaged."""
        for name in moving:
            average, sums = self.averages[name], self.sums[name]
            steps = np.repeat(np.array(sums.steps) * self.scales, 256)[:len(average)]
            average += sums.round([one - average for one in clients[name]], self.scales)
            if name == "s":
                np.maximum(average, steps, out=average)
        blocks = range(0, len(self.averages["s"]), 256)
        grid = 2.0 ** (math.ceil(math.log2(self.clip)) - 30)
        summed = sum(np.round(w * np.array([one[a:a + 256].max() for a in blocks]) / grid)
                     for w, one in zip(self.weights, clients["sizes"], strict=True))
        self.scales = np.maximum(summed, 1) * grid / sum(self.weights)
