"""Our training step against that of transformers: time, peak memory and distance from the floor.
An evaluation (a batch, without gradients) stands beside the forward pass of transformers.

    python -m tests.benchmarks.step                          # the whole table, as markdown
    python -m tests.benchmarks.step --layers 1 --batch 4 --json

Both sides take turns, each in its own process. Times are medians, with the interquartile range in
percent. Memory is the peak above what the process held after a step of a tiny model. The floor is
the time of the step's matrix products, measured alone, and of AdamW's memory traffic at the rate of
a copy (see floor.py).
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Mapping
from typing import Any, TypeVar

from fedrun.model.precision import bf16_in_hardware
from tests.benchmarks.common import Side, machine, spread

SIDES = "tests.benchmarks.sides"
WARM_UP = 2
T = TypeVar("T")


def compare(layers: int, batch: int, dtype: str, stock_dtype: str, threads: int,
            repetitions: int) -> dict[str, Any]:
    """Time and memory of both sides for one model, and the parts of our step."""
    shape = ("--layers", str(layers), "--batch", str(batch))
    sides = {"ours": Side(SIDES, "ours", *shape, "--dtype", dtype, threads=threads),
             "stock": Side(SIDES, "stock", *shape, "--dtype", stock_dtype, threads=threads)}
    samples = in_turns(sides, "step", repetitions)
    memory = {name: side.ask("memory") for name, side in sides.items()}
    evaluations = in_turns(sides, "evaluation", repetitions)
    sides["stock"].close()
    floor, parts = sides["ours"].ask("floor"), sides["ours"].ask("parts")
    sides["ours"].close()
    ours_s, stock_s = (statistics.median(samples[name]) for name in ("ours", "stock"))
    our_evaluation, stock_evaluation = (statistics.median(evaluations[name])
                                        for name in ("ours", "stock"))
    return {"layers": layers, "batch": batch, "dtype": dtype, "stock_dtype": stock_dtype,
            "threads": threads, "ours_s": ours_s, "stock_s": stock_s, "speedup": stock_s / ours_s,
            "ours_spread": spread(samples["ours"]), "stock_spread": spread(samples["stock"]),
            "ours_mib": memory["ours"], "stock_mib": memory["stock"],
            "memory_ratio": memory["ours"] / memory["stock"], "floor_s": floor,
            "floor_ratio": ours_s / floor, "parts_s": parts,
            "evaluation_s": our_evaluation, "stock_evaluation_s": stock_evaluation,
            "evaluation_speedup": stock_evaluation / our_evaluation}


def in_turns(sides: Mapping[T, Side], command: str, repetitions: int) -> dict[T, list[float]]:
    """The seconds of a command on each side, which take turns."""
    samples: dict[T, list[float]] = {name: [] for name in sides}
    for repetition in range(WARM_UP + repetitions):
        for name, side in sides.items():
            taken = side.ask(command)
            time.sleep(0.05)  # until the threads of this side are idle
            if repetition >= WARM_UP:
                samples[name].append(taken)
    return samples


def lengths(dtype: str, threads: int, tokens: int = 4096) -> dict[int, float]:
    """Median seconds of our step on the same number of tokens, by length of the sequences."""
    cuts = [length for length in (256, 512, 1024, 2048, 4096) if length <= tokens]
    sides = {length: Side(SIDES, "ours", "--batch", str(tokens // length), "--length", str(length),
                          "--dtype", dtype, threads=threads) for length in cuts}
    samples = in_turns(sides, "step", repetitions=5)
    for side in sides.values():
        side.close()
    return {length: statistics.median(values) for length, values in samples.items()}


def token_times(dtype: str, threads: int) -> dict[str, float]:
    """Seconds to generate one token, by length of the prompt."""
    side = Side(SIDES, "ours", "--dtype", dtype, threads=threads)
    times: dict[str, float] = side.ask("token")
    side.close()
    return times


def row(found: dict[str, Any]) -> str:
    head, scan, adamw, rest = (1e3 * found["parts_s"][part]
                               for part in ("head", "scan", "adamw", "rest"))
    return (f"| {found['layers']} | {found['batch']} | {found['dtype']} / {found['stock_dtype']} "
            f"| {found['ours_s']:.3f} ±{found['ours_spread']:.0%} "
            f"| {found['stock_s']:.3f} ±{found['stock_spread']:.0%} | {found['speedup']:.2f} "
            f"| {found['ours_mib']:.0f} / {found['stock_mib']:.0f} | {found['memory_ratio']:.2f} "
            f"| {found['floor_ratio']:.2f} | {head:.0f} | {scan:.0f} | {adamw:.0f} | {rest:.0f} |")


def evaluation_row(found: dict[str, Any]) -> str:
    return (f"| an evaluation: {found['layers']} | {found['batch']} "
            f"| {found['dtype']} / {found['stock_dtype']} | {found['evaluation_s']:.3f} "
            f"| {found['stock_evaluation_s']:.3f} | {found['evaluation_speedup']:.2f} "
            + "|" * 8)


HEADER = """\
| layers | batch | ours / stock | ours (s) | stock (s) | speedup | MiB | ratio | over the floor \
| head (ms) | scan | AdamW | rest |
|---|---|---|---|---|---|---|---|---|---|---|---|---|"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--batch", type=int, nargs="+", default=[4, 16])
    parser.add_argument("--dtype", choices=("auto", "fp32", "bf16"), nargs="+",
                        help="of our side; default: fp32 and auto, or auto with --json")
    parser.add_argument("--stock_dtype", choices=("fp32", "bf16"), default="fp32",
                        help="of transformers: fp32, its default, or bf16 under torch.autocast")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--json", action="store_true",
                        help="print the last comparison as one JSON object, and nothing else")
    arguments = parser.parse_args()
    auto = "bf16" if bf16_in_hardware("cpu") else "fp32"
    wanted = arguments.dtype or (["auto"] if arguments.json else ["fp32", "auto"])
    dtypes = list(dict.fromkeys(auto if dtype == "auto" else dtype for dtype in wanted))
    if not arguments.json:
        print(f"{machine()}; {arguments.threads} threads, sequences of 256\n\n{HEADER}")
    for layers in arguments.layers:
        for batch in arguments.batch:
            for dtype in dtypes:
                found = compare(layers, batch, dtype, arguments.stock_dtype, arguments.threads,
                                arguments.repetitions)
                if not arguments.json:
                    print(row(found), evaluation_row(found), sep="\n", flush=True)
    if arguments.json:
        print(json.dumps(found))
        return
    times = lengths(dtypes[-1], arguments.threads)
    print(f"\n4096 tokens a step in {dtypes[-1]}, by length of the sequences (s): "
          + ", ".join(f"{length}: {taken:.3f}" for length, taken in times.items()))
    tokens = token_times(dtypes[-1], arguments.threads)
    print(f"one token generated in {dtypes[-1]}, by length of the prompt (ms): "
          + ", ".join(f"{length}: {1e3 * taken:.2f}" for length, taken in tokens.items()))


if __name__ == "__main__":
    main()
