"""Int8 aggregation: against a numpy reference, nothing lost, residuals that stay small."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fedrun.aggregation.blocks import FULL, SHRINK, SMALLEST
from fedrun.aggregation.bounds import Bounds
from fedrun.aggregation.int8 import BLOCK, Int8Aggregator
from fedrun.aggregation.update import ServerUpdate
from fedrun.config import INT8_COHORT
from fedrun.distributed.data_plane import DataPlane, Mask
from fedrun.strategies import FedAvg
from fedrun.strategies.base import ServerRound
from tests.support.hostile_updates import (
    BOUND,
    HOSTILE,
    PLACEMENTS,
    SIZE,
    drawn,
    require_near,
)
from tests.support.naive_int8 import Naive, NaiveMoments


class Wire(DataPlane):
    """Between workers that are all in this process; `aggregators` is complete when one reduces."""

    def __init__(self, aggregators: list[Int8Aggregator]) -> None:
        super().__init__()
        self.aggregators = aggregators

    def reduce(self, parts: Sequence[torch.Tensor], mask: Mask | None = None
               ) -> tuple[torch.Tensor, ...]:
        return tuple(worker.buffer for worker in self.aggregators)


class World:
    """A cohort with residuals, each group of it on a worker of its own, in float64 if told so."""

    def __init__(self, groups: list[list[int]], weights: list[float], size: int = SIZE,
                 dtype: torch.dtype = torch.float32, turns: int = 1) -> None:
        """turns: cohorts that the run's clients make."""
        self.groups, self.weights = groups, weights
        self.residuals = [torch.zeros(size, dtype=dtype) for _ in weights]
        self.workers: list[Int8Aggregator] = []
        for _ in groups:
            self.workers.append(Int8Aggregator(
                FedAvg(), size, self.residuals[0], len(weights), turns * len(weights),
                Wire(self.workers)))

    def round(self, deltas: Sequence[torch.Tensor], bound: float = BOUND) -> torch.Tensor:
        """The global model after a round from zero."""
        for worker, group in zip(self.workers, self.groups, strict=True):
            worker.begin(Bounds(bound))
            for k in group:
                assert not worker.add({"delta": deltas[k], "residual": self.residuals[k]},
                                      self.weights[k])
        for worker in self.workers:
            worker.reduce()
        model = torch.zeros_like(deltas[0])
        ServerUpdate(FedAvg(), self.workers[0]).apply(model, {}, ServerRound(1))
        return model

    @property
    def steps(self) -> torch.Tensor:
        """Of the next round, as shares of its bound."""
        first, *others = (worker.steps for worker in self.workers)
        assert all(torch.equal(first, other) for other in others)
        return first


@pytest.mark.parametrize(("weights", "turns"), [
    ([1.0], 1), ([0.5, 0.3, 0.2], 1), ([0.25] * 4, 3), ([0.9] + [0.1 / 19] * 19, 1)])
def test_eight_rounds_against_the_formulas_in_float64(weights: list[float], turns: int) -> None:
    clients, size = len(weights), SIZE if len(weights) < 5 else SIZE // 4
    world = World([list(range(clients))], weights, size, torch.float64, turns)
    naive = Naive(weights, size, turns)
    for number in range(8):
        scale = 1.0 if number < 3 else 3.0  # then some have to clip
        deltas = [d.double() * scale for d in drawn(clients, size, seed=number)]
        model = world.round(deltas)
        expected = naive.round([d.numpy() for d in deltas], BOUND)
        require_near(model, expected)
        assert np.mean(world.steps.numpy() != np.array(naive.steps)) < 0.01
    assert len(set(naive.steps)) > 5


def test_same_bits_whatever_the_order_and_placement() -> None:
    weights = [0.1, 0.2, 0.3, 0.15, 0.25]
    first, *others = (World(groups, weights) for groups in PLACEMENTS)
    for number in range(3):
        deltas = drawn(5, seed=number)
        model = first.round(deltas)
        for world in others:
            assert torch.equal(world.round(deltas), model)
            assert torch.equal(world.steps, first.steps)
            for mine, theirs in zip(world.residuals, first.residuals, strict=True):
                assert torch.equal(mine, theirs)


def test_sent_and_residual_add_up_to_what_was_trained() -> None:
    weights, rounds = [0.7, 0.2, 0.1], 20
    world = World([[0, 1, 2]], weights, dtype=torch.float64)
    sent, trained = (torch.zeros(SIZE, dtype=torch.float64) for _ in range(2))
    for number in range(rounds):
        deltas = [d.double() for d in drawn(3, seed=number)]
        trained += sum(w * d for w, d in zip(weights, deltas, strict=True))
        sent += world.round(deltas)
    assert torch.allclose(sent + sum(world.residuals), trained, rtol=0, atol=1e-6 * BOUND)
    assert float((sent - trained).norm()) < 0.02 * float(trained.norm())


