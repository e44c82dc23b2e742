"""Our own Triton kernels on the CPU, in Triton's interpreter: the head's softmax against float64,
and the sum's terms against the same operations of torch, bit by bit.

Prints one JSON object: relative differences, max|a - b| / max|b|, and the terms that differ.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator

os.environ["TRITON_INTERPRET"] = "1"

import torch
from torch import Tensor

from fedrun.aggregation import triton_sum
from fedrun.model import triton_softmax

triton_softmax.BLOCK = 256  # several in a row, the last of them ragged
triton_sum.BLOCK = 512


def softmax(dtype: torch.dtype) -> dict[str, float]:
    tokens, vocab = 7, 1000
    generator = torch.Generator().manual_seed(0)
    memory = torch.full((tokens, 1024), torch.nan, dtype=dtype)  # rows are longer than the logits
    logits = memory[:, :vocab].copy_(3 * torch.randn(tokens, vocab, generator=generator))
    targets = torch.randint(vocab, (tokens,), generator=generator)
    logits[0] -= 500  # neither overflows nor vanishes
    exact = logits.double()
    losses, factors = torch.empty(tokens), torch.empty(tokens)
    triton_softmax.exponentiate(logits, targets, 0.5, losses, factors)
    shifted = torch.exp(exact - exact.amax(1, keepdim=True))
    assert bool(memory[:, vocab:].isnan().all()), "written beyond the logits"
    log_softmax = torch.log_softmax(exact, 1)[torch.arange(tokens), targets]
    return {"exponentials": difference(logits, shifted), "losses": difference(losses, -log_softmax),
            "factors": difference(factors, 0.5 / shifted.sum(1))}


def difference(ours: Tensor, exact: Tensor) -> float:
    return float((ours - exact).abs().max() / exact.abs().max())


def terms() -> Iterator[str]:
    """The names of the cases in which the kernel and torch differ."""
    size = 1700
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(size, generator=generator)
    trained = start + 1e-3 * (2 * torch.rand(size, generator=generator) - 1)
    trained[:100] = start[:100] + (torch.arange(100) - 50) * 2.0**-20  # halves: ties
    for dtype, scale in ((torch.int32, 2.0**19 / 3), (torch.int32, 2.0**19),
                         (torch.int64, 2.0**40 / 3)):
        for base in (None, start):
            held = torch.randint(-1000, 1000, (size,), dtype=dtype, generator=generator)
            name = f"{dtype} {scale:g} {'difference' if base is not None else 'vector'}"
            yield from different(name, trained, base, held, scale)


def different(name: str, vector: Tensor, base: Tensor | None, held: Tensor, scale: float
              ) -> Iterator[str]:
    x = vector if base is None else vector - base
    expected = (x * scale).round().to(held.dtype)
    limit = 2.0**30 if held.dtype == torch.int32 else 2.0**62
    for first in (True, False):
        own = held.clone()
        peak = triton_sum.add_term(vector, base, own, scale, limit, first, undo=False)
        if not torch.equal(own, expected if first else held + expected):
            yield f"{name}, {'first' if first else 'added'}"
        if peak.item() != x.abs().max().item():
            yield f"{name}, peak"
    for spoiled in (torch.nan, torch.inf, -1e30):
        bad, own = vector.clone(), held.clone()
        bad[77] = spoiled
        peaks = [triton_sum.add_term(bad, base, own, scale, limit, False, undo).item()
                 for undo in (False, True)]
        if not torch.equal(own, held):
            yield f"{name}, {spoiled} not taken back"
        largest = (bad if base is None else bad - base).abs().max().item()
        if str(peaks[0]) != str(largest):
            yield f"{name}, {spoiled}: peak {peaks[0]}"


if __name__ == "__main__":
    print(json.dumps({"fp32": softmax(torch.float32), "bf16": softmax(torch.bfloat16),
                      "different terms": list(terms())}))
