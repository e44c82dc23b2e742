"""The smoothed Weiszfeld algorithm written from its definition, in float64 on a matrix of updates.
"""

from __future__ import annotations

import numpy as np


def weiszfeld(updates: np.ndarray, weights: np.ndarray, nu: float, steps: int) -> np.ndarray:
    """Pillutla, Kakade & Harchaoui (2022), algorithm 2, from zeros. updates: (clients, size);
    weights: (clients,)."""
    z = np.zeros(updates.shape[1])
    for _ in range(steps):
        beta = weights / np.maximum(nu, np.sqrt(((updates - z) ** 2).sum(1)))
        z = (beta[:, None] * updates).sum(0) / beta.sum()
    return z


def distances(updates: np.ndarray, weights: np.ndarray, z: np.ndarray) -> float:
    """What the geometric median has the smallest of: the weighted sum of distances to z, (size,).
    """
    return float((weights * np.sqrt(((updates - z) ** 2).sum(1))).sum())
