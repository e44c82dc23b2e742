"""Whole rounds with training, side by side: fedrun, Flower and pfl on the same model and batches.

    python -m tests.benchmarks.rounds

All use our model code, plain SGD (sgd.py) and federated averaging, with 4 clients on two workers.
Blocks of two rounds take turns. The table also has the distance of each global model from that of a
serial loop in float64, and for comparison that of the same loop in float32.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from fedrun.flags import resolve
from tests.benchmarks.common import machine
from tests.benchmarks.overhead import peer_side
from tests.benchmarks.ranks import Ranks
from tests.benchmarks.sgd import Task, serial

BLOCK = 2


def sides(task: Task, clients: int, workers: int, peers: tuple[str, ...], folder: Path
          ) -> dict[str, Ranks]:
    """Start all sides; each writes its global model to NAME.npy at the end."""
    def what(name: str) -> list[str]:
        return ["--task", task.to_json(), "--out", str(folder / f"{name}.npy")]

    ours = [sys.executable, "-m", "tests.benchmarks.fedrun_rounds", "--clients", str(clients),
            "--block", str(BLOCK), *what("fedrun")]
    # Peers first: while an environment is built, nobody asks our ranks, who would give up waiting.
    others = {peer: peer_side(peer, workers, clients, what(peer)) for peer in peers}
    return {"fedrun": Ranks(ours, workers + int(workers > 1))} | others


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="tiny", help="preset for the model's shape")
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--peers", nargs="*", default=["flower", "pfl"])
    arguments = parser.parse_args()
    task = Task(asdict(resolve("fed_avg", {"config": arguments.config}).model))
    clients, torch_threads = arguments.clients, torch.get_num_threads()
    with tempfile.TemporaryDirectory(prefix="fedrun-benchmark-") as name:
        folder = Path(name)
        samples: dict[str, list[float]] = {}
        with contextlib.ExitStack() as stack:
            running = sides(task, clients, arguments.workers, tuple(arguments.peers), folder)
            for side in running.values():
                stack.enter_context(side)
            for block in range(arguments.rounds // BLOCK):
                for name, side in running.items():
                    seconds = side.ask(BLOCK)["rounds"]
                    samples.setdefault(name, []).extend(seconds if block else seconds[1:])
        torch.set_num_threads(1)
        exact = serial(task, clients, arguments.rounds, torch.float64)
        single = serial(task, clients, arguments.rounds, torch.float32)
        torch.set_num_threads(torch_threads)
        moved = float(np.abs(exact - serial(task, clients, 0, torch.float64)).max())
        finals = {name: np.load(folder / f"{name}.npy") for name in samples} | {"serial": single}
    print(f"{machine()}; {arguments.config}, {exact.size:,} parameters, {clients} clients on "
          f"{arguments.workers} workers, {task.steps} steps of SGD a round, {arguments.rounds} "
          f"rounds, in which a parameter moves by up to {moved:.3g}\n\n"
          "| | round (s) | largest difference to the serial loop in float64 |\n|---|---|---|")
    for name, model in finals.items():
        taken = f"{statistics.median(samples[name]):.3f}" if name in samples else "-"
        print(f"| {name} | {taken} | {np.abs(model - exact).max():.2e} |")


if __name__ == "__main__":
    main()
