"""`fedrun` as if its workers computed on GPUs, which are CPUs; with a fault if FAULT is set.

Ranks report a GPU: GPU_1=MODEL for rank 1, else an H100, and `none` for a rank without one. Sums
are polled as those of NCCL are, and kernels are "compiled" in turn.
"""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import torch

from fedrun import __main__, run
from fedrun.distributed import runtime
from fedrun.model.hardware import Hardware, hardware

VERSIONS = {"mamba-ssm": "2.3.2", "causal-conv1d": "none", "triton": "3.6", "CUDA": "13.0",
            "cuDNN": "91002", "NCCL": "2.28.9"}


def as_if_gpu(device: torch.device) -> Hardware:
    rank, found = os.environ.get("RANK", "0"), hardware(device)
    model = os.environ.get(f"GPU_{rank}", "H100")
    return found if model == "none" else dataclasses.replace(
        found, device=f"cuda:{rank}", name=model, kernels="cuda: conv1d_and_chunk_scan",
        gpu=f"{model} (compute capability 9.0)", versions=VERSIONS)


patched: Any = run
patched.hardware = as_if_gpu
patched = runtime
patched.machine_id = lambda: None

if __name__ == "__main__":
    if "FAULT" in os.environ:
        from tests.support import faulty_fedrun  # noqa: F401
    __main__.main()
