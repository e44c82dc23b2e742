"""A model as one vector: parameters and gradients are views of two flat buffers.

Loading the global model, AdamW, norms and sums are then one operation on one tensor each, and that
tensor is also what is sent between processes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedrun.model.base import Model
from fedrun.model.names import ParameterNames, personal_names


@dataclass(frozen=True)
class ParamSlice:
    """The slice of the vector that holds one parameter."""

    name: str
    start: int
    stop: int
    shape: torch.Size


class FlatParams:
    """Moves a model's parameters into `vector` (size,) and their gradients into `grad` (size,).

    The model works as before, on views. Names are sorted, so that all ranks that build the same
    model agree on the layout. A tied weight has one slice, under the first of its names. All
    parameters must have the same type and device. `names` are the model's; `matrices` are the
    slices of those that it names so.

    What each client keeps for itself (--personal) comes last: `shared` (shared_size,) and `own` are
    the vector's two parts. Without it, `shared` is all of it.
    """

    def __init__(self, model: Model | nn.Module, personal: str | None = None) -> None:
        """personal: of --personal. InputError if it does not fit the model's names."""
        named = dict(model.named_parameters())  # a tied weight appears once
        own = personal_names(personal, named)
        parameters = sorted(named.items(), key=lambda item: (item[0] in own, item[0]))
        self.names = getattr(model, "names", ParameterNames())
        self.slices: list[ParamSlice] = []
        start = 0
        for name, p in parameters:
            self.slices.append(ParamSlice(name, start, start + p.numel(), p.shape))
            start += p.numel()
        self.size = start
        self.shared_size = start - sum(named[name].numel() for name in own)
        self.matrices = [part for part in self.slices if part.name in self.names.matrices]
        first = parameters[0][1]
        self.vector = torch.empty(self.size, dtype=first.dtype, device=first.device)
        self.grad = torch.zeros_like(self.vector)
        self.shared, self.own = self.vector[:self.shared_size], self.vector[self.shared_size:]
        for (_, p), (_, value), (_, grad) in zip(parameters, self.views(self.vector),
                                                 self.views(self.grad), strict=True):
            value.copy_(p.data)
            p.data = value
            p.grad = grad

    def views(self, vector: Tensor) -> Iterator[tuple[str, Tensor]]:
        """(name, view in the parameter's shape) for any vector (size,) of this layout."""
        for part in self.slices:
            yield part.name, vector[part.start:part.stop].view(part.shape)
