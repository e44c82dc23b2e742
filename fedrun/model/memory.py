"""Whether a model can fit into this machine at all, before anything of it is made."""

from __future__ import annotations

from pathlib import Path

import psutil

from fedrun.common.errors import InputError
from fedrun.model.config import ModelConfig

TO_LOAD = 4  # bytes a parameter: float32
TO_TRAIN = 16  # and its gradient, and AdamW's two moments


def require_memory(config: ModelConfig, rows: int, each: int, where: str) -> None:
    """ValueError, beginning with `where`, for a model that takes more than the machine has with
    `each` bytes a parameter; rows: of its embedding."""
    count = config.parameters(rows)
    have = machine_memory()
    if count * each > have:
        raise InputError(f"{where}: a model of {count:,} parameters takes at least "
                         f"{count * each / 1e9:,.1f} GB, and this machine has {have / 1e9:,.1f} GB")


def machine_memory() -> int:
    """Bytes of memory and swap that this process may use at most."""
    have = int(psutil.virtual_memory().total) + int(psutil.swap_memory().total)
    try:
        return min(have, int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii")))
    except (OSError, ValueError):  # no control groups, or "max"
        return have
