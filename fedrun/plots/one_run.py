"""A figure of one run: its perplexities on the training and the validation text."""

from __future__ import annotations

import io

from matplotlib.figure import Figure

from fedrun.common.errors import InputError
from fedrun.plots import style
from fedrun.plots.pieces import SITES
from fedrun.plots.run_folder import Axis, Run
from fedrun.records.schema import HELD_OUT, SITE_VAL_PPL


class ShownFigure(Figure):
    """A figure that a notebook shows, without pyplot."""

    def _repr_png_(self) -> bytes:
        content = io.BytesIO()
        self.savefig(content, format="png")
        return content.getvalue()


def figure(run: Run, axis: Axis = "tokens") -> Figure:
    """Train and validation perplexity of a run against `axis`, both axes as their values need.

    Raises:
        InputError: the run has no evaluated step with this quantity.
    """
    with style.drawing():
        made = ShownFigure(figsize=(6.4, 4.0), layout="constrained")
        ax = made.subplots()
        colour = style.LOOKS[run.method].colour if run.method in style.LOOKS else None
        for measure, look in (("val_ppl", {"linewidth": 1.8}),
                              ("train_ppl", {"linewidth": 1.2, "linestyle": ":"}),
                              (SITE_VAL_PPL, SITES)):
            points = [*run.points(measure, axis).values()]  # type: ignore[arg-type]
            if points:
                ax.plot(*zip(*points, strict=True), color=colour, label={
                    "val_ppl": "validation", "train_ppl": "train"}.get(measure, HELD_OUT),
                    **look)
        if not ax.lines:
            raise InputError(f"{run.name}: no evaluated step has {axis}")
        ax.set_yscale("log")
        ax.set_xlabel(style.X_LABELS[axis])
        ax.set_ylabel("perplexity")
        ax.set_title(run.name)
        ax.legend()
    return made
