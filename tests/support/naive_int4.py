"""Sums in four bits by the formulas of aggregation/int4.py: float64 numpy, a block at a time."""

from __future__ import annotations

import numpy as np

BLOCK = 64

class Naive:
    """A run in which all clients of a cohort stay the same."""

    def __init__(self, weights: list[float], size: int, turns: int = 1) -> None:
        """turns: cohorts that the run's clients make."""
        self.weights, self.shrink = weights, 0.75 ** (1 / turns)
        self.equal = 1 / (7 * len(weights))
        self.steps = [self.equal / 8] * -(-size // BLOCK)
        self.residuals = [np.zeros(size) for _ in weights]
        self.server = np.zeros(size)

    def round(self, deltas: list[np.ndarray], bound: float) -> np.ndarray:
        """The weighted mean."""
        result = np.zeros(len(self.server))
        for residual, weight, delta in zip(self.residuals, self.weights, deltas, strict=True):
            residual += weight * delta
        for number, share in enumerate(self.steps):
            block, step = slice(BLOCK * number, BLOCK * (number + 1)), share * bound
            clipped = full = False
            for residual in self.residuals:
                ratios = residual[block] / step
                clipped |= bool(np.any(np.abs(ratios) > 7.5))
                full |= bool(np.any(np.abs(ratios) > 0.7 * 7.5))
                sent = step * np.clip(np.round(ratios), -7, 7)
                residual[block] -= sent
                self.server[block] += sent
            coarse = max(bfloat16(np.abs(self.server[block]).max() / 7), 2.0**-120)
            result[block] = coarse * np.round(self.server[block] / coarse)
            assert np.abs(result[block]).max() <= 7 * coarse
            self.server[block] -= result[block]
            share *= 2 if clipped else 1 if full else self.shrink
            self.steps[number] = min(max(share, self.equal / 256), 2 / 7)
        return result / sum(self.weights)


def bfloat16(number: float) -> float:
    """The nearest number with eight bits; the even one of two."""
    bits = int(np.float32(number).view(np.uint32))
    upper, rest = divmod(bits, 1 << 16)
    upper += rest > 0x8000 or (rest == 0x8000 and upper % 2 == 1)
    return float(np.uint32(upper << 16).view(np.float32))
