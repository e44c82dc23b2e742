"""Int4 aggregation: against a numpy reference, nothing lost, residuals that stay small, bytes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from fedrun.aggregation.base import Aggregator
from fedrun.aggregation.blocks import FULL, SHRINK, SMALLEST, residual_of
from fedrun.aggregation.bounds import Bounds
from fedrun.aggregation.int4 import BLOCK, Int4Aggregator
from fedrun.aggregation.int8 import BLOCK as BLOCK_OF_MOMENTS
from fedrun.aggregation.int8 import Int8Aggregator
from fedrun.aggregation.packing import LEVELS, MOST, bits_of_sum, pack, unpack
from fedrun.aggregation.update import ServerUpdate
from fedrun.config import INT4_COHORT
from fedrun.distributed.data_plane import DataPlane
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
from tests.support.naive_int4 import Naive, bfloat16
from tests.support.wired import Board, Wired, together


class World:
    """A cohort with residuals, each group of it on a worker and machine of its own."""

    def __init__(self, groups: list[list[int]], weights: list[float], size: int = SIZE,
                 dtype: torch.dtype = torch.float32, turns: int = 1) -> None:
        """turns: cohorts that the run's clients make."""
        self.groups, self.weights = groups, weights
        self.residuals = [torch.zeros(size, dtype=dtype) for _ in weights]
        board = Board(len(groups))
        self.planes = [Wired(board, worker) for worker in range(len(groups))]
        cohort = len(weights)
        self.workers = [Int4Aggregator(FedAvg(), size, self.residuals[0], cohort, turns * cohort,
                                       max(map(len, groups)), plane) for plane in self.planes]

    def round(self, deltas: Sequence[Tensor], bound: float = BOUND) -> Tensor:
        """The global model after a round from zero."""
        for worker, group in zip(self.workers, self.groups, strict=True):
            worker.begin(Bounds(bound))
            for k in group:
                assert not worker.add({"delta": deltas[k], "residual": self.residuals[k]},
                                      self.weights[k])
        together([worker.reduce for worker in self.workers])
        first, *others = (self._updated(worker, deltas[0]) for worker in self.workers)
        assert all(torch.equal(first, other) for other in others)
        return first

    @staticmethod
    def _updated(worker: Int4Aggregator, like: Tensor) -> Tensor:
        model = torch.zeros_like(like)
        ServerUpdate(FedAvg(), worker).apply(model, {}, ServerRound(1))
        return model

    @property
    def steps(self) -> Tensor:
        """Of the next round, as shares of its bound."""
        first, *others = (worker.steps for worker in self.workers)
        assert all(torch.equal(first, other) for other in others)
        return first

    @property
    def server(self) -> Tensor:
        """The server's residual, (size,)."""
        together([worker.complete for worker in self.workers])
        first, *others = (worker.carried_in_sections["residual"] for worker in self.workers)
        assert all(torch.equal(first, other) for other in others)
        return first.clone()


@pytest.mark.parametrize(("weights", "turns", "groups"), [
    ([0.5, 0.5], 1, [[0], [1]]), ([1.0], 1, [[0]]), ([0.5, 0.3, 0.2], 1, [[0, 1], [], [2]]),
    ([0.25] * 4, 3, [[0], [1], [2], [3]]), ([0.9] + [0.1 / 19] * 19, 1, [[0], [*range(1, 20)]])])
def test_rounds_against_the_formulas_in_float64(weights: list[float], turns: int,
                                                groups: list[list[int]]) -> None:
    size = SIZE if len(weights) < 5 else SIZE // 4
    world = World(groups, weights, size, torch.float64, turns)
    naive = Naive(weights, size, turns)
    for number in range(8):
        scale = 1.0 if number < 3 else 3.0  # then some have to clip
        deltas = [d.double() * scale for d in drawn(len(weights), size, seed=number)]
        model = world.round(deltas)
        expected = naive.round([d.numpy() for d in deltas], BOUND)
        require_near(model, expected)
        assert np.mean(world.steps.numpy() != np.array(naive.steps)) < 0.01
        behind = np.abs(world.server.numpy() - naive.server)
        assert np.mean(behind > 1e-12) < 1e-3
    assert np.abs(naive.server).max() > 1e-4 * BOUND
    assert len(set(naive.steps)) > 5


