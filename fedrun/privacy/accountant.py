"""What noise costs: epsilon at delta, and the noise that a target needs. Numbers alone.

A release is a sum with Gaussian noise. Its noise multiplier Z is the standard deviation over the
sensitivity, the furthest that one client, or one sequence, can move the sum. A mechanism is
(epsilon, delta)-private if P(S) <= e^epsilon P'(S) + delta for every set S of outputs, where P and
P' belong to neighbouring data (Dwork et al. 2006). Everything here errs to more epsilon, never to
less: what is returned has been checked to satisfy the inequality it stands for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

from fedrun.common.errors import InputError

UNPROTECTED = 10.0
"""Nothing above this epsilon is called protection: a factor of e^10 in the odds is 22,000."""
SMOOTHING = 4.0
"""What `grid_variance` adds, in squared steps of the grid."""


# ---- Gaussian releases: client level -------------------------------------------------------------

def gaussian_mu(multipliers: Iterable[float]) -> float:
    """One Gaussian release, 1 / Z, that stands for several: sqrt(sum of 1 / Z^2).

    Exact, also where a release depends on those before it (Dong, Roth & Su 2022, Corollary 3.3). No
    releases: 0.
    """
    return math.sqrt(math.fsum(multiplier ** -2 for multiplier in multipliers))


def gaussian_delta(mu: float, epsilon: float) -> float:
    """The smallest delta of a Gaussian release with sensitivity / standard deviation = mu.

    Phi(mu / 2 - epsilon / mu) - e^epsilon Phi(-mu / 2 - epsilon / mu): Balle & Wang 2018, Theorem
    8. epsilon >= 0. What is below 1e-308 is 0.
    """
    return math.exp(_log_gaussian_delta(mu, epsilon))


def _log_gaussian_delta(mu: float, epsilon: float) -> float:
    """With a = epsilon / mu - mu / 2, b = a + mu and Mills' ratio R(x) = Phi(-x) / phi(x), and
    since e^epsilon phi(b) = phi(a), delta is phi(a) (R(a) - R(b)), or Phi(-a) - phi(a) R(b): no
    power of e to overflow, and no difference of two nearly equal tails."""
    from scipy.special import erfcx, ndtr  # 0.1 s, which `fedrun --help` need not wait for

    if mu == 0:
        return -math.inf
    if math.isinf(mu):
        return 0.0
    a = epsilon / mu - mu / 2
    b = a + mu
    if a > 0:  # erfcx(x) is R(x sqrt(2)) sqrt(2 / pi)
        rest = (erfcx(a / math.sqrt(2)) - erfcx(b / math.sqrt(2))) / 2
        return math.log(rest) - a * a / 2 if rest > 0 else -math.inf
    rest = ndtr(-a) - math.exp(-a * a / 2) * erfcx(b / math.sqrt(2)) / 2
    return math.log(rest) if rest > 0 else -math.inf


def gaussian_epsilon(mu: float, delta: float, distance: float = 0.0) -> float:
    """The smallest epsilon at which Gaussian releases are private with delta.

    mu: of all of them together, see `gaussian_mu`. distance: the statistical distance between the
    noise as it is drawn and Gaussian noise, of all elements and releases together. Drawing from
    another distribution costs (1 + e^epsilon) distance, not the distance alone, since both sides of
    the inequality are moved. inf where this would take more than half of delta.
    """
    if math.isinf(mu):
        return math.inf
    most = mu * mu / 2 + mu * math.sqrt(2 * math.log(2 / delta))  # delta <= exp(-a^2 / 2)
    return _spent(lambda epsilon: _log_gaussian_delta(mu, epsilon), delta, distance, most)


def noise_for(epsilon: float, delta: float, participations: int, distance: float = 0.0) -> float:
    """The smallest noise multiplier with which this many releases cost at most epsilon.

    inf if no noise is enough, because of the distance.
    """
    def enough(noise: float) -> bool:
        mu = math.sqrt(participations * noise ** -2)
        return gaussian_epsilon(mu, delta, distance) <= epsilon

    return _least_noise(enough, 1e-12)


def grid_variance(noise: float, sensitivity: float) -> float:
    """The variance of discrete Gaussian noise, in squared steps of the grid, that may be charged as
    continuous Gaussian noise with this multiplier: (noise sensitivity)^2 + 4.

    Of the same variance the two are not equally private: with standard deviation s, the delta of
    the discrete one in one dimension lies between phi(a) mu / (12 s^2) below the closed form and
    phi(a) mu / (24 s^2) above it, to first order in 1 / s^2 (a as in `_log_gaussian_delta`), which
    of them depending on where between two integers one density is e^epsilon times the other. At
    s = 10 that is up to 4 per cent of delta less and 2 per cent more, for delta >= 1e-8.

    4 more in the variance is enough in any number of dimensions, and for releases that depend on
    earlier ones: round y, with continuous noise of variance v, to the integer x with a probability
    in proportion to exp(-(x - y)^2 / 8). What is done with a private value afterwards is free, and
    the result is a discrete Gaussian of variance v + 4 (compare Peikert 2010, Theorem 3.1): by
    Poisson summation the proportion's normaliser is a constant times 1 + e cos(2 pi y), e about
    1e-34. Given x, y is Gaussian with variance 4 v / (v + 4), at least 3.8 with noise of 10 steps
    or more, so that the cosine's mean is below 1e-32: each probability is off by a factor 1 +-
    1e-66, far less than the distance of any sampler.
    """
    return (noise * sensitivity) ** 2 + SMOOTHING


# ---- sums of discrete Gaussians: every site adds a share -----------------------------------------

def zcdp_of_sum(sensitivity: float, sigma: float, shares: int, elements: int) -> float:
    """rho of a sum of integers to which several add discrete Gaussian noise: rho-zCDP.

    Composes by addition. Kairouz, Liu & Steinke 2021, Theorem 1 and Proposition 14: a sum of
    discrete Gaussians is not one, and tau bounds how far from one it is. At sigma >= 10 it is below
    1e-400 and changes no bit.

    sensitivity: in L2, in steps of the grid. sigma: standard deviation of one share, in steps.
    shares: those that an attacker does not know. elements: of the vector.
    """
    tau = 10 * sum(math.exp(-2 * (math.pi * sigma) ** 2 * k / (k + 1)) for k in range(1, shares))
    one = sensitivity / (math.sqrt(shares) * sigma)
    return min(one ** 2 / 2 + tau * elements, (one + tau * math.sqrt(elements)) ** 2 / 2)


def zcdp_delta(rho: float, epsilon: float) -> float:
    """A delta of a mechanism that is rho-zCDP: Canonne, Kamath & Steinke 2020, Corollary 13.

    The smallest, over alpha > 1, of
    exp((alpha - 1) (alpha rho - epsilon)) / (alpha - 1) (1 - 1 / alpha)^alpha.
    """
    return math.exp(_log_zcdp_delta(rho, epsilon))


def _log_zcdp_delta(rho: float, epsilon: float) -> float:
    """The logarithm's derivative by alpha is (2 alpha - 1) rho - epsilon + log(1 - 1 / alpha). It
    grows with alpha, so that its zero is the minimum; any alpha near it gives a valid delta."""
    if rho == 0:
        return -math.inf
    # With x = alpha - 1: log(1 - 1 / alpha) = -log(1 + 1 / x) >= -1 / x, so that the zero is below
    # the positive root of 2 rho x^2 - (epsilon - rho) x - 1.
    half = (epsilon - rho) / 2
    x = _least(lambda x: (2 * x + 1) * rho - epsilon - math.log1p(1 / x) >= 0,
               0.0, (abs(half) + math.sqrt(half * half + 2 * rho)) / rho, 1e-12)
    return min(0.0, x * ((x + 1) * rho - epsilon) - x * math.log1p(1 / x) - math.log1p(x))


def zcdp_epsilon(rho: float, delta: float, distance: float = 0.0) -> float:
    """The smallest epsilon that `zcdp_delta` grants at delta. distance: see `gaussian_epsilon`."""
    if math.isinf(rho):
        return math.inf
    most = rho + 2 * math.sqrt(rho * math.log(2 / delta))  # Bun & Steinke 2016, Proposition 1.3
    return _spent(lambda epsilon: _log_zcdp_delta(rho, epsilon), delta, distance, most)


def zcdp_noise_for(epsilon: float, delta: float, participations: int, distance: float = 0.0
                   ) -> float:
    """The smallest noise multiplier Z, of all shares together that an attacker does not know, with
    which this many sums, rho = 1 / (2 Z^2) each, cost no more than epsilon. inf if none is enough,
    because of the distance."""
    return _least_noise(lambda noise: zcdp_epsilon(
        participations / (2 * noise**2), delta, distance) <= epsilon, 1e-12)


# ---- steps on samples of the sequences: example level --------------------------------------------

def example_epsilon(noise: float, rate: float, steps: int, delta: float) -> float:
    """Epsilon of DP-SGD (Abadi et al. 2016): steps, each on a Poisson sample with Gaussian noise.

    Neighbours: one sequence left out or added. The privacy loss of a step is put on a grid, rounded
    to more (Doroshenko et al. 2022, in dp-accounting), and convolved. Over the epsilon of the exact
    distribution by about 0.01 %, at rates below 1e-3 by 1 %.

    noise: standard deviation over the clip. rate: the probability that a sequence is in a step.
    delta: at least 1e-12, below which the rounding of a fast Fourier transform would count.
    """
    if steps == 0:
        return 0.0
    if rate == 1:
        return gaussian_epsilon(math.sqrt(steps) / noise, delta)
    if delta < 1e-12:
        raise InputError(f"delta {delta:g}: must be 1e-12 or more for single sequences")
    require_accounting()
    from dp_accounting.pld.privacy_loss_distribution import from_gaussian_mechanism

    # The error grows with the square of the interval over the standard deviation of one step's
    # loss; the time with the number of intervals, of one step and of all.
    deviation = rate * math.sqrt(math.expm1(min(noise ** -2, 700)))
    span, together = noise ** -2 / 2 + 10 / noise, deviation * math.sqrt(steps)
    interval = max(min(0.04 * deviation, span / 1000), span / 300_000)
    if together * (together / 2 + 10) > 10_000_000 * interval:
        # As if every step saw all sequences: always true, and nearly always no protection.
        return gaussian_epsilon(math.sqrt(steps) / noise, delta)
    step = from_gaussian_mechanism(noise, value_discretization_interval=interval,
                                   sampling_prob=rate)
    return float(step.self_compose(steps).get_epsilon_for_delta(delta))


def require_accounting() -> None:
    """InputError where the package is missing that `example_epsilon` needs."""
    try:
        import dp_accounting.pld.privacy_loss_distribution  # noqa: F401
    except ModuleNotFoundError:
        raise InputError("the epsilon of single sequences needs the package dp-accounting: pip "
                         "install 'fedrun[privacy]'") from None


def example_noise_for(epsilon: float, delta: float, rate: float, steps: int) -> float:
    """A noise multiplier of DP-SGD that keeps epsilon, over the smallest by at most 0.01 %."""
    from scipy.optimize import brentq

    def over(log_noise: float) -> float:
        return example_epsilon(math.exp(log_noise), rate, steps, delta) - epsilon

    # Near enough: the limit of many steps (Bu et al. 2020).
    low = high = math.log(_least_noise(lambda noise: gaussian_epsilon(
        rate * math.sqrt(steps * math.expm1(min(noise ** -2, 700))), delta) <= epsilon, 1e-3))
    while over(low) <= 0:
        low -= 0.3
    while over(high) > 0 and high < 30:
        high += 0.3
    return math.exp(float(brentq(over, low, high, xtol=4e-5)) + 5e-5)


# ---- roots ---------------------------------------------------------------------------------------

def _least(holds: Callable[[float], bool], low: float, high: float, precision: float) -> float:
    """The smallest number between low and high that `holds`, from above, to a relative precision.

    It does not hold at low, holds at high and changes once.
    """
    while high - low > precision * high and low < (middle := (low + high) / 2) < high:
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


def _least_noise(enough: Callable[[float], bool], precision: float) -> float:
    high = 1.0
    while not enough(high):
        high *= 2
        if high > 1e12:
            return math.inf
    while enough(high / 2):
        high /= 2
        if high < 1e-12:
            return high
    return _least(enough, high / 2, high, precision)


def _spent(log_delta: Callable[[float], float], delta: float, distance: float, most: float
           ) -> float:
    """The smallest epsilon up to `most` with delta(epsilon) + (1 + e^epsilon) distance <= delta.

    The left side is convex in e^epsilon, so that between 0 and an epsilon that satisfies it there
    is one change.
    """
    def holds(epsilon: float, share: float = 1.0) -> bool:
        left = share * delta - (1 + math.exp(epsilon)) * distance if distance else share * delta
        return left > 0 and log_delta(epsilon) <= math.log(left)

    if holds(0.0):
        return 0.0
    if not distance:
        return _least(holds, 0.0, most, 1e-12)
    if 2 * distance >= delta / 2:
        return math.inf
    high = min(most, math.log(delta / (2 * distance) - 1))
    return _least(holds, 0.0, high, 1e-12) if holds(high) else math.inf
