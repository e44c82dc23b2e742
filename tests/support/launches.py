"""What a GPU would be asked to do, counted without one, and operators that only GPUs have."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

NO_LAUNCH = ("aten::empty", "aten::new_empty", "aten::empty_like", "aten::empty_strided",
             "aten::detach", "aten::alias", "aten::_unsafe_view", "aten::resize_")


class Launches(TorchDispatchMode):
    """Counts operators by name: those that a GPU would launch a kernel for. A view or new memory is
    no launch; a value that is read is none either, but a wait (`aten::_local_scalar_dense`)."""

    def __init__(self) -> None:
        super().__init__()
        self.counted: Counter[str] = Counter()

    @property
    def total(self) -> int:
        return sum(self.counted.values())

    def __torch_dispatch__(self, operator: Any, types: Any, args: tuple[Any, ...] = (),
                           kwargs: dict[str, Any] | None = None) -> Any:
        name, returns = operator._schema.name, operator._schema.returns
        view = any(r.alias_info is not None and not r.alias_info.is_write for r in returns)
        if not view and name not in NO_LAUNCH:
            self.counted[name] += 1
        return operator(*args, **kwargs or {})


@contextmanager
def fp32_products_of_bf16() -> Iterator[None]:
    """The products of bf16 with an fp32 result, which torch has for GPUs, on the CPU."""
    library = torch.library.Library("aten", "IMPL")

    def mm(a: Tensor, b: Tensor, out_dtype: torch.dtype) -> Tensor:
        return a.to(out_dtype) @ b.to(out_dtype)

    def mm_out(a: Tensor, b: Tensor, out_dtype: torch.dtype, *, out: Tensor) -> Tensor:
        return out.copy_(mm(a, b, out_dtype))

    def addmm_out(sum_: Tensor, a: Tensor, b: Tensor, out_dtype: torch.dtype, *, beta: float = 1,
                  alpha: float = 1, out: Tensor) -> Tensor:
        return out.copy_(beta * sum_ + alpha * mm(a, b, out_dtype))

    for name, kernel in (("mm.dtype", mm), ("mm.dtype_out", mm_out),
                         ("addmm.dtype_out", addmm_out)):
        library.impl(name, kernel, "CPU")
    try:
        yield
    finally:
        library._destroy()