def test_same_bits_whatever_the_order_and_placement() -> None:
    weights = [0.1, 0.2, 0.3, 0.15, 0.25]
    first, *others = (World(groups, weights) for groups in PLACEMENTS)
    for number in range(3):
        deltas = drawn(5, seed=number)
        model, server = first.round(deltas), first.server
        assert bool(server.any())
        for world in others:
            assert torch.equal(world.round(deltas), model)
            assert torch.equal(world.steps, first.steps)
            assert torch.equal(world.server, server)
            for mine, theirs in zip(world.residuals, first.residuals, strict=True):
                assert torch.equal(mine, theirs)


def test_a_slice_of_one_block_and_more_workers_than_blocks() -> None:
    """What is beyond the last block of a section is never looked at."""
    for size in ((1 << 16) + 77, 2 * BLOCK, 3):
        one, many = (World(groups, [0.6, 0.4], size)
                     for groups in ([[0, 1]], [[], [1], [], [0], []]))
        for number in range(2):
            deltas = [BOUND * torch.linspace(-1, 1 / (k + number + 1), size) for k in range(2)]
            model = one.round(deltas)
            assert torch.equal(model, many.round(deltas))
            assert torch.equal(one.server, many.server)
        assert bool(model.any())


def test_sent_and_residuals_add_up_to_what_was_trained() -> None:
    weights, rounds = [0.7, 0.2, 0.1], 20
    world = World([[0, 1], [2]], weights, dtype=torch.float64)
    sent, trained = (torch.zeros(SIZE, dtype=torch.float64) for _ in range(2))
    for number in range(rounds):
        deltas = [d.double() for d in drawn(3, seed=number)]
        trained += sum(w * d for w, d in zip(weights, deltas, strict=True))
        sent += world.round(deltas)
    held = world.server + sum(world.residuals)
    assert torch.allclose(sent + held, trained, rtol=0, atol=1e-6 * BOUND)
    assert float((sent - trained).norm()) < 0.1 * float(trained.norm())


@pytest.mark.parametrize("clients", [2, 7])
@pytest.mark.parametrize("case", HOSTILE)
def test_residuals_stay_small_whatever_clients_do(case: str, clients: int) -> None:
    """They may grow while steps double, by what is trained at most; then each is half a step. The
    server's is a twelfth of the largest sum."""
    world = World([list(range(clients))], [1 / clients] * clients, 2 * BLOCK)
    shape = torch.linspace(-1, 1, 2 * BLOCK)
    while_doubling, largest_sum = math.log2(256) + 2, 0.0
    for number in range(75):
        before = world.server
        model = world.round([shape * BOUND * HOSTILE[case](number, k) for k in range(clients)])
        largest = max(float(r.abs().max()) for r in world.residuals)
        assert largest <= while_doubling * BOUND / clients, number
        largest_sum = max(largest_sum, float((model + world.server - before).abs().max()))
        assert float(world.server.abs().max()) <= largest_sum / 12
    if case == "every other round":  # steps halve and double
        return
    assert largest <= 0.501 * float(world.steps.max()) * BOUND / SHRINK
    needed = max(abs(HOSTILE[case](74, k)) for k in range(clients)) / clients  # of the levels
    fitting = float(world.steps.max()) * (LEVELS + 0.5)
    assert needed <= fitting <= max(needed / (FULL * SHRINK) * 2, 1 / clients / 64), (case, fitting)


@pytest.mark.parametrize(("last", "why"), [
    (math.nan, "delta not finite"), (-45.0, "delta exceeds its bound: 45 > 0.015625")])
