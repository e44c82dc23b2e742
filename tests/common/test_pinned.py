"""Page-locked memory: its size, how long it is locked, and a driver that refuses."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch

from fedrun.common.pinned import PinnedMemory
from tests.support.fake_gpu import FakeGpu


@pytest.mark.parametrize("kind", [torch.float64, torch.float32, torch.bfloat16])
def test_it_is_as_large_as_what_it_holds_and_unlocked_when_it_is_gone(
        monkeypatch: pytest.MonkeyPatch, kind: torch.dtype) -> None:
    gpu, memory = FakeGpu(monkeypatch), PinnedMemory()
    for vector in (torch.randn(1000, 33).to(kind), torch.tensor(3.0, dtype=kind)):
        copy = memory.empty_like(vector)
        assert (copy.shape, copy.dtype, copy.is_contiguous()) == (vector.shape, kind, True)
        assert gpu.locked[copy.data_ptr()] == vector.nbytes
        assert torch.equal(copy.copy_(vector), vector)
    assert len(gpu.locked) == 2
    del memory
    gc.collect()
    assert gpu.locked == {}
    assert torch.equal(copy, vector)


def test_where_the_driver_refuses_torch_allocates(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, memory = FakeGpu(monkeypatch), PinnedMemory()
    gpu.refuses = True
    asked: list[dict[str, Any]] = []

    def empty_like(vector: torch.Tensor, **how: Any) -> torch.Tensor:
        asked.append(how)
        return torch.zeros(vector.shape)

    def launch(*_: Any, **__: Any) -> None:
        raise RuntimeError("CUDA error: part or all of the memory is mapped already")

    monkeypatch.setattr(torch, "empty_like", empty_like)
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *a, **how: launch() if how else zeros(*a))
    assert memory.empty_like(torch.ones(5)).tolist() == [0.0] * 5
    assert asked == [{"device": "cpu", "pin_memory": True}]
