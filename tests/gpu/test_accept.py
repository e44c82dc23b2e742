"""The acceptance suite itself, on pretended GPUs: it runs, and it notices what does not hold."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.runs import ROOT, execute, read_json


def accept(folder: Path, *flags: str, env: dict[str, str] | None = None, limit: float = 1800
           ) -> tuple[int, str]:
    return execute([sys.executable, "-m", "tests.gpu.accept", str(folder), *flags], limit, env)


def test_without_a_gpu_nothing_is_done(tmp_path: Path) -> None:
    assert accept(tmp_path / "gpu") == (0, "no GPU\n")
    assert not (tmp_path / "gpu").exists()


def by_name(folder: Path) -> dict[str, Any]:
    return {result["name"]: result for result in read_json(folder / "gpu.json")["checks"]}


SKIPPED = {"kernels", "kernels_by_default", "capturable", "efficiency"}
# Those that make no whole run, of which tests/pretended_cuda/ makes enough.
SHORT = {"what_is_here", "head", "sums", "own_scan", "waits_in_a_step", "steps", *SKIPPED}


@pytest.mark.slow
@pytest.mark.timeout(1900)
@pytest.mark.parametrize("only", [
    SHORT, pytest.param(set(), marks=pytest.mark.soak)], ids=["short", "all"])
def test_every_check_that_can_be_made_holds_on_pretended_gpus(
        pretended_cuda: dict[str, str], tmp_path: Path, only: set[str]) -> None:
    flags = ("--only", *sorted(only)) if only else ()
    code, output = accept(tmp_path, "--gpus", "2", *flags, env=pretended_cuda)
    found = by_name(tmp_path)
    assert {n: r for n, r in found.items() if r["ok"] is False} == {}, output
    assert code == 0, output
    assert only <= found.keys()
    assert {n for n, r in found.items() if r["ok"] is None} == SKIPPED
    assert all("on pretended GPUs: " in r["value"] for r in found.values() if r["ok"] is None)
    lines = [json.loads(line) for line in output.splitlines() if line.startswith('{"name"')]
    assert lines == list(found.values())
    assert output.count("\n| ") == len(found) + 1  # the table


FAILING = """
import sys, time
from tests.gpu import accept, checks
from tests.gpu.checks import Found, check

checks.CHECKS.clear()

@check(20)
def breaks_the_gpu(job):
    import torch
    torch.ones(3, device="cuda")[torch.tensor([7], device="cuda")].sum().item()

@check(5)
def hangs(job):
    time.sleep(1000)

@check(20)
def is_killed(job):
    import os
    os.kill(os.getpid(), 9)

@check(20)
def holds(job):
    import torch
    return Found(bool(torch.ones(3, device="cuda").sum() == 3), 3, 3)

@check(20)
def does_not_hold(job):
    return Found(False, 4, 3)

accept.PROGRAM = (sys.executable, sys.argv[0])
sys.exit(accept.main(sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.soak
def test_a_check_that_fails_does_not_stop_the_next(pretended_cuda: dict[str, str], tmp_path: Path
                                                   ) -> None:
    script = tmp_path / "failing.py"
    script.write_text(FAILING)
    code, output = execute([sys.executable, str(script), str(tmp_path / "gpu")],
                           env=pretended_cuda, cwd=ROOT)
    assert code == 1, output
    found = by_name(tmp_path / "gpu")
    assert {name: r["ok"] for name, r in found.items()} == {
        "breaks_the_gpu": False, "hangs": False, "is_killed": False, "holds": True,
        "does_not_hold": False}
    assert "device-side assert" in found["breaks_the_gpu"]["value"]
    assert found["hangs"]["value"] .startswith("no end within")
    assert found["is_killed"]["value"] == "ended with code -9"
    assert read_json(tmp_path / "gpu" / "gpu.json")["failed"] == [
        "breaks_the_gpu", "hangs", "is_killed", "does_not_hold"]
