"""The mixer of Mamba-1 (Gu & Dao 2023, https://arxiv.org/abs/2312.00752) for training.

The library's own, where Mamba's compiled kernels are not installed, slices tensors of all positions
one position at a time, so that its gradient takes time that grows with the square of the length.
The recurrence here takes time that grows with the length. Shapes: b batch, l sequence length,
d d_model, i inner width, n size of the state.
"""

from __future__ import annotations

import functools
import importlib.util
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fedrun.model.conv import causal_conv_silu
from fedrun.model.precision import bf16_products


def use_own_scan(lm: nn.Module) -> None:
    """Let the mixers of transformers' Mamba-1 compute whole sequences by `mix`. With a cache, as in
    generation, they compute as before, and on GPUs with Mamba's compiled kernels; so do other
    models."""
    for module in lm.modules():
        if type(module).__name__ == "MambaMixer" and module.activation == "silu":
            _replace_forward(module)


def _replace_forward(mixer: Any) -> None:
    original = mixer.forward

    def forward(hidden_states: Tensor, *arguments: Any, **named: Any) -> Tensor:
        if any(value is not None for value in (*arguments, *named.values())) or (
                hidden_states.is_cuda and _has_compiled_scan()):
            found: Tensor = original(hidden_states, *arguments, **named)
            return found
        return mix(mixer, hidden_states)

    mixer.forward = forward


@functools.cache
def _has_compiled_scan() -> bool:
    try:
        found = importlib.util.find_spec("selective_scan_cuda")
    except ValueError:  # the empty module that stands for it in kernels.py
        return False
    return found is not None


def mix(mixer: Any, u: Tensor) -> Tensor:
    """Mix sequences from their start: (b, l, d) -> (b, l, d)."""
    x, gate = mixer.in_proj(u).chunk(2, dim=-1)  # (b, l, i) each
    weight = mixer.conv1d.weight
    with bf16_products(u, False):
        window = F.pad(x, (0, 0, weight.shape[-1] - 1, 0))
        x = causal_conv_silu(window, weight, mixer.conv1d.bias)
    low_rank, B, C = mixer.x_proj(x).split(
        [mixer.time_step_rank, mixer.ssm_state_size, mixer.ssm_state_size], dim=-1)
    dt = F.linear(low_rank, mixer.dt_proj.weight)  # (b, l, i)
    with bf16_products(u, False):
        dt = F.softplus(dt.to(x.dtype) + mixer.dt_proj.bias)
        y = selective_scan(x, dt, -torch.exp(mixer.A_log), B.to(x.dtype), C.to(x.dtype))
        y = torch.addcmul(y, x, mixer.D) * F.silu(gate.to(x.dtype))
    mixed: Tensor = mixer.out_proj(y)
    return mixed


def selective_scan(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t and y_t = C_t h_t, from h = 0, for each channel.

    x, dt: (b, l, i), dt after softplus; A: (i, n), negative; B, C: (b, l, n); y: (b, l, i). All
    have the same type.
    """
    x, dt, B, C = (t.transpose(0, 1) for t in (x, dt, B, C))  # positions first: contiguous slices
    decay = torch.exp(dt[..., None] * A)  # (l, b, i, n)
    added = (dt * x)[..., None] * B[:, :, None]
    y: Tensor = _Scan.apply(decay, added, C)  # type: ignore[no-untyped-call]
    return y.transpose(0, 1)


class _Scan(torch.autograd.Function):
    """h_t = decay_t h_{t-1} + added_t (l, b, i, n), y_t = h_t C_t; C: (l, b, n), y: (l, b, i)."""

    @staticmethod
    def forward(ctx: Any, decay: Tensor, added: Tensor, C: Tensor) -> Tensor:
        states = torch.empty_like(added, memory_format=torch.contiguous_format)
        states[0] = added[0]
        for t in range(1, len(states)):
            torch.addcmul(added[t], decay[t], states[t - 1], out=states[t])
        ctx.save_for_backward(decay, states, C)
        return (states @ C[..., None])[..., 0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        decay, states, C = ctx.saved_tensors
        grad = grad_y[..., None] * C[:, :, None]  # of the states, (l, b, i, n)
        for t in reversed(range(len(grad) - 1)):
            grad[t].addcmul_(decay[t + 1], grad[t + 1])
        grad_decay = torch.zeros_like(decay)
        torch.mul(grad[1:], states[:-1], out=grad_decay[1:])
        return grad_decay, grad, (grad_y[:, :, None] @ states)[:, :, 0]
