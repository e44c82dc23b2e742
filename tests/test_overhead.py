"""The benchmark of the round overhead: its numbers belong together, and its floor is one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.benchmarks.fedrun_rounds import shapes
from tests.benchmarks.overhead import numbers
from tests.benchmarks.overhead_figure import draw
from tests.support.runs import ROOT


def test_medians_and_ratios_of_hand_made_samples() -> None:
    found = numbers({"rounds": [9.0, 3.0, 4.0], "all_reduce": [1.5, 1.0, 90.0],
                     "passes": [0.5, 0.5, 0.5]})
    assert (found["round_s"], found["allreduce_s"], found["passes_s"]) == (4.0, 1.5, 0.5)
    assert (found["ratio"], found["bare_ratio"]) == (2.0, 4.0 / 1.5)
    alone = numbers({"rounds": [4.0, 4.0], "all_reduce": [0.0, 0.0], "passes": [2.0, 2.0]})
    assert (alone["ratio"], alone["bare_ratio"]) == (2.0, None)


@pytest.mark.slow
def test_a_whole_measurement_and_its_figure(tmp_path: Path) -> None:
    """Two workers and a server, a model of a tenth of a million parameters; no other frameworks."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.benchmarks.overhead", "--params", "0.1", "--workers", "2",
         "--clients", "4", "--blocks", "1", "--json"],
        cwd=ROOT, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["methods"].keys() == found["apart"].keys() == {"fed_avg", "fed_fisher"}
    measured = [*found["methods"].values(), *found["apart"].values()]
    assert all(min(one["round_s"], one["allreduce_s"], one["passes_s"]) > 0 for one in measured)
    assert draw([found, found | {"workers": 4, "pfl_s": 0.1}], tmp_path).stat().st_size > 10_000


@pytest.mark.parametrize("million", [0.1, 1, 3, 10, 27, 100])
def test_models_have_the_size_that_was_asked_for(million: float) -> None:
    def size(shape: list[int]) -> int:
        return shape[0] * size(shape[1:]) if shape else 1

    assert sum(map(size, shapes(million))) == pytest.approx(1e6 * million, rel=1e-3)
