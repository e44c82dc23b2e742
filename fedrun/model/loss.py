"""The language model's head: linear projection and cross-entropy, fused and in blocks.

The head of a small model with a large vocabulary is most of its arithmetic and, when the logits
of a whole batch are kept, most of its memory. Here the logits of a chunk of tokens are turned into
their gradient in place and used up at once: three matrix products (logits, gradient of the hidden
states, gradient of the weight), none of them repeated in a backward pass.

A chunk is worked off in blocks of the vocabulary, small enough for a processor's cache. Logits lie
as (vocab, tokens): bf16 products on a CPU are about twice as fast so as with (tokens, vocab). The
softmax is never normalised: its denominators scale the small factors of the products instead.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Measured with tests/benchmarks/step.py. A chunk's logits are kept until the weight's gradient is
# made: larger chunks pass over weight and gradient less often, and take more memory. The first
# chunk takes none: its logits lie where the gradient that it makes will be written.
CHUNK_BYTES = {"cpu": 1024, "cuda": 8192}  # of logits, for each word of the vocabulary
BLOCK_ROWS = {"cpu": 2048, "cuda": 2**17}  # words of the vocabulary
ALIGNMENT = 64  # tokens: products and reductions over ragged rows are several times slower
# Sums of exponentials within which nothing that matters overflows or vanishes in fp32 and bf16.
SAFE_TOTAL = 1e-20, 1e25


def chunk_tokens(weight: Tensor, dtype: torch.dtype, add: bool = True) -> int:
    """Tokens whose logits are kept at a time, for products in `dtype`.

    Without `add`, where the weight's gradient is written and not added to, they may be more.
    """
    size = CHUNK_BYTES.get(weight.device.type, CHUNK_BYTES["cpu"])
    return (size if add else max(size, weight.shape[1] * weight.itemsize)) // dtype.itemsize


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor,
                         product_dtype: torch.dtype | None = None) -> Tensor:
    """Sum over tokens of -log softmax(hidden @ weight.T)[target], in nats: a 0-dim tensor.

    hidden: (tokens, d_model); weight: (vocab, d_model); targets: (tokens,), integers. The matrix
    products take product_dtype (default: hidden's own), everything else hidden's.
    """
    loss: Tensor = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden, weight, targets, product_dtype or hidden.dtype)
    return loss


class _LinearCrossEntropy(torch.autograd.Function):
    """The gradients are computed on the way forward, and scaled on the way back."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor,
                low: torch.dtype) -> Tensor:
        if not any(ctx.needs_input_grad):
            return _loss(hidden, weight, targets, low)
        grad_weight = torch.empty_like(weight)
        loss, grad_hidden = linear_cross_entropy_gradients(
            hidden, weight, targets, low, 1.0, grad_weight, add=False)
        ctx.save_for_backward(grad_hidden, grad_weight)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        return (grad_hidden * grad_loss if wants_hidden else None,
                grad_weight * grad_loss if wants_weight else None, None, None)


@torch.no_grad()
def linear_cross_entropy_gradients(
        hidden: Tensor, weight: Tensor, targets: Tensor, product_dtype: torch.dtype, scale: float,
        grad_weight: Tensor, add: bool) -> tuple[Tensor, Tensor]:
    """The summed loss, and the gradient of scale * loss with respect to hidden (tokens, d_model).

    Its gradient with respect to weight is written to grad_weight (vocab, d_model), or added to it:
    with a scale known beforehand nothing of the weight's size has to be passed over again.
    """
    loss = hidden.new_zeros(())
    grad_hidden = torch.empty_like(hidden)
    end = 0
    while end < len(hidden):
        start, end = end, end + chunk_tokens(weight, product_dtype, add)
        x, target, grad_x = (t[start:end] for t in (hidden, targets, grad_hidden))
        expected = x.new_empty(x.shape[1], _aligned(len(x)))
        exponentials, shift, total = _softmax(x, weight, product_dtype, expected,
                                              None if add else grad_weight)
        at_target = _logit_of(x, weight, target, product_dtype)
        loss += (shift + torch.log(total) - at_target).sum()
        # d loss / d logits = softmax - one-hot, with softmax = exponentials / total
        factor = (scale / total)[:, None]  # (tokens, 1)
        torch.mul(expected.T[:len(x)], factor, out=grad_x).sub_(weight[target], alpha=scale)
        scaled = (x * factor).to(product_dtype)
        for rows in _blocks(weight):
            _product(exponentials[rows, :len(x)], scaled, grad_weight[rows], add)
        grad_weight.index_add_(0, target, x, alpha=-scale)
        add = True
    return loss, grad_hidden


def _loss(hidden: Tensor, weight: Tensor, targets: Tensor, low: torch.dtype) -> Tensor:
    loss = hidden.new_zeros(())
    chunk = chunk_tokens(weight, low)
    for x, target in zip(hidden.split(chunk), targets.split(chunk), strict=True):
        _, shift, total = _softmax(x, weight, low)
        loss += (shift + torch.log(total) - _logit_of(x, weight, target, low)).sum()
    return loss


