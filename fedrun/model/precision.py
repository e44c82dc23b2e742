"""Which devices multiply bf16 in hardware; `--dtype auto` chooses bf16 on these."""

from __future__ import annotations

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


def accumulate_in_fp32() -> None:
    """Let no matrix product on a GPU add up its parts in bf16, as cuBLAS may where it splits long
    sums; the head's second product sums over the vocabulary."""
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
