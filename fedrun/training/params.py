"""A model as one vector: parameters and gradients are views of two flat buffers.

Loading the global model, zeroing gradients, AdamW, norms and sums are then one operation on one
tensor each, and what travels between processes is that tensor.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class ParamSlice:
    """Where one parameter lies in the vector."""

    name: str
    start: int
    stop: int
    shape: torch.Size


class FlatParams:
    """Parameters of `module` moved into `vector` (size,), their gradients into `grad` (size,).

    The module goes on working as before, on views. Names are sorted, so that every rank and every
    library that builds the same model agrees on the layout; a tied weight has one slot, under the
    first of its names. Floating-point type and device are those of the module, one for all.
    """

    def __init__(self, module: nn.Module) -> None:
        parameters = sorted(module.named_parameters())  # each tied weight once
        self.slots: list[ParamSlice] = []
        start = 0
        for name, p in parameters:
            self.slots.append(ParamSlice(name, start, start + p.numel(), p.shape))
            start += p.numel()
        self.size = start
        first = parameters[0][1]
        self.vector = torch.empty(self.size, dtype=first.dtype, device=first.device)
        self.grad = torch.zeros_like(self.vector)
        for (_, p), (_, value), (_, grad) in zip(parameters, self.views(self.vector),
                                                 self.views(self.grad), strict=True):
            value.copy_(p.data)
            p.data = value
            p.grad = grad

    def views(self, vector: Tensor) -> Iterator[tuple[str, Tensor]]:
        """(name, view in the parameter's shape) for any vector of this layout."""
        for slot in self.slots:
            yield slot.name, vector[slot.start:slot.stop].view(slot.shape)
