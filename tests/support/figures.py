"""What the tests of figures look at: where things stand once a figure is drawn."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from fedrun.plots import deltas, perplexity, saved, style
from fedrun.plots.pieces import Result
from fedrun.plots.runs import find_runs


def all_figures(data_dir: Path) -> Iterator[tuple[str, Result]]:
    """Those of every kind of `fedrun plot`."""
    yield from perplexity.figures(find_runs(data_dir).runs, "tokens")[0].items()
    for federated in (False, True):
        found = saved.find_entities(data_dir, "server", federated, None)
        yield from deltas.figures(found).items()


def is_cut_off(figure: Figure) -> bool:
    """Whether any text or line reaches beyond the figure."""
    with style.drawing():  # saving a figure draws it twice too: insets move with their panels
        FigureCanvasAgg(figure).draw()
        figure.draw_without_rendering()
    content, (across, down) = figure.get_tightbbox(), figure.get_size_inches()
    return not (content.x0 > -0.02 and content.x1 < across + 0.02
                and content.y0 > -0.02 and content.y1 < down + 0.02)


def ends_in_pixels(figure: Figure) -> list[float]:
    """Where the lines of the first panel end, from below; all within the panel."""
    FigureCanvasAgg(figure).draw()  # the layout is decided when a figure is drawn
    ax = figure.axes[0]
    ends = [ax.transData.transform((np.asarray(line.get_xdata())[-1],
                                    np.asarray(line.get_ydata())[-1]))[1]
            for line in ax.lines if line.get_gid()]
    box = ax.get_window_extent()
    assert all(box.y0 < end < box.y1 for end in ends)
    return sorted(ends)
