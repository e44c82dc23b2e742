"""Flat vectors in slices that stay in the processor's cache, and norms taken over them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from fedrun.distributed.data_plane import DataPlane

# Elements of a slice. A GPU's L2 cache holds a few of 8 MB.
_SLICE = {"cpu": 1 << 16, "cuda": 1 << 21}


def slice_width(size: int, like: Tensor) -> int:
    """Elements in a slice of a vector of `size` elements on this tensor's device."""
    return min(size, _SLICE["cuda" if like.is_cuda else "cpu"])


class Slices:
    """A vector of `size` elements cut into slices of `width`.

    Where workers share memory, each of them updates its own section of the slices.
    """

    def __init__(self, size: int, width: int, plane: DataPlane) -> None:
        self.ranges = [(a, min(a + width, size)) for a in range(0, size, width)]
        """First element and end of each slice."""
        self._plane = plane

    def own(self) -> Iterator[tuple[int, int, int]]:
        """Index, first element and end of each slice in this worker's section."""
        return ((i, *self.ranges[i]) for i in self._plane.section(len(self.ranges)))

    def table(self, names: Sequence[str], device: torch.device) -> SliceTable:
        return SliceTable(names, len(self.ranges), self._plane, device)


class SliceTable:
    """One number for each slice, under several names.

    The worker that owns a slice writes its number; all read them after the next `barrier`. On a GPU
    the table is there, so that only reading it waits.
    """

    def __init__(self, names: Sequence[str], slices: int, plane: DataPlane, device: torch.device
                 ) -> None:
        memory = plane.replicated(torch.zeros(len(names) * slices, dtype=torch.float64,
                                              device=device))
        self._rows = dict(zip(names, memory.view(len(names), -1), strict=True))

    def write(self, name: str, index: int, value: Tensor) -> None:
        """The number of slice `index`, 0-dim."""
        self._rows[name][index] = value

    def sum(self, name: str) -> float:
        """Sum over all workers' slices, exact (fsum), hence independent of who owns which slice."""
        return math.fsum(self._rows[name].tolist())

    def norm(self, name: str) -> float:
        """The norm of a vector whose slices have the norms of this name; exact in the same way."""
        return root_of_squares(self._rows[name].tolist())


class Peaks:
    """The largest absolute values of vectors, which stay on their device until they are read: a GPU
    is waited for once, not for each of them."""

    def __init__(self) -> None:
        self._found: list[Tensor] = []

    def add(self, *vectors: Tensor) -> None:
        for vector in vectors:
            # Both are NaN if any element is; together they are faster than torch.aminmax on a CPU.
            self._found += (vector.amin(), vector.amax())

    def read(self) -> list[float]:
        """One for each vector, in order; NaN if an element is NaN."""
        extremes = iter(torch.stack(self._found).tolist() if self._found else ())
        return [max(-low, high) for low, high in zip(extremes, extremes, strict=True)]


def max_abs(vector: Tensor) -> float:
    """The largest absolute value; NaN if an element is NaN."""
    return max(-vector.amin().item(), vector.amax().item())


def norm(vector: Tensor, origin: Tensor | None = None) -> float:
    """Euclidean norm in double precision; with `origin`, the distance from there.

    Slice by slice, because torch copies the whole vector to convert it. The origin may wait in the
    host's memory.
    """
    width = _SLICE[vector.device.type]
    slices: Iterable[Tensor] = vector.split(width)
    if origin is not None:
        slices = (part - start.to(part.device, non_blocking=True)
                  for part, start in zip(slices, origin.split(width), strict=True))
    return root_of_squares(torch.stack(list(map(double_norm, slices))).tolist())


def subtract_(vector: Tensor, origin: Tensor) -> Tensor:
    """vector -= origin, which may wait in the host's memory, slice by slice."""
    width = _SLICE[vector.device.type]
    for part, start in zip(vector.split(width), origin.split(width), strict=True):
        part.sub_(start.to(part.device, non_blocking=True))
    return vector


def double_norm(vector: Tensor) -> Tensor:
    """Euclidean norm in double precision, 0-dim, still on the vector's device."""
    measured: Tensor = torch.linalg.vector_norm(vector, dtype=torch.float64)
    return measured


def root_of_squares(norms: Iterable[float]) -> float:
    """The norm of a vector from those of its slices."""
    return math.sqrt(math.fsum(norm**2 for norm in norms))
