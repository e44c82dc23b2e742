"""Whether a model can fit into this machine's memory, checked before it is built."""

from __future__ import annotations

from fedrun.common.errors import InputError
from fedrun.common.limits import machine_memory

BYTES_TO_LOAD = 4  # per parameter: float32


def bytes_to_train(moments_dtype: str, local_optimizer: str) -> int:
    """Bytes per parameter at least: with its gradient and AdamW's two moments, or Muon's one."""
    return 12 if local_optimizer == "muon" else {"fp32": 16, "bf16": 14}[moments_dtype]


def require_memory(count: int, bytes_per_parameter: int, where: str) -> None:
    """Raise InputError if a model of `count` parameters needs more memory than this machine has.

    where: the flag or folder that the message starts with.
    """
    needed, have = count * bytes_per_parameter, machine_memory()
    if needed > have:
        raise InputError(f"{where}: a model of {count:,} parameters needs at least "
                         f"{needed / 1e9:,.1f} GB, and this machine has {have / 1e9:,.1f} GB")
