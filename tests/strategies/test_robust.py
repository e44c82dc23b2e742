"""Robust rules: against naive ones in float64 on recorded updates, and what a run says of them."""

from __future__ import annotations

import math
import re
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedrun.aggregation.bounds import Bounds
from fedrun.aggregation.gathering import GatheringAggregator
from fedrun.aggregation.ordering import in_order, products, squared_distances, trimmed_mean
from fedrun.aggregation.update import ServerUpdate
from fedrun.flags import resolve
from fedrun.strategies.base import ServerRound
from fedrun.strategies.fed_krum import FedKrum
from fedrun.strategies.robust import Robust
from tests.support.naive_robust import CASES
from tests.support.naive_strategies import SIZE, UPDATE, record
from tests.support.runs import Run, assert_equal, error_lines, fault
from tests.support.spoiled import held_against_one_of_five, spoil_updates


def aggregated(strategy: Robust, updates: dict[int, Tensor], clients: int, dtype: torch.dtype
               ) -> tuple[Tensor, dict[int, float]]:
    """How far a model of this type moves, and how much of each client is used. clients: of the
    round, of which the missing ones are left out."""
    terms = GatheringAggregator(strategy, SIZE, torch.zeros((), dtype=dtype), clients, clients)
    terms.begin(Bounds(UPDATE))
    terms.expect([range(clients)])
    for client, update in updates.items():
        terms.keep(client, update.to(dtype))
    terms.reduce()
    model = torch.zeros(SIZE, dtype=dtype)
    ServerUpdate(strategy, terms).apply(model, {}, ServerRound(1))
    return model, terms.used


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-8)])
def test_against_the_naive_rule_on_recorded_updates(case: str, dtype: torch.dtype,
                                                    tolerance: float) -> None:
    strategy, clients, rule = CASES[case]
    for seed in range(3):
        # Some lie close together, so that rules that choose have a choice.
        recorded = [o.vectors["delta"] * (0.2 + 0.1 * k) for k, o in enumerate(
            record(clients, seed))]
        found, used = aggregated(strategy, dict(enumerate(recorded)), clients, dtype)
        expected = rule(torch.stack(recorded).numpy())
        assert np.abs(found.double().numpy() - expected).max() < tolerance
        assert abs(expected).max() > 1e-3
        assert sorted(used) == list(range(clients))
        if isinstance(strategy, FedKrum):
            assert sum(used.values()) == (strategy.krum_clients or 4)
        else:
            middle = clients - 2 * strategy.trimmed(clients)
            assert sum(used.values()) == pytest.approx(middle)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(sorted(CASES)), st.integers(0, 1000), st.randoms(use_true_random=False))
def test_permuting_clients_changes_no_bit(case: str, seed: int, random: Random) -> None:
    strategy, clients, _ = CASES[case]
    updates = [o.vectors["delta"] for o in record(clients, seed)]
    order = random.sample(range(clients), clients)
    one, used = aggregated(strategy, dict(enumerate(updates)), clients, torch.float32)
    other, moved = aggregated(strategy, {k: updates[order[k]] for k in range(clients)}, clients,
                              torch.float32)
    assert torch.equal(one, other)
    assert [moved[k] for k in range(clients)] == [used[order[k]] for k in range(clients)]


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(sorted(CASES)), st.integers(0, 1000))
def test_a_client_that_is_left_out_is_as_one_that_was_never_there(case: str, seed: int) -> None:
    strategy, clients, rule = CASES[case]
    if clients <= strategy.fewest or strategy == FedKrum(1, krum_clients=6):
        return
    updates = dict(enumerate(o.vectors["delta"] for o in record(clients, seed)))
    del updates[1]
    found, used = aggregated(strategy, updates, clients, torch.float64)
    assert sorted(used) == sorted(updates)
    if not isinstance(strategy, FedKrum) or strategy.krum_clients:  # as many as one client fewer
        expected = rule(torch.stack(list(updates.values())).numpy())
        assert np.abs(found.numpy() - expected).max() < 1e-10


