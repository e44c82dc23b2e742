"""The file of a study (see study.py): which runs it asks for."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from fedrun.common.errors import InputError, is_component, one_line, require
from fedrun.config import RunConfig
from fedrun.flags import closest, resolve
from fedrun.old_names import renamed
from fedrun.unused import idle, refuse_unread

Point = tuple[tuple[str, float], ...]
"""A place on a setting's grid: ((flag, value), ...)."""

DEFAULTS: dict[str, Any] = {
    "name": None, "jobs": 1, "reference": None, "tune_seed": 0, "report_seeds": [],
    "prune": math.inf, "repeat": [], "extensions": 0, "grid": {}, "base": {}, "settings": None}


@dataclass
class StudySetting:
    """One line of the table: a method with its flags, and the grid that it is tuned on."""

    name: str
    flags: dict[str, Any]
    grid: dict[str, list[float]]
    extensions: int = 0
    tuned: dict[Point, float] = field(default_factory=dict)
    """Loss on the first half of the validation split, in nats a token."""

    def points(self) -> list[Point]:
        return [tuple(zip(self.grid, values, strict=True))
                for values in itertools.product(*self.grid.values())]

    @property
    def best(self) -> Point:
        return min(self.tuned, key=lambda point: (self.tuned[point], point))

    def extend(self) -> bool:
        """Grow the grid by one value wherever the best one lies at an edge; whether it grew."""
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
    """What the YAML file asks for."""

    folder: Path
    jobs: int
    reference: str
    tune_seed: int
    report_seeds: list[int]
    prune: float
    always: list[str]
    """Settings that are repeated whatever their tuned ratio."""
    settings: dict[str, StudySetting]

    def config(self, setting: StudySetting, point: Point, seed: int) -> RunConfig:
        """The config of one run. ValueError for flags that its method does not take."""
        flags = setting.flags | dict(point) | {"seed": seed}
        place = "".join(f"_{name}_{value:g}" for name, value in point)
        return resolve(flags.pop("method"), flags | {
            "data_dir": self.folder / "runs", "run_name": f"{setting.name}{place}_seed_{seed}",
            "checkpoint_freq": None})


def read(path: Path, results: Path, overrides: Mapping[str, Any]) -> Study:
    """The study of a YAML file. ValueError naming the file and its key for what is wrong.

    overrides: flags of all runs from the command line, `jobs` among them where it was given.
    """
    require(path.is_file(), "study", path, "the path of a YAML file")
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise InputError(f"study {path}: cannot be read as YAML: {one_line(error)}") from None
    require(isinstance(found, dict), "study", path, "a mapping with " + ", ".join(DEFAULTS))
    for key in found:
        if key not in DEFAULTS:
            raise InputError(f"study {path}: unknown key {key!r}{closest(str(key), DEFAULTS)}")
    refuse_unread("study", overrides)
    values = DEFAULTS | {"name": path.stem} | found
    overrides = dict(overrides)
    values["jobs"] = overrides.pop("jobs", values["jobs"])

    def number(key: str, kind: type[int] | type[float], lowest: float) -> Any:
        try:
            value = kind(values[key])
        except (TypeError, ValueError):
            value = math.nan
        require(value >= lowest, f"study {path}: {key}", values[key],
                f"a {'whole ' if kind is int else ''}number of at least {lowest:g}")
        return value

    for key, kind in (("settings", dict), ("base", dict), ("grid", dict), ("repeat", list),
                      ("report_seeds", list)):
        require(isinstance(values[key], kind), f"study {path}: {key}", values[key],
                "a mapping" if kind is dict else "a list")
    require(is_component(str(values["name"])), f"study {path}: name", values["name"],
            "a folder's name without slashes, not . or ..")
    require(bool(values["settings"]), f"study {path}: settings", values["settings"],
            "at least one name with its flags")
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
            raise InputError(f"{where}: grid {grid}: accepted is a list of numbers for each "
                             "flag") from None
        settings[name] = StudySetting(name, flags, grid, number("extensions", int, 0))
    study = Study(results / str(values["name"]), number("jobs", int, 1), values["reference"],
                  number("tune_seed", int, 0), [int(s) for s in values["report_seeds"]],
                  number("prune", float, 0), list(values["repeat"]), settings)
    for setting in settings.values():
        study.config(setting, setting.points()[0], 0)  # a wrong flag is told before anything runs
    _refuse_gridded(path, study, overrides)
    return study


def _refuse_gridded(path: Path, study: Study, overrides: Collection[str]) -> None:
    """ValueError for a flag from the command line that the grid of every setting replaces."""
    for flag in overrides:
        if all(flag in setting.grid for setting in study.settings.values()):
            raise InputError(f"--{flag}: every setting of {path} has a grid of it, which replaces "
                             "it; change the grid in the file")


def notes(study: Study, overrides: Collection[str]) -> list[str]:
    """What flags from the command line do not do, each in a line: in settings whose grid replaces
    them, and those that are idle in every setting."""
    found = []
    for flag in overrides:
        if gridded := [s.name for s in study.settings.values() if flag in s.grid]:
            found.append(f"--{flag} is not that of {', '.join(gridded)}, which have a grid of it")
    lines = [idle(study.config(s, s.points()[0], 0)) for s in study.settings.values()]
    return found + [lines[0][flag] for flag in overrides if all(flag in line for line in lines)]
