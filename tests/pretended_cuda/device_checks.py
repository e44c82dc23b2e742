"""What the pretended device promises, each in a function: called by name, in the given order.

    python -m tests.pretended_cuda python -m tests.pretended_cuda.device_checks memory same_values
"""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor

ops = torch.ops.pretended_cuda


def taken() -> tuple[dict[str, int], dict[str, int]]:
    return dict(ops.launches()), dict(ops.waits())


def same_values() -> None:
    """Results, gradients, views, random values and types, as on the CPU."""
    made = torch.Generator().manual_seed(0)
    x, w = (torch.randn(4, 6, generator=made) for _ in range(2))

    def compute(x: Tensor, w: Tensor) -> list[Tensor]:
        x, w = (t.detach().clone().requires_grad_() for t in (x, w))
        y = torch.nn.functional.silu(x[:, 1:5].T @ w[:, ::2]).unfold(0, 2, 1).cumsum(0)
        padded = torch.zeros(3, 9, device=x.device)
        padded[:, 2:5] = y.detach()[:, :3, 0]
        y.square().sum().backward()
        assert x.grad is not None
        assert w.grad is not None
        stacked = torch.stack([x, w]).flip(0).to(torch.bfloat16).float()
        return [y.detach(), x.grad, w.grad, padded, stacked, x.detach().to(torch.float64)]

    for ours, theirs in zip(compute(x.cuda(), w.cuda()), compute(x, w), strict=True):
        assert ours.is_cuda
        assert ours.device == torch.device("cuda", 0)
        # Copies of views have other strides, and products then other last bits.
        torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-6, atol=1e-6)
    there = torch.ones(5, device="cuda:3")
    assert there.device.index == 3
    assert torch.equal(there.to("cuda:1").cpu(), torch.ones(5))
    torch.cuda.set_device(2)
    assert torch.empty(1, device="cuda").device.index == 2
    with torch.cuda.device(5):
        assert torch.cuda.current_device() == 5
    assert torch.cuda.current_device() == 2


def mixed_devices() -> None:
    here, there, host = (torch.ones(3, device=d) for d in ("cuda:0", "cuda:1", "cpu"))
    for other in (there, host):
        with pytest.raises(RuntimeError, match="same device"):
            here + other
        with pytest.raises(RuntimeError, match="same device"):
            torch.cat([here, other])
    assert torch.equal((here + torch.tensor(2.0)).cpu(), torch.full((3,), 3.0))
    here.copy_(there)


def launches_and_waits() -> None:
    x = torch.ones(3, device="cuda")
    pinned = torch.ones(3).pin_memory()
    assert pinned.is_pinned()
    assert not torch.ones(3).is_pinned()
    assert torch.empty(3, pin_memory=True)[1:].is_pinned()
    taken()
    y = (x * 2).add_(1)
    x.copy_(pinned, non_blocking=True)
    pinned.copy_(x, non_blocking=True)
    launched, waited = taken()
    assert sum(launched.values()) == 4, launched
    assert not waited, waited
    for wait in (y.sum().item, y.cpu, y.nonzero, torch.cuda.synchronize, lambda: bool(y[0] > 1),
                 lambda: torch.ones(3).copy_(y, non_blocking=True),
                 torch.cuda.current_stream().synchronize, lambda: torch.tensor(1.0, device="cuda")):
        taken()
        wait()
        _, waited = taken()
        assert sum(waited.values()) == 1, (wait, waited)
        torch.cuda.set_sync_debug_mode("error")
        with pytest.raises(RuntimeError, match="synchronizing"):
            wait()
        torch.cuda.set_sync_debug_mode("default")
    lists = [torch.ones(2, device="cuda"), torch.ones(3, device="cuda")]
    taken()
    torch._foreach_zero_(lists)
    assert taken()[0] == {"aten::_foreach_zero_": 1}
    assert not any(t.any() for t in lists)


