"""Int8 aggregation: against a numpy reference, nothing lost, the same bits in every world."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from fedrun.aggregation.bounds import Bounds
from fedrun.aggregation.int8 import BLOCK, Int8Aggregator
from fedrun.aggregation.update import ServerUpdate
from fedrun.config import INT8_COHORT
from fedrun.distributed.data_plane import DataPlane
from fedrun.federation.client import Client
from fedrun.flags import resolve
from fedrun.strategies import FedAvg
from fedrun.strategies.base import ServerRound
from tests.support.runs import FAULTY, Run, fault, without_clocks

SIZE = 70_001  # more than one slice, a part of a block at the end


class Wire(DataPlane):
    """Between workers that are all in this process; `workers` is complete when one reduces."""

    def __init__(self, workers: list[Int8Aggregator]) -> None:
        super().__init__()
        self.workers = workers

    def all_max(self, vector: torch.Tensor) -> None:
        for other in self.workers:
            torch.maximum(vector, other.peaks, out=vector)

    def reduce(self, parts: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        return tuple(worker.buffer for worker in self.workers)


def drawn(clients: int, size: int = SIZE, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    spread = torch.rand(size, generator=generator).pow(6)  # blocks of very different sizes
    return [torch.randn(size, generator=generator) * spread * 1e-3 for _ in range(clients)]


def one_round(groups: list[list[int]], deltas: list[torch.Tensor], weights: list[float],
              residuals: list[torch.Tensor]) -> torch.Tensor:
    """The global model after a round from zero, each group of clients on a worker of its own."""
    workers: list[Int8Aggregator] = []
    for group in groups:
        terms = Int8Aggregator(FedAvg(), len(deltas[0]), deltas[0], len(weights), Wire(workers))
        terms.begin(Bounds(1.0))
        for k in group:
            assert not terms.add({"delta": deltas[k], "residual": residuals[k]}, weights[k])
        workers.append(terms)
    for worker, group in reversed([*zip(workers, groups, strict=True)]):  # the first reads them all
        worker.reduce(residuals[k] for k in group)
    model = torch.zeros_like(deltas[0])
    ServerUpdate(FedAvg(), workers[0]).apply(model, {}, ServerRound(1))
    return model


def naive_round(deltas: list[np.ndarray], weights: list[float], residuals: list[np.ndarray]
                ) -> np.ndarray:
    """The docstring's formulas in float64, a block at a time; residuals change in place."""
    clients, size = len(weights), len(deltas[0])
    levels = [1 + math.floor((127 - clients) * w) for w in weights]
    assert sum(levels) <= 127
    mean = np.zeros(size)
    for k in range(clients):
        residuals[k] += weights[k] * deltas[k]
    for a in range(0, size, 256):
        block = slice(a, a + 256)
        step = max(np.abs(residuals[k][block]).max() / levels[k] for k in range(clients))
        for k in range(clients):
            q = np.round(residuals[k][block] / step)
            assert np.abs(q).max() <= levels[k]
            residuals[k][block] -= q * step
            mean[block] += q * step
    return mean / sum(weights)


@pytest.mark.parametrize("weights", [[1.0], [0.5, 0.3, 0.2], [0.25] * 4, [0.9] + [0.1 / 19] * 19])
def test_three_rounds_against_the_formulas_in_float64(weights: list[float]) -> None:
    clients = len(weights)
    residuals = [torch.zeros(SIZE, dtype=torch.float64) for _ in weights]
    naive = [np.zeros(SIZE) for _ in weights]
    for number in range(3):
        deltas = [d.double() for d in drawn(clients, seed=number)]
        model = one_round([list(range(clients))], deltas, weights, residuals)
        expected = naive_round([d.numpy() for d in deltas], weights, naive)
        # A quotient that lies on a tie may be rounded either way: it makes up for it next time.
        apart = np.abs(model.numpy() - expected)
        assert np.mean(apart > 1e-8 * np.abs(expected) + 1e-12) < 1e-3  # weights have 30 bits
        assert apart.sum() <= 1e-3 * np.abs(expected).sum()


