"""Updates for sums in few bits: usual ones, and such as make their steps grow and shrink."""

from __future__ import annotations

from collections.abc import Callable

import torch

from fedrun.aggregation.blocks import BLOCK

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


def drawn(clients: int, size: int = SIZE, seed: int = 0) -> list[torch.Tensor]:
    """Updates whose blocks are of very different sizes, the largest elements near BOUND / 3."""
    generator = torch.Generator().manual_seed(seed)
    blocks = 10 ** -(3 * torch.rand(-(-size // BLOCK), generator=torch.Generator().manual_seed(7)))
    spread = torch.rand(size, generator=generator) * blocks.repeat_interleave(BLOCK)[:size]
    return [torch.randn(size, generator=generator) * spread * BOUND / 16 for _ in range(clients)]
