"""Updates in eight bits: a quarter of the bytes, with error feedback.

Every client keeps a residual r_k, the part of its updates that was not sent yet. In a round it adds
its weighted update to it, sends the nearest multiples q_k of a step s, and keeps the rest:

    r_k <- r_k + p_k d_k;    q_k = round(r_k / s);    r_k <- r_k - s q_k;    S = s sum_k q_k

Nothing of an update is lost, only delayed, as long as its client is drawn again. (If a client is
left out, the others' shares grow, and their residuals with them.) Seide et al. (2014), "1-Bit
Stochastic Gradient Descent", and Karimireddy et al. (2019), "Error Feedback Fixes SignSGD",
Algorithm 2, there with gradients.

A sum of eight-bit numbers needs more than eight bits, unless the terms leave room for each other.
Here they do: the weights of a cohort sum to one, so client k has c_k = 1 + floor((127 - K) p_k)
levels on either side of zero, and the levels of all K clients sum to at most 127. What is sent is
q_k + c_k, an unsigned byte whose sum over all clients is below 256. Four bytes make a word that an
int32 all-reduce sums, and no byte carries into the next. The price is resolution: 31 levels on a
side for each of 4 equal clients, 7 for each of 16, and one for each from 64 on. (The top byte may
take a word past 2^31: sums of int32 wrap, and no bit is lost.)

The step s belongs to a block of 256 elements (about a row of a matrix) and is the smallest one
that fits every client's largest element: s = max_k |r_k| / c_k. A small all-reduce finds it before
the sum. Maxima and sums of integers do not depend on order: the same bits on any number of
processes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from fedrun.aggregation.base import Aggregator
from fedrun.aggregation.bounds import Bounds, bound_exceeded
from fedrun.aggregation.slices import Peaks, slice_width
from fedrun.config import INT8_COHORT
from fedrun.distributed.data_plane import DataPlane
from fedrun.strategies.base import Strategy

BLOCK = 256  # elements that share a step
LEVELS = INT8_COHORT + 1  # of all clients together, on either side of zero: their sum fits a byte
_SMALLEST_STEP = 1e-30  # of a block in which nothing moves
_WEIGHT_BITS = 30


class Int8Aggregator(Aggregator):
    """The sum of one vector, the update, over a cohort of at most INT8_COHORT clients.

    `buffer` is int32: words of four elements, each the sum of q_k + c_k; then the sum of the
    weights and that of c_k over the clients that took part. `peaks` holds the largest |r_k| / c_k
    of each block, which is the step once all workers have agreed on it.
    """

    def __init__(self, strategy: Strategy, size: int, like: Tensor, cohort: int,
                 plane: DataPlane | None = None) -> None:
        """like: a tensor with the model's type and device; cohort: clients in a round."""
        assert set(strategy.sums) == {"delta"}, "checked with the config"
        assert cohort <= INT8_COHORT
        blocks = -(-size // BLOCK)
        words = blocks * BLOCK // 4
        width = -(-slice_width(size, like.device) // BLOCK) * BLOCK
        super().__init__(size, plane, words + 2, torch.int32,
                         torch.empty(2, width, dtype=like.dtype, device=like.device))
        self.cohort = cohort
        self._words = torch.empty(width // 4, dtype=torch.int32, device=like.device)
        self.peaks = torch.zeros(blocks, dtype=like.dtype, device=like.device)
        self._bytes = self.buffer[:words].view(torch.uint8).view(blocks, BLOCK)
        self._bound = math.inf
        self._levels: list[int] = []  # of the clients whose terms were added here

    @property
    def bytes_sent(self) -> int:
        return self.buffer.nbytes + self.peaks.nbytes

    def begin(self, bounds: Bounds) -> None:
        self._bound = bounds.update
        self.buffer.zero_()
        self.peaks.zero_()
        self._levels.clear()

    def add(self, client: Mapping[str, Tensor], weight: float, start: Tensor | None = None) -> str:
        """As `Aggregator.add`; the weighted update is added to the client's `residual` (size,),
        which does not change if the client is left out."""
        peaks = Peaks()
        for a, b in self.slices.ranges:
            peaks.add(self._update(client, start, a, b))
        for peak in peaks.read():
            if left_out := bound_exceeded("delta", peak, self._bound):
                return left_out
        residual = client["residual"]
        levels = 1 + math.floor((LEVELS - self.cohort) * weight)
        for a, b in self.slices.ranges:
            residual[a:b].add_(self._update(client, start, a, b), alpha=weight)
            first, last, blocks = self._blocks(residual, a, b)
            of_blocks = blocks.abs_().amax(1).div_(levels)
            torch.maximum(self.peaks[first:last], of_blocks, out=self.peaks[first:last])
        self.buffer[-2] += round(weight * 2**_WEIGHT_BITS)
        self.buffer[-1] += levels
        self._levels.append(levels)
        return ""

    def _update(self, client: Mapping[str, Tensor], start: Tensor | None, a: int, b: int) -> Tensor:
        """A slice of the client's update."""
        if start is None or "parameters" not in client:
            return client["delta"][a:b]
        return torch.sub(client["parameters"][a:b], start[a:b], out=self._scratch[1, :b - a])

    def reduce(self, residuals: Iterable[Tensor] = ()) -> None:
        """Workers: agree on the steps, then sum what the clients send, subtracted from their
        residuals."""
        self.plane.all_max(self.peaks)
        self.peaks.clamp_(min=_SMALLEST_STEP)
        for residual, levels in zip(residuals, self._levels, strict=True):
            self._quantise(residual, levels)
        super().reduce()

    def _quantise(self, residual: Tensor, levels: int) -> None:
        """Move what fits the grid from a client's residual to the buffer."""
        for a, b in self.slices.ranges:
            first, last, blocks = self._blocks(residual, a, b)
            step = self.peaks[first:last, None]
            q = torch.div(blocks, step, out=self._scratch[1, :blocks.numel()].view_as(blocks))
            q.round_()
            residual[a:b] = blocks.addcmul_(q, step, value=-1).view(-1)[:b - a]
            self._bytes[first:last].add_(q.add_(levels).to(torch.uint8))

    def _blocks(self, vector: Tensor, a: int, b: int) -> tuple[int, int, Tensor]:
        """The blocks of a slice, and a copy of it in their shape (blocks, BLOCK), padded with
        zeros."""
        first, last = _block_range(a, b)
        copy = self._scratch[0, :(last - first) * BLOCK]
        copy[:b - a] = vector[a:b]
        copy[b - a:] = 0
        return first, last, copy.view(-1, BLOCK)

    def total_weight(self) -> float:
        return self._total(-2) / 2.0**_WEIGHT_BITS

    def _total(self, index: int) -> int:
        """One of the two numbers at the buffers' ends, summed over all workers."""
        return sum(int(part[index]) for part in self._reduced)

    def means(self, a: int, b: int, weight: float) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        first, last = _block_range(a, b)
        words = self._sum_over_workers(first * BLOCK // 4, last * BLOCK // 4, self._words)
        mean = self._scratch[0, :(last - first) * BLOCK].view(-1, BLOCK)
        mean.copy_(words.view(torch.uint8).view(-1, BLOCK)).sub_(float(self._total(-1)))
        mean.mul_(self.peaks[first:last, None]).div_(weight)
        return {"delta": mean.view(-1)[:b - a]}, {}


def _block_range(a: int, b: int) -> tuple[int, int]:
    """The blocks that hold elements a to b; a is the first element of one."""
    return a // BLOCK, -(-b // BLOCK)
