"""Memory that processes of one machine share: a vector that one of them has made, the others map.

On GPUs NCCL moves vectors between the devices of a machine. On CPUs gloo would send them through
the machine's own network stack, several copies for what a neighbour can simply read.

A vector lies in an anonymous file of the kernel (memfd). No file system holds it: nothing stays
behind, however its processes end, and the small /dev/shm of a container is no limit. Others find it
by process and descriptor, and make sure by its stamp that it is the one they were told of: in
containers of their own, processes of one machine do not see each other, or others in their place.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import secrets
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

_NAME = "fedrun"
_HEAD = mmap.PAGESIZE  # bytes before the vector, which begin with the stamp
NOWHERE = (0, 0, 0)
"""The address of a vector that could not be made."""


def machine() -> int:
    """A number that is the same for all processes of this machine that can see each other: those of
    one container, where there are several; 0 where memory cannot be shared (systems other than
    Linux, or a sandbox that forbids it)."""
    try:
        os.close(os.memfd_create(_NAME))
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8")
        processes = os.stat("/proc/self/ns/pid").st_ino
    except (AttributeError, OSError):
        return 0
    name = hashlib.sha256(f"{boot.strip()} {processes}".encode()).digest()
    return int.from_bytes(name[:8]) >> 1


class SharedBuffer:
    """A new vector of zeros that others may map until this is closed; the maps outlive it."""

    def __init__(self, nbytes: int) -> None:
        stamp = secrets.randbits(63)
        self._descriptor = os.memfd_create(_NAME)
        try:
            os.pwrite(self._descriptor, stamp.to_bytes(8), 0)
            os.ftruncate(self._descriptor, _HEAD + nbytes)
        except OSError:
            self.close()
            raise
        self.address = os.getpid(), self._descriptor, stamp

    def close(self) -> None:
        os.close(self._descriptor)


def attach(address: Sequence[int], size: int, dtype: torch.dtype) -> Tensor:
    """The vector of an SharedBuffer's address, (size,): the same memory as its maker's.

    OSError where it cannot be reached.
    """
    process, descriptor, stamp = address
    path = f"/proc/{process}/fd/{descriptor}"
    if not os.readlink(path).startswith(f"/memfd:{_NAME}"):  # to open another's file may block
        raise FileNotFoundError(f"{path} is not fedrun's")
    with open(path, "r+b", buffering=0) as file:
        if file.read(8) != stamp.to_bytes(8):
            raise FileNotFoundError(f"{path} is not this run's")
        memory = mmap.mmap(file.fileno(), 0)
    return torch.frombuffer(memory, dtype=dtype, count=size, offset=_HEAD)
