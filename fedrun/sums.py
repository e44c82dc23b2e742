"""Exact sums of client terms: integers on a fixed-point grid.

Floating-point sums depend on their order, and the order on the number of processes. Here every
term is rounded once to an integer multiple of a grid step that the plan of the round fixes, and
integers are summed, first over the clients of a worker and then over the workers: the result has
the same bits whatever the placement. An update is at most the round's bound in size (AdamW cannot
move further) and the weights of a cohort sum to one, so the sum cannot overflow; an update that
breaks the bound is an error.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from fedrun.strategies import Strategy

# Integer type of the sum and bits below the sign, one spare, for each type of the model.
_GRIDS = {torch.float32: (torch.int32, 30), torch.float64: (torch.int64, 62)}
# Elements handled at a time: intermediate results stay in the processor's cache; on a GPU, where
# launches cost more than memory, a slice is large.
_SLICE = {"cpu": 1 << 16, "cuda": 1 << 24}


class TermSum:
    """One buffer that client terms are added to, that `all_reduce` sums, that the server applies.

    `buffer` is (len(strategy.sums) * size + 1,): the vectors one after the other, and the sum of
    the weights of the clients that took part.
    """

    def __init__(self, strategy: Strategy, size: int, like: Tensor, exact: bool) -> None:
        self.strategy = strategy
        self.size = size
        self.exact = exact
        kind, self._bits = _GRIDS[like.dtype] if exact else (like.dtype, 0)
        self.buffer = torch.zeros(len(strategy.sums) * size + 1, dtype=kind, device=like.device)
        width = min(size, _SLICE[like.device.type])
        self._scratch = torch.empty(width, dtype=like.dtype, device=like.device)
        self._rounded = torch.empty(width, dtype=kind, device=like.device)
        self._scale = 1.0
        self._bound = math.inf

    def begin(self, bound: float) -> None:
        """Start a round in which no element of an update is larger than `bound`."""
        self.buffer.zero_()
        self._bound = bound
        # A power of two: scaling is exact, and rounding to the grid the only loss.
        self._scale = 2.0 ** (self._bits - math.ceil(math.log2(bound))) if self.exact else 1.0

    def add(self, delta: Tensor, weight: float) -> bool:
        """Add a client's terms for its update `delta` (size,), times its weight in (0, 1].

        False, with nothing added, where the update is not finite. Raises OverflowError for an
        update beyond the bound.
        """
        low, high = (float(x) for x in torch.aminmax(delta))
        peak = max(-low, high)
        if not math.isfinite(peak) or math.isnan(low):
            return False
        if self.exact and peak > self._bound:
            raise OverflowError(f"an update of size {peak:g} exceeds {self._bound:g}, the furthest "
                                "that AdamW moves at this learning rate: --reduce float has no "
                                "such bound")
        for a, b in self._slices():
            terms = self.strategy.client_term({"delta": delta[a:b]})
            for name, term in zip(self.strategy.sums, terms, strict=True):
                scaled = torch.mul(term, weight * self._scale, out=self._scratch[:b - a])
                if self.exact:
                    self._section(name, a, b).add_(self._rounded[:b - a].copy_(scaled.round_()))
                else:
                    self._section(name, a, b).add_(scaled)
        self.buffer[-1] += round(weight * 2.0**self._bits) if self.exact else weight
        return True

    def apply(self, model: Tensor, state: Mapping[str, Tensor]) -> None:
        """The server update of `model` (size,) and `state`, in place, from the reduced buffer."""
        total = float(self.buffer[-1]) / 2.0**self._bits
        assert total > 0, "the server stops a round in which no client is left"
        for a, b in self._slices():
            mean = {}
            for name in self.strategy.sums:
                section = self._section(name, a, b)
                # One sum needs one scratch; more would overwrite each other.
                out = self._scratch[:b - a] if len(self.strategy.sums) == 1 else model.new_empty(b - a)
                mean[name] = out.copy_(section).mul_(1.0 / (self._scale * total))
            self.strategy.server_update(model[a:b], {k: v[a:b] for k, v in state.items()}, mean)

    def _section(self, name: str, a: int, b: int) -> Tensor:
        start = self.strategy.sums.index(name) * self.size
        return self.buffer[start + a:start + b]

    def _slices(self) -> Iterator[tuple[int, int]]:
        width = self._scratch.numel()
        return ((a, min(a + width, self.size)) for a in range(0, self.size, width))


def adamw_step_bound(lr: float, weight_decay: float, beta1: float, beta2: float) -> float:
    """The furthest that one AdamW step moves an element whose size is at most 64.

    By Cauchy-Schwarz |m_t| <= (1 - b1) sqrt(sum_j b2^j g_(t-j)^2) sqrt(sum_j (b1^2 / b2)^j), so
    |m_t| / sqrt(v_t) <= (1 - b1) / sqrt((1 - b2) (1 - b1^2 / b2)), 7.3 at the usual betas; early
    steps, with their bias correction, stay below. Kingma & Ba (2015), section 2.1, argue likewise.
    """
    ratio = beta1**2 / beta2
    assert ratio < 1
    direction = (1 - beta1) / math.sqrt((1 - beta2) * (1 - ratio))
    return lr * (max(1.0, direction) + 64 * weight_decay)
