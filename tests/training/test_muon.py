"""Muon for matrices, AdamW for the rest: its arithmetic, the bound of its steps, its refusals."""

from __future__ import annotations

import math
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import nn

from fedrun.aggregation.bounds import (
    MUON_SINGULAR,
    adamw_step_bound,
    muon_step_bound,
    update_bound,
)
from fedrun.common.errors import InputError
from fedrun.config import FederatedConfig
from fedrun.federation.schedule import Schedule
from fedrun.flags import resolve
from fedrun.model.build import longest_side
from fedrun.model.config import ModelConfig, ModelShape, TransformersShape
from fedrun.model.mamba2 import Mamba2LM
from fedrun.model.names import ParameterNames
from fedrun.model.transformers_lm import TransformersLM, build
from fedrun.training.muon import COEFFICIENTS, ITERATIONS, orthogonalise
from fedrun.training.optimizer import LocalOptimizer
from fedrun.training.params import FlatParams
from tests.support.naive_muon import A, B, C, by_svd, polynomial
from tests.support.runs import Run

LR, DECAY, CLIP = 1e-2, 0.1, 2.0


class Two(nn.Module):
    """A matrix, and on both sides of it in the vector what AdamW updates."""

    def __init__(self, rows: int = 5, columns: int = 3, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.zeros(4, dtype=dtype))
        self.matrix = nn.Parameter(torch.zeros(rows, columns, dtype=dtype))
        self.table = nn.Parameter(torch.zeros(2, 2, dtype=dtype))
        self.names = ParameterNames(matrices=frozenset({"matrix"}))


def optimizer_of(model: nn.Module | Mamba2LM, **flags: Any) -> LocalOptimizer:
    config = resolve("fed_avg", {"lr": LR, "local_optimizer": "muon", **flags})
    return LocalOptimizer(FlatParams(model), config, 10**6)


@pytest.mark.parametrize("shape", [(7, 20), (20, 7), (9, 9), (1, 6), (6, 1)])
def test_singular_values_become_those_of_the_polynomial(shape: tuple[int, int]) -> None:
    """In float64, in fp32, and as torch's own in bf16, whatever the gradient's scale."""
    from torch.optim._muon import _zeropower_via_newtonschulz as of_torch
    matrix = np.random.default_rng(0).normal(size=shape)
    expected = torch.from_numpy(by_svd(matrix))
    for scale in (1e-4, 1.0, 1e4):
        given = torch.from_numpy(scale * matrix)
        torch.testing.assert_close(orthogonalise(given), expected, rtol=0, atol=1e-12)
        torch.testing.assert_close(orthogonalise(given.float()).double(), expected, rtol=0,
                                   atol=3e-6)
        torch.testing.assert_close(of_torch(given, COEFFICIENTS, ITERATIONS, 1e-7).double(),
                                   expected, rtol=0, atol=0.03)
    assert not orthogonalise(torch.zeros(shape)).any()


@pytest.mark.parametrize("beta", [0.95, 0.7])
def test_three_steps_by_hand(beta: float) -> None:
    """The formulas in numpy: clipping of the whole gradient, both momenta, both steps."""
    optimizer = optimizer_of(Two(), weight_decay=DECAY, grad_clip=CLIP, warmup=2,
                             muon_momentum=beta)
    random = np.random.default_rng(0)
    w = random.normal(size=23)
    optimizer.flat.vector.copy_(torch.from_numpy(w))
    matrix, rest = slice(4, 19), np.r_[0:4, 19:23]
    m, v, buffer = np.zeros(8), np.zeros(8), np.zeros((5, 3))
    for t in range(1, 4):
        lr, g = LR * min(t / 2, 1), random.normal(size=23)
        optimizer.flat.grad.copy_(torch.from_numpy(g))
        optimizer.step(t - 1)
        g *= CLIP / (np.linalg.norm(g) + 1e-6)
        m, v = 0.9 * m + 0.1 * g[rest], 0.999 * v + 0.001 * g[rest]**2
        w[rest] -= lr * (DECAY * w[rest]
                         + m / (1 - 0.9**t) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8))
        of_matrix = g[matrix].reshape(5, 3)
        buffer = beta * buffer + (1 - beta) * of_matrix
        step = by_svd((1 - beta) * of_matrix + beta * buffer) * 0.2 * math.sqrt(5)
        w[matrix] -= lr * (DECAY * w[matrix] + step.ravel())
    np.testing.assert_allclose(optimizer.flat.vector.numpy(), w, rtol=0, atol=1e-13)
    assert {name: len(t) for name, t in optimizer.state.items() if t.ndim} == {
        "exp_avg": 23, "exp_avg_sq": 8}, "no second moment of the matrix"
    assert optimizer.steps == 3
    optimizer.reset()
    assert not any(t.any() for t in optimizer.state.values())


