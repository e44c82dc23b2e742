"""Where compiled kernels are kept, and the step that compiles them."""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fedrun.flags import resolve
from fedrun.model.compilation import CACHE, compile_kernels, use_local_cache
from fedrun.model.mamba2 import Mamba2LM

AUTOTUNING = "TRITON_CACHE_AUTOTUNING"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that kernels should be kept in, which is not made yet."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for name in (CACHE, AUTOTUNING):
        monkeypatch.setenv(name, "")  # so that it is restored
        monkeypatch.delenv(name)
    return tmp_path / f"fedrun-triton-{os.getuid()}"


def test_kernels_are_kept_on_the_local_disk(folder: Path) -> None:
    use_local_cache(deterministic=False)
    assert os.environ[CACHE] == str(folder)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert os.environ[AUTOTUNING] == "1"


def test_under_deterministic_no_timing_is_kept(folder: Path) -> None:
    use_local_cache(deterministic=True)
    assert os.environ[CACHE] == str(folder)
    assert AUTOTUNING not in os.environ


def test_a_folder_that_the_user_has_chosen(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CACHE, "/scratch/kernels")
    use_local_cache(deterministic=False)
    assert os.environ[CACHE] == "/scratch/kernels"
    assert not folder.exists()


@pytest.mark.parametrize("plant", [
    lambda folder: (folder.mkdir(), folder.chmod(0o777)),
    lambda folder: (folder.with_name("theirs").mkdir(),
                    folder.symlink_to(folder.with_name("theirs"))),
    lambda folder: folder.write_text("")])
def test_kernels_that_another_user_could_have_put_there_are_not_run(
        folder: Path, plant: Callable[[Path], object], caplog: pytest.LogCaptureFixture) -> None:
    plant(folder)
    use_local_cache(deterministic=False)
    assert CACHE not in os.environ
    assert [CACHE in message for message in caplog.messages] == [True]


@pytest.mark.parametrize("tie", ["true", "false"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp64"])
def test_compiling_computes_a_gradient_and_changes_nothing(
        tie: str, dtype: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "shape.yaml").write_text(f"model:\n  d_model: 16\n  n_layer: 2\n  headdim: 8\n"
                                         f"  tie_embeddings: {tie}\n")
    config = resolve("fed_avg", {"config": str(tmp_path / "shape.yaml"), "dtype": dtype})
    seen: list[tuple[tuple[int, ...], torch.dtype, bool]] = []
    compute = Mamba2LM.compute_grad

    def compute_grad(model: Mamba2LM, tokens: torch.Tensor) -> tuple[torch.Tensor, int]:
        loss, count = compute(model, tokens)
        tied = model.lm_head.weight is model.backbone.embedding.weight
        seen.append((tuple(tokens.shape), model.lm_head.weight.dtype, tied))
        assert loss.isfinite()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        return loss, count

    monkeypatch.setattr(Mamba2LM, "compute_grad", compute_grad)
    before = torch.get_rng_state()
    compile_kernels(config, 50, torch.device("cpu"), 3, 24)
    assert seen == [((3, 24), torch.float64 if dtype == "fp64" else torch.float32, tie == "true")]
    assert torch.equal(torch.get_rng_state(), before)
