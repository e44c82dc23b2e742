"""Muon's step by the formulas of training/muon.py: float64 numpy, by singular values."""

from __future__ import annotations

import numpy as np

from fedrun.training.muon import COEFFICIENTS, ITERATIONS

A, B, C = COEFFICIENTS


def polynomial(s: np.ndarray) -> np.ndarray:
    """What the iterations make of singular values."""
    for _ in range(ITERATIONS):
        s = A * s + B * s**3 + C * s**5
    return s


def by_svd(matrix: np.ndarray) -> np.ndarray:
    """The same as `orthogonalise`, by another way."""
    u, s, v = np.linalg.svd(matrix, full_matrices=False)
    found: np.ndarray = (u * polynomial(s / np.linalg.norm(matrix))) @ v
    return found
