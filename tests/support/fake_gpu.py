"""What the code asks of CUDA beside operators on tensors, on a CPU build of torch: streams, events
that a test ends, and a driver that locks memory. Tensors `on_gpu` stay where they are."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

SECONDS = 20.0  # that an event of another thread may take


class OnGpu(Tensor):
    """A tensor on the CPU that says that it is on a GPU."""

    recorded: ClassVar[list[object]] = []
    """Arguments of `record_stream`."""

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return True

    def record_stream(self, stream: Any) -> None:
        OnGpu.recorded.append(stream)


def on_gpu(tensor: Tensor) -> OnGpu:
    return tensor.as_subclass(OnGpu)


class Event:
    def __init__(self) -> None:
        self.reached = threading.Event()

    def synchronize(self) -> None:
        assert self.reached.wait(SECONDS), "nobody let the GPU get there"


class Stream:
    def __init__(self, *_: Any) -> None:
        self.events: list[Event] = []

    def record_event(self) -> Event:
        self.events.append(Event())
        return self.events[-1]

    def synchronize(self) -> None:
        pass


class FakeGpu:
    """Put in place of a part of torch.cuda for one test."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.training = Stream()
        """The current stream."""
        self.locked: dict[int, int] = {}
        """Bytes of page-locked memory, by address."""
        self.refuses = False
        runtime = SimpleNamespace(cudaHostRegister=self._lock, cudaHostUnregister=self.locked.pop)
        OnGpu.recorded.clear()
        for name, fake in {"Stream": Stream, "current_stream": lambda *_: self.training,
                           "set_device": lambda _: None, "set_stream": lambda _: None,
                           "cudart": lambda: runtime}.items():
            monkeypatch.setattr(torch.cuda, name, fake)

    def _lock(self, address: int, size: int, _flags: int) -> int:
        if self.refuses:
            return 712  # cudaErrorHostMemoryAlreadyRegistered
        assert address not in self.locked
        self.locked[address] = size
        return 0
