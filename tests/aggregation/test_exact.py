"""Exact sums against fractions and float64; every order and placement gives the same bits."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedrun.aggregation.bounds import Bounds, adamw_step_bound
from fedrun.aggregation.exact import MOMENTS, ExactAggregator
from fedrun.aggregation.update import ServerUpdate
from fedrun.strategies.base import CLIENT_VECTORS, ServerRound, Strategy
from fedrun.strategies.fed_avg import FedAvg
from fedrun.strategies.fed_entropy import FedEntropy
from fedrun.strategies.fed_fisher import FedFisher
from fedrun.strategies.fed_sgd import FedSGD
from tests.support.launches import Launches

SIZE = 70_001  # more than one slice, and not a multiple of one


def updates(clients: int, bound: float, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(clients)
    return [(torch.rand(SIZE, generator=generator, dtype=dtype) * 2 - 1) * bound
            for _ in range(clients)]


def summed(groups: list[list[int]], deltas: list[torch.Tensor], weights: list[float], bound: float,
           exact: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """(model after one round, buffer) with the clients of each group on a worker of its own."""
    total = None
    for group in groups:
        terms = ExactAggregator(FedAvg(), SIZE, deltas[0], exact=exact)
        terms.begin(Bounds(bound))
        for k in group:
            assert not terms.add({"delta": deltas[k]}, weights[k])
        if total is None:
            total = terms
        else:
            total.buffer.add_(terms.buffer)  # what all_reduce does
    assert total is not None
    model = torch.zeros(SIZE, dtype=deltas[0].dtype)
    ServerUpdate(FedAvg(), total).apply(model, {}, ServerRound(1))
    return model, total.buffer


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-14)])
@pytest.mark.parametrize("exact", [True, False])
def test_mean_against_float64(dtype: torch.dtype, tolerance: float, exact: bool) -> None:
    bound, weights = 3e-3, [0.5, 0.3, 0.2]
    deltas = updates(3, bound, dtype)
    expected = sum(w * d.double() for w, d in zip(weights, deltas, strict=True))
    model, _ = summed([[0, 1, 2]], deltas, weights, bound, exact)
    assert (model.double() - expected).abs().max() < tolerance * bound


def test_same_bits_whatever_the_order_and_placement() -> None:
    weights = [0.1, 0.2, 0.3, 0.15, 0.25]
    deltas = updates(5, 1e-3)
    _, one = summed([[0, 1, 2, 3, 4]], deltas, weights, 1e-3)
    for groups in ([[4, 2], [0], [3, 1]], [[0], [1], [2], [3], [4]], [[], [4, 3, 2, 1, 0]]):
        _, other = summed(groups, deltas, weights, 1e-3)
        assert torch.equal(one, other)


CASES: dict[str, tuple[Strategy, tuple[str, ...], bool]] = {  # method, moments averaged as well
    "fed_avg": (FedAvg(), ("delta",), False),
    "average": (FedAvg(), ("delta", "exp_avg", "exp_avg_sq"), True),
    "fed_fisher": (FedFisher(), ("delta", "fisher"), False),
    "relative": (FedFisher(fisher_floor_mode="relative"), ("delta", "fisher"), False),
    "fed_sgd": (FedSGD(), ("gradient",), False)}


@pytest.mark.parametrize("fault", ["nan", "beyond", "nan, exact=False"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("first", [False, True])
def test_leaving_a_client_out_leaves_nothing_of_it(case: str, fault: str, first: bool) -> None:
    """Its first slices are added before its last element is seen to be no number, or too large."""
    strategy, names, average = CASES[case]
    exact = "exact=False" not in fault
    deltas = updates(4, 1e-3)
    good, other, bad = ({name: d.abs() for name in names} for d in deltas[:3])
    bad = {name: vector * (1 if exact else 1e30) for name, vector in bad.items()}
    bad[names[-1]] = bad[names[-1]].clone()
    bad[names[-1]][SIZE - 1] = 45.0 if fault == "beyond" else math.nan
    bound = Bounds(1e-3, 2.0).of(CLIENT_VECTORS[names[-1]])
    why = f"{names[-1]} " + (f"exceeds its bound: 45 > {bound:g}" if fault == "beyond"
                             else "not finite")

    def buffer(clients: list[dict[str, torch.Tensor]]) -> torch.Tensor:
        terms = ExactAggregator(strategy, SIZE, deltas[0], exact=exact,
                                moments=MOMENTS if average else ())
        terms.begin(Bounds(1e-3, 2.0))
        for client in clients:
            refused = terms.add({n: v.clone() for n, v in client.items()}, 0.3)
            assert refused == (why if client is bad else "")
        return terms.buffer.clone()

    with_it = buffer([bad, good, other] if first else [good, bad, other])
    assert torch.equal(with_it, buffer([good, other]))


def test_a_client_is_added_without_waiting_for_a_value() -> None:
    """On a GPU, a wait for each slice would cost more than the work on it."""
    terms = ExactAggregator(FedAvg(), SIZE, torch.zeros(SIZE), exact=True)
    terms.begin(Bounds(1e-3))
    with Launches() as launches:
        for delta in updates(2, 1e-3):
            assert not terms.add({"delta": delta}, 0.5)
    assert launches.counted["aten::amax"] == 2 * 2, "two slices of each"
    assert not launches.counted["aten::_local_scalar_dense"]


def test_the_mean_is_over_those_who_took_part() -> None:
    deltas = updates(3, 1e-3)
    terms = ExactAggregator(FedAvg(), SIZE, deltas[0], exact=True)
    terms.begin(Bounds(1e-3))
    bad = deltas[1].clone()
    bad[SIZE - 1] = math.nan
    clients = ((deltas[0], 0.2), (bad, 0.5), (deltas[2], 0.3))
    assert [terms.add({"delta": d}, w) for d, w in clients] == ["", "delta not finite", ""]
    model = torch.zeros(SIZE)
    ServerUpdate(FedAvg(), terms).apply(model, {}, ServerRound(1))
    expected = (0.2 * deltas[0].double() + 0.3 * deltas[2].double()) / 0.5
    assert (model.double() - expected).abs().max() < 1e-9


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_every_kind_of_not_finite_is_seen(value: float) -> None:
    terms = ExactAggregator(FedAvg(), 10, torch.zeros(10), exact=True)
    terms.begin(Bounds(1.0))
    for place in (0, 9):
        delta = torch.zeros(10)
        delta[place] = value
        assert terms.add({"delta": delta}, 1.0) == "delta not finite"
    assert not terms.buffer.any()


def test_floats_have_no_bound() -> None:
    terms = ExactAggregator(FedAvg(), 10, torch.zeros(10), exact=False)
    terms.begin(Bounds(1e-3))
    assert terms.add({"delta": torch.full((10,), 1e38)}, 1.0) == ""


@settings(max_examples=50, deadline=None)
@given(st.floats(1e-9, 1e6), st.integers(1, 300))
def test_the_grid_holds_any_cohort_at_its_bound(bound: float, clients: int) -> None:
    terms = ExactAggregator(FedAvg(), 2, torch.zeros(2), exact=True)
    terms.begin(Bounds(bound))
    largest = torch.tensor([bound, -bound])
    if float(largest[0]) > bound:  # fp32 rounds some bounds up
        largest = torch.nextafter(largest, torch.zeros(2))
    for _ in range(clients):
        assert not terms.add({"delta": largest}, 1 / clients)
    model = torch.zeros(2)
    ServerUpdate(FedAvg(), terms).apply(model, {}, ServerRound(1))
    assert torch.allclose(model, largest, rtol=1e-5)
    grid = Fraction(bound) / 2**29
    assert abs(Fraction(float(model[0])) - Fraction(float(largest[0]))) <= (
        clients * grid + Fraction(bound) / 10**6)


@pytest.mark.parametrize(("beta1", "beta2"),
                         [(0.9, 0.999), (0.9, 0.95), (0.8, 0.99), (0.0, 0.9)])
def test_adamw_moves_as_far_as_its_bound_and_no_further(beta1: float, beta2: float) -> None:
    """torch's own AdamW on the worst gradients: by Cauchy-Schwarz those that grow by b2 / b1."""
    lr, steps = 1e-2, round(6 / (1 - beta2))  # until nothing is left of the second moment's zero
    bound = adamw_step_bound(lr, 0.0, beta1, beta2)
    growth = torch.tensor([beta2 / beta1 if beta1 else 20.0, 1.0, 1.01, 3.0], dtype=torch.float64)
    p = torch.nn.Parameter(torch.full_like(growth, 0.5))
    optimizer = torch.optim.AdamW([p], lr=lr, betas=(beta1, beta2), eps=0.0, weight_decay=0.0)
    furthest = 0.0
    for step in range(steps):
        p.grad = (growth ** max(step - steps, -400)).clamp(min=1e-100)
        before = p.detach().clone()
        optimizer.step()
        if step < 60 or step > steps - 60:
            furthest = max(furthest, (p.detach() - before).abs().max().item())
    assert furthest <= bound
    assert furthest > 0.99 * bound