@pytest.mark.parametrize("clients", [2, 7])
@pytest.mark.parametrize("case", HOSTILE)
def test_residuals_stay_small_whatever_clients_do(case: str, clients: int) -> None:
    """They may grow while steps double, by what is trained at most; then each is half a step."""
    weights = [1 / clients] * clients
    world = World([list(range(clients))], weights, 2 * BLOCK)
    shape = torch.linspace(-1, 1, 2 * BLOCK)
    levels = 1 + math.floor((127 - clients) / clients)
    while_doubling = math.log2(256) + 2
    for number in range(75):
        world.round([shape * BOUND * HOSTILE[case](number, k) for k in range(clients)])
        largest = max(float(r.abs().max()) for r in world.residuals)
        assert largest <= while_doubling * BOUND / clients, number
    if case == "every other round":  # steps halve and double
        return
    assert largest <= 0.501 * float(world.steps.max()) * BOUND / SHRINK
    needed = max(abs(HOSTILE[case](74, k)) for k in range(clients)) / clients  # of the levels
    fitting = float(world.steps.max()) * (levels + 0.5)
    assert needed <= fitting <= max(needed / (FULL * SHRINK) * 2, 1 / clients / 64), (case, fitting)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(*[st.sampled_from([0.0, 1e-3, 0.03, 0.3, 1.0])] * 3, st.booleans()),
                min_size=1, max_size=40), st.sampled_from([[1 / 3] * 3, [0.9, 0.09, 0.01]]))
def test_residuals_are_bounded_by_a_few_rounds_of_training(
        rounds: list[tuple[float, float, float, bool]], weights: list[float]) -> None:
    world = World([[0, 1, 2]], weights, BLOCK)
    shape = torch.linspace(-1, 1, BLOCK)
    for *sizes, flipped in rounds:
        signs = (1, -1, -1 if flipped else 1)
        world.round([shape * BOUND * s * sign for s, sign in zip(sizes, signs, strict=True)])
        for residual, weight in zip(world.residuals, weights, strict=True):
            half = 0.5 * float(world.steps.max()) / SHRINK
            assert float(residual.abs().max()) <= ((math.log2(256) + 2) * weight + half) * BOUND


@pytest.mark.parametrize("at_random", [False, True])
def test_a_client_that_moves_most_does_not_fall_behind_between_its_turns(at_random: bool) -> None:
    """One of forty, four a round: the others would let the step shrink until it comes again."""
    clients, cohort = 40, 4
    terms = Int8Aggregator(FedAvg(), BLOCK, torch.zeros(()), cohort, clients)
    residuals, shape = torch.zeros(clients, BLOCK), BOUND * torch.linspace(-1, 1, BLOCK)
    draw, largest = np.random.default_rng(0), []
    for number in range(400):
        drawn = draw.choice(clients, cohort, False) if at_random else range(cohort)
        terms.begin(Bounds(BOUND))
        for k in (int(each) if at_random else (cohort * number + each) % clients for each in drawn):
            assert not terms.add({"delta": shape * (0.9 if k == 0 else 0.005),
                                  "residual": residuals[k]}, 1 / cohort)
        terms.reduce()
        largest.append(float(residuals.abs().max()) * cohort / BOUND)
    assert max(largest) < 3  # updates at the bound
    assert sum(largest[200:]) / 200 < 0.6


@pytest.mark.parametrize(("last", "why"), [
    (math.nan, "delta not finite"), (-45.0, "delta exceeds its bound: 45 > 0.015625")])
