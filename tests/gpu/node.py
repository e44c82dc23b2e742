"""What needs several GPUs in one machine."""

from __future__ import annotations

from typing import Any

from tests.gpu.checks import LARGE, Found, Job, check, digest, fedrun, finished, lone_digest, short
from tests.gpu.planes import bare_sums


@check(400, gpus=2)
def layouts(job: Job) -> Found:
    """One hash with 1, 2, 4, ... workers and a server, and with a colocated server on all GPUs."""
    hashes = {"alone": lone_digest(job)}
    workers = 2
    while workers <= job.gpus:
        hashes[f"server and {workers}"] = digest(
            fedrun(job, "fed_avg", f"workers_{workers}", workers + 1))
        workers *= 2
    hashes["colocated"] = digest(
        fedrun(job, "fed_avg", "colocated", job.gpus, server="colocated"))
    return Found(len(set(hashes.values())) == 1, short(hashes),
                 "one hash")


@check(150, gpus=2)
def sums_between_gpus(job: Job) -> Found:
    """All-reduce by NCCL, as bus bandwidth: 2 (n - 1) / n of the bytes in the time."""
    sizes = [1000] if job.pretended else [27_450_000, 1_300_000_000]
    found = bare_sums(job.gpus, sizes, 5, {})
    for row in found:
        width = 8 if row["type"] == "int64" else 4
        row["GB/s"] = round(2 * (job.gpus - 1) / job.gpus * width * row["elements"] / row["ms"]
                            / 1e6, 1)
    return Found(True, found, "right sums (NVLink 4, eight GPUs: 350 to 450 GB/s at 5 GB)")


@check(120, gpus=2)
def chosen_gpus(job: Job) -> Found:
    """A server and two workers on the last and the first GPU, by CUDA_VISIBLE_DEVICES; and one
    worker too many, which is refused with the command that fits."""
    alone = lone_digest(job)
    two = digest(fedrun(job, "fed_avg", "two", 3,
                        env={"CUDA_VISIBLE_DEVICES": f"{job.gpus - 1},0"}))
    many = fedrun(job, "fed_avg", "many", 4, env={"CUDA_VISIBLE_DEVICES": "0,1"})
    line = next((line for line in many.output.splitlines() if "--nproc-per-node" in line), "")
    return Found(alone == two and many.code == 2 and "--nproc-per-node 3" in line,
                 short({"alone": alone, "two": two}) | {"one too many": line},
                 "one hash; the error names --nproc-per-node 3")


@check(300, gpus=2, not_pretended="devices share the machine's cores")
def efficiency(job: Job) -> Found:
    """Tokens a second of 8 local updates of a model of 10 M, a client for each worker, against
    one worker's."""
    rates: dict[str, Any] = {}
    for workers in (1, job.gpus):
        run = finished(fedrun(job, "fed_avg", f"workers_{workers}", workers + 1,
                              num_clients=workers, rounds=30, local_updates=8, val_freq=1000,
                              checkpoint_freq="none", sequence_length=256, deterministic=False,
                              **LARGE))
        said = [e for e in run.events if e["event"] == "round"]
        first, last = said[len(said) // 3], said[-2]
        rates[str(workers)] = ((last["tokens"] - first["tokens"])
                               / (last["seconds"] - first["seconds"]))
    share = rates[str(job.gpus)] / (job.gpus * rates["1"])
    return Found(share > 0.9, {"tokens a second": rates, "efficiency": round(share, 3)}, "> 0.9")
