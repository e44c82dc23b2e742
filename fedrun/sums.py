"""Exact sums of client terms: integers on a fixed-point grid.

Floating-point sums depend on their order, and the order on the number of processes. Here every
term is rounded once to an integer multiple of a grid step that the plan of the round fixes, and
integers are summed, first over the clients of a worker and then over the workers: the result has
the same bits whatever the placement. An update is at most the round's bound in size (AdamW cannot
move further), gradients have a fixed bound, and the weights of a cohort sum to one (or to a power
of two that the strategy declares), so the sum cannot overflow; what breaks a bound is an error.

Updates alone fit int32. Squared gradients span too many powers of ten for it, and weights that are
known only after training need room: their sums are int64, twice the bytes for each vector.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fedrun.strategies.base import CLIENT_VECTORS, ServerRound, Strategy, Units

if TYPE_CHECKING:
    from fedrun.comm import DataPlane

# Bits below the sign, one spare.
_BITS = {torch.int32: 30, torch.int64: 62}
# Elements handled at a time: intermediate results stay in the processor's cache; on a GPU, where
# launches cost more than memory, a slice is large.
_SLICE = {"cpu": 1 << 16, "cuda": 1 << 24}
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Bounds:
    """No element of what a client reports is larger: the grids of a round."""

    update: float
    gradient: float = 1.0

    def of(self, units: Units) -> float:
        return self.update**units.update * self.gradient**units.gradient


class CohortSum(ABC):
    """A sum over a cohort in one buffer, and the server update from it: what all wires share."""

    def __init__(self, strategy: Strategy, size: int, buffer: Tensor, scratch: Tensor,
                 moments: tuple[str, ...] = ()) -> None:
        self.strategy = strategy
        self.size = size
        self._buffer = buffer
        self.moments = moments
        self._scratch = scratch
        """(rows, width): a slice of each vector, in the model's type."""

    @property
    def buffer(self) -> Tensor:
        """The sum so far: of this worker's clients, after `reduce` of all."""
        return self._buffer

    @property
    def wire_bytes(self) -> int:
        """Payload of a round's collectives."""
        return self._buffer.nbytes

    @abstractmethod
    def begin(self, bounds: Bounds) -> None:
        """Start a round in which clients keep within these bounds."""

    @abstractmethod
    def add(self, client: Mapping[str, Tensor], weight: float, start: Tensor | None = None) -> bool:
        """Add a client's terms, times its weight; (size,) each, by name. False, with nothing added,
        where one of them is not finite.

        With `start`, the model that the client started from, `delta` comes as the client's
        parameters and becomes its update in place.
        """

    def reduce(self, plane: DataPlane, residuals: Iterable[Tensor]) -> None:
        """Workers: sum over all of them, in place.

        residuals: what the clients owe whose terms were added here, in that order, (size,) each and
        one at a time; for a wire that keeps some back, which changes them.
        """
        plane.all_reduce(self.buffer)

    def apply(self, model: Tensor, state: Mapping[str, Tensor], context: ServerRound,
              moments: Mapping[str, Tensor] | None = None, measure: bool = False
              ) -> dict[str, float]:
        """The server update of `model` (size,), `state` and `moments`, in place, from the reduced
        buffer.

        With `measure`: norms of the model's step (`step_norm`) and of the mean update or gradient
        (`mean_norm`, where the method sums one), and the strategy's counts as shares.
        """
        total = self._total_weight()
        assert total > 0, "the server stops a round in which no client is left"
        context = self._with_element_means(context, total)
        squares: dict[str, float] = {}
        counts: dict[str, int] = {}
        for a, b in self._slices():
            mean = self._means(a, b, total)
            for name in self.moments:
                assert moments is not None
                moments[name][a:b] = mean.pop(name)
            before = model[a:b].clone() if measure else model
            if measure:
                for name, count in self.strategy.counts(mean, context).items():
                    counts[name] = counts.get(name, 0) + int(count)
                for name in {"delta", "gradient"} & mean.keys():
                    squares["mean_norm"] = squares.get("mean_norm", 0.0) + _squared(mean[name])
            self.strategy.server_update(model[a:b], {k: v[a:b] for k, v in state.items()}, mean,
                                        context)
            if measure:
                step = _squared(before.sub_(model[a:b]))
                squares["step_norm"] = squares.get("step_norm", 0.0) + step
        return ({name: math.sqrt(value) for name, value in squares.items()}
                | {name: count / self.size for name, count in counts.items()})

    @abstractmethod
    def _total_weight(self) -> float:
        """Of the clients that took part."""

    @abstractmethod
    def _means(self, a: int, b: int, total: float) -> dict[str, Tensor]:
        """The cohort's weighted means, elements a to b, in memory that the next call reuses."""

    def _with_element_means(self, context: ServerRound, total: float) -> ServerRound:
        assert not self.strategy.element_means
        return context

    def _slices(self) -> Iterator[tuple[int, int]]:
        width = self._scratch.shape[1]
        return ((a, min(a + width, self.size)) for a in range(0, self.size, width))


