"""The floor of a training step: its matrix products alone, and AdamW's memory traffic.

Each product is measured alone, over all tokens at once, in the layout that a linear layer and its
gradients have. A step's distance from the floor is the cost of splitting its products up and of
everything else that it does.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from fedrun.model.config import ModelConfig
from fedrun.model.mixer import CHUNK_SIZE
from tests.benchmarks.common import median_seconds

ADAMW_TRANSFERS = 7  # reads parameter, gradient and two moments; writes all but the gradient
Shape = tuple[int, int, int, int]  # number of products, rows, inner dimension, columns


def products(config: ModelConfig, vocab_size: int, batch: int, length: int) -> Iterator[Shape]:
    """The matrix products of a forward pass."""
    tokens, chunks = batch * length, batch * -(-length // CHUNK_SIZE)
    inner = config.expand * config.d_model
    heads = inner // config.headdim
    b_and_c = 2 * config.ngroups * config.d_state
    channels = inner // config.ngroups
    groups = chunks * config.ngroups
    for _ in range(config.n_layer):
        yield 1, tokens, config.d_model, 2 * inner + b_and_c + heads  # input projection
        yield 1, tokens, inner, config.d_model  # output projection
        yield groups, CHUNK_SIZE, config.d_state, CHUNK_SIZE  # C B^T
        yield chunks * heads, CHUNK_SIZE, CHUNK_SIZE, config.headdim  # within chunks
        yield groups, config.d_state, CHUNK_SIZE, channels  # what chunks add to the state
        yield groups, CHUNK_SIZE, config.d_state, channels  # what positions read from the state
    yield 1, batch * (length - 1), config.d_model, vocab_size  # head


def product_seconds(shape: Shape, dtype: torch.dtype) -> float:
    """The time of one product and of its two gradients."""
    count, rows, inner, columns = shape
    x = torch.randn(count, rows, inner).to(dtype)
    weight = torch.randn(count, columns, inner).to(dtype)
    y = torch.randn(count, rows, columns).to(dtype)
    if count == 1:
        x, weight, y = x[0], weight[0], y[0]
    multiply = torch.mm if count == 1 else torch.bmm
    grad_x, grad_weight = torch.empty_like(x), torch.empty_like(weight)
    return (median_seconds(lambda: multiply(x, weight.mT, out=y))
            + median_seconds(lambda: multiply(y, weight, out=grad_x))
            + median_seconds(lambda: multiply(y.mT, x, out=grad_weight)))


def adamw_seconds(size: int) -> float:
    """AdamW's memory traffic for `size` fp32 parameters, at the rate of a copy."""
    source, target = torch.zeros(size), torch.zeros(size)
    return ADAMW_TRANSFERS / 2 * median_seconds(lambda: target.copy_(source))  # a copy has two
