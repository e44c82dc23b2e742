"""Where a batch lies on a device."""

from __future__ import annotations

import torch
from torch import Tensor


class BatchMemory:
    """One tensor on the device for each shape of a batch, the same in every step: what a CUDA graph
    of a local step reads. On a CPU a batch stays where it is."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._tensors: dict[torch.Size, Tensor] = {}

    def load(self, batch: Tensor) -> Tensor:
        """A batch (of the CPU) on the device, in memory that the next one of its shape overwrites.

        Nothing in a local step waits for a GPU, so the host runs ahead of it: the copy, from pinned
        memory, is queued behind the steps that use the memory. The pinned memory is new each time,
        since torch alone knows when the copy is done.
        """
        if self.device.type == "cpu":
            return batch
        memory = self._tensors.get(batch.shape)
        if memory is None:
            memory = self._tensors[batch.shape] = torch.empty_like(batch, device=self.device)
        source = batch.pin_memory() if self.device.type == "cuda" else batch
        return memory.copy_(source, non_blocking=True)
