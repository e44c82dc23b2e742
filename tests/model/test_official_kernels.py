"""Our model against mamba-ssm's own, forward and backward, without a GPU.

mamba-ssm's Triton kernels run on the CPU in Triton's interpreter, in an environment of their own
(tests/official/make_venv.sh makes it, once). What this shows of our GPU path is that it calls the
kernels rightly; how they behave on a GPU it cannot show.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fedrun.model import kernels, mixer
from fedrun.model.config import ModelConfig
from fedrun.model.kernels import kernel_path, path_for
from fedrun.model.mamba2 import Mamba2LM
from tests.support.runs import ROOT, execute


@pytest.mark.slow
@pytest.mark.timeout(420)
@pytest.mark.parametrize(("path", "length", "shape"), [
    ("ours", 48, "usual"), ("conv1d_and_chunk_scan", 64, "unusual"),
    pytest.param("ours", 64, "usual", marks=pytest.mark.soak),
    pytest.param("conv1d_and_chunk_scan", 64, "usual", marks=pytest.mark.soak)])
def test_logits_and_gradients_equal_the_official_ones(official_python: Path, path: str,
                                                      length: int, shape: str) -> None:
    code, output = execute([str(official_python), str(ROOT / "tests/official/parity.py"), path,
                            str(length), shape], limit=300, env={"PYTHONPATH": str(ROOT)})
    assert code == 0, output
    differences = json.loads(output.splitlines()[-1])
    # Of a block, then embedding, last norm and logits; unusual: two biases for one, and a head.
    assert len(differences) == (2 * 9 + 3 if shape == "usual" else 2 * 10 + 4)
    assert {k: v for k, v in differences.items() if not v < 1e-4} == {}


@pytest.mark.slow
@pytest.mark.timeout(420)
def test_our_triton_kernels_do_what_torch_does(official_python: Path) -> None:
    """The softmax against float64, and the same bits as torch for a client's term."""
    code, output = execute([str(official_python), str(ROOT / "tests/official/own_kernels.py")],
                           limit=300, env={"PYTHONPATH": str(ROOT)})
    assert code == 0, output
    found = json.loads(output.splitlines()[-1])
    assert found["different terms"] == []
    assert {k: v for k, v in found["fp32"].items() if not v < 2e-6} == {}
    assert {k: v for k, v in found["bf16"].items() if not v < 4e-3} == {}


@pytest.mark.parametrize(("changed", "path"), [
    ({}, "split_conv1d_scan"), ({"d_conv": 2}, "split_conv1d_scan"),
    ({"d_conv": 1}, "conv1d_and_chunk_scan"), ({"d_conv": 5}, "conv1d_and_chunk_scan"),
    ({"d_state": 30}, "conv1d_and_chunk_scan")])
def test_shapes_that_causal_conv1d_refuses_are_convolved_by_torch(
        monkeypatch: pytest.MonkeyPatch, changed: dict[str, int], path: str) -> None:
    """It takes 2 to 4 taps and multiples of 8 channels, and says so in the first step."""
    shape: dict[str, Any] = {"d_model": 64, "d_state": 32, "headdim": 32} | changed
    model = Mamba2LM(ModelConfig(**shape), 50)
    model.init_weights(0)
    taken = []

    def instead(_: mixer.Mamba2Mixer, u: torch.Tensor, path: str, *__: object) -> torch.Tensor:
        taken.append(path)
        return u

    monkeypatch.setattr(kernels, "path_for", lambda x: "split_conv1d_scan")
    monkeypatch.setattr(mixer, "mix_with_kernels", instead)
    model.hidden(torch.zeros(1, 8, dtype=torch.long))
    assert taken == [path]


def test_dispatch_is_by_the_tensors_device() -> None:
    assert path_for(torch.zeros(1)) == "own"
    assert path_for(torch.zeros(1, device="meta")) == "own"
    assert kernel_path("cpu") == "cpu: own"
