"""Updates for sums in few bits: usual ones, and such as make their steps grow and shrink."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from fedrun.aggregation.int8 import BLOCK

SIZE = 70_001  # more than one slice, a part of a block at the end
BOUND = 2.0**-6

# Each round's updates of two or more clients, as shares of the bound: hostile to steps that only
# the sum of the updates decides.
HOSTILE: dict[str, Callable[[int, int], float]] = {
    "cancel": lambda number, k: 0.3 * (-1) ** k,
    "cancel, from small": lambda number, k: (0.001 if number < 30 else 0.5) * (-1) ** k,
    "one is 100 times larger": lambda number, k: 0.9 if k == 0 else 0.009,
    "grow 100 times": lambda number, k: 0.005 if number < 30 else 0.5,
    "shrink 100 times": lambda number, k: 0.5 if number < 30 else 0.005,
    "silent for long, then at the bound": lambda number, k: float(number >= 45),
    "every other round": lambda number, k: 0.8 * (number % 2) * (-1) ** (k + number // 2)}


PLACEMENTS = ([[0, 1, 2, 3, 4]], [[4, 2], [0], [3, 1]], [[0], [1], [2], [3], [4]],
              [[], [4, 3, 2, 1, 0]])
"""Five clients on workers, in the order in which each worker adds them."""


def drawn(clients: int, size: int = SIZE, seed: int = 0) -> list[torch.Tensor]:
    """Updates whose blocks are of very different sizes, the largest elements near BOUND / 3."""
    generator = torch.Generator().manual_seed(seed)
    blocks = 10 ** -(3 * torch.rand(-(-size // BLOCK), generator=torch.Generator().manual_seed(7)))
    spread = torch.rand(size, generator=generator) * blocks.repeat_interleave(BLOCK)[:size]
    return [torch.randn(size, generator=generator) * spread * BOUND / 16 for _ in range(clients)]


def require_near(model: torch.Tensor, expected: np.ndarray) -> None:
    """A quotient that lies on a tie may be rounded either way: it makes up for it next time."""
    apart = np.abs(model.numpy() - expected)
    assert np.mean(apart > 1e-8 * np.abs(expected) + 1e-12) < 1e-3  # weights have 30 bits
    assert apart.sum() <= 1e-3 * np.abs(expected).sum()
