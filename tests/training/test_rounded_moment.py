"""AdamW with its first moment in bf16: its arithmetic, the bound of its steps, whole runs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fedrun.aggregation.bounds import adamw_step_bound
from fedrun.common.errors import InputError
from fedrun.flags import resolve
from fedrun.training import optimizer as module
from fedrun.training.optimizer import LocalOptimizer
from fedrun.training.params import FlatParams
from tests.support.runs import Run

SIZE, LR = 2000, 1e-2


class Vector(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(SIZE))


def optimizer_of(**flags: Any) -> LocalOptimizer:
    config = resolve("fed_avg", {"lr": LR, "weight_decay": 0, "moments_dtype": "bf16", **flags})
    return LocalOptimizer(FlatParams(Vector()), config, 10**6)


def to_bf16(x: np.ndarray, rounded: Any = np.rint) -> np.ndarray:
    """The nearest number with 8 bits of mantissa, the even one of two."""
    mantissa, exponent = np.frexp(x)
    found: np.ndarray = np.ldexp(rounded(mantissa * 2**8), exponent - 8)
    return found


def test_it_is_adamw_whose_first_moment_is_rounded_after_each_step() -> None:
    """And cut to what it can be of exact moments. Against the formulas, in float64."""
    optimizer = optimizer_of(weight_decay=0.1)
    noise = np.random.default_rng(0)
    w, m, v = np.zeros(SIZE), np.zeros(SIZE), np.zeros(SIZE)
    for t in range(1, 21):
        g = noise.normal(size=SIZE) + 0.3
        optimizer.flat.grad.copy_(torch.from_numpy(g))
        optimizer.step(t)
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        w -= LR * (0.1 * w + m / (1 - 0.9**t) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8))
        r = 0.9**2 / 0.999
        limit = to_bf16(np.sqrt(v * (1 - r**t) / (1 - r) / 0.001) * 0.1, np.floor)
        m = np.clip(to_bf16(m), -limit, limit)
    assert optimizer.steps == 20
    state = optimizer.state
    assert (state["exp_avg"].dtype, state["exp_avg_sq"].dtype) == (torch.bfloat16, torch.float32)
    close = np.isclose(state["exp_avg"].double().numpy(), m, rtol=1e-3, atol=1e-12)
    assert close.mean() > 0.95, "but for numbers in the middle of two"
    np.testing.assert_allclose(state["exp_avg_sq"].numpy(), v, rtol=1e-5)
    assert np.abs(optimizer.flat.vector.numpy() - w).max() < 0.01 * LR


def test_slices_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for size in (SIZE, 256):
        monkeypatch.setitem(module.SLICE, "cpu", size)
        optimizer, noise = optimizer_of(), torch.Generator().manual_seed(0)
        for step in range(3):
            optimizer.flat.grad.copy_(torch.randn(SIZE, generator=noise))
            optimizer.step(step)
        found.append((optimizer.flat.vector, *optimizer.state.values()))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize(("beta1", "beta2"), [(0.9, 0.999), (0.9, 0.95), (0.5, 0.3), (0.0, 0.9)])
def test_no_step_is_longer_than_its_bound(beta1: float, beta2: float) -> None:
    """With gradients that grow as fast as they can hurt most: what rounding adds is cut off."""
    optimizer = optimizer_of(beta1=beta1, beta2=beta2)
    scales = torch.rand(SIZE, generator=torch.Generator().manual_seed(0)) + 1  # all mantissas
    (growth, steps), furthest = (beta2 / beta1, 100) if beta1 else (20.0, 10), 0.0
    optimizer.begin_at(10_000)  # early steps have smaller ratios
    for step in range(steps):
        optimizer.flat.vector.zero_()
        torch.mul(scales, 1e-3 * growth**step, out=optimizer.flat.grad)
        optimizer.step(step)
        furthest = max(furthest, optimizer.flat.vector.abs().max().item())
    bound = adamw_step_bound(LR, 0.0, beta1, beta2)
    assert 0.5 * bound < furthest <= bound * (1 + 1e-6)


def test_a_gradient_that_is_not_finite_stays_visible() -> None:
    optimizer = optimizer_of()
    optimizer.flat.grad.fill_(1.0)
    optimizer.flat.grad[7] = torch.nan
    optimizer.step(0)
    assert optimizer.state["exp_avg"].isnan().nonzero().flatten().tolist() == [7]
    assert optimizer.flat.vector.isnan().nonzero().flatten().tolist() == [7]


@pytest.mark.parametrize(("method", "flags", "message"), [
    ("fed_avg", {"client_moments": "average"}, "fp32 with --client_moments average, which takes"),
    ("fed_avg", {"client_moments": "average_sqrt", "grad_clip": 1}, "fp32 with --client_moments"),
    ("central", {"dtype": "fp64"}, "fp32 with --dtype fp64"),
    ("fed_sgd", {}, "fp32 for fed_sgd")])
def test_where_it_does_not_fit_it_is_refused(method: str, flags: dict[str, Any], message: str
                                             ) -> None:
    with pytest.raises(InputError, match=f"--moments_dtype bf16: must be {message}"):
        resolve(method, {"moments_dtype": "bf16", **flags})


@pytest.mark.slow
def test_runs_have_the_same_bits_in_any_world_and_after_a_stop(run: Run) -> None:
    """With clients' states in memory and on disk; and nearly the losses of fp32."""
    flags = ("fed_avg", "--num_clients", 3, "--local_updates", 2, "--rounds", 6, "--moments_dtype")
    whole, exact = (run(*flags, dtype, name=dtype) for dtype in ("bf16", "fp32"))
    parts = run(*flags, "bf16", "--rounds", 3, "--client_store", "disk", processes=4, name="parts")
    assert whole.code == exact.code == parts.code == 0, parts.output
    parts = run(*flags, "bf16", "--client_store", "disk", processes=3, name="parts")
    assert "resuming from step 3" in parts.output
    assert parts.bits == whole.bits != exact.bits
    losses = [done.history[-1]["server_val_loss"] for done in (whole, exact)]
    assert losses[0] == pytest.approx(losses[1], rel=2e-3)
    size = (whole.run_dir / "checkpoints/step_000006/client_0.safetensors").stat().st_size
    other = (exact.run_dir / "checkpoints/step_000006/client_0.safetensors").stat().st_size
    assert 0.74 < size / other < 0.76
