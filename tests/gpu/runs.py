"""Whole runs on one GPU: their bits, every method, evaluation, what a run's folder says."""

from __future__ import annotations

import json
import sys
from typing import Any

from tests.gpu.checks import (
    DETERMINISTIC,
    LARGE,
    Found,
    Job,
    check,
    command,
    digest,
    fedrun,
    finished,
    flags,
    lone_digest,
    short,
)
from tests.support.every_method import METHODS
from tests.support.every_store import RUNS
from tests.support.runs import FAULTY, Outcome, fault, read_history, read_json


def losses(run: Outcome) -> list[float]:
    return [float(record["server_val_loss"]) for record in run.history]


@check(240)
def same_bits(job: Job) -> Found:
    """Lone deterministic runs: twice, with states on disk, killed and resumed; against a CPU."""
    first = finished(fedrun(job, "fed_avg", "first"))
    hashes = {"first": digest(first), "again": lone_digest(job),
              "disk": digest(fedrun(job, "fed_avg", "disk", client_store="disk"))}
    killed = fedrun(job, "fed_avg", "killed", module=FAULTY,
                    env=fault(job.folder, "kill", "train:5"))
    assert killed.code != 0
    hashes["resumed"] = digest(fedrun(job, "fed_avg", "killed"))
    cpu = finished(fedrun(job, "fed_avg", "cpu", device="cpu", dtype="fp32"))
    ours, theirs = losses(first)[-1], losses(cpu)[-1]
    close = abs(ours - theirs) < 2e-3 * theirs
    return Found(len(set(hashes.values())) == 1 and close,
                 {"hashes": short(hashes), "loss": ours,
                  "loss on the CPU": theirs}, "one hash; losses within 0.2 %")


@check(150)
def every_method(job: Job) -> Found:
    """All methods and all kinds of clients' states: two rounds each, in one process each."""
    shared = flags(job, num_clients=3, rounds=2, checkpoint_freq="none")
    at = shared.index("--data_dir")
    del shared[at:at + 2]
    ended = {}
    for module, names in (("every_method", METHODS), ("every_store", RUNS)):
        code, output = command([sys.executable, "-m", f"tests.support.{module}",
                                str(job.folder / module), *shared], 600)
        assert code == 0, output[-3000:]
        for name in names:
            history = read_history(job.folder / module / name)
            ended[f"{module.removeprefix('every_')}: {name}"] = round(
                history[-1]["server_val_loss"], 4)
    return Found(True, ended, "all end; their last losses on the validation split")


@check(300)
def without_deterministic(job: Job) -> Found:
    """Whether two runs without --deterministic have the same bits: reported, not required."""
    one, two = (digest(fedrun(job, "fed_avg", f"free{n}", deterministic=False)) for n in (1, 2))
    return Found(True, "same bits" if one == two else "other bits", "both end")


@check(90, env=DETERMINISTIC)  # of `fedrun evaluate`, which has no such flag
def evaluation(job: Job) -> Found:
    """`fedrun evaluate` on the GPU gives the run's last loss; the folder names GPU and kernels."""
    run = finished(fedrun(job, "fed_avg", "run"))
    dtype = run.config["dtype"]
    code, output = command([sys.executable, "-m", "fedrun", "evaluate", str(run.run_dir),
                            "--device", "cuda", "--dtype", str(dtype), "--cache_dir",
                            str(job.folder.parent / "cache")], 300)
    assert code == 0, output[-3000:]
    loss = json.loads(output[output.index("{\n"):output.rindex("}") + 1])["loss"]
    machine: dict[str, Any] = read_json(run.run_dir / "environment.json")
    value = {"evaluated": loss, "in the run": losses(run)[-1], "dtype": dtype,
             **{name: machine[name] for name in ("device", "device_name", "kernels")}}
    return Found(abs(loss - value["in the run"]) < 1e-5 and machine["device"].startswith("cuda")
                 and machine["kernels"].startswith("cuda"), value,
                 "within 1e-5; a device and kernels of cuda")


@check(300)
def pace_with_evaluation(job: Job) -> Found:
    """Rounds a second of a model of 10 M, with an evaluation every tenth round and without; the
    evaluations themselves do not count, but what they leave to be written does."""
    rounds = 12 if job.pretended else 60
    model = {} if job.pretended else LARGE
    rates: dict[str, float] = {}
    slow = False
    for name, every in (("with", 10), ("without", 10 * rounds)):
        run = finished(fedrun(job, "fed_avg", name, rounds=rounds, val_freq=every, num_clients=1,
                              checkpoint_freq="none", deterministic=False, **model))
        said = [e for e in run.events if e["event"] == "round"]
        first, last = said[len(said) // 6], said[-2]  # kernels are compiled; the end is evaluated
        began, ended = (e["seconds"] - e["evaluation_seconds"] for e in (first, last))
        rates[name] = round((last["round"] - first["round"]) / max(ended - began, 1e-9), 2)
        slow |= "more slowly" in run.output
    ok = job.pretended or (rates["with"] > 0.9 * rates["without"] and not slow)
    return Found(ok, {"rounds a second": rates, "said to be written more slowly": slow},
                 "within 10 %; not said")
