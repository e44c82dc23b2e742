"""The mechanism of a round: how far a client moves the sum, the noise, and what it costs."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fedrun.common.errors import InputError
from fedrun.privacy.accountant import gaussian_epsilon
from fedrun.privacy.client_level import ClientLevel, Spent, multiplier, participations
from tests.support.private import private_config


def test_rounding_to_the_grid_moves_less_than_the_sensitivity_says() -> None:
    """A client's term against none, in exact integers, on a coarse grid."""
    clip, cohort, size = 0.5, 4, 4000
    level = ClientLevel(clip, 3e4, cohort, size)
    scale = level.scale
    assert scale <= 2.0**14
    random, furthest = np.random.default_rng(0), 0.0
    for spread in (1e-3, 1.0, 30.0):
        update = random.standard_t(spread * 3 + 1, size)
        update *= clip / np.linalg.norm(update)
        rounded = np.rint(update * scale / cohort)
        furthest = max(furthest, float(np.linalg.norm(rounded)))
    assert furthest <= level.sensitivity
    # As bad as it gets: every element is rounded away from zero by nearly half a step.
    worst = np.full(size, 0.501)
    exact = float(np.linalg.norm(worst))
    level = Coarse(exact * cohort, 1.5, cohort, size)
    assert float(np.linalg.norm(np.rint(worst))) <= level.sensitivity
    assert float(np.linalg.norm(np.rint(worst))) > exact + 0.98 * math.sqrt(size) / 2


class Coarse(ClientLevel):
    """On a grid of ones."""

    scale = 1.0


def test_the_variance_is_that_of_the_multiplier_and_whole() -> None:
    level = ClientLevel(0.5, 1.5, 4, 10_000)
    scale = level.scale
    assert scale == 2.0 ** (30 - 2)  # of a bound between 2 and 4
    sigma = 1.5 * (0.5 / 4 * scale * (1 + 2**-20) + 50)
    found = level.variance
    assert found.denominator == 1
    assert 4 <= found - sigma**2 <= 5 + 1e-9 * sigma**2
    with pytest.raises(InputError, match=r"--dp_noise 1e-08, .*: must be larger: .* 10"):
        _ = ClientLevel(0.5, 1e-8, 4, 10_000).variance
    with pytest.raises(InputError, match="--cohort 400: must be smaller"):
        _ = ClientLevel(0.5, 1.5, 400, 10**12).variance
    with pytest.raises(InputError, match=r"--dp_noise 1e\+08, .*: must be smaller: with so much"):
        _ = ClientLevel(0.5, 1e8, 4, 10_000).variance
    for none in (math.inf, 1e308):
        with pytest.raises(InputError, match="there is no such noise"):
            _ = ClientLevel(0.5, none, 4, 10_000).variance


def test_participations_round_up() -> None:
    assert [participations(rounds, 12, 4) for rounds in (1, 3, 4, 9)] == [1, 1, 2, 3]
    assert multiplier(private_config(), 100) == 1.5
    noise = multiplier(private_config(dp_noise=None, dp_epsilon=2), 100)
    of_delta = 0.99e-3  # the rest is the sampler's
    assert gaussian_epsilon(10 / noise, of_delta) == pytest.approx(2, rel=1e-9)


def test_what_is_spent_is_the_most_of_any_client() -> None:
    spent = Spent(1e-3, 2.0**-50)
    assert spent.epsilon == 0
    for cohort in ([0, 1], [2, 3], [0, 1]):
        spent.add(cohort, 1.5)
    one, two, three = (pytest.approx(gaussian_epsilon(math.sqrt(k) / 1.5, 1e-3), rel=1e-6)
                       for k in (1, 2, 3))
    assert spent.epsilon == two
    assert spent.after(1.5, [2, 3]).epsilon == two
    assert spent.after(1.5, [0, 2]).epsilon == three
    assert spent.epsilon == two, "to ask costs nothing"
    assert spent.releases == 3
    spent.add([7], 1.5 / math.sqrt(3))
    assert spent.epsilon == three, "other noise"
    assert Spent(1e-3, 2.0**-50, {0: 1 / 2.25, 5: 0.1}, releases=4).epsilon == one
    assert Spent(1e-3, 1e-4, {0: 1 / 2.25}, releases=1).epsilon == math.inf, "the sampler's part"
    of_one, of_nine = (Spent(1e-3, 1e-6, {0: 1 / 2.25}, n).epsilon for n in (1, 9))
    assert of_one < of_nine < math.inf, "of every sum"


def test_signal_to_noise_is_estimated_from_what_was_released() -> None:
    level, random = ClientLevel(0.5, 1.5, 4, 40_000), np.random.default_rng(1)
    element = level.element
    assert element == pytest.approx(1.5 * 0.5 / 4, rel=1e-3)
    signal = random.standard_normal(40_000) * 0.3 * element
    noised = float(np.linalg.norm(signal + random.standard_normal(40_000) * element))
    assert level.snr(noised) == pytest.approx(0.3, rel=0.05)
    assert level.snr(noised * 0.9) == 0, "no more than noise"
    assert level.snr(2 * noised, rounds=4) == pytest.approx(level.snr(noised))
