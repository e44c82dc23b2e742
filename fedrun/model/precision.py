"""Precision of matrix products: which devices multiply bf16 in hardware, which `--dtype auto`
chooses on these, and fp32 without TF32."""

from __future__ import annotations

import os

import torch


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
