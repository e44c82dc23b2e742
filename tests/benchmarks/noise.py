"""What noise costs: 27 million integers of the discrete Gaussian, on one core.

    python -m tests.benchmarks.noise                     # seconds; a minute in all

Made as a worker makes them, block by block, each from a stream of its own; beside them numpy's
floating-point normals, rounded to integers, which are neither secret nor the same on every machine.
Both take turns block by block, so that a change in the machine's speed affects both. CPU seconds of
one thread.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from fractions import Fraction

import numpy as np

from fedrun.privacy.discrete_gaussian import DiscreteGaussian
from fedrun.secure.noise import BLOCK, stream
from tests.benchmarks.common import machine

HEADER = """\
| sigma | tables (s) | noise (s) | its stream alone (s) | numpy, rounded (s) | ratio | distance |
|---|---|---|---|---|---|---|"""


def taking_turns(blocks: int, *works: Callable[[int], object]) -> list[float]:
    """CPU seconds of each work over all blocks, after one block to warm up."""
    spent = [0.0] * len(works)
    for block in range(-1, blocks):
        for number, work in enumerate(works):
            began = time.thread_time()
            work(abs(block))
            spent[number] += (time.thread_time() - began) * (block >= 0)
    return spent


def row(sigma: int, elements: int) -> str:
    began = time.thread_time()
    sampler = DiscreteGaussian(Fraction(sigma**2))
    tables = time.thread_time() - began
    key, vector, floats = bytes(range(32)), np.zeros(BLOCK, np.int32), np.random.default_rng(0)

    def noise(block: int) -> None:
        np.add(vector, sampler.sample(stream(key, block), BLOCK), out=vector, casting="unsafe")

    def numpy(_: int) -> None:
        normals = np.rint(floats.standard_normal(BLOCK) * sigma)
        np.add(vector, normals.astype(np.int64), out=vector, casting="unsafe")

    blocks = elements // BLOCK
    ours, bare, theirs = (spent * elements / (blocks * BLOCK) for spent in taking_turns(
        blocks, noise, lambda block: stream(key, block).read(8 * sampler.words * BLOCK), numpy))
    return (f"| {sigma:,} | {tables:.2f} | {ours:.2f} | {bare:.2f} | {theirs:.2f} "
            f"| {ours / theirs:.1f} | 2^{np.log2(sampler.distance):.0f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--elements", type=int, default=27_000_000)
    parser.add_argument("--sigmas", type=int, nargs="+", default=[1000, 10**6, 2 * 10**7])
    arguments = parser.parse_args()
    print(f"{machine()}; {arguments.elements:,} elements\n\n{HEADER}", flush=True)
    for sigma in arguments.sigmas:
        print(row(sigma, arguments.elements), flush=True)


if __name__ == "__main__":
    main()
