"""A local step on a pretended GPU: the host waits for nothing, and launches are few."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest

from tests.support.runs import execute

# The most that a step may launch besides mamba-ssm's kernels, which are not counted: by the type of
# the products and the sequences of 256 tokens, then by layers.
FP32, BF16 = {1: 50, 2: 64, 4: 92}, {1: 60, 2: 82, 4: 126}
LAUNCHES = {("fp32", 4): FP32, ("fp32", 16): FP32, ("bf16", 4): BF16, ("bf16", 16): BF16}


@pytest.fixture(scope="module")
def counted(pretended_cuda: dict[str, str]) -> dict[str, Any]:
    code, output = execute([sys.executable, "-m", "tests.pretended_cuda.local_step", "--json"],
                           env=pretended_cuda)
    assert code == 0, output
    found = json.loads(output.splitlines()[-1])
    assert isinstance(found, dict)
    return found


def test_a_local_step_waits_for_nothing(counted: dict[str, Any]) -> None:
    """On every path; also with Fisher information, a proximal term and clipped gradients."""
    waits = counted["waits"]
    assert len(waits) == 24
    assert {step: found for step, found in waits.items() if found} == {}


def test_a_local_step_launches_few_kernels(counted: dict[str, Any]) -> None:
    launched: dict[tuple[str, int], dict[int, int]] = {}
    for row in counted["launches"]:
        launched.setdefault((row["dtype"], row["sequences"]), {})[row["layers"]] = row["launches"]
    assert launched.keys() == LAUNCHES.keys()
    above = {(*what, layers): number for what, numbers in launched.items()
             for layers, number in numbers.items() if number > LAUNCHES[what][layers]}
    assert above == {}, launched
