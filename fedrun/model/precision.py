"""Which devices multiply bf16 in hardware: what `--dtype auto` decides by."""

from __future__ import annotations

import torch


def bf16_in_hardware(device: torch.device | str) -> bool:
    """Whether bf16 matrix products run in hardware there: a capability, never a timing.

    CUDA: compute capability 8.0 or above. CPU: AMX or AVX-512 instructions for bf16; without them
    bf16 is emulated and many times slower than fp32.
    """
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    capabilities = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    return any(capabilities.get(name, False) for name in ("amx_bf16", "avx512_bf16", "bf16"))
