"""The mean curve over the seeds of an experiment, and its standard deviation."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from fedrun.plots.groups import Group
from fedrun.plots.run_folder import Axis, Measure

ENDS_ONLY = 2  # points


@dataclass(frozen=True)
class Curve:
    """Mean over seeds and sample standard deviation; std is None for a single seed."""

    x: np.ndarray
    mean: np.ndarray
    std: np.ndarray | None
    seeds: list[int]
    steps: np.ndarray
    """Local optimizer steps of a client; of a central run, its optimizer steps."""
    left_out: list[str]
    """Runs that are shorter than the others or repeat a seed."""

    @property
    def ends_only(self) -> bool:
        """Whether all that is known is how it started and ended, or less: it has no shape."""
        return len(self.steps) <= ENDS_ONLY

    def last(self) -> Curve:
        """Its last point alone."""
        return replace(self, x=self.x[-1:], mean=self.mean[-1:], steps=self.steps[-1:],
                       std=None if self.std is None else self.std[-1:])


def curve(group: Group, measure: Measure, axis: Axis) -> Curve | None:
    """The mean curve of a group; None if no run has this measure on this axis.

    It has one point for each global step at which all seeds were evaluated: the mean of their x
    (which differs only in seconds) and of their perplexities.
    """
    longest = max(run.history[-1].step for run in group.runs)
    chosen: dict[int, dict[int, tuple[float, float]]] = {}
    left_out, first = [], None
    for run in group.runs:
        points = run.points(measure, axis)
        if run.history[-1].step < longest or run.seed in chosen:
            left_out.append(run.name)
        elif points:
            chosen[run.seed] = points
            first = first or run
    steps = sorted(set.intersection(*map(set, chosen.values()))) if chosen else []
    if first is None or not steps:
        return None
    x, y = np.moveaxis(np.array([[points[s] for s in steps] for points in chosen.values()]), 2, 0)
    std = y.std(axis=0, ddof=1) if len(y) > 1 else None
    local_steps = {record.step: first.local_steps(record) for record in first.history}
    return Curve(x.mean(axis=0), y.mean(axis=0), std, sorted(chosen),
                 np.array([local_steps[step] for step in steps]), left_out)
