"""A client's term, added to an exact sum on a GPU in one pass: one Triton kernel.

It reads the trained parameters, the model that they started from and the sum, and writes the sum:
16 bytes an element. Slice by slice (see exact.py), torch makes seven launches and passes twice over
the memory of all that does not fit the cache.
"""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

BLOCK = 4096  # elements of a program
WARPS = 8

if importlib.util.find_spec("triton"):  # only GPUs need it: not in torch's builds for CPUs
    import triton
    import triton.language as tl

    @triton.jit
    def _add(vector, start, own, peak, size, scale, limit, FROM_START: tl.constexpr,
             FIRST: tl.constexpr, UNDO: tl.constexpr, BLOCK: tl.constexpr):
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = at < size
        x = tl.load(vector + at, mask=inside, other=0.0)
        if FROM_START:
            x = x - tl.load(start + at, mask=inside, other=0.0)
        # As integers, sizes of floats have the order of the floats, with NaN above infinity.
        tl.atomic_max(peak, tl.max(tl.abs(x).to(tl.int32, bitcast=True), 0))
        scaled = x * scale
        # To the nearest integer, ties to the even one, as torch rounds.
        below = tl.floor(scaled)
        rest = scaled - below
        odd = below - 2.0 * tl.floor(below * 0.5) == 1.0
        rounded = tl.where((rest > 0.5) | ((rest == 0.5) & odd), below + 1.0, below)
        # Only terms that are taken back again exceed the limit, and NaN becomes it.
        rounded = tl.minimum(tl.maximum(rounded, -limit), limit)
        term = rounded.to(own.dtype.element_ty)
        if not FIRST:
            before = tl.load(own + at, mask=inside, other=0)
            term = before - term if UNDO else before + term
        tl.store(own + at, term, mask=inside)


def add_term(vector: Tensor, start: Tensor | None, own: Tensor, scale: float, limit: float,
             first: bool, undo: bool) -> Tensor:
    """own += round(scale * (vector - start)), to the bits of the same operations of torch; start
    None: of the vector alone. Returns the largest |vector - start|, 0-dim, on the device; NaN if an
    element is NaN.

    vector, start: fp32 (size,); own: int32 or int64 (size,), overwritten if `first`; limit: above
    all terms that are not taken back; undo: subtract what was added before.
    """
    peak = torch.zeros((), dtype=torch.int32, device=vector.device)
    _add[(-(-len(own) // BLOCK),)](
        vector, vector if start is None else start, own, peak, len(own), scale, limit,
        FROM_START=start is not None, FIRST=first, UNDO=undo, BLOCK=BLOCK, num_warps=WARPS,
        enable_fp_fusion=False)  # a fused multiply-add would round once where torch rounds twice
    return peak.view(torch.float32)
