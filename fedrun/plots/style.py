"""How figures look: colours, labels, ticks and files.

Colours are those of Okabe & Ito (2008), which stay distinct under common colour-vision
deficiencies; methods beyond their number use Paul Tol's muted scheme. Each method has its own
marker, so that it is recognised in grey too. Figures are drawn without pyplot, so they need no
display and share no state.
"""

from __future__ import annotations

import math
import textwrap
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import EngFormatter, FixedLocator, FuncFormatter, NullFormatter, NullLocator

from fedrun.common.terminal import shortened, visible
from fedrun.plots import fonts
from fedrun.plots.run_folder import Axis


class Look(NamedTuple):
    """How a method is drawn."""

    label: str
    colour: str
    marker: str


LOOKS = {
    "central": Look("Central", "#000000", "o"),
    "fed_avg": Look("FedAvg", "#0072B2", "s"),
    "fed_momentum": Look("FedMomentum", "#E69F00", "^"),
    "fed_entropy": Look("FedEntropy", "#009E73", "D"),
    "fed_fisher": Look("FedFisher", "#D55E00", "v"),
    "fed_adam": Look("FedAdam", "#CC79A7", "P"),
    "diloco": Look("DiLoCo", "#56B4E9", "X"),
    "fed_yogi": Look("FedYogi", "#882255", "<"),
    "fed_adagrad": Look("FedAdagrad", "#999933", ">"),
    "fed_sgd": Look("FedSGD", "#7F7F7F", "h"),
    "fed_median": Look("FedMedian", "#117733", "d"),
    "fed_trimmed_mean": Look("FedTrimmedMean", "#997700", "p"),
    "fed_krum": Look("FedKrum", "#994455", "8"),
}
_OTHER_COLOURS = ("#332288", "#44AA99", "#AA4499", "#661100")
BAND_OPACITY = 0.18
DIVERGING = "RdBu_r"
TITLE_CHARACTER = 0.105  # inches: width of a title's characters on average
LONGEST = 50  # columns of a name in a figure
LONGEST_FILE = 200  # bytes of a file name without its ending; file systems allow 255

X_LABELS: dict[Axis, str] = {
    "tokens": "training tokens seen", "steps": "local optimizer steps of a client",
    "rounds": "global steps (rounds; central: optimizer steps)", "seconds": "wall-clock seconds",
    "bytes": "bytes exchanged by the clients"}

RC: Any = {  # rc_context's stub accepts literal keys only
    "font.size": 12, "axes.titlesize": 13, "axes.labelsize": 12, "legend.fontsize": 11,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
    "grid.color": "#E3E3E3", "grid.linewidth": 0.8, "axes.axisbelow": True,
    "lines.linewidth": 2.0, "lines.markersize": 5.5, "legend.frameon": False,
    "text.parse_math": False, "text.usetex": False,  # names may have $, _ and ^ in them
    "savefig.dpi": 150, "svg.hashsalt": "fedrun", "svg.fonttype": "path"}


def look(method: str) -> Look:
    """A method's look, the same in every figure; derived from the name for unknown methods."""
    if method in LOOKS:
        return LOOKS[method]
    number = zlib.crc32(method.encode())
    return Look(method, _OTHER_COLOURS[number % len(_OTHER_COLOURS)], "*")


