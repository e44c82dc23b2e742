"""The language model's head: linear projection and cross-entropy, fused and computed in blocks.

In a small model with a large vocabulary the head is most of the arithmetic and, if the logits of a
whole batch are kept, most of the memory. Here the logits of one chunk of tokens at a time are
turned into their gradient in place and used immediately. That takes three matrix products (logits,
gradient of the hidden states, gradient of the weight), and the backward pass repeats none of them.

A chunk is processed in blocks of the vocabulary that fit into a processor's cache. Logits are
stored as (vocab, tokens): on a CPU, bf16 products are about twice as fast this way as with
(tokens, vocab). The softmax is never normalised: its denominators scale the small factors of the
products instead.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fedrun.model import gpu_head

# Measured with tests/benchmarks/step.py. A chunk's logits are kept until the weight's gradient is
# computed: larger chunks make fewer passes over weight and gradient, but need more memory. The
# first chunk needs no extra memory: its logits are stored in the (not yet written) weight-gradient
# buffer. On a GPU the loss is computed by gpu_head.py, and these sizes are those of the entropy.
CHUNK_BYTES = {"cpu": 1024, "cuda": 8192}  # of logits, per token of the vocabulary
BLOCK_ROWS = {"cpu": 2048, "cuda": 2**17}  # tokens of the vocabulary
ALIGNMENT = 64  # tokens; products and reductions over ragged rows are several times slower
# If the sum of exponentials is within these limits, neither fp32 nor bf16 loses anything to
# overflow or underflow that would change the result.
SAFE_TOTAL = 1e-20, 1e25


def chunk_tokens(weight: Tensor, dtype: torch.dtype, add: bool = True) -> int:
    """Number of tokens in a chunk, for matrix products in `dtype`.

    A chunk whose weight gradient is written rather than added (`add` false) may be larger, as its
    logits are stored in the weight-gradient buffer.
    """
    size = CHUNK_BYTES.get(weight.device.type, CHUNK_BYTES["cpu"])
    return (size if add else max(size, weight.shape[1] * weight.itemsize)) // dtype.itemsize


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor,
                         matmul_dtype: torch.dtype | None = None) -> Tensor:
    """Sum over tokens of -log softmax(hidden @ weight.T)[target], in nats: a 0-dim tensor.

    hidden: (tokens, d_model); weight: (vocab, d_model); targets: (tokens,), integers. Matrix
    products run in matmul_dtype (default: hidden's type), everything else in hidden's type. Without
    gradients (`no_grad`, `inference_mode`, or nothing that requires one) it is one product instead
    of three, with the same bits.
    """
    matmul_dtype = matmul_dtype or hidden.dtype
    # Asked here, because an autograd function cannot know: its needs_input_grad tells what requires
    # gradients, whatever the grad mode, and in its forward pass the mode is always off.
    if not (torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)):
        return _loss(hidden, weight, targets, matmul_dtype)
    loss: Tensor = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden, weight, targets, matmul_dtype)
    return loss


class _LinearCrossEntropy(torch.autograd.Function):
    """The forward pass computes the gradients; the backward pass only scales them."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor,
                matmul_dtype: torch.dtype) -> Tensor:
        grad_weight = torch.empty_like(weight)
        loss, grad_hidden = linear_cross_entropy_gradients(
            hidden, weight, targets, matmul_dtype, 1.0, grad_weight, add=False)
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
        hidden: Tensor, weight: Tensor, targets: Tensor, matmul_dtype: torch.dtype, scale: float,
        grad_weight: Tensor, add: bool) -> tuple[Tensor, Tensor]:
    """The summed loss, and the gradient of scale * loss with respect to hidden (tokens, d_model).

    The gradient with respect to weight is written to grad_weight (vocab, d_model), or added to it
    if `add`. As the scale is known here, no later pass over a tensor of that size is needed.
    """
    if hidden.is_cuda:
        return gpu_head.cross_entropy_gradients(hidden, weight, targets, matmul_dtype, scale,
                                                grad_weight, add)
    loss = hidden.new_zeros(())
    grad_hidden = torch.empty_like(hidden)
    end = 0
    while end < len(hidden):
        start, end = end, end + chunk_tokens(weight, matmul_dtype, add)
        x, target, grad_x = (t[start:end] for t in (hidden, targets, grad_hidden))
        expected = x.new_empty(x.shape[1], _aligned(len(x)))
        exponentials = _logits_memory(x, weight, matmul_dtype, None if add else grad_weight)
        shift, total = _softmax(x, weight, matmul_dtype, exponentials, expected)
        at_target = _logit_of(x, weight, target, matmul_dtype)
        loss += (shift + torch.log(total) - at_target).sum()
        # d loss / d logits = softmax - one-hot, with softmax = exponentials / total
        factor = (scale / total)[:, None]  # (tokens, 1)
        torch.mul(expected.T[:len(x)], factor, out=grad_x).sub_(weight[target], alpha=scale)
        scaled = (x * factor).to(matmul_dtype)
        for rows in _blocks(weight):
            _product(exponentials[rows, :len(x)], scaled, grad_weight[rows], add)
        grad_weight.index_add_(0, target, x, alpha=-scale)
        add = True
    return loss, grad_hidden


