"""What sums in eight and in four bits share: blocks of elements with a step each, and a client's
residual, from which it sends as much as its levels allow.

The sums themselves, and why residuals stay bounded, are in int8.py and int4.py.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fedrun.common.pinned import brought

SMALLEST = 1 / 256  # step, as a share of what equal clients at the bound need
FULL, SHRINK = 0.7, 0.75  # FULL < SHRINK: what has just shrunk does not clip at once
WEIGHT_BITS = 30
"""Of the sum of the weights, behind the point."""


def residual_of(name: str) -> str:
    """What a client calls its residual of a vector."""
    return "residual" if name == "delta" else f"residual.{name}"


def block_range(a: int, b: int, block: int) -> tuple[int, int]:
    """The blocks of this many elements that hold elements a to b; a is the first of one."""
    return a // block, -(-b // block)


def update_slice(client: Mapping[str, Tensor], start: Tensor | None, a: int, b: int, out: Tensor
                 ) -> Tensor:
    """Elements a to b of a client's update, which may be made in `out`; arguments as in
    `Aggregator.add`."""
    if start is None or "parameters" not in client:
        return client["delta"][a:b]
    out = out[:b - a]
    return torch.sub(client["parameters"][a:b], brought(start[a:b], out), out=out)


def give_off(residual: Tensor, steps: Tensor, block: int, levels: int, a: int, b: int,
             scratch: Tensor) -> tuple[Tensor, Tensor]:
    """Take from elements a to b of a residual the multiple of its block's step that is nearest, of
    at most `levels` steps.

    steps: (blocks,) of all, for each `block` elements; scratch: two slices. Returns the multiples,
    (blocks of the slice, block), in scratch memory, and for each block how many steps the furthest
    element was from zero.
    """
    first, last = block_range(a, b, block)
    blocks = scratch[0, :(last - first) * block]
    blocks[:b - a] = residual[a:b]
    blocks[b - a:] = 0
    blocks = blocks.view(-1, block)
    step = steps[first:last, None]
    q = torch.div(blocks, step, out=scratch[1, :blocks.numel()].view_as(blocks))
    furthest = torch.maximum(q.amax(1), q.amin(1).neg_())
    q.round_().clamp_(-levels, levels)
    residual[a:b] = blocks.addcmul_(q, step, value=-1).view(-1)[:b - a]
    return q, furthest


def follow(steps: Tensor, clipped: Tensor, full: Tensor, shrink: float,
           between: tuple[float, float]) -> None:
    """Make steps those of the next round, in place. clipped, full: (blocks,), whether any client
    clipped, or came near it; shrink: where none did; between: the smallest step and the largest."""
    kept = torch.where(full, steps, shrink * steps)
    steps.copy_(torch.where(clipped, 2.0 * steps, kept)).clamp_(*between)
