"""Round overhead: the cost of a round without local training, against its floor and its peers.

    python -m tests.benchmarks.overhead                                       # a table
    python -m tests.benchmarks.overhead --params 27 --workers 4 --clients 4 --json
    python -m tests.benchmarks.overhead --params 27 --workers 2 --clients 4 --peers
    python -m tests.benchmarks.overhead --grid --out results/overhead         # the figure

One process with one thread per worker, and one for the server, run whole rounds of
`protocol.train_federated` in which clients do not train (fedrun_rounds.py lists what is included).
The floor is the bare `dist.all_reduce` of the same bytes in the same group, plus the passes over
memory that the method needs (subtract, scale and add, apply), in all workers at the same time. It
is measured between rounds. All sides take turns in short blocks, so that a change in the machine's
speed affects all of them. Every number is a median.

Each number of workers is measured twice: on one machine, where workers share memory and a round may
take less than its floor, and `apart`, as if each had its own machine, where vectors are sent.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.benchmarks.common import machine, spread
from tests.benchmarks.fedrun_rounds import shapes
from tests.benchmarks.peers.environments import python_of
from tests.benchmarks.ranks import Ranks

ROUNDS = 3  # in a block
Found = dict[str, Any]


def fedrun_side(params: float, workers: int, clients: int, method: str, apart: bool = False
                ) -> Ranks:
    server = int(workers > 1)  # a single worker is also the server
    return Ranks([sys.executable, "-m", "tests.benchmarks.fedrun_rounds", "--params", str(params),
                  "--clients", str(clients), "--method", method, "--block", str(ROUNDS),
                  *(["--apart"] if apart else [])], workers + server)


def peer_side(peer: str, workers: int, clients: int, what: Sequence[str]) -> Ranks:
    """Flower starts its own actors; for pfl, `Ranks` starts the workers."""
    command = [python_of(peer), "-m", f"tests.benchmarks.peers.{peer}_rounds",
               "--clients", str(clients), *what]
    if peer == "flower":
        return Ranks([*command, "--workers", str(workers)], 1)
    return Ranks(command, workers)


def turns(sides: dict[str, Ranks], blocks: int) -> dict[str, dict[str, list[float]]]:
    """Ask each side for `blocks` blocks in turn, after one to warm up; all answers by name."""
    found: dict[str, dict[str, list[float]]] = {name: {} for name in sides}
    for block in range(blocks + 1):
        for name, side in sides.items():
            for what, seconds in side.ask(ROUNDS).items():
                samples = seconds if isinstance(seconds, list) else [seconds]
                if block:
                    found[name].setdefault(what, []).extend(samples)
    return found


def numbers(samples: dict[str, list[float]]) -> Found:
    """A method's medians and ratios."""
    round_s, allreduce_s, passes_s = (statistics.median(samples[name])
                                      for name in ("rounds", "all_reduce", "passes"))
    return {"round_s": round_s, "spread": spread(samples["rounds"]), "allreduce_s": allreduce_s,
            "passes_s": passes_s, "ratio": round_s / (allreduce_s + passes_s),
            "bare_ratio": round_s / allreduce_s if allreduce_s else None}  # none on one worker


def measure(params: float, workers: int, clients: int, methods: Sequence[str], peers: Sequence[str],
            blocks: int) -> Found:
    """Measure all sides for one model. params: million."""
    found: Found = {"params": params, "workers": workers, "clients": clients, "methods": {},
                    "apart": {}}
    for method in methods:
        if workers > 1:
            with fedrun_side(params, workers, clients, method, apart=True) as side:
                found["apart"][method] = numbers(turns({"fedrun": side}, blocks)["fedrun"])
        with contextlib.ExitStack() as stack:
            sides = {"fedrun": stack.enter_context(fedrun_side(params, workers, clients, method))}
            if method == "fed_avg":  # the peers do nothing else
                what = ["--shapes", json.dumps(shapes(params))]
                sides |= {peer: stack.enter_context(peer_side(peer, workers, clients, what))
                          for peer in peers}
            samples = turns(sides, blocks)
        found["methods"][method] = numbers(samples["fedrun"])
        found |= {f"{peer}_s": statistics.median(samples[peer]["rounds"])
                  for peer in peers if peer in samples}
    averaging = found["methods"]["fed_avg"]
    found |= {"fedrun_s": averaging["round_s"]} | {
        name: averaging[name] for name in ("allreduce_s", "passes_s", "ratio", "bare_ratio")}
    if "fed_fisher" in found["methods"]:
        found["fisher_ratio"] = found["methods"]["fed_fisher"]["ratio"]
    if peers:
        best = min(found[f"{peer}_s"] for peer in peers)
        found["times_faster"] = best / found["fedrun_s"]
    return found


