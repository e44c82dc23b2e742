"""The YAML file of a study (see study.py): which runs it asks for."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from fedrun.common.errors import InputError, is_component, one_line, require
from fedrun.common.old_names import renamed
from fedrun.common.perplexity import perplexity
from fedrun.config import RunConfig
from fedrun.flags import closest, resolve
from fedrun.unused import idle, refuse_unread

Point = tuple[tuple[str, float], ...]
"""A point on a setting's grid: ((flag, value), ...)."""

DEFAULTS: dict[str, Any] = {
    "name": None, "jobs": 1, "reference": None, "tune_seed": 0, "report_seeds": [],
    "prune": math.inf, "repeat": [], "extensions": 0, "grid": {}, "base": {}, "settings": None}


@dataclass
class StudySetting:
    """One row of the table: a method with its flags, and the grid on which it is tuned."""

    name: str
    flags: dict[str, Any]
    grid: dict[str, list[float]]
    extensions: int = 0
    tuned: dict[Point, float] = field(default_factory=dict)
    """Point -> loss on the first half of the validation split, in nats per token."""

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


@dataclass
class Study:
    """The content of a study's file, checked."""

    folder: Path
    jobs: int
    reference: str
    tune_seed: int
    report_seeds: list[int]
    prune: float
    always: list[str]
    """Names of the settings that are repeated whatever their tuned ratio is."""
    settings: dict[str, StudySetting]

    def config(self, setting: StudySetting, point: Point, seed: int) -> RunConfig:
        """The config of one run. ValueError for flags that its method does not have."""
        flags = setting.flags | dict(point) | {"seed": seed}
        suffix = "".join(f"_{name}_{value:g}" for name, value in point)
        return resolve(flags.pop("method"), flags | {
            "data_dir": self.folder / "runs", "run_name": f"{setting.name}{suffix}_seed_{seed}"})

    def tuned_ratio(self, setting: StudySetting) -> float:
        """The setting's perplexity at its best point divided by the reference's at its own, both
        with the tuning seed."""
        reference = self.settings[self.reference]
        return perplexity(setting.tuned[setting.best] - reference.tuned[reference.best])


def read(path: Path, results: Path, overrides: Mapping[str, Any]) -> Study:
    """The study in a YAML file; its folder will be in `results`.

    overrides: flags from the command line, for all runs; may include `jobs`.
    Raises ValueError, naming the file and the key, for wrong or unknown values.
    """
    require(path.is_file(), "study", path, "the path of a YAML file")
    try:
        given = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise InputError(f"study {path}: cannot be read as YAML: {one_line(error)}") from None
    require(isinstance(given, dict), "study", path, "a mapping with " + ", ".join(DEFAULTS))
    for key in given:
        if key not in DEFAULTS:
            raise InputError(f"study {path}: unknown key {key!r}{closest(str(key), DEFAULTS)}")
    refuse_unread("study", overrides)
    values = DEFAULTS | {"name": path.stem} | given
    overrides = dict(overrides)
    values["jobs"] = overrides.pop("jobs", values["jobs"])

    def number(key: str, kind: type[int] | type[float], lowest: float) -> Any:
        try:
            value = kind(values[key])
        except (TypeError, ValueError):
            value = math.nan
        require(value >= lowest, f"study {path}: {key}", values[key],
                f"{'an integer ' if kind is int else ''}>= {lowest:g}")
        return value

    for key, kind in (("settings", dict), ("base", dict), ("grid", dict), ("repeat", list),
                      ("report_seeds", list)):
        require(isinstance(values[key], kind), f"study {path}: {key}", values[key],
                "a mapping" if kind is dict else "a list")
    require(is_component(str(values["name"])), f"study {path}: name", values["name"],
            "a folder name without slashes, not . or ..")
    require(bool(values["settings"]), f"study {path}: settings", values["settings"],
            "a mapping with at least one name and its flags")
    require(values["reference"] in values["settings"], f"study {path}: reference",
            values["reference"], "one of " + ", ".join(values["settings"]))
    for name in values["repeat"]:
        require(name in values["settings"], f"study {path}: repeat", name,
                "one of " + ", ".join(values["settings"]))
    refuse_unread("study", values["base"], f"study {path}: base: ")
    settings = {}
    for name, own in values["settings"].items():
        where = f"study {path}: settings.{name}"
        require(isinstance(own, dict), where, own, "flags with a `method`")
        refuse_unread("study", own, where + ": ")
        flags = renamed(values["base"] | own) | overrides
        require("method" in flags, where, own, "flags with a `method`")
        grid = flags.pop("grid", values["grid"])
        try:
            grid = {flag: [float(v) for v in grid_values] for flag, grid_values in grid.items()}
        except (AttributeError, TypeError, ValueError):
            raise InputError(f"{where}: grid {grid}: must be a list of numbers for each flag"
                             ) from None
        settings[name] = StudySetting(name, flags, grid, number("extensions", int, 0))
    study = Study(results / str(values["name"]), number("jobs", int, 1), values["reference"],
                  number("tune_seed", int, 0), [int(s) for s in values["report_seeds"]],
                  number("prune", float, 0), list(values["repeat"]), settings)
    for setting in settings.values():
        study.config(setting, setting.points()[0], 0)  # reports wrong flags before anything runs
    _refuse_gridded(path, study, overrides)
    return study


def _refuse_gridded(path: Path, study: Study, overrides: Collection[str]) -> None:
    """ValueError for a flag from the command line that every setting's grid overrides."""
    for flag in overrides:
        if all(flag in setting.grid for setting in study.settings.values()):
            raise InputError(f"--{flag}: every setting of {path} has a grid for it, which "
                             "overrides the flag; change the grid in the file")


def notes(study: Study, overrides: Collection[str]) -> list[str]:
    """A warning for each flag from the command line that the grid of some setting overrides, or
    that has no effect in any setting."""
    found = []
    for flag in overrides:
        if gridded := [s.name for s in study.settings.values() if flag in s.grid]:
            found.append(f"--{flag} does not apply to {', '.join(gridded)}, tuned on a grid of it")
    warnings = [idle(study.config(s, s.points()[0], 0)) for s in study.settings.values()]
    return found + [warnings[0][flag] for flag in overrides
                    if all(flag in of_setting for of_setting in warnings)]
