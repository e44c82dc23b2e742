"""Three processes on one GPU, and what happens when one is killed, stopped or meets an error."""

from __future__ import annotations

import time
from typing import Any

from tests.gpu.checks import Found, Job, check, digest, fedrun, finished, lone_digest, short
from tests.gpu.planes import ONE_GPU, first_gpu
from tests.support.runs import fault

TIMEOUT = 60  # in seconds, of the run with a stopped rank; kernels are compiled within it
STOPPED = TIMEOUT + 45  # until all have ended: torchrun alone waits 30 s for a process that stands
STRIKES = {  # the kind, where, and the rank: the first worker is rank 1
    "killed before a sum": ("kill", "reduce:2", 1),
    "a bad index on the first worker": ("index", "3", 1),
    "killed in training": ("kill", "train:3", 2),
    "stopped in training": ("stop", "train:3", 2),
    "a bad index on the second worker": ("index", "3", 2)}


def strike(job: Job, name: str, kind: str, at: str, rank: int) -> dict[str, Any]:
    """How a run ends in which a rank is struck; its seconds from then on."""
    folder = job.folder / "struck" / name.replace(" ", "_")
    folder.mkdir(parents=True)
    env = fault(folder, kind, at, rank)
    if kind == "index":
        del env["FAULT"]
        env["BAD_INDEX"] = f"{rank}:{at}"
    run = fedrun(job, "fed_avg", folder.name, 3, module=ONE_GPU, limit=300,
                 timeout=TIMEOUT if kind == "stop" else 600, env={**first_gpu(), **env})
    seconds = time.time() - (folder / "struck").stat().st_mtime
    most = STOPPED if kind == "stop" else 15
    tracebacks = run.output.count("Traceback (most recent call last)")
    # The launcher and torchrun mention all ranks, and a message may begin with a traceback.
    named = any(f"rank {rank}" in line for line in run.output.splitlines()
                if line.startswith("fedrun: error:"))
    lines = [line for line in run.output.splitlines() if line.strip()]
    return {"ok": run.code != 0 and named and tracebacks <= 1 and (seconds < most or job.pretended),
            "code": run.code, "seconds": round(seconds, 1), "rank named": named,
            "tracebacks": tracebacks, "last lines": lines[-3:]}


@check(400)
def failures(job: Job) -> Found:
    """All ranks end soon, the lost one is named, and there is at most one traceback."""
    chosen = list(STRIKES.items())[:2 if job.pretended else None]
    value = {name: strike(job, name, *how) for name, how in chosen}
    return Found(all(found["ok"] for found in value.values()), value,
                 f"15 s at most, {STOPPED} s where stopped; the rank named; one traceback")


@check(250)
def stopped_and_resumed(job: Job) -> Found:
    """SIGTERM in the middle of a run, which then resumes to the bits of one undisturbed."""
    stopped = finished(fedrun(job, "fed_avg", "run", 3, module=ONE_GPU,
                              env={**first_gpu(), **fault(job.folder, "term", "record:2")}))
    said = "stopped by SIGTERM" in stopped.output
    resumed = digest(fedrun(job, "fed_avg", "run", 3, module=ONE_GPU, env=first_gpu()))
    return Found(said and resumed == lone_digest(job),
                 short({"whole": lone_digest(job), "resumed": resumed})
                 | {"said to be stopped": said}, "one hash")