def test_same_bits_whatever_the_order_and_placement() -> None:
    weights, deltas = [0.1, 0.2, 0.3, 0.15, 0.25], drawn(5)
    held = [[torch.zeros(SIZE) for _ in weights] for _ in range(4)]
    worlds = ([[0, 1, 2, 3, 4]], [[4, 2], [0], [3, 1]], [[0], [1], [2], [3], [4]],
              [[], [4, 3, 2, 1, 0]])
    models = [one_round(list(groups), deltas, weights, r)
              for groups, r in zip(worlds, held, strict=True)]
    for model, residuals in zip(models[1:], held[1:], strict=True):
        assert torch.equal(model, models[0])
        for mine, first in zip(residuals, held[0], strict=True):
            assert torch.equal(mine, first)


def test_sent_and_residual_add_up_to_what_was_trained() -> None:
    """What was sent and the residuals add up to all that was trained; a residual is at
    most half a step of its block."""
    weights, rounds = [0.7, 0.2, 0.1], 20
    residuals = [torch.zeros(SIZE, dtype=torch.float64) for _ in weights]
    sent = torch.zeros(SIZE, dtype=torch.float64)
    trained = torch.zeros(SIZE, dtype=torch.float64)
    for number in range(rounds):
        deltas = [d.double() for d in drawn(3, seed=number)]
        trained += sum(w * d for w, d in zip(weights, deltas, strict=True))
        sent += one_round([[0, 1, 2]], deltas, weights, residuals)
    assert torch.allclose(sent + sum(residuals), trained, rtol=0, atol=1e-12)
    residuals_seen = torch.stack([r.abs() for r in residuals]).amax(0)
    largest = torch.stack([d.abs() for d in drawn(3, seed=rounds - 1)]).amax()
    assert float(residuals_seen.max()) < float(largest) / 10
    assert float((sent - trained).norm()) < 0.02 * float(trained.norm())


@pytest.mark.parametrize(("last", "why"), [
    (math.nan, "delta not finite"), (-45.0, "delta exceeds its bound: 45 > 1")])
def test_a_left_out_client_adds_nothing_and_keeps_its_residual(last: float, why: str) -> None:
    deltas = drawn(3)
    bad = deltas[1].clone()
    bad[SIZE - 1] = last
    terms = Int8Aggregator(FedAvg(), SIZE, deltas[0], 3)
    terms.begin(Bounds(1.0))
    residuals = [torch.zeros(SIZE), torch.full((SIZE,), 1e-6), torch.zeros(SIZE)]
    taken = [terms.add({"delta": d, "residual": r}, w) for d, r, w in
             zip((deltas[0], bad, deltas[2]), residuals, (0.2, 0.5, 0.3), strict=True)]
    assert taken == ["", why, ""]
    assert torch.equal(residuals[1], torch.full((SIZE,), 1e-6))
    terms.reduce(residuals[::2])
    model = torch.zeros(SIZE)
    ServerUpdate(FedAvg(), terms).apply(model, {}, ServerRound(1))
    expected = (0.2 * deltas[0].double() + 0.3 * deltas[2].double()) / 0.5
    assert float((model - expected).norm() / expected.norm()) < 0.05


