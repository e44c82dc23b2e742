"""What noise costs, against other libraries, published values, and sums over all integers."""

from __future__ import annotations

import math
import sys

import mpmath
import numpy as np
import pytest

from fedrun.common.errors import InputError
from fedrun.privacy.accountant import (
    example_epsilon,
    example_noise_for,
    gaussian_delta,
    gaussian_epsilon,
    gaussian_mu,
    grid_variance,
    noise_for,
    zcdp_delta,
    zcdp_epsilon,
    zcdp_of_sum,
)
from tests.support.runs import fresh_python

# Noise multiplier, participations, delta.
SETTINGS = [(2.08, 12, 1e-5), (1, 1, 1e-5), (1, 1, 1e-9), (0.5, 1, 1e-5), (4, 100, 1e-6),
            (20, 1000, 1e-5), (8, 10, 1e-7), (0.7, 3, 1e-4), (50, 100, 1e-5), (3, 5, 1e-3),
            (0.3, 1, 1e-5), (10, 400, 1e-12)]


def exact_delta(mu: float, epsilon: float) -> mpmath.mpf:
    """Balle & Wang's formula as it is printed, with digits enough for its difference."""
    with mpmath.workdps(60):
        half, moved = mpmath.mpf(mu) / 2, mpmath.mpf(epsilon) / mpmath.mpf(mu)
        return mpmath.ncdf(half - moved) - mpmath.exp(epsilon) * mpmath.ncdf(-half - moved)


# ---- Gaussian releases ---------------------------------------------------------------------------

@pytest.mark.parametrize(("mu", "epsilon"), [
    (1.0, 0.0), (1.0, 1.0), (1.0, 30.0), (1e-3, 1e-3), (1e-3, 0.03), (1e-6, 1e-7), (0.1, 3.0),
    (5.0, 1.0), (5.0, 60.0), (20.0, 100.0), (20.0, 300.0), (20.0, 900.0)])
def test_the_closed_form_keeps_its_digits(mu: float, epsilon: float) -> None:
    """Also for deltas as small as floats can be, and where its two terms nearly cancel."""
    exact = exact_delta(mu, epsilon)
    assert gaussian_delta(mu, epsilon) == pytest.approx(float(exact), rel=1e-9, abs=0)


@pytest.mark.parametrize(("noise", "times", "delta"), SETTINGS)
def test_the_closed_form_against_privacy_loss_distributions(noise: float, times: int, delta: float
                                                            ) -> None:
    """dp-accounting puts the loss of one release on a grid and convolves it."""
    from dp_accounting.pld.privacy_loss_distribution import from_gaussian_mechanism
    step = from_gaussian_mechanism(noise, value_discretization_interval=0.02 / noise)
    theirs = step.self_compose(times).get_epsilon_for_delta(delta)
    ours = gaussian_epsilon(gaussian_mu([noise] * times), delta)
    assert ours == pytest.approx(theirs, rel=0.01)
    assert ours <= theirs  # theirs rounds to more


def test_the_closed_form_at_the_ends() -> None:
    assert gaussian_epsilon(0, 1e-5) == gaussian_epsilon(gaussian_mu([]), 1e-5) == 0
    assert gaussian_epsilon(math.inf, 1e-5) == math.inf
    assert gaussian_epsilon(5, 0.9999) == 0  # private with this delta alone
    assert gaussian_delta(math.inf, 3) == 1
    assert gaussian_delta(0, 0) == 0
    # With a huge mu nothing but mu^2 / 2 and its spread remains, with a tiny one nothing.
    assert gaussian_epsilon(1e6, 1e-300) == pytest.approx(5e11, rel=1e-4)
    assert 0 < gaussian_epsilon(1e-6, 1e-300) < 1e-4


def test_epsilon_falls_with_delta_and_rises_with_mu() -> None:
    deltas = [10.0 ** -n for n in range(1, 300, 7)]
    spent = [gaussian_epsilon(1.3, delta) for delta in deltas]
    assert spent == sorted(spent)
    assert len(set(spent)) == len(spent)
    mus = np.geomspace(1e-5, 1e3, 200)
    assert (np.diff([gaussian_epsilon(float(mu), 1e-5) for mu in mus]) >= 0).all()


