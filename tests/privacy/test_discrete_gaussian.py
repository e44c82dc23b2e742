"""The sampler against the exact law: its tables by arithmetic, its samples by statistics.

Streams are fixed, so that a statistic has one value: no test fails by chance.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from decimal import Context, Decimal, localcontext
from fractions import Fraction

import numpy as np
import pytest
from scipy import stats

from fedrun.privacy import discrete_gaussian
from fedrun.privacy.discrete_gaussian import ONE_TABLE, WIDEST, DiscreteGaussian, Table
from fedrun.secure.noise import Keystream, stream

DIGITS = Context(prec=80)
CONVOLVED = Fraction(1100**2)  # the least that takes two tables, or nearly so


def keystream(number: int = 0) -> Keystream:
    return stream(bytes(range(32)), number)


def law(table: Table) -> list[int]:
    """The probability of each of its values times 2^128, from what the columns hold."""
    full, found = 1 << 128 - table.bits, [0] * len(table.others)
    for column, other in enumerate(table.others.tolist()):
        own = threshold(table, column)
        found[column] += own
        found[other] += full - own
    assert not any(found[table.size:])
    return found[:table.size]


def threshold(table: Table, column: int) -> int:
    return ((int(table.edges[column]) & (1 << 64 - table.bits) - 1) << 64) | int(table.last[column])


def exact(variance: Fraction, reach: int) -> list[Decimal]:
    """The discrete Gaussian at 0 ... reach, each by an exponential function of its own."""
    with localcontext(DIGITS):
        half = Decimal(variance.denominator) / Decimal(2 * variance.numerator)
        values = [(-half * n * n).exp() for n in range(reach + 1)]
        total = 2 * sum(values) - 1
        return [value / total for value in values]


def distance(found: list[int], scale: int, variance: Fraction) -> Decimal:
    """Statistical distance of a symmetric law over -reach ... reach, without what is beyond."""
    middle = len(found) // 2
    with localcontext(DIGITS):
        ideal = exact(variance, middle)
        apart = [abs(Decimal(one) / scale - other)
                 for one, other in zip(found[middle:], ideal, strict=True)]
        return (2 * sum(apart) - apart[0]) / 2


def convolved(table: Table, factor: int) -> list[int]:
    """The law of X_1 + factor X_2, times 2^256."""
    one = np.array(law(table), object)
    found = np.zeros(len(one) + factor * (len(one) - 1), object)
    for number, weight in enumerate(one):
        found[factor * number:factor * number + len(one)] += weight * one
    return [int(weight) for weight in found]


def pmf(variance: Fraction, reach: int) -> np.ndarray:
    """(2 reach + 1,) from -reach on."""
    values = np.exp(-np.arange(-reach, reach + 1.0)**2 / float(2 * variance))
    return np.asarray(values / math.fsum(values))


# ---- tables --------------------------------------------------------------------------------------

VARIANCES = [Fraction(1, 9), Fraction(1), Fraction(7, 3), Fraction(100), Fraction(123457, 11)]


@pytest.mark.parametrize("variance", VARIANCES)
def test_a_table_holds_the_exact_law(variance: Fraction) -> None:
    """Its probabilities add up to 1 exactly, and are within 2^-128 of the ideal ones, the middle
    one apart, which has the rest."""
    table = Table(variance)
    found = law(table)
    assert sum(found) == 1 << 128
    assert found == found[::-1]
    assert table.middle >= 13 * math.sqrt(variance)
    ideal = exact(variance, table.middle)
    with localcontext(DIGITS):
        for weight, probability in zip(found[table.middle + 1:], ideal[1:], strict=True):
            assert -Decimal(2)**-190 < probability * 2**128 - weight < 1
        # The ideal law beyond the table's reach: 2^-121, doubled for what it is missing inside.
        assert abs(found[table.middle] - ideal[0] * 2**128) < len(found) + 2**8
        assert distance(found, 2**128, variance) <= Decimal(DiscreteGaussian(variance).distance)


def test_what_lies_beyond_a_table() -> None:
    """The bound that the distance counts, for every width."""
    assert 2 * stats.norm.sf(discrete_gaussian.REACH) < math.exp(-13**2 / 2) < 2**-121


def test_a_convolution_is_as_close_as_it_claims() -> None:
    """The law of the sum of two samples, in exact arithmetic."""
    for variance in (CONVOLVED, Fraction(10**12), Fraction(ONE_TABLE**2 + 1)):
        factor = DiscreteGaussian(variance).factor
        assert 4 * (1 + factor**2)**2 <= variance < 4 * (1 + (factor + 1)**2)**2
    variance, factor = Fraction(35**2), 4  # by the same rule, and narrow enough to add up
    assert 4 * (1 + factor**2)**2 <= variance < 4 * (1 + (factor + 1)**2)**2
    table = Table(variance / (1 + factor**2))
    found = convolved(table, factor)
    assert sum(found) == 1 << 256
    claimed = 2 * (table.size * 2.0**-128 + 2.0**-121) + 2.0**-113
    smooth = 2 * math.exp(-2 * math.pi**2 * 35**2 / 17**2)
    assert smooth / 8 < distance(found, 2**256, variance) < claimed < 2.0**-112
    # With too large a factor it is not: h(x) is uneven, by what its first frequency says.
    table, factor = Table(variance / (1 + 8**2)), 8
    rough = 2 * math.exp(-2 * math.pi**2 * 35**2 / 65**2)
    assert rough / 8 < distance(convolved(table, factor), 2**256, variance) < rough / 2 * 1.01


@pytest.mark.parametrize("sigma", [Fraction(10), Fraction(1001, 10), Fraction(10**6)])
def test_exact_cumulants(sigma: Fraction) -> None:
    """Of the law that is sampled: the variance is the one asked for, and the fourth is zero."""
    sampler = DiscreteGaussian(sigma**2)
    table = sampler._table
    second, fourth = (Fraction(sum(weight * (number - table.middle)**power for number, weight
                                   in enumerate(law(table))), 1 << 128) for power in (2, 4))
    variance = second * (1 + sampler.factor**2)
    cumulant = (fourth - 3 * second**2) * (1 + sampler.factor**4)
    assert abs(variance / sigma**2 - 1) < Fraction(1, 10**30)
    assert abs(cumulant / sigma**4) < Fraction(1, 10**28)


@pytest.mark.parametrize("sigma", [1, 10, 1000])
@pytest.mark.parametrize("away", [4, 6, 11])
def test_exact_tails(sigma: int, away: int) -> None:
    """Of the law that is sampled, where a sum over many elements would notice."""
    table = Table(Fraction(sigma**2))
    found = Fraction(sum(law(table)[:table.middle - away * sigma]), 1 << 128)
    ideal = math.fsum(pmf(Fraction(sigma**2), table.middle)[:table.middle - away * sigma])
    assert float(found) == pytest.approx(ideal, rel=1e-9)


# ---- lookups -------------------------------------------------------------------------------------

def test_samples_are_looked_up_one_by_one() -> None:
    """As the tables say, in Python's integers."""
    for variance in (Fraction(25), CONVOLVED):
        sampler = DiscreteGaussian(variance)
        table, words = sampler._table, sampler.words
        raw, expected = keystream().read(8 * words * 300), []
        numbers = [int.from_bytes(raw[at:at + 8], "little") for at in range(0, len(raw), 8)]
        for at in range(0, len(numbers), words):
            value, (*element, more) = 0, numbers[at:at + words]
            for word, factor in zip(element, (1, sampler.factor), strict=False):
                column = word >> 64 - table.bits
                fraction = (word % (1 << 64 - table.bits)) << 64 | more
                own = fraction < threshold(table, column)
                value += factor * ((column if own else int(table.others[column])) - table.middle)
            expected.append(value)
        assert sampler.sample(keystream(), 300).tolist() == expected


