"""The discrete Gaussian: integers x with a probability proportional to exp(-x^2 / (2 sigma^2)).

Sampled with integers alone, so that the bits are the same on every processor: the last bit of a
floating-point logarithm is not. From Micciancio & Walter 2017, "Gaussian Sampling over the
Integers: Efficient, Generic, Constant-Time", section 5, is the convolution: tables for a narrow
width make a wide one. Other than there, both samples have the one width that gives `variance`
exactly, and lookups are not of constant time.

How far the law P of one sample is from the discrete Gaussian D, in statistical distance (the
largest difference in the probability of any event); `DiscreteGaussian.distance` is the sum:

* Tables. The base law has N <= 26 sigma_0 + 3 values |x| <= R, R >= 13 sigma_0. By Poisson's
  summation the normaliser of D is at least sigma_0 sqrt(2 pi), so what lies beyond R has a
  probability of at most 2 Q(13) < exp(-13^2 / 2) < 2^-121, Q the normal upper tail. Probabilities
  are multiples of 2^-128: all but the middle one are cut off, by less than 2^-128 each, and the
  middle one has the rest. In all N 2^-128 + 2^-121.
* Convolution: X = X_1 + k X_2, of width sigma^2 = (1 + k^2) sigma_0^2. Completing the square in
  P(x) ~ sum_j exp(-(x - k j)^2 / (2 sigma_0^2) - j^2 / (2 sigma_0^2)), j over all integers,

      P(x) ~ exp(-x^2 / (2 sigma^2)) h(x),  h(x) = sum_j exp(-(j - c x)^2 / (2 tau^2)),

  c = k / (1 + k^2), tau^2 = sigma_0^2 / (1 + k^2). By Poisson's summation h is a constant times a
  factor in [1 - e, 1 + e], e = 2 sum_{j >= 1} exp(-2 pi^2 tau^2 j^2): tau sqrt(2 pi) is exactly the
  smoothing parameter eta_e of the integers (Micciancio & Regev 2007). P is D times h over the mean
  of h under D, so the distance is at most e / (2 (1 - e)). k is the largest with tau >= 2, so that
  e < 2^-112, and the distance is below 2^-113.
* Ties. A sample is a column of its table, b bits, and 128 - b bits that are compared with the
  column's threshold. 64 - b of these decide unless they equal the threshold's first ones, with
  probability 2^(b - 64). Only then the last 64 are looked at, and the two samples of an element
  have them in common. With last bits of its own for each the pair would be another only where both
  are equal: 2^(2b - 128).

A mechanism that is (epsilon, delta)-private with D is, with P, private with a delta that is larger
by (1 + e^epsilon) times `distance` times the number of all samples at most: each of the two laws
that are compared may be off. Streams of a cipher add what tells these from uniform bytes.
"""

from __future__ import annotations

import math
from decimal import ROUND_HALF_EVEN, Context, Decimal, localcontext
from fractions import Fraction
from typing import Protocol

import numpy as np

WIDEST = 1 << 28  # sigma; the integers of a sum have 32 bits
ONE_TABLE = 1 << 10  # up to this sigma a sample comes from a single table
REACH = 13  # of a table, times its sigma
FIXED = 256  # bits after the point while a table is computed
PIECE = 8192  # samples that are made at once, and stay in the processor's cache


class Stream(Protocol):
    """Uniform bytes, each handed out once."""

    def read(self, size: int) -> bytes:
        """The next `size` bytes."""


class Table:
    """The narrow law as an alias table (Walker 1977; Vose 1991), in integers.

    Each of 2^bits columns, all equally likely, has two values: its own number below its threshold
    in [0, 2^(128 - bits)), and another one from there on. Value number n means n - middle.
    """

    def __init__(self, variance: Fraction) -> None:
        self.middle = math.isqrt(math.ceil(variance * REACH**2)) + 1
        half = _weights(variance, self.middle)
        weights = [*half[:0:-1], *half]
        self.size = len(weights)
        self.bits = self.size.bit_length()
        thresholds, others = _columns(weights, self.bits)
        self.edges = np.array([column << 64 - self.bits | threshold >> 64
                               for column, threshold in enumerate(thresholds)], np.uint64)
        """(2^bits,): a column and the first bits of its threshold, as the word that ties."""
        self.last = np.array([threshold & (1 << 64) - 1 for threshold in thresholds], np.uint64)
        """(2^bits,): the last 64 bits of its threshold."""
        self.others = np.array(others, np.int64)
        """(2^bits,): the number of the other value."""

    def numbers(self, words: np.ndarray, more: np.ndarray) -> np.ndarray:
        """Numbers of sampled values, (size,) int64, from as many uniform 64-bit words; more: as
        many again, for those that tie."""
        columns = (words >> np.uint64(64 - self.bits)).view(np.int64)
        edges = self.edges.take(columns, mode="clip")  # without a check of each index
        own = words < edges
        tied = np.flatnonzero(words == edges)
        if tied.size:
            own[tied] = more[tied] < self.last[columns[tied]]
        found = self.others.take(columns, mode="clip")
        np.copyto(found, columns, where=own)
        return found


