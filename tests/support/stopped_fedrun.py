"""fedrun whose rank STOPPED_RANK is stopped when it calls STOPPED_AT, a function in runtime.py."""

from __future__ import annotations

import os
import signal
from datetime import timedelta
from typing import Any

import torch.distributed

from fedrun import __main__, cli
from fedrun.distributed import connect, runtime


def stopped(owner: Any, name: str) -> None:
    called = getattr(owner, name)

    def stop_first(*args: Any, **kwargs: Any) -> Any:
        os.kill(os.getpid(), signal.SIGSTOP)
        return called(*args, **kwargs)

    setattr(owner, name, stop_first)


if __name__ == "__main__":
    connect.SECONDS_OF_SILENCE = 1.0
    cli.SECONDS_FOR_RANK_0 = 2.0
    runtime.SHORTEST_STARTUP = timedelta(seconds=4)
    if os.environ["RANK"] == os.environ["STOPPED_RANK"]:
        at = os.environ["STOPPED_AT"]
        stopped(runtime if hasattr(runtime, at) else torch.distributed, at)
    __main__.main()