@pytest.mark.parametrize("exact", [True, False])
def test_steps_are_those_of_torchs_muon_and_adamw(exact: bool, monkeypatch: pytest.MonkeyPatch
                                                  ) -> None:
    """On a model's own matrices; and with torch's own iterations, but for the precision of bf16."""
    shape = ModelConfig(n_layer=2, d_model=16, d_state=8, headdim=8)
    plain, ours = Mamba2LM(shape, 50).double(), Mamba2LM(shape, 50).double()
    plain.init_weights(0)
    ours.init_weights(0)
    if exact:
        monkeypatch.setattr("torch.optim._muon._zeropower_via_newtonschulz",
                            lambda grad, *_: torch.from_numpy(by_svd(grad.numpy())))
    else:
        plain.float()
        ours.float()
    optimizer = optimizer_of(ours, weight_decay=DECAY)
    named = dict(plain.named_parameters())
    matrices = {f"backbone.layers.{k}.mixer.{name}.weight" for k in (0, 1)
                for name in ("in_proj", "out_proj")}
    assert ours.names.matrices == matrices
    muon = torch.optim.Muon([named[name] for name in matrices], lr=LR, weight_decay=DECAY,
                            adjust_lr_fn="match_rms_adamw")
    others = torch.optim.AdamW([p for name, p in named.items() if name not in matrices], lr=LR,
                               weight_decay=DECAY)
    tokens = torch.randint(0, 50, (2, 16), generator=torch.Generator().manual_seed(0))
    for number in range(3):
        plain.compute_grad(tokens)
        ours.compute_grad(tokens)
        muon.step()
        others.step()
        optimizer.step(number)
    for name, p in ours.named_parameters():
        torch.testing.assert_close(p, named[name], rtol=0, atol=1e-9 if exact else 0.1 * LR)


# ---- how far a step goes -------------------------------------------------------------------------

def test_no_singular_value_exceeds_the_bound() -> None:
    """On [0, 1], and no further iteration leaves [0, 1.2024]: by its extrema there."""
    s = np.linspace(0, 1, 200_001)
    assert 1.2023 < polynomial(s).max() < 1.2024 < MUON_SINGULAR
    assert polynomial(s).min() == 0
    assert polynomial(s[s >= 0.0015]).min() > 0.67
    extrema = [x.real for x in np.roots([5 * C, 0, 3 * B, 0, A]) if x.real > 0]
    values = [A * x + B * x**3 + C * x**5 for x in (0, *extrema, 1.2024)]
    assert min(values) == 0
    assert max(values) < 1.2024


@pytest.mark.parametrize(("rows", "columns"), [(40, 24), (24, 40), (1, 1000)])
def test_no_step_is_longer_than_its_bound(rows: int, columns: int) -> None:
    """In fp32. A gradient with one row has one singular value; two of a diagonal can be chosen so
    that the larger ends at the polynomial's maximum."""
    side, worst = max(rows, columns), 0.0
    peak = np.linspace(0, 1, 100_001)[np.argmax(polynomial(np.linspace(0, 1, 100_001)))]
    noise = torch.Generator().manual_seed(0)
    gradients = [torch.randn(rows, columns, generator=noise),
                 torch.zeros(rows, columns).index_fill_(1, torch.tensor([3]), 1.0)]
    if rows > 1:
        gradients.append(torch.zeros(rows, columns))
        gradients[-1][0, 0], gradients[-1][1, 1] = peak, math.sqrt(1 - peak**2)
    bound = muon_step_bound(LR, 0.0, side)
    for gradient in gradients:
        optimizer = optimizer_of(Two(rows, columns, torch.float32), weight_decay=0)
        matrix = dict(optimizer.flat.views(optimizer.flat.vector))["matrix"]
        for number in range(4):
            matrix.zero_()
            dict(optimizer.flat.views(optimizer.flat.grad))["matrix"].copy_(gradient)
            optimizer.step(number)
            worst = max(worst, float(matrix.abs().max()))
    assert worst <= bound
    assert worst > (0.99 if rows > 1 else 0.55) * bound


