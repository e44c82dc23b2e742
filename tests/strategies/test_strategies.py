"""Every aggregation against a naive one fed the same client outputs; properties that hold whatever
the clients did."""

from __future__ import annotations

import math
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedrun.aggregation.bounds import Bounds
from fedrun.aggregation.exact import MOMENTS, ExactAggregator
from fedrun.aggregation.update import ServerUpdate
from fedrun.strategies import STRATEGIES
from fedrun.strategies.base import ClientReport, ServerRound
from fedrun.strategies.fed_avg import FedAvg
from fedrun.strategies.fed_entropy import FedEntropy
from fedrun.strategies.fed_fisher import FedFisher
from fedrun.strategies.fed_geometric_median import FedGeometricMedian
from fedrun.strategies.fed_momentum import FedMomentum
from fedrun.strategies.fed_opt import FedAdagrad
from fedrun.strategies.fed_sgd import FedSGD
from tests.support.naive_robust import CASES as ROBUST
from tests.support.naive_strategies import CASES, SIZE, Server, by_samples, mean, record, split


def test_there_is_a_reference_for_every_method() -> None:
    others = {type(strategy) for strategy, *_ in ROBUST.values()} | {FedGeometricMedian}
    assert {type(strategy) for strategy, _ in CASES.values()} | others == set(STRATEGIES.values())


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-6)])
@pytest.mark.parametrize("exact", [True, False])
def test_three_rounds_against_the_naive_aggregation(case: str, dtype: torch.dtype,
                                                    tolerance: float, exact: bool) -> None:
    strategy, rule = CASES[case]
    server = Server(strategy, dtype, clients=3, exact=exact)
    start = server.model.clone()
    model = split(start.double())
    memory: dict[str, Tensor] = {}
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
def test_momentum_is_that_of_torch(form: Any) -> None:
    strategy = FedMomentum(server_lr=0.3, server_momentum=0.8, momentum_form=form)
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


def test_a_warming_average_is_the_mean_of_all_updates_so_far() -> None:
    strategy = FedMomentum(server_momentum=0.9, server_momentum_warmup=True)
    server = Server(strategy, torch.float64, clients=2)
    updates = []
    for seed in range(9):
        outputs = record(2, seed)
        server.round(outputs)
        updates.append(torch.cat([m.flatten() for m in
                                  mean(outputs, by_samples(outputs), "delta").values()]))
        expected = torch.stack(updates).mean(0)
        assert (server.state["momentum"] - expected).abs().max() < 1e-9
    assert [strategy.momentum_in(n) for n in (1, 2, 10, 99)] == [0, 0.5, 0.9, 0.9]


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
    # Fisher diagonals as small as their floor have few digits on the grid of the exact sum.
    tolerance = 1e-7 if isinstance(strategy, FedFisher) else 1e-9
    assert (many.model - one.model).abs().max() < tolerance
    if isinstance(strategy, FedAvg | FedEntropy | FedFisher) and type(strategy) in (
            FedAvg, FedEntropy, FedFisher):  # those whose server adds a mean of the updates
        start = Server(strategy, torch.float64, 1).model
        assert (many.model - start - output.vectors["delta"]).abs().max() < tolerance


@settings(max_examples=60, deadline=None)
@given(cases, seeds, several, st.randoms(use_true_random=False))
def test_permuting_clients_changes_no_bit(case: str, seed: int, clients: int, random: Random
                                          ) -> None:
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
    report = ClientReport(0, 10, 0.0, entropy=5.0)
    assert cold.client_weight(planned, report, 5.1) == pytest.approx(math.exp(10))
    with pytest.raises(ValueError, match=r"--temperature 0\.01"):
        cold.client_weight(planned, report, 5.5)
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
    reference = strategy.next_entropy_reference(entropies)
    weights = [strategy.client_weight(1e9, ClientReport(0, 1, 0.0, entropy), reference)
               for entropy in entropies]
    assert sum(weights) == pytest.approx(1)
    softmax = torch.softmax(-torch.tensor(entropies) / 0.3, 0)
    assert weights == pytest.approx(softmax.tolist(), rel=1e-5)


def test_only_updates_alone_fit_the_narrow_grid() -> None:
    like = torch.zeros(10)
    kinds = {name: ExactAggregator(cls(), 10, like, exact=True).buffer.dtype
             for name, cls in STRATEGIES.items()}
    wide = {name for name, kind in kinds.items() if kind == torch.int64}
    assert wide == {"fed_entropy", "fed_fisher", "fed_sgd"}
    moments = ExactAggregator(FedAvg(), 10, like, exact=True, moments=MOMENTS).buffer
    assert moments.dtype == torch.int64
    assert moments.numel() == 31


def test_a_gradient_beyond_its_bound_is_left_out() -> None:
    terms = ExactAggregator(FedSGD(), 4, torch.zeros(4), exact=True)
    terms.begin(Bounds(1.0, 16.0))
    refused = terms.add({"gradient": torch.full((4,), -17.0)}, 1.0)
    assert refused == "gradient exceeds its bound: 17 > 16"
    assert not terms.buffer.any()


def test_measured_norms_and_shares() -> None:
    strategy = FedFisher()
    outputs = record(2, seed=3)
    server = Server(strategy, torch.float64, 2)
    terms = server.round(outputs)
    state: dict[str, Tensor] = {}
    model = torch.zeros(SIZE, dtype=torch.float64)
    measured = ServerUpdate(terms.strategy, terms).apply(model, state, ServerRound(1), measure=True)
    assert measured["step_norm"] == pytest.approx(float(model.norm()))
    weights = [o.shard_tokens / sum(by_samples(outputs)) for o in outputs]
    cohort = torch.stack([p * o.vectors["fisher"]
                          for p, o in zip(weights, outputs, strict=True)]).sum(0)
    assert measured["under_floor"] == pytest.approx(float((cohort < 1e-8).double().mean()))
    assert 0 < measured["under_floor"] < 1
