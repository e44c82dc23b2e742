"""The part of its curves that a figure shows.

Perplexity starts at the size of the vocabulary and falls by a factor of a hundred within a few
steps. An axis with room for that draws methods that end 2 % apart as one line. So by default the
axis has room for what the curves do after a tenth of the run, and an inset shows them whole. Of
curves with few evaluations, nothing would be left: they are shown whole, as is a curve alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, FixedLocator

from fedrun.plots import style
from fedrun.plots.curves import Curve
from fedrun.plots.run_folder import Axis

STEEP = 0.1  # of a run
FEW = 5
"""Evaluations below which a curve is shown whole."""
SHORT = 0.5
"""Of the longest curve's x. One that ends before had no time to come near the others: if it is
above them, it counts with all that it does after its own tenth."""
ABOVE_OWN_END = 1.25
"""The axis ends at this multiple of a curve's last value, unless the curve stays below it."""
ABOVE_LOWEST_END = 6.0
"""And at this multiple of the lowest last value, so that a diverged run does not flatten others."""
MARGIN = 0.04  # of the axis, above and below
DOTS = 1.05  # between the ends of the axis and dots alone
SMALLEST_RATIO = 1.02  # between the ends of the axis, for flat curves
INSET = (0.40, 0.36)  # of a panel's width and height
TICKS = (0.14, 0.10)  # of a panel, for the inset's tick labels at its left and below it
PLACES = [(x, y) for y in (0.60, 0.45, 0.30, 0.12) for x in (0.59, 0.40, 0.16)]
"""Lower left corners that an inset may have in a panel, the best first."""
BESIDE = 2.0  # inches: width of an inset beside the panels


@dataclass(frozen=True)
class View:
    """What the user asked to see."""

    start: int | None = None
    """The first local step of a client that is shown; None for the default limits."""
    y_max: float | None = None
    """Where the y-axis ends."""


WHOLE_FINDING = View()


@dataclass(frozen=True)
class Drawn:
    """A curve, the line that shows it, and the panel that it is in."""

    ax: Axes
    line: Line2D
    curve: Curve


def limits(curves: Sequence[Curve], view: View) -> tuple[float, float] | str:
    """The lowest and the highest perplexity to show, or why there is nothing between them."""
    lows, highs = [], []
    shorter: list[tuple[float, float]] = []
    longer: list[float] = []
    lowest_end = min(float(c.mean[-1]) for c in curves)
    longest = max(float(c.x[-1]) for c in curves)
    starts = [float(c.mean.max()) for c in curves
              if len(c.steps) >= FEW and c.x[-1] >= SHORT * longest]
    for found in curves:
        few = len(found.steps) < FEW or len(curves) == 1  # which there is nothing to tell from
        start = (0 if few else STEEP * found.steps[-1]) if view.start is None else view.start
        kept = found.steps >= start
        if not kept.any():
            continue
        std = np.zeros_like(found.mean) if found.std is None else found.std
        mean, end = found.mean[kept], float(found.mean[-1])
        # A band may reach far below its mean where one seed of few diverged.
        lows.append(max(float((mean - std[kept]).min()), float(mean.min()) / ABOVE_OWN_END))
        high = float((mean + std[kept]).max())
        if view.start is None and few:
            high = min(high, max(starts, default=high))  # diverged: it does not flatten the others
        elif view.start is None:
            whole = high
            high = max(min(high, ABOVE_OWN_END * end), end + float(std[-1]))
            high = min(high, ABOVE_LOWEST_END * lowest_end)
            if found.x[-1] < SHORT * longest:
                shorter.append((end, min(whole, max(starts, default=whole))))
        highs.append(high)
        longer += [high] if found.x[-1] >= SHORT * longest else []
    # Otherwise one that ends above what is shown of the longer ones would be a stub.
    highs += [whole for end, whole in shorter if end > max(longer, default=0.0)]
    if not lows:
        return f"needs runs that go beyond --from {view.start}"
    low, high = max(min(lows), 1e-3), max(highs) if view.y_max is None else view.y_max
    if high <= low and view.y_max is not None:
        return f"needs --y_max > {low:,.6g}, its lowest perplexity"
    if all(len(c.steps) == 1 for c in curves):  # dots, whose differences may be none
        low, high = low / DOTS, high if view.y_max is not None else high * DOTS
    margin = max(high / low, SMALLEST_RATIO) ** MARGIN
    return low / margin, high if view.y_max is not None else high * margin


