"""What the figures of perplexity are made of: panels, lines, and what stands around them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from fedrun.common.terminal import say
from fedrun.plots import style, tables
from fedrun.plots.groups import Group
from fedrun.plots.run_folder import Axis, Measure
from fedrun.plots.selection import ENDS, Selection
from fedrun.plots.view import FEW, Drawn, apply

Result = Figure | str
"""A figure, or why there is none: the runs that it needs."""

PANELS_PER_ROW = 3
SITES: dict[str, Any] = {"linestyle": (0, (6, 1.5, 1.2, 1.5)), "linewidth": 1.3, "marker": None}
"""How the perplexity on what sites hold out is drawn, beside that on the validation text."""


def new_panels(count: int, sharey: bool = True) -> tuple[Figure, list[Axes]]:
    """A figure with `count` panels that share a y-axis, or do not, at most three per row."""
    columns = 2 if count == 4 else min(count, PANELS_PER_ROW)
    rows = math.ceil(count / columns)
    width = 7.6 if columns == 1 else 1.2 + 3.9 * columns
    fig = style.figure(width, 1.3 + 3.9 * rows)
    grid = fig.subplots(rows, columns, sharey=sharey, squeeze=False)
    axes = list(grid.flat)
    for unused in axes[count:]:
        unused.remove()
    return fig, axes[:count]


def draw(ax: Axes, selection: Selection, group: Group, measure: Measure,
         at: float | None = None, **kwargs: Any) -> Line2D | None:
    """Draw a group's mean and its band; None if the group has no points on this axis.

    A curve that is known at its ends alone is drawn as the dot of its last point: the line to it
    from the size of the vocabulary would be a stroke that says nothing. at: the x of the dot, in
    place of its own.
    """
    found = selection.curve(group, measure)
    if found is None:
        return None
    look = style.look(group.method)
    every = max(1, len(found.x) // 8)
    settings: dict[str, Any] = {"color": look.colour, "marker": look.marker, "markevery": every}
    settings |= kwargs
    if len(found.x) < FEW:  # each evaluation, so that a line is not taken for more than it knows
        settings["marker"] = settings["marker"] or "."
    if found.ends_only:
        selection.notes[ENDS] = None
        found = found.last()
        settings["linestyle"] = "none"
        if at is not None:
            found = replace(found, x=np.array([at]))
    (line,) = ax.plot(found.x, found.mean, **settings)
    line.set_gid(f"{group.method} {group.config} {group.local_updates} {measure}")
    selection.drawn.append(Drawn(ax, line, found))
    if found.std is not None and len(found.x) == 1:
        ax.errorbar(found.x, found.mean, found.std, color=line.get_color(), capsize=3)
    elif found.std is not None:
        low = (found.mean - found.std).clip(min=1.0)  # no perplexity is below 1
        ax.fill_between(found.x, low, found.mean + found.std, color=line.get_color(),
                        alpha=style.BAND_OPACITY, linewidth=0)
    return line


def named(lines: Iterable[tuple[Line2D | None, str]]) -> list[Line2D]:
    """Legend entries that look like the lines."""
    entries = []
    for line, label in lines:
        if line is not None:
            entry = Line2D([], [])
            entry.update_from(line)  # get_linestyle() does not say which dashes a line has
            entry.set_label(label)
            entries.append(entry)
    return entries


def fit(axes: Sequence[Axes], selection: Selection, curves: Sequence[Axes] | None = None,
        ylabel: str = "validation perplexity", alone: bool = True) -> str:
    """Set limits, ticks and labels of panels whose lines are drawn; the reason if none of them
    can be shown.

    curves: the panels whose x-axis is the selection's; None for all. alone: whether the figure has
    no other panels.
    """
    for ax in axes if curves is None else curves:
        style.work_axis(ax, selection.axis)
    wanting = apply(selection.drawn, selection.axis, selection.view, alone)
    selection.drawn.clear()
    if wanting:
        return wanting
    style.log_axis(axes[0])
    for ax in axes:
        if ax.get_subplotspec().is_first_col():  # type: ignore[union-attr]
            ax.set_ylabel(ylabel)
    return ""


def finish(fig: Figure, axes: Sequence[Axes], selection: Selection, handles: Sequence[Line2D],
           columns: int, curves: Sequence[Axes] | None = None,
           ylabel: str = "validation perplexity") -> Result:
    """Fit the panels, and add the legend below them and the protocol beside them."""
    if wanting := fit(axes, selection, curves, ylabel):
        selection.foot()
        return wanting
    style.legend_below(fig, handles, min(columns, len(handles)), selection.foot())
    tables.settings_beside(fig, selection.protocol)
    return fig


def nothing_on(axis: Axis) -> str:
    return f"needs runs whose histories record {axis}"


def save_all(made: dict[str, Result], out_dir: Path) -> None:
    """Write the figures; print what was written, and what the missing ones need."""
    for name, result in made.items():
        if isinstance(result, str):
            say(f"skipped {name}: {result}")
        else:
            say(f"wrote {style.save(result, out_dir, name)}")