def _softmax(x: Tensor, weight: Tensor, low: torch.dtype, expected: Tensor | None = None,
             room: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The softmax of a chunk's logits, not normalised, and what it expects of the weight.

    Returns exp(logits - shift) (vocab, tokens), whose last columns stand for no token; shift and
    the sums of the exponentials (tokens,). The exponentials lie in `room`, a tensor of the weight's
    size, if they fit, or else in memory that the next call takes again. The sum of the weight's
    rows, weighted with the exponentials, goes to `expected` (d_model, tokens).
    """
    columns = _columns(x, low)
    shape = len(weight), columns.shape[1]
    if room is not None and shape[1] * low.itemsize <= room.shape[1] * room.itemsize:
        exponentials = room.view(low)[:, :shape[1]]
    else:
        exponentials = _scratch.empty("logits", shape, low, x.device)
    # Unless logits are extreme exp needs no shift, and the passes for it can be left out. To look
    # costs nothing on a CPU; elsewhere it would mean to wait for the device.
    for shifted in (False, True) if x.is_cpu else (True,):
        shift = x.new_zeros(columns.shape[1])
        if shifted:
            for rows, block in _cast_blocks(weight, low):
                torch.mm(block, columns, out=exponentials[rows])
            shift = exponentials.amax(0)
        total = x.new_zeros(columns.shape[1])
        for rows, block in _cast_blocks(weight, low):
            part = exponentials[rows]
            if shifted:
                part.sub_(shift)
            else:
                torch.mm(block, columns, out=part)
            total += part.exp_().sum(0)
            if expected is not None:
                _product(block.T, part, expected, add=rows.start > 0)
        if shifted or SAFE_TOTAL[0] < total.min() <= total.max() < SAFE_TOTAL[1]:
            break
    return exponentials, shift[:len(x)].to(x.dtype), total[:len(x)]


@torch.no_grad()
def predictive_entropy(hidden: Tensor, weight: Tensor,
                       product_dtype: torch.dtype | None = None) -> Tensor:
    """Sum over tokens of the entropy of softmax(hidden @ weight.T), in nats: a 0-dim tensor.

    hidden: (tokens, d_model); weight: (vocab, d_model). No gradients. Block by block with a running
    maximum, as in Milakov & Gimelshein (2018, algorithm 3).
    """
    low = product_dtype or hidden.dtype
    entropy = hidden.new_zeros(())
    for x in hidden.split(chunk_tokens(weight, low)):
        columns = _columns(x, low)
        shift = total = weighted = x.new_zeros(())
        for rows, block in _cast_blocks(weight, low):
            part = _scratch.empty("part", (len(block), columns.shape[1]), low, x.device)
            logits = torch.mm(block, columns, out=part).to(x.dtype)
            largest = logits.amax(0)
            if rows.start == 0:
                shift = largest
            moved = torch.maximum(shift, largest) - shift
            shift = shift + moved
            shrink = torch.exp(-moved)
            exponentials = logits.sub_(shift).exp()
            # weighted is the sum of exp(logit - shift) * (logit - shift)
            weighted = (weighted - moved * total) * shrink + logits.mul_(exponentials).sum(0)
            total = total * shrink + exponentials.sum(0)
        # -sum p log p with log p = logit - shift - log total
        entropy += (torch.log(total) - weighted / total)[:len(x)].sum()
    return entropy


def _logit_of(x: Tensor, weight: Tensor, target: Tensor, low: torch.dtype) -> Tensor:
    """The logit of each token's target, (tokens,), rounded as a product in `low` would be."""
    exact = (x.to(low).to(x.dtype) * weight[target].to(low).to(x.dtype)).sum(1)
    return exact.to(low).to(x.dtype)


def _columns(x: Tensor, low: torch.dtype) -> Tensor:
    """(tokens, d_model) -> (d_model, tokens, filled up with zeros to a multiple of ALIGNMENT)"""
    padded = x.new_zeros(_aligned(len(x)), x.shape[1], dtype=low)
    padded[:len(x)] = x
    return padded.T


def _aligned(tokens: int) -> int:
    return -(-tokens // ALIGNMENT) * ALIGNMENT


def _blocks(weight: Tensor) -> Iterator[slice]:
    size = BLOCK_ROWS.get(weight.device.type, BLOCK_ROWS["cpu"])
    return (slice(start, min(start + size, len(weight))) for start in range(0, len(weight), size))


def _cast_blocks(weight: Tensor, low: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """The weight in blocks of the vocabulary, each cast when it is needed: (rows, d_model)."""
    for rows in _blocks(weight):
        block = weight[rows]
        if low != weight.dtype:
            block = _scratch.empty("block", block.shape, low, weight.device).copy_(block)
        yield rows, block


def _product(a: Tensor, b: Tensor, out: Tensor, add: bool) -> None:
    """out = or += a @ b, summed in out's type whatever that of a and b is; a may lie in out."""
    if a.dtype == out.dtype and (add or a.untyped_storage().data_ptr()
                                 != out.untyped_storage().data_ptr()):
        torch.addmm(out, a, b, beta=1 if add else 0, out=out)
        return
    product = torch.mm(a, b, out=_scratch.empty("product", out.shape, b.dtype, b.device))
    if add:
        out += _scratch.empty("wide product", out.shape, out.dtype, b.device).copy_(product)
    else:
        out.copy_(product)


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
