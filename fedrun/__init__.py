"""fedrun: federated training of Mamba-2 language models on torch.distributed."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedrun.library.opened_run import Run as Run
    from fedrun.library.opened_run import open_run as open_run
    from fedrun.library.training import train as train
    from fedrun.strategies.base import Strategy as Strategy
    from fedrun.strategies.fed_avg import FedAvg as FedAvg
    from fedrun.strategies.plugins import strategy as strategy

__version__ = "0.1.0"

# Imported when they are first used: `import fedrun` is fast, and loads no torch.
_LOCATIONS = {"train": "fedrun.library.training",
              "Run": "fedrun.library.opened_run", "open_run": "fedrun.library.opened_run",
              "Strategy": "fedrun.strategies.base",
              "FedAvg": "fedrun.strategies.fed_avg",
              "strategy": "fedrun.strategies.plugins"}


def __getattr__(name: str) -> Any:
    if name not in _LOCATIONS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_LOCATIONS[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_LOCATIONS})
