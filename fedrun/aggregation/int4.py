"""Updates in four bits each way, with error feedback on both.

Sums of integers need more bits than their terms, and in four there is no room to leave. So nothing
is summed on its way: the terms are exchanged, and their sum is rounded again before it is sent.

    client k   r_k <- r_k + p_k d_k;  q_k = clamp(round(r_k / s), -7, 7);  r_k <- r_k - s q_k
    workers    each sends everyone else its section of the q_k                         all-to-all
    owner      R <- R + s sum_k q_k;  t = max |R| / 7;  Q = round(R / t);  R <- R - t Q
    owners     each sends everyone else Q and t of its section                         all-gather
    workers    S = t Q, and every one of them makes the same update of it

The owner of a section is a worker, or the workers of one machine together, which read each other's
memory. Of an update nothing is lost, only delayed: in the client's residual r_k, or in the server's
R. Tang et al. (2019), "DoubleSqueeze: Parallel Stochastic Gradient Descent with Double-Pass
Error-Compensated Compression", there with gradients and one server.

Blocks of 64 elements have a step of their own, and sections end where blocks do: shorter ones than
in int8.py, since seven levels tell apart less where a row that hardly moves shares its step with
one that moves far, as rows of an embedding do. A client's step s is the same for all clients and
known before the round, as in int8.py and by the same law: it is doubled where any client clipped,
and shrinks where none came near it. So a byte goes with each block that says which of the three it
was; the owner sends back the largest. The step t of the sum is chosen from the sum itself, and sent
with it in two bytes (bfloat16).

Client's residual. All clients have seven levels, whatever their weights p_k. Of K equal clients at
the bound B of the plan, B / (7 K) would just fit each; the first step is an eighth of it, since
AdamW's first updates are an eighth of their bound. Steps stay within

    B / (256 * 7 K) <= s <= 2 B / 7.

With the largest, 7 s >= 2 p_k B: a client can send twice what it can train. From the smallest,
log2(256 K p_k) doublings lead to 7 s >= p_k B: 8 for equal clients, whatever their number. A
residual takes up no more than p_k B in each of these rounds, and gives off as much in each round
after them. So it is bounded, whatever clients do; where nobody clips it is half a step at most.

Server's residual. R / t is 7 at most, but for the rounding of t to eight bits: nothing is clipped,
and what stays is at most t / 2, a fourteenth of the largest |R|. With M the largest sum of any
round in the block, |R| <= (|R| + M) / 13.9, so it never exceeds M / 12. (If clients are left out,
what was kept back is divided by the weights of the others alone, as their residuals are.)

The same bits in any world: the sum of the q_k is one of integers, R is worked out for each element
by itself, in operations that are rounded one by one, and t for each block. Which worker does it
makes no difference. R is part of the run's state, an element a parameter; every machine has all of
it in memory and its own section up to date, the others after `complete`, which a checkpoint needs.
When a run resumes on other workers it is cut into their sections.

What is sent. With one client a worker and machine: 33 bytes a block to the owner, and 35 back, 4.25
bits a parameter on average; and a word for the sum of the weights. The workers of a machine
send their clients' sum together: with up to 18 clients in a byte an element, with more in two. It
is the same back.

**Averaged moments** travel in eight bits beside the updates, by sums of their own (int8.py): a
moment is seldom sent, and where many rounds lie between two averages seven levels are few.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from fedrun.aggregation.base import Aggregator
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
from fedrun.aggregation.int8 import Int8Aggregator
from fedrun.aggregation.packing import LEVELS, TYPES, as_numbers, bits_of_sum, pack, unpack
from fedrun.aggregation.slices import Peaks, slice_width
from fedrun.distributed.data_plane import DataPlane
from fedrun.strategies.base import Strategy

BLOCK = 64  # elements that share a step
FIRST = 1 / 8  # step, as a share of what equal clients at the bound need
FITS = LEVELS + 0.5  # steps from zero
IS_FULL, HAS_CLIPPED = 1, 2  # what a client says of a block, if it is not 0
_PACKED = BLOCK // 2  # bytes of a block in four bits
_ROW = _PACKED + 3  # of the result: then its step, and what clients said
_SMALLEST_STEP = 2.0**-120  # of a result, so that a block of zeros has one
_WEIGHT_BYTES = 8


class Int4Aggregator(Aggregator):
    """The sum of an update over a cohort, in four bits, and of averaged moments, in eight.

    `buffer` is int8, or int16 on workers of more than 18 clients: the sum of q_k, then a number
    for each block: the largest that one of the clients said.
    """

    def __init__(self, strategy: Strategy, size: int, like: Tensor, cohort: int, clients: int,
                 most: int, plane: DataPlane | None = None, moments: Sequence[str] = ()) -> None:
        """like: a tensor with the model's type and device; cohort: clients in a round, of all the
        run's `clients`; most: how many of them one worker may train; moments: that are averaged
        besides."""
        assert set(strategy.sums) == {"delta"}, "checked with the config"
        plane = plane or DataPlane()
        blocks, nodes = -(-size // BLOCK), len(plane.nodes)
        width = -(-slice_width(size, like) // BLOCK) * BLOCK
        super().__init__(size, plane, blocks * (BLOCK + 1), TYPES[max(8, bits_of_sum(most))],
                         torch.empty(2, width, dtype=like.dtype, device=like.device))
        self._blocks = blocks
        self._sums = [part[:-blocks].view(blocks, BLOCK) for part in self._buffers]
        self._said = [part[-blocks:] for part in self._buffers]
        equal = 1.0 / (cohort * LEVELS)
        self._range = SMALLEST * equal, 2.0 / LEVELS
        self._shrink = SHRINK ** (cohort / clients)

        def shared(count: int, dtype: torch.dtype, value: float = 0) -> Tensor:
            return plane.replicated(torch.full((count,), value, dtype=dtype, device=like.device))

        self.steps = shared(blocks, like.dtype, FIRST * equal)
        """The next round's steps of clients, (blocks,), as shares of its bound."""
        self._share = -(-blocks // nodes)  # blocks of each node's section, but for the last ones
        self._section = range(blocks)[plane.node * self._share:(plane.node + 1) * self._share]
        padded = nodes * self._share
        self._residual = shared(padded * BLOCK, like.dtype)
        self._results = shared(padded * _ROW, torch.uint8).view(padded, _ROW)
        self._bits = bits_of_sum(min(cohort, most * max(map(len, plane.nodes))))
        """Of an element of the sum over a machine, on its way to the owner."""
        if nodes > 1:
            row = _sent_row(self._bits)
            self._sent, self._received = (shared(padded * row, torch.uint8).view(padded, row)
                                          for _ in range(2))
        self._round_steps = torch.empty_like(self.steps)
        self._bound = math.inf
        self._weight = self._total = 0
        self._of_moments = Int8Aggregator(strategy, size, like, cohort, clients, plane, moments,
                                          updates=False) if moments else None
        if self._of_moments is not None:
            self.moment_steps = self._of_moments.moment_steps

    @property
    def memory(self) -> tuple[Tensor, ...]:
        return *super().memory, *(self._of_moments.memory if self._of_moments else ())

    @property
    def residuals(self) -> tuple[str, ...]:
        return ("delta", *self.moments)

    @property
    def carried(self) -> dict[str, Tensor]:
        return {"steps": self.steps} | (self._of_moments.carried if self._of_moments else {})

    @property
    def carried_in_sections(self) -> dict[str, Tensor]:
        return {"residual": self._residual[:self.size]}

    @property
    def bytes_sent(self) -> int:
        return self._blocks * (_PACKED + 1) + _WEIGHT_BYTES + self._bytes_of_moments

    @property
    def bytes_received(self) -> int:
        return self._blocks * _ROW + _WEIGHT_BYTES + self._bytes_of_moments

    @property
    def _bytes_of_moments(self) -> int:
        return self._of_moments.bytes_sent if self._of_moments else 0

    def exchanged_bytes(self, nodes: int, clients: int) -> int:
        """Bytes of a node's two buffers, for sending and for receiving, if there are this many
        nodes with at most so many clients each."""
        share = -(-self._blocks // nodes)
        return 2 * nodes * share * _sent_row(bits_of_sum(clients)) if nodes > 1 else 0

    # ---- clients ---------------------------------------------------------------------------------

    def begin(self, bounds: Bounds, moments: Sequence[str] | None = None) -> None:
        self._bound = bounds.update
        torch.mul(self.steps, bounds.update, out=self._round_steps)
        self.buffer.zero_()
        self._weight = 0
        if self._of_moments is not None:
            self._of_moments.averages = self.averages
            self._of_moments.begin(bounds, moments)
            self.moments = self._of_moments.moments

    def add(self, client: Mapping[str, Tensor], weight: float, start: Tensor | None = None) -> str:
        """As `Aggregator.add`; the client's `residual`, (size,), takes up what is weighted and
        gives off what is sent. It does not change if the client is left out. With moments more is
        asked for, as by `Int8Aggregator.add`."""
        peaks = Peaks()
        for a, b in self.slices.ranges:
            peaks.add(update_slice(client, start, a, b, self._scratch[1]))
        for peak in peaks.read():
            if left_out := bound_exceeded("delta", peak, self._bound):
                return left_out
        if self._of_moments is not None and (left_out := self._of_moments.add(client, weight)):
            return left_out
        residual, rank = client[residual_of("delta")], self.plane.node_rank
        for a, b in self.slices.ranges:
            residual[a:b].add_(update_slice(client, start, a, b, self._scratch[1]), alpha=weight)
            q, furthest = give_off(residual, self._round_steps, BLOCK, LEVELS, a, b,
                                   self._scratch)
            first, last = block_range(a, b, BLOCK)
            self._sums[rank][first:last].add_(q.to(self._buffer.dtype))
            said = self._said[rank][first:last]
            says = (furthest > FULL * FITS) * IS_FULL + (furthest > FITS) * (HAS_CLIPPED - IS_FULL)
            torch.maximum(said, says.to(said.dtype), out=said)
        self._weight += round(weight * 2**WEIGHT_BITS)
        return ""

    # ---- workers ---------------------------------------------------------------------------------

    def reduce(self) -> None:
        """Workers: exchange the sections, sum and round this node's, gather all, and choose the
        next round's steps."""
        plane, alone = self.plane, len(self.plane.nodes) == 1
        self._total, = plane.sum_words([self._weight])  # by then all have filled their buffers
        if not alone:
            self._exchange()
        for piece in self._pieces(self._section):
            self._round(piece, *self._of_node(piece) if alone else self._of_all(piece))
        plane.barrier()
        if not alone:
            if plane.node_rank == 0:
                plane.gather_sections(self._results.view(-1))
            plane.barrier()
        mine = plane.section(self._blocks)
        said = self._results[mine.start:mine.stop, -1]
        follow(self.steps[mine.start:mine.stop], said >= HAS_CLIPPED, said >= IS_FULL, self._shrink,
               self._range)
        if self._of_moments is not None:
            self._of_moments.reduce()

    def complete(self) -> None:
        if len(self.plane.nodes) > 1:
            if self.plane.node_rank == 0:
                self.plane.gather_sections(self._residual)
            self.plane.barrier()

    def _exchange(self) -> None:
        """Workers: send each node its section of the sum over this one."""
        for piece in self._pieces(range(self._blocks)):
            sums, said = self._of_node(piece)
            rows = self._sent[piece.start:piece.stop]
            rows[:, :-1] = pack(sums, self._bits)
            rows[:, -1] = said
        self.plane.barrier()
        if self.plane.node_rank == 0:
            count, length = len(self.plane.nodes), self._share * self._sent.shape[1]
            sections = [range(node * length, (node + 1) * length) for node in range(count)]
            self.plane.send_sections(self._sent.view(-1), sections, [True] * count,
                                     self._received.view(-1))
        self.plane.barrier()

    def _pieces(self, blocks: range) -> list[range]:
        """This worker's part of what its node does with these blocks, in pieces that fit the
        cache."""
        length = self._scratch.shape[1] // BLOCK
        pieces = [blocks[place:place + length] for place in range(0, len(blocks), length)]
        mine = self.plane.section(len(pieces))
        return pieces[mine.start:mine.stop]

    def _of_node(self, piece: range) -> tuple[Tensor, Tensor]:
        """The sum of these blocks over the clients of this node, and the largest that one said."""
        return _combined((sums[piece.start:piece.stop], said[piece.start:piece.stop])
                         for sums, said in zip(self._sums, self._said, strict=True))

    def _of_all(self, piece: range) -> tuple[Tensor, Tensor]:
        """The same of blocks of this node's section over all clients."""
        sections = self._received.view(len(self.plane.nodes), self._share, -1)
        first, last = piece.start - self._section.start, piece.stop - self._section.start
        return _combined((unpack(rows[:, :-1], self._bits), rows[:, -1])
                         for rows in sections[:, first:last])

    def _round(self, piece: range, sums: Tensor, said: Tensor) -> None:
        """Add the sum of these blocks to the residual, and move what four bits can say of it to the
        results."""
        a, b = piece.start * BLOCK, piece.stop * BLOCK
        held = self._residual[a:b].view(-1, BLOCK)
        scaled = self._scratch[0, :b - a].view(-1, BLOCK).copy_(sums)
        held.add_(scaled.mul_(self._round_steps[piece.start:piece.stop, None]))
        furthest = torch.maximum(held.amax(1), held.amin(1).neg_())
        steps = furthest.div_(LEVELS).clamp_(min=_SMALLEST_STEP).to(torch.bfloat16)
        step = steps[:, None].to(held.dtype)
        q = torch.div(held, step, out=scaled).round_()  # 7.03 at most: within the levels
        rows = self._results[piece.start:piece.stop]
        rows[:, :_PACKED] = pack(q, 4)
        rows[:, _PACKED:-1] = steps.view(torch.uint8).view(-1, 2)
        rows[:, -1] = said
        held.sub_(q.mul_(step))

    def total_weight(self) -> float:
        return self._total / 2.0**WEIGHT_BITS

    def means(self, a: int, b: int, weight: float) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        first, last = block_range(a, b, BLOCK)
        rows = self._results[first:last]
        mean = self._scratch[0, :(last - first) * BLOCK].view(-1, BLOCK)
        mean.copy_(unpack(rows[:, :_PACKED], 4))
        steps = as_numbers(rows[:, _PACKED:-1], torch.bfloat16)
        mean.mul_(steps.to(mean.dtype)).div_(weight)
        averages = self._of_moments.means(a, b, weight)[1] if self._of_moments else {}
        return {"delta": mean.view(-1)[:b - a]}, averages


def _sent_row(bits: int) -> int:
    """Bytes of a block on its way to the owner: its elements, and what clients said of it."""
    return bits * BLOCK // 8 + 1


def _combined(parts: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """The sum of integers, (blocks, BLOCK), and the largest of what was said, (blocks,)."""
    (first, said), *others = parts
    total = first.to(torch.int32)
    for sums, one in others:
        total.add_(sums)
        said = torch.maximum(said, one)
    return total, said
