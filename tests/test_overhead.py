"""The benchmark of the round overhead: its numbers belong together, and its floor is one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.benchmarks.fedrun_rounds import shapes
from tests.benchmarks.overhead_figure import draw
from tests.conftest import ROOT


def test_its_numbers_belong_together(tmp_path: Path) -> None:
    """Two workers and a server, a model of a tenth of a million parameters; no other frameworks."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.benchmarks.overhead", "--params", "0.1", "--workers", "2",
         "--clients", "4", "--blocks", "1", "--json"],
        cwd=ROOT, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert min(found[name] for name in ("fedrun_s", "allreduce_s", "passes_s")) > 0
    assert found["ratio"] == pytest.approx(
        found["fedrun_s"] / (found["allreduce_s"] + found["passes_s"]))
    assert found["bare_ratio"] == pytest.approx(found["fedrun_s"] / found["allreduce_s"])
    fisher = found["methods"]["fed_fisher"]
    assert found["fisher_ratio"] == pytest.approx(
        fisher["round_s"] / (fisher["allreduce_s"] + fisher["passes_s"]))
    # So small a round is mostly messages, which the floor has none of.
    assert min(apart["ratio"] for apart in found["apart"].values()) > 1
    assert found["apart"].keys() == found["methods"].keys()
    assert draw([found, found | {"workers": 4, "pfl_s": 0.1}], tmp_path).stat().st_size > 10_000


@pytest.mark.parametrize("million", [0.1, 1, 3, 10, 27, 100])
def test_models_have_the_size_that_was_asked_for(million: float) -> None:
    def size(shape: list[int]) -> int:
        return shape[0] * size(shape[1:]) if shape else 1

    assert sum(map(size, shapes(million))) == pytest.approx(1e6 * million, rel=1e-3)
