"""Precision of matrix products: which devices multiply bf16 in hardware, which `--dtype auto`
chooses on these, fp32 without TF32, deterministic kernels, and bf16 products without memory."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from fedrun.common.errors import InputError
from fedrun.model.kernels import ignores_determinism


def bf16_in_hardware(device: torch.device | str) -> bool:
    """Whether the device runs bf16 matrix products in hardware.

    Decided by capability, never by a timing, so that the answer does not vary. CUDA: compute
    capability 8.0 or above. CPU: AMX or AVX-512 instructions for bf16; without them bf16 is
    emulated and many times slower than fp32.
    """
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    capabilities = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    return any(capabilities.get(name, False) for name in ("amx_bf16", "avx512_bf16", "bf16"))


def exact_fp32() -> None:
    """Let fp32 be fp32 on GPUs too, which otherwise round operands to TF32's 11 bits: Triton's
    `tl.dot` and cuDNN's convolutions by default, cuBLAS where an environment asks for it
    (TORCH_ALLOW_TF32_CUBLAS_OVERRIDE, in NVIDIA's containers). Call before kernels are compiled."""
    os.environ["TRITON_F32_DEFAULT"] = "ieee"
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False


def accumulate_in_fp32() -> None:
    """Let no matrix product on a GPU add up its parts in bf16, as cuBLAS may where it splits long
    sums; the head's second product sums over the vocabulary."""
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False


def make_deterministic(official_kernels: bool) -> None:
    """Deterministic kernels of torch, cuBLAS, mamba-ssm and causal-conv1d; call before the first of
    them is imported.

    official_kernels: whether workers take the last two where they are installed: on GPUs, but in
    fp64. InputError if they have no deterministic mode.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ |= {"MAMBA_DETERMINISTIC": "1", "CAUSAL_CONV1D_DETERMINISTIC": "1"}
    # Under these mamba-ssm chooses the kernels' blocks by a timing, or otherwise than other ranks.
    for name in [*os.environ]:
        if name == "TRITON_CACHE_AUTOTUNING" or name.startswith("TRITON_AUTOTUNE_BLOCK_SIZE_"):
            del os.environ[name]
    torch.use_deterministic_algorithms(True)
    # Nothing here reads memory before it is written; filling it first would cost a pass over it.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    if official_kernels and (package := ignores_determinism()):
        raise InputError("--deterministic: the results would differ from run to run with the "
                         f"installed {package} (pip install --upgrade); without the package, "
                         "torch does its part")


def bf16_products(tensor: Tensor, enabled: bool) -> AbstractContextManager[object]:
    """In its block products of fp32 tensors on this one's device are of bf16, or are not where they
    were before."""
    if tensor.is_meta:
        return _Bf16OnMeta(enabled)
    return torch.autocast(tensor.device.type, torch.bfloat16, enabled=enabled)


_PRODUCTS = {F.linear, F.conv1d, torch.conv1d, torch.einsum, torch.matmul, torch.mm, torch.bmm,
             torch.mv, torch.addmm, torch.addbmm, torch.baddbmm, Tensor.matmul, Tensor.__matmul__,
             Tensor.mm, Tensor.bmm, Tensor.mv, Tensor.addmm, Tensor.addbmm, Tensor.baddbmm}
_WIDE_ON_GPUS = {F.softmax, F.log_softmax, F.layer_norm, F.softplus, torch.softmax, Tensor.softmax}


class _Bf16OnMeta(TorchFunctionMode):
    """torch.autocast, which does not know the meta device: the types, and so the sizes, of what
    products take and give. For tensors that say they are on a GPU, softmax and norms of bf16 are
    computed in fp32, as autocast does there."""

    _entered: ClassVar[list[bool]] = []  # the innermost block decides

    def __init__(self, enabled: bool) -> None:
        super().__init__()
        self._enabled = enabled

    def __enter__(self) -> Self:
        self._entered.append(self._enabled)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._entered.pop()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._entered[-1] and func in _PRODUCTS:
            args, kwargs = tree_map(_as(torch.float32, torch.bfloat16), (args, kwargs))
        elif self._entered[-1] and func in _WIDE_ON_GPUS and any(
                isinstance(leaf, Tensor) and leaf.is_cuda for leaf in tree_leaves(args)):
            args, kwargs = tree_map(_as(torch.bfloat16, torch.float32), (args, kwargs))
        return func(*args, **kwargs)


def _as(old: torch.dtype, new: torch.dtype) -> Callable[[Any], Any]:
    return lambda value: value.to(new) if isinstance(value, Tensor) and value.dtype == old \
        else value
