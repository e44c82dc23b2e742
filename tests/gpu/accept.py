"""The acceptance suite for GPUs: one process a check, a time limit each, all results in one file.

    python -m tests.gpu.accept FOLDER --quick            # ten minutes at most, on one GPU
    python -m tests.gpu.accept FOLDER --gpus 8           # a node: the same and what needs several

A check that fails, hangs or breaks the GPU's context does not stop the next. Each prints one JSON
line: its name, whether it holds, what was found, what was expected, its seconds; a table comes
last. All of it is in FOLDER/gpu.json. Exit code 1 if a check failed; without a GPU 0, and nothing
is done. With mamba-ssm beside it (tests/README.md says how), all of `fedrun`'s paths are checked.

Not run on a GPU yet: tests/gpu/test_accept.py runs it on pretended GPUs (tests/pretended_cuda/).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import torch

from fedrun.model.precision import accumulate_in_fp32
from tests.gpu import failures, hardware, node, numerics, planes, runs, speed
from tests.gpu.checks import CHECKS, SLOWNESS, Check, Found, Job, end, lone_digest_file
from tests.support.runs import ROOT

# In the order of their worth: a suite that ends early still tells most.
TOPICS = [topic.__name__ for topic in (hardware, numerics, speed, runs, planes, failures, node)]
LAST = ("kernels_by_default",)  # under --quick: fedrun never computes that way
QUICK_SECONDS = 570.0
PROGRAM = (sys.executable, "-m", "tests.gpu.accept")
LINES = 30  # of the output of a check that failed


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="for gpu.json and what the checks write")
    parser.add_argument("--quick", action="store_true",
                        help="stop after ten minutes; checks that are left are skipped")
    parser.add_argument("--gpus", type=int, default=1, help="how many to use (default: 1)")
    names = in_order()
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="CHECK",
                        help=f"of {', '.join(names)}")
    parser.add_argument("--inside", choices=CHECKS, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if there == 0:
        print("no GPU")
        return 0
    if arguments.gpus > there:
        parser.error(f"--gpus {arguments.gpus}: this machine has {there}")
    folder = arguments.folder.absolute()
    pretended = torch.cuda.get_device_name(0).startswith("pretended")
    if arguments.inside:
        run_inside(CHECKS[arguments.inside],
                   Job(folder / arguments.inside, arguments.gpus, pretended))
        return 0
    folder.mkdir(parents=True, exist_ok=True)
    lone_digest_file(folder).unlink(missing_ok=True)
    return run_all(folder, arguments, pretended)


def in_order() -> list[str]:
    """All checks, topic by topic."""
    modules = {name: check.work.__module__ for name, check in CHECKS.items()}
    return sorted(CHECKS, key=lambda name: TOPICS.index(modules[name])
                  if modules[name] in TOPICS else len(TOPICS))


def run_all(folder: Path, arguments: argparse.Namespace, pretended: bool) -> int:
    """Every check that was asked for. Returns the exit code."""
    began, results = time.monotonic(), list[dict[str, Any]]()
    names = sorted(arguments.only, key=LAST.__contains__) if arguments.quick else arguments.only
    for name in names:
        check, left = CHECKS[name], QUICK_SECONDS - (time.monotonic() - began)
        if pretended and check.not_pretended:
            result = skipped(f"on pretended GPUs: {check.not_pretended}")
        elif arguments.gpus < check.gpus:
            result = skipped(f"needs --gpus {check.gpus}")
        elif arguments.quick and left < 10:
            result = skipped("--quick: ten minutes are over")
        else:
            limit = check.limit * (SLOWNESS if pretended else 1)
            limit = min(limit, left) if arguments.quick else limit
            result = run_one(check, folder, arguments.gpus, limit)
        results.append({"name": name} | result)
        print(json.dumps(results[-1]), flush=True)
        failed = [r["name"] for r in results if r["ok"] is False]
        (folder / "gpu.json").write_text(json.dumps(
            {"gpu": torch.cuda.get_device_name(0), "gpus": arguments.gpus,
             "quick": arguments.quick, "seconds": round(time.monotonic() - began, 1),
             "failed": failed, "checks": results}, indent=1) + "\n", encoding="utf-8")
    print(table(results))
    print(f"{len(failed)} of {len(results)} checks failed; all of it: {folder / 'gpu.json'}")
    return int(bool(failed))


def skipped(why: str) -> dict[str, Any]:
    return {"ok": None, "value": f"skipped: {why}", "expected": None, "seconds": 0.0}


def run_one(check: Check, folder: Path, gpus: int, limit: float) -> dict[str, Any]:
    """A check in a process of its own, which is ended with all it started past the limit."""
    mine = folder / check.name
    shutil.rmtree(mine, ignore_errors=True)  # runs of another time, which would count as finished
    mine.mkdir()
    answer, log = mine / "found.json", mine / "output.txt"
    began, late = time.monotonic(), False
    with log.open("wb") as out:
        process = subprocess.Popen(
            [*PROGRAM, str(folder), "--inside", check.name,
             "--gpus", str(gpus)], stdout=out, stderr=subprocess.STDOUT, cwd=ROOT,
            env={"TRITON_CACHE_DIR": str(folder / "triton"), "TRITON_CACHE_AUTOTUNING": "1",
                 "OMP_NUM_THREADS": "1", **os.environ, **check.env})
        try:
            process.wait(limit)
        except subprocess.TimeoutExpired:
            late = True
            end(psutil.Process(process.pid))
            process.wait()
    seconds = round(time.monotonic() - began, 1)
    if answer.exists() and not late:
        found: dict[str, Any] = json.loads(answer.read_text(encoding="utf-8"))
    else:
        how = f"no end within {limit:.0f} s" if late else f"ended with code {process.returncode}"
        found = {"ok": False, "value": how, "expected": None}
    found["seconds"] = seconds
    if found["ok"] is False:
        found["output"] = log.read_text(errors="replace").splitlines()[-LINES:]
    return found


def run_inside(check: Check, job: Job) -> None:
    """In the check's process: do it, and leave what it found in its folder."""
    torch.manual_seed(0)
    # As runs do; Triton's products are for a check to choose.
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    accumulate_in_fp32()
    try:
        found = check.work(job)
    except Exception as error:
        traceback.print_exc()
        found = Found(False, f"{type(error).__name__}: {str(error)[:500]}", None)
    (job.folder / "found.json").write_text(json.dumps(
        {"ok": found.ok, "value": found.value, "expected": found.expected}), encoding="utf-8")


def table(results: Sequence[dict[str, Any]]) -> str:
    """The results as markdown."""
    rows = ["| check | holds | seconds | found | expected |", "|---|---|---|---|---|"]
    for result in results:
        holds = {True: "yes", False: "**NO**", None: "-"}[result["ok"]]
        value, expected = (json.dumps(result[part], ensure_ascii=False)
                           for part in ("value", "expected"))
        rows.append(f"| {result['name']} | {holds} | {result['seconds']} | {value} | {expected} |")
    return "\n".join(rows)


if __name__ == "__main__":
    sys.exit(main())