class TermSum(CohortSum):
    """Client terms at full precision: integers on the round's grid, or floats.

    `buffer` is (number of sums * size + 1,): the strategy's vectors one after the other, then, with
    `average_moments`, AdamW's two, and the sum of the weights of the clients that took part.

    What a round costs besides the collective is traffic to memory. So a client's vectors are read
    once, slice by slice, and all that is to be done with a slice is done while it is in the cache;
    and the first term overwrites what the last round has left, which only a look at an empty sum
    sets to zero.
    """

    def __init__(self, strategy: Strategy, size: int, like: Tensor, exact: bool,
                 average_moments: bool = False) -> None:
        moments = MOMENTS if average_moments else ()
        self.sums = {**strategy.sums, **{name: CLIENT_VECTORS[name] for name in moments}}
        narrow = (like.dtype == torch.float32 and not strategy.weight_headroom
                  and not any(units.gradient for units in self.sums.values()))
        kind = (torch.int32 if narrow else torch.int64) if exact else like.dtype
        self.exact = exact
        self._bits = _BITS[kind] - strategy.weight_headroom if exact else 0
        width = slice_width(size, like.device)
        super().__init__(
            strategy, size, torch.empty(len(self.sums) * size + 1, dtype=kind, device=like.device),
            torch.empty(len(self.sums), width, dtype=like.dtype, device=like.device), moments)
        self._stale = True  # nothing was added in this round: the buffer holds another's
        self._rounded = torch.empty(width, dtype=kind, device=like.device)
        self._bounds = dict.fromkeys(CLIENT_VECTORS, torch.finfo(like.dtype).max)
        self._scales = dict.fromkeys(self.sums, 1.0)

    @property
    def buffer(self) -> Tensor:
        if self._stale:
            self._buffer.zero_()
            self._stale = False
        return self._buffer

    def begin(self, bounds: Bounds) -> None:
        self._stale = True
        if self.exact:
            self._bounds = {name: bounds.of(units) for name, units in CLIENT_VECTORS.items()}
            # Powers of two: scaling is exact, and rounding to the grid the only loss.
            self._scales = {name: 2.0 ** (self._bits - math.ceil(math.log2(bounds.of(units))))
                            for name, units in self.sums.items()}

    def add(self, client: Mapping[str, Tensor], weight: float, start: Tensor | None = None) -> bool:
        """Add a client's terms, times its weight.

        client: the strategy's inputs, and the moments where they are averaged, (size,) each.
        Raises OverflowError for one beyond its bound.
        """
        for a, b in self._slices():
            slices = {name: vector[a:b] for name, vector in client.items()}
            if start is not None and "delta" in slices:
                slices["delta"].sub_(start[a:b])
            if not self._finite(slices, (vector[b:] for vector in client.values())):
                if self.exact:
                    self._take_back(client, weight, a)
                return False
            if self.exact:
                self._add_slice(slices, weight, a, b)
        if not self.exact:  # floats cannot be taken back: all was looked at before
            for a, b in self._slices():
                self._add_slice({n: v[a:b] for n, v in client.items()}, weight, a, b)
        if self._stale:
            self._buffer[-1] = 0
            self._stale = False
        self._buffer[-1] += round(weight * 2.0**self._bits) if self.exact else weight
        return True

    def _finite(self, client: Mapping[str, Tensor], rest: Iterable[Tensor]) -> bool:
        """Whether all elements of a slice are finite; OverflowError where one is beyond its bound,
        unless the client is to be left out anyway for what is in the `rest`."""
        for name, vector in client.items():
            peak, bound = largest(vector), self._bounds[name]
            if peak <= bound:
                continue
            if not math.isfinite(peak) or not all(bool(v.isfinite().all()) for v in rest):
                return False
            raise beyond(name, peak, bound)
        return True

    def _add_slice(self, client: Mapping[str, Tensor], weight: float, a: int, b: int) -> None:
        terms = (*self.strategy.client_term(client), *(client[name] for name in self.moments))
        for i, (term, scale) in enumerate(zip(terms, self._scales.values(), strict=True)):
            scaled = torch.mul(term, weight * scale, out=self._scratch[i, :b - a])
            if self.exact:
                scaled.round_()
            if self._stale:
                self._section(i, a, b).copy_(scaled)
            elif self.exact:  # torch adds floats to integers much slower than it converts them
                self._section(i, a, b).add_(self._rounded[:b - a].copy_(scaled))
            else:
                self._section(i, a, b).add_(scaled)

    def _take_back(self, client: Mapping[str, Tensor], weight: float, stop: int) -> None:
        """Undo what a client has added to integers before element `stop`."""
        if self._stale:
            return
        for a, b in self._slices():
            if a == stop:
                return
            self._add_slice({name: vector[a:b] for name, vector in client.items()}, -weight, a, b)

    def _total_weight(self) -> float:
        return float(self._buffer[-1]) / 2.0**self._bits

    def _means(self, a: int, b: int, total: float) -> dict[str, Tensor]:
        means = {}
        for i, name in enumerate(self.sums):
            step = 1.0 / (self._scales[name] * total)
            means[name] = self._scratch[i, :b - a].copy_(self._section(i, a, b)).mul_(step)
            if name == "exp_avg_sq" and self.exact:
                # Not less than the grid can tell from zero: AdamW divides by its root.
                means[name].clamp_(min=step)
        return means

    def _with_element_means(self, context: ServerRound, total: float) -> ServerRound:
        names = self.strategy.element_means
        if not names:
            return context
        means = {}
        for i, name in enumerate(self.sums):
            if name in names:
                summed = math.fsum(float(self._section(i, a, b).sum(dtype=torch.float64))
                                   for a, b in self._slices())
                means[name] = summed / self.size / (self._scales[name] * total)
        return context.with_element_mean(means)

    def _section(self, index: int, a: int, b: int) -> Tensor:
        return self._buffer[index * self.size + a:index * self.size + b]