def _loss(hidden: Tensor, weight: Tensor, targets: Tensor, matmul_dtype: torch.dtype) -> Tensor:
    """The summed loss alone, in the chunks of `linear_cross_entropy_gradients`: the same bits."""
    if hidden.is_cuda:
        return gpu_head.cross_entropy(hidden, weight, targets, matmul_dtype)
    loss = hidden.new_zeros(())
    end = 0
    while end < len(hidden):
        start, end = end, end + chunk_tokens(weight, matmul_dtype, add=end > 0)
        x, target = hidden[start:end], targets[start:end]
        # A block's logits are read at once, and the rare shift computes them twice.
        shift, total = _softmax(x, weight, matmul_dtype, None)
        loss += (shift + torch.log(total) - _logit_of(x, weight, target, matmul_dtype)).sum()
    return loss


def _logits_memory(x: Tensor, weight: Tensor, matmul_dtype: torch.dtype,
                   out: Tensor | None = None) -> Tensor:
    """Memory for the logits of a chunk, (vocab, aligned tokens): in `out`, a tensor of the weight's
    shape, if they fit there, else memory that the next call reuses."""
    shape = len(weight), _aligned(len(x))
    if out is not None and shape[1] * matmul_dtype.itemsize <= out.shape[1] * out.itemsize:
        return out.view(matmul_dtype)[:, :shape[1]]
    return _scratch.empty("logits", shape, matmul_dtype, x.device)