def wide_products() -> None:
    """Those with an out_dtype, against products in fp64."""
    made = torch.Generator().manual_seed(0)
    a, b, c = (torch.randn(shape, generator=made) for shape in ((5, 64), (64, 7), (5, 7)))
    a, b = a.bfloat16(), b.bfloat16()
    exact = a.double() @ b.double()
    ours = torch.mm(a.cuda(), b.cuda(), out_dtype=torch.float32)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.cpu().double(), exact, rtol=1e-6, atol=1e-5)
    assert not torch.allclose((a @ b).double(), exact, rtol=1e-6, atol=1e-5)
    added = c.cuda()
    torch.addmm(added, a.cuda(), b.cuda(), out_dtype=torch.float32, beta=0.5, alpha=2, out=added)
    torch.testing.assert_close(added.cpu().double(), 0.5 * c.double() + 2 * exact, rtol=1e-6,
                               atol=1e-5)
    fresh = torch.full((5, 7), torch.nan, device="cuda")
    torch.addmm(fresh, a.cuda(), b.cuda(), out_dtype=torch.float32, beta=0, out=fresh)
    assert torch.equal(fresh, ours)
    with pytest.raises(RuntimeError, match="out_dtype"):
        torch.mm(a.cuda(), b.cuda(), out_dtype=torch.float64)
    with pytest.raises(RuntimeError, match="differ in type"):
        torch.mm(a.cuda(), b.float().cuda(), out_dtype=torch.float32)
    batched = torch.bmm(a.cuda()[None], b.cuda()[None], out_dtype=torch.float32)
    assert torch.equal(batched[0], ours)


def rms_norm() -> None:
    """The fused operator against its definition, in fp64."""
    made = torch.Generator().manual_seed(0)
    x, w, g = (torch.randn(shape, generator=made, dtype=torch.float64)
               for shape in ((3, 5, 8), (8,), (3, 5, 8)))

    def compute(device: str, fused: bool) -> list[Tensor]:
        u, v = (t.to(device).requires_grad_() for t in (x, w))
        y = (torch.nn.functional.rms_norm(u, [8], v, 1e-3) if fused else
             u / (u.square().mean(-1, keepdim=True) + 1e-3).sqrt() * v)
        y.backward(g.to(device))
        assert u.grad is not None
        assert v.grad is not None
        return [y.detach().cpu(), u.grad.cpu(), v.grad.cpu()]

    assert torch._C._dispatch_has_kernel_for_dispatch_key("aten::_fused_rms_norm_backward", "CUDA")
    taken()
    found = compute("cuda", fused=True)
    assert {"aten::_fused_rms_norm", "aten::_fused_rms_norm_backward"} <= taken()[0].keys()
    for ours, exact in zip(found, compute("cpu", fused=False), strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-12, atol=1e-12)


def memory() -> None:
    start = torch.cuda.memory_allocated()
    x = torch.empty(1000, device="cuda")
    y = torch.empty(500, device="cuda:1")
    assert torch.cuda.memory_allocated() == start + 4000
    assert torch.cuda.memory_allocated(1) == y.nbytes
    del x
    assert torch.cuda.memory_allocated() == start
    assert torch.cuda.max_memory_allocated() >= start + 4000
    torch.cuda.reset_peak_memory_stats()
    assert torch.cuda.max_memory_allocated() == start
    pinned = torch.empty(1000, pin_memory=True)
    assert torch.cuda.host_memory_stats()["allocated_bytes.current"] == 4096  # a power of two
    del pinned
    assert torch.cuda.host_memory_stats()["allocated_bytes.current"] == 0


def sticky_errors() -> None:
    """After an index out of range, nothing works on any device, as after an assertion there."""
    table, x = torch.ones(4, 2, device="cuda"), torch.ones(3, device="cuda:1")
    with pytest.raises(torch.AcceleratorError, match="device-side assert"):
        torch.nn.functional.embedding(torch.tensor([7], device="cuda"), table)
    for work in (x.sum, x.cpu, x.clone, torch.cuda.synchronize):
        with pytest.raises(torch.AcceleratorError, match="device-side assert"):
            work()
    torch.ones(3).sum()


if __name__ == "__main__":
    for name in sys.argv[1:]:
        globals()[name]()