def test_a_left_out_client_adds_nothing_and_keeps_its_residual(last: float, why: str) -> None:
    """Nor do the next round's steps depend on it, though it would have clipped everywhere."""
    deltas = drawn(3)
    bad = torch.full((SIZE,), BOUND)
    bad[SIZE - 1] = last
    terms = Int8Aggregator(FedAvg(), SIZE, deltas[0], 3, 3)
    terms.begin(Bounds(BOUND))
    residuals = [torch.zeros(SIZE), torch.full((SIZE,), 1e-6), torch.zeros(SIZE)]
    taken = [terms.add({"delta": d, "residual": r}, w) for d, r, w in
             zip((deltas[0], bad, deltas[2]), residuals, (0.2, 0.5, 0.3), strict=True)]
    assert taken == ["", why, ""]
    assert torch.equal(residuals[1], torch.full((SIZE,), 1e-6))
    terms.reduce()
    without = Int8Aggregator(FedAvg(), SIZE, deltas[0], 3, 3)
    without.begin(Bounds(BOUND))
    for k, weight in ((0, 0.2), (2, 0.3)):
        assert not without.add({"delta": deltas[k], "residual": torch.zeros(SIZE)}, weight)
    without.reduce()
    assert torch.equal(terms.steps, without.steps)
    model = torch.zeros(SIZE)
    ServerUpdate(FedAvg(), terms).apply(model, {}, ServerRound(1))
    sent = 0.2 * deltas[0] - residuals[0] + 0.3 * deltas[2] - residuals[2]
    assert bool(sent.any())
    assert torch.allclose(model, sent / 0.5, rtol=1e-5, atol=1e-8)


def test_all_that_travels_is_in_one_sum_of_258_bytes_a_block() -> None:
    class Counting(DataPlane):
        def __init__(self) -> None:
            super().__init__()
            self.summed: list[tuple[torch.dtype, int]] = []

        def reduce(self, parts: Sequence[torch.Tensor], mask: Mask | None = None
                   ) -> tuple[torch.Tensor, ...]:
            self.summed += [(part.dtype, part.nbytes) for part in parts]
            return super().reduce(parts, mask)

    plane = Counting()
    terms = Int8Aggregator(FedAvg(), SIZE, torch.zeros(SIZE), 1, 1, plane)
    terms.begin(Bounds(BOUND))
    assert not terms.add({"delta": drawn(1)[0], "residual": torch.zeros(SIZE)}, 1.0)
    terms.reduce()
    ServerUpdate(FedAvg(), terms).apply(torch.zeros(SIZE), {}, ServerRound(1))
    blocks, padding, totals = 274, 4, 8  # two counts fill whole words; weights and levels
    assert plane.summed == [(torch.int32, 258 * blocks + padding + totals)]
    assert terms.bytes_sent == plane.summed[0][1] < 1.011 * SIZE


@settings(max_examples=25, deadline=None)
@given(st.lists(st.floats(1e-3, 1.0), min_size=1, max_size=INT8_COHORT), st.booleans())
@example([1.0] * INT8_COHORT, True)
def test_no_byte_carries_into_the_next(raw: list[float], up: bool) -> None:
    """Every client at its furthest in the same direction, whatever the weights."""
    total = math.fsum(raw)
    weights = [w / total for w in raw]
    size = 9 * BLOCK
    delta = torch.full((size,), BOUND if up else -BOUND)
    delta[1::4] = 0
    delta[2::4] *= -1
    delta[5 * BLOCK:6 * BLOCK] /= 1000
    world = World([list(range(len(weights)))], weights, size)
    for number in range(1, 4):
        before = torch.stack(world.residuals).sum(0)
        model = world.round([delta] * len(weights))
        expected = math.fsum(weights) * delta + before - torch.stack(world.residuals).sum(0)
        assert torch.allclose(model, expected, rtol=1e-4, atol=1e-5 * BOUND)
        assert not model[1::4].any()
        first = float(world.steps[0])
        assert torch.equal(world.steps[:5], torch.full((5,), first))
        assert float(world.steps[5]) < first, number


def test_a_block_in_which_nothing_moves_stays() -> None:
    delta = torch.zeros(3 * BLOCK)
    delta[BLOCK] = 100.0
    world = World([[0]], [1.0], len(delta))
    for _ in range(20):
        model = world.round([delta], bound=200.0)
    assert bool(model[BLOCK])
    model[BLOCK] = 0
    assert not model.any()
    assert torch.equal(world.steps[[0, 2]], torch.full((2,), SMALLEST / 127))


# ---- averaged moments ----------------------------------------------------------------------------

CLIP = 0.6