@pytest.mark.parametrize("case", CASES)
def test_what_f_clients_send_moves_the_result_no_further_than_the_others_lie(case: str) -> None:
    """Whatever it is: here all that a grid has."""
    strategy, clients, _ = CASES[case]
    honest = [0.1 * o.vectors["delta"] for o in record(clients, 5)]
    for sign in (1, -1):
        updates = dict(enumerate(honest)) | dict.fromkeys(range(strategy.byzantine),
                                                          torch.full((SIZE,), sign * UPDATE))
        found, used = aggregated(strategy, updates, clients, torch.float64)
        others = torch.stack(honest[strategy.byzantine:])
        if strategy.by_distance:
            assert all(used[k] == 0 for k in range(strategy.byzantine)) or (
                strategy == FedKrum(1, krum_clients=6))
        assert (found <= others.amax(0) + 1e-10).all()
        assert (found >= others.amin(0) - 1e-10).all()


# ---- integers ----------------------------------------------------------------------------------

numbers = st.integers(-(1 << 30), 1 << 30) | st.sampled_from([-(1 << 30), -1, 0, 1, 1 << 30])


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 9).flatmap(lambda rows: st.lists(st.lists(
    numbers, min_size=3, max_size=3), min_size=rows, max_size=rows)), st.integers(0, 4))
