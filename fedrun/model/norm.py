"""Root-mean-square norm (Zhang & Sennrich 2019, https://arxiv.org/abs/1910.07467)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fedrun.model import kernels
from fedrun.model.config import NORM_EPS


def rms_norm(x: Tensor, weight: Tensor, z: Tensor | None = None, groups: int = 1,
             eps: float = NORM_EPS) -> Tensor:
    """g / sqrt(mean(g^2) + eps) * weight, with g = x, or g = x * silu(z) if there is a gate z.

    x, z: (..., width); weight: (width,). The width is split into `groups` equal parts with a mean
    each. Everything is computed in x's type; z may have another.
    """
    if z is None and groups == 1 and kernels.has_rms_norm(x):
        return F.rms_norm(x, list(weight.shape), weight, eps)
    normed: Tensor = _RMSNorm.apply(  # type: ignore[no-untyped-call]
        x, weight, z, groups, eps)
    return normed


class _RMSNorm(torch.autograd.Function):
    """Hand-written, because autograd would make three times as many passes over x on a CPU."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, z: Tensor | None, groups: int, eps: float
                ) -> Tensor:
        g = x if z is None else F.silu(z.to(x.dtype)).mul_(x)
        parts = torch.unflatten(g, -1, (groups, -1))  # (..., groups, width / groups)
        mean_square = torch.linalg.vector_norm(parts, dim=-1, keepdim=True).square_()
        scale = mean_square.div_(parts.shape[-1]).add_(eps).rsqrt_()  # (..., groups, 1)
        ctx.save_for_backward(x, weight, z, scale)
        ctx.groups = groups
        return torch.mul(parts, scale).flatten(-2).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None, None]:
        x, weight, z, scale = ctx.saved_tensors
        gate = None if z is None else F.silu(z.to(x.dtype))
        g = x if gate is None else x * gate
        # With s the scale and w the weights of n channels, y = s w g has the gradients
        # dg = s w dy - g s^3 / n (w dy . g) and dw = sum over tokens of s g dy.
        parts = g.unflatten(-1, (ctx.groups, -1))
        products = (grad * g).unflatten(-1, (ctx.groups, -1))
        w = weight.unflatten(0, (ctx.groups, -1))
        dot = (products * w).sum(-1, keepdim=True)  # (..., groups, 1)
        grad_weight = products.mul_(scale).flatten(0, -3).sum(0).flatten()
        grad_g = torch.mul(grad.unflatten(-1, (ctx.groups, -1)), w, out=products).mul_(scale)
        grad_g.addcmul_(parts, dot.mul_(scale ** 3).div_(-parts.shape[-1]))
        if gate is None:
            return grad_g.flatten(-2), grad_weight, None, None, None
        grad_gate = torch.mul(grad_g, x.unflatten(-1, (ctx.groups, -1)), out=parts).flatten(-2)
        grad_z = torch.ops.aten.silu_backward(grad_gate, z.to(x.dtype)).to(z.dtype)
        return grad_g.flatten(-2).mul_(gate), grad_weight, grad_z, None, None