HEADER = """\
| million | workers | clients | method | machines | round (s) | all-reduce | passes \
| over the floor | over the bare all-reduce | Flower | pfl |
|---|---|---|---|---|---|---|---|---|---|---|---|"""


def table(found: Found) -> str:
    """Two rows for each method; one row if there is a single worker."""
    def seconds(name: str) -> str:
        return f"{found[name]:.3f}" if name in found else "-"

    def row(method: str, machines: int, one: Found) -> str:
        bare = f"{one['bare_ratio']:.2f}" if one["bare_ratio"] else "-"
        peers = (seconds("flower_s"), seconds("pfl_s")
                 ) if method == "fed_avg" and machines == 1 else ("-", "-")
        return (f"| {found['params']:g} | {found['workers']} | {found['clients']} | {method} "
                f"| {machines} | {one['round_s']:.3f} ±{one['spread']:.0%} "
                f"| {one['allreduce_s']:.3f} | {one['passes_s']:.3f} | {one['ratio']:.2f} | {bare} "
                f"| {peers[0]} | {peers[1]} |")

    return "\n".join(row(method, machines, one) for method in found["methods"]
                     for machines, one in ((1, found["methods"][method]),
                                           (found["workers"], found["apart"].get(method))) if one)


def grid(params: Sequence[float], workers: Sequence[int], clients: int, methods: Sequence[str],
         blocks: int, folder: Path) -> list[Found]:
    """Measure all points that overhead.json lacks, and write each as soon as it is measured.

    Peers are measured on two workers, and only for models that fit into their memory.
    """
    file = folder / "overhead.json"
    points: list[Found] = json.loads(file.read_text())["points"] if file.exists() else []
    there = {(point["params"], point["workers"], point["clients"]) for point in points}
    for million in params:
        for count in workers:
            if (million, count, clients) in there:
                continue
            peers = ("flower", "pfl") if count == 2 and million <= 27 else ()
            points.append(measure(million, count, clients, methods, peers, blocks))
            print(table(points[-1]), flush=True)
            folder.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps({"machine": machine(), "points": points}, indent=1) + "\n")
    return points


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--params", type=float, nargs="+", help="million; default 27, in the grid "
                        "1, 3, 10, 27 and 100")
    parser.add_argument("--workers", type=int, nargs="+", help="default 4, in the grid 1, 2 and 4")
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--method", nargs="+", default=["fed_fisher"],
                        help="besides fed_avg; default: fed_fisher")
    parser.add_argument("--peers", action="store_true",
                        help="also Flower and pfl; the grid has them on two workers")
    parser.add_argument("--blocks", type=int, default=7,
                        help=f"of {ROUNDS} rounds and one floor each")
    parser.add_argument("--json", action="store_true",
                        help="print the last measurement as one JSON object, and nothing else")
    parser.add_argument("--grid", action="store_true",
                        help="measure the points that --out lacks, and draw the figure")
    parser.add_argument("--out", type=Path, default=Path("results/overhead"))
    arguments = parser.parse_args()
    methods = list(dict.fromkeys(["fed_avg", *arguments.method]))
    if not arguments.json:
        print(f"{machine()}; one thread a worker\n\n{HEADER}", flush=True)
    if arguments.grid:
        from tests.benchmarks.overhead_figure import draw
        points = grid(arguments.params or [1, 3, 10, 27, 100], arguments.workers or [1, 2, 4],
                      arguments.clients, methods, arguments.blocks, arguments.out)
        print(draw(points, arguments.out))
        return
    peers = ("flower", "pfl") if arguments.peers else ()
    for million in arguments.params or [27]:
        for count in arguments.workers or [4]:
            found = measure(million, count, arguments.clients, methods, peers, arguments.blocks)
            if not arguments.json:
                print(table(found), flush=True)
    if arguments.json:
        assert all(math.isfinite(found[name]) for name in ("fedrun_s", "ratio"))
        print(json.dumps(found))


if __name__ == "__main__":
    main()
