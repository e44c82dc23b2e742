"""The sequence mixer of a Mamba-2 block (Dao & Gu 2024, https://arxiv.org/abs/2405.21060).

Shapes: b batch, l sequence length, d d_model, i = expand * d inner width, h heads, p headdim,
g groups, n d_state.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedrun.model import kernels
from fedrun.model.config import ModelConfig
from fedrun.model.conv import causal_conv_silu
from fedrun.model.norm import rms_norm
from fedrun.model.ssd import ssd_scan, ssd_step

CHUNK_SIZE = 64  # of the scan; the fastest of 32, 64 and 128 (tests/benchmarks/step.py)


class RMSNorm(nn.Module):
    """RMS norm of x, or of x * silu(z) if there is a gate z, over each group of channels."""

    def __init__(self, width: int, eps: float, groups: int = 1) -> None:
        super().__init__()
        self.groups, self.eps = groups, eps
        self.weight = nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        return rms_norm(x, self.weight, z, self.groups, self.eps)


class Mamba2Mixer(nn.Module):
    """The sequence mixer: (b, l, d) -> (b, l, d); for generation it takes and returns a state."""

    def __init__(self, config: ModelConfig, compute_dtype: torch.dtype) -> None:
        super().__init__()
        self.config, self.compute_dtype = config, compute_dtype
        self.d_inner = config.expand * config.d_model
        self.heads = self.d_inner // config.headdim
        self.d_bc = config.ngroups * config.d_state
        self.d_conv_in = self.d_inner + 2 * self.d_bc
        self.dt_bias = nn.Parameter(torch.empty(self.heads))
        self.A_log = nn.Parameter(torch.empty(self.heads))
        self.D = nn.Parameter(torch.empty(self.heads))
        self.in_proj = nn.Linear(config.d_model, self.d_inner + self.d_conv_in + self.heads,
                                 bias=config.proj_bias)
        self.conv1d = nn.Conv1d(self.d_conv_in, self.d_conv_in, config.d_conv,
                                groups=self.d_conv_in, bias=config.conv_bias)
        self.norm = RMSNorm(self.d_inner, config.norm_eps, config.ngroups)
        self.out_proj = nn.Linear(self.d_inner, config.d_model, bias=config.proj_bias)

    def project(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gate z (b, l, i) and convolution input (b, l, i + 2 g n), both in the type of the matrix
        product, and step sizes dt (b, l, h) in u's type."""
        zxbcdt = linear(u, self.in_proj, matmul_dtype_for(self.compute_dtype, u))
        z, xbc, dt = zxbcdt.split([self.d_inner, self.d_conv_in, self.heads], dim=-1)
        dt = F.softplus(dt.to(u.dtype) + self.dt_bias)
        if self.config.limits_dt:
            dt = dt.clamp(self.config.dt_lower, self.config.dt_upper)
        return z, xbc, dt

    def split(self, xbc: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Split the convolution's output into x (..., h, p), B and C (..., g, n)."""
        x, B, C = xbc.split([self.d_inner, self.d_bc, self.d_bc], dim=-1)
        groups = (self.config.ngroups, self.config.d_state)
        return (x.unflatten(-1, (self.heads, self.config.headdim)),
                B.unflatten(-1, groups), C.unflatten(-1, groups))

    def finish(self, y: Tensor, z: Tensor) -> Tensor:
        """Gate, norm and output projection: (..., h, p), (..., i) -> (..., d)."""
        normed = self.norm(y.flatten(-2), z)
        matmul_dtype = matmul_dtype_for(self.compute_dtype, normed)
        return linear(normed, self.out_proj, matmul_dtype).to(normed.dtype)

    def mix(self, u: Tensor) -> Tensor:
        """Mix a whole sequence with the fastest code for u's device: (b, l, d) -> (b, l, d)."""
        path = kernels.path_for(u)
        if path == "own":
            return self.forward(u)[0]
        if not kernels.split_conv1d_takes(self.config.d_conv, self.d_conv_in):
            path = "conv1d_and_chunk_scan"
        return mix_with_kernels(self, u, path, matmul_dtype_for(self.compute_dtype, u))

    def forward(self, u: Tensor, state: LayerState | None = None) -> tuple[Tensor, LayerState]:
        """Mix a sequence u (b, l, d) that follows `state` (None: at the start of a text).

        Returns the output (b, l, d) and the state after it.
        """
        taps = self.config.d_conv - 1
        z, xbc, dt = self.project(u)
        past = xbc.new_zeros(len(u), taps, self.d_conv_in) if state is None else state[0]
        window = torch.cat([past, xbc], dim=1)  # (b, taps + l, i + 2 g n)
        convolved = causal_conv_silu(window, self.conv1d.weight, self.conv1d.bias)
        x, B, C = self.split(convolved)
        y, ssm_state = ssd_scan(x, dt, -torch.exp(self.A_log), B, C, self.D, chunk_size=CHUNK_SIZE,
                                initial_state=None if state is None else state[1],
                                matmul_dtype=matmul_dtype_for(self.compute_dtype, u))
        return self.finish(y, z), (window[:, window.shape[1] - taps:], ssm_state)

    def step(self, u: Tensor, state: LayerState) -> tuple[Tensor, LayerState]:
        """Mix one token a sequence, u (b, d), that follows `state`: the output (b, d) and the state
        after it."""
        past, ssm_state = state
        z, xbc, dt = self.project(u)
        window = torch.cat([past, xbc[:, None]], dim=1)  # (b, d_conv, i + 2 g n)
        convolved = causal_conv_silu(window, self.conv1d.weight, self.conv1d.bias)[:, 0]
        x, B, C = self.split(convolved)
        y, ssm_state = ssd_step(x, dt, -torch.exp(self.A_log), B, C, self.D, ssm_state)
        return self.finish(y, z), (window[:, 1:], ssm_state)


LayerState = tuple[Tensor, Tensor]
"""The last d_conv - 1 inputs of the convolution (b, d_conv - 1, i + 2 g n) and H (b, h, p, n)."""


def mix_with_kernels(mixer: Mamba2Mixer, u: Tensor, path: kernels.KernelPath,
                     matmul_dtype: torch.dtype) -> Tensor:
    """Mix a whole sequence with the official kernels: (b, l, d) -> (b, l, d)."""
    combined = kernels.ssd_kernels()
    config = mixer.config
    A = -torch.exp(mixer.A_log)
    limits = {"dt_limit": (config.dt_lower, math.inf if config.dt_upper is None
                           else config.dt_upper)} if config.limits_dt else {}
    zxbcdt = linear(u, mixer.in_proj, matmul_dtype)
    if path == "split_conv1d_scan":
        y = combined.mamba_split_conv1d_scan_combined(
            zxbcdt, mixer.conv1d.weight.flatten(1), mixer.conv1d.bias, mixer.dt_bias, A, mixer.D,
            chunk_size=kernels.CHUNK_SIZE, activation="silu", rmsnorm_weight=mixer.norm.weight,
            rmsnorm_eps=config.norm_eps, headdim=config.headdim, ngroups=config.ngroups,
            norm_before_gate=False, **limits)
        return linear(y, mixer.out_proj, matmul_dtype).to(u.dtype)
    z, xbc, dt = zxbcdt.split([mixer.d_inner, mixer.d_conv_in, mixer.heads], dim=-1)
    past = F.pad(xbc.transpose(1, 2), (config.d_conv - 1, 0))
    convolved = F.conv1d(past, mixer.conv1d.weight.to(xbc.dtype),
                         None if mixer.conv1d.bias is None else mixer.conv1d.bias.to(xbc.dtype),
                         groups=mixer.d_conv_in).transpose(1, 2)
    x, B, C = mixer.split(F.silu(convolved))
    y = combined.mamba_chunk_scan_combined(x, dt, A, B, C, chunk_size=kernels.CHUNK_SIZE, D=mixer.D,
                                           dt_bias=mixer.dt_bias, dt_softplus=True, **limits)
    return mixer.finish(y.to(u.dtype), z.to(u.dtype))


def linear(x: Tensor, layer: nn.Linear, matmul_dtype: torch.dtype) -> Tensor:
    """Apply a linear layer in matmul_dtype, which is also the type of the result."""
    bias = None if layer.bias is None else layer.bias.to(matmul_dtype)
    return F.linear(x.to(matmul_dtype), layer.weight.to(matmul_dtype), bias)


def matmul_dtype_for(compute_dtype: torch.dtype, x: Tensor) -> torch.dtype:
    """The type of matrix products: compute_dtype, but fp64 if the model is in fp64."""
    return x.dtype if x.dtype == torch.float64 else compute_dtype