@pytest.mark.parametrize(("strategy", "first", "second", "sizes"), [
    (FedEntropy(), "exp_avg", "exp_avg_sq", (3e-10, 1e-19)),
    (FedEntropy(), "momentum", "rms", (3e-19, 1e-19)), (FedAvg(), "momentum", "rms", (3e-9, 1e-9))])
def test_a_second_moment_too_small_for_the_grid_is_not_zero(
        strategy: Strategy, first: str, second: str, sizes: tuple[float, float]) -> None:
    """AdamW would divide by its root: a first moment that the finer grid still holds, over zero."""
    size, bounds = 8, Bounds(update=1e-2, gradient=16.0, clip=4.0)
    like = torch.zeros(size)
    terms = ExactAggregator(strategy, size, like, exact=True, moments=(first, second))
    terms.begin(bounds)
    tiny = {"delta": torch.zeros(size), first: torch.full((size,), sizes[0]),
            second: torch.full((size,), sizes[1])}
    for _ in range(3):
        assert not terms.add(tiny, 0.3)
    moments = {name: torch.zeros(size) for name in (first, second)}
    ServerUpdate(strategy, terms).apply(torch.zeros(size), {}, ServerRound(1), moments)
    root = moments[second].sqrt() if second == "exp_avg_sq" else moments[second]
    assert bool((root > 0).all())
    assert bool((moments[first].abs() <= 4 * root).all())
