"""The official Triton kernels of mamba-ssm, for tensors on a GPU (https://github.com/state-spaces/mamba).

Which code runs is decided by the tensor's device, never by what can be imported: mamba-ssm beside
CPU tensors changes nothing. With causal-conv1d the convolution, the scan and the gated norm are one
kernel; without it (it needs a compiler for CUDA, mamba-ssm's Triton kernels do not) the convolution
is torch's; without mamba-ssm the scan is our own, slower but the same.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import math
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from fedrun.model.mamba2 import Mamba2Mixer

CHUNK_SIZE = 256  # of mamba-ssm's scan, as its Mamba2 module has it
Path = Literal["split_conv1d_scan", "conv1d_and_chunk_scan", "own"]


def ssd_kernels() -> Any:
    """mamba-ssm's module of Triton kernels; ImportError where it is not installed.

    Its package imports the compiled scan of Mamba-1 on the way, which an installation made without
    nvcc has not, and Mamba-2 does not use: an empty module takes its place.
    """
    missing = "selective_scan_cuda"
    if missing not in sys.modules and importlib.util.find_spec(missing) is None:
        sys.modules[missing] = ModuleType(missing)
    return importlib.import_module("mamba_ssm.ops.triton.ssd_combined")


@functools.cache
def on_gpu() -> Path:
    """The best path for CUDA tensors that this installation has."""
    try:
        ssd_kernels()
    except ImportError:
        return "own"
    try:
        importlib.import_module("causal_conv1d")
    except ImportError:
        return "conv1d_and_chunk_scan"
    return "split_conv1d_scan"


def path_for(x: Tensor) -> Path:
    """How a tensor's sequence is mixed. fp64 is for reference, and the kernels have none."""
    return on_gpu() if x.is_cuda and x.dtype != torch.float64 else "own"


def kernel_path(device: torch.device | str) -> str:
    """A name for the code that runs on a device: it decides the last bits, so ranks compare it."""
    device = torch.device(device)
    return f"{device.type}: {on_gpu() if device.type == 'cuda' else 'own'}"


def mix(mixer: Mamba2Mixer, u: Tensor, path: Path, product_dtype: torch.dtype) -> Tensor:
    """A block's mixer by the official kernels, without states: (b, l, d) -> (b, l, d)."""
    combined = ssd_kernels()
    config = mixer.config
    A = -torch.exp(mixer.A_log)
    limits = {"dt_limit": (config.dt_lower, math.inf if config.dt_upper is None
                           else config.dt_upper)} if config.limits_dt else {}
    zxbcdt = linear(u, mixer.in_proj, product_dtype)
    if path == "split_conv1d_scan":
        y = combined.mamba_split_conv1d_scan_combined(
            zxbcdt, mixer.conv1d.weight[:, 0], mixer.conv1d.bias, mixer.dt_bias, A, mixer.D,
            chunk_size=CHUNK_SIZE, activation="silu", rmsnorm_weight=mixer.norm.weight,
            rmsnorm_eps=config.norm_eps, headdim=config.headdim, ngroups=config.ngroups,
            norm_before_gate=False, **limits)
        return linear(y, mixer.out_proj, product_dtype).to(u.dtype)
    z, xbc, dt = zxbcdt.split([mixer.d_inner, mixer.d_conv_in, mixer.heads], dim=-1)
    past = F.pad(xbc.transpose(1, 2), (config.d_conv - 1, 0))
    convolved = F.conv1d(past, mixer.conv1d.weight.to(xbc.dtype),
                         None if mixer.conv1d.bias is None else mixer.conv1d.bias.to(xbc.dtype),
                         groups=mixer.d_conv_in).transpose(1, 2)
    x, B, C = mixer.split(F.silu(convolved))
    y = combined.mamba_chunk_scan_combined(x, dt, A, B, C, chunk_size=CHUNK_SIZE, D=mixer.D,
                                           dt_bias=mixer.dt_bias, dt_softplus=True, **limits)
    return mixer.finish(y.to(u.dtype), z.to(u.dtype))


def linear(x: Tensor, layer: nn.Linear, product_dtype: torch.dtype) -> Tensor:
    """A linear layer with its product, and its result, in `product_dtype`."""
    bias = None if layer.bias is None else layer.bias.to(product_dtype)
    return F.linear(x.to(product_dtype), layer.weight.to(product_dtype), bias)
