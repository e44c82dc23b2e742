"""The language model's head on a GPU: what loss.py computes, arranged for another machine.

Logits are stored as (tokens, vocab), so that one program of the GPU owns the row of a token. They
are passed over five times: the first product writes them, one kernel reads a row and writes its
exponentials (it reads the row twice, the second time from the L2 cache), and two products read
them. Products in bf16 are accumulated and stored in fp32, the gradients' type, so that no
gradient is rounded, widened and added in passes of its own. Nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fedrun.model import kernels

CHUNK_TOKENS = 4096  # whose logits are kept: 0.4 GB in bf16 for GPT-2's vocabulary
ALIGNMENT = 64  # of a row of logits, in elements: cuBLAS's fast kernels need 16 bytes
# torch.addmm takes an fp32 sum to add bf16 products to from 2.10 on (pytorch#167931).
ADDS_TO_FP32 = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 10)


@torch.no_grad()
def cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, matmul_dtype: torch.dtype
                  ) -> Tensor:
    """The summed loss alone, with the bits that `cross_entropy_gradients` gives it."""
    losses = hidden.new_empty(len(hidden))
    for _ in _softmax(hidden, weight.to(matmul_dtype), targets, 1.0, losses):
        pass
    return losses.sum()


@torch.no_grad()
def cross_entropy_gradients(hidden: Tensor, weight: Tensor, targets: Tensor,
                            matmul_dtype: torch.dtype, scale: float, grad_weight: Tensor, add: bool
                            ) -> tuple[Tensor, Tensor]:
    """The summed loss, and the gradient of scale * loss with respect to hidden (tokens, d_model).

    The gradient with respect to weight is written to grad_weight (vocab, d_model), or added to it
    if `add`. Arguments as in `loss.linear_cross_entropy_gradients`.
    """
    cast = weight.to(matmul_dtype)
    losses, grad_hidden = hidden.new_empty(len(hidden)), torch.empty_like(hidden)
    for part, exponentials, factors in _softmax(hidden, cast, targets, scale, losses):
        x, grad_x = hidden[part], grad_hidden[part]
        # d loss / d logits = softmax - one-hot, with scale * softmax = factors * exponentials. The
        # factors scale the small sides of the products, and the one-hot part stays in fp32.
        _product(exponentials, cast, grad_x, add=False)
        grad_x.mul_(factors).sub_(weight[targets[part]], alpha=scale)
        scaled = torch.mul(x, factors, out=torch.empty_like(x, dtype=matmul_dtype))
        _product(exponentials.T, scaled, grad_weight, add)
        add = True
    grad_weight.index_add_(0, targets, hidden, alpha=-scale)
    return losses.sum(), grad_hidden


def _softmax(hidden: Tensor, weight: Tensor, targets: Tensor, scale: float, losses: Tensor
             ) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Chunk by chunk: its tokens, exp(logits - their largest) (tokens, vocab), valid until the next
    chunk, and scale / the sum of these (tokens, 1). Writes the tokens' losses.

    weight: in the type of the products.
    """
    columns = hidden.to(weight.dtype)
    rows = -(-len(weight) // ALIGNMENT) * ALIGNMENT
    memory = columns.new_empty(min(len(hidden), CHUNK_TOKENS), rows)
    factors = torch.empty_like(losses)
    for start in range(0, len(hidden), CHUNK_TOKENS):
        part = slice(start, start + CHUNK_TOKENS)
        logits = memory[:len(losses[part]), :len(weight)]
        torch.mm(columns[part], weight.T, out=logits)
        exponentiate(logits, targets[part], scale, losses[part], factors[part])
        yield part, logits, factors[part, None]


def exponentiate(logits: Tensor, targets: Tensor, scale: float, losses: Tensor, factors: Tensor
                 ) -> None:
    """Replace logits (tokens, vocab) by exp(logit - the largest of the row), and write the tokens'
    losses, -log softmax(logits)[target], and scale / the sum of the row's exponentials, (tokens,)
    each, in fp32 for bf16 logits."""
    if kernels.uses_triton(logits):
        from fedrun.model import triton_softmax  # Triton's settings are made before its import

        with kernels.current_device(logits):
            triton_softmax.exponentiate(logits, targets, scale, losses, factors)
        return
    shift = logits.amax(1, keepdim=True)
    at_target = logits.gather(1, targets[:, None])
    torch.sum(logits.sub_(shift).exp_(), 1, dtype=factors.dtype, out=factors)
    torch.log(factors, out=losses).add_(shift[:, 0]).sub_(at_target[:, 0])
    factors.reciprocal_().mul_(scale)


def _product(a: Tensor, b: Tensor, out: Tensor, add: bool) -> None:
    """out = a @ b, or out += a @ b if `add`, accumulated and stored in out's type."""
    if a.dtype == out.dtype:
        torch.addmm(out, a, b, beta=int(add), out=out)
    elif not add:
        torch.mm(a, b, out_dtype=out.dtype, out=out)
    elif ADDS_TO_FP32:
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    else:
        out += torch.mm(a, b, out_dtype=out.dtype)