def test_what_is_returned_keeps_its_promise() -> None:
    """No epsilon that is a rounding error too small, no noise that is one too little."""
    for noise, times, delta in SETTINGS:
        mu = gaussian_mu([noise] * times)
        epsilon = gaussian_epsilon(mu, delta)
        assert gaussian_delta(mu, epsilon) <= delta
        assert gaussian_delta(mu, epsilon * (1 - 1e-9)) > delta
        found = noise_for(epsilon, delta, times)
        assert found == pytest.approx(noise, rel=1e-9)
        assert gaussian_epsilon(gaussian_mu([found] * times), delta) <= epsilon


def test_releases_with_different_noise_add_up() -> None:
    """Two of multiplier sqrt(2) are one of 1, and half as much noise is four times the releases."""
    assert gaussian_mu([math.sqrt(2)] * 2) == pytest.approx(1)
    assert gaussian_mu([2.0] + [4.0] * 4) == pytest.approx(gaussian_mu([2.0] * 2))


def test_another_distribution_of_the_noise_is_charged_on_both_sides() -> None:
    """delta(epsilon) + (1 + e^epsilon) distance, of which the distance alone would be a part."""
    mu, delta, distance = gaussian_mu([2.08] * 12), 1e-5, 5e-10
    epsilon = gaussian_epsilon(mu, delta, distance)
    spent = float(exact_delta(mu, epsilon)) + (1 + math.exp(epsilon)) * distance
    assert spent == pytest.approx(delta, rel=1e-9)
    assert epsilon > gaussian_epsilon(mu, delta - distance) > gaussian_epsilon(mu, delta)
    assert gaussian_epsilon(mu, delta, 1e-30) == pytest.approx(gaussian_epsilon(mu, delta))
    assert gaussian_epsilon(mu, delta, 1e-6) == math.inf  # e^8 times it is 300 times delta
    assert noise_for(8, delta, 12, distance) > noise_for(8, delta, 12)
    assert noise_for(8, delta, 12, 1e-5) == math.inf


# ---- discrete Gaussians --------------------------------------------------------------------------

def densities(variance: float, shift: int) -> tuple[np.ndarray, np.ndarray]:
    """The discrete Gaussian and the same one moved, on all integers that matter."""
    reach = int(40 * math.sqrt(variance))
    x = np.arange(-reach, reach + shift + 1, dtype=np.float64)
    at_0, moved = np.exp(-x * x / 2 / variance), np.exp(-(x - shift) ** 2 / 2 / variance)
    return at_0 / at_0.sum(), moved / moved.sum()


def hockey_stick(p: np.ndarray, q: np.ndarray, epsilon: float) -> float:
    return float(np.maximum(0, p - math.exp(epsilon) * q).sum())


@pytest.mark.parametrize("shift", [1, 2, 3, 5, 10, 20, 37, 60])
def test_discrete_noise_on_the_grid_against_the_closed_form(shift: int) -> None:
    """With the variance as it is, the exact delta lies above or below the closed form by what
    `grid_variance` says, and with its variance never above. As close as they may get: sigma 10."""
    sigma, above, below = 10, 0.0, 0.0
    mu = shift / sigma
    charged = 1 / (math.sqrt(sigma ** 2 - 4) / shift)
    assert grid_variance(1 / charged, shift) == pytest.approx(sigma ** 2)
    q, p = densities(sigma ** 2, shift)
    for epsilon in np.linspace(0, 30, 241):
        closed = gaussian_delta(mu, epsilon)
        if closed < 1e-60:
            break
        a = epsilon / mu - mu / 2
        unit = math.exp(-a * a / 2) / math.sqrt(2 * math.pi) * mu / sigma ** 2
        exact = hockey_stick(p, q, epsilon)
        above, below = max(above, (exact - closed) / unit), max(below, (closed - exact) / unit)
        assert exact <= gaussian_delta(charged, epsilon)
    assert above <= 1.01 / 24
    assert below <= 1.01 / 12
    assert above > 0.5 / 24 or below > 0.5 / 12  # nor is it much less


def test_tau_against_the_formula_as_it_is_printed() -> None:
    for sensitivity, sigma, shares, elements in [(1.0, 0.5, 3, 1), (20.0, 0.9, 8, 1000),
                                                 (700.0, 10.0, 5, 27_000_000), (3.0, 2.0, 1, 10)]:
        tau = 0.0
        for k in range(1, shares):
            tau += 10 * math.exp(-2 * math.pi ** 2 * sigma ** 2 * (k / (k + 1)))
        variance = shares * sigma ** 2
        rho = min(sensitivity ** 2 / variance / 2 + tau * elements,
                  (sensitivity / math.sqrt(variance) + tau * math.sqrt(elements)) ** 2 / 2)
        assert zcdp_of_sum(sensitivity, sigma, shares, elements) == pytest.approx(rho, rel=1e-12)
    # With shares of 10 steps tau changes no bit, however many elements there are.
    assert zcdp_of_sum(700.0, 10.0, 5, 27_000_000) == zcdp_of_sum(700.0, 10.0, 5, 1)
    assert zcdp_of_sum(700.0, 10.0, 5, 1) == pytest.approx(490, rel=1e-12)


