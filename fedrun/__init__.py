"""fedrun: federated training of Mamba-2 language models on torch.distributed."""

from __future__ import annotations

import importlib as _importlib
import typing as _typing

if _typing.TYPE_CHECKING:
    from fedrun.common.errors import Diverged as Diverged
    from fedrun.common.errors import FedrunError as FedrunError
    from fedrun.common.errors import InputError as InputError
    from fedrun.library.opened_run import Run as Run
    from fedrun.library.opened_run import open_run as open_run
    from fedrun.library.training import train as train
    from fedrun.records.recorder import RoundRecord as RoundRecord
    from fedrun.strategies.base import Strategy as Strategy
    from fedrun.strategies.fed_avg import FedAvg as FedAvg
    from fedrun.strategies.plugins import strategy as strategy

__version__ = "0.1.0"
__all__ = ["Diverged", "FedAvg", "FedrunError", "InputError", "RoundRecord", "Run", "Strategy",
           "open_run", "strategy", "train"]

# Imported when they are first used: `import fedrun` is fast, and loads no torch.
_LOCATIONS = {"train": "fedrun.library.training",
              "Run": "fedrun.library.opened_run", "open_run": "fedrun.library.opened_run",
              "RoundRecord": "fedrun.records.recorder",
              "Diverged": "fedrun.common.errors", "FedrunError": "fedrun.common.errors",
              "InputError": "fedrun.common.errors",
              "Strategy": "fedrun.strategies.base",
              "FedAvg": "fedrun.strategies.fed_avg",
              "strategy": "fedrun.strategies.plugins"}


def __getattr__(name: str) -> _typing.Any:
    if name not in _LOCATIONS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(_importlib.import_module(_LOCATIONS[name]), name)


def __dir__() -> list[str]:
    return sorted([*__all__, *(name for name in globals() if name.startswith("__"))])
