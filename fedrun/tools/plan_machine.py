"""Where a planned run will be: processes, memory, and what makers publish of their GPUs. Needs no
torch."""

from __future__ import annotations

import re
from dataclasses import dataclass

from fedrun.common.errors import require

UTILISATION = 0.4  # of the products' published rate: assumed, what good implementations reach
LINK = 50e9  # bytes a second each way between two workers: assumed, a 400 Gbit/s card


@dataclass(frozen=True)
class Rates:
    """Of one GPU."""

    bf16: float
    """FLOP a second of bf16 products, without sparsity."""
    fp32: float
    """The same of fp32, without TF32."""
    memory: float
    """Bytes a second."""
    bytes: float
    """Of its memory."""


# From the data sheets of the SXM modules; a100 is that of 80 GB.
PUBLISHED = {"a100": Rates(312e12, 19.5e12, 2.039e12, 80e9),
             "h100": Rates(989e12, 67e12, 3.35e12, 80e9),
             "h200": Rates(989e12, 67e12, 4.8e12, 141e9)}
UNITS = {"": 1.0, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12,
         "KIB": 2.0**10, "MIB": 2.0**20, "GIB": 2.0**30, "TIB": 2.0**40}
USABLE = 0.9  # of a memory: the rest is for CUDA, NCCL, the system, and gaps between tensors


@dataclass(frozen=True)
class Machine:
    """Where the run will be, which its own flags do not say."""

    processes: int = 1
    """Processes of the run, as given to torchrun in all: the server and the workers."""
    machines: int = 1
    """Machines that the processes are spread over."""
    device_rates: str | None = None
    """Plan for this GPU (a100, h100 or h200) by what its maker publishes, which need not be here.
    none: for this machine, where a short step is measured."""
    device_memory: str | None = None
    """Memory of a GPU, or of a machine without: 80GB. none: what this machine or the GPU of
    --device_rates has."""
    vocab_size: int | None = None
    """Tokens of the tokenizer. none: by its name, its file, or the tokenised text."""

    def __post_init__(self) -> None:
        for name in ("processes", "machines", "vocab_size"):
            value = getattr(self, name)
            require(value is None or 1 <= value <= 2**27, f"--{name}", value, "an integer >= 1")
        require(self.machines <= self.processes, "--machines", self.machines,
                f"at most --processes {self.processes}")
        require(self.device_rates in (None, *PUBLISHED), "--device_rates", self.device_rates,
                f"{', '.join(PUBLISHED)}, or none")
        _ = self.given_bytes

    @property
    def given_bytes(self) -> float | None:
        """Bytes of --device_memory."""
        if self.device_memory is None:
            return None
        found = re.fullmatch(r"([0-9.]+) ?([A-Za-z]*)", self.device_memory)
        try:
            size = float(found[1]) * UNITS[found[2].upper()] if found else 0.0
        except (KeyError, ValueError):
            size = 0.0
        require(size > 0, "--device_memory", self.device_memory, "a size: 80GB or 512GiB")
        return size