def largest(vector: Tensor) -> float:
    """The size of the largest element, NaN where one is NaN."""
    low, high = torch.aminmax(vector)  # both NaN where one element is
    return max(-low.item(), high.item())


def beyond(name: str, peak: float, bound: float) -> OverflowError:
    """The error for a client's vector with an element of size `peak`, larger than it can be."""
    what = ("the furthest that AdamW moves at this learning rate" if name == "delta"
            else "the size that the grid of the exact sum is made for")
    return OverflowError(f"{name}: an element of size {peak:g} exceeds {bound:g}, {what}: --wire "
                         "exact --reduce float has no such bound")


def slice_width(size: int, device: torch.device) -> int:
    """Elements that a sum handles at a time."""
    return min(size, _SLICE[device.type])


def norm(vector: Tensor) -> float:
    """Its Euclidean norm in double precision, by slices: torch makes a copy of what it is given."""
    return math.sqrt(math.fsum(map(_squared, vector.split(_SLICE[vector.device.type]))))


def _squared(vector: Tensor) -> float:
    return float(torch.linalg.vector_norm(vector, dtype=torch.float64)) ** 2


def adamw_step_bound(lr: float, weight_decay: float, beta1: float, beta2: float) -> float:
    """The furthest that one AdamW step moves an element whose size is at most 64.

    By Cauchy-Schwarz |m_t| <= (1 - b1) sqrt(sum_j b2^j g_(t-j)^2) sqrt(sum_j (b1^2 / b2)^j), so
    |m_t| / sqrt(v_t) <= (1 - b1) / sqrt((1 - b2) (1 - b1^2 / b2)), 7.3 at the usual betas; early
    steps, with their bias correction, stay below. Kingma & Ba (2015), section 2.1, argue likewise.
    Moments averaged over clients keep within it too (Jensen: the mean of roots is at most the root
    of the mean).
    """
    ratio = beta1**2 / beta2
    assert ratio < 1
    direction = (1 - beta1) / math.sqrt((1 - beta2) * (1 - ratio))
    return lr * (max(1.0, direction) + 64 * weight_decay)
