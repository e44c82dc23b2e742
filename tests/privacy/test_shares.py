"""Noise of which each site adds a share: how much is left without some of them, what a round costs,
and which settings and schedules go with it."""

from __future__ import annotations

import collections
import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedrun.common.errors import InputError
from fedrun.config import FederatedConfig
from fedrun.federation.noise_keeper import level_of
from fedrun.federation.schedule import Schedule
from fedrun.privacy.accountant import gaussian_epsilon, zcdp_epsilon
from fedrun.privacy.client_level import ClientLevel, update_bound
from fedrun.privacy.shares import SharedLevel, SpentOnShares, spread
from fedrun.secure.noise import NoiseKey, stream
from tests.support.private import PRIVATE
from tests.support.site_runs import config_with, make_sites

SEQUENCES = {"dp": "example", "secure_sum": "false"}


def shared_config(folder: Path, *clients: int, method: str = "fed_avg", **flags: object
                  ) -> FederatedConfig:
    """Of a run with --dp client between sites with these numbers of clients; made once."""
    if not (folder / "sites.yaml").exists():
        make_sites(folder, *clients)
    given = PRIVATE | {"rounds": 9} | flags
    return config_with(folder, method, {k: str(v) for k, v in given.items() if v is not None})


# ---- the mechanism -------------------------------------------------------------------------------

@pytest.mark.parametrize(("sites", "colluding"), [(3, 0), (3, 1), (5, 1), (8, 4)])
def test_the_shares_that_are_counted_on_have_the_variance_of_the_multiplier(
        sites: int, colluding: int) -> None:
    level = SharedLevel(0.5, 1.5, 4, 10_000, sites, colluding)
    hidden = sites - 1 - colluding
    assert level.scale == 2.0 ** (30 - math.ceil(math.log2(
        update_bound(0.5, 1.5 * math.sqrt(sites / hidden), 4))))
    sigma = 1.5 * (0.5 / 4 * level.scale * (1 + 2**-20) + 50)
    assert level.variance.denominator == 1
    assert 0 <= hidden * level.variance - sigma**2 - 4 <= hidden + 1 + 1e-9 * sigma**2
    assert level.element == pytest.approx(1.5 * math.sqrt(sites / hidden) * 0.5 / 4, rel=1e-3)
    assert level.distance == hidden * 10_000 * level.sampler.distance
    # Kairouz et al. 2021, of that many shares: tau is nothing at 10 steps.
    rho = level.sensitivity**2 / (2 * hidden * float(level.variance))
    assert level.rho == pytest.approx(rho, rel=1e-12)
    assert level.rho <= 1 / (2 * 1.5**2), "which is charged"
    assert level.rho == pytest.approx(1 / (2 * 1.5**2), rel=1e-6)


def test_the_grid_has_room_for_all_shares_at_the_same_time() -> None:
    level = SharedLevel(0.5, 1.5, 4, 1000, 5, 3)
    deviation = math.sqrt(5 * level.variance)
    assert 0.5 * level.scale + 8 * deviation < 2**30
    narrow = ClientLevel(0.5, 1.5, 4, 1000)
    assert level.scale < narrow.scale


def test_a_share_of_less_than_ten_steps_is_refused() -> None:
    # Of all three shares 10 steps would be enough.
    coarse = 11 / ClientLevel(0.5, 1e-8, 6, 1000).sensitivity
    _ = ClientLevel(0.5, coarse, 6, 1000).variance
    with pytest.raises(InputError, match=r"--dp_noise .*: must be larger: each site's share of the "
                       r"noise would be 6\.\d steps of the grid, and needs 10"):
        _ = SharedLevel(0.5, coarse, 6, 1000, 4, 0).variance


