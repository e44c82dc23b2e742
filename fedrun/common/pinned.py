"""Page-locked host memory, which a GPU reads and writes directly, of the size that is asked for.

torch rounds every piece of its pinned memory up to a power of two
(ATen/core/CachingHostAllocator.h): the 110 MB of a vector of 27 million parameters take 134, the
5.2 GB of one of 1.3 billion 8.6. Here the driver locks ordinary memory in place
(`cudaHostRegister`), so that only whole pages count.

Not run on a GPU.
"""

from __future__ import annotations

import mmap
import weakref
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

_PORTABLE = 1  # cudaHostRegisterPortable: locked for the contexts of all devices


class PinnedMemory:
    """Allocates page-locked memory. It is unlocked when this object is gone, but stays valid for
    the tensors in it."""

    def empty_like(self, tensor: Tensor) -> Tensor:
        """An uninitialised tensor of this shape and type on the host. Where the driver locks no
        memory that it has not allocated, it is torch's pinned memory, which is larger."""
        pages = mmap.mmap(-1, tensor.nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory = torch.frombuffer(pages, dtype=tensor.dtype).view(tensor.shape)
        driver = torch.cuda.cudart()
        if not _lock(driver, memory):
            return torch.empty_like(tensor, device="cpu", pin_memory=True)
        # Not at the end of the process, which unlocks it anyway.
        weakref.finalize(self, _unlock, driver, memory).atexit = False
        return memory


def brought(vector: Tensor, memory: Tensor) -> Tensor:
    """The vector itself where it is on the device of `memory`; else its copy there, in `memory`,
    which has its size and its type. A GPU makes it when its stream gets there, from page-locked
    memory, which must not change until then."""
    return vector if vector.device == memory.device else memory.copy_(vector, non_blocking=True)


def _lock(driver: Any, memory: Tensor) -> bool:
    """Whether the driver has locked this memory."""
    if driver is None:  # torch was built without CUDA, and tests pretend a device
        return False
    if int(driver.cudaHostRegister(memory.data_ptr(), memory.nbytes, _PORTABLE)) == 0:
        return True
    with suppress(RuntimeError):  # the refusal, which the next launch of a kernel would report
        torch.zeros(1, device="cuda")
    return False


def _unlock(driver: Any, memory: Tensor) -> None:
    driver.cudaHostUnregister(memory.data_ptr())
