"""Ranks that start at once, in processes of their own that are forked from one that has imported
torch and fedrun already.

Importing takes a process 2.5 seconds, which is most of what a run of a few rounds costs. Without a
launcher, as srun starts ranks: what a launcher does is tested with `fedrun.torchrun`.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import runpy
import signal
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import pytest

from tests.support.runs import ROOT, free_port
from tests.support.users import become

SECONDS_TO_FOLLOW = 15.0
"""In which the other ranks end by themselves after one has failed."""
PR_SET_PDEATHSIG = 1
os.environ.setdefault("OMP_NUM_THREADS", "1")  # a process with threads could not be forked
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload([
    "fedrun.cli", "fedrun.run", "tokenizers",
    "torch.fx.experimental.symbolic_shapes"])  # and sympy: torch imports them at the first backward


def run_ranks(processes: int, arguments: Sequence[str], limit: float,
              module: str | Path = "fedrun", env: Mapping[str, str] | None = None
              ) -> tuple[int, str]:
    """Run `python -m MODULE` with these arguments, or a script, on this many ranks of one machine.
    Returns the exit code of the first rank that failed (the number of the signal that killed it),
    or 0, and all that they printed. Past the limit (seconds) they are killed, and the test fails.
    env: variables of all ranks, which take effect after Python's start."""
    with tempfile.NamedTemporaryFile(prefix="fedrun-output-") as output:
        ranks = start_ranks(arguments, [env or {}] * processes, [output.name] * processes,
                            module)
        first, late = join_ranks(ranks, limit)
        printed = Path(output.name).read_text(encoding="utf-8")
    if late:
        pytest.fail(f"rank {late} still running {limit} s after the start, or "
                    f"{SECONDS_TO_FOLLOW} s after another failed: {' '.join(arguments)}\n{printed}")
    return first, printed


def start_ranks(arguments: Sequence[str], env: Sequence[Mapping[str, str]],
                output: Sequence[str | Path], module: str | Path = "fedrun",
                uid: Sequence[int] = ()) -> list[ForkServerProcess]:
    """Start `python -m MODULE` with these arguments, or a script, on as many ranks of one machine
    as there are environments, beside this process's own. All that a rank prints is appended to its
    output. uid: of each rank's user; only root can start ranks of others."""
    port, processes = free_port(), len(env)
    ranks = [_context.Process(target=_be_rank, daemon=True, args=(
        {**os.environ, **(_variables(rank, processes, port) if processes > 1 else {}), **env[rank]},
        list(arguments), str(output[rank]), module, uid[rank] if uid else 0))
        for rank in range(processes)]
    for rank in ranks:
        rank.start()
    return ranks


def _variables(rank: int, processes: int, port: int) -> dict[str, str]:
    return {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes),
            "LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port)}


def join_ranks(ranks: Sequence[ForkServerProcess], limit: float) -> tuple[int, list[int]]:
    """Wait for all ranks, and kill those that do not end. Returns the exit code of the first that
    failed, or 0, and the ranks that were killed."""
    deadline, first, late = time.monotonic() + limit, 0, list[int]()
    while running := [number for number, rank in enumerate(ranks) if rank.exitcode is None]:
        failed = [abs(rank.exitcode) for rank in ranks if rank.exitcode]
        if failed and not first:
            first, deadline = failed[0], min(deadline, time.monotonic() + SECONDS_TO_FOLLOW)
        if time.monotonic() > deadline and not late:
            late = running
            for number in late:
                ranks[number].kill()
        wait([ranks[number].sentinel for number in running], timeout=0.5)
    return first or next((abs(rank.exitcode) for rank in ranks if rank.exitcode), 0), late


def _be_rank(env: dict[str, str], arguments: list[str], output: str, module: str | Path, uid: int
             ) -> None:
    """Become `python -m MODULE`, or a script, with these arguments; in the forked process, which
    dies with the one that it is forked from."""
    os.setsid()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    os.chdir(ROOT)
    os.environ.clear()
    os.environ.update(env)
    printed = os.open(output, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    os.dup2(printed, 1)
    os.dup2(printed, 2)
    if uid:
        become(uid)
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # a change of user has undone it
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    sys.argv = [str(module), *arguments]
    if isinstance(module, Path):
        runpy.run_path(str(module), run_name="__main__")
    else:
        runpy.run_module(module, run_name="__main__")