def line_look(place: int) -> dict[str, Any]:
    """Colour, line and marker of a figure's line number `place` where the method does not tell
    lines apart: 9 colours, and 27 looks that are all different."""
    looks = list(LOOKS.values())[1:]
    chosen = looks[(0, 3, 2, 4, 1, 5, 6, 7, 8)[place % 9]]
    return {"color": chosen.colour, "marker": chosen.marker,
            "linestyle": ("-", (0, (5, 2)), (0, (1.2, 1.6)))[(place + place // 9) % 3]}


def shade(method: str, strength: float) -> tuple[float, float, float]:
    """The method's colour at strength 1, fading to white at 0."""
    red, green, blue = to_rgb(look(method).colour)
    return (1 - strength * (1 - red), 1 - strength * (1 - green), 1 - strength * (1 - blue))


def figure(width: float, height: float) -> Figure:
    """An empty figure, sizes in inches, whose layout adapts to what is drawn on it."""
    return Figure(figsize=(width, height), layout="constrained")


def drawing() -> Any:
    """The context manager to draw figures in."""
    return matplotlib.rc_context(RC)


def text(words: str, longest: int = LONGEST) -> str:
    """Text from elsewhere made fit for a figure.

    One line of at most `longest` columns; characters that no font has are replaced by their codes.
    """
    start = shortened(visible(words), longest)  # before `drawable`: codes are longer
    return shortened(fonts.drawable(start), longest)


def label(method: str) -> str:
    """The method's label, made fit for a figure."""
    shown = text(look(method).label, 24)
    return f" {shown}" if shown.startswith("_") else shown  # matplotlib's legends omit _names


def lines(width: float, *words: str) -> str:
    """Each of `words` on a line of its own, or on several: as wide as a title above `width` inches
    of a figure may be."""
    return "\n".join(textwrap.fill(line, int(width / TITLE_CHARACTER)) for line in words)


def title(what: str, name: str) -> str:
    """`what, name` on one line, or on two if one would be too long."""
    name = text(name)
    return f"{what}, {name}" if len(what) + len(name) < 60 else f"{what}\n{name}"


def save(fig: Figure, folder: Path, name: str) -> Path:
    """Write `name`.png and `name`.svg, with `name` made valid; returns the path of the PNG."""
    folder.mkdir(parents=True, exist_ok=True)
    name = file_name(name)
    write(fig, folder / f"{name}.svg", "svg")
    write(fig, folder / f"{name}.png", "png")
    return folder / f"{name}.png"


def write(fig: Figure, target: Path | BinaryIO, form: Literal["svg", "png"]) -> None:
    """Write a figure to a file."""
    with drawing():
        for words in fig.findobj(Text):
            words.set_fontfamily(fonts.families())
        fig.savefig(target, format=form, metadata={"Date": None} if form == "svg" else None)


def file_name(name: str) -> str:
    """`name` as one component of a path. Longer than LONGEST_FILE bytes, it ends in a checksum."""
    name = visible(name).replace("/", "_")
    content = name.encode()
    if len(content) <= LONGEST_FILE:
        return name
    return f"{content[:LONGEST_FILE - 9].decode(errors='ignore')}_{zlib.crc32(content):08x}"


def log_ticks(low: float, high: float) -> list[float]:
    """Four to nine round numbers from `low` to `high`, about evenly on a log axis."""
    assert 0 < low <= high
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    whole = [10.0**d for d in decades if low <= 10.0**d <= high]
    if len(whole) > 9:
        return whole[::-(-len(whole) // 9)]
    for mantissas in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 7)):
        ticks = [m * 10.0**d for d in decades for m in mantissas if low <= m * 10.0**d <= high]
        if len(ticks) >= 4:
            return ticks
    # Within a small part of a decade a log axis is nearly linear, so equal steps work.
    rough = (high - low) / 5 or high / 10
    step = 10.0 ** math.floor(math.log10(rough))
    step *= next(s for s in (1, 2, 2.5, 5, 10) if s * step >= rough)
    first = math.ceil(low / step - 1e-9)
    return [n * step for n in range(first, math.floor(high / step + 1e-9) + 1)]


def log_axis(ax: Axes) -> None:
    """Make the y-axis logarithmic, with plain numbers. Call it after everything is drawn."""
    ax.set_yscale("log")
    low, high = ax.get_ylim()
    ax.yaxis.set_major_locator(FixedLocator(log_ticks(low, high)))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_minor_formatter(NullFormatter())


def work_axis(ax: Axes, axis: Axis) -> None:
    """Label the x-axis of curves, with 500k, 2M, 3G for large numbers."""
    ax.set_xlabel(X_LABELS[axis])
    ax.set_xlim(left=0)
    ax.xaxis.set_major_formatter(EngFormatter(unit="B" if axis == "bytes" else "", sep=""))
    ax.locator_params(axis="x", nbins=5)


def legend_below(fig: Figure, handles: Iterable[Any], columns: int, notes: str = "") -> None:
    """One legend for all panels, below them, with `notes` in small print above it."""
    fig.legend(handles=list(handles), loc="outside lower center", ncols=columns,
               handlelength=2.6, columnspacing=1.6, title=notes or None, title_fontsize=9.5)
