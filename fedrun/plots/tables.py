"""Tables in figures, for what would not fit into a title: the settings in which runs differ.

A table is a legend, since matplotlib finds room for legends around the panels.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import Literal

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from fedrun.plots import style
from fedrun.plots.groups import Settings

FONT = 9.5  # points
CHARACTER = 0.6 * FONT / 72  # inches, a little more than the average
SAMPLE = 3.4  # of the font's size: length of a line in front of a row
HEIGHT = 1.6  # of the font's size: a row, higher than any text, so that columns agree
GAP = 1.5  # of the font's size, between columns
ROW = 0.22  # inches
MOST_ROWS = 16  # beside a figure
LONGEST = 28  # columns of a cell


def settings_beside(fig: Figure, settings: Settings) -> None:
    """The settings that tell a figure's runs from those of others, at its right. The figure becomes
    wider by the table."""
    if not settings:
        return
    rows = [("these runs", ""), *((style.text(name, LONGEST), style.text(value, LONGEST))
                                  for name, value in settings[:MOST_ROWS])]
    if len(settings) > MOST_ROWS:
        rows.append((f"and {len(settings) - MOST_ROWS} more", ""))
    across, down = fig.get_size_inches()
    beside = width(rows)
    fig.set_size_inches(across + beside, max(down, ROW * len(rows) + 1.5))
    middle = 0.5 * across / (across + beside)  # of the panels, where their texts stay
    if fig.get_suptitle():
        fig.suptitle(fig.get_suptitle(), x=middle)
    if fig.get_supxlabel():
        fig.supxlabel(fig.get_supxlabel(), x=middle, fontsize=12)
    table(fig, rows, "outside right upper")


def table(fig: Figure, rows: Sequence[Sequence[str]],
          where: Literal["outside lower center", "outside right upper"],
          lines: Sequence[Line2D] = (), notes: str = "") -> None:
    """Rows of cells, the first in bold, at `where`, around the panels.

    lines: looks of the lines in the figure that the rows after the first stand for, if any.
    notes: in small print above the table.
    """
    across = len(rows[0])
    tall = max(cell.count("\n") for cell in rows[0])
    rows = [[" \n" * (tall - cell.count("\n")) + cell for cell in rows[0]], *rows[1:]]
    nothing = Line2D([], [], linestyle="none")
    sample = SAMPLE if lines else 0.0
    legend = fig.legend(
        [nothing, *(lines or [nothing] * (len(rows) - 1)),
         *[nothing] * (len(rows) * (across - 1))],
        # A label that starts with an underscore is left out.
        [f" {cell}" if cell.startswith("_") else cell or " "
         for column in zip(*rows, strict=True) for cell in column],
        loc=where, ncols=across, fontsize=FONT, handlelength=sample,
        handletextpad=0.8 if lines else 0.0, labelspacing=0.0,
        handleheight=HEIGHT,
        # Columns without lines have the room of a line before them too.
        columnspacing=GAP - (sample + 0.8 if lines else 0.0), title=f"{notes}\n" if notes else None,
        title_fontsize=FONT)
    for head in legend.get_texts()[::len(rows)]:
        head.set_fontweight("bold")


def width(rows: Sequence[Sequence[str]], lines: bool = False) -> float:
    """The width of a table in inches, roughly."""
    longest = [max(_columns(part) for cell in column for part in cell.split("\n"))
               for column in zip(*rows, strict=True)]
    beside = GAP * len(longest) + (SAMPLE + 0.8 if lines else 0.0)
    return CHARACTER * sum(longest) + beside * FONT / 72


def _columns(text: str) -> int:
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)
