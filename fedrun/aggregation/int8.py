"""Updates in eight bits: a quarter of the bytes, with error feedback.

Every client keeps a residual r_k, the part of its updates that was not sent yet. In a round it adds
its weighted update to it, sends the nearest multiple q_k of a step s that its levels c_k allow, and
keeps the rest:

    r_k <- r_k + p_k d_k;  q_k = clamp(round(r_k / s), -c_k, c_k);  r_k <- r_k - s q_k;
    S = s sum_k q_k

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

The step s belongs to a block of 256 elements (about a row of a matrix). It is known before the
round, from the sums of the rounds before and the plan alone: no maximum over the clients is taken,
nor anything else that would show more of one client than a sum does. Two more bytes a block are
summed with the updates: how many clients clipped (an element of r_k / s was further out than
c_k + 1/2, so that not all of it was sent) and how many were at more than FULL of that. The
updates' sum itself could not tell, for where clients pull in opposite directions it is small
however large they are. From one round to the next

    s <- 2 s                  where any client clipped;
    s <- SHRINK^(K / N) s     where none was at more than FULL of what fits, of N clients K a round;
    s                         elsewhere.

Where nobody clips, each residual is left with half a step at most. If all clients take part, the
step follows the largest of them within a factor of 1 / FULL, a round late. If they take turns, it
shrinks as much in N / K rounds, from one turn of a client to its next, as it does in a round of
all: less than it grows when that client clips. So no client falls ever further behind.

Steps are kept as shares of the plan's bound B on an update. The first is a quarter of the one with
which K equal clients at the bound would just fit: AdamW's first updates are about an eighth of its
bound. Steps stay within

    B / (256 K c) <= s <= 2 B / (127 - K),  c the levels of a client of weight 1 / K.

With the largest, c_k s >= 2 p_k B: a client can send twice what it can train. From the smallest,
log2(256 K c / (127 - K)) doublings lead to c_k s >= p_k B for all clients: 8 to 10 for a cohort of
up to 100, 15 at most. A residual takes up no more than p_k B in each of these rounds, and gives off
as much in each round after them. So it is bounded, whatever clients do, and a block in which
nothing moved for long catches up in a few rounds.

Sums of integers do not depend on order: the same bits on any number of processes.

**Averaged moments** travel in the same way, each with residuals and steps of its own: as their
differences from the last average A, which is the same everywhere,

    r_k <- r_k + p_k (m_k - A);  ...;  A <- A + s sum_k q_k / sum_k p_k

No plan knows how large a block's moments are, and they span many powers of ten. So their steps are
shares of a scale that is public too: the clients' largest root of a second moment in the block, or
of matrices that Muon updates their largest momentum, averaged over the cohort of the round before,
four bytes a block in every round of a run that averages moments (which begins with the second). Of
that scale first shares are such that equal clients just fit. An average of roots is at least one
step, because AdamW divides by it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fedrun.aggregation.base import TravellingAggregator
from fedrun.aggregation.blocks import (
    FULL,
    SHRINK,
    SMALLEST,
    WEIGHT_BITS,
    block_range,
    follow,
    give_off,
    residual_of,
    update_slice,
)
from fedrun.aggregation.bounds import Bounds, bound_exceeded
from fedrun.aggregation.slices import Peaks, slice_width
from fedrun.common.pinned import brought
from fedrun.config import INT8_COHORT
from fedrun.distributed.data_plane import DataPlane
from fedrun.strategies.base import Strategy

BLOCK = 256  # elements that share a step
LEVELS = INT8_COHORT + 1  # of all clients together, on either side of zero: their sum fits a byte
FIRST = 1 / 4  # step, as a share of what equal clients at the bound need
FIRST_OF_MOMENTS = 1.0


class Int8Aggregator(TravellingAggregator):
    """The sum of an update, and of differences of averaged moments, over a cohort of at most
    INT8_COHORT clients.

    `buffer` is int32: for each vector words of four elements, each the sum of q_k + c_k, and words
    of four blocks, each the number of clients that clipped, then those of clients that were full;
    with moments the blocks' scales; then the sum of the weights and that of c_k over the clients
    that took part.
    """

    def __init__(self, strategy: Strategy, size: int, like: Tensor, cohort: int, clients: int,
                 plane: DataPlane | None = None, moments: Sequence[str] = (), *,
                 updates: bool = True) -> None:
        """like: a tensor with the model's type and device; cohort: clients in a round, of all the
        run's `clients`; moments: that are averaged besides, or alone if updates travel in another
        way."""
        assert set(strategy.sums) == {"delta"}, "checked with the config"
        assert cohort <= min(INT8_COHORT, clients)
        blocks = -(-size // BLOCK)
        width = -(-slice_width(size, like) // BLOCK) * BLOCK
        each = _Part.length(blocks)
        scales = blocks if moments else 0
        super().__init__(size, plane, (updates + len(moments)) * each + scales + 2, torch.int32,
                         torch.empty(1 + updates + len(moments), width, dtype=like.dtype,
                                     device=like.device))
        self.cohort, self._blocks = cohort, blocks
        self._words = torch.empty(width // 4, dtype=torch.int32, device=like.device)
        equal = 1.0 / (cohort * _levels(cohort, 1.0 / cohort))
        self._range = SMALLEST * equal, 2.0 / (LEVELS - cohort)
        self._shrink = SHRINK ** (cohort / clients)

        def shares(first: float) -> Tensor:
            return self.plane.replicated(torch.full((blocks,), first * equal, dtype=like.dtype,
                                                    device=like.device))

        self._updates = ("delta",) if updates else ()
        self.steps = shares(FIRST) if updates else torch.empty(0)
        """The next round's steps of updates, (blocks,), as shares of its bound: the same on every
        worker, and part of what a run resumes from."""
        self.moment_steps = {name: shares(FIRST_OF_MOMENTS) for name in moments}
        """The same of the moments, as shares of `scales`."""
        self.scales = torch.zeros(scales, dtype=like.dtype, device=like.device)
        """The last round's scales of the moments, (blocks,); part of that too."""
        if scales:
            self.scales = self.plane.replicated(self.scales)
        self._parts = {name: _Part(each) for name, each in (
            dict.fromkeys(self._updates, self.steps) | self.moment_steps).items()}
        self._lay_out(tuple(moments))
        self._bounds = {"delta": math.inf}

    @property
    def residuals(self) -> tuple[str, ...]:
        return tuple(self._moving)

    @property
    def carried(self) -> dict[str, Tensor]:
        moments = {f"steps.{n}": t for n, t in self.moment_steps.items()}
        return ({"steps": self.steps} if self._updates else {}) | moments | (
            {"scales": self.scales} if moments else {})

    def _lay_out(self, moments: tuple[str, ...]) -> None:
        """Make the buffer that of a round which averages these moments."""
        self.moments = moments
        self._moving = {name: self._parts[name] for name in (*self._updates, *moments)}
        each = _Part.length(self._blocks)
        end = len(self._moving) * each
        self._scales_at = slice(end, end + len(self.scales))
        self._shorten(end + len(self.scales) + 2)
        for number, part in enumerate(self._moving.values()):
            part.lay_out(self._buffer, number * each)

    def begin(self, bounds: Bounds, moments: Sequence[str] | None = None) -> None:
        self._lay_out(tuple(self.moment_steps) if moments is None else tuple(moments))
        self._bounds = {"delta": bounds.update} | dict.fromkeys(self.moments, math.inf)
        for name in self._updates:
            self._parts[name].begin(bounds.update)
        for name in self.moments:
            self._parts[name].begin(self.scales)
        self._grid = 2.0 ** (WEIGHT_BITS - math.ceil(math.log2(bounds.clip)))  # of the scales
        self.buffer.zero_()

    def add(self, client: Mapping[str, Tensor], weight: float, start: Tensor | None = None) -> str:
        """As `Aggregator.add`; the client's residuals (see `residual_of`), (size,) each, take up
        what is weighted and give off what is sent. They do not change if the client is left out.
        With moments, its `peaks` are the blocks' scales, (blocks,)."""
        if left_out := self._left_out(client, start):
            return left_out
        levels = _levels(self.cohort, weight)
        for name, part in self._moving.items():
            residual = client[residual_of(name)]
            for a, b in self.slices.ranges:
                residual[a:b].add_(self._difference(name, client, start, a, b), alpha=weight)
                part.send(residual, levels, a, b, self._scratch)
        if self.moment_steps:
            scales = torch.mul(client["peaks"], weight * self._grid).round_()
            self.buffer[self._scales_at].add_(scales.to(torch.int32))
        self.buffer[-2] += round(weight * 2**WEIGHT_BITS)
        self.buffer[-1] += levels
        return ""

    def _left_out(self, client: Mapping[str, Tensor], start: Tensor | None) -> str:
        """Why a client is, or an empty string."""
        peaks, names = Peaks(), [name for name in self._moving for _ in self.slices.ranges]
        for name in self._moving:
            for a, b in self.slices.ranges:
                peaks.add(self._difference(name, client, start, a, b))
        reasons = (bound_exceeded(name, peak, self._bounds[name])
                   for name, peak in zip(names, peaks.read(), strict=True))
        return next(filter(None, reasons), "")

    def _difference(self, name: str, client: Mapping[str, Tensor], start: Tensor | None, a: int,
                    b: int) -> Tensor:
        """A slice of what the client adds to a vector's sum."""
        if name in self.moment_steps:
            out = self._scratch[1, :b - a]
            return torch.sub(client[name][a:b], brought(self.averages[name][a:b], out), out=out)
        return update_slice(client, start, a, b, self._scratch[1])

    def settle(self) -> None:
        """Workers, after the sum: choose the next round's steps."""
        mine = self.plane.section(self._blocks)
        for part in self._moving.values():
            clipped, full = (self._sum(where).view(torch.uint8)[mine.start:mine.stop]
                             for where in part.counts)
            follow(part.shares[mine.start:mine.stop], clipped > 0, full > 0, self._shrink,
                   self._range)
        if self.moment_steps:
            scales = self._sum(self._scales_at)[mine.start:mine.stop].to(self.scales.dtype)
            step = 1.0 / (self._grid * max(self.total_weight(), 2.0**-WEIGHT_BITS))
            self.scales[mine.start:mine.stop] = scales.mul_(step).clamp_(min=step)

    def _sum(self, where: slice) -> Tensor:
        """Words of the buffer, summed over all workers."""
        return torch.stack([part[where] for part in self._reduced]).sum(0, dtype=torch.int32)

    def total_weight(self) -> float:
        return self._total(-2) / 2.0**WEIGHT_BITS

    def _total(self, index: int) -> int:
        """One of the two numbers at the buffers' ends, summed over all workers."""
        return sum(int(part[index]) for part in self._reduced)

    def means(self, a: int, b: int, weight: float) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        levels, found = self._total(-1), {}
        first, last = block_range(a, b, BLOCK)
        for row, (name, part) in zip((0, *range(2, len(self._scratch))), self._moving.items(),
                                     strict=False):
            words = self._sum_over_workers(part.start + first * BLOCK // 4,
                                           part.start + last * BLOCK // 4, self._words)
            mean = self._scratch[row, :(last - first) * BLOCK].view(-1, BLOCK)
            mean.copy_(words.view(torch.uint8).view(-1, BLOCK)).sub_(float(levels))
            step = part.steps[first:last, None]
            mean.mul_(step).div_(weight)
            if name in self.moment_steps:
                mean.view(-1)[:b - a].add_(brought(self.averages[name][a:b],
                                                   self._scratch[1, :b - a]))
                if name == "rms":
                    torch.maximum(mean, step, out=mean)
            found[name] = mean.view(-1)[:b - a]
        return {name: found.pop(name) for name in self._updates}, found


class _Part:
    """A vector's steps, and in a round that moves it its part of the buffer."""

    def __init__(self, shares: Tensor) -> None:
        """shares: steps of the next round, (blocks,), as shares of a bound or of scales."""
        self.shares = shares
        self.steps = torch.empty_like(shares)
        """Of this round."""
        self.start = 0

    @staticmethod
    def length(blocks: int) -> int:
        """Words of the buffer that a vector of this many blocks takes."""
        return blocks * BLOCK // 4 + 2 * -(-blocks // 4)

    def lay_out(self, buffer: Tensor, start: int) -> None:
        """Take the part of the buffer that begins with this word."""
        blocks = len(self.shares)
        words, counts = blocks * BLOCK // 4, -(-blocks // 4)
        self.start = start
        self.counts = [slice(start + words + i * counts, start + words + (i + 1) * counts)
                       for i in range(2)]
        self._bytes = buffer[start:start + words].view(torch.uint8).view(blocks, BLOCK)
        self._clipped, self._full = (buffer[where].view(torch.uint8)[:blocks]
                                     for where in self.counts)

    def begin(self, whole: float | Tensor) -> None:
        """Fix the round's steps: shares of this."""
        torch.mul(self.shares, whole, out=self.steps)

    def send(self, residual: Tensor, levels: int, a: int, b: int, scratch: Tensor) -> None:
        """Move what fits the grid from a slice of a client's residual to the buffer."""
        q, furthest = give_off(residual, self.steps, BLOCK, levels, a, b, scratch)
        first, last = block_range(a, b, BLOCK)
        fits = levels + 0.5
        self._clipped[first:last].add_(furthest > fits)
        self._full[first:last].add_(furthest > FULL * fits)
        self._bytes[first:last].add_(q.add_(levels).to(torch.uint8))


def _levels(cohort: int, weight: float) -> int:
    """Levels on either side of zero of a client of this weight."""
    return 1 + math.floor((LEVELS - cohort) * weight)
