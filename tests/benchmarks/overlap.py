"""What --overlap saves where the network is slow.

    python -m tests.benchmarks.overlap            # two minutes, nearly all of it waiting

A server and two workers in network namespaces of one machine, joined by virtual cables whose ends
send no faster than a rate (tc's tbf, without a delay); needs root. Rounds are those of
fedrun_rounds.py: all of the protocol, with a wait in place of the local training, as of a processor
whose training is elsewhere, on a GPU. The bare all-reduce is of the same bytes, over the same
cables.
"""

from __future__ import annotations

import statistics
import sys
from typing import Any

from tests.benchmarks.common import machine
from tests.benchmarks.ranks import Ranks
from tests.benchmarks.secure_sum import ENTER, NETWORK, namespaces

LINKS = {"100 Mbit/s": ("100mbit", 4.0), "1 Gbit/s": ("1gbit", 1.0)}
"""The rate, and the seconds of a round's training."""
PARAMS = 7.4  # million, as pure_ssm_4_layer beside its embedding
BLOCKS, ROUNDS = 2, 4


def rounds(rate: str, pause: float, *flags: str) -> list[dict[str, Any]]:
    """The answers of fedrun_rounds to BLOCKS commands. A rank is alone on its machine."""
    command = ["sh", "-c", ENTER, "sh", sys.executable, "-m", "tests.benchmarks.fedrun_rounds",
               "--params", str(PARAMS), "--clients", "2", "--apart", "--pause", str(pause),
               "--block", str(ROUNDS), *flags]
    with namespaces(3, rate) as holders, Ranks(command, 3, env={
            "MASTER_ADDR": f"{NETWORK}.1", "GLOO_SOCKET_IFNAME": "eth0", "LOCAL_RANK": "0",
            "LOCAL_WORLD_SIZE": "1", "HOLDERS": " ".join(map(str, holders))}) as ranks:
        return [ranks.ask({}) for _ in range(BLOCKS)]


def main() -> None:
    print(machine())
    print("| link | training (s) | bare all-reduce (s) | a round (s) | with --overlap (s) | rounds "
          "in the same time |\n|---|---|---|---|---|---|")
    for link, (rate, pause) in LINKS.items():
        at_once, overlapped = rounds(rate, pause), rounds(rate, pause, "--overlap")
        bare = statistics.median(block["all_reduce"] for block in at_once)
        one, other = (statistics.median(seconds for block in blocks
                                        for seconds in block["rounds"][1:])
                      for blocks in (at_once, overlapped))
        print(f"| {link} | {pause:g} | {bare:.2f} | {one:.2f} | {other:.2f} | {one / other:.2f} |",
              flush=True)


if __name__ == "__main__":
    main()
