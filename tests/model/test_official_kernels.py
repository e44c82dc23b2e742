"""Our model against mamba-ssm's own, forward and backward, without a GPU.

mamba-ssm's Triton kernels run on the CPU in Triton's interpreter, in an environment of their own
(tests/official/make_venv.sh makes it, once). What this shows of our GPU path is that it calls the
kernels rightly; how they behave on a GPU it cannot show.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fedrun.model.kernels import kernel_path, path_for
from tests.support.runs import ROOT, execute


@pytest.mark.slow
@pytest.mark.timeout(420)
@pytest.mark.parametrize(("path", "length", "shape"), [
    ("ours", 64, "usual"), ("ours", 48, "usual"), ("conv1d_and_chunk_scan", 64, "usual"),
    ("conv1d_and_chunk_scan", 64, "unusual")])
def test_logits_and_gradients_equal_the_official_ones(official_python: Path, path: str,
                                                      length: int, shape: str) -> None:
    code, output = execute([str(official_python), str(ROOT / "tests/official/parity.py"), path,
                            str(length), shape], limit=110, env={"PYTHONPATH": str(ROOT)})
    assert code == 0, output
    differences = json.loads(output.splitlines()[-1])
    # Of a block, then embedding, last norm and logits; unusual: two biases for one, and a head.
    assert len(differences) == (2 * 9 + 3 if shape == "usual" else 2 * 10 + 4)
    assert {k: v for k, v in differences.items() if not v < 1e-4} == {}


def test_dispatch_is_by_the_tensors_device() -> None:
    assert path_for(torch.zeros(1)) == "own"
    assert path_for(torch.zeros(1, device="meta")) == "own"
    assert kernel_path("cpu") == "cpu: own"
