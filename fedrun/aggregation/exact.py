"""Exact sums of client terms: integers on a fixed-point grid.

Floating-point sums depend on their order, and the order on the number of processes. Here every
term is rounded once to an integer multiple of a grid step that the plan of the round fixes, and
integers are summed, first over the clients of a worker and then over the workers: the result has
the same bits whatever the placement. An update is at most the round's bound in size (AdamW cannot
move further), gradients have a fixed bound, and the weights of a cohort sum to one (or to a power
of two that the strategy declares), so the sum cannot overflow; a client beyond a bound is left out.

Updates alone fit int32. Squared gradients span too many powers of ten for it, and weights that are
known only after training need room: their sums are int64, twice the bytes for each vector.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

from fedrun.aggregation.base import Aggregator, bound_exceeded, max_abs, slice_width
from fedrun.aggregation.bounds import Bounds
from fedrun.distributed.data_plane import DataPlane
from fedrun.strategies.base import CLIENT_VECTORS, ServerRound, Strategy

# Bits below the sign, one spare.
_BITS = {torch.int32: 30, torch.int64: 62}
MOMENTS = ("exp_avg", "exp_avg_sq")


class ExactAggregator(Aggregator):
    """Client terms at full precision: integers on the round's grid, or floats.

    `buffer` is (number of sums * size + 1,): the strategy's vectors one after the other, then, with
    `average_moments`, AdamW's two, and the sum of the weights of the clients that took part.

    What a round costs besides the collective is traffic to memory. So a client's vectors are read
    once, slice by slice, and all that is to be done with a slice is done while it is in the cache;
    and the first term overwrites what the last round has left, which only a look at an empty sum
    sets to zero.
    """

    def __init__(self, strategy: Strategy, size: int, like: Tensor, exact: bool,
                 average_moments: bool = False, plane: DataPlane | None = None) -> None:
        moments = MOMENTS if average_moments else ()
        self.sums = {**strategy.sums, **{name: CLIENT_VECTORS[name] for name in moments}}
        narrow = (like.dtype == torch.float32 and not strategy.weight_headroom
                  and not any(units.gradient for units in self.sums.values()))
        kind = (torch.int32 if narrow else torch.int64) if exact else like.dtype
        self.exact = exact
        self._bits = _BITS[kind] - strategy.weight_headroom if exact else 0
        width = slice_width(size, like.device)
        super().__init__(
            strategy, size, plane, len(self.sums) * size + 1, kind,
            # A row for each sum, and one for the update; a single term takes its place.
            torch.empty(len(self.sums) + (len(self.sums) > 1), width, dtype=like.dtype,
                        device=like.device), moments)
        self._rows = self._scratch.unbind()
        self._own = [one.split(width) for one in self._buffer[:-1].split(size)]  # slices, by sum
        self._stale = True  # nothing was added in this round: the buffer holds another's
        self._rounded = torch.empty(width, dtype=kind, device=like.device)
        self._bounds = dict.fromkeys(CLIENT_VECTORS, torch.finfo(like.dtype).max)
        self._scales = dict.fromkeys(self.sums, 1.0)

    @property
    def buffer(self) -> Tensor:
        self._fill()
        return self._buffer

    def _fill(self) -> None:
        """Before the sum is read: make it zeros where no client has been added."""
        if self._stale:
            self._buffer.zero_()
            self._stale = False

    def reduce(self, residuals: Iterable[Tensor] = ()) -> None:
        """Workers: sum over all of them; a worker of which no client took part adds zeros."""
        self._fill()
        super().reduce(residuals)

    def begin(self, bounds: Bounds) -> None:
        self._stale = True
        if self.exact:
            self._bounds = {name: bounds.of(units) for name, units in CLIENT_VECTORS.items()}
            # Powers of two: scaling is exact, and rounding to the grid the only loss.
            self._scales = {name: 2.0 ** (self._bits - math.ceil(math.log2(bounds.of(units))))
                            for name, units in self.sums.items()}

    def add(self, client: Mapping[str, Tensor], weight: float, start: Tensor | None = None) -> str:
        """Add a client's terms, times its weight; why not, with nothing added, where it is left
        out.

        client: the strategy's inputs, and the moments where they are averaged, (size,) each.
        """
        for number, slices in self._read(client, start):
            if refused := self._bound_exceeded(slices):
                if self.exact:
                    self._take_back(client, weight, start, number)
                return refused
            if self.exact:
                self._add_slice(slices, weight, number)
        if not self.exact:  # floats cannot be taken back: all was looked at before
            for number, slices in self._read(client, start):
                self._add_slice(slices, weight, number)
        if self._stale:
            self._buffer[-1] = 0
            self._stale = False
        self._buffer[-1] += round(weight * 2.0**self._bits) if self.exact else weight
        return ""

    def _read(self, client: Mapping[str, Tensor], start: Tensor | None
              ) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """A client's vectors slice by slice, its update in place of its parameters."""
        columns = [vector.split(self._width) for vector in client.values()]
        starts = start.split(self._width) if start is not None and "delta" in client else ()
        for number, column in enumerate(zip(*columns, strict=True)):
            slices = dict(zip(client, column, strict=True))
            if starts:
                trained = slices["delta"]
                slices["delta"] = torch.sub(trained, starts[number],
                                            out=_as_long(self._rows[-1], trained))
            yield number, slices

    def _bound_exceeded(self, slices: Mapping[str, Tensor]) -> str:
        """Why these slices cannot be added: of the first vector with an element that is not finite
        or beyond its bound."""
        found = (bound_exceeded(name, max_abs(vector), self._bounds[name])
                 for name, vector in slices.items())
        return next(filter(None, found), "")

    def _add_slice(self, slices: Mapping[str, Tensor], weight: float, number: int) -> None:
        terms = (*self.strategy.client_term(slices), *(slices[name] for name in self.moments))
        for i, (term, scale) in enumerate(zip(terms, self._scales.values(), strict=True)):
            scaled = torch.mul(term, weight * scale, out=_as_long(self._rows[i], term))
            own = self._own[i][number]
            if self.exact:
                scaled.round_()
            if self._stale:
                own.copy_(scaled)
            elif self.exact:  # torch adds floats to integers much slower than it converts them
                own.add_(_as_long(self._rounded, scaled).copy_(scaled))
            else:
                own.add_(scaled)

    def _take_back(self, client: Mapping[str, Tensor], weight: float, start: Tensor | None,
                   stop: int) -> None:
        """Undo what a client has added to integers before slice `stop`."""
        if self._stale:
            return
        for number, slices in self._read(client, start):
            if number == stop:
                return
            self._add_slice(slices, -weight, number)

    def _total_weight(self) -> float:
        return float(sum(part[-1].item() for part in self._total)) / 2.0**self._bits

    def _means(self, a: int, b: int, weight: float) -> dict[str, Tensor]:
        means = {}
        for i, name in enumerate(self.sums):
            step = 1.0 / (self._scales[name] * weight)
            means[name] = self._scratch[i, :b - a].copy_(self._sum(i, a, b)).mul_(step)
            if name == "exp_avg_sq" and self.exact:
                # Not less than the grid can tell from zero: AdamW divides by its root.
                means[name].clamp_(min=step)
        return means

    def _with_global_means(self, context: ServerRound, weight: float) -> ServerRound:
        names = self.strategy.global_means
        if not names:
            return context
        for i, name in enumerate(self.sums):
            if name in names:
                for number, a, b in self._section():
                    self._per_slice[name][number] = self._sum(i, a, b).sum(dtype=torch.float64)
        self.plane.barrier()
        return context.with_global_mean({
            name: self._over_slices(name) / self.size / (self._scales[name] * weight)
            for name in names})

    def _sum(self, index: int, a: int, b: int) -> Tensor:
        """A slice of one of the sums over all workers."""
        return self._summed(index * self.size + a, index * self.size + b, self._rounded)


def _as_long(memory: Tensor, vector: Tensor) -> Tensor:
    """As much of it as the vector takes: all but for the last slice."""
    size = vector.numel()
    return memory if memory.numel() == size else memory[:size]
