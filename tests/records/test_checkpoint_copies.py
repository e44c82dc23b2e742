"""The copies that a checkpoint of a GPU is written from: nobody waits for them, and their memory is
kept."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fedrun.records.checkpoint import read_tensors
from fedrun.records.checkpoint_writer import CheckpointWriter
from tests.support.fake_gpu import FakeGpu, on_gpu

SIZE = 3000


def files(number: int) -> dict[str, dict[str, Tensor]]:
    """Of a worker whose one client stays on the GPU, but for an integer."""
    def vector() -> Tensor:
        return on_gpu(torch.full((SIZE,), float(number)))

    return {"global": {"model": vector()},
            "client_0": {"exp_avg": vector(), "exp_avg_sq": vector(),
                         "steps_done": torch.tensor(number)}}


def test_training_goes_on_while_a_gpu_still_copies(monkeypatch: pytest.MonkeyPatch,
                                                   tmp_path: Path) -> None:
    gpu, writer = FakeGpu(monkeypatch), CheckpointWriter()
    for number in (1, 2, 3):
        folder = tmp_path / f"step_{number}"
        writer.begin(folder, number, files(number))
        time.sleep(0.1)
        assert writer.written() == []
        assert not folder.exists()
        gpu.training.events[-1].reached.set()
        (answer,) = writer.written(wait=True)
        assert sorted(answer["files"]) == ["client_0", "global"]
        for name, tensors in files(number).items():
            found = read_tensors(folder / name)
            assert found.keys() == tensors.keys()
            assert all(torch.equal(found[key], t.as_subclass(Tensor)) for key, t in tensors.items())
        assert list(gpu.locked.values()) == [4 * SIZE] * 3  # the same for all checkpoints
    assert len(gpu.training.events) == 3


def test_on_a_cpu_a_copy_is_complete_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path
                                             ) -> None:
    gpu, writer, model = FakeGpu(monkeypatch), CheckpointWriter(), torch.ones(SIZE)
    writer.begin(tmp_path / "step_1", 1, {"global": {"model": model}})
    model.zero_()
    writer.written(wait=True)
    assert read_tensors(tmp_path / "step_1" / "global")["model"].eq(1).all()
    assert (gpu.training.events, gpu.locked) == ([], {})