class DiscreteGaussian:
    """A sampler of the discrete Gaussian with mean zero."""

    def __init__(self, variance: Fraction) -> None:
        """variance: sigma^2, exactly; that of the integers differs by less than 1e-6 of it from
        sigma = 1 on. ValueError unless 0 < sigma <= WIDEST."""
        if not 0 < variance <= WIDEST**2:
            raise ValueError(f"variance {variance}: must be > 0 and at most {WIDEST**2}")
        self.variance = variance
        # The largest k with tau^2 = variance / (1 + k^2)^2 >= 4; 0 makes do with one table.
        self.factor = (math.isqrt(math.isqrt(math.floor(variance / 4)) - 1)
                       if variance > ONE_TABLE**2 else 0)
        self._table = Table(variance / (1 + self.factor**2))
        self._factors = (1, self.factor) if self.factor else (1,)
        self.words = len(self._factors) + 1
        """Of 64 bits, that a sample takes from its stream."""

    @property
    def distance(self) -> float:
        """A bound of the statistical distance of one sample from the discrete Gaussian: the head of
        this module has its proof."""
        of_table = self._table.size * 2.0**-128 + 2.0**-121
        if not self.factor:
            return of_table
        return 2 * of_table + 2.0**-113 + 2.0**(2 * self._table.bits - 128)

    def sample(self, stream: Stream, count: int) -> np.ndarray:
        """The next samples, (count,) int64: the same in however many calls, in any thread, on any
        machine. Each takes `words` words from the stream."""
        samples = np.zeros(count, np.int64)
        for part in np.split(samples, range(PIECE, count, PIECE)):
            raw = np.frombuffer(stream.read(8 * self.words * len(part)), "<u8")
            *words, more = np.ascontiguousarray(raw.reshape(-1, self.words).T, np.uint64)
            for factor, word in zip(self._factors, words, strict=True):
                numbers = self._table.numbers(word, more)
                numbers -= self._table.middle
                numbers *= factor
                part += numbers
        return samples


def _weights(variance: Fraction, reach: int) -> list[int]:
    """Probabilities of 0 ... reach times 2^128; those of 1 ... reach count twice in their sum.

    exp(-(n + 1)^2 / (2 v)) is exp(-n^2 / (2 v)) times r_n = exp(-(2 n + 1) / (2 v)), and r_n is
    r_(n-1) times exp(-1 / v). Every product is cut off after 256 bits, so that after n < 2^19 of
    them the error is below n^2 2^-255 < 2^-216, and of the probabilities below 2^-195.
    """
    # Decimal's exponential function is rounded correctly: the same on every machine.
    with localcontext(Context(prec=100, rounding=ROUND_HALF_EVEN)):
        exponent = Decimal(-variance.denominator) / Decimal(2 * variance.numerator)
        ratio, step = (int((times * exponent).exp() * (1 << FIXED)) for times in (1, 2))
    value, values = 1 << FIXED, list[int]()
    for _ in range(reach + 1):
        values.append(value)
        value = value * ratio >> FIXED
        ratio = ratio * step >> FIXED
    total = 2 * sum(values) - values[0]
    weights = [(value << 128) // total for value in values]
    weights[0] = (1 << 128) - 2 * sum(weights[1:])
    return weights


def _columns(weights: list[int], bits: int) -> tuple[list[int], list[int]]:
    """Threshold and other value of each of 2^bits columns, such that a value's own threshold and
    what others leave to it add up to its weight, exactly."""
    full = 1 << 128 - bits
    left = weights + [0] * ((1 << bits) - len(weights))
    others = list(range(len(left)))  # a full column has its own value only
    above = [column for column, weight in enumerate(left) if weight > full]
    below = [column for column, weight in enumerate(left) if weight < full]
    for column in below:
        giver = above[-1]
        others[column] = giver
        left[giver] -= full - left[column]
        if left[giver] <= full:
            above.pop()
        if left[giver] < full:
            below.append(giver)
    return [0 if others[column] == column else left[column] for column in range(len(left))], others