@pytest.mark.parametrize("sigma", [0.4, 0.5, 0.6, 0.8])
@pytest.mark.parametrize("shares", [2, 3, 8])
def test_a_sum_of_discrete_gaussians_costs_no_more_than_is_charged(sigma: float, shares: int
                                                                   ) -> None:
    """Convolved exactly, in one dimension, with so little noise that tau is what counts."""
    share = np.exp(-np.arange(-40, 41) ** 2 / 2 / sigma ** 2)
    noise = share / share.sum()
    for _ in range(shares - 1):
        noise = np.convolve(noise, share / share.sum())
    p, q = np.append(noise, 0), np.insert(noise, 0, 0)
    rho = zcdp_of_sum(1, sigma, shares, 1)
    both = (p > 1e-100) & (q > 1e-100)
    for order in (1.01, 1.5, 2.0, 3.0):
        renyi = math.log((p[both] ** order * q[both] ** (1 - order)).sum()) / (order - 1)
        assert renyi <= order * rho
    first = math.log((p[both] ** 1.01 * q[both] ** -0.01).sum()) / 0.01
    assert first > 1.01 / (2 * shares * sigma ** 2)  # without tau too little would be charged
    for epsilon in np.linspace(0, 10, 41):
        assert hockey_stick(p, q, epsilon) <= zcdp_delta(rho, epsilon)


def test_from_zcdp_to_epsilon_by_trying_every_order() -> None:
    alpha = 1 + np.geomspace(1e-4, 1e4, 400_001)
    for rho, delta in [(12 / 2 / 2.08 ** 2, 1e-5), (0.01, 1e-5), (1e-4, 1e-9), (30.0, 1e-6)]:
        epsilon = zcdp_epsilon(rho, delta)
        spent = math.exp(((alpha - 1) * (alpha * rho - epsilon) + alpha * np.log1p(-1 / alpha)
                          - np.log(alpha - 1)).min())
        assert spent == pytest.approx(delta, rel=1e-6)
        assert zcdp_delta(rho, epsilon) <= delta
        # What every Gaussian release costs is below what all that are rho-zCDP may cost.
        assert gaussian_epsilon(math.sqrt(2 * rho), delta) < epsilon
        assert epsilon < rho + 2 * math.sqrt(rho * math.log(1 / delta))
    assert zcdp_epsilon(0, 1e-5) == 0
    assert zcdp_epsilon(math.inf, 1e-5) == math.inf
    assert zcdp_epsilon(1.0, 1e-5, 1e-9) > zcdp_epsilon(1.0, 1e-5)


# ---- steps on samples ----------------------------------------------------------------------------

@pytest.mark.parametrize(("noise", "rate", "steps", "delta", "published", "within"), [
    # Koskela, Jaelkoe & Honkela 2020, whose Fourier accountant is another method: the values that
    # its tests and its example print, of delta at this epsilon (github.com/DPBayes/PLD-Accountant).
    (2.0, 0.01, 10_000, 0.010224911209191894, 1.0, 3e-4),
    (2.0, 0.01, 10_000, 0.022850339595771204, 0.8, 3e-4),
    (1.0, 0.01, 10_000, 0.2391763947364977, 1.0, 3e-4),
    (2.0, 0.02, 10_000, 0.14991732969314892, 1.0, 3e-4),
    (4.0, 0.01, 10_000, 4.243484012034273e-06, 1.0, 3e-4),
    # TensorFlow Privacy's compute_dp_sgd_privacy_test.py, by PLD.
    (0.7, 0.01, 120, 1e-5, 2.4612381, 3e-4),
    (1.0, 64 / 10_000, 782, 1e-6, 1.199, 6e-4)])
def test_example_level_against_published_values(noise: float, rate: float, steps: int, delta: float,
                                                published: float, within: float) -> None:
    assert example_epsilon(noise, rate, steps, delta) == pytest.approx(published, rel=within)


