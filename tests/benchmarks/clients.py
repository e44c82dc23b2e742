"""What thousands of clients cost: seconds to start, seconds of a round, memory, files.

    python -m tests.benchmarks.clients              # minutes; markdown

Runs as users start them, a server and two workers, of the smallest model on the documentation that
comes with Python: with --client_moments reset, so that clients keep no state, a cohort of 50 (of 4
clients: all 4) in each round and a checkpoint at the end. The start is when the ranks have
connected and the server opens its log of events; then come the workers' models and the first round.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import psutil

from fedrun.config import FederatedConfig
from fedrun.federation.messages import encode
from fedrun.federation.schedule import Schedule
from fedrun.flags import config_of
from tests.benchmarks.common import machine

COHORT, ROUNDS, WORKERS = 50, 6, 2
HEADER = """\
| clients | s to the start | to the first round's end | s a round | a worker (MiB) | server (MiB) \
| plan (kB) | an event (kB) | a checkpoint (files, MiB) |
|---|---|---|---|---|---|---|---|---|"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("clients", nargs="*", type=int, default=[4, 100, 1000, 10_000])
    args = parser.parse_args()
    print(f"{machine()}\n\n{HEADER}")
    with tempfile.TemporaryDirectory() as folder:
        run(Path(folder), 4, "tokens")  # tokenises
        for clients in args.clients:
            run(Path(folder), clients, str(clients), shown=True)


def run(folder: Path, clients: int, name: str, shown: bool = False) -> None:
    """A run of this many clients; prints a row of the table."""
    command = [sys.executable, "-m", "fedrun.torchrun", "--nproc-per-node", str(1 + WORKERS), "-m",
               "fedrun", "fed_avg", "--config", "tiny", "--dataset", "pydocs", "--tokenizer",
               "bpe:4096", "--sequence_length", "16", "--batch_size", "1", "--num_clients",
               str(clients), "--cohort", str(min(COHORT, clients)), "--partition", "shuffled",
               "--client_moments", "reset", "--local_updates", "2", "--rounds", str(ROUNDS),
               "--val_freq", "1000", "--data_dir", str(folder), "--cache_dir",
               str(folder / "cache"), "--run_name", name]
    began = time.time()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    peaks = dict[str, float]()
    while process.poll() is None:
        time.sleep(0.1)
        look(process.pid, peaks)
    if process.returncode != 0:
        sys.exit(f"the run of {clients} clients failed: {' '.join(command)}")
    if not shown:
        return
    lines = (folder / name / "events.jsonl").read_text().splitlines()
    events = [json.loads(line) for line in lines]
    rounds = [event["time"] for event in events if event["event"] == "round"]
    between = sorted(b - a for a, b in pairwise(rounds[:-1]))  # not the first and last: evaluated
    files = [*(folder / name / "checkpoints" / f"step_{ROUNDS:06d}").iterdir()]
    worker = max(size for rank, size in peaks.items() if rank != "0")
    line = max(len(line) for line, event in zip(lines, events, strict=True)
               if event["event"] == "round")
    print(f"| {clients:,} | {events[0]['time'] - began:.1f} | {rounds[0] - began:.1f} "
          f"| {between[len(between) // 2]:.2f} "
          f"| {worker:.0f} | {peaks['0']:.0f} | {plan_bytes(folder / name) / 1e3:.1f} "
          f"| {line / 1e3:.1f} | {len(files)}, "
          f"{sum(file.stat().st_size for file in files) / 2**20:.1f} |", flush=True)


def look(launcher: int, peaks: dict[str, float]) -> None:
    """Note the most MiB that each rank has taken so far."""
    for child in psutil.Process(launcher).children(recursive=True):
        with suppress(psutil.Error, OSError):
            rank = child.environ().get("RANK")
            status = Path(f"/proc/{child.pid}/status").read_text()
            if rank and (peak := re.search(r"VmHWM:\s+(\d+) kB", status)):
                peaks[rank] = max(peaks.get(rank, 0.0), int(peak[1]) / 1024)


def plan_bytes(run_dir: Path) -> int:
    """Of the message that plans a round of this run, to each rank."""
    config = config_of(json.loads((run_dir / "config.json").read_text()))
    assert isinstance(config, FederatedConfig)
    sizes = [config.batch_size * config.local_updates] * config.num_clients
    return len(json.dumps(encode(Schedule(config, sizes).plan(2, 0.0))))


if __name__ == "__main__":
    main()
