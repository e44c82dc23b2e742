"""What --overlap saves where the network is slow, and what it costs in quality.

    python -m tests.benchmarks.overlap --folder DIR               # seconds a round; some minutes
    python -m tests.benchmarks.overlap --folder DIR --quality     # losses; some minutes

Two workers in network namespaces of one machine, joined by virtual cables whose ends send no faster
than a rate (tc's tbf); needs root. Without netem in the kernel there is no delay on the cable, so
that of a long way is added to each sum (overlap_ranks.py), not to the short messages of a round. A
bare all-reduce of the same bytes runs over the same cables.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from fedrun import cli
from fedrun.federation.client import OWN_PART, Client
from fedrun.federation.overlap import Overlap
from tests.benchmarks.common import ROOT, machine
from tests.benchmarks.secure_sum import ENTER, NETWORK, namespaces
from tests.support.runs import CORPUS, SMALL, read_history

LINKS = {"100 Mbit/s": ("100mbit", 0.0), "1 Gbit/s, sums 100 ms late": ("1gbit", 0.1)}
"""The rate, and twice a delay of 50 ms: of the two steps of a sum of two."""
ROUNDS, LOCAL_UPDATES = 8, 8
SPEED = ("fed_avg", "--config", "pure_ssm_4_layer", "--dataset", str(CORPUS), "--tokenizer",
         "bpe:400", "--sequence_length", "64", "--batch_size", "2", "--dtype", "fp32",
         "--val_fraction", "0.01", "--val_freq", "1000", "--server", "colocated", "--num_clients",
         "2", "--threads", "1", "--rounds", str(ROUNDS), "--local_updates", str(LOCAL_UPDATES))
METHODS: dict[str, tuple[str, ...]] = {"fed_avg": (), "diloco": ("--server_lr", "0.7")}
STEPS = 120  # of each client, for quality
LIMIT = 400  # seconds


def together(holders: Sequence[int], *arguments: object) -> str:
    """Run overlap_ranks in each of the namespaces; what the first one prints."""
    command = ["sh", "-c", ENTER, "sh", sys.executable, "-m", "tests.benchmarks.overlap_ranks",
               *map(str, arguments)]
    ranks = [subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, env={
        **os.environ, "HOLDERS": " ".join(map(str, holders)), "RANK": str(rank),
        "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "WORLD_SIZE": str(len(holders)),
        "MASTER_ADDR": f"{NETWORK}.1", "MASTER_PORT": "29500", "GLOO_SOCKET_IFNAME": "eth0",
        "OMP_NUM_THREADS": "1"}) for rank in range(len(holders))]
    try:
        said = [rank.communicate(timeout=LIMIT)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    if any(rank.returncode for rank in ranks):
        raise RuntimeError(f"overlap_ranks {' '.join(map(str, arguments))} failed: {said}")
    return said[0]


def per_round(run_dir: Path) -> dict[str, float]:
    """Seconds and tokens of a round, over those between the first and the last two, where none is
    evaluated."""
    events = [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]
    rounds = [event for event in events if event["event"] == "round"]
    first, last = rounds[1], rounds[-2]
    count = last["round"] - first["round"]
    return {name: (last[name] - first[name]) / count for name in (
        "seconds", "local_training_seconds", "aggregation_seconds", "tokens", "bytes")}


def speed(folder: Path) -> None:
    print("| link | bare all-reduce (s) | --overlap | a round (s) | training (s) | waiting for the "
          "sum (s) | tokens/s |\n|---|---|---|---|---|---|---|")
    for link, (rate, late) in LINKS.items():
        with namespaces(2, rate) as holders:
            found = {}
            for overlap in ("false", "true"):
                name = f"{rate}_{overlap}"
                together(holders, "run", late, *SPEED, "--overlap", overlap, "--data_dir", folder,
                         "--cache_dir", folder / "cache", "--run_name", name, "--overwrite")
                found[overlap] = per_round(folder / name)
            elements = int(found["true"]["bytes"] / 2 / 2 / 4)  # two clients, both ways, int32
            alone = float(together(holders, "sum", late, elements))
        for overlap, taken in found.items():
            print(f"| {link} | {alone:.2f} | {overlap} | {taken['seconds']:.2f} | "
                  f"{taken['local_training_seconds']:.2f} | {taken['aggregation_seconds']:.2f} | "
                  f"{taken['tokens'] / taken['seconds']:.0f} |", flush=True)


def quality(folder: Path) -> None:
    """Validation losses after the same steps: at once, with the eager start, and with the naive
    delay, where clients start from what has arrived."""
    print("| method | local updates a round | no overlap | --overlap | naive delay |\n"
          "|---|---|---|---|---|")
    for method, flags in METHODS.items():
        for local_updates in (8, 30):
            losses = []
            for kind in ("none", "eager", "naive"):
                healthy: Any = Overlap.start
                patched: Any = Overlap
                if kind == "naive":
                    patched.start = from_what_has_arrived
                name = f"{method}_{local_updates}_{kind}"
                code = cli.main([
                    method, *SMALL, *flags, "--num_clients", "2", "--threads", "1",
                    "--local_updates", str(local_updates), "--rounds",
                    str(STEPS // local_updates), "--overlap", str(kind != "none").lower(),
                    "--val_freq", "1000", "--data_dir", str(folder),
                    "--cache_dir", str(folder / "cache"), "--run_name", name, "--overwrite"])
                patched.start = healthy
                if code:
                    raise RuntimeError(f"{name} failed")
                losses.append(math.log(read_history(folder / name)[-1]["server_val_ppl"]))
            print(f"| {method} | {local_updates} | "
                  + " | ".join(f"{loss:.3f}" for loss in losses) + " |", flush=True)


def from_what_has_arrived(overlap: Overlap, client: Client, in_round_before: bool) -> Tensor:
    """In place of `Overlap.start`: without the client's own part of the sum that travels."""
    client.vectors.pop(OWN_PART, None)
    start: Tensor = HEALTHY_START(overlap, client, in_round_before)
    return start


HEALTHY_START: Any = Overlap.start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--folder", type=Path, required=True, help="where the runs go")
    parser.add_argument("--quality", action="store_true", help="losses instead of seconds")
    arguments = parser.parse_args()
    print(machine())
    (quality if arguments.quality else speed)(arguments.folder)


if __name__ == "__main__":
    main()
