"""What differential privacy cost in the study configs/experiments/privacy.yaml, from its tables.

    python -m tests.benchmarks.private_study                 # the table, and whether it succeeded
    python -m tests.benchmarks.private_study --write         # and demonstration.md beside them

Set before the study was run: it succeeds if, in all of three seeds, the model that clients trained
at epsilon 8 is better than the one that they started from by more than the seeds differ.
Perplexities are of the second half of the validation split.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fedrun.common.files import read_json

FOLDER = Path("results/privacy")
START, JUDGED = "start", "epsilon_8"
HEADER = """\
| setting | clip | epsilon at delta | perplexity, by seed | gain over the start, mean \
| range over seeds | signal to noise, last round | all rounds |
|---|---|---|---|---|---|---|---|"""


class Measured(NamedTuple):
    """A setting's runs."""

    setting: str
    flags: Mapping[str, Any]
    records: list[dict[str, Any]]
    """The last of each run's history, by seed."""

    @property
    def perplexities(self) -> list[float]:
        """Of the second half of the split."""
        return [math.exp(record["val_loss_halves"][1]) for record in self.records]


def read(folder: Path) -> dict[str, Measured]:
    """The settings of a finished study, by name. ValueError or OSError for damaged files."""
    histories = read_json(folder / "histories.json", dict)
    found = {}
    for row in read_json(folder / "table.json", list):
        point = "".join(f"_{name}_{value:g}" for name, value in row["best"].items())
        prefix = f"{row['setting']}{point}_seed_"
        records = [histories[name][-1] for name in sorted(histories) if name.startswith(prefix)]
        found[row["setting"]] = Measured(row["setting"], row["flags"], records)
    return found


def gains(one: Measured, start: Measured) -> list[float]:
    """By how much each seed's perplexity is below that of the start."""
    return [theirs - ours
            for ours, theirs in zip(one.perplexities, start.perplexities, strict=True)]


def spread(values: Sequence[float]) -> float:
    """The range of the values."""
    return max(values) - min(values)


def succeeded(found: Mapping[str, Measured]) -> bool:
    """Whether epsilon 8 beats its start by more than the range of the seeds, in all of them."""
    judged = gains(found[JUDGED], found[START])
    return len(judged) == 3 and min(judged) > spread(found[JUDGED].perplexities)


def row(one: Measured, start: Measured) -> str:
    def mean(name: str) -> str:
        values = [record[name] for record in one.records if record.get(name) is not None]
        return f"{sum(values) / len(values):.3g}" if values else ""

    clip, epsilon = one.flags.get("dp_clip"), mean("epsilon")
    cost = f"{epsilon} at {float(one.flags['dp_delta']):g}" if epsilon else ""
    gained = gains(one, start)
    return (f"| {one.setting} | {'' if clip is None else clip} | {cost} "
            f"| {', '.join(f'{value:.2f}' for value in one.perplexities)} "
            f"| {sum(gained) / len(gained):+.2f} | {spread(one.perplexities):.2f} "
            f"| {mean('snr')} | {mean('snr_total')} |")


def report(found: Mapping[str, Measured]) -> str:
    """The table, with what came of it above."""
    verdict = "succeeded" if succeeded(found) else "FAILED"
    rows = [row(one, found[START]) for one in found.values()]
    return (f"The demonstration {verdict}: {JUDGED} beats its start by at least "
            f"{min(gains(found[JUDGED], found[START])):.2f} in every seed; its seeds differ by "
            f"{spread(found[JUDGED].perplexities):.2f}.\n\n" + "\n".join([HEADER, *rows]) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=FOLDER)
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    text = report(read(arguments.folder))
    print(text, end="", flush=True)
    if arguments.write:
        (arguments.folder / "demonstration.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
