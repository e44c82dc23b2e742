"""The softmax of the head on a GPU (gpu_head.py) as one Triton kernel: a program for each token."""

from __future__ import annotations

import importlib.util

from torch import Tensor

BLOCK = 4096  # elements of a row at a time
WARPS = 8

if importlib.util.find_spec("triton"):  # only GPUs need it: not in torch's builds for CPUs
    import triton
    import triton.language as tl

    @triton.jit
    def _rows(logits, targets, losses, factors, stride, scale, vocab: tl.constexpr,
              BLOCK: tl.constexpr):
        token = tl.program_id(0)
        row = logits + token.to(tl.int64) * stride
        columns = tl.arange(0, BLOCK)
        at_target = tl.load(row + tl.load(targets + token)).to(tl.float32)
        largest = tl.full((BLOCK,), float("-inf"), tl.float32)
        for first in range(0, vocab, BLOCK):
            inside = first + columns < vocab
            block = tl.load(row + first + columns, mask=inside, other=float("-inf"))
            largest = tl.maximum(largest, block.to(tl.float32))
        shift = tl.max(largest, 0)
        sums = tl.zeros((BLOCK,), tl.float32)
        for first in range(0, vocab, BLOCK):
            inside = first + columns < vocab
            block = tl.load(row + first + columns, mask=inside, other=float("-inf"))
            exponentials = tl.exp(block.to(tl.float32) - shift)
            tl.store(row + first + columns, exponentials.to(block.dtype), mask=inside)
            sums += exponentials  # exp(-inf) of what is outside is 0
        total = tl.sum(sums, 0)
        tl.store(losses + token, tl.log(total) + shift - at_target)
        tl.store(factors + token, scale / total)


def exponentiate(logits: Tensor, targets: Tensor, scale: float, losses: Tensor, factors: Tensor
                 ) -> None:
    """What `gpu_head.exponentiate` does, in one pass; logits' rows are contiguous, fp32 or bf16.

    A row's exponentials are summed before they are rounded. A NaN among the logits makes the loss
    NaN.
    """
    assert logits.stride(1) == 1
    _rows[(len(logits),)](logits, targets, losses, factors, logits.stride(0), scale,
                          vocab=logits.shape[1], BLOCK=BLOCK, num_warps=WARPS)
