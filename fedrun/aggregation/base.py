"""The sum over a cohort, and what the server's update makes of it: what all wires share."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

from fedrun.aggregation.bounds import Bounds
from fedrun.distributed.data_plane import DataPlane
from fedrun.strategies.base import ServerRound, Strategy

# Elements handled at a time: intermediate results stay in the processor's cache; on a GPU, where
# launches cost more than memory, a slice is large.
_SLICE = {"cpu": 1 << 16, "cuda": 1 << 24}


class Aggregator(ABC):
    """A sum over a cohort, and the server update from it.

    Where workers share memory, each reads the others' buffers and updates a section of the model
    that they have in common.
    """

    def __init__(self, strategy: Strategy, size: int, plane: DataPlane | None, length: int,
                 kind: torch.dtype, scratch: Tensor, moments: tuple[str, ...] = ()) -> None:
        """plane: None for a worker alone; length, kind: of the buffer; scratch: (rows, width), a
        slice of each vector, in the model's type."""
        self.strategy = strategy
        self.size = size
        self.plane = plane or DataPlane()
        self.moments = moments
        self._scratch = scratch
        self._width = scratch.shape[1]
        self._slices = [(a, min(a + self._width, size)) for a in range(0, size, self._width)]
        """As ranges of elements."""
        self._buffers = self.plane.allocate(length, kind, scratch.device)
        self._buffer = self._buffers[self.plane.node_rank]
        self._total: tuple[Tensor, ...] = (self._buffer,)
        """Buffers that add up to the sum over all workers, after `reduce`."""
        rows = ("mean_norm", "step_norm", *strategy.diagnostics, *strategy.global_means)
        table = self.plane.replicated(torch.zeros(len(rows) * len(self._slices), dtype=torch.float64))
        self._per_slice = dict(zip(rows, table.view(len(rows), -1), strict=True))

    @property
    def buffer(self) -> Tensor:
        """The sum of this worker's clients so far."""
        return self._buffer

    @property
    def wire_bytes(self) -> int:
        """Payload of a round for a worker that sends."""
        return self._buffer.nbytes

    @abstractmethod
    def begin(self, bounds: Bounds) -> None:
        """Start a round in which clients keep within these bounds."""

    @abstractmethod
    def add(self, client: Mapping[str, Tensor], weight: float, start: Tensor | None = None) -> str:
        """Add a client's terms, times its weight; (size,) each, by name. Returns why it is left
        out, with nothing of it added, where an element is not finite or beyond its bound.

        With `start`, the model that the client started from, `delta` comes as the client's
        parameters.
        """

    def reduce(self, residuals: Iterable[Tensor] = ()) -> None:
        """Workers: sum over all of them.

        residuals: what the clients owe whose terms were added here, in that order, (size,) each and
        one at a time; for a wire that keeps some back, which changes them.
        """
        self._total = self.plane.reduce(self._buffers)

    def apply(self, model: Tensor, state: Mapping[str, Tensor], context: ServerRound,
              moments: Mapping[str, Tensor] | None = None, measure: bool = False
              ) -> dict[str, float]:
        """The server update of `model` (size,), `state` and `moments`, in place, from the reduced
        sum: this worker's section of them, and on return the others' have done theirs.

        With `measure`: norms of the model's step (`step_norm`) and of the mean update or gradient
        (`mean_norm`, where the method sums one), and the strategy's counts as shares.
        """
        weight = self._total_weight()
        assert weight > 0, "the server stops a round in which no client is left"
        context = self._with_global_means(context, weight)
        averaged = {"delta", "gradient"} & self.strategy.sums.keys()
        for number, a, b in self._section():
            mean = self._means(a, b, weight)
            for name in self.moments:
                assert moments is not None
                moments[name][a:b] = mean.pop(name)
            before = model[a:b].clone() if measure else model
            if measure:
                counts = self.strategy.count_diagnostics(mean, context)
                assert counts.keys() == set(self.strategy.diagnostics), "what counts is in `counted`"
                for name, count in counts.items():
                    self._per_slice[name][number] = count
                self._per_slice["mean_norm"][number] = sum(_squared(mean[n]) for n in averaged)
            self.strategy.server_update(model[a:b], {k: v[a:b] for k, v in state.items()}, mean,
                                        context)
            if measure:
                self._per_slice["step_norm"][number] = _squared(before.sub_(model[a:b]))
        self.plane.barrier()
        if not measure:
            return {}
        norms = {"step_norm"} | ({"mean_norm"} if averaged else set())
        return ({name: math.sqrt(self._over_slices(name)) for name in sorted(norms)}
                | {name: self._over_slices(name) / self.size for name in self.strategy.diagnostics})

    @abstractmethod
    def _total_weight(self) -> float:
        """Of the clients that took part."""

    @abstractmethod
    def _means(self, a: int, b: int, weight: float) -> dict[str, Tensor]:
        """The cohort's weighted means, elements a to b, in memory that the next call reuses."""

    def _with_global_means(self, context: ServerRound, weight: float) -> ServerRound:
        assert not self.strategy.global_means
        return context

    def _summed(self, a: int, b: int, out: Tensor) -> Tensor:
        """Elements a to b of the sum over all workers; in `out`, where they have to be added up."""
        first, *others = (part[a:b] for part in self._total)
        for other in others:
            first = torch.add(first, other, out=out[:b - a])
        return first

    def _over_slices(self, name: str) -> float:
        """The sum of a number of each slice, the others' slices as well; rounded once, so that it
        does not depend on who has which."""
        return math.fsum(self._per_slice[name].tolist())

    def _section(self) -> Iterator[tuple[int, int, int]]:
        """The slices that this worker updates: number and range of elements."""
        return ((i, *self._slices[i]) for i in self.plane.section(len(self._slices)))


def max_abs(vector: Tensor) -> float:
    """The size of the largest element, NaN where one is NaN."""
    # Both are NaN where one element is; together they are faster than torch.aminmax.
    return max(-vector.amin().item(), vector.amax().item())


def bound_exceeded(name: str, peak: float, bound: float) -> str:
    """Why a client is left out with a vector whose largest element has this size; empty where it is
    within the bound."""
    if not math.isfinite(peak):
        return f"{name} not finite"
    return f"{name} beyond the bound: {peak:g} > {bound:g}" if peak > bound else ""


def slice_width(size: int, device: torch.device) -> int:
    """Elements that a sum handles at a time."""
    return min(size, _SLICE[device.type])


def norm(vector: Tensor, start: Tensor | None = None) -> float:
    """Its Euclidean norm (with `start`: its distance from there) in double precision, by slices:
    torch makes a copy of what it is given."""
    width = _SLICE[vector.device.type]
    slices: Iterable[Tensor] = vector.split(width)
    if start is not None:  # one difference at a time
        slices = map(torch.sub, slices, start.split(width))
    return math.sqrt(math.fsum(map(_squared, slices)))


def _squared(vector: Tensor) -> float:
    return float(torch.linalg.vector_norm(vector, dtype=torch.float64)) ** 2
