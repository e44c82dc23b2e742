"""`fedrun plot bytes`: perplexity against what clients send, of the settings in a study's table.

A point for each setting, at what it was tuned to: bytes that the clients send and receive for a
token that they train on, and its perplexity divided by that of the study's reference. A setting is
on the front if no other has both fewer bytes and a lower perplexity.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter
from matplotlib.transforms import Bbox

from fedrun.common.files import number
from fedrun.plots import style
from fedrun.plots.pieces import Result
from fedrun.plots.studies import read_table

NEEDS = "needs a study in --data_dir with settings whose runs record bytes, and their reference"
HEADROOM = 1.15
"""The perplexity, as a multiple of the worst on the front or of the reference, above which points
are drawn at the edge."""

MARKER = 7  # points
BESIDE = [((5, 4), "left", "bottom"), ((-5, 4), "right", "bottom"), ((5, -4), "left", "top"),
          ((-5, -4), "right", "top"), ((0, 7), "center", "bottom"), ((0, -7), "center", "top"),
          ((5, -11), "left", "top"), ((5, 11), "left", "bottom")]
"""Where a point's name may stand: its distance in points, and how it is aligned."""


class Point(NamedTuple):
    """A setting of a study."""

    name: str
    method: str
    bytes: float
    """For a token of training."""
    ratio: float
    """Of its perplexity to the reference's; the mean over the reported seeds if it was repeated."""
    low: float
    high: float
    """The smallest and the largest of these seeds."""
    repeated: bool


def points(rows: Iterable[Mapping[str, Any]]) -> list[Point]:
    """The settings that record bytes, from the rows of a study's table."""
    found = []
    for row in rows:
        repeated = math.isfinite(number(row.get("ratio_mean")))
        ratio = number(row.get("ratio_mean" if repeated else "tuned_ratio"))
        sent = number(row.get("bytes_per_token"))
        if not (math.isfinite(ratio) and math.isfinite(sent) and min(ratio, sent) > 0):
            continue
        seeds = [number(r) for r in row.get("ratios") or []] if repeated else []
        found.append(Point(str(row["setting"]), str(row["flags"]["method"]), sent, ratio,
                           min(seeds, default=ratio), max(seeds, default=ratio), repeated))
    return found


def front(found: Sequence[Point]) -> list[Point]:
    """The points that no other betters in both, from the fewest bytes on."""
    kept: list[Point] = []
    for point in sorted(found, key=lambda p: (p.bytes, p.ratio)):
        if not kept or point.ratio < kept[-1].ratio:
            kept.append(point)
    return kept


def figures(folder: Path) -> dict[str, Result]:
    """The figure, by its name. InputError if the folder's table.json cannot be used."""
    rows = read_table(folder)
    found = points(rows)
    if not found:
        return {"perplexity_and_bytes": NEEDS}
    every_step = [p for row in rows if math.isfinite(
        p := number(row.get("bytes_per_token")) * number(row.get("times_fewer_bytes")))]
    same = every_step and max(every_step) < min(every_step) * (1 + 1e-6)
    with style.drawing():
        return {"perplexity_and_bytes": _draw(found, every_step[0] if same else math.nan)}


def _draw(found: Sequence[Point], every_step: float) -> Result:
    """every_step: bytes a token of summing fp32 gradients at every step; nan if settings differ."""
    fig = style.figure(9.6, 6.6)
    ax = fig.subplots()
    best = front(found)
    ends = [*best, best[-1]._replace(bytes=max(p.bytes for p in found))]
    ax.step([p.bytes for p in ends], [p.ratio for p in ends], where="post", color="#666666",
            linewidth=1.2, zorder=1)
    top = HEADROOM * max(1.0, *(p.ratio for p in best))
    for point in found:
        look, inside = style.look(point.method), point.ratio <= top
        y = min(point.ratio, top)
        if inside and point.high > point.low:
            ax.errorbar([point.bytes], [y], [[y - point.low], [min(point.high, top) - y]],
                        color=look.colour, capsize=2.5, linewidth=1.0)
        ax.plot([point.bytes], [y], linestyle="none", color=look.colour,
                marker=look.marker if inside else "^", markersize=MARKER,
                markerfacecolor=look.colour if point.repeated else "white", zorder=2)
    ax.axhline(1.0, color=style.look("central").colour, linewidth=1.0, linestyle=(0, (4, 2)))
    if math.isfinite(every_step):  # a line and no point: the reference need not be trained so
        ax.axvline(every_step, color=style.look("central").colour, linewidth=1.0,
                   linestyle=(0, (1, 2)))
        ax.annotate("fp32 gradients\nsummed at every step", (every_step, 1.0), (-4, -4),
                    xycoords=ax.get_xaxis_transform(), textcoords="offset points", fontsize=7.5,
                    ha="right", va="top")
    bottom, above = ax.get_ylim()
    ax.set_ylim(bottom - 0.08 * (above - bottom), above)  # room for the words below the last point
    ax.set_xscale("log")
    ax.margins(x=0.1)
    ax.xaxis.set_major_formatter(EngFormatter(unit="B"))
    ax.set_xlabel("bytes that the clients send and receive for a token of training")
    ax.set_ylabel("perplexity ÷ the reference's")
    ax.set_title("Perplexity and bytes")
    looks = {p.method: style.look(p.method) for p in found}
    handles = [Line2D([], [], linestyle="none", color=look.colour, marker=look.marker,
                      label=style.label(method)) for method, look in looks.items()]
    notes = ["grey: the front; dashed: the reference"]
    if any(p.high > p.low for p in found):
        notes.append("bars: the range over seeds")
    if not all(p.repeated for p in found):
        notes.append("white: the tuning seed alone")
    if any(p.ratio > top for p in found):
        notes.append("at the upper edge: above it, with its value")
    notes.append("without a name: where there is no room for it")
    style.legend_below(fig, handles, 5, style.lines(1.2 * fig.get_figwidth(), "; ".join(notes)))
    _write_names(ax, [*sorted(best, key=lambda p: not p.repeated),
                      *sorted({*found} - {*best}, key=lambda p: p.ratio)], top)
    return fig


def _write_names(ax: Axes, found: Sequence[Point], top: float) -> None:
    """Write the names of points, in this order, beside them where there is room: not on another's,
    on a point, or beyond the edge. top: the ratio at the upper edge."""
    fig = ax.figure
    assert isinstance(fig, Figure)
    fig.draw_without_rendering()  # so that places on the paper are known
    places = [(p.bytes, min(p.ratio, top)) for p in found]
    half = MARKER / 2 * fig.dpi / 72
    taken = [note.get_window_extent() for note in ax.texts] + [
        Bbox([(x - half, y - half), (x + half, y + half)])
        for x, y in ax.transData.transform(places)]
    for point, place in zip(found, places, strict=True):
        beyond = "" if point.ratio <= top else f" ({point.ratio:.3g})"
        for (right, up), ha, va in BESIDE:
            note = ax.annotate(style.text(point.name + beyond, 40), place, (right, up),
                               textcoords="offset points", fontsize=7.5, ha=ha, va=va)
            note.set_in_layout(False)
            box = note.get_window_extent()
            within = ax.bbox.x0 <= box.x0 and box.x1 <= ax.bbox.x1
            if within and not any(box.overlaps(other) for other in taken):
                taken.append(box)
                break
            note.remove()
