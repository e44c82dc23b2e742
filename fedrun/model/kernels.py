"""The official Triton kernels of mamba-ssm (https://github.com/state-spaces/mamba) for GPU tensors.

On a CPU our own code always runs, even where mamba-ssm is installed. On a GPU it depends on what is
installed. With mamba-ssm and causal-conv1d, one kernel does the convolution, the scan and the gated
norm. With mamba-ssm alone (causal-conv1d needs a CUDA compiler, mamba-ssm's Triton kernels do not),
torch does the convolution. With neither, our own scan runs: slower, but the same mathematics.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import re
import sys
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor

from fedrun.common.errors import one_line

CHUNK_SIZE = 256  # of mamba-ssm's scan; the default of its Mamba2 module
KernelPath = Literal["split_conv1d_scan", "conv1d_and_chunk_scan", "own"]


def ssd_kernels() -> Any:
    """mamba-ssm's module of Triton kernels. Raises ImportError if it is not installed.

    The package imports the compiled scan of Mamba-1. Mamba-2 does not use it, and it is missing if
    mamba-ssm was installed without nvcc, so an empty module takes its place.
    """
    missing = "selective_scan_cuda"
    if missing not in sys.modules and importlib.util.find_spec(missing) is None:
        sys.modules[missing] = ModuleType(missing)
    return importlib.import_module("mamba_ssm.ops.triton.ssd_combined")


@functools.cache
def _probe() -> tuple[KernelPath, str]:
    """The fastest path for CUDA tensors, and a warning where a package that would make it faster
    cannot be imported, with the error's own words."""
    try:
        ssd_kernels()
    except Exception as error:  # beside a wrong version of another package, of any type
        return "own", (f"GPUs scan sequences by torch alone, which is slower: mamba-ssm cannot be "
                       f"imported ({_words(error)}; see tests/README.md on GPUs)")
    try:
        importlib.import_module("causal_conv1d")
    except Exception as error:
        absent = isinstance(error, ModuleNotFoundError) and error.name == "causal_conv1d"
        return "conv1d_and_chunk_scan", "" if absent else (
            "GPUs convolve by torch, which is slower: causal-conv1d is installed and cannot be "
            f"imported ({_words(error)})")
    return "split_conv1d_scan", ""


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {one_line(error)}"


def on_gpu() -> KernelPath:
    """The fastest path for CUDA tensors in this installation."""
    return _probe()[0]


def import_warning() -> str:
    """Why GPUs do without a package that is faster; empty if they do not, or if it is only not
    installed and optional."""
    return _probe()[1]


def ignores_determinism() -> str:
    """The installed package whose kernels sum gradients in any order, whatever they are asked, with
    the version that it should have; empty if there is none on the path for CUDA tensors."""
    if on_gpu() == "own":
        return ""
    try:
        importlib.import_module("mamba_ssm.utils.determinism")
    except ModuleNotFoundError:
        return "mamba-ssm, which must be 2.3.0 or newer"
    if on_gpu() == "split_conv1d_scan":
        version = str(getattr(importlib.import_module("causal_conv1d"), "__version__", "0"))
        if [int(part) for part in re.findall(r"\d+", version)[:2]] < [1, 6]:
            return f"causal-conv1d {version}, which must be 1.6.0 or newer"
    return ""


def path_for(x: Tensor) -> KernelPath:
    """The code path for a tensor. fp64 always takes our own: the kernels do not support it."""
    return on_gpu() if x.is_cuda and x.dtype != torch.float64 else "own"


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def uses_triton(x: Tensor) -> bool:
    """Whether Triton kernels of our own run for a tensor: where those of mamba-ssm do, because they
    show that Triton works there (it needs a C compiler at run time)."""
    return path_for(x) != "own" and _has_triton()


def current_device(x: Tensor) -> AbstractContextManager[object]:
    """Make a tensor's GPU the current one, on which Triton launches its kernels."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


@functools.cache
def _torch_has_rms_norm() -> bool:
    name = "aten::_fused_rms_norm_backward"
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA"))


def has_rms_norm(x: Tensor) -> bool:
    """Whether torch's RMS norm is one kernel for a tensor and not a dozen: on a GPU."""
    return x.is_cuda and _torch_has_rms_norm()


def split_conv1d_takes(taps: int, channels: int) -> bool:
    """Whether causal-conv1d's kernels can convolve this many channels with this many taps."""
    return 2 <= taps <= 4 and channels % 8 == 0


def kernel_path(device: torch.device | str) -> str:
    """A name for the code that runs on a device. Ranks compare it, as it decides the last bits."""
    device = torch.device(device)
    return f"{device.type}: {on_gpu() if device.type == 'cuda' else 'own'}"
