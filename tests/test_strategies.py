"""Every aggregation against a naive one: dictionaries of tensors in float64, written from the
formulas, fed the same client outputs; properties that hold whatever the clients did."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedrun.strategies import STRATEGIES, Strategy
from fedrun.strategies.base import ClientReport, ServerRound
from fedrun.strategies.fed_avg import FedAvg
from fedrun.strategies.fed_entropy import FedEntropy
from fedrun.strategies.fed_fisher import FedFisher
from fedrun.strategies.fed_momentum import DiLoCo, FedMomentum
from fedrun.strategies.fed_opt import FedAdagrad, FedAdam, FedYogi
from fedrun.strategies.fed_sgd import FedSGD
from fedrun.sums import Bounds, TermSum

SHAPES = {"embedding": (30, 7), "in_proj": (5, 11), "A_log": (3,)}
SIZE = sum(math.prod(shape) for shape in SHAPES.values())
UPDATE, GRADIENT = 0.02, 16.0
ROUND_TOKENS = 1000
LR, BETA1, BETA2, WEIGHT_DECAY = 3e-3, 0.9, 0.999, 0.01

Dict = dict[str, Tensor]


@dataclass
class Output:
    """What a client did in one round, recorded in float64."""

    shard_tokens: int
    tokens: int
    entropy: float
    vectors: Dict  # by name: delta, gradient, fisher, exp_avg, exp_avg_sq


def record(clients: int, seed: int) -> list[Output]:
    """Outputs in the sizes that occur: updates below UPDATE, gradients over many powers of ten."""
    generator = torch.Generator().manual_seed(seed)

    def spread(power: int = 1) -> Tensor:
        sizes = 10.0 ** (-5 * torch.rand(SIZE, generator=generator, dtype=torch.float64))
        return (torch.randn(SIZE, generator=generator, dtype=torch.float64) * sizes) ** power

    return [Output(1000 + 300 * k, ROUND_TOKENS - 10 * k, 5 + 0.3 * k - 0.1 * (seed % 20), {
        "delta": (torch.rand(SIZE, generator=generator, dtype=torch.float64) * 2 - 1) * UPDATE,
        "gradient": spread(), "fisher": spread(2), "exp_avg": spread(), "exp_avg_sq": spread(2)})
        for k in range(clients)]


@dataclass
class Server:
    """A model under a strategy, as workers keep it."""

    strategy: Strategy
    dtype: torch.dtype
    clients: int
    moments: bool = False
    exact: bool = True
    model: Tensor = field(init=False)
    number: int = 0

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(99)
        self.model = torch.randn(SIZE, generator=generator, dtype=torch.float64).to(self.dtype)
        self.state = {name: torch.full_like(self.model, value)
                      for name, value in self.strategy.state.items()}
        self.averaged = {n: torch.zeros_like(self.model) for n in ("exp_avg", "exp_avg_sq")}
        self.reference = self.strategy.first_reference(400, self.clients)

    def round(self, outputs: Sequence[Output], left_out: Sequence[int] = (),
              zeroed: Sequence[int] = ()) -> TermSum:
        self.number += 1
        terms = TermSum(self.strategy, SIZE, self.model, self.exact, self.moments)
        terms.begin(Bounds(UPDATE, GRADIENT))
        planned = self.strategy.plan_weights([o.shard_tokens for o in outputs], ROUND_TOKENS)
        names = (*self.strategy.inputs, *(("exp_avg", "exp_avg_sq") if self.moments else ()))
        for k, (output, plan) in enumerate(zip(outputs, planned, strict=True)):
            if k in left_out:
                continue
            weight = self.strategy.client_weight(
                plan, ClientReport(output.tokens, output.entropy), self.reference)
            vectors = {n: output.vectors[n].to(self.dtype) for n in names}
            assert terms.add(vectors, 0.0 if k in zeroed else weight)
        self.reference = self.strategy.next_reference([o.entropy for o in outputs])
        terms.apply(self.model, self.state,
                    ServerRound(self.number, LR, BETA1, BETA2, WEIGHT_DECAY), self.averaged)
        return terms


# ---- the naive references -----------------------------------------------------------------------

def split(vector: Tensor) -> Dict:
    parts = vector.split([math.prod(shape) for shape in SHAPES.values()])
    return {name: part.reshape(shape)
            for (name, shape), part in zip(SHAPES.items(), parts, strict=True)}


def mean(outputs: Sequence[Output], weights: Sequence[float], vector: str) -> Dict:
    return {name: sum(p * split(o.vectors[vector])[name]  # type: ignore[misc]
                      for p, o in zip(weights, outputs, strict=True)) / sum(weights)
            for name in SHAPES}


def by_samples(outputs: Sequence[Output]) -> list[float]:
    return [o.shard_tokens for o in outputs]


def by_tokens(outputs: Sequence[Output]) -> list[float]:
    return [o.tokens for o in outputs]


Rule = Callable[[Dict, Dict, Sequence[Output], int], None]
"""Changes (model, memory) in place; memory starts empty."""


def plain(weights: Callable[[Sequence[Output]], Sequence[float]]) -> Rule:
    def rule(model: Dict, memory: Dict, outputs: Sequence[Output], number: int) -> None:
        step = mean(outputs, weights(outputs), "delta")
        for name in model:
            model[name] = model[name] + step[name]
    return rule


def entropy(temperature: float) -> Rule:
    return plain(lambda outputs: torch.softmax(
        torch.tensor([-o.entropy / temperature for o in outputs], dtype=torch.float64), 0).tolist())


def momentum(form: str, eta: float, b: float) -> Rule:
    def rule(model: Dict, memory: Dict, outputs: Sequence[Output], number: int) -> None:
        s = mean(outputs, by_samples(outputs), "delta")
        for name in model:
            v = memory.get(name, torch.zeros_like(model[name]))
            v = b * v + ((1 - b) * s[name] if form == "ema" else s[name])
            memory[name] = v
            model[name] = model[name] + eta * (s[name] + b * v if form == "nesterov" else v)
    return rule


def adaptive(kind: str, eta: float, b1: float, b2: float, tau: float) -> Rule:
    """Reddi et al. (2021), Algorithm 2."""
    def rule(model: Dict, memory: Dict, outputs: Sequence[Output], number: int) -> None:
        s = mean(outputs, by_samples(outputs), "delta")
        for name in model:
            m = memory.get(f"m {name}", torch.zeros_like(model[name]))
            v = memory.get(f"v {name}", torch.full_like(model[name], tau**2))
            m = b1 * m + (1 - b1) * s[name]
            square = s[name] ** 2
            v = {"adam": b2 * v + (1 - b2) * square,
                 "yogi": v - (1 - b2) * square * torch.sign(v - square),
                 "adagrad": v + square}[kind]
            memory[f"m {name}"], memory[f"v {name}"] = m, v
            model[name] = model[name] + eta * m / (v.sqrt() + tau)
    return rule


def fisher(floor: float, relative: bool) -> Rule:
    def rule(model: Dict, memory: Dict, outputs: Sequence[Output], number: int) -> None:
        total = sum(o.shard_tokens for o in outputs)
        everywhere = torch.cat([f.flatten() for f in
                                mean(outputs, by_samples(outputs), "fisher").values()]).mean()
        phi = floor * float(everywhere) if relative else floor
        for name in model:
            up, down = torch.zeros_like(model[name]), torch.zeros_like(model[name])
            for o in outputs:
                f = split(o.vectors["fisher"])[name] + phi
                up += o.shard_tokens / total * f * split(o.vectors["delta"])[name]
                down += o.shard_tokens / total * f
            model[name] = model[name] + up / down
    return rule


def adamw(model: Dict, memory: Dict, outputs: Sequence[Output], number: int) -> None:
    """torch.optim.AdamW on the mean gradient; `memory` keeps the moments."""
    g = mean(outputs, by_tokens(outputs), "gradient")
    for name in model:
        p = torch.nn.Parameter(model[name].clone())
        p.grad = g[name]
        optimizer = torch.optim.AdamW([p], lr=LR, betas=(BETA1, BETA2), weight_decay=WEIGHT_DECAY)
        if number > 1:
            optimizer.state[p] = {"step": torch.tensor(float(number - 1)),
                                  "exp_avg": memory[f"m {name}"], "exp_avg_sq": memory[f"v {name}"]}
        optimizer.step()
        memory[f"m {name}"] = optimizer.state[p]["exp_avg"]
        memory[f"v {name}"] = optimizer.state[p]["exp_avg_sq"]
        model[name] = p.detach()


CASES: dict[str, tuple[Strategy, Rule]] = {
    "fed_avg samples": (FedAvg(), plain(by_samples)),
    "fed_avg trained": (FedAvg("trained"), plain(by_tokens)),
    "fed_avg uniform": (FedAvg("uniform"), plain(lambda outputs: [1.0] * len(outputs))),
    "fed_momentum ema": (FedMomentum(), momentum("ema", 1.0, 0.9)),
    "fed_momentum heavy_ball": (FedMomentum(server_lr=0.5, momentum_form="heavy_ball"),
                                momentum("heavy_ball", 0.5, 0.9)),
    "diloco": (DiLoCo("samples", 0.9, 0.7, "nesterov"), momentum("nesterov", 0.7, 0.9)),
    "fed_adam": (FedAdam(), adaptive("adam", 1e-2, 0.9, 0.99, 1e-5)),
    "fed_yogi": (FedYogi(tau=1e-3), adaptive("yogi", 1e-2, 0.9, 0.99, 1e-3)),
    "fed_adagrad": (FedAdagrad(), adaptive("adagrad", 1e-2, 0.0, 0.0, 1e-5)),
    "fed_entropy": (FedEntropy(), entropy(1.0)),
    "fed_entropy sharp": (FedEntropy(temperature=0.2), entropy(0.2)),
    "fed_fisher absolute": (FedFisher(), fisher(1e-8, relative=False)),
    "fed_fisher relative": (FedFisher(fisher_floor=1e-2, fisher_floor_mode="relative"),
                            fisher(1e-2, relative=True)),
    "fed_sgd": (FedSGD(), adamw),
}


def test_there_is_a_reference_for_every_method() -> None:
    assert {type(strategy) for strategy, _ in CASES.values()} == set(STRATEGIES.values())


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-6)])
@pytest.mark.parametrize("exact", [True, False])
def test_three_rounds_against_the_naive_aggregation(case: str, dtype: torch.dtype,
                                                    tolerance: float, exact: bool) -> None:
    strategy, rule = CASES[case]
    server = Server(strategy, dtype, clients=3, exact=exact)
    start = server.model.clone()
    model, memory = split(start.double()), {}
    for number in (1, 2, 3):
        outputs = record(3, seed=number)
        server.round(outputs)
        rule(model, memory, outputs, number)
    expected = torch.cat([m.flatten() for m in model.values()])
    moved = server.model.double() - start.double()
    assert moved.abs().max() > 1e-3
    # The updates are compared, not the parameters, whose own rounding in fp32 is 1e-7.
    assert (moved - (expected - start.double())).abs().max() < tolerance


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_averaged_moments(dtype: torch.dtype, tolerance: float) -> None:
    outputs = record(3, seed=1)
    server = Server(FedAvg(), dtype, clients=3, moments=True)
    server.round(outputs)
    plainly = Server(FedAvg(), dtype, clients=3)
    plainly.round(outputs)
    assert (server.model - plainly.model).abs().max() < 1e-6
    for name in ("exp_avg", "exp_avg_sq"):
        expected = torch.cat([m.flatten() for m in
                              mean(outputs, by_samples(outputs), name).values()])
        error = (server.averaged[name].double() - expected).abs()
        sizes = torch.stack([o.vectors[name].abs() for o in outputs]).amax(0)
        assert (error <= tolerance * sizes + 3 * 2.0**-54).all()  # 3 clients, half a grid step each


@pytest.mark.parametrize("form", ["heavy_ball", "nesterov"])
def test_momentum_is_that_of_torch(form: str) -> None:
    strategy = FedMomentum(server_lr=0.3, server_momentum=0.8, momentum_form=form)  # type: ignore[arg-type]
    server = Server(strategy, torch.float64, clients=2)
    p = torch.nn.Parameter(server.model.clone())
    sgd = torch.optim.SGD([p], lr=0.3, momentum=0.8, nesterov=form == "nesterov")
    for seed in range(4):
        outputs = record(2, seed)
        server.round(outputs)
        p.grad = -torch.cat([m.flatten() for m in
                             mean(outputs, by_samples(outputs), "delta").values()])
        sgd.step()
    assert (server.model - p).abs().max() < 1e-9


def test_adagrad_is_that_of_torch() -> None:
    server = Server(FedAdagrad(server_lr=0.02, tau=1e-3), torch.float64, clients=2)
    p = torch.nn.Parameter(server.model.clone())
    adagrad = torch.optim.Adagrad([p], lr=0.02, eps=1e-3, initial_accumulator_value=1e-6)
    for seed in range(4):
        outputs = record(2, seed)
        server.round(outputs)
        p.grad = -torch.cat([m.flatten() for m in
                             mean(outputs, by_samples(outputs), "delta").values()])
        adagrad.step()
    assert (server.model - p).abs().max() < 1e-9


# ---- properties ---------------------------------------------------------------------------------

cases = st.sampled_from(sorted(CASES))
seeds = st.integers(0, 10_000)
several = st.integers(2, 9)


@settings(max_examples=60, deadline=None)
@given(cases, seeds, several)
def test_equal_clients_are_one_client(case: str, seed: int, clients: int) -> None:
    strategy, _ = CASES[case]
    output = record(1, seed)[0]
    many, one = (Server(strategy, torch.float64, n) for n in (clients, 1))
    many.round([output] * clients)
    one.round([output])
    assert (many.model - one.model).abs().max() < 1e-9
    if isinstance(strategy, FedAvg | FedEntropy | FedFisher) and type(strategy) in (
            FedAvg, FedEntropy, FedFisher):  # those whose server adds a mean of the updates
        start = Server(strategy, torch.float64, 1).model
        assert (many.model - start - output.vectors["delta"]).abs().max() < 1e-9


@settings(max_examples=60, deadline=None)
@given(cases, seeds, several, st.randoms(use_true_random=False))
def test_permuting_clients_changes_no_bit(case: str, seed: int, clients: int, random) -> None:  # type: ignore[no-untyped-def]
    strategy, _ = CASES[case]
    outputs = record(clients, seed)
    one, other = (Server(strategy, torch.float32, clients, moments=True) for _ in range(2))
    first = one.round(outputs)
    shuffled = random.sample(outputs, clients)
    second = other.round(shuffled)
    assert torch.equal(first.buffer, second.buffer)
    assert torch.equal(one.model, other.model)


@settings(max_examples=60, deadline=None)
@given(cases, seeds, several)
def test_leaving_a_client_out_is_giving_it_weight_zero(case: str, seed: int, clients: int) -> None:
    strategy, _ = CASES[case]
    outputs = record(clients, seed)
    left_out, zeroed = (Server(strategy, torch.float32, clients) for _ in range(2))
    left_out.round(outputs, left_out=[0])
    zeroed.round(outputs, zeroed=[0])
    assert torch.equal(left_out.model, zeroed.model)


@settings(max_examples=30, deadline=None)
@given(seeds, several)
def test_entropy_at_a_high_temperature_is_uniform(seed: int, clients: int) -> None:
    outputs = record(clients, seed)
    hot = Server(FedEntropy(temperature=1e9), torch.float64, clients)
    uniform = Server(FedAvg("uniform"), torch.float64, clients)
    hot.round(outputs)
    uniform.round(outputs)
    assert (hot.model - uniform.model).abs().max() < 1e-9


@settings(max_examples=30, deadline=None)
@given(seeds, several, st.floats(0.05, 20))
def test_fisher_with_a_relative_floor_ignores_a_common_factor(seed: int, clients: int,
                                                              factor: float) -> None:
    outputs = record(clients, seed)
    strategy = FedFisher(fisher_floor=1e-2, fisher_floor_mode="relative")
    one, other = (Server(strategy, torch.float64, clients) for _ in range(2))
    one.round(outputs)
    for output in outputs:
        output.vectors["fisher"] = output.vectors["fisher"] * factor
    other.round(outputs)
    assert (one.model - other.model).abs().max() < 1e-9


# ---- weights and grids --------------------------------------------------------------------------

def test_entropy_weights_beyond_the_grid_name_the_temperature() -> None:
    cold = FedEntropy(temperature=0.01)
    planned = cold.plan_weights([1, 1], 10)[0]
    assert cold.client_weight(planned, ClientReport(10, 5.0), 5.1) == pytest.approx(math.exp(10))
    with pytest.raises(ValueError, match=r"--temperature 0\.01"):
        cold.client_weight(planned, ClientReport(10, 5.0), 5.5)
    assert "--temperature 0.01" in cold.refuse_total(math.exp(-30))
    assert cold.refuse_total(1.0) == ""


def test_a_client_far_less_sure_than_the_others_weighs_nothing() -> None:
    """Its weight is below the grid, where the softmax of any float has it as well."""
    outputs = record(2, seed=1)
    outputs[1].entropy = outputs[0].entropy + 5
    server = Server(FedEntropy(temperature=0.1), torch.float64, 2)
    server.reference = outputs[0].entropy
    start = server.model.clone()
    server.round(outputs)
    assert (server.model - start - outputs[0].vectors["delta"]).abs().max() < 1e-9


def test_soft_minimum_makes_the_next_weights_sum_to_one() -> None:
    strategy = FedEntropy(temperature=0.3)
    entropies = [4.0, 4.2, 5.0]
    reference = strategy.next_reference(entropies)
    weights = [strategy.client_weight(1e9, ClientReport(1, h), reference) for h in entropies]
    assert sum(weights) == pytest.approx(1)
    softmax = torch.softmax(-torch.tensor(entropies) / 0.3, 0)
    assert weights == pytest.approx(softmax.tolist(), rel=1e-5)


def test_only_updates_alone_fit_the_narrow_grid() -> None:
    like = torch.zeros(10)
    kinds = {name: TermSum(cls(), 10, like, exact=True).buffer.dtype
             for name, cls in STRATEGIES.items()}
    wide = {name for name, kind in kinds.items() if kind == torch.int64}
    assert wide == {"fed_entropy", "fed_fisher", "fed_sgd"}
    moments = TermSum(FedAvg(), 10, like, exact=True, average_moments=True).buffer
    assert moments.dtype == torch.int64
    assert moments.numel() == 31


def test_a_gradient_beyond_its_bound_is_an_error() -> None:
    terms = TermSum(FedSGD(), 4, torch.zeros(4), exact=True)
    terms.begin(Bounds(1.0, 16.0))
    with pytest.raises(OverflowError, match=r"gradient: an element of size 17 exceeds 16"):
        terms.add({"gradient": torch.full((4,), -17.0)}, 1.0)
    assert not terms.buffer.any()


def test_measured_norms_and_shares() -> None:
    strategy = FedFisher()
    outputs = record(2, seed=3)
    server = Server(strategy, torch.float64, 2)
    terms = server.round(outputs)
    state: dict[str, Tensor] = {}
    model = torch.zeros(SIZE, dtype=torch.float64)
    measured = terms.apply(model, state, ServerRound(1), measure=True)
    assert measured["step_norm"] == pytest.approx(float(model.norm()))
    weights = [o.shard_tokens / sum(by_samples(outputs)) for o in outputs]
    cohort = sum(p * o.vectors["fisher"] for p, o in zip(weights, outputs, strict=True))
    assert measured["under_floor"] == pytest.approx(float((cohort < 1e-8).double().mean()))
    assert 0 < measured["under_floor"] < 1
