"""What clients report of the rows of their second moments, and how they scale them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedrun.aggregation.bounds import adamw_step_bound
from fedrun.flags import resolve
from fedrun.model.names import ParameterNames
from fedrun.strategies.base import adamw_ratio
from fedrun.training.optimizer import LocalOptimizer
from fedrun.training.params import FlatParams
from fedrun.training.row_moments import count_rows, row_roots, scale_rows

LR, CLIP, BETA1, BETA2 = 1e-2, 0.7, 0.8, 0.95


class Some(nn.Module):
    """Parameters of several shapes; in the order of their names a matrix lies in the middle."""

    names = ParameterNames(matrices=frozenset({"b"}))

    def __init__(self) -> None:
        super().__init__()
        for name, shape in (("a", (5, 8)), ("b", (4, 6)), ("c", (7,)), ("d", (3, 1, 4))):
            setattr(self, name, nn.Parameter(torch.zeros(shape, dtype=torch.float64)))


def optimizer_of(personal: str | None = None, **flags: Any) -> LocalOptimizer:
    config = resolve("fed_avg", {"lr": LR, "weight_decay": 0, "grad_clip": CLIP, "num_clients": 2,
                                 "client_moments": "average_rows", "beta1": BETA1, "beta2": BETA2,
                                 **flags})
    return LocalOptimizer(FlatParams(Some(), personal), config, 10**6)


def trained(optimizer: LocalOptimizer, steps: int, seed: int = 0) -> list[Tensor]:
    """Steps on gradients of all sizes, zeros in the second row of `a`; the gradients as clipped."""
    made, given = torch.Generator().manual_seed(seed), []
    sizes = torch.randn(optimizer.flat.size, generator=made, dtype=torch.float64).exp()
    sizes[8:16] = 0
    for step in range(steps):
        noise = torch.randn(optimizer.flat.size, generator=made, dtype=torch.float64)
        optimizer.flat.grad.copy_(sizes * noise)
        optimizer.step(step)
        given.append(optimizer.flat.grad.clone())
    return given


def roots_by_hand(gradients: list[Tensor], flat: FlatParams, names: str) -> list[float]:
    """The root of the mean over each row of AdamW's second moment, a mean of squares."""
    weights = [(1 - BETA2) * BETA2**age for age in range(len(gradients))]
    total = math.fsum(weights)
    squares = [w * g**2 for w, g in zip(weights, reversed(gradients), strict=True)]
    v = torch.stack(squares).sum(0) / total
    return [math.sqrt(row.mean()) for name, value in flat.views(v) if name in names
            for row in value.reshape(-1, value.shape[-1])]


@pytest.mark.parametrize(("flags", "names"), [
    ({}, "abcd"), ({"local_optimizer": "muon"}, "acd"), ({"personal": "a,d"}, "bc"),
    ({"personal": "c", "local_optimizer": "muon"}, "ad")])
def test_a_row_has_the_root_of_its_mean_square(flags: dict[str, Any], names: str) -> None:
    """Of what is shared and AdamW updates."""
    optimizer = optimizer_of(**flags)
    gradients = trained(optimizer, 6)
    expected = roots_by_hand(gradients, optimizer.flat, names)
    assert count_rows(optimizer.flat, "local_optimizer" in flags) == len(expected)
    torch.testing.assert_close(row_roots(optimizer), torch.tensor(expected, dtype=torch.float64),
                               rtol=1e-12, atol=0)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_rows_are_scaled_to_the_means(optimizer: str) -> None:
    """Elements keep their proportions; a row of zeros is the mean all over; where there is no mean
    nothing changes, and of personal parameters and matrices nothing ever does."""
    one = optimizer_of("d", local_optimizer=optimizer)
    trained(one, 6)
    before, roots = {name: t.clone() for name, t in one.state.items()}, row_roots(one)
    means = roots * torch.linspace(0.2, 3, len(roots), dtype=torch.float64)
    means[1] = 0.01  # where the client has zeros
    means[3] = 0
    scale_rows(one, means)
    wanted = torch.where(means > 0, means, roots)
    torch.testing.assert_close(row_roots(one), wanted, rtol=1e-12, atol=0)
    v, old = one.state["exp_avg_sq"], before["exp_avg_sq"]
    rows = v[:40].view(5, 8) / old[:40].view(5, 8)
    for number in (0, 2, 3, 4):
        torch.testing.assert_close(rows[number], rows[number, :1].expand(8), rtol=1e-12, atol=0)
    assert bool((v[8:16] == v[8]).all())
    assert torch.equal(v[24:32], old[24:32])
    assert torch.equal(v[-12:], old[-12:])
    assert bool((v[-19:-12] != old[-19:-12]).all()), "a vector is one row"
    m = one.state["exp_avg"]
    if optimizer == "muon":
        assert torch.equal(m[40:64], before["exp_avg"][40:64])
    largest = adamw_ratio(BETA1, BETA2, 6) * v[:40].sqrt()
    torch.testing.assert_close(m[:40], before["exp_avg"][:40].clamp(-largest, largest),
                               rtol=1e-14, atol=0)
    assert int((m != before["exp_avg"]).sum()) > 0


def test_before_its_first_step_a_client_has_nothing_to_scale() -> None:
    optimizer = optimizer_of()
    means = torch.full((count_rows(optimizer.flat, muon=False),), 0.1, dtype=torch.float64)
    scale_rows(optimizer, means)
    assert optimizer.state == {}
    trained(optimizer, 2)
    optimizer.reset()
    scale_rows(optimizer, means)
    assert not any(bool(t.any()) for t in optimizer.state.values())


@pytest.mark.parametrize("steps", [1, 2, 30])
def test_no_step_is_longer_than_its_bound(steps: int) -> None:
    """However much smaller rows become, and whatever follows."""
    bound, furthest = adamw_step_bound(LR, 0.0, BETA1, BETA2), 0.0
    for seed, growth in enumerate((0.0, 1.0, BETA2 / BETA1, 3.0)):
        optimizer = optimizer_of()
        trained(optimizer, steps, seed)
        roots = row_roots(optimizer)
        scale_rows(optimizer, roots * torch.tensor([1e-9, 1e-4, 0.1, 10]).repeat(9)[:len(roots)])
        sign = optimizer.state["exp_avg"].sign()
        for step in range(30):
            optimizer.flat.grad.copy_(sign * growth**step * 1e-9)
            before = optimizer.flat.vector.clone()
            optimizer.step(steps + step)
            furthest = max(furthest, (optimizer.flat.vector - before).abs().max().item())
    assert 0.5 * bound < furthest <= bound * (1 + 1e-12)


def test_the_smallest_and_largest_numbers_of_float32_are_scaled_without_overflow() -> None:
    optimizer = optimizer_of()
    flat = optimizer.flat
    assert flat.matrices  # AdamW updates them here
    trained(optimizer, 3)
    optimizer.state = {name: t.float() for name, t in optimizer.state.items()}
    flat.grad = flat.grad.float()
    v = optimizer.state["exp_avg_sq"]
    v[:8] = 0
    v[3] = torch.finfo(torch.float32).smallest_normal
    means = torch.full((count_rows(flat, muon=False),), CLIP)
    scale_rows(optimizer, means)
    assert bool(v.isfinite().all())
    torch.testing.assert_close(row_roots(optimizer), means, rtol=1e-5, atol=0)


def test_a_number_that_is_none_stays_none() -> None:
    optimizer = optimizer_of()
    optimizer.flat.grad[5] = math.inf
    optimizer.step(0)
    found = row_roots(optimizer)
    assert found.isnan().nonzero().tolist() == [[0]]
