"""The causal depthwise convolution of a Mamba-2 block, and its activation."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def causal_conv_silu(window: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """y_t = silu(bias + sum_k weight_k window_(t+k)).

    window: (b, taps - 1 + l, channels), of any type; weight: (channels, 1, taps); bias: (channels,)
    or None; y: (b, l, channels), in the weight's type. The first taps - 1 positions of the window
    are the inputs before the sequence.
    """
    convolved: Tensor = _CausalConvSilu.apply(  # type: ignore[no-untyped-call]
        window, weight, bias)
    return convolved


class _CausalConvSilu(torch.autograd.Function):
    """With a hand-written gradient: torch's gradient of a depthwise convolution is slow on a CPU.
    The backward pass recomputes the sum before the activation, which is cheap and saves memory."""

    @staticmethod
    def forward(ctx: Any, window: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(window, weight, bias)
        return F.silu(_convolve(window.to(weight.dtype), weight, bias))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        window, weight, bias = ctx.saved_tensors
        window_dtype, window = window.dtype, window.to(weight.dtype)
        summed = _convolve(window, weight, bias)
        grad = torch.ops.aten.silu_backward(grad, summed)
        grad_window = torch.zeros_like(window)
        grad_weight = torch.empty_like(weight)
        for k in range(weight.shape[2]):
            taken = slice(k, k + grad.shape[1])
            grad_window[:, taken].addcmul_(grad, weight[:, 0, k])
            grad_weight[:, 0, k] = torch.mul(grad, window[:, taken], out=summed).sum((0, 1))
        return (grad_window.to(window_dtype), grad_weight,
                None if bias is None else grad.sum((0, 1)))


def _convolve(window: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    # As images of height 1, channels last: torch's conv1d would transpose input and output.
    images = window.transpose(1, 2)[:, :, None]
    convolved = F.conv2d(images, weight[:, :, None], bias, groups=len(weight))
    return convolved[:, :, 0].transpose(1, 2)
