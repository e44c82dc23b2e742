"""What --overlap saves where the network is slow.

    python -m tests.benchmarks.overlap            # ten minutes, nearly all of it waiting

A server and two workers in network namespaces of one machine, joined by a line of ours that sends
no faster than a rate and delivers after a delay (tests/support/slow_line.py); needs root. Rounds
are those of fedrun_rounds.py: all of the protocol, with a wait in place of the local training, as
of a processor whose training is elsewhere, on a GPU. The bare all-reduce is of the same bytes, over
the same line.

A window of TCP has to hold what a line has under way, 6.25 MB at 1 Gbit/s and 50 ms. So the limits
of buffers are set in the namespaces (LIMITS), beside the congestion control of a row; all else is
as on the machine.
"""

from __future__ import annotations

import statistics
import sys
from dataclasses import dataclass
from typing import Any

from tests.benchmarks.common import machine
from tests.benchmarks.ranks import Ranks
from tests.benchmarks.secure_sum import ENTER, NETWORK
from tests.support.slow_line import bare_namespaces, slow_line, within

PARAMS = 7.4  # million, as pure_ssm_4_layer beside its embedding
BLOCKS, ROUNDS = 2, 4
LIMITS = {"net.ipv4.tcp_rmem": f"4096 131072 {1 << 25}",  # bytes: least, at first, at most
          "net.ipv4.tcp_wmem": f"4096 16384 {1 << 25}"}


@dataclass(frozen=True)
class Line:
    rate: float
    """Bits a second."""
    pause: float
    """Seconds of a round's training."""
    round_trip: float
    """Seconds."""
    control: str
    """Of congestion, by TCP: cubic is Linux's default."""


LINES = [Line(rate, pause, round_trip, control)
         for rate, pause in ((1e8, 4.0), (1e9, 1.0))
         for round_trip, control in ((0.0, "cubic"), (0.05, "cubic"), (0.05, "bbr"))]


def rounds(line: Line, *flags: str) -> list[dict[str, Any]]:
    """The answers of fedrun_rounds to BLOCKS commands. A rank is alone on its machine."""
    command = ["sh", "-c", ENTER, "sh", sys.executable, "-m", "tests.benchmarks.fedrun_rounds",
               "--params", str(PARAMS), "--clients", "2", "--apart", "--pause", str(line.pause),
               "--block", str(ROUNDS), *flags]
    with bare_namespaces(3) as holders:
        addresses = {holder: f"{NETWORK}.{place}" for place, holder in enumerate(holders, 1)}
        with slow_line(addresses, line.rate, line.round_trip / 2):
            for holder in holders:
                for name, value in LIMITS.items():
                    within(holder, "sysctl", "-qw", f"{name}={value}")
                within(holder, *f"ip route replace {NETWORK}.0/24 dev eth0 congctl "
                                f"{line.control}".split())
            with Ranks(command, 3, env={
                    "MASTER_ADDR": f"{NETWORK}.1", "GLOO_SOCKET_IFNAME": "eth0",
                    "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1",
                    "HOLDERS": " ".join(map(str, holders))}) as ranks:
                return [ranks.ask({}) for _ in range(BLOCKS)]


def main() -> None:
    print(machine())
    print("| Mbit/s | round trip (ms) | TCP | training (s) | bare all-reduce (s) | a round (s) "
          "| with --overlap (s) | rounds in the same time |\n|---|---|---|---|---|---|---|---|")
    for line in LINES:
        at_once, overlapped = rounds(line), rounds(line, "--overlap")
        bare = statistics.median(block["all_reduce"] for block in at_once)
        one, other = (statistics.median(seconds for block in blocks
                                        for seconds in block["rounds"][1:])
                      for blocks in (at_once, overlapped))
        print(f"| {line.rate / 1e6:,.0f} | {1e3 * line.round_trip:g} | {line.control} "
              f"| {line.pause:g} | {bare:.2f} | {one:.2f} | {other:.2f} | {one / other:.2f} |",
              flush=True)


if __name__ == "__main__":
    main()
