"""Runs the sides of a comparison in separate processes that take turns; describes the machine."""

from __future__ import annotations

import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
Commands = Mapping[str, Callable[[], Any]]


class Side:
    """A process that runs one side of a comparison and answers each command with a line of JSON.

    Sides take turns, so that a change in the machine's speed affects both. Each has its own
    process, so that its peak memory can be measured.
    """

    def __init__(self, module: str, *arguments: str, threads: int) -> None:
        cpus = sorted(os.sched_getaffinity(0))[:threads]
        self.process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments], cwd=ROOT, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            env=os.environ | {"OMP_NUM_THREADS": str(threads)},
            preexec_fn=lambda: os.sched_setaffinity(0, cpus))

    def ask(self, command: str) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.process.args!r} ended")
        return json.loads(line)

    def close(self) -> None:
        self.process.communicate()


def answer(commands: Commands) -> None:
    """In the side's process: answer commands until standard input is closed."""
    for line in sys.stdin:
        print(json.dumps(commands[line.strip()]()), flush=True)


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def median_seconds(work: Callable[[], object], repetitions: int = 7) -> float:
    """Median time of `repetitions` calls, after one to warm up."""
    work()
    return statistics.median(seconds(work) for _ in range(repetitions))


def spread(samples: list[float]) -> float:
    """Interquartile range divided by the median."""
    low, middle, high = statistics.quantiles(samples, n=4)
    return (high - low) / middle


def resident_mib() -> float:
    """Resident memory of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def peak_mib() -> float:
    """Peak resident memory of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def machine() -> str:
    """Processor, cores and torch version, for the head of a table."""
    import torch

    cpu = platform.processor()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            cpu = line.split(":")[1].strip()
            break
    features = [name for name in ("amx_bf16", "avx512_bf16")
                if torch.cpu.get_capabilities().get(name)]
    return (f"{cpu}, {len(os.sched_getaffinity(0))} cores{', ' if features else ''}"
            f"{', '.join(features)}; torch {torch.__version__}")
