"""Memory shared by the processes of one machine: one process creates a vector, others map it.

On GPUs NCCL moves vectors between the devices of a machine. On CPUs gloo would send them through
the machine's network stack, with several copies, although a neighbour can simply read them.

A vector lives in an anonymous file of the kernel (memfd). Since no file system holds it, nothing is
left behind however its processes end, and the small /dev/shm of a container is no limit. Other
processes find it by process ID and file descriptor, and check its stamp: containers on one machine
do not see each other's processes, so the same process ID may belong to a different process there.
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
_VECTOR_OFFSET = mmap.PAGESIZE  # bytes; the page before the vector starts with the stamp
NO_ADDRESS = (0, 0, 0)
"""Stands for a buffer that could not be created."""


def machine_id() -> int:
    """An ID shared by all processes that can share memory: those of this machine, or of one
    container on it. 0 if memory cannot be shared (not Linux, or a sandbox that forbids it)."""
    try:
        os.close(os.memfd_create(_NAME))
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8")
        pid_namespace = os.stat("/proc/self/ns/pid").st_ino
    except (AttributeError, OSError):
        return 0
    name = hashlib.sha256(f"{boot.strip()} {pid_namespace}".encode()).digest()
    return int.from_bytes(name[:8]) >> 1


class SharedBuffer:
    """A vector of zeros in shared memory. Other processes may `open` it until `close` is called;
    tensors that are open by then stay valid."""

    def __init__(self, address: tuple[int, int, int]) -> None:
        self.address = address
        """Process ID, file descriptor and stamp: what `open` needs."""

    @classmethod
    def create(cls, nbytes: int) -> SharedBuffer:
        """Create a buffer of this many bytes. OSError if that is not possible."""
        stamp = secrets.randbits(63)
        buffer = cls((os.getpid(), os.memfd_create(_NAME), stamp))
        try:
            os.pwrite(buffer.address[1], stamp.to_bytes(8), 0)
            os.ftruncate(buffer.address[1], _VECTOR_OFFSET + nbytes)
        except OSError:
            buffer.close()
            raise
        return buffer

    @staticmethod
    def open(address: Sequence[int], size: int, dtype: torch.dtype) -> Tensor:
        """Map the buffer with this address: a tensor, (size,), in the memory of its creator.

        OSError if it cannot be mapped, or if something else is found there.
        """
        process, descriptor, stamp = address
        path = f"/proc/{process}/fd/{descriptor}"
        # Look at the link first: opening another kind of file, such as a pipe, may block.
        if not os.readlink(path).startswith(f"/memfd:{_NAME}"):
            raise FileNotFoundError(f"{path} is not a buffer of fedrun")
        with open(path, "r+b", buffering=0) as file:
            if file.read(8) != stamp.to_bytes(8):
                raise FileNotFoundError(f"{path} is a buffer of another run")
            memory = mmap.mmap(file.fileno(), 0)
        return torch.frombuffer(memory, dtype=dtype, count=size, offset=_VECTOR_OFFSET)

    def close(self) -> None:
        os.close(self.address[1])
