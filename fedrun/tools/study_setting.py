"""A setting of a study (see study.py): a row of its table, or one for each combination of axes."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedrun.common.errors import require
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
    whole: frozenset[str] = frozenset()
    """Flags of the grid that are integers."""

    def points(self) -> list[Point]:
        """All points of the grid."""
        return [tuple(zip(self.grid, values, strict=True))
                for values in itertools.product(*self.grid.values())]

    @property
    def best(self) -> Point:
        """The point with the lowest loss."""
        return min(self.tuned, key=lambda point: (self.tuned[point], point))

    def extend(self, accepts: Callable[[Point], bool] = lambda _: True) -> bool:
        """Add a value to each axis of the grid on whose edge the best point lies, at most
        `extensions` times; return whether the grid grew. From 0 there is no way on, nor to where
        `accepts` is false of the best point with the new value."""
        if self.extensions == 0 or not math.isfinite(self.tuned[self.best]):
            return False
        grew = False
        for name, value in self.best:
            values = sorted(self.grid[name])
            if len(values) < 2 or values[0] < value < values[-1]:
                continue
            if values[0] <= 0:
                continue
            factor = values[1] / values[0]
            new = value / factor if value == values[0] else value * factor
            if name in self.whole:
                new = float(round(new))
            if new not in values and accepts(tuple((dict(self.best) | {name: new}).items())):
                self.grid[name].append(new)
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
        right = all(listed and len(listed) == len({*listed}) and all(map(math.isfinite, listed))
                    for listed in grid.values())
    except (AttributeError, TypeError, ValueError):
        right = False
    require(right, f"{where}: grid", grid, "a list of different numbers for each flag")
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
    parsed = {flag: [known[flag].parse(value, f"{where}: {flag} ") for value in listed]
              for flag, listed in axes.items()}
    whole = frozenset(flag for flag in grid if flag in known and known[flag].kind is int)
    suffixes = {flag: _suffixes(flag, listed) for flag, listed in parsed.items()}
    rows = []
    for chosen in itertools.product(*parsed.values()):
        axis = dict(zip(parsed, chosen, strict=True))
        suffix = "".join(suffixes[flag][value] for flag, value in axis.items())
        rows.append(StudySetting(name + suffix, flags | axis, {k: list(v) for k, v in grid.items()},
                                 extensions, of=name, axis=axis, whole=whole))
    return rows


def _suffixes(flag: str, values: Iterable[Any]) -> dict[Any, str]:
    """What the values of an axis add to a row's name: of texts, as of files, the last part without
    its extension, or all of it where that is not enough to tell them apart."""
    different = {*values}
    short = {value: f"_{Path(value).stem}" if isinstance(value, str) else f"_{flag}_{value}"
             for value in different}
    if len({*short.values()}) == len(different):
        return short
    return {value: "_" + re.sub(r"[^\w.,=+*-]+", "_", str(value)).strip("_")
            for value in different}
