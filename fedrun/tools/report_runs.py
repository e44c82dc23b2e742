"""The runs of `fedrun report`: rows of its table, and what each run's own part of the page holds.
"""

from __future__ import annotations

import itertools
import json
import math
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from fedrun.flags import method_flags, methods
from fedrun.plots import perplexity, style, used
from fedrun.plots.groups import Group, Settings, flat, groups
from fedrun.plots.run_folder import Run
from fedrun.plots.texts import Text, text_of
from fedrun.tools.report_pictures import Picture, picture
from fedrun.tools.report_sites import SitesPart, sites_part

NAMED = ("fedrun", "method", "config", "seed")
"""Settings that are told first, and that have no default that they could be compared with."""


@dataclass(frozen=True)
class Row:
    """A run for the page, with its numbers as text."""

    run: Run
    number: int
    """On the page, from 1."""
    final: str
    best: str
    at_sites: str
    """The final perplexity on what its sites hold out; empty if none is held out."""
    tokens: str
    clock: str
    bytes: str
    devices: str
    sites: SitesPart | None
    curve: Picture | str
    """Its perplexities, or why they are no curve."""
    used: Picture | None
    """What its rounds used of each client's update, where that was not always all."""
    weights: list[Picture]
    """How its weights changed; none if it saved no steps, or if they are not wanted."""
    changed: list[tuple[str, str]]
    """The settings that are not the method's defaults."""
    defaults: list[tuple[str, str]]
    """The other settings."""


@dataclass(frozen=True)
class Experiment:
    """Runs for the page that differ in their seed alone, with the means of their numbers as text.
    """

    label: str
    colour: str
    text: Text
    lowest: bool
    """Whether none of those with the same config and text, of which there are others, has a lower
    final perplexity."""
    differs: Settings
    """From the other experiments with its method, config and number of local updates."""
    seeds: str
    final: str
    best: str
    at_sites: str
    tokens: str
    clock: str
    bytes: str
    rows: list[Row]


def experiments(runs: Sequence[Run], axis: Any, weights: Mapping[Path, Sequence[Picture]]
                ) -> list[Experiment]:
    """Those that can be compared beside each other, the lowest of them first."""
    def compared(group: Group) -> tuple[str, Text]:
        return group.config, text_of(group.runs[0])

    made: list[Experiment] = []
    numbers = itertools.count(1)
    lowest: dict[tuple[str, Text], Group] = {}
    found = sorted(groups(runs), key=lambda group: (*compared(group), group.final_ppl))
    rivals = Counter(map(compared, found))
    for group in found:
        lowest.setdefault(compared(group), group)
        of_runs = sorted(group.runs, key=lambda run: (run.seed, run.name))
        finals = [run.final for run in of_runs]
        look = style.look(group.method)
        made.append(Experiment(
            look.label, look.colour, text_of(group.runs[0]),
            rivals[compared(group)] > 1 and lowest[compared(group)] is group, group.differs,
            ", ".join(str(run.seed) for run in of_runs),
            with_deviation([record.val_ppl for record in finals]),
            with_deviation([run.best.val_ppl for run in of_runs]),
            with_deviation([record.site_val_ppl for record in finals]),
            count(mean([record.tokens for record in finals])),
            clock(mean([record.seconds for record in finals])),
            size(mean([record.bytes for record in finals])),
            [_row(run, next(numbers), axis, weights.get(run.path, ())) for run in of_runs]))
    return made


def _row(run: Run, number: int, axis: Any, weights: Iterable[Picture]) -> Row:
    final = run.final
    device = run.environment.get("device_name") or run.environment.get("device") or ""
    processes = run.environment.get("processes")
    curve = perplexity.single(run, axis)
    changed, defaults = settings(run)
    return Row(run, number, perplexity_text(final.val_ppl), perplexity_text(run.best.val_ppl),
               perplexity_text(final.site_val_ppl),
               count(final.tokens) + (" (inferred)" if run.tokens_inferred else ""),
               clock(final.seconds), size(final.bytes),
               f"{processes} × {device}" if processes and device else str(device), sites_part(run),
               picture("perplexity", curve, "Its perplexities.") if isinstance(curve, Figure)
               else curve, used_part(run), list(weights), changed, defaults)


def used_part(run: Run) -> Picture | None:
    """The picture of what was used of each client's update; None if its history has nothing of it.
    """
    shown = used.figure(run)
    return None if shown is None else picture(
        "used of each client", shown, "The share of each client\u2019s update that was used, the "
        "mean since the evaluation before: the factor that clipped it, the share of its elements "
        "that were not trimmed, or how often it was chosen.")


def settings(run: Run) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """The settings of a run, as text: those that are not its method's defaults, and the others."""
    flags = method_flags(run.method if run.method in methods() else "fed_avg")
    changed: list[tuple[str, str]] = []
    defaults: list[tuple[str, str]] = []
    for name, value in sorted(flat(run.settings).items(), key=lambda item: item[0] not in NAMED):
        shown = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        flag = flags.get(name.removeprefix("strategy."))
        is_default = name not in NAMED and flag is not None and flag.default == value
        (defaults if is_default else changed).append((name, shown))
    return changed, defaults


def perplexity_text(value: float) -> str:
    """1234.5 as 1,234.50; the perplexity of a diverged run with its power of ten; an empty string
    for nan."""
    if math.isnan(value):
        return ""
    return f"{value:,.2f}" if value < 1e9 else f"{value:.3g}"


def with_deviation(values: Sequence[float]) -> str:
    """The mean of perplexities, of several with their standard deviation."""
    middle = perplexity_text(mean(values))
    if len(values) < 2 or not math.isfinite(mean(values)):
        return middle
    return f"{middle} ± {perplexity_text(statistics.stdev(values))}"


def mean(values: Sequence[float]) -> float:
    """The mean; nan if a value is."""
    return math.fsum(values) / len(values)


def count(number: float) -> str:
    """A number of tokens, 1,024; an empty string for nan."""
    return f"{number:,.0f}" if math.isfinite(number) else ""


def clock(seconds: float) -> str:
    """Seconds as hours, 3725 as 1:02:05; an empty string for nan."""
    if not math.isfinite(seconds):
        return ""
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"


def size(count: float) -> str:
    """Bytes, 63e6 as 63 MB; an empty string for nan."""
    if not math.isfinite(count):
        return ""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 1000 or unit == "TB":
            break
        count /= 1000
    return f"{count:.3g} {unit}"
