"""Root-mean-square norm (Zhang & Sennrich 2019, https://arxiv.org/abs/1910.07467)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

EPS = 1e-5


def rms_norm(x: Tensor, weight: Tensor, groups: int = 1) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight, the mean over each of `groups` parts of the width.

    x: (..., width); weight: (width,). In x's type, whatever it is.
    """
    normed: Tensor = _RMSNorm.apply(x, weight, groups)
    return normed


class _RMSNorm(torch.autograd.Function):
    """By hand, because autograd's composite makes three times the passes over x on a CPU."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, groups: int) -> Tensor:
        parts = x.unflatten(-1, (groups, -1))  # (..., g, width / g)
        mean_square = torch.linalg.vector_norm(parts, dim=-1, keepdim=True).square_()
        scale = mean_square.div_(parts.shape[-1]).add_(EPS).rsqrt_()  # (..., g, 1)
        ctx.save_for_backward(x, weight, scale)
        ctx.groups = groups
        return (parts * scale).flatten(-2).mul_(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        # With s the scale and w the weight of n channels, y = s w x has the gradient
        # dx = s w dy - x s^3 / n (w dy . x) and dw = the sum over tokens of s x dy.
        parts = x.unflatten(-1, (ctx.groups, -1))
        products = (grad * x).unflatten(-1, (ctx.groups, -1))
        w = weight.unflatten(0, (ctx.groups, -1))
        dot = (products * w).sum(-1, keepdim=True)  # (..., g, 1)
        grad_weight = products.mul_(scale).flatten(0, -3).sum(0).flatten()
        grad_x = (grad * weight).unflatten(-1, (ctx.groups, -1)).mul_(scale)
        grad_x.addcmul_(parts, dot.mul_(scale ** 3).div_(-parts.shape[-1]))
        return grad_x.flatten(-2), grad_weight, None
