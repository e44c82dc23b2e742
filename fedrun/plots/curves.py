"""The mean curve of an experiment's repetitions, and how far they spread."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedrun.plots.runs import Axis, Group, Measure


@dataclass(frozen=True)
class Curve:
    """Mean over seeds, with one (sample) standard deviation; std is None for a single seed."""

    x: np.ndarray
    mean: np.ndarray
    std: np.ndarray | None
    seeds: list[int]
    left_out: list[str]
    """Runs of the group that are shorter than the others, or a second time the same seed."""


def curve(group: Group, measure: Measure, axis: Axis) -> Curve | None:
    """The mean curve of a group; None where no run has this measure on this axis.

    It has a point for each global step at which all seeds were evaluated: the mean of their x
    (seconds differ, all else is equal) and of their perplexities.
    """
    longest = max(run.history[-1].step for run in group.runs)
    chosen: dict[int, dict[int, tuple[float, float]]] = {}
    left_out = []
    for run in group.runs:
        points = run.points(measure, axis)
        if run.history[-1].step < longest or run.seed in chosen:
            left_out.append(run.name)
        elif points:
            chosen[run.seed] = points
    steps = sorted(set.intersection(*map(set, chosen.values()))) if chosen else []
    if not steps:
        return None
    x, y = np.moveaxis(np.array([[points[s] for s in steps] for points in chosen.values()]), 2, 0)
    std = y.std(axis=0, ddof=1) if len(y) > 1 else None
    return Curve(x.mean(axis=0), y.mean(axis=0), std, sorted(chosen), left_out)
