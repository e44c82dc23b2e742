"""The geometric median: against a naive one in float64 on recorded updates, by hand, and what a run
says of it."""

from __future__ import annotations

import math
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fedrun.aggregation.bounds import Bounds
from fedrun.aggregation.update import ServerUpdate
from fedrun.aggregation.weiszfeld import WeiszfeldAggregator
from fedrun.flags import resolve
from fedrun.strategies.base import ServerRound
from fedrun.strategies.fed_geometric_median import SMOOTHING, FedGeometricMedian
from tests.support.naive_geometric_median import distances, weiszfeld
from tests.support.naive_strategies import SIZE, UPDATE, record
from tests.support.runs import Run, assert_equal, fault
from tests.support.spoiled import held_against_one_of_five, spoil_updates

NU = SMOOTHING * UPDATE * math.sqrt(SIZE)


def aggregated(steps: int, updates: list[Tensor], weights: list[float], dtype: torch.dtype
               ) -> tuple[Tensor, dict[int, float]]:
    """How far a model of this type moves, and what counted of each client's weight."""
    strategy = FedGeometricMedian(weiszfeld_steps=steps)
    size = len(updates[0])
    terms = WeiszfeldAggregator(strategy, size, torch.zeros((), dtype=dtype), len(updates))
    terms.begin(Bounds(UPDATE))
    terms.expect([range(len(updates))])
    for client, (update, weight) in enumerate(zip(updates, weights, strict=True)):
        terms.keep(client, update.to(dtype), weight)
    terms.reduce()
    model = torch.zeros(size, dtype=dtype)
    ServerUpdate(strategy, terms).apply(model, {}, ServerRound(1))
    return model, terms.used


def recorded(clients: int, seed: int) -> tuple[list[Tensor], list[float]]:
    """Updates of lengths that differ, and weights by samples."""
    outputs = record(clients, seed)
    tokens = [o.shard_tokens for o in outputs]
    return ([o.vectors["delta"] * (0.1 + 0.9 * k / clients) for k, o in enumerate(outputs)],
            FedGeometricMedian().plan_weights(tokens, 1))


@pytest.mark.parametrize("steps", [1, 3, 32])
@pytest.mark.parametrize("clients", [1, 2, 3, 9])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_against_the_naive_algorithm_on_recorded_updates(
        clients: int, steps: int, dtype: torch.dtype, tolerance: float) -> None:
    """tolerance: of the largest update."""
    for seed in range(2):
        updates, weights = recorded(clients, seed)
        found, _ = aggregated(steps, updates, weights, dtype)
        expected = weiszfeld(torch.stack(updates).numpy(), np.array(weights), NU, steps)
        assert np.abs(found.double().numpy() - expected).max() < tolerance * UPDATE
        assert abs(expected).max() > 1e-4


def test_many_steps_reach_the_geometric_median() -> None:
    updates, weights = recorded(9, 4)
    matrix, of_client = torch.stack(updates).numpy(), np.array(weights)
    found = aggregated(32, updates, weights, torch.float64)[0].numpy()
    three = aggregated(3, updates, weights, torch.float64)[0].numpy()
    lowest = distances(matrix, of_client, found)
    assert lowest < distances(matrix, of_client, of_client @ matrix)
    # Unit vectors towards the clients cancel there (Weiszfeld 1937), where it is no client itself.
    away = matrix - found
    pull = (of_client[:, None] * away / np.linalg.norm(away, axis=1, keepdims=True)).sum(0)
    assert np.linalg.norm(pull) < 1e-3
    random = np.random.default_rng(0)
    for other in (three, *(found + 1e-3 * UPDATE * random.standard_normal(SIZE)
                           for _ in range(5))):
        assert distances(matrix, of_client, other) > lowest


def test_two_clients_by_hand() -> None:
    """In a plane: (3, 4) and (0, -10), times a unit, weighted 2 : 1, far further apart than nu."""
    unit = UPDATE / 10
    updates = [torch.tensor([3.0, 4.0], dtype=torch.float64) * unit,
               torch.tensor([0.0, -10.0], dtype=torch.float64) * unit]
    # From zero they are 5 and 10 away: 2/5 to 1/10 are 4 : 1, and the mean is (2.4, 1.2).
    found, used = aggregated(1, updates, [2 / 3, 1 / 3], torch.float64)
    assert (found / unit).tolist() == pytest.approx([2.4, 1.2], rel=1e-12)
    assert used[0] / used[1] == pytest.approx(2)
    # From there the first is sqrt(0.36 + 7.84), the second sqrt(5.76 + 125.44) away: 1 : 4, so
    # that 2 : 1 becomes 8 : 1.
    found, used = aggregated(2, updates, [2 / 3, 1 / 3], torch.float64)
    assert (found / unit).tolist() == pytest.approx([8 / 3, (8 * 4 - 10) / 9], rel=1e-12)
    assert used[0] / used[1] == pytest.approx(4)
    # All clients at one point within nu: their mean, and all of every weight.
    near = [NU / 10 * torch.ones(2, dtype=torch.float64) / SIZE] * 2
    found, used = aggregated(3, near, [0.5, 0.5], torch.float64)
    assert torch.allclose(found, near[0], rtol=1e-9, atol=0)
    assert set(used.values()) == {1.0}


