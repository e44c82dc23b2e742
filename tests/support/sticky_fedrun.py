"""`fedrun` with an error in a CUDA call of one worker, which every later call returns too.

STICKY_RANK   whose call fails, in local training of round 3
SILENT_RANK   who never answers once the run ends because of it; empty: all do

Every worker is a machine of its own, as GPUs are, so that each has a replica of the global model.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

from fedrun import __main__
from fedrun.distributed import runtime
from fedrun.distributed.control_plane import ControlPlane
from fedrun.federation import early_end, replicas
from fedrun.federation.worker import Worker

RANK = os.environ.get("RANK", "0")
broken = False


def call_cuda() -> None:
    if broken:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")


def calling_cuda(healthy: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **how: Any) -> Any:
        call_cuda()
        return healthy(*args, **how)
    return call


def train(worker: Worker, plan: Any) -> Any:
    global broken
    broken = plan.round == 3 and os.environ["STICKY_RANK"] == RANK
    call_cuda()
    return healthy_train(worker, plan)


def check_replicas(worker: Worker | None) -> Any:
    """The one at the end of a run that fails."""
    if os.environ.get("SILENT_RANK") == RANK:
        time.sleep(100)
    return healthy_check(worker)


patched: Any = Worker
healthy_train, patched.train = Worker.train, train
patched = replicas
patched.digest = calling_cuda(replicas.digest)
patched = ControlPlane
patched.copy_to_server = calling_cuda(ControlPlane.copy_to_server)
patched = early_end
healthy_check, patched.check_replicas = early_end.check_replicas, check_replicas
patched.MODEL_SECONDS = 2.0 if os.environ.get("SILENT_RANK") else early_end.MODEL_SECONDS
patched = runtime
patched.machine_id = lambda: 0

if __name__ == "__main__":
    __main__.main()