def test_a_left_out_client_adds_nothing_and_keeps_its_residual(last: float, why: str) -> None:
    """Nor do the next round's steps depend on it, though it would have clipped everywhere."""
    deltas = drawn(3)
    bad = torch.full((SIZE,), BOUND)
    bad[SIZE - 1] = last
    terms, without = (Int4Aggregator(FedAvg(), SIZE, deltas[0], 3, 3, 3) for _ in range(2))
    terms.begin(Bounds(BOUND))
    residuals = [torch.zeros(SIZE), torch.full((SIZE,), 1e-6), torch.zeros(SIZE)]
    taken = [terms.add({"delta": d, "residual": r}, w) for d, r, w in
             zip((deltas[0], bad, deltas[2]), residuals, (0.2, 0.5, 0.3), strict=True)]
    assert taken == ["", why, ""]
    assert torch.equal(residuals[1], torch.full((SIZE,), 1e-6))
    terms.reduce()
    without.begin(Bounds(BOUND))
    for k, weight in ((0, 0.2), (2, 0.3)):
        assert not without.add({"delta": deltas[k], "residual": torch.zeros(SIZE)}, weight)
    without.reduce()
    assert torch.equal(terms.steps, without.steps)
    assert terms.total_weight() == without.total_weight() == pytest.approx(0.5)
    model, other = World._updated(terms, deltas[0]), World._updated(without, deltas[0])
    assert torch.equal(model, other)
    sent = 0.2 * deltas[0] - residuals[0] + 0.3 * deltas[2] - residuals[2]
    assert bool(sent.any())
    held = terms.carried_in_sections["residual"]
    assert torch.allclose(0.5 * model + held, sent, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize(("groups", "bits"), [
    ([[0], [1], [2]], 4), ([[0, 1], [2], []], 8), ([[*range(18)], [18]], 8),
    ([[*range(19)], [19, 20]], 16)])
def test_all_that_is_sent(groups: list[list[int]], bits: int) -> None:
    """In blocks: of every worker's sum what is not its own section, and its section of the result
    to all others."""
    clients, workers, blocks = sum(map(len, groups)), len(groups), 1094
    world = World(groups, [1 / clients] * clients)
    world.round(drawn(clients))
    section = -(-blocks // workers)
    for worker, plane in zip(world.workers, world.planes, strict=True):
        assert plane.handed_over == [section * (workers - 1) * (8 * bits + 1),
                                     section * (workers - 1) * (32 + 3)]
        assert worker.bytes_sent == 33 * blocks + 8 < 0.516 * SIZE
        assert worker.bytes_received == 35 * blocks + 8 < 0.548 * SIZE


def moments_of(seed: int, clients: int) -> list[dict[str, Tensor]]:
    """Of each client, with its blocks' scales."""
    found = []
    for momentum, rms in zip(drawn(clients, seed=seed), drawn(clients, seed=seed + 1), strict=True):
        rms = rms.abs() + 1e-6
        peaks = torch.stack([block.max() for block in rms.split(BLOCK_OF_MOMENTS)])
        found.append({"momentum": momentum, "rms": rms, "peaks": peaks})
    return found


def test_averaged_moments_are_those_of_eight_bits_and_change_no_update() -> None:
    """Their sums, steps and bytes too, in rounds that average all, one or none of them; a client
    whose moments are not finite is left out of both sums."""
    names, plane = ("momentum", "rms"), DataPlane()
    both = Int4Aggregator(FedAvg(), SIZE, torch.zeros(1), 3, 3, 3, plane, names)
    updates = Int4Aggregator(FedAvg(), SIZE, torch.zeros(1), 3, 3, 3)
    moments = Int8Aggregator(FedAvg(), SIZE, torch.zeros(1), 3, 3, plane, names)
    sums: tuple[Aggregator, ...] = both, updates, moments
    for one in sums:
        one.averages = {name: torch.zeros(SIZE) for name in names}
    residuals = [[{residual_of(name): torch.zeros(SIZE) for name in ("delta", *names)}
                  for _ in range(3)] for _ in sums]
    spoiled = {"momentum": torch.full((SIZE,), math.nan)}
    for number, moving in enumerate([(), names, names, ("momentum",), ()]):
        deltas, theirs = drawn(3, seed=number), moments_of(10 + number, 3)
        for one, kept in zip(sums, residuals, strict=True):
            one.begin(Bounds(BOUND, clip=1.0), moving)
            for k, weight in enumerate((0.5, 0.3, 0.2)):
                given = {"delta": deltas[k]} | theirs[k] | kept[k]
                if number == 2 and k == 1 and one is not updates:
                    assert one.add(given | spoiled, weight) == "momentum not finite"
                elif number != 2 or k != 1:
                    assert not one.add(given, weight)
            one.reduce()
        assert both.residuals == ("delta", *moving)
        assert both.total_weight() == updates.total_weight() == moments.total_weight()
        assert both.bytes_sent - updates.bytes_sent == both.bytes_received - updates.bytes_received
        of_one = 256 * 274 + 2 * 276  # a byte an element, two a block in words of four
        assert moments.bytes_sent == (1 + len(moving)) * of_one + 4 * 274 + 8
        assert both.bytes_sent - updates.bytes_sent == moments.bytes_sent - of_one
        for a, b in both.slices.ranges:
            weight = both.total_weight()
            mean, averages = (dict(found) for found in both.means(a, b, weight))
            assert torch.equal(mean["delta"], updates.means(a, b, weight)[0]["delta"])
            expected = moments.means(a, b, weight)[1]
            assert averages.keys() == expected.keys() == {*moving}
            for name in moving:
                assert torch.equal(averages[name], expected[name])
        for name in ("steps.momentum", "steps.rms", "scales"):
            assert torch.equal(both.carried[name], moments.carried[name])
        assert torch.equal(both.steps, updates.steps)
        for k in range(3):
            for name in map(residual_of, ("delta", *names)):
                other = residuals[1 if name == residual_of("delta") else 2]
                assert torch.equal(residuals[0][k][name], other[k][name])


def test_one_worker_sends_nothing() -> None:
    world = World([[0, 1]], [0.5, 0.5])
    world.round(drawn(2))
    assert bool(world.server.any())
    assert world.planes[0].handed_over == []


@pytest.mark.parametrize("clients", [1, 2, 18, 19, MOST])
def test_sums_of_small_integers_are_what_was_packed(clients: int) -> None:
    largest = clients * LEVELS
    numbers = torch.randint(-largest, largest + 1, (5, BLOCK), dtype=torch.int32)
    numbers[0, :2] = torch.tensor([-largest, largest])
    bits = bits_of_sum(clients)
    packed = pack(numbers, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (5, BLOCK * bits // 8)
    padded = torch.cat([packed, torch.zeros(5, 3, dtype=torch.uint8)], 1)
    assert torch.equal(unpack(padded[:, :-3], bits).int(), numbers)
    assert torch.equal(unpack(padded[3:4, :-3], bits).int(), numbers[3:4])


def test_the_most_clients_fit_sixteen_bits() -> None:
    assert INT4_COHORT == MOST
    assert bits_of_sum(MOST) == 16
    assert MOST * LEVELS < 1 << 15 <= (MOST + 1) * LEVELS


def test_every_client_at_its_furthest_in_the_same_direction() -> None:
    """Of so many that their sum needs two bytes."""
    clients, size = 300, 9 * BLOCK
    delta = torch.full((size,), BOUND)
    delta[1::4] = 0
    delta[2::4] *= -1
    world = World([[*range(290)], [*range(290, 300)]], [1 / clients] * clients, size)
    for _ in range(3):
        before = torch.stack(world.residuals).sum(0) + world.server
        model = world.round([delta] * clients)
        expected = delta + before - torch.stack(world.residuals).sum(0) - world.server
        assert torch.allclose(model, expected, rtol=1e-4, atol=1e-5 * BOUND)
        assert not model[1::4].any()


def test_a_block_in_which_nothing_moves_stays() -> None:
    delta = torch.zeros(3 * BLOCK)
    delta[BLOCK] = 100.0
    world = World([[0]], [1.0], len(delta))
    for _ in range(25):
        model = world.round([delta], bound=200.0)
    assert bool(model[BLOCK])
    model[BLOCK] = 0
    assert not model.any()
    assert torch.equal(world.steps[[0, 2]], torch.full((2,), SMALLEST / LEVELS))


def test_the_references_short_floats_are_those_of_torch() -> None:
    numbers = torch.randn(1000).abs() * 2.0 ** torch.randint(-100, 100, (1000,))
    assert [bfloat16(float(x)) for x in numbers] == numbers.to(torch.bfloat16).double().tolist()


@pytest.mark.parametrize("nodes", [2, 3])
@pytest.mark.parametrize("clients", [1, 2, 25])
def test_a_plan_counts_what_is_exchanged(nodes: int, clients: int) -> None:
    """In four bits, in a byte, and in two."""
    groups = [[node * clients + k for k in range(clients)] for node in range(nodes)]
    worker = World(groups, [1 / (nodes * clients)] * (nodes * clients)).workers[0]
    assert worker.exchanged_bytes(nodes, clients) == worker._sent.nbytes + worker._received.nbytes
    assert worker.exchanged_bytes(1, clients) == 0