@pytest.mark.parametrize("hostile", [1, 3])
def test_clients_at_the_bound_with_the_sign_turned_move_it_little(hostile: int) -> None:
    """Of eight, of which the honest ones agree in part, as clients do. The plain mean of all points
    the other way."""
    outputs = record(9, 7)
    common = outputs[8].vectors["delta"]
    updates = [0.02 * (common + 0.5 * o.vectors["delta"]) for o in outputs[:8]]
    weights = [1 / 8] * 8
    for k in range(hostile):
        updates[k] = -UPDATE * common.sign()
    honest = torch.stack(updates[hostile:]).mean(0)
    found, used = aggregated(3, updates, weights, torch.float32)
    mean = torch.stack(updates).mean(0)
    cosine = torch.nn.functional.cosine_similarity
    assert cosine(mean, honest, dim=0) < -0.5
    assert cosine(found.double(), honest, dim=0) > 0.9
    spread = max(float((one - honest).norm()) for one in updates[hostile:])
    assert float((found - honest).norm()) < spread * (1 if hostile == 1 else 2)
    assert max(used[k] for k in range(hostile)) < 0.05 * min(
        used[k] for k in range(hostile, 8))


def test_permuting_clients_changes_no_bit() -> None:
    updates, weights = recorded(7, 3)
    order = Random(0).sample(range(7), 7)
    one, used = aggregated(3, updates, weights, torch.float32)
    other, moved = aggregated(3, [updates[k] for k in order], [weights[k] for k in order],
                              torch.float32)
    assert torch.equal(one, other)
    assert [moved[k] for k in range(7)] == [used[k] for k in order]


def test_a_client_of_next_to_no_weight_is_still_in_the_sum() -> None:
    """Where nobody else is left: its weight is not rounded to none."""
    updates, _ = recorded(1, 3)
    found, _ = aggregated(3, updates, [1e-8], torch.float64)
    assert (found - updates[0]).abs().max() < 1e-9 * UPDATE
    found, _ = aggregated(3, updates, [1e-8], torch.float32)
    assert found.isfinite().all()


# ---- runs --------------------------------------------------------------------------------------

def test_one_hostile_client_of_five(run_here: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run gets better as without it, and its history and events tell of it."""
    held, rounds = held_against_one_of_five(
        run_here, monkeypatch, "fed_geometric_median", "--weighting", "uniform")
    for event in rounds:
        used = [client["used"] for client in event["clients"]]
        assert max(used) == 1
        assert min(used) == used[3] < 0.5
        shares = [client["weight"] for client in event["clients"]]
        assert shares == pytest.approx([share / sum(used) for share in used])
    for one in held.history:
        assert [client for client, *_ in one["client_used"]] == list(range(5))
        assert min(one["client_used"], key=lambda used: used[2])[0] == 3
        assert -1 <= one["update_cosine"] <= 1
    assert "keep the updates of a round's 5 clients" in held.output


def test_a_client_left_out_has_no_weight(run_here: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil_updates(monkeypatch, math.nan, 2, {1})
    outcome = run_here("fed_geometric_median", "--num_clients", 4, "--rounds", 3)
    assert outcome.code == 0, outcome.output
    assert outcome.history[-1]["left_out"] == [[2, 1]]
    event = next(e for e in outcome.events if e.get("round") == 2)
    assert ["used" in client for client in event["clients"]] == [True, False, True, True]


def test_a_clip_goes_before_the_weights(run_here: Run) -> None:
    flags = ("--num_clients", 3, "--rounds", 2)
    free, held, median = (run_here("fed_geometric_median", *flags, *clip, name=f"clip_{number}")
                          for number, clip in enumerate([(), ("--client_clip", "0.01"),
                                                         ("--client_clip", "median")]))
    assert free.code == held.code == median.code == 0, held.output + median.output
    assert len({free.bits, held.bits, median.bits}) == 3
    assert held.history[-1]["step_norm"] < 0.0101
    assert held.history[-1]["clipped"] == 3


@pytest.mark.parametrize(("flags", "message"), [
    ({"weiszfeld_steps": 0}, "--weiszfeld_steps 0: must be an integer from 1 to 32"),
    ({"aggregation": "int8"}, "--aggregation int8: must be exact with fed_geometric_median"),
    ({"aggregation": "float"}, "--aggregation float: must be exact with fed_geometric_median"),
    ({"client_moments": "average"}, "--client_moments average: must be keep, reset"),
    ({"sync": "epoch"}, "--sync epoch: must be round with fed_geometric_median"),
    ({"dp": "client", "dp_clip": 1, "dp_noise": 1, "dp_delta": 1e-3},
     "--dp client: must be none with fed_geometric_median"),
])
def test_what_it_does_not_go_with_names_the_flag(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolve("fed_geometric_median", flags)


@pytest.mark.timeout(300)
@pytest.mark.slow
@pytest.mark.parametrize("stage", [
    pytest.param("train", marks=pytest.mark.soak), "between",
    pytest.param("reduced", marks=pytest.mark.soak)])
def test_kill_and_resume(run: Run, tmp_path: Any, stage: str) -> None:
    """A worker of three is killed, between the sums of a round too; then all start again."""
    flags = ("--num_clients", 5, "--rounds", 6, "--checkpoint_freq", 2)
    whole = run("fed_geometric_median", *flags, name="whole")
    killed = run("fed_geometric_median", *flags, name="killed", processes=4,
                 script="tests.support.faulty_fedrun", env=fault(tmp_path, "kill", f"{stage}:3", 2))
    assert killed.code != 0, killed.output
    assert (tmp_path / "struck").exists()
    resumed = run("fed_geometric_median", *flags, name="killed", processes=4)
    assert_equal(resumed, whole)
