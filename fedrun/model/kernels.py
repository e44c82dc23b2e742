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
import sys
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor

CHUNK_SIZE = 256  # of mamba-ssm's scan, as its Mamba2 module has it
KernelPath = Literal["split_conv1d_scan", "conv1d_and_chunk_scan", "own"]


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
def on_gpu() -> KernelPath:
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


def path_for(x: Tensor) -> KernelPath:
    """How a tensor's sequence is mixed. fp64 is for reference, and the kernels have none."""
    return on_gpu() if x.is_cuda and x.dtype != torch.float64 else "own"


def kernel_path(device: torch.device | str) -> str:
    """A name for the code that runs on a device: it decides the last bits, so ranks compare it."""
    device = torch.device(device)
    return f"{device.type}: {on_gpu() if device.type == 'cuda' else 'own'}"
