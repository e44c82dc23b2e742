"""fedrun, with all that a rank sends appended to a file of the folder RECORD, and what it puts
into the store: as bytes, in the order in which they are sent."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from fedrun.__main__ import main
from fedrun.distributed.control_plane import Heartbeat

FILE = Path(os.environ["RECORD"]) / f"rank{os.environ['RANK']}"


def record(content: bytes) -> None:
    with FILE.open("ab") as file:
        file.write(content)


def recorded(call: Callable[..., Any], sends: Callable[[tuple[Any, ...], dict[str, Any]], bool]
             ) -> Callable[..., Any]:
    def instead(vector: Tensor, *args: Any, **named: Any) -> Any:
        if sends(args, named):
            record(vector.detach().cpu().contiguous().numpy().tobytes())
        return call(vector, *args, **named)
    return instead


def is_source(args: tuple[Any, ...], named: dict[str, Any]) -> bool:
    """Whether this rank is the one whose vector a broadcast sends."""
    source = args[0] if args else named.get("src")
    if source is None:
        return bool(dist.get_rank(named["group"]) == named["group_src"])
    return bool(dist.get_rank() == source)


for name in ("send", "isend", "all_reduce"):
    setattr(dist, name, recorded(getattr(dist, name), lambda args, named: True))
dist.broadcast = recorded(dist.broadcast, is_source)
report_failure = Heartbeat.report_failure


def reported(self: Heartbeat, reason: str) -> None:
    record(reason.encode())
    report_failure(self, reason)


Heartbeat.report_failure = reported  # type: ignore[method-assign]

if __name__ == "__main__":
    main()
