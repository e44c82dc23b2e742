"""A setting of a study (see study.py): a row of its table, or one for each combination of axes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedrun.common.errors import InputError, require
from fedrun.common.old_names import renamed
from fedrun.flags import method_flags, methods
from fedrun.unused import refuse_unread

Point = tuple[tuple[str, float], ...]
"""A point on a setting's grid: ((flag, value), ...)."""


@dataclass
class StudySetting:
    """One row of the table: a method with its flags, and the grid on which it is tuned."""

    name: str
    flags: dict[str, Any]
    grid: dict[str, list[float]]
    extensions: int = 0
    tuned: dict[Point, float] = field(default_factory=dict)
    """Point -> loss on the first half of the validation split, in nats per token."""
    of: str = ""
    """The setting's name in the file, which `name` extends by its values of the axes."""
    axis: dict[str, Any] = field(default_factory=dict)
    """Axis -> this row's value, which is also in `flags`."""

    def points(self) -> list[Point]:
        """All points of the grid."""
        return [tuple(zip(self.grid, values, strict=True))
                for values in itertools.product(*self.grid.values())]

    @property
    def best(self) -> Point:
        """The point with the lowest loss."""
        return min(self.tuned, key=lambda point: (self.tuned[point], point))

    def extend(self) -> bool:
        """Add a value to each axis of the grid on whose edge the best point lies, at most
        `extensions` times; return whether the grid grew."""
        if self.extensions == 0 or not math.isfinite(self.tuned[self.best]):
            return False
        grew = False
        for name, value in self.best:
            values = sorted(self.grid[name])
            if len(values) < 2 or values[0] < value < values[-1]:
                continue
            factor = values[1] / values[0]
            self.grid[name].append(value / factor if value == values[0] else value * factor)
            grew = True
        self.extensions -= grew
        return grew


def rows_of(where: str, name: str, own: Any, values: Mapping[str, Any],
            overrides: Mapping[str, Any], extensions: int) -> list[StudySetting]:
    """The rows that a setting of the file makes: one for each combination of values of the axes
    that its method has and that it does not set itself.

    where: how messages name it. own: what the file has under its name. values: all of the file,
    with defaults. overrides: flags from the command line.
    """
    require(isinstance(own, dict), where, own, "flags with a `method`")
    refuse_unread("study", own, where + ": ")
    own = renamed(own)
    grid, only_first = own.pop("grid", values["grid"]), own.pop("only_first", [])
    extensions = own.pop("extensions", extensions)
    require(isinstance(extensions, int) and extensions >= 0, f"{where}: extensions", extensions,
            "an integer >= 0")
    try:
        grid = {flag: [float(v) for v in grid_values] for flag, grid_values in grid.items()}
    except (AttributeError, TypeError, ValueError):
        raise InputError(f"{where}: grid {grid}: must be a list of numbers for each flag"
                         ) from None
    require(isinstance(only_first, list) and set(only_first) <= values["axes"].keys(),
            f"{where}: only_first", only_first, "a list of axes")
    method = own.get("method", values["base"].get("method"))
    require(method is not None, where, own, "flags with a `method`")
    require(method in methods(), f"{where}: method", method, "one of " + ", ".join(methods()))
    known = method_flags(method)
    flags = {flag: value for flag, value in (values["base"] | own | overrides).items()
             if flag in known or flag in own or flag == "method"} | {"method": method}
    axes = {flag: listed[:1] if flag in only_first else listed
            for flag, listed in values["axes"].items()
            if flag in known and flag not in own and flag not in grid}
    rows = []
    for chosen in itertools.product(*axes.values()):
        axis = {flag: known[flag].parse(value, f"{where}: {flag} ")
                for flag, value in zip(axes, chosen, strict=True)}
        suffix = "".join(f"_{Path(value).stem}" if isinstance(value, str) else f"_{flag}_{value}"
                         for flag, value in axis.items())
        rows.append(StudySetting(name + suffix, flags | axis, {k: list(v) for k, v in grid.items()},
                                 extensions, of=name, axis=axis))
    return rows
