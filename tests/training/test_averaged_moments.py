"""What a client loads of averaged moments, and how far AdamW can step from there."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedrun.aggregation.bounds import adamw_step_bound
from fedrun.flags import resolve
from fedrun.strategies.base import adamw_ratio
from fedrun.training import averaged_moments
from fedrun.training.optimizer import LocalOptimizer
from fedrun.training.params import FlatParams

SIZE, LR, CLIP = 400, 1e-2, 0.7


class Vector(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(SIZE, dtype=dtype))


def optimizer_of(dtype: torch.dtype = torch.float64, **flags: Any) -> LocalOptimizer:
    config = resolve("fed_avg", {"lr": LR, "weight_decay": 0, "grad_clip": CLIP, "num_clients": 2,
                                 "client_moments": "average_sqrt", **flags})
    return LocalOptimizer(FlatParams(Vector(dtype)), config, 10**6)


def averages(seed: int, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """As they may be that were made in different rounds: of all sizes, with nothing in common."""
    made = torch.Generator().manual_seed(seed)
    m, s = (CLIP * 10 ** (-6 * torch.rand(SIZE, generator=made, dtype=torch.float64))
            for _ in range(2))
    m[::7], s[::11] = 0, 0
    sign = torch.rand(SIZE, generator=made).sub_(0.5).sign()
    return {"momentum": (m * sign).to(dtype), "rms": s.to(dtype)}


@pytest.mark.parametrize(("beta1", "beta2"), [(0.9, 0.999), (0.9, 0.95), (0.5, 0.3), (0.0, 0.9)])
@pytest.mark.parametrize("steps", [1, 2, 7, 30, 4000])
def test_no_step_is_longer_than_its_bound(beta1: float, beta2: float, steps: int) -> None:
    """Whatever follows: nothing, gradients that grow as fast as they can hurt most, noise."""
    optimizer = optimizer_of(beta1=beta1, beta2=beta2)
    bound = adamw_step_bound(LR, 0.0, beta1, beta2)
    furthest = 0.0
    for seed, growth in enumerate((0.0, 1.0, beta2 / beta1 if beta1 else 20.0, 3.0, -1.0)):
        loaded = averages(seed)
        averaged_moments.load(optimizer, loaded, steps, ("momentum", "rms"))
        noise = torch.Generator().manual_seed(seed)
        for step in range(40):
            optimizer.flat.grad.copy_(
                torch.randn(SIZE, generator=noise, dtype=torch.float64) if growth < 0 else
                loaded["momentum"].sign() * growth**step * 1e-9)
            before = optimizer.flat.vector.clone()
            optimizer.step(steps + step)
            furthest = max(furthest, (optimizer.flat.vector - before).abs().max().item())
    assert furthest <= bound * (1 + 1e-12)
    if steps > 1000:  # the bound is reached, and what was loaded is cut to it, no further
        assert furthest > 0.9 * bound


@pytest.mark.parametrize(("beta1", "beta2"), [(0.9, 0.999), (0.9, 0.95), (0.0, 0.9), (0.99, 0.999)])
def test_the_largest_ratio_of_moments_is_that_of_the_worst_gradients(beta1: float, beta2: float
                                                                    ) -> None:
    """After t steps: of gradients that grow by b2 / b1, no others have a larger one. Corrected for
    the bias it never exceeds its limit."""
    growth, m, v = beta2 / beta1 if beta1 else 1.0, 0.0, 0.0
    limit = adamw_ratio(beta1, beta2)
    for t in range(1, 200):
        gradient = growth ** (t - 100)
        m, v = beta1 * m + (1 - beta1) * gradient, beta2 * v + (1 - beta2) * gradient**2
        found = m / math.sqrt(v)
        if beta1:
            assert found == pytest.approx(adamw_ratio(beta1, beta2, t), rel=1e-9)
        assert found <= adamw_ratio(beta1, beta2, t) * (1 + 1e-12)
        corrected = adamw_ratio(beta1, beta2, t) * math.sqrt(1 - beta2**t) / (1 - beta1**t)
        assert corrected <= limit * (1 + 1e-12)
    assert adamw_ratio(0.9, 0.999) == pytest.approx(7.27, abs=0.01)


def test_only_what_was_renewed_is_loaded_by_a_client_that_trained_in_the_last_round() -> None:
    optimizer = optimizer_of()
    optimizer.flat.grad.fill_(0.01)
    for step in range(6):
        optimizer.step(step)
    own = {name: t.clone() for name, t in optimizer.state.items()}
    given = averages(1)
    averaged_moments.load(optimizer, given, 6, ())
    assert all(torch.equal(optimizer.state[name], t) for name, t in own.items())

    averaged_moments.load(optimizer, given, 6, ("momentum",))
    assert torch.equal(optimizer.state["exp_avg_sq"], own["exp_avg_sq"])
    largest = adamw_ratio(0.9, 0.999, 6) * own["exp_avg_sq"].sqrt()
    expected = (given["momentum"] * (1 - 0.9**6)).clamp(-largest, largest)
    torch.testing.assert_close(optimizer.state["exp_avg"], expected, rtol=1e-14, atol=0)
    assert 0 < int((expected.abs() == largest).sum()) < SIZE

    averaged_moments.load(optimizer, given, 6, ("rms",))
    torch.testing.assert_close(optimizer.state["exp_avg_sq"],
                               given["rms"]**2 * (1 - 0.999**6), rtol=1e-14, atol=0)

    # One that has missed a round, and one whose moments were reset, take all.
    for before in (6, 0):
        optimizer.load_state({name: t.clone() for name, t in own.items()})
        if not before:
            optimizer.reset()
        averaged_moments.load(optimizer, given, 9, ())
        assert optimizer.steps == 9
        torch.testing.assert_close(optimizer.state["exp_avg_sq"],
                                   given["rms"]**2 * (1 - 0.999**9), rtol=1e-14, atol=0)


@pytest.mark.parametrize(("clip", "steps"), [(0.1, 3), (0.7, 3), (0.7, 3000)])
def test_what_is_reported_keeps_within_the_clip(clip: float, steps: int) -> None:
    """Where rounding would exceed it: one element has all of a gradient's norm for long. In float32
    0.1 itself is more than it."""
    optimizer = optimizer_of(torch.float32, grad_clip=clip)
    for step in range(steps):
        optimizer.flat.grad.zero_()
        optimizer.flat.grad[3] = -1000.0
        optimizer.step(step)
    raw = optimizer.bias_corrected_moments(copy=True)
    assert raw["exp_avg_sq"][3].sqrt().item() > clip
    found = averaged_moments.take(optimizer, ("momentum", "rms"))
    for vector in found.values():
        assert clip * (1 - 1e-3) < vector.abs().max().item() <= clip
    assert averaged_moments.take(optimizer, ()) == {}


def test_a_number_that_is_none_is_not_hidden_by_the_clip() -> None:
    optimizer = optimizer_of(torch.float32)
    optimizer.flat.grad[5] = math.inf
    optimizer.step(0)
    found = averaged_moments.take(optimizer, ("momentum", "rms"))
    assert all(bool(t[5].isnan()) for t in found.values())
