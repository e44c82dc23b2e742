"""What a check is, and what checks share: the job, commands with a limit, runs of fedrun."""

from __future__ import annotations

import hashlib
import os
import subprocess
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from tests.support.runs import CORPUS, ROOT, Outcome, torchrun

CHECKS: dict[str, Check] = {}
SLOWNESS = 4  # of pretended GPUs, in limits
# A model that keeps a GPU busy, with as many tokens as the documentation of Python makes: 10 M
# parameters. SMALL's 400 would leave next to nothing of its head.
LARGE: dict[str, Any] = {"config": "pure_ssm_1_layer", "dataset": "pydocs",
                         "tokenizer": "bpe:16384"}
# What --deterministic sets. mamba-ssm then chooses blocks without timing any, unless Triton keeps
# what it timed.
DETERMINISTIC = {"MAMBA_DETERMINISTIC": "1", "CAUSAL_CONV1D_DETERMINISTIC": "1",
                 "CUBLAS_WORKSPACE_CONFIG": ":4096:8", "TRITON_CACHE_AUTOTUNING": "0"}


@dataclass(frozen=True)
class Job:
    """What a check is told."""

    folder: Path
    """For what it writes; that of the check before it lies beside."""
    gpus: int
    pretended: bool
    """On pretended GPUs: sizes are small, and speed means nothing."""


@dataclass(frozen=True)
class Found:
    """What a check found; `value` and `expected` are for a reader, in JSON."""

    ok: bool
    value: Any
    expected: Any


@dataclass(frozen=True)
class Check:
    """A check, run in a process of its own."""

    name: str
    work: Callable[[Job], Found]
    limit: float
    """Seconds after which its process is ended."""
    gpus: int = 1
    """It is skipped on fewer."""
    not_pretended: str = ""
    """Why it is skipped on pretended GPUs."""
    env: Mapping[str, str] = field(default_factory=dict)


def check(limit: float, **details: Any) -> Callable[[Callable[[Job], Found]],
                                                    Callable[[Job], Found]]:
    """Add a function to the checks, under its name."""
    def add(work: Callable[[Job], Found]) -> Callable[[Job], Found]:
        CHECKS[work.__name__] = Check(work.__name__, work, limit, **details)
        return work
    return add


def end(process: psutil.Process) -> None:
    """Kill a process and all that it has started."""
    with suppress(psutil.NoSuchProcess):
        family = [*process.children(recursive=True), process]
        for member in family:
            with suppress(psutil.NoSuchProcess):
                member.kill()


def command(line: Sequence[str | Path], limit: float, env: Mapping[str, str] | None = None
            ) -> tuple[int, str]:
    """Exit code and output of a command. Past the limit (seconds) it is ended: code -9."""
    process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                               cwd=ROOT, env={**os.environ, **(env or {})})
    late = ""
    try:
        output, _ = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        end(psutil.Process(process.pid))
        output, _ = process.communicate()
        late = f"\nno end within {limit:g} s"
    return process.returncode, output + late


def flags(job: Job, **changed: object) -> list[str]:
    """Those of a short run on GPUs with all that decides bits; `changed` by name."""
    values: dict[str, object] = {
        "config": "tiny", "dataset": CORPUS, "tokenizer": "bpe:400", "sequence_length": 64,
        "batch_size": 4, "num_clients": 8, "rounds": 4, "local_updates": 2, "val_freq": 2,
        "lr": 2e-3, "checkpoint_freq": 1, "deterministic": True, "device": "cuda",
        "data_dir": job.folder, "cache_dir": job.folder.parent / "cache"}
    return [text for name, value in (values | changed).items()
            for text in (f"--{name}", str(value).lower() if isinstance(value, bool)
                         else str(value))]


def fedrun(job: Job, method: str, name: str, processes: int = 1, *, module: str = "fedrun",
           env: Mapping[str, str] | None = None, limit: float = 300, **changed: object) -> Outcome:
    """A whole run, named `name`. Past the limit (seconds; longer on pretended GPUs) it
    is ended."""
    limit *= SLOWNESS if job.pretended else 1
    code, output = command([*torchrun(processes), "-m", module, method,
                            *flags(job, **changed), "--run_name", name], limit, env)
    return Outcome(code, output, job.folder / name)


def finished(run: Outcome) -> Outcome:
    """The run, if it has ended well."""
    assert run.code == 0, f"{run.run_dir.name}: exit code {run.code}\n{run.output[-3000:]}"
    return run


def digest(run: Outcome) -> str:
    """SHA-256 of a run's final model."""
    return hashlib.sha256(finished(run).bits).hexdigest()


def lone_digest(job: Job) -> str:
    """That of the run in one process, which other layouts are compared with: made once for all
    checks."""
    file = lone_digest_file(job.folder.parent)
    if not file.exists():
        file.write_text(digest(fedrun(job, "fed_avg", "alone")), encoding="utf-8")
    return file.read_text(encoding="utf-8")


def lone_digest_file(suite: Path) -> Path:
    return suite / "alone.sha256"


def short(hashes: Mapping[str, str]) -> dict[str, str]:
    """As much of each as a reader compares."""
    return {name: digest[:16] for name, digest in hashes.items()}
