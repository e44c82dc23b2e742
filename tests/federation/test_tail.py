"""The tail of a round against sums in floating point."""

from __future__ import annotations

import dataclasses
import math
import random
import statistics
from itertools import pairwise

import pytest

from fedrun.aggregation.bounds import bound_exceeded
from fedrun.federation.tail import Tail
from fedrun.records.history import cohort_record
from fedrun.strategies.base import ClientReport

CLIENTS = 20
MEASURED = {"step_norm": 0.25, "mean_norm": 0.125, "under_floor": 0.5}


def reports(clients: int = CLIENTS) -> list[ClientReport]:
    """Of clients with weights that sum to less than one; every fifth is left out."""
    draw = random.Random(clients)
    found = []
    for k in range(clients):
        report = ClientReport(k, draw.randrange(100, 200), draw.uniform(500, 900),
                              weight=draw.uniform(0.2, 1) / clients, norm=draw.uniform(0.1, 2),
                              noised_norm=draw.uniform(1, 5000))
        if k % 5 == 3:
            report = dataclasses.replace(
                report, weight=0.0, norm=None, loss_sum=math.nan,
                left_out=bound_exceeded("delta", (math.nan, 2.0)[k % 2], 1.0))
        found.append(report)
    return found


def test_a_tail_holds_the_sums_over_the_clients() -> None:
    made = reports()
    taken = [one for one in made if not one.left_out]
    tail = Tail.of(made, CLIENTS)
    assert (tail.taken, tail.not_finite, tail.beyond_bound) == (16, 2, 2)
    assert tail.otherwise == tail.clamped == 0
    assert tail.left_out == {"not finite": 2, "exceeds its bound": 2}
    assert tail.reasons == "not finite: 2, exceeds its bound: 2"
    assert tail.tokens == sum(one.tokens for one in taken)
    assert tail.loss_sum == pytest.approx(math.fsum(one.loss_sum for one in taken), rel=1e-9)
    assert tail.total_weight == pytest.approx(math.fsum(one.weight for one in taken), rel=1e-9)
    assert tail.noised_norm == pytest.approx(math.sqrt(statistics.fmean(
        one.noised_norm**2 for one in taken if one.noised_norm is not None)), rel=1e-9)


@pytest.mark.parametrize("gradients", [False, True])
def test_a_record_of_sums_is_that_of_the_clients_without_their_columns(gradients: bool) -> None:
    made = reports()
    whole = cohort_record(made, MEASURED, gradients)
    for name in ("client_weights", "gradient_norms" if gradients else "update_norms"):
        assert len(whole.pop(name)) == CLIENTS
    found = Tail.of(made, CLIENTS).sums().record(MEASURED, gradients)
    assert list(found) == list(whole)
    assert found == pytest.approx(whole, rel=1e-8)


def test_a_tail_does_not_depend_on_who_adds_up() -> None:
    made, whole = reports(), Tail.of(reports(), CLIENTS).words()
    for ends in ((0, 20), (0, 1, 1, 20), (0, 7, 13, 20)):
        parts = [Tail.of(made[a:b], CLIENTS).words() for a, b in pairwise(ends)]
        # As words of 64 bits are summed.
        assert [sum(words) % 2**64 for words in zip(*parts, strict=True)] == whole
    assert Tail.from_words(whole).words() == whole
    assert Tail.of([], CLIENTS).words() == [0] * len(whole)


@pytest.mark.parametrize("value", [1e300, math.inf, math.nan, -1e300])
@pytest.mark.parametrize("clients", [1, 3, 300])
def test_a_number_that_is_too_large_is_the_largest_that_fits(value: float, clients: int) -> None:
    spoiled = [ClientReport(k, 100, value, weight=0.5, norm=1e200) for k in range(clients)]
    tail = Tail.of(spoiled, clients)
    assert tail.clamped == 4 * clients, "the loss and three products with the norm"
    assert tail.taken == clients
    assert 2**61 < tail.losses < 2**63
    assert all(0 <= word < 2**63 for word in tail.words())


def test_clipped_clients_are_counted() -> None:
    made = [dataclasses.replace(one, clipped=one.client % 2 == 0) for one in reports()]
    assert Tail.of(made, CLIENTS).clipped == 8, "of ten with an even number two are left out"
    assert Tail.of(reports(), CLIENTS).clipped == 0


def test_reasons_are_told_apart() -> None:
    made = [ClientReport(k, 1, 1.0, left_out=why) for k, why in enumerate([
        "entropy not finite", "delta not finite", "gradient exceeds its bound: 17 > 16",
        "--temperature 0.1: an entropy of 1 nats"])]
    tail = Tail.of(made, 4)
    assert tail.left_out == {"not finite": 2, "exceeds its bound": 1, "other": 1}


@pytest.mark.parametrize(("taken", "left_out", "diverged"), [
    (2, 2, False), (2, 3, True), (0, 1, True), (3, 0, False)])
def test_a_round_diverges_where_more_than_half_are_left_out(taken: int, left_out: int,
                                                            diverged: bool) -> None:
    assert Tail(taken=taken, not_finite=left_out).diverged is diverged