GPT2 = {"model_type": "gpt2", "n_layer": 1, "n_embd": 16, "n_head": 2, "n_positions": 32}
MAMBA = {"model_type": "mamba", "num_hidden_layers": 1, "hidden_size": 16, "state_size": 4}


@pytest.mark.parametrize(("shape", "matrices", "side"), [
    (ModelConfig(d_model=32, d_state=8, headdim=8), {"in_proj", "out_proj"}, 152),
    (TransformersShape(GPT2), {"c_attn", "c_proj", "c_fc"}, 64),
    (TransformersShape(MAMBA), {"in_proj", "x_proj", "dt_proj", "out_proj"}, 64)])
def test_the_grid_of_a_round_holds_both_kinds_of_steps(shape: ModelShape, matrices: set[str],
                                                       side: int) -> None:
    """The bound follows from the shape alone; embeddings, heads and A_log are not matrices."""
    model = Mamba2LM(shape, 50) if isinstance(shape, ModelConfig) else TransformersLM(
        build(cast(TransformersShape, shape), 50, 0))
    flat = FlatParams(model)
    assert {part.name.split(".")[-2] for part in flat.matrices} == matrices
    assert longest_side(shape) == max(max(part.shape) for part in flat.matrices) == side
    config = resolve("fed_avg", {"local_optimizer": "muon", "local_updates": 5, "lr": LR,
                                 "beta1": 0.5, "beta2": 0.9, "rounds": 1})
    assert isinstance(config, FederatedConfig)
    object.__setattr__(config, "model", shape)
    bound = Schedule(config, [100] * 4).plan(1, 0.0).bound
    assert bound == update_bound(5, LR, 0.01, 0.5, 0.9, side)
    assert bound == 5 * muon_step_bound(LR, 0.01, side) > 5 * adamw_step_bound(LR, 0.01, 0.5, 0.9)
    assert update_bound(5, LR, 0.01, 0.9, 0.999, side) == 5 * adamw_step_bound(LR, 0.01, 0.9, 0.999)


@pytest.mark.parametrize(("method", "flags", "message"), [
    ("fed_avg", {"client_moments": "average"}, "--client_moments average: must be average_sqrt, k"),
    ("fed_avg", {"client_moments": "average_sqrt", "grad_clip": 1, "personal": "*norm*",
                 "eval_clients": True}, "--personal .norm.: must be none with --local_optimizer m"),
    ("central", {"moments_dtype": "bf16"}, "--moments_dtype bf16: must be fp32 with --local_optim"),
    ("fed_sgd", {}, "--local_optimizer muon: must be adamw for fed_sgd")])
def test_where_it_does_not_fit_it_is_refused(method: str, flags: dict[str, Any], message: str
                                             ) -> None:
    with pytest.raises(InputError, match=message):
        resolve(method, {"local_optimizer": "muon", **flags})


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_runs_have_the_same_bits_in_any_world_and_after_a_stop(run: Run) -> None:
    """With clients' states in memory and on disk; of matrices a state has one moment."""
    flags = ("fed_avg", "--num_clients", 4, "--local_updates", 2, "--grad_clip", 1,
             "--local_optimizer", "muon", "--rounds")
    whole = run(*flags, 4, name="whole")
    assert whole.code == 0, whole.output
    parts = run(*flags, 2, "--client_store", "disk", processes=5, name="parts")
    assert parts.code == 0, parts.output
    parts = run(*flags, 4, processes=3, name="parts")
    assert "resuming from step 2" in parts.output
    assert parts.bits == whole.bits
    assert whole.history[-1]["server_val_loss"] < whole.history[0]["server_val_loss"]
    size = sum(t.numel() for t in whole.model.values())
    matrices = sum(t.numel() for name, t in whole.model.items() if "_proj.weight" in name)
    state = (whole.run_dir / "checkpoints/step_000004/client_0.safetensors").stat().st_size
    assert 0 < state - 4 * (2 * size - matrices) < 1000