def test_the_sum_of_recorded_shares_has_the_variance_and_law_that_are_claimed() -> None:
    """Of all, and of those that are left: mean, variance, third and fourth moment, tails, and a
    chi-square over sixteen parts of equal probability, within five standard errors each."""
    from scipy.stats import chisquare, norm

    level, size = SharedLevel(0.5, 1.5, 4, 50_000, 5, 1), 50_000
    shares = [level.sampler.sample(stream(NoiseKey(bytes([n]) * 32).round_key({"round": 1}), 0),
                                   size) for n in range(5)]
    for counted, of in ((5, shares), (3, shares[:3])):
        total = sum(of[1:], of[0])
        scaled = total / math.sqrt(counted * level.variance)
        error = 1 / math.sqrt(size)
        assert abs(scaled.mean()) < 5 * error
        assert abs(scaled.var() - 1) < 5 * error * math.sqrt(2)
        assert abs((scaled**3).mean()) < 5 * error * math.sqrt(15)
        assert abs((scaled**4).mean() - 3) < 5 * error * math.sqrt(96)
        assert 3 < abs(scaled).max() < 6.5
        found = np.bincount(np.searchsorted(norm.ppf(np.arange(1, 16) / 16), scaled), minlength=16)
        assert chisquare(found).pvalue > 1e-6
    assert abs(np.corrcoef(shares) - np.eye(5)).max() < 5 / math.sqrt(size)


# ---- what it costs -------------------------------------------------------------------------------

def test_rho_adds_up_over_the_rounds_of_each_client() -> None:
    level = SharedLevel(0.5, 1.5, 4, 1000, 3, 1)
    spent = level.spent(1e-3)
    assert isinstance(spent, SpentOnShares)
    assert spent.epsilon == 0
    for cohort in ([0, 1], [2, 3], [0, 1]):
        spent.add(cohort, 1.5)
    two, three = (zcdp_epsilon(k / (2 * 1.5**2), 1e-3) for k in (2, 3))
    assert spent.epsilon == pytest.approx(two, rel=1e-6)
    assert spent.after(1.5, [0]).epsilon == pytest.approx(three, rel=1e-6)
    assert two > gaussian_epsilon(math.sqrt(2) / 1.5, 1e-3), "the closed form is for one Gaussian"
    wide = SpentOnShares(1e-3, 1e-4, {0: 1.5**-2}, releases=1)
    assert wide.epsilon == math.inf, "the sampler's part"


def test_noise_follows_from_epsilon_by_zcdp(tmp_path: Path) -> None:
    """Nine rounds of half of the clients: five participations."""
    config = shared_config(tmp_path, 2, 1, 1, 2, dp_noise=None, dp_epsilon=8, cohort=3)
    noise = Schedule(config, [20] * 6).noise
    assert 7.98 < zcdp_epsilon(5 / (2 * noise**2), 1e-3) <= 8
    one = Schedule(shared_config(tmp_path, dp_noise=None, dp_epsilon=8, rounds=2, cohort=3),
                   [20] * 6).noise
    assert noise == pytest.approx(math.sqrt(5) * one, rel=1e-3)


# ---- settings ------------------------------------------------------------------------------------

@pytest.mark.parametrize(("flags", "message"), [
    ({"secure_sum": "false"}, "--secure_sum false: must be true with --dp client and --sites"),
    ({"site_holdout": 0.1}, "--site_holdout 0.1: must be none with --dp client"),
    ({"dp_colluding": -1}, "--dp_colluding -1: must be 0 or more"),
    ({"cohort": 4}, "--cohort 4: must be a divisor of --num_clients 6"),
    ({"dp_delta": 0.17}, "--dp_delta 0.17: must be given with --dp client, above 0 and below 1/6"),
    ({"aggregation": "int8"}, "--aggregation int8: must be exact with --dp client"),
    ({"client_moments": "average"}, "--client_moments average: must be keep, reset"),
    ({"eval_clients": "true"}, "--eval_clients true: must be false with --sites"),
])
def test_what_does_not_go_together_is_refused_by_name(flags: dict[str, Any], message: str,
                                                      tmp_path: Path) -> None:
    with pytest.raises(InputError) as refused:
        shared_config(tmp_path, 2, 1, 1, 2, **flags)
    assert str(refused.value).startswith(message)