@pytest.mark.parametrize(("noise", "rate", "steps", "published"), [
    (4.0, 0.01, 10_000, 1.26),  # Abadi et al. 2016, section 3.2
    # TensorFlow Privacy's tutorials/README.md: batches of 256 of 60,000 for 60, 30 and 10 epochs.
    (1.12, 256 / 60_000, 60 * 60_000 // 256, 2.92),
    (0.6, 256 / 60_000, 30 * 60_000 // 256, 9.74),
    (1.2, 256 / 60_000, 10 * 60_000 // 256, 1.20)])
def test_example_level_is_below_the_bounds_by_moments(noise: float, rate: float, steps: int,
                                                      published: float) -> None:
    """Published bounds at delta 1e-5 from Renyi divergences, which are above the exact epsilon."""
    assert 0.6 * published < example_epsilon(noise, rate, steps, 1e-5) < published


@pytest.mark.slow
@pytest.mark.parametrize(("noise", "rate", "steps", "delta"), [
    (1.0, 0.01, 1000, 1e-5), (0.6, 0.02, 500, 1e-6), (2.0, 0.1, 2000, 1e-5),
    (0.8, 0.005, 1000, 1e-6), (4.0, 0.01, 10_000, 1e-5), (1.5, 0.25, 60, 1e-7)])
def test_example_level_against_random_variables_of_privacy_loss(noise: float, rate: float,
                                                                steps: int, delta: float) -> None:
    """Opacus' PRV accountant, after Gopi, Lee & Wutschitz 2021. Its answer is above the exact one
    by up to twice eps_error, ours by what its grid adds."""
    from opacus.accountants import PRVAccountant  # imports torch
    theirs = PRVAccountant()
    theirs.history = [(noise, rate, steps)]
    epsilon = theirs.get_epsilon(delta, eps_error=0.005)
    assert example_epsilon(noise, rate, steps, delta) == pytest.approx(epsilon, rel=1e-3, abs=0.011)


def test_example_level_at_the_ends() -> None:
    """Whole batches are Gaussian releases; no step costs nothing; little noise ends in time."""
    assert example_epsilon(2.0, 1.0, 12, 1e-5) == gaussian_epsilon(gaussian_mu([2.0] * 12), 1e-5)
    assert example_epsilon(2.0, 0.1, 0, 1e-5) == 0
    almost = example_epsilon(2.0, 1 - 1e-9, 12, 1e-5)
    assert almost == pytest.approx(example_epsilon(2.0, 1.0, 12, 1e-5), rel=1e-3)
    # Too much to convolve: then what it would be if every step saw all sequences.
    for noise, rate, steps in [(1.0, 0.01, 10 ** 9), (0.02, 0.01, 100)]:
        whole = gaussian_epsilon(math.sqrt(steps) / noise, 1e-5)
        assert example_epsilon(noise, rate, steps, 1e-5) == whole
    with pytest.raises(InputError, match="1e-12"):
        example_epsilon(1.0, 0.01, 10, 1e-13)


@pytest.mark.parametrize(("epsilon", "rate", "steps"), [
    (2.0, 0.02, 100), pytest.param(0.1, 0.001, 2000, marks=pytest.mark.slow),
    pytest.param(8.0, 0.3, 5, marks=pytest.mark.soak),
    pytest.param(300.0, 0.1, 50, marks=pytest.mark.slow)])
def test_noise_for_examples_is_enough_and_hardly_more(epsilon: float, rate: float, steps: int
                                                      ) -> None:
    noise = example_noise_for(epsilon, 1e-5, rate, steps)
    assert example_epsilon(noise, rate, steps, 1e-5) <= epsilon
    assert example_epsilon(noise * (1 - 1e-4), rate, steps, 1e-5) > epsilon


def test_without_dp_accounting_the_error_names_what_to_install(monkeypatch: pytest.MonkeyPatch
                                                               ) -> None:
    for name in list(sys.modules):
        if name.partition(".")[0] == "dp_accounting":
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    with pytest.raises(InputError, match=r"pip install 'fedrun\[privacy\]'"):
        example_epsilon(1.0, 0.1, 10, 1e-5)


def test_importing_it_imports_little() -> None:
    done = fresh_python("import sys, fedrun.privacy.accountant\n"
                        "print({'torch', 'numpy', 'scipy', 'dp_accounting'} & set(sys.modules))")
    assert done.strip() == "set()"
