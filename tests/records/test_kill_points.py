"""A run is killed, or its disk is full, at any call that changes a file: the same command, run
again, ends with the bits of the undisturbed run.

8 calls, spread over a start and a checkpoint; `make soak` takes the first 100 of each, with an
empty cache too.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.runs import SMALL, Outcome, assert_equal, execute

pytestmark = pytest.mark.slow

COMMAND = ("fed_avg", *SMALL, "--num_clients", "2", "--rounds", "5", "--val_freq", "2",
           "--checkpoint_freq", "2", "--client_store", "disk")
FIRST = int(os.environ.get("KILL_POINTS", "0"))  # test all calls up to this one
NEVER = 10**9  # the number of a call that is not reached

POINTS = [
    "kill:start:5", "kill:start:33", "kill:cold-start:12", "kill:checkpoint:8",
    "kill:checkpoint:20", "full:start:11", "full:checkpoint:35", "short:start:60",
] if not FIRST else [f"{fault}:{stage}:{number}" for fault in ("kill", "full", "short")
                     for stage in ("start", "checkpoint", "cold-start")
                     for number in range(1, FIRST + 1)]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory, little_text: tuple[str, ...], cache_dir: Path
            ) -> dict[str, dict[str, Any]]:
    """The results that `kill_points.py` prints, by point; `folder` is the run's."""
    data_dir = tmp_path_factory.mktemp("points") / "data"
    text = little_text[-3]
    code, output = execute(
        [sys.executable, "-m", "tests.support.kill_points", str(data_dir), str(cache_dir),
         ",".join([f"kill:start:{NEVER}", *POINTS]), *COMMAND, "--dataset", text],
        limit=110 + 6 * len(POINTS))
    assert code == 0, output
    printed = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    return {result["point"]: result | {"folder": data_dir / "runs" / result["name"]}
            for result in printed}


@pytest.mark.timeout(900 + 6 * FIRST * 6)
@pytest.mark.parametrize("point", POINTS)
def test_the_same_command_ends_in_the_same_bits(point: str, results: dict[str, dict[str, Any]]
                                                ) -> None:
    undisturbed = results[f"kill:start:{NEVER}"]
    assert undisturbed["code"] == 0
    result = results[point]
    details = f"struck at: {result['at']}\n{result['output']}\nthen:\n{result['second']}"
    if point.startswith("kill"):
        assert result["code"] == -9 or not result["at"], details
    else:
        assert result["code"] in (0, 1, 2), details
        assert "Traceback" not in result["output"], details
        # One line says what is full, unless the run could end without what is missing.
        errors = [line for line in result["output"].splitlines()
                  if line.startswith("fedrun: error: ")]
        assert len(errors) == int(result["code"] > 0), details
        assert all("No space left" in line for line in errors), details
    assert result["again"] == 0, details
    assert_equal(Outcome(0, details, result["folder"]), Outcome(0, "", undisturbed["folder"]))