def apply(drawn: Sequence[Drawn], axis: Axis, view: View, alone: bool = True) -> str:
    """Set the limits of panels that share a y-axis, and add insets where a curve is cut.

    alone: whether there are no other panels, so that an inset may stand beside these.
    Returns why nothing can be shown; empty if all is well.
    """
    found = limits([d.curve for d in drawn], view)
    if isinstance(found, str):
        return found
    low, high = found
    panels = list(dict.fromkeys(d.ax for d in drawn))
    first = min((float(d.curve.x[d.curve.steps >= view.start][0]) for d in drawn
                 if view.start and (d.curve.steps >= view.start).any()), default=0.0)
    for ax in panels:
        ax.set_ylim(low, high)
        ax.set_xlim(left=first)
    if view != WHOLE_FINDING:  # who chose the limits needs no inset
        return ""
    by_panel = {ax: [d for d in drawn if d.ax is ax] for ax in panels}
    cut = {ax: here for ax, here in by_panel.items()
           if any(d.curve.mean.max() > high for d in here)}
    hidden = {ax: _hidden(ax, here) for ax, here in cut.items()}
    if alone and any(min(found.values()) for found in hidden.values()):
        _inset_beside(panels, drawn, axis)
        return ""
    for ax, here in cut.items():
        places = hidden[ax]
        _inset(ax, here, axis, (*min(places, key=lambda place: places[place]), *INSET))
    return ""


def _inset_beside(panels: Sequence[Axes], drawn: Sequence[Drawn], axis: Axis) -> None:
    """One inset for all panels at the right of the first row, where it hides nothing."""
    fig = panels[0].get_figure()
    last = [ax for ax in panels if ax.get_subplotspec().is_first_row()][-1]  # type: ignore
    columns = last.get_subplotspec().get_gridspec().ncols  # type: ignore[union-attr]
    assert isinstance(fig, Figure)
    width, height = fig.get_size_inches()
    part = BESIDE * columns / (width - 1)
    fig.set_size_inches(width + BESIDE + 0.6, height)
    _inset(last, drawn, axis, (1.03 + 0.6 * part / BESIDE, 0.55, part, 0.4))


def _inset(ax: Axes, drawn: Sequence[Drawn], axis: Axis,
           box: tuple[float, float, float, float]) -> None:
    """Draw the whole curves small; box: left, bottom, width and height in parts of the panel."""
    inset = ax.inset_axes(box)
    for one in drawn:
        (small,) = inset.plot(one.curve.x, one.curve.mean)
        small.update_from(one.line)  # get_linestyle() does not say which dashes a line has
        small.set(linewidth=1.0, marker="none", transform=inset.transData, clip_path=inset.patch)
    style.log_axis(inset)
    low, high = inset.get_ylim()
    ticks = style.log_ticks(low, high)
    inset.yaxis.set_major_locator(FixedLocator(ticks[::-(-len(ticks) // 4)]))
    inset.set_xlim(left=0)
    inset.xaxis.set_major_formatter(EngFormatter(unit="B" if axis == "bytes" else "", sep=""))
    inset.locator_params(axis="x", nbins=3)
    inset.tick_params(labelsize=8, length=2, pad=1.5)
    inset.grid(False)
    inset.set_title("whole run", fontsize=8.5, pad=2)


def _hidden(ax: Axes, drawn: Sequence[Drawn]) -> dict[tuple[float, float], int]:
    """How much of the curves an inset would hide at each of PLACES."""
    left, right = ax.get_xlim()
    low, high = np.log(ax.get_ylim())
    across = np.linspace(0, 1, 200)
    curves = np.array([np.interp(left + across * (right - left), d.curve.x, np.log(d.curve.mean),
                                 left=np.inf, right=np.inf) for d in drawn])
    up = (curves - low) / (high - low)
    return {(x, y): int(((across > x - TICKS[0]) & (across < x + INSET[0]) & (up > y - TICKS[1])
                         & (up < y + INSET[1] + 0.04)).sum()) for x, y in PLACES}
