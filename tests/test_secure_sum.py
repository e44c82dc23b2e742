"""The benchmark of masked sums: its numbers belong together, and its sums are true."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.benchmarks import secure_sum
from tests.benchmarks.secure_sum import HEADER, measure, numbers, ours, row, running, vectors
from tests.benchmarks.secure_sum_ranks import term


def test_medians_and_ratios_of_hand_made_samples() -> None:
    plain, masked = ([{"seconds": seconds, "cpu": cpu} for seconds, cpu in samples] for samples in (
        [(2.0, 1.0), (9.0, 1.0), (1.0, 4.0)], [(3.0, 5.0), (3.0, 1.5), (8.0, 1.0)]))
    found = numbers(plain, masked)
    assert found == {"plain seconds": 2.0, "masked seconds": 3.0, "seconds ratio": 1.5,
                     "plain cpu": 1.0, "masked cpu": 1.5, "cpu ratio": 1.5}
    assert row(3, 1000, found).count("|") == HEADER.splitlines()[0].count("|")


@pytest.mark.parametrize("sites", [3, 5])
def test_the_sums_that_are_timed_do_not_wrap(sites: int) -> None:
    terms = torch.stack([term(1000, rank) for rank in range(sites)])
    assert torch.equal(terms.sum(0, dtype=torch.int32), terms.long().sum(0))
    assert len(set(terms[:, 7].tolist())) == sites


@pytest.mark.slow
def test_three_sites_sum_with_and_without_masks() -> None:
    """Each compares every sum with the true one."""
    with running(3, 1000, apart=False) as ranks:
        for masked in (False, True, True):
            found = ranks.ask({"masked": masked}, timeout=60)
            assert found["seconds"] > 0
            assert found["cpu"] >= 0


def test_our_side_of_the_comparison_is_exact() -> None:
    updates = vectors(1000)
    assert np.abs(updates).max() <= secure_sum.BOUND
    found = ours(updates, repetitions=1)
    assert found["masks"] == 0
    assert found["difference"] < 2**-24 * secure_sum.BOUND
    assert secure_sum.difference(updates[0], updates) > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("sites", [3, 5])
def test_sites_in_network_namespaces(sites: int) -> None:
    if not secure_sum.may_make_namespaces():
        pytest.skip("this user may not make network namespaces")
    found = measure(sites, 100_000, sums=2, apart=True)
    assert all(value > 0 for value in found.values())


def test_rates_of_the_cipher() -> None:
    found = secure_sum.rates(1 << 20)
    assert len(found) == 3
    assert all(rate > 1e6 for rate in found.values())
