"""What a rank computes on: its device, and the kernels and libraries that decide the last bits."""

from __future__ import annotations

import platform
import re
import socket
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from fedrun.model.kernels import kernel_path
from fedrun.model.precision import bf16_in_hardware

_PACKAGES = ("mamba-ssm", "causal-conv1d", "triton")  # whose kernels run on GPUs
_NONE = "none"
CPUS = Path("/proc/cpuinfo")


@dataclass(frozen=True)
class Hardware:
    """One rank's device and the code that runs on it; sent to the other ranks as JSON."""

    host: str
    device: str
    """As torch names it: cpu, cuda:0."""
    name: str
    """The model of the GPU, or the kind of CPU."""
    kernels: str
    """See `kernel_path`."""
    bf16: bool
    """Whether it multiplies bf16 in hardware."""
    gpu: str = ""
    """The GPU's model and compute capability; empty for a CPU."""
    versions: dict[str, str] = field(default_factory=dict)
    """Versions of what runs on GPUs alone; empty for a CPU."""


def hardware(device: torch.device) -> Hardware:
    """The hardware of this rank, which computes on `device`."""
    host, kernels = socket.gethostname(), kernel_path(device)
    bf16 = bf16_in_hardware(device)
    if device.type != "cuda":
        return Hardware(host, str(device), platform.processor() or platform.machine(), kernels,
                        bf16)
    name = torch.cuda.get_device_name(device)
    major, minor = torch.cuda.get_device_capability(device)
    return Hardware(host, str(device), name, kernels, bf16,
                    f"{name} (compute capability {major}.{minor})", gpu_versions())


def processor_name() -> str:
    """The model of this machine's processor."""
    with suppress(OSError):
        text = CPUS.read_text(encoding="utf-8", errors="replace")
        if found := re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE):
            return found[1]
    return platform.processor() or platform.machine()


def gpu_versions() -> dict[str, str]:
    """Versions of the libraries that compute and communicate on GPUs; "none" for what is missing.
    """
    found = {}
    for package in _PACKAGES:
        found[package] = _NONE
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    nccl = _NONE
    with suppress(AttributeError):  # a build of torch without it
        nccl = ".".join(map(str, torch.cuda.nccl.version()))
    return found | {"CUDA": str(torch.version.cuda or _NONE),
                    "cuDNN": str(torch.backends.cudnn.version() or _NONE), "NCCL": nccl}


def together(values: Iterable[str]) -> str:
    """Values of several workers as one text: each different value once."""
    return " / ".join(sorted(set(values)))

