"""NCCL: sums of every type that is sent, and whole runs through it, on one GPU or on several."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from tests.gpu.checks import Found, Job, check, command, digest, fedrun, lone_digest, short
from tests.support.runs import torchrun

ONE_GPU = "tests.gpu.one_gpu"
THE_FIRST = {"CUDA_VISIBLE_DEVICES": "0"}
DTYPES = (torch.int32, torch.int64, torch.float32)


def first_gpu() -> Mapping[str, str]:
    """The variables of processes that shall see one GPU, which this one sees."""
    return {} if os.environ.get("CUDA_VISIBLE_DEVICES") else THE_FIRST


def time_sums(sizes: list[int], repetitions: int) -> list[dict[str, Any]]:
    """All ranks: sums of each size and type, checked; on rank 0 milliseconds of each."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    local = 0 if torch.cuda.device_count() == 1 else rank
    device = torch.device("cuda", local)
    torch.cuda.set_device(device)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    group = dist.new_group(list(range(world)), backend="nccl", timeout=timedelta(seconds=60))
    found = []
    for size in sizes:
        for dtype in DTYPES:
            start = (torch.arange(size, device=device) % 1000).to(dtype)
            times = []
            for _ in range(repetitions):
                vector = start + rank
                torch.cuda.synchronize()
                began = time.perf_counter()
                dist.all_reduce(vector, group=group)
                torch.cuda.synchronize()
                times.append(1e3 * (time.perf_counter() - began))
                assert torch.equal(vector, start * world + sum(range(world))), (size, dtype)
            found.append({"elements": size, "type": str(dtype).removeprefix("torch."),
                          "ms": round(sorted(times)[len(times) // 2], 3)})
    dist.barrier()
    dist.destroy_process_group()
    return found


def main() -> None:
    from tests.gpu.one_gpu import share_the_gpu
    if torch.cuda.device_count() == 1:
        share_the_gpu()
    found = time_sums([int(size) for size in sys.argv[2:]], int(sys.argv[1]))
    if os.environ["RANK"] == "0":
        print(json.dumps(found), flush=True)


def bare_sums(ranks: int, sizes: list[int], repetitions: int, env: Mapping[str, str]
              ) -> list[dict[str, Any]]:
    """`time_sums` in processes of their own."""
    code, output = command([*torchrun(ranks), "-m", "tests.gpu.planes", str(repetitions),
                            *map(str, sizes)], 300, env)
    assert code == 0, output[-3000:]
    found: list[dict[str, Any]] = json.loads(next(
        line for line in output.splitlines() if line.startswith("[{")))
    return found


@check(200)
def nccl_on_one_gpu(job: Job) -> Found:
    """Two and three workers on one GPU, each under a host ID of its own."""
    sizes = [1, 10_000] if job.pretended else [1, 1_000_000, 27_450_000]
    sums = bare_sums(2, sizes, 3, first_gpu())
    hashes = {"one process": lone_digest(job)}
    layouts = [(3, "dedicated"), (2, "colocated"), (4, "dedicated")]
    for processes, server in layouts[:2 if job.pretended else None]:
        name = f"{processes} processes, {server} server"
        hashes[name] = digest(fedrun(job, "fed_avg", f"{server}_{processes}", processes,
                                     module=ONE_GPU, env=first_gpu(), server=server))
    return Found(len(set(hashes.values())) == 1,
                 {"hashes": short(hashes), "sums": sums},
                 "one hash; the sums were checked")


if __name__ == "__main__":
    main()
