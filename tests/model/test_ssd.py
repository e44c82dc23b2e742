"""The chunked scan and its gradients against the recurrence, step by step in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fedrun.model.ssd import ssd_scan, ssd_step


def recurrence(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor,
               state: Tensor) -> tuple[Tensor, Tensor]:
    """H_t = exp(dt_t A) H_{t-1} + dt_t x_t B_t^T, y_t = H_t C_t + D x_t, written head by head."""
    outputs = []
    per_group = x.shape[2] // B.shape[2]
    for t in range(x.shape[1]):
        new_state, y = [], []
        for h in range(x.shape[2]):
            b, c = B[:, t, h // per_group], C[:, t, h // per_group]
            decay = torch.exp(dt[:, t, h] * A[h])[:, None, None]
            update = torch.einsum("b,bp,bn->bpn", dt[:, t, h], x[:, t, h], b)
            new_state.append(decay * state[:, h] + update)
            y.append(torch.einsum("bpn,bn->bp", new_state[-1], c) + D[h] * x[:, t, h])
        state = torch.stack(new_state, dim=1)
        outputs.append(torch.stack(y, dim=1))
    return torch.stack(outputs, dim=1), state


def inputs(seqlen: int, groups: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """x, dt, A, B, C, D and an initial state, all of them leaves that require gradients."""
    generator = torch.Generator().manual_seed(seqlen * 10 + groups)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    batch, heads, headdim, d_state = 2, 4, 3, 5
    values = [normal(batch, seqlen, heads, headdim), normal(batch, seqlen, heads).abs(),
              -normal(heads).exp(), normal(batch, seqlen, groups, d_state),
              normal(batch, seqlen, groups, d_state), normal(heads),
              normal(batch, heads, headdim, d_state)]
    return [value.to(dtype).requires_grad_() for value in values]


def gradients(outputs: tuple[Tensor, Tensor], wrt: list[Tensor]) -> tuple[Tensor, ...]:
    """Gradients of a fixed random projection of all outputs."""
    generator = torch.Generator().manual_seed(1)
    total = sum((o * torch.randn(o.shape, generator=generator, dtype=o.dtype)).sum()
                for o in outputs)
    assert isinstance(total, Tensor)
    return torch.autograd.grad(total, wrt)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("seqlen", [1, 3, 8, 9, 21])
def test_scan_and_its_gradients_equal_the_recurrence(seqlen: int, groups: int) -> None:
    leaves = inputs(seqlen, groups)
    expected = recurrence(*leaves)
    got = ssd_scan(*leaves[:6], chunk_size=8, initial_state=leaves[6])
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(gradients(got, leaves), gradients(expected, leaves),
                               rtol=1e-9, atol=1e-9)


def test_without_an_initial_state_the_scan_starts_from_zero() -> None:
    leaves = inputs(13, 1)
    zero = torch.zeros_like(leaves[6])
    got = ssd_scan(*leaves[:6], chunk_size=4)
    expected = recurrence(*[*leaves[:6], zero])
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(gradients(got, leaves[:6]), gradients(expected, leaves[:6]),
                               rtol=1e-9, atol=1e-9)


def test_step_equals_the_recurrence() -> None:
    leaves = inputs(1, 2)
    x, dt, A, B, C, D, state = leaves
    expected_y, expected_state = recurrence(*leaves)
    y, new_state = ssd_step(x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], D, state)
    torch.testing.assert_close(y, expected_y[:, 0])
    torch.testing.assert_close(new_state, expected_state)


def test_large_steps_give_finite_gradients() -> None:
    """exp of a difference above the diagonal would overflow, and its gradient would be nan."""
    leaves = inputs(16, 1, torch.float32)
    with torch.no_grad():
        leaves[1].mul_(300.0)
    outputs = ssd_scan(*leaves[:6], chunk_size=8, initial_state=leaves[6])
    for gradient in gradients(outputs, leaves):
        assert gradient.isfinite().all()


def test_bf16_products_stay_close() -> None:
    leaves = [leaf.detach() for leaf in inputs(40, 1, torch.float32)]
    exact, _ = ssd_scan(*leaves[:6], chunk_size=8)
    low, _ = ssd_scan(*leaves[:6], chunk_size=8, matmul_dtype=torch.bfloat16)
    assert low.dtype == torch.float32
    error = (low - exact).norm() / exact.norm()
    assert 1e-5 < error < 1e-2  # rounded to 8 bits, and no worse