def moments_drawn(clients: int, seed: int, size: int = SIZE) -> list[dict[str, torch.Tensor]]:
    """First moments and roots of second ones, whose blocks are of very different sizes, some of
    them zero."""
    generator = torch.Generator().manual_seed(seed)
    blocks = 10 ** -(6 * torch.rand(-(-size // BLOCK), generator=torch.Generator().manual_seed(7)))
    blocks[5] = 0
    found = []
    for _ in range(clients):
        s = (CLIP * torch.rand(size, generator=generator).double().square()
             * blocks.repeat_interleave(BLOCK)[:size])
        found.append({"momentum": s * torch.randn(size, generator=generator).clamp(-3, 3) / 3,
                      "rms": s})
    return found


@pytest.mark.parametrize("weights", [[0.5, 0.5], [0.7, 0.2, 0.1]])
@pytest.mark.parametrize("groups", [1, 2])
def test_moments_against_the_formulas_in_float64(weights: list[float], groups: int) -> None:
    clients = range(len(weights))
    residuals = {name: [torch.zeros(SIZE, dtype=torch.float64) for _ in clients]
                 for name in ("residual", "residual.momentum", "residual.rms")}
    averages = {name: torch.zeros(SIZE, dtype=torch.float64) for name in ("momentum", "rms")}
    workers: list[Int8Aggregator] = []
    for _ in range(groups):
        workers.append(Int8Aggregator(FedAvg(), SIZE, averages["rms"], len(weights), len(weights),
                                      Wire(workers), ("momentum", "rms")))
        workers[-1].averages = averages
    naive = NaiveMoments(weights, SIZE, CLIP)
    moving = [(), ("momentum", "rms"), (), ("momentum",), ("rms",), ("momentum", "rms")]
    for number, names in enumerate(moving):
        held, deltas = moments_drawn(len(weights), number), drawn(len(weights), seed=number)
        for worker in workers:
            worker.begin(Bounds(BOUND, clip=CLIP), names)
        for k in clients:
            peaks = torch.stack([part.max() for part in held[k]["rms"].split(BLOCK)])
            assert not workers[k % groups].add(
                {"delta": deltas[k].double(), **held[k], "peaks": peaks,
                 **{name: each[k] for name, each in residuals.items()}}, weights[k])
        for worker in workers:
            worker.reduce()
        ServerUpdate(FedAvg(), workers[0]).apply(torch.zeros(SIZE, dtype=torch.float64), {},
                                                 ServerRound(1), averages)
        roots = [one["rms"].numpy() for one in held]
        naive.round({"m": [one["momentum"].numpy() for one in held], "s": roots, "sizes": roots},
                    [{"momentum": "m", "rms": "s"}[name] for name in names])
        for worker in workers:
            np.testing.assert_allclose(worker.scales, naive.scales, rtol=1e-8)
        for name, average in averages.items():
            expected = naive.averages["m" if name == "momentum" else "s"]
            apart = np.abs(average.numpy() - expected)  # as above
            assert np.mean(apart > 1e-8 * np.abs(expected) + 1e-12) < 1e-3, (number, name)
            assert apart.sum() <= 1e-3 * np.abs(expected).sum(), (number, name)
            assert bool((averages["rms"] > 0).all()) == (number > 0)
    mean = torch.stack([w * one["rms"] for w, one in zip(weights, held, strict=True)]).sum(0)
    assert float((averages["rms"] - mean).norm() / mean.norm()) < 0.03


def test_what_travels_with_moments() -> None:
    terms = Int8Aggregator(FedAvg(), SIZE, torch.zeros(()), 1, 1, moments=("momentum", "rms"))
    blocks = 274
    sent = []
    for number in range(6):
        terms.begin(Bounds(BOUND), [name for name, every in (("momentum", 3), ("rms", 6))
                                    if number % every == 1])
        sent.append(terms.bytes_sent)
    assert sent == [vectors * (258 * blocks + 4) + 4 * blocks + 8 for vectors in (1, 3, 1, 1, 2, 1)]
    assert sum(sent) / (6 * SIZE) == pytest.approx(1.53, abs=0.005)


@pytest.mark.parametrize("name", ["delta", "momentum", "rms"])
def test_a_client_with_a_moment_that_is_no_number_leaves_nothing(name: str) -> None:
    terms = Int8Aggregator(FedAvg(), SIZE, torch.zeros(()), 2, 2, moments=("momentum", "rms"))
    terms.averages = {n: torch.zeros(SIZE) for n in ("momentum", "rms")}
    terms.scales.fill_(0.1)
    terms.begin(Bounds(BOUND))
    before = terms.buffer.clone()
    client = {n: torch.full((SIZE,), 1e-3) for n in ("delta", "momentum", "rms")}
    residuals = {n: torch.zeros(SIZE) for n in ("residual", "residual.momentum", "residual.rms")}
    client[name][SIZE - 1] = math.nan
    assert terms.add(client | residuals | {"peaks": torch.ones(274)}, 0.5) == f"{name} not finite"
    assert torch.equal(terms.buffer, before)
    assert not any(bool(residual.any()) for residual in residuals.values())
