"""NCCL between pretended GPUs: gloo that takes tensors of a GPU alone, and one rank for each GPU.

As NCCL does: the ranks connect at the first collective; two of them on one GPU are refused unless
NCCL_HOSTID says that they are on different hosts.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.cuda.nccl
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import (
    AllgatherOptions,
    AllreduceOptions,
    AllToAllOptions,
    ProcessGroupGloo,
)

from tests.pretended_cuda.cuda_module import properties, uncounted

BACKEND = "pretended_nccl"
TYPES = (torch.int8, torch.uint8, torch.int32, torch.int64, torch.float16, torch.float32,
         torch.float64, torch.bfloat16)


class Work:
    """A collective under way, from which tensors get what arrives on the host."""

    def __init__(self, gloo: Any, hosts: Sequence[Tensor], tensors: Sequence[Tensor]) -> None:
        self._gloo, self._hosts, self._tensors = gloo, hosts, tensors
        self._copied = False

    def is_completed(self) -> bool:
        if not self._gloo.is_completed():
            return False
        if self._gloo.is_success():
            self._copy()
        return True

    def is_success(self) -> bool:
        return bool(self._gloo.is_success())

    def exception(self) -> Any:
        return self._gloo.exception()

    def wait(self, *timeout: timedelta) -> bool:
        self._gloo.wait(*timeout)
        self._copy()
        return True

    def _copy(self) -> None:
        if not self._copied:
            with uncounted():
                for tensor, host in zip(self._tensors, self._hosts, strict=True):
                    tensor.copy_(host)
            self._copied = True


def _require_usable(tensor: Tensor) -> None:
    if not tensor.is_cuda:
        raise RuntimeError(f"No backend type associated with device type {tensor.device.type}")
    if not tensor.is_contiguous() or tensor.dtype not in TYPES:
        raise RuntimeError(f"NCCL takes no tensor of {tensor.dtype} with strides "
                           f"{tensor.stride()}")


class PretendedNccl(dist.ProcessGroup):
    """A group of ranks with a pretended GPU each."""

    def __init__(self, store: Any, rank: int, size: int, timeout: timedelta) -> None:
        super().__init__(rank, size)  # type: ignore[call-arg]
        self._store, self._timeout = store, timeout
        self._gloo: Any = None

    def _connect(self, tensor: Tensor) -> Any:
        if self._gloo is None:
            mine = (f"{os.environ.get('NCCL_HOSTID', 'this host')}, "
                    f"{properties(tensor.device).uuid}")
            self._store.set(f"gpu of {self.rank()}", mine)
            for rank in range(self.size()):
                if rank != self.rank() and self._store.get(f"gpu of {rank}").decode() == mine:
                    raise RuntimeError(f"NCCL error: invalid usage (pretended): Duplicate GPU "
                                       f"detected: rank {self.rank()} and rank {rank} both on "
                                       f"{tensor.device}")
            self._gloo = ProcessGroupGloo(self._store, self.rank(), self.size(),
                                               self._timeout)
        return self._gloo

    def allreduce(self, tensors: Any, opts: Any = None) -> Any:  # type: ignore[override]
        tensor, = tensors
        _require_usable(tensor)
        with uncounted():
            gloo, host = self._connect(tensor), tensor.cpu()
        return Work(gloo.allreduce([host], opts or AllreduceOptions()), [host], [tensor])

    def all_to_all_single(self, output: Tensor, input: Tensor, output_sizes: list[int],
                          input_sizes: list[int], opts: Any = None) -> Any:
        _require_usable(output)
        _require_usable(input)
        with uncounted():
            gloo, received, sent = self._connect(output), output.cpu(), input.cpu()
        return Work(gloo.alltoall_base(received, sent, output_sizes, input_sizes,
                                       opts or AllToAllOptions()), [received], [output])

    alltoall_base: Any = all_to_all_single  # its name in older versions of torch

    def allgather(self, outputs: Any, inputs: Any, opts: Any = None) -> Any:
        (parts,), (mine,) = outputs, inputs
        for tensor in (mine, *parts):
            _require_usable(tensor)
        with uncounted():
            gloo, gathered = self._connect(mine), [part.cpu() for part in parts]
            work = gloo.allgather([gathered], [mine.cpu()], opts or AllgatherOptions())
        return Work(work, gathered, parts)

    def shutdown(self) -> None:
        self._gloo = None


def install() -> None:
    """Make groups of the backend "nccl" pretended ones."""
    patched: Any = dist
    dist.Backend.register_backend(BACKEND, PretendedNccl, devices=["cuda"])
    new_group = dist.new_group

    @functools.wraps(new_group)
    def pretended(ranks: Any = None, timeout: Any = None, backend: Any = None, **rest: Any) -> Any:
        return new_group(ranks, timeout, BACKEND if backend == "nccl" else backend, **rest)

    patched.new_group = pretended
    nccl: Any = torch.cuda.nccl
    nccl.version = lambda: (2, 0, 0)