@pytest.mark.parametrize(("clients", "flags", "message"), [
    ((2, 1, 1, 2), {}, ""), ((2, 1, 1, 2), {"dp_colluding": 2}, ""),
    ((2, 1, 1, 2), {"dp_colluding": 3}, r"--dp_colluding 3: must be at most 2 with the 4 sites of"),
    ((1, 1, 1), {"dp_colluding": 2}, r"--dp_colluding 2: must be at most 1 with the 3 sites"),
    ((2, 1, 1, 2), {"cohort": 3}, ""),
    ((3, 1, 1, 1), {"cohort": 3}, r"--cohort 3\S*: must be more clients with .*for 2 rounds "),
    # Sequences are hidden by each site alone: two are enough, and so are two in a round.
    ((2, 2), SEQUENCES, ""), ((1, 1, 1, 1), SEQUENCES | {"cohort": 2}, ""),
    ((3, 1, 1, 1), SEQUENCES | {"cohort": 3}, r"--cohort 3\S*: must be more clients with"),
])
def test_settings_have_to_fit_the_sites(clients: tuple[int, ...], flags: dict[str, Any],
                                        message: str, tmp_path: Path) -> None:
    if not message:
        shared_config(tmp_path, *clients, **flags)
        return
    with pytest.raises(InputError, match=message):
        shared_config(tmp_path, *clients, **flags)


# ---- the schedule --------------------------------------------------------------------------------

@pytest.mark.parametrize(("clients", "cohort"), [
    ((4, 4, 4), 4), ((6, 3, 3), 4), ((8, 3, 2, 1, 1), 5), ((2, 2, 2), 3), ((18, 4, 4, 4), 5),
    ((40, 2, 2), 22)])
def test_all_train_equally_often_in_cohorts_of_three_sites(
        clients: tuple[int, ...], cohort: int, tmp_path: Path) -> None:
    sites = make_sites(tmp_path, *clients)
    config = shared_config(tmp_path, cohort=cohort)
    schedule = Schedule(config, [20] * sites.num_clients, sites)
    turn = sites.num_clients // cohort
    cohorts = [schedule.cohort(number) for number in range(1, 40 * turn + 1)]
    for drawn in cohorts:
        assert drawn == sorted(set(drawn))
        assert len(drawn) == cohort
        assert len({sites.site_of(k) for k in drawn}) >= 3
    for start in range(0, len(cohorts), turn):
        counts = collections.Counter(k for drawn in cohorts[start:start + turn] for k in drawn)
        assert counts == dict.fromkeys(range(sites.num_clients), 1)
    assert len({tuple(drawn) for drawn in cohorts}) > 1
    again = Schedule(config, [20] * sites.num_clients, sites)
    assert [again.cohort(number) for number in range(len(cohorts), 0, -1)] == cohorts[::-1]
    plain = Schedule(config, [20] * sites.num_clients)
    fits = all(len({sites.site_of(k) for k in plain.cohort(n)}) >= 3 for n in range(1, turn + 1))
    assert not fits or cohorts[:turn] == [plain.cohort(n) for n in range(1, turn + 1)]


def test_the_plan_has_room_for_the_noise_of_all_sites(tmp_path: Path) -> None:
    sites = make_sites(tmp_path, 2, 1, 1, 2)
    config = shared_config(tmp_path, dp_colluding=2)
    plan = Schedule(config, [20] * 6, sites).plan(1, 0.0)
    assert plan.bound == update_bound(0.5, spread(1.5, 4, 2), 6) == update_bound(0.5, 3.0, 6)
    assert plan.weights == [1 / 6] * 6
    level = level_of(config, Schedule(config, [20] * 6, sites), 1000)
    assert dataclasses.astuple(level)[1:] == (1.5, 6, 1000, 4, 2)