def test_ties_are_decided_by_the_last_bits() -> None:
    """They come once in 2^44 samples or less often, so that no stream shows them."""
    table = Table(Fraction(100))
    columns = np.flatnonzero(table.last > 0)  # the others have a single value
    assert len(columns) > 200
    for word, last, own in ((0, 0, 0), (0, -1, 1), (-1, 1, 1), (1, -1, 0)):
        words = table.edges[columns] + np.array(word, np.int64).astype(np.uint64)
        more = table.last[columns] + np.array(last, np.int64).astype(np.uint64)
        inside = words >> np.uint64(64 - table.bits) == columns
        expected = columns if own else table.others[columns]
        found = table.numbers(words, more)
        assert np.array_equal(found[inside], expected[inside])
        assert inside.sum() > 100


def test_pieces_and_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bits however a stream is cut, and in whatever threads its neighbours run."""
    sampler, sizes = DiscreteGaussian(CONVOLVED), [1, 7, 0, 8191, 8192, 8193, 1000, 4616]
    whole, read = sampler.sample(keystream(), sum(sizes)), keystream()
    assert np.array_equal(whole, np.concatenate([sampler.sample(read, size) for size in sizes]))
    with monkeypatch.context() as patch:
        patch.setattr(discrete_gaussian, "PIECE", 100)
        assert np.array_equal(whole, sampler.sample(keystream(), len(whole)))
    serial = [sampler.sample(keystream(block), 20_000) for block in range(8)]
    with ThreadPoolExecutor(4) as pool:
        for one, other in zip(serial, pool.map(
                lambda block: sampler.sample(keystream(block), 20_000), range(8)), strict=True):
            assert np.array_equal(one, other)
    assert not np.array_equal(serial[0], serial[1])


@pytest.mark.parametrize(("variance", "digest"), [
    (Fraction(1, 3), "1c989046cfeaffb6"), (Fraction(100), "4ab9f0c342f489eb"),
    (Fraction(10**12), "cdd1a2a4e41a77f3"),
    (Fraction(4 * 10**14 + 1, 7), "19492847a932fddc")])
def test_bits_do_not_change(variance: Fraction, digest: str) -> None:
    """A run that was begun with an earlier version would else repeat a round with another noise."""
    samples = DiscreteGaussian(variance).sample(keystream(), 50_000)
    assert samples.dtype == np.int64
    assert hashlib.sha256(samples.astype("<i8").tobytes()).hexdigest()[:16] == digest


@pytest.mark.parametrize("variance", [Fraction(0), Fraction(-1), Fraction(WIDEST**2 + 1)])
def test_a_width_that_is_none(variance: Fraction) -> None:
    with pytest.raises(ValueError, match=r"^variance .*: must be > 0 and at most "):
        DiscreteGaussian(variance)


# ---- samples -------------------------------------------------------------------------------------

def p_value(samples: np.ndarray, variance: Fraction, cells: int = 100) -> float:
    """Of a chi-square test against the exact law, over cells of neighbours that expect 10 at least,
    and the tails."""
    reach = math.ceil(14 * math.sqrt(variance)) + 1
    expected = pmf(variance, reach) * len(samples)
    counts = np.bincount(samples + reach, minlength=len(expected))
    total = np.cumsum(expected)
    cell = np.floor(total / max(10, len(samples) / cells)).astype(int)
    found, wanted = np.bincount(cell, counts), np.bincount(cell, expected)
    few = wanted < 10
    found, wanted = (np.append(a[~few], a[few].sum() + 1e-12) for a in (found, wanted))
    return float(stats.chisquare(found, wanted * found.sum() / wanted.sum()).pvalue)


@pytest.mark.parametrize("sigma", [Fraction(1, 2), Fraction(17, 10), Fraction(301, 2),
                                   Fraction(1100)])
def test_samples_have_the_law(sigma: Fraction) -> None:
    """Cell by cell. A width that is 1 % off would show."""
    samples = DiscreteGaussian(sigma**2).sample(keystream(), 1 << 20)
    assert p_value(samples, sigma**2) > 1e-3
    for wrong in (Fraction(99, 100), Fraction(101, 100)):
        assert p_value(samples, (sigma * wrong)**2) < 1e-9


def test_another_convolution_would_show(monkeypatch: pytest.MonkeyPatch) -> None:
    """A factor that is one off, none at all, and one of the right variance that smooths too
    little."""
    sampler = DiscreteGaussian(CONVOLVED)
    assert p_value(sampler.sample(keystream(), 1 << 20), CONVOLVED) > 1e-3
    for factors in ((1, sampler.factor + 1), (1, sampler.factor - 1), (1,)):
        monkeypatch.setattr(sampler, "_factors", factors)
        monkeypatch.setattr(sampler, "words", len(factors) + 1)
        assert p_value(sampler.sample(keystream(), 1 << 20), CONVOLVED) < 1e-9
    rough = 3 * sampler.factor
    monkeypatch.setattr(sampler, "_table", Table(CONVOLVED / (1 + rough**2)))
    monkeypatch.setattr(sampler, "_factors", (1, rough))
    monkeypatch.setattr(sampler, "words", 3)
    assert p_value(sampler.sample(keystream(), 1 << 20), CONVOLVED) < 1e-9


@pytest.mark.parametrize("sigma", [10**3, 10**6, 2 * 10**7])
def test_moments_of_wide_samples(sigma: int) -> None:
    """Mean, variance, skewness and excess, in standard errors; uncorrelated with the next; and no
    residue more often than others: nothing of the tables shows in the last bits."""
    count = 1 << 18
    samples = DiscreteGaussian(Fraction(sigma**2)).sample(keystream(), count)
    assert stats.chisquare(np.bincount(samples % 64)).pvalue > 1e-3
    scaled = samples / sigma
    errors = [scaled.mean(), (scaled.var() - 1) / math.sqrt(2), (scaled**3).mean() / math.sqrt(15),
              ((scaled**4).mean() - 3) / math.sqrt(96), (scaled[1:] * scaled[:-1]).mean()]
    assert max(abs(error) for error in errors) * math.sqrt(count) < 4


@pytest.mark.parametrize("sigma", [10, 2000])
def test_tails_of_samples(sigma: int) -> None:
    """How many lie beyond 4 and 5 sigma, and that none does beyond 6 of four million."""
    away = np.abs(DiscreteGaussian(Fraction(sigma**2)).sample(keystream(), 1 << 22))
    probabilities = pmf(Fraction(sigma**2), 14 * sigma)
    for times in (3, 4, 5):
        expected = 2 * len(away) * math.fsum(probabilities[:14 * sigma - times * sigma])
        found = int((away > times * sigma).sum())
        assert min(stats.poisson.cdf(found, expected), stats.poisson.sf(found - 1, expected)) > 1e-3
    assert int((away > 6 * sigma).sum()) == 0


# ---- another sampler -----------------------------------------------------------------------------

class Exact:
    """Canonne, Kamath & Steinke 2020, "The Discrete Gaussian for Differential Privacy", algorithms
    1 to 3: by rejection, with fractions, of exactly the discrete Gaussian."""

    def __init__(self, variance: Fraction, seed: int) -> None:
        self.variance, self.random = variance, random.Random(seed)
        self.t = math.isqrt(math.floor(variance)) + 1

    def bernoulli(self, p: Fraction) -> bool:
        return self.random.randrange(p.denominator) < p.numerator

    def exponential(self, gamma: Fraction) -> bool:
        """True with probability exp(-gamma)."""
        while gamma > 1:
            if not self.exponential(Fraction(1)):
                return False
            gamma -= 1
        k = 1
        while self.bernoulli(gamma / k):
            k += 1
        return k % 2 == 1

    def laplace(self) -> int:
        while True:
            u = self.random.randrange(self.t)
            if not self.exponential(Fraction(u, self.t)):
                continue
            v = 0
            while self.exponential(Fraction(1)):
                v += 1
            negative, x = self.random.randrange(2) == 1, u + self.t * v
            if not (negative and x == 0):
                return -x if negative else x

    def sample(self) -> int:
        while True:
            y = self.laplace()
            gap = abs(y) - self.variance / self.t
            if self.exponential(gap**2 / (2 * self.variance)):
                return y


@pytest.mark.parametrize("variance", [Fraction(9, 4), Fraction(40)])
def test_the_same_law_as_an_exact_sampler(variance: Fraction) -> None:
    """Two samples, of which one is made in another way altogether."""
    other = Exact(variance, 0)
    theirs = Counter(other.sample() for _ in range(4000))
    found = DiscreteGaussian(variance).sample(keystream(), 200_000)

    def p_value(ours: Counter[int]) -> float:
        common = [value for value in theirs if theirs[value] >= 10 and ours[value] >= 10]
        table = [[counts[value] for value in common] for counts in (theirs, ours)]
        return float(stats.chi2_contingency(table).pvalue)

    assert p_value(Counter(found.tolist())) > 1e-3
    wider = DiscreteGaussian(variance * Fraction(3, 2)).sample(keystream(), 200_000)
    assert p_value(Counter(wider.tolist())) < 1e-6


def test_one_table_is_enough_up_to_a_width() -> None:
    assert DiscreteGaussian(Fraction(ONE_TABLE**2)).factor == 0
    assert DiscreteGaussian(Fraction(ONE_TABLE**2 + 1)).factor > 10
