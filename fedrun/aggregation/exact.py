"""Exact sums of client terms: integers on a fixed-point grid.

The result of a floating-point sum depends on its order, and the order on the number of processes.
Here every term is rounded once, to an integer multiple of a grid step that the plan of the round
fixes, and integers are summed, first over the clients of a worker and then over the workers: the
sum has the same bits whatever the placement. It cannot overflow: an update is at most the round's
bound in size (AdamW cannot move further), gradients have a fixed bound, and the weights of a cohort
sum to at most one (or to a power of two that the method declares). A client beyond a bound is left
out.

Updates fit int32, and so do averages of clipped gradients and of their sizes, whose bound is
--grad_clip. Squared gradients span too many powers of ten for it, and weights that are known only
after training need headroom: their sums are int64, twice the bytes for each vector.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import cycle

import torch
from torch import Tensor

from fedrun.aggregation.base import TravellingAggregator
from fedrun.aggregation.bounds import Bounds, bound_exceeded
from fedrun.aggregation.slices import Peaks, slice_width
from fedrun.common.pinned import brought
from fedrun.distributed.data_plane import DataPlane
from fedrun.model.kernels import current_device, uses_triton
from fedrun.strategies.base import CLIENT_VECTORS, Strategy

# Bits below the sign, one of them spare.
_BITS = {torch.int32: 30, torch.int64: 62}
MOMENTS = ("exp_avg", "exp_avg_sq")
SECOND = ("exp_avg_sq", "rms")  # of averaged moments, those that AdamW divides by


class ExactAggregator(TravellingAggregator):
    """Client terms at full precision: integers on the round's grid, or (`exact` false) floats.

    `buffer` is (number of sums * size + 1,): the method's vectors one after the other, then the
    moments that the round averages, and last the sum of the weights of the clients that took part.

    Besides the collective, the cost of a round is memory traffic. So a client's vectors are read
    once, slice by slice, and everything that is done with a slice is done while it is in the cache.
    The first term of a round overwrites the old contents of the buffer. If there is none, reading
    `buffer` zeroes it.
    """

    def __init__(self, strategy: Strategy, size: int, like: Tensor, exact: bool,
                 moments: Sequence[str] = (), plane: DataPlane | None = None) -> None:
        """like: a tensor with the model's type and device; moments: that are averaged besides, by
        their names in CLIENT_VECTORS."""
        self.strategy = strategy
        summed = [*strategy.sums.values(), *(CLIENT_VECTORS[name] for name in moments)]
        narrow = (like.dtype == torch.float32 and not strategy.weight_headroom
                  and not any(exponents.gradient for exponents in summed))
        dtype = (torch.int32 if narrow else torch.int64) if exact else like.dtype
        self.exact = exact
        self._bits = _BITS[dtype] - strategy.weight_headroom if exact else 0
        width, count = slice_width(size, like), len(summed)
        super().__init__(
            size, plane, count * size + 1, dtype,
            # A row for each sum and one for the update; a single term can use the update's row.
            torch.empty(count + (count > 1), width, dtype=like.dtype, device=like.device))
        self._width = width
        self._rows = self._scratch.unbind()
        self._all_moments = tuple(moments)
        self._lay_out(self._all_moments)
        self._stale = True  # the buffer still holds the previous round's sum
        self._rounded = torch.empty(width, dtype=dtype, device=like.device)
        self._bounds = dict.fromkeys(CLIENT_VECTORS, torch.finfo(like.dtype).max)
        self._table = self.slices.table(strategy.global_means, like.device
                                        ) if strategy.global_means else None
        # A vector itself is the term, nothing that the method computes.
        self._in_one_pass = (exact and uses_triton(like) and like.dtype == torch.float32
                             and strategy.inputs == ("delta",) == tuple(strategy.sums)
                             and type(strategy).client_term is Strategy.client_term)

    def _lay_out(self, moments: tuple[str, ...]) -> None:
        """Make the buffer that of a round which averages these moments."""
        self.moments = moments
        self._names = (*self.strategy.sums, *moments)
        self._exponents = (*self.strategy.sums.values(), *(CLIENT_VECTORS[m] for m in moments))
        self._scales = [1.0] * len(self._names)
        self._shorten(len(self._names) * self.size + 1)
        self._own = [one.split(self._width)  # [sum][slice]
                     for one in self._buffer[:-1].split(self.size)]

    @property
    def buffer(self) -> Tensor:
        self._zero_if_stale()
        return self._buffer

    def _zero_if_stale(self) -> None:
        if self._stale:
            self._buffer.zero_()
            self._stale = False

    def reduce(self) -> None:
        """Workers: sum over all of them; a worker without a client in the sum adds zeros."""
        self._zero_if_stale()
        super().reduce()

    def send(self) -> None:
        self._zero_if_stale()
        super().send()

    def begin(self, bounds: Bounds, moments: Sequence[str] | None = None) -> None:
        self._stale = True
        self._lay_out(self._all_moments if moments is None else tuple(moments))
        if self.exact:
            self._bounds = {name: bounds.of(exponents)
                            for name, exponents in CLIENT_VECTORS.items()}
            # Powers of two: scaling is exact, so rounding to the grid is the only loss.
            self._scales = [2.0 ** (self._bits - math.ceil(math.log2(bounds.of(exponents))))
                            for exponents in self._exponents]

    def add(self, client: Mapping[str, Tensor], weight: float, start: Tensor | None = None) -> str:
        if self.exact:
            peaks = self._add_integers(client, weight, start)
        else:
            peaks = Peaks()
            for _, slices in self._read(client, start):
                peaks.add(*slices.values())
        if left_out := self._bound_exceeded(client, start, peaks):
            if self.exact and not self._stale:
                self._add_integers(client, weight, start, undo=True)
            return left_out
        if not self.exact:  # floats cannot be taken back exactly: everything was checked first
            for index, slices in self._read(client, start):
                self._add_slice(slices, weight, index)
        if self._stale:
            self._buffer[-1] = 0
            self._stale = False
        self._buffer[-1] += round(weight * 2.0**self._bits) if self.exact else weight
        return ""

    def _add_integers(self, client: Mapping[str, Tensor], weight: float, start: Tensor | None,
                      undo: bool = False) -> Peaks:
        """Add a client's terms, or take them back, which restores every bit. Its vectors are
        checked in the same pass, and since their peaks are read after it, a GPU is waited for once.
        """
        peaks = Peaks()
        if self._in_one_pass and (start is None or start.device == self.device):
            from fedrun.aggregation import triton_sum  # see gpu_head.py

            sums = zip(self._names, self._scales, self._buffer[:-1].split(self.size), strict=True)
            for name, scale, own in sums:
                trained = client.get("parameters") if name == "delta" else None
                with current_device(own):
                    peaks.add(triton_sum.add_term(
                        client[name] if trained is None else trained,
                        None if trained is None else start, own, weight * scale,
                        2.0**_BITS[own.dtype], first=self._stale, undo=undo))
            return peaks
        for index, slices in self._read(client, start):
            peaks.add(*slices.values())
            self._add_slice(slices, weight, index, undo)
        return peaks

    def _read(self, client: Mapping[str, Tensor], start: Tensor | None
              ) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """A client's vectors slice by slice, with its update `delta` made from `parameters`."""
        columns = [vector.split(self._width) for vector in client.values()]
        starts = start.split(self._width) if start is not None and "parameters" in client else ()
        names = ["delta" if starts and name == "parameters" else name for name in client]
        for index, column in enumerate(zip(*columns, strict=True)):
            slices = dict(zip(names, column, strict=True))
            if starts:
                trained = slices["delta"]
                row = _fitting(self._rows[-1], trained)
                slices["delta"] = torch.sub(trained, brought(starts[index], row), out=row)
            yield index, slices

    def _bound_exceeded(self, client: Mapping[str, Tensor], start: Tensor | None, peaks: Peaks
                        ) -> str:
        """Why the client cannot be added: its first vector with an element that is not finite or
        exceeds its bound. Empty if it can."""
        names = ["delta" if start is not None and name == "parameters" else name for name in client]
        found = (bound_exceeded(name, peak, self._bounds[name])
                 for name, peak in zip(cycle(names), peaks.read(), strict=False))
        return next(filter(None, found), "")

    def _add_slice(self, slices: Mapping[str, Tensor], weight: float, index: int,
                   undo: bool = False) -> None:
        terms = (*self.strategy.client_term(slices), *(slices[name] for name in self.moments))
        for i, (term, scale) in enumerate(zip(terms, self._scales, strict=True)):
            scaled = torch.mul(term, weight * scale, out=_fitting(self._rows[i], term))
            own = self._own[i][index]
            if self.exact:
                scaled.round_()
            if self._stale:
                own.copy_(scaled)
            elif self.exact:  # torch converts floats to integers much faster than it adds them
                rounded = _fitting(self._rounded, scaled).copy_(scaled)
                if undo:
                    own.sub_(rounded)
                else:
                    own.add_(rounded)
            else:
                own.add_(scaled)

    @property
    def scale(self) -> float:
        """Grid steps of one, of the round's first sum."""
        return self._scales[0]

    def total_weight(self) -> float:
        return float(sum(part[-1].item() for part in self._reduced)) / 2.0**self._bits

    def means(self, a: int, b: int, weight: float) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        means = []
        for i, name in enumerate(self._names):
            step = 1.0 / (self._scales[i] * weight)
            mean = self._scratch[i, :b - a].copy_(self._sum(i, a, b)).mul_(step)
            if name in SECOND and i >= len(self.strategy.sums) and self.exact:
                # At least the smallest step of the grid: AdamW divides by its root.
                mean.clamp_(min=step)
            means.append(mean)
        count = len(self.strategy.sums)
        return (dict(zip(self._names[:count], means[:count], strict=True)),
                dict(zip(self.moments, means[count:], strict=True)))

    def global_means(self, weight: float) -> dict[str, float]:
        table = self._table
        if table is None:
            return {}
        rows = {name: self._names.index(name) for name in self.strategy.global_means}
        for name, i in rows.items():
            for index, a, b in self.slices.own():
                table.write(name, index, self._sum(i, a, b).sum(dtype=torch.float64))
        self.plane.barrier()
        return {name: table.sum(name) / self.size / (self._scales[i] * weight)
                for name, i in rows.items()}

    def _sum(self, index: int, a: int, b: int) -> Tensor:
        """Elements a to b of one of the sums over all workers, still scaled."""
        return self._sum_over_workers(index * self.size + a, index * self.size + b, self._rounded)


def _fitting(memory: Tensor, vector: Tensor) -> Tensor:
    """As much of `memory` as the vector has elements: all of it but for the last slice."""
    size = vector.numel()
    return memory if memory.numel() == size else memory[:size]
