"""The language model's head: linear projection and cross-entropy, fused and chunked over tokens.

The head of a small model with a large vocabulary is most of its arithmetic and, when the logits
of a whole batch are kept, most of its memory. Here a chunk's logits are turned into its gradient
in place and used up at once: three matrix products a chunk (logits, gradient of the hidden states,
gradient of the weight), none of them repeated in a backward pass.

Logits are kept as (vocab, tokens), with softmax over the first dimension: then each of the three
products reads its large operands in the order in which they lie in memory, which makes bf16 on a
CPU about twice as fast as the usual (tokens, vocab). The softmax is never normalised either: its
denominators scale the small factors of the products instead.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

# Tokens in a chunk. On a CPU measured with tests/benchmarks/step.py: smaller chunks pass over the
# weight and its gradient more often, larger ones leave the cache and cost memory.
CHUNK_TOKENS = {"cpu": 384, "cuda": 4096}
BLOCK_ROWS = 2048  # rows of the vocabulary handled at a time, so that temporaries stay in the cache
ALIGNMENT = 64  # tokens: reductions over ragged rows are several times slower


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor,
                         product_dtype: torch.dtype | None = None) -> Tensor:
    """Sum over tokens of -log softmax(hidden @ weight.T)[target], in nats: a 0-dim tensor.

    hidden: (tokens, d_model); weight: (vocab, d_model); targets: (tokens,), integers. The matrix
    products take product_dtype (default: hidden's own), everything else hidden's.
    """
    loss: Tensor = _LinearCrossEntropy.apply(hidden, weight, targets, product_dtype)
    return loss


class _LinearCrossEntropy(torch.autograd.Function):
    """The gradients are computed on the way forward, and scaled on the way back."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor,
                product_dtype: torch.dtype | None) -> Tensor:
        if not any(ctx.needs_input_grad):
            return _loss(hidden, weight, targets, product_dtype)
        grad_weight = torch.zeros_like(weight)
        loss, grad_hidden = linear_cross_entropy_gradients(
            hidden, weight, targets, grad_weight, 1.0, product_dtype)
        ctx.save_for_backward(grad_hidden, grad_weight)
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        return (grad_hidden * grad_loss if wants_hidden else None,
                grad_weight * grad_loss if wants_weight else None, None, None)


