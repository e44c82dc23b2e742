"""How alike the gradients of consecutive steps are."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

LAST = 10  # consecutive cosines in a record's mean
SLICE = {"cpu": 1 << 16, "cuda": 1 << 24}  # elements; those of a CPU stay in its cache
SMALLEST = 1e-8  # of the product of two norms, as in torch.nn.functional.cosine_similarity


class StepCosines:
    """The cosines between each step's gradient and that of the step before.

    They are known for the LAST steps until one that is evaluated: only there is a gradient kept,
    and compared with the next.
    """

    def __init__(self, next_evaluated: Callable[[int], int]) -> None:
        """next_evaluated: the first step that is evaluated, from a step (counted from 1) on."""
        self.next_evaluated = next_evaluated
        self.previous: Tensor | None = None
        """The last step's gradient, (size,), if it is kept."""
        self._cosines: dict[int, Tensor] = {}

    def add(self, step: int, gradient: Tensor) -> None:
        """The gradient (size,) of a step, right after that of the step before."""
        if self.previous is not None and self.next_evaluated(step) - step < LAST:
            self._cosines[step] = cosine(gradient, self.previous)
            self._cosines.pop(step - LAST, None)
        if self.next_evaluated(step + 1) - step > LAST:
            self.previous = None
        elif self.previous is None:
            self.previous = gradient.clone()
        else:
            self.previous.copy_(gradient)

    def mean(self, step: int) -> float | None:
        """The mean of the LAST cosines until `step`, or of all if there are fewer. None in the
        first step, and if not all are known: after a resume that evaluates at other steps."""
        steps = range(max(2, step - LAST + 1), step + 1)
        if not steps or any(each not in self._cosines for each in steps):
            return None
        return math.fsum(float(self._cosines[each]) for each in steps) / len(steps)

    def state(self) -> list[tuple[int, float]]:
        """The cosines by step, for a checkpoint; `previous` is the rest of what it needs."""
        return [(step, float(value)) for step, value in self._cosines.items()]

    def load_state(self, state: Iterable[tuple[int, float]], previous: Tensor | None) -> None:
        """Restore a saved state. previous: on the device of the gradients."""
        self._cosines = {step: torch.tensor(value, dtype=torch.float64) for step, value in state}
        self.previous = previous


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """The cosine between two vectors (size,), 0-dim in double precision on their device; 0 if one
    of them is zero.

    Slice by slice, so that both are read once, and because torch sums the products of a whole
    vector in the vector's own type.
    """
    sums = torch.zeros(3, dtype=torch.float64, device=a.device)
    width = SLICE[a.device.type]
    for x, y in zip(a.split(width), b.split(width), strict=True):
        sums += torch.stack([torch.dot(x, y), torch.dot(x, x), torch.dot(y, y)])
    return sums[0] / (sums[1] * sums[2]).sqrt().clamp_min(SMALLEST)
