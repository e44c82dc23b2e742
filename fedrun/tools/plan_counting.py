"""Counts the bytes of tensors, and the arithmetic on them, while code of a run works on the meta
device, where tensors have shapes and no memory."""

from __future__ import annotations

import sys
import weakref
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

LOSS_HEAD = "loss head"
IN_HEAD = {"fedrun.model.loss", "fedrun.model.gpu_head"}  # modules whose tensors are of that item
_FUSED_ADAMW = torch.ops.aten._fused_adamw_  # in place, and without a form for the meta device
_VALUE = torch.ops.aten._local_scalar_dense


class Counting(TorchDispatchMode):
    """What the tensors that are made in its block take, by item, now and at the most.

    A value that the host asks for is 1. Storages count, so a view takes nothing. Products and
    convolutions count as arithmetic, in FLOP (a multiplication and an addition are two).
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flop = 0
        self.now: Counter[str] = Counter()
        """Bytes by item."""
        self.peak: Counter[str] = Counter()
        """The same when all of them together were the most."""
        self._items = ["tensors"]
        self._live: dict[int, tuple[str, int, weakref.ref[Any]]] = {}
        """Item and bytes by the address of a storage."""

    @contextmanager
    def item(self, name: str) -> Iterator[None]:
        """What is made in the block belongs to this item."""
        self._items.append(name)
        try:
            yield
        finally:
            self._items.pop()

    def name(self, item: str, *tensors: Tensor) -> None:
        """These belong to this item."""
        for tensor in tensors:
            key = tensor.untyped_storage()._cdata
            before, size, reference = self._live[key]
            self._live[key] = item, size, reference
            self.now[before] -= size
            self.now[item] += size

    def begin(self) -> None:
        """Forget the peak, and the arithmetic."""
        self.flop, self.peak = 0, self.now.copy()

    def besides(self, more: Mapping[str, int]) -> None:
        """So much is taken besides, for a moment."""
        if self.now.total() + sum(more.values()) > self.peak.total():
            self.peak = self.now + Counter(more)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        packet = func.overloadpacket
        if packet is _FUSED_ADAMW:
            return None
        if packet is _VALUE:
            return 1
        out = func(*args, **(kwargs or {}))
        if packet in flop_registry:
            # But for the type of a product's result, which these formulas do not know.
            known = [arg for arg in args if not isinstance(arg, torch.dtype)]
            self.flop += flop_registry[packet](*known, out_val=out)
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._note(tensor)
        return out

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._live:
            return
        item = LOSS_HEAD if _called_from(IN_HEAD) else self._items[-1]
        self._live[key] = item, size, weakref.ref(storage, lambda _: self._free(key))
        self.now[item] += size
        self.besides({})

    def _free(self, key: int) -> None:
        item, size, _ = self._live.pop(key)
        self.now[item] -= size


def _called_from(modules: set[str]) -> bool:
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        if frame.f_globals.get("__name__") in modules:
            return True
        frame = frame.f_back
    return False


class AsOnGpu(TorchFunctionMode):
    """In its block tensors say that they are on a GPU, so that code takes the way of one."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func == torch.Tensor.is_cuda.__get__:  # type: ignore[attr-defined]
            return True
        return func(*args, **(kwargs or {}))