@torch.no_grad()
def linear_cross_entropy_gradients(
        hidden: Tensor, weight: Tensor, targets: Tensor, grad_weight: Tensor, scale: float,
        product_dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """The summed loss, and the gradient of scale * loss with respect to hidden (tokens, d_model).

    Its gradient with respect to weight is added to grad_weight (vocab, d_model) in place. With a
    scale that is known beforehand nothing of the weight's size has to be passed over again.
    """
    loss = hidden.new_zeros(())
    grad_hidden = torch.empty_like(hidden)
    for rows, head, logits in _logits(hidden, weight, product_dtype):
        x, target = hidden[rows], targets[rows]
        at_target = logits.gather(0, target[None])[0].to(x.dtype)
        shift, total = _exponentiate(logits, x.dtype)
        exponentials, shift, total = logits, shift[:len(x)], total[:len(x)]
        loss += (shift + torch.log(total) - at_target).sum()

        # d loss / d logits = softmax - one-hot, with softmax = exponentials / total
        factor = (scale / total)[:, None]  # (tokens, 1)
        grad_x = (head.T @ exponentials)[:, :len(x)].T.to(x.dtype)
        grad_hidden[rows] = (grad_x * factor).sub_(weight[target], alpha=scale)
        _add_product(grad_weight, exponentials[:, :len(x)], (x * factor).to(head.dtype))
        grad_weight.index_add_(0, target, x, alpha=-scale)
    return loss, grad_hidden


def _loss(hidden: Tensor, weight: Tensor, targets: Tensor,
          product_dtype: torch.dtype | None) -> Tensor:
    loss = hidden.new_zeros(())
    for rows, _, logits in _logits(hidden, weight, product_dtype):
        target = targets[rows]
        at_target = logits.gather(0, target[None])[0].to(loss.dtype)
        shift, total = _exponentiate(logits, loss.dtype)
        loss += (shift + torch.log(total))[:len(target)].sum() - at_target.sum()
    return loss


@torch.no_grad()
def predictive_entropy(hidden: Tensor, weight: Tensor,
                       product_dtype: torch.dtype | None = None) -> Tensor:
    """Sum over tokens of the entropy of softmax(hidden @ weight.T), in nats: a 0-dim tensor.

    hidden: (tokens, d_model); weight: (vocab, d_model). No gradients.
    """
    entropy = hidden.new_zeros(())
    for rows, _, logits in _logits(hidden, weight, product_dtype):
        shift = _max_over_vocab(logits)
        total = weighted = hidden.new_zeros(logits.shape[1])
        for block in logits.split(BLOCK_ROWS):
            shifted = block.sub_(shift).to(hidden.dtype)
            exponentials = shifted.exp()
            total = total + exponentials.sum(0)
            weighted = weighted + exponentials.mul_(shifted).sum(0)
        # -sum p log p with log p = shifted - log total
        entropy += (torch.log(total) - weighted / total)[:len(hidden[rows])].sum()
    return entropy


def _logits(hidden: Tensor, weight: Tensor, product_dtype: torch.dtype | None,
            ) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """For each chunk of tokens: its rows, the weight in product_dtype, the logits (vocab, tokens).

    The caller may overwrite the logits: their memory serves the next chunk. A last chunk of ragged
    length has columns at its end that stand for no token.
    """
    low = product_dtype or hidden.dtype
    head = weight
    if low != weight.dtype:
        head = _scratch.empty("head", weight.shape, low, weight.device).copy_(weight)
    size = CHUNK_TOKENS.get(hidden.device.type, CHUNK_TOKENS["cpu"])
    for start in range(0, len(hidden), size):
        x = hidden[start:start + size]
        padded = x.new_zeros(-(-len(x) // ALIGNMENT) * ALIGNMENT, x.shape[1], dtype=low)
        padded[:len(x)] = x
        shape = (len(weight), len(padded))
        logits = _scratch.empty("logits", shape, low, weight.device)
        torch.mm(head, padded.T, out=logits)
        yield slice(start, start + len(x)), head, logits


def _exponentiate(logits: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Turn logits (vocab, tokens) into exp(logits - shift) in place.

    Returns shift, the largest logit, and the sum of the exponentials: (tokens,) each, in dtype.
    """
    shift = _max_over_vocab(logits)
    total = torch.zeros_like(shift, dtype=dtype)
    for block in logits.split(BLOCK_ROWS):
        total += block.sub_(shift).exp_().sum(0)
    return shift.to(dtype), total


def _max_over_vocab(logits: Tensor) -> Tensor:
    """The largest logit of each token: (vocab, tokens) -> (tokens,)."""
    if logits.dtype != torch.bfloat16:
        return logits.amax(0)
    # bf16 numbers without their sign bit are ordered as the integers with the same bits, negative
    # ones the other way round. The two integer reductions take half the time of the one in bf16.
    bits = logits.view(torch.int16)
    largest, smallest = bits.amax(0), bits.amin(0)
    return torch.where(largest < 0, smallest, largest).view(torch.bfloat16)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total (vocab, d_model) += a @ b, summed in its own type whatever that of a and b is."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
        return
    for rows, block in zip(a.split(BLOCK_ROWS), total.split(BLOCK_ROWS), strict=True):
        product = torch.mm(rows, b, out=_scratch.empty("product", block.shape, b.dtype, b.device))
        wide = _scratch.empty("wide product", block.shape, total.dtype, b.device)
        block.add_(wide.copy_(product))


class _Scratch(threading.local):
    """Memory that survives between calls: on a CPU, fresh pages cost more than what is done there.

    One buffer a name and thread; on other devices torch's allocator does the same by itself.
    """

    def __init__(self) -> None:
        self.buffers: dict[tuple[str, torch.dtype], Tensor] = {}

    def empty(self, name: str, shape: tuple[int, ...], dtype: torch.dtype,
              device: torch.device) -> Tensor:
        """An uninitialised tensor, whose values last until the name is asked for again."""
        if device.type != "cpu":
            return torch.empty(shape, dtype=dtype, device=device)
        size = math.prod(shape)
        buffer = self.buffers.get((name, dtype))
        if buffer is None or len(buffer) < size:
            buffer = self.buffers[name, dtype] = torch.empty(size, dtype=dtype)
        return buffer[:size].view(shape)


_scratch = _Scratch()
