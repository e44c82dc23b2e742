"""What a step cannot go below: its matrix products alone, and AdamW's traffic to memory."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.benchmarks.common import median_seconds

ADAMW_TRANSFERS = 7  # reads parameter, gradient and two moments; writes all but the gradient


class Operand(NamedTuple):
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    def make(self) -> Tensor:
        tensor = torch.empty_strided(self.shape, self.stride, dtype=self.dtype)
        return tensor.normal_() if 0 not in self.stride else tensor.zero_()


class Products(TorchDispatchMode):
    """Counts the matrix products that run inside it, by their operands' shapes and strides."""

    OPERATIONS = ("mm", "bmm", "addmm", "baddbmm")

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[tuple[str, tuple[Operand, ...]]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__.rstrip("_")
        if name in self.OPERATIONS:
            operands = tuple(Operand(tuple(t.shape), t.stride(), t.dtype)
                             for t in args if isinstance(t, Tensor))
            self.seen[name, operands] += 1
        return func(*args, **(kwargs or {}))

    def seconds(self) -> float:
        """The time of all products, each measured alone with operands laid out as they were."""
        total = 0.0
        for (name, operands), count in self.seen.items():
            tensors = [operand.make() for operand in operands]
            if name.startswith("b"):
                out = tensors[-2].new_empty(len(tensors[-2]), tensors[-2].shape[1],
                                            tensors[-1].shape[2])
            else:
                out = tensors[-2].new_empty(tensors[-2].shape[0], tensors[-1].shape[1])
            if len(tensors) == 3:  # the first is added to, in place
                out = tensors[0]
            operation = functools.partial(getattr(torch, name), *tensors, out=out)
            total += count * median_seconds(operation)
        return total


def product_seconds(step: Callable[[], object]) -> float:
    """The time of one step's matrix products, as shaped and laid out as the step has them."""
    with Products() as products:
        step()
    return products.seconds()


def adamw_seconds(size: int) -> float:
    """AdamW's memory traffic for so many fp32 parameters, at the rate of a copy of that size."""
    source, target = torch.zeros(size), torch.zeros(size)
    return ADAMW_TRANSFERS / 2 * median_seconds(lambda: target.copy_(source))  # a copy is two