def test_a_residual_survives_a_round_in_which_its_client_is_left_out(
        run_here: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a residual that is lost would be seen: the final bits depend on it."""
    healthy, residuals_seen = Client.forget, []

    def forget(client: Client) -> None:
        before = client.vectors["residual"].clone()
        healthy(client)
        residuals_seen.append((before, client.vectors["residual"].clone()))

    monkeypatch.setattr(Client, "forget", forget)
    broken_train = Client.train

    def train(client: Client, *args: Any, **kwargs: Any) -> Any:
        losses = broken_train(client, *args, **kwargs)
        if client.index == 1 and client.steps_done > 2:
            client.flat.vector[0] = math.nan
        return losses

    monkeypatch.setattr(Client, "train", train)
    outcome = run_here("fed_avg", "--num_clients", 2, "--rounds", 3, "--aggregation", "int8",
                       "--local_updates", 2)
    assert outcome.code == 0, outcome.output
    assert len(residuals_seen) == 2
    for before, after in residuals_seen:
        assert bool(before.any())
        assert torch.equal(before, after)


def test_bytes_sent_are_those_that_the_collectives_transfer() -> None:
    class Counting(DataPlane):
        carried = 0

        def all_max(self, vector: torch.Tensor) -> None:
            self.carried += vector.nbytes

        def reduce(self, parts: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
            self.carried += parts[0].nbytes
            return super().reduce(parts)

    plane = Counting()
    terms = Int8Aggregator(FedAvg(), SIZE, torch.zeros(SIZE), 1, plane)
    terms.begin(Bounds(1.0))
    residual = torch.zeros(SIZE)
    assert not terms.add({"delta": drawn(1)[0], "residual": residual}, 1.0)
    terms.reduce([residual])
    assert plane.carried == terms.bytes_sent < 1.02 * SIZE


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(1e-3, 1.0), min_size=1, max_size=INT8_COHORT), st.booleans())
def test_no_byte_carries_into_the_next(raw: list[float], up: bool) -> None:
    """Every client at its furthest in the same direction, whatever the weights."""
    total = math.fsum(raw)
    weights = [w / total for w in raw]
    size = 2 * BLOCK
    delta = torch.full((size,), 1e-3 if up else -1e-3)
    delta[1::4] = 0
    delta[2::4] *= -1
    residuals = [torch.zeros(size) for _ in weights]
    model = one_round([list(range(len(weights)))], [delta] * len(weights), weights, residuals)
    expected = torch.stack([w * delta - r for w, r in zip(weights, residuals, strict=True)]).sum(0)
    assert torch.allclose(model, expected, rtol=1e-4, atol=1e-7)
    assert not model[1::4].any()


def test_a_block_in_which_nothing_moves_stays() -> None:
    delta = torch.zeros(3 * BLOCK)
    delta[BLOCK] = 1.0
    model = one_round([[0]], [delta], [1.0], [torch.zeros(3 * BLOCK)])
    assert torch.equal(model, delta)


FLAGS = ("--aggregation", "int8", "--num_clients", 5, "--local_updates", 2, "--rounds", 5)


def test_the_same_bits_in_every_world(run: Run) -> None:
    alone, *many = (run("fed_avg", *FLAGS, processes=n, name=f"in_{n}") for n in (1, 2, 3, 5))
    for other in many:
        assert alone.code == other.code == 0, other.output
        assert alone.bits == other.bits
        assert without_clocks(alone) == without_clocks(other)


def test_a_quarter_of_the_bytes_for_nearly_the_same_model(run: Run) -> None:
    exact = run("fed_avg", *FLAGS, "--aggregation", "exact", name="exact")
    int8 = run("fed_avg", *FLAGS, name="int8")
    size = sum(t.numel() for t in int8.model.values())
    blocks = -(-size // BLOCK)
    assert exact.history[-1]["bytes"] == 5 * 5 * 2 * 4 * (size + 1)
    # A byte an element, a step for each block, the sums of weights and of levels.
    assert int8.history[-1]["bytes"] == 5 * 5 * 2 * (BLOCK * blocks + 4 * blocks + 8)
    assert int8.bits != exact.bits
    assert int8.history[-1]["server_val_loss"] == pytest.approx(
        exact.history[-1]["server_val_loss"], rel=0.02)


def test_residuals_are_part_of_a_checkpoint(run: Run, tmp_path: Path) -> None:
    flags = (*FLAGS, "--cohort", 3, "--checkpoint_freq", 1)
    alone = run("diloco", *flags, name="alone")
    stopped = run("diloco", *flags, script=FAULTY, env=fault(tmp_path, "term", "record:3"))
    held = [load_file(file) for file in stopped.run_dir.glob("checkpoints/*/client_*")]
    assert sum("residual" in client for client in held) >= 3
    resumed = run("diloco", *flags, processes=3)
    assert "resuming from step" in resumed.output
    assert resumed.bits == alone.bits


@pytest.mark.parametrize(("method", "flags", "message"), [
    ("fed_fisher", {}, "--aggregation int8: must be exact or float for fed_fisher"),
    ("fed_entropy", {}, "--aggregation int8: must be exact or float for fed_entropy"),
    ("fed_sgd", {}, "--aggregation int8: must be exact or float for fed_sgd"),
    ("fed_avg", {"client_moments": "average"}, "--client_moments average: must be keep, reset or"),
    ("fed_avg", {"sync": "epoch"}, "--sync epoch: must be round with --aggregation int8"),
    ("fed_avg", {"num_clients": "127"}, "--cohort 127: must be at most 126 clients"),
])
def test_what_eight_bits_cannot_carry_is_refused(method: str, flags: dict[str, str], message: str
                                                 ) -> None:
    with pytest.raises(ValueError, match=message):
        resolve(method, {"aggregation": "int8"} | flags)
