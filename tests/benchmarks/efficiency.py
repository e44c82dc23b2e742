"""Parallel efficiency: whole rounds with training, on two workers against one with two threads.

    python -m tests.benchmarks.efficiency

The real model and 4 clients, with the same number of threads: two workers of one thread and two
clients each, against one worker of two threads and all four clients. Tokens are random, since they
train as fast as text. Both sides take turns in short blocks. Use a quiet machine: two threads that
wait for each other become many times slower if another process uses one of the cores.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys

from tests.benchmarks.common import machine, spread
from tests.benchmarks.ranks import Ranks


def side(workers: int, threads: int, arguments: argparse.Namespace, local_updates: int) -> Ranks:
    return Ranks([sys.executable, "-m", "tests.benchmarks.fedrun_rounds",
                  "--train", arguments.config, "--clients", str(arguments.clients),
                  "--local_updates", str(local_updates), "--block", "1"],
                 workers + int(workers > 1), threads)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="pure_ssm_1_layer")
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--local_updates", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--blocks", type=int, default=5, help="rounds of each side")
    arguments = parser.parse_args()
    print(f"{machine()}; {arguments.config}, {arguments.clients} clients\n\n"
          "| local updates | 2 workers, 1 thread each (rounds/s) | 1 worker, 2 threads | ratio |\n"
          "|---|---|---|---|", flush=True)
    for local_updates in arguments.local_updates:
        samples: dict[str, list[float]] = {"two": [], "one": []}
        with contextlib.ExitStack() as stack:
            sides = {"two": stack.enter_context(side(2, 1, arguments, local_updates)),
                     "one": stack.enter_context(side(1, 2, arguments, local_updates))}
            for block in range(arguments.blocks + 1):
                for name, one in sides.items():
                    seconds = one.ask(1)["rounds"]
                    samples[name] += seconds if block else []
        two, one_ = (statistics.median(samples[name]) for name in ("two", "one"))
        print(f"| {local_updates} | {1 / two:.3f} ±{spread(samples['two']):.0%} "
              f"| {1 / one_:.3f} ±{spread(samples['one']):.0%} | {one_ / two:.2f} |", flush=True)


if __name__ == "__main__":
    main()