def test_orders_means_and_distances_are_exact(made: list[list[int]], cut: int) -> None:
    rows = [torch.tensor(row, dtype=torch.int32) for row in made]
    assert torch.equal(torch.stack(in_order(rows)), torch.stack(rows).sort(0).values)
    cut = min(cut, (len(rows) - 1) // 2)
    mean, taken = trimmed_mean(rows, cut)
    for j, column in enumerate(zip(*made, strict=True)):
        middle = sorted(column)[cut:len(made) - cut]
        assert int(mean[j]) == round(sum(middle) / len(middle))
    for row, count in zip(made, taken, strict=True):
        assert int(count) == sum(sorted(column)[cut] <= x <= sorted(column)[-1 - cut]
                                 for x, column in zip(row, zip(*made, strict=True), strict=True))
    found = squared_distances(products(rows).tolist())
    assert found == [[sum((a - b) ** 2 for a, b in zip(one, other, strict=True)) for other in made]
                     for one in made]


def test_distances_over_long_sections_do_not_overflow() -> None:
    """Of the largest differences, over more elements than 64 bits would hold them of."""
    rows = [torch.full((1 << 16,), value, dtype=torch.int32) for value in (-(1 << 30), 1 << 30)]
    found = squared_distances((products(rows) * 1000).tolist())
    assert found[0][1] == found[1][0] == (1 << 62) * (1 << 16) * 1000 > 1 << 87


def test_equal_scores_take_the_lower_number() -> None:
    """Two pairs, each as close: in either pair both have the same score."""
    distances = [[0, 1, 9, 9, 9], [1, 0, 9, 9, 9], [9, 9, 0, 1, 9], [9, 9, 1, 0, 9], [9] * 4 + [0]]
    assert FedKrum(1, krum_clients=1).choose(distances) == [0]
    assert FedKrum(1, krum_clients=3).choose(distances) == [0, 1, 2]
    assert FedKrum(1).choose(distances) == [0, 1]


# ---- runs --------------------------------------------------------------------------------------

@pytest.mark.parametrize("method", ["fed_median", "fed_trimmed_mean", "fed_krum"])
def test_one_hostile_client_of_five(run_here: Run, monkeypatch: pytest.MonkeyPatch, method: str
                                    ) -> None:
    """The run gets better as without it, and its history and events tell of it."""
    held, rounds = held_against_one_of_five(run_here, monkeypatch, method)
    for event in rounds:
        used = [client["used"] for client in event["clients"]]
        assert min(used) == used[3] < 0.25
        assert [client["weight"] for client in event["clients"]] == pytest.approx(
            [share / 2 for share in used] if method == "fed_krum" else [0.2] * 5)
    for record_, since in zip(held.history, (1, 1, 2), strict=True):
        assert [one[:2] for one in record_["client_used"]] == [[k, since] for k in range(5)]
        means = [one[2] for one in record_["client_used"]]
        assert min(means) == means[3]
        assert ("update_cosine" in record_) == (method == "fed_krum")
    assert "updates of a round's 5 clients" in held.output


def test_a_client_left_out_shrinks_the_round_until_too_few_are_left(
        run_here: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil_updates(monkeypatch, math.nan, 2, {1})
    outcome = run_here("fed_median", "--num_clients", 4, "--rounds", 3)
    assert outcome.code == 0, outcome.output
    assert outcome.history[-1]["left_out"] == [[2, 1]]
    event = next(e for e in outcome.events if e.get("round") == 2)
    assert ["used" in client for client in event["clients"]] == [True, False, True, True]
    monkeypatch.undo()
    spoil_updates(monkeypatch, math.nan, 2, {1})
    ended = run_here("fed_krum", "--num_clients", 5, "--rounds", 3, name="ended")
    assert ended.code == 1
    (line,) = error_lines(ended.output)
    assert re.search(r"round 2: --byzantine 1 needs 5 clients whose updates are finite and within "
                     r"the bound, and there are 4 \(client 1: delta not finite\)", line), line
    assert ended.outcome["kind"] == "error"


def test_a_clip_and_a_rule_go_together(run_here: Run) -> None:
    flags = ("--num_clients", 3, "--rounds", 2, "--client_clip")
    free, held, median = (run_here("fed_median", *flags, clip, name=f"clip_{clip}")
                          for clip in ("1e3", "0.01", "median"))
    assert free.code == held.code == median.code == 0, held.output + median.output
    assert len({free.bits, held.bits, median.bits}) == 3
    assert held.history[-1]["step_norm"] < 0.02
    assert (free.history[-1]["clipped"], held.history[-1]["clipped"]) == (0, 3)
    assert all(0 < used < 1 for _, _, used in free.history[-1]["client_used"]), "by the rule alone"
    event = next(e for e in median.events if e.get("round") == 1)
    assert len(event["clipped"]) == 1, "of three, one has a longer update than the middle one"


@pytest.mark.parametrize(("method", "flags", "message"), [
    ("fed_median", {"num_clients": 4, "byzantine": 2}, "--byzantine 2: must be such that "
     r"fed_median has 5 clients in a round, which are 4 \(--num_clients, --cohort\)"),
    ("fed_trimmed_mean", {"num_clients": 9, "cohort": 4, "byzantine": 2}, "--byzantine 2: must be"),
    ("fed_krum", {"num_clients": 8, "byzantine": 3}, "--byzantine 3: must be such that fed_krum "
     "has 9 clients in a round"),
    ("fed_krum", {"byzantine": 0}, "--byzantine 0: must be an integer >= 1"),
    ("fed_krum", {"num_clients": 8, "krum_clients": 8}, "--krum_clients 8: must be from 1 to 7"),
    ("fed_median", {"aggregation": "int8"}, "--aggregation int8: must be exact with fed_median"),
    ("fed_median", {"aggregation": "float"}, "--aggregation float: must be exact with fed_median"),
    ("fed_median", {"client_moments": "average"}, "--client_moments average: must be keep, reset"),
    ("fed_median", {"sync": "epoch"}, "--sync epoch: must be round with fed_median"),
    ("fed_median", {"dp": "client", "dp_clip": 1, "dp_noise": 1, "dp_delta": 1e-3},
     "--dp client: must be none with fed_median, which has to see single updates"),
])
def test_what_a_rule_does_not_go_with_names_the_flag(method: str, flags: dict[str, Any],
                                                     message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolve(method, flags)


@pytest.mark.timeout(300)
@pytest.mark.slow
@pytest.mark.parametrize("stage", [
    pytest.param("train", marks=pytest.mark.soak), pytest.param("reduce", marks=pytest.mark.soak),
    "reduced"])
def test_kill_and_resume(run: Run, tmp_path: Any, stage: str) -> None:
    """A worker of three is killed, in the middle of what it gathers too; then all start
    again."""
    flags = ("--num_clients", 5, "--rounds", 6, "--checkpoint_freq", 2, "--client_clip", "median")
    whole = run("fed_krum", *flags, name="whole")
    killed = run("fed_krum", *flags, name="killed", processes=4,
                 script="tests.support.faulty_fedrun", env=fault(tmp_path, "kill", f"{stage}:3", 2))
    assert killed.code != 0, killed.output
    assert (tmp_path / "struck").exists()
    resumed = run("fed_krum", *flags, name="killed", processes=4)
    assert_equal(resumed, whole)
