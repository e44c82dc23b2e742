"""The overview, `0_all_runs`: every run as a line of its own, with a table of what differs.

It is the one figure whose lines need not have the same protocol. It shows what is there, not which
method is better. Runs on different text are in panels of their own, without a common y-axis.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from fedrun.plots import style, tables
from fedrun.plots.curves import ENDS_ONLY
from fedrun.plots.groups import NO_VARIANT, Group
from fedrun.plots.pieces import SITES, Result, draw, fit, named, new_panels, nothing_on
from fedrun.plots.protocols import settings_of
from fedrun.plots.run_folder import Measure, Run
from fedrun.plots.selection import Selection
from fedrun.plots.texts import Text, text_of, texts
from fedrun.records.schema import HELD_OUT, SITE_VAL_PPL

OWN_LOOKS = 9
"""Runs up to which each has a look and a row of its own. Of more, those that differ in their seed
alone share them: there are no more colours that the eye tells apart."""
MOST_ROWS, MOST_COLUMNS = 40, 10  # of the table
WIDTH = 8.2  # inches, at least
BESIDE = f"thin, dash-dotted: perplexity on text {HELD_OUT}, beside that on the validation text"
NAMED = ("method", "config", "local_updates", "seed")
LONGEST_NAME, LONGEST_CELL = 40, 20  # columns of text


def all_runs(selection: Selection) -> Result:
    """All runs, a panel for each data set and tokenizer."""
    every = [run for group in selection.groups for run in group.runs]
    own_looks = len(every) <= OWN_LOOKS
    rows = [(text, group) for text in texts(every)
            for group in _rows(selection.groups, text, own_looks)]
    if not rows:
        return "needs at least one run"
    panels = list(dict.fromkeys(text for text, _ in rows))
    methods = len({group.method for _, group in rows})
    fig, axes = new_panels(len(panels), sharey=False)
    drawn: list[tuple[Group, Line2D]] = []
    wanting: list[str] = []
    for ax, panel in zip(axes, panels, strict=True):
        before = len(drawn)
        dots = not any(_has_curve(run, selection) for run in every if text_of(run) == panel)
        for place, (text, group) in enumerate(rows):
            look: dict[str, Any] = {} if methods == len(rows) else style.line_look(place)
            look |= {} if own_looks else {"linewidth": 1.2, "markersize": 4.0}
            at = len(drawn) + 1 if dots else None
            lines = [draw(ax, selection, replace(group, runs=[run]), "val_ppl", at, **look)
                     for run in group.runs] if text == panel else []
            drawn += [(group, line) for line in lines if line][:1]
            if lines and own_looks and _has_curve(group.runs[0], selection, SITE_VAL_PPL) \
                    and draw(ax, selection, group, SITE_VAL_PPL, **look | SITES):
                selection.notes[BESIDE] = None
        ax.set_title(style.lines(fig.get_figwidth() / min(len(panels), 3),
                                 style.text(str(panel))) if len(panels) > 1 else "All runs")
        reason = fit([ax], selection, [] if dots else None, alone=len(panels) == 1) \
            if len(drawn) > before else nothing_on(selection.axis)
        if dots:
            ax.set_xlabel("row of the table below")
            ax.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        if reason:
            wanting.append(reason)
            ax.text(0.5, 0.5, style.lines(3.5, reason), ha="center", transform=ax.transAxes)
    if len(wanting) == len(panels):
        selection.foot()
        return wanting[0]
    if len(panels) > 1:
        fig.suptitle("All runs")
    shown = drawn[:MOST_ROWS]
    cells, left_out = _cells([group for group, _ in shown], own_looks)
    across, down = fig.get_size_inches()
    fig.set_size_inches(max(across, WIDTH, tables.width(cells, lines=True) + 0.3),
                        down + tables.ROW * len(cells))
    notes = [selection.foot()]
    if left_out:
        notes.append(f"the runs differ in {left_out} more settings")
    if len(drawn) > MOST_ROWS:
        which = "best" if len(panels) == 1 else "first"
        notes.append(f"the {MOST_ROWS} {which} of {len(drawn)}")
    tables.table(fig, cells, "outside lower center", named((line, "") for _, line in shown),
                 "\n".join(filter(None, notes)))
    return fig


def _has_curve(run: Run, selection: Selection, measure: Measure = "val_ppl") -> bool:
    return len(run.points(measure, selection.axis)) > ENDS_ONLY


def _rows(groups: Sequence[Group], text: Text, own_looks: bool) -> list[Group]:
    """The runs of this text, the best first: each alone, or with those that differ in their seed.
    """
    kept = [replace(group, runs=its) for group in groups
            if (its := [run for run in group.runs if text_of(run) == text])]
    if own_looks:
        kept = [replace(group, runs=[run]) for group in kept
                for run in sorted(group.runs, key=lambda run: run.seed)]
    return sorted(kept, key=lambda group: group.final_ppl)


def _cells(rows: Sequence[Group], own_looks: bool) -> tuple[list[list[str]], int]:
    """The table's cells, the names of its columns first; and how many columns have no room."""
    settings = [settings_of(group.runs[0]) for group in rows]
    differing = _differing(settings, own_looks)
    kept = differing[:MOST_COLUMNS]
    at_sites = any(final(group, SITE_VAL_PPL) for group in rows)
    head = ["run" if own_looks else "method",
            *(style.text(name, LONGEST_CELL).replace("_", "\n", 1) for name in kept),
            *([] if own_looks else ["seeds"]), "final\nperplexity",
            *(["held out\nby sites"] if at_sites else [])]
    cells = [head]
    for group, its in zip(rows, settings, strict=True):
        first = style.text(group.runs[0].name, LONGEST_NAME) if own_looks else \
            style.label(group.method)
        cells.append([first, *(_cell(its, name) for name in kept),
                      *([] if own_looks else [_seeds(group)]), final(group),
                      *([final(group, SITE_VAL_PPL)] if at_sites else [])])
    return cells, len(differing) - len(kept)


def _differing(settings: Sequence[dict[str, Any]], own_looks: bool) -> list[str]:
    """The settings in which these runs differ."""
    def differ(name: str) -> bool:
        return len({json.dumps(its[name], default=str) for its in settings if name in its}) > 1

    first = [name for name in NAMED if differ(name) and (own_looks or name not in (
        "method", "seed"))]
    others = {name: None for its in settings for name in its if name not in NO_VARIANT}
    return first + [name for name in others if differ(name) and not (
        name.startswith("model.") and "config" in first)]


def _cell(settings: dict[str, Any], name: str) -> str:
    return style.text(str(settings[name]), LONGEST_CELL) if name in settings else ""


def _seeds(group: Group) -> str:
    seeds = sorted(run.seed for run in group.runs)
    return style.text(", ".join(map(str, seeds)), LONGEST_CELL)


def final(group: Group, measure: Measure = "val_ppl") -> str:
    """The last perplexity, or its mean over the runs and their standard deviation; empty if one of
    the runs has no perplexity."""
    ends = [getattr(run.final, measure) for run in group.runs]
    if any(map(math.isnan, ends)):
        return ""
    mean = f"{np.mean(ends):,.1f}"
    return f"{mean} ± {np.std(ends, ddof=1):,.1f}" if len(ends) > 1 else mean