def _softmax(x: Tensor, weight: Tensor, matmul_dtype: torch.dtype, exponentials: Tensor | None,
             expected: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The unnormalised softmax of a chunk's logits: the shift and the sum of exp(logits - shift),
    (tokens,) each.

    exp(logits - shift) (vocab, tokens), whose last columns are padding, is stored in
    `exponentials`; None keeps only one block of it at a time. If `expected` (d_model, tokens) is
    given, weight.T @ exponentials is written to it: the expectation of the weight's rows under the
    softmax, not normalised either.
    """
    columns = _columns(x, matmul_dtype)

    def product(rows: slice, block: Tensor) -> Tensor:
        part = _scratch.empty("part", (len(block), columns.shape[1]), matmul_dtype, x.device
                              ) if exponentials is None else exponentials[rows]
        return torch.mm(block, columns, out=part)

    # Unless logits are extreme, exp needs no shift, which saves two passes. Tensors without values
    # (the meta device) cannot be checked.
    for shifted in (False, True) if x.is_cpu else (True,):
        shift = x.new_zeros(columns.shape[1])
        if shifted:
            shift = torch.stack([product(rows, block).amax(0) for rows, block
                                 in _cast_blocks(weight, matmul_dtype)]).amax(0)
        total = x.new_zeros(columns.shape[1])
        for rows, block in _cast_blocks(weight, matmul_dtype):
            if shifted and exponentials is not None:
                part = exponentials[rows]  # it still holds logits
            else:
                part = product(rows, block)
            if shifted:
                part.sub_(shift)
            total += part.exp_().sum(0)
            if expected is not None:
                _product(block.T, part, expected, add=rows.start > 0)
        if shifted or SAFE_TOTAL[0] < total.min() <= total.max() < SAFE_TOTAL[1]:
            break
    return shift[:len(x)].to(x.dtype), total[:len(x)]


@torch.no_grad()
def predictive_entropy(hidden: Tensor, weight: Tensor,
                       matmul_dtype: torch.dtype | None = None) -> Tensor:
    """Sum over tokens of the entropy of softmax(hidden @ weight.T), in nats: a 0-dim tensor.

    hidden: (tokens, d_model); weight: (vocab, d_model). Without gradients. Processes blocks of the
    vocabulary with a running maximum, as Milakov & Gimelshein (2018, algorithm 3).
    """
    matmul_dtype = matmul_dtype or hidden.dtype
    entropy = hidden.new_zeros(())
    for x in hidden.split(chunk_tokens(weight, matmul_dtype)):
        columns = _columns(x, matmul_dtype)
        shift = total = weighted = x.new_zeros(())
        for rows, block in _cast_blocks(weight, matmul_dtype):
            part = _scratch.empty("part", (len(block), columns.shape[1]), matmul_dtype, x.device)
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


def _logit_of(x: Tensor, weight: Tensor, target: Tensor, matmul_dtype: torch.dtype) -> Tensor:
    """Each token's logit of its target, (tokens,), rounded like a product in matmul_dtype."""
    exact = (x.to(matmul_dtype).to(x.dtype) * weight[target].to(matmul_dtype).to(x.dtype)).sum(1)
    return exact.to(matmul_dtype).to(x.dtype)


def _columns(x: Tensor, matmul_dtype: torch.dtype) -> Tensor:
    """(tokens, d_model) -> (d_model, tokens), zero-padded to a multiple of ALIGNMENT tokens."""
    padded = x.new_zeros(_aligned(len(x)), x.shape[1], dtype=matmul_dtype)
    padded[:len(x)] = x
    return padded.T


def _aligned(tokens: int) -> int:
    return -(-tokens // ALIGNMENT) * ALIGNMENT


def _blocks(weight: Tensor) -> Iterator[slice]:
    size = BLOCK_ROWS.get(weight.device.type, BLOCK_ROWS["cpu"])
    return (slice(start, min(start + size, len(weight))) for start in range(0, len(weight), size))


def _cast_blocks(weight: Tensor, matmul_dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """The weight in blocks (rows, d_model), each cast when needed and valid until the next one."""
    for rows in _blocks(weight):
        block = weight[rows]
        if matmul_dtype != weight.dtype:
            block = _scratch.empty("block", block.shape, matmul_dtype, weight.device).copy_(block)
        yield rows, block


def _product(a: Tensor, b: Tensor, out: Tensor, add: bool) -> None:
    """out = a @ b, or out += a @ b if `add`. Adds in out's type; a may share memory with out."""
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
    """Memory that is reused between calls: on a CPU, new pages cost more than the work on them.

    One buffer per thread, name, type and device. On a GPU torch's allocator reuses memory itself;
    the meta device, where memory is counted and not used, stands for a CPU.
    """

    def __init__(self) -> None:
        self.buffers: dict[tuple[str, torch.dtype, str], Tensor] = {}

    def empty(self, name: str, shape: tuple[int, ...], dtype: torch.dtype,
              device: torch.device) -> Tensor:
        """An uninitialised tensor. The next call with the same name may overwrite it."""
        if device.type not in ("cpu", "meta"):
            return torch.empty(shape, dtype=dtype, device=device)
        size, key = math.prod(shape), (name, dtype, device.type)
        buffer = self.buffers.get(key)
        if buffer is None or len(buffer) < size:
            with torch.inference_mode(False):  # else training could not write to it later
                buffer = self.buffers[key] = torch.empty(size, dtype=dtype, device=device)
        return buffer[:size].view(shape)


_scratch = _Scratch()
