"""What is here: GPUs, drivers, versions, and how fast the GPU copies and multiplies."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
import torch.cuda.nccl

from fedrun.model.kernels import kernel_path
from fedrun.model.precision import bf16_in_hardware
from tests.gpu.checks import Found, Job, check

PACKAGES = ("torch", "triton", "mamba-ssm", "causal-conv1d", "transformers", "datasets", "numpy")


def milliseconds(work: Callable[[], object], repetitions: int = 20, warm_up: int = 3
                 ) -> list[float]:
    """The GPU's time for each call, sorted."""
    for _ in range(warm_up):
        work()
    spans = []
    for _ in range(repetitions):
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        work()
        ended.record()
        spans.append((began, ended))
    torch.cuda.synchronize()
    return sorted(began.elapsed_time(ended) for began, ended in spans)


def median(values: list[float]) -> float:
    return values[len(values) // 2]


def installed(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def said(*line: str) -> str:
    """What a program prints; empty where there is none."""
    if shutil.which(line[0]) is None:
        return ""
    return subprocess.run(line, capture_output=True, text=True, timeout=30, check=False
                          ).stdout.strip()


@check(90)
def what_is_here(job: Job) -> Found:
    device, bytes_, side = torch.device("cuda"), 2**30, 8192
    if job.pretended:
        bytes_, side = 2**16, 64
    source, target = (torch.zeros(bytes_, dtype=torch.uint8, device=device) for _ in range(2))
    a, b = (torch.randn(side, side, device=device).bfloat16() for _ in range(2))
    copy, product = (median(milliseconds(work)) for work in
                     (lambda: target.copy_(source), lambda: a @ b))
    properties = torch.cuda.get_device_properties(0)
    value: dict[str, Any] = {
        "gpus": said("nvidia-smi", "-L").splitlines(),
        "driver": said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "name": properties.name, "memory GiB": round(properties.total_memory / 2**30, 1),
        **{name: installed(name) for name in PACKAGES},
        "CUDA": torch.version.cuda, "cuDNN": torch.backends.cudnn.version(),
        "NCCL": ".".join(map(str, torch.cuda.nccl.version())),
        "kernels": kernel_path(device), "bf16": bf16_in_hardware(device),
        "copy TB/s": round(2 * bytes_ / copy / 1e9, 2),
        "product TFLOP/s": round(2 * side**3 / product / 1e9, 1)}
    ok = value["bf16"] and (job.pretended or value["kernels"] != "cuda: own")
    return Found(ok, value, "bf16, and mamba-ssm's kernels (an H100: about 3 TB/s, 790 TFLOP/s)")
