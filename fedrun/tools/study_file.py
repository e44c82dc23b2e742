"""The YAML file of a study (see study.py): which runs it asks for."""

from __future__ import annotations

import functools
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from fedrun.common.errors import InputError, is_component, one_line, require
from fedrun.common.old_names import renamed
from fedrun.common.perplexity import perplexity
from fedrun.config import RunConfig
from fedrun.flags import closest, method_flags, resolve
from fedrun.tools.study_setting import Point, StudySetting, rows_of
from fedrun.unused import idle, refuse_unread

if TYPE_CHECKING:
    from fedrun.model.pretrained import Pretrained

DEFAULTS: dict[str, Any] = {
    "name": None, "jobs": 1, "workers": 1, "reference": None, "tune_seed": 0, "report_seeds": [],
    "prune": math.inf, "repeat": [], "extensions": 0, "grid": {}, "axes": {}, "scales": {},
    "published": {}, "figures": [], "base": {}, "settings": None}
OPTIONS = ("jobs", "workers", "name", "report_seeds", "axes", "scale", "settings")
"""What the command line says of the study itself, not of its runs."""
FIGURES = ("perplexities", "deltas", "federated-deltas", "bytes")
"""The kinds of `fedrun plot`."""
OF_A_TABLE = {"bytes"}
"""Those that are drawn from the table of a study, not from its runs."""


@dataclass
class Study:
    """The content of a study's file, checked."""

    folder: Path
    jobs: int
    """Runs of one process at the same time."""
    workers: int
    """Processes that train the clients of one federated run."""
    references: list[str]
    """Names in the file: there is a row of each for each value of its axes. Of several, settings
    are compared to the one that is better tuned."""
    tune_seed: int
    report_seeds: list[int]
    prune: float
    always: list[str]
    """Names, of rows or of settings in the file, that are repeated whatever their tuned ratio."""
    settings: dict[str, StudySetting]
    published: dict[str, str]
    """Row -> the final perplexity that others have published; empty if these runs are not theirs,
    since another scale was chosen, other seeds or values of an axis, or a flag given that decides
    results."""
    figures: list[list[str]]
    """What to plot of the runs: the words behind `fedrun plot`."""

    def config(self, setting: StudySetting, point: Point, seed: int) -> RunConfig:
        """The config of one run; with the shape and tokenizer of its --init_from. ValueError for
        flags that its method does not have, or if there is no such model."""
        flags = setting.flags | dict(point) | {"seed": seed}
        suffix = "".join(f"_{name}_{value:g}" for name, value in point)
        config = resolve(flags.pop("method"), flags | {
            "data_dir": self.folder / "runs", "run_name": f"{setting.name}{suffix}_seed_{seed}"})
        if config.init_from is not None:  # as the run's folder will record it
            from fedrun.experiment import with_pretrained  # imports torch
            config = with_pretrained(config, _pretrained(config.init_from, config.cache_dir))
        return config

    def to_dict(self) -> dict[str, Any]:
        """What the file and the command line lead to, for YAML: of each row the grid, and all
        settings at its first point with the tuning seed."""
        return {"folder": str(self.folder), "jobs": self.jobs, "workers": self.workers,
                "device": self.device, "reference": self.references, "tune_seed": self.tune_seed,
                "report_seeds": self.report_seeds, "prune": self.prune, "repeat": self.always,
                "figures": self.figures, "settings": {s.name: {"grid": s.grid} | self.config(
                    s, s.points()[0], self.tune_seed).to_dict() for s in self.settings.values()}}

    @property
    def device(self) -> str:
        """`cpu` if no run may take a GPU; else `auto`."""
        configs = [self.config(s, s.points()[0], 0) for s in self.settings.values()]
        return "cpu" if all(config.device == "cpu" for config in configs) else "auto"

    def reference_of(self, setting: StudySetting) -> StudySetting:
        """The row of the reference at the setting's values of the axes; the first, for axes that
        the setting's method does not have. Of several references, once all are tuned, the one with
        the lowest loss. ValueError if there is none."""
        rows: dict[str, StudySetting] = {}
        for row in self.settings.values():
            if row.of in self.references and all(
                    setting.flags.get(flag, value) == value for flag, value in row.axis.items()):
                rows.setdefault(row.of, row)
        if not rows:
            raise InputError(f"study: {setting.name}: {' or '.join(self.references)} is not run at "
                             "the same values of the axes; there is nothing to compare it to")
        found = list(rows.values())
        return min(found, key=lambda row: row.tuned[row.best]) if all(
            row.tuned for row in found) else found[0]

    def tuned_ratio(self, setting: StudySetting) -> float:
        """The setting's perplexity at its best point divided by the reference's at its own, both
        with the tuning seed."""
        reference = self.reference_of(setting)
        return perplexity(setting.tuned[setting.best] - reference.tuned[reference.best])


def read(path: Path, results: Path, overrides: Mapping[str, Any]) -> Study:
    """The study in a YAML file; its folder will be in `results`.

    overrides: from the command line: flags, for all runs whose method has them, and the OPTIONS of
    the study itself. Raises ValueError, naming the file and the key, or the flag, for wrong or
    unknown values and for flags without an effect.
    """
    require(path.is_file(), "study", path, "the path of a YAML file")
    try:
        given = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise InputError(f"study {path}: cannot be read as YAML: {one_line(error)}") from None
    require(isinstance(given, dict), "study", path, "a mapping with " + ", ".join(DEFAULTS))
    flags = {name: value for name, value in overrides.items() if name not in OPTIONS}
    refuse_unread("study", flags)
    options = {k: v for k, v in overrides.items() if k in OPTIONS}
    values = _merged(path, given, options)
    where = f"study {path}: "

    def number(key: str, kind: type[int] | type[float], lowest: float) -> Any:
        try:
            value = kind(values[key])
        except (TypeError, ValueError):
            value = math.nan
        require(value >= lowest, f"{where}{key}", values[key],
                f"{'an integer ' if kind is int else ''}>= {lowest:g}")
        return value

    require(is_component(str(values["name"])), f"{where}name", values["name"],
            "a folder name without slashes, not . or ..")
    require(bool(values["settings"]), f"{where}settings", values["settings"],
            "a mapping with at least one name and its flags")
    references = values["reference"] if isinstance(values["reference"], list) else [
        values["reference"]]
    for name in references or [None]:
        require(isinstance(name, str) and name in values["settings"], f"{where}reference", name,
                "one of " + ", ".join(values["settings"]) + ", or a list of them")
    refuse_unread("study", values["base"], f"{where}base: ")
    expanded: list[StudySetting] = []
    for name, own in values["settings"].items():
        expanded += rows_of(f"{where}settings.{name}", str(name), own, values, flags,
                            number("extensions", int, 0))
    settings: dict[str, StudySetting] = {}
    for setting in expanded:
        require(setting.name not in settings, f"{where}settings.{setting.of}", setting.name,
                "another name, or fewer values of an axis: two rows of the table have this one")
        settings[setting.name] = setting
    for name in values["repeat"]:
        require(name in settings or name in values["settings"], f"{where}repeat", name,
                "one of " + ", ".join(values["settings"]))
    figures = [str(line).split() for line in values["figures"]]
    for words in figures:
        require(bool(words) and words[0] in FIGURES, f"{where}figures", " ".join(words),
                "one of " + ", ".join(FIGURES) + ", followed by flags of `fedrun plot`")
    study = Study(results / str(values["name"]), number("jobs", int, 1), number("workers", int, 1),
                  references, number("tune_seed", int, 0),
                  _seeds(f"{where}report_seeds", values), number("prune", float, 0),
                  list(values["repeat"]), settings,
                  {} if flags.keys() - RunConfig.not_in_results or _asks_for_others(
                      values, _merged(path, given, {})) else
                  {str(row): str(figure) for row, figure in values["published"].items()}, figures)
    for setting in settings.values():
        study.config(setting, setting.points()[0], 0)  # reports wrong flags before anything runs
        study.reference_of(setting)
    for flag in values["axes"]:
        require(any(flag in s.axis for s in expanded), f"{where}axes", flag,
                "a flag of a setting that does not set it itself")
    for flag in values["base"]:
        _refuse_unknown(f"{where}base: {flag}", flag, settings.values())
    _refuse_without_effect(path, study, flags)
    return study


@functools.cache  # read once for all runs of a study
def _pretrained(name: str, cache_dir: Path) -> Pretrained:
    from fedrun.model.pretrained import find_pretrained
    return find_pretrained(name, "--init_from", cache_dir)


def _merged(path: Path, given: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """The content of a study's file with its defaults, the chosen scale and the options."""
    for key in given:
        if key not in DEFAULTS:
            raise InputError(f"study {path}: unknown key {key!r}{closest(str(key), DEFAULTS)}")
    values = DEFAULTS | {"name": path.stem} | dict(given)
    _check_kinds(f"study {path}: ", values)
    if "scale" in options:
        scale = options["scale"]
        require(scale in values["scales"], "--scale", scale,
                f"one of those under `scales` in {path}: {', '.join(values['scales']) or 'none'}")
        of_scale = values["scales"][scale]
        require(isinstance(of_scale, dict) and of_scale.keys() <= {"base", "axes", "grid"},
                f"study {path}: scales.{scale}", of_scale, "a mapping with base, axes, grid")
        _check_kinds(f"study {path}: scales.{scale}: ", of_scale)
        values |= {"name": f"{values['name']}_{scale}", "published": {}}
        values |= {key: values[key] | content for key, content in of_scale.items()}
    if "settings" in options:
        values |= _only(options["settings"].split(","), values)
    axes = values["axes"] | _given_axes(options.get("axes", ()))
    for flag, listed in axes.items():
        require(isinstance(listed, list) and bool(listed), f"study {path}: axes.{flag}", listed,
                "a list of values")
    if "seed" in axes:
        seeds = axes.pop("seed")
        require("report_seeds" not in given or "seed" not in given.get("axes", {}),
                f"study {path}: report_seeds", values["report_seeds"],
                "left out beside an axis `seed`")
        values |= {"report_seeds": seeds} | ({} if "tune_seed" in given else {
            "tune_seed": seeds[0]})
    if "report_seeds" in options:
        require("seed" not in _given_axes(options.get("axes", ())), "--report_seeds",
                options["report_seeds"], "left out beside --axes seed=...")
        values["report_seeds"] = options["report_seeds"].split(",")
    values |= {key: options[key] for key in ("jobs", "workers", "name") if key in options}
    values |= {"base": renamed(values["base"]), "axes": renamed(axes)}
    return values


def _only(names: Sequence[str], values: Mapping[str, Any]) -> dict[str, Any]:
    """What --settings changes in a study's file: these settings alone, and what names them."""
    known = values["settings"] or {}
    for name in names:
        require(name in known, "--settings", name, "one of " + ", ".join(known))
    several = isinstance(values["reference"], list)
    references = values["reference"] if several else [values["reference"]]
    require(any(name in names for name in references), "--settings", ",".join(names),
            f"names with {' or '.join(map(str, references))} among them, to which others are "
            "compared")
    return {"settings": {name: own for name, own in known.items() if name in names},
            "repeat": [name for name in values["repeat"] if name in names],
            "reference": [name for name in values["reference"] if name in names] if several
            else values["reference"]}


def _given_axes(texts: Sequence[str]) -> dict[str, list[str]]:
    """What --axes says: flag -> values."""
    axes: dict[str, list[str]] = {}
    for text in texts:
        flag, equals, listed = text.partition("=")
        require(bool(equals and listed), "--axes", text, "FLAG=VALUE,VALUE")
        name = flag.replace("-", "_")
        require(name not in axes, "--axes", text, f"the only --axes for {name}, with all values")
        axes[name] = listed.split(",")
    return axes


def _asks_for_others(values: Mapping[str, Any], in_file: Mapping[str, Any]) -> bool:
    """Whether the command line asks for other seeds than the file, or for values of an axis that
    the file does not have."""
    def shown(listed: Sequence[Any]) -> set[str]:
        return {str(value) for value in listed}

    return shown(values["report_seeds"]) != shown(in_file["report_seeds"]) or any(
        not shown(listed) <= shown(in_file["axes"].get(flag, ()))
        for flag, listed in values["axes"].items())


def _check_kinds(where: str, values: Mapping[str, Any]) -> None:
    for key, default in DEFAULTS.items():
        kind = dict if key == "settings" else type(default)
        if kind in (dict, list) and key in values:
            require(isinstance(values[key], kind), where + key, values[key],
                    "a mapping" if kind is dict else "a list")


def _seeds(where: str, values: Mapping[str, Any]) -> list[int]:
    listed = values["report_seeds"]
    try:
        seeds = [int(seed) for seed in listed]
        right = len(seeds) == len({*seeds}) and all(
            float(given) == seed for given, seed in zip(listed, seeds, strict=True))
    except (TypeError, ValueError, OverflowError):
        right = False
    require(right, where, listed, "different integers")
    return seeds


def _refuse_unknown(what: str, flag: str, settings: Collection[StudySetting]) -> None:
    """ValueError for a flag that no setting's method has."""
    known = {name for setting in settings for name in method_flags(setting.flags["method"])}
    if flag not in known | {"method"}:
        raise InputError(f"{what}: no setting of the study has this flag{closest(flag, known)}")


def _refuse_without_effect(path: Path, study: Study, overrides: Collection[str]) -> None:
    """ValueError for a flag from the command line that has no effect in any setting."""
    settings = study.settings.values()
    for flag in overrides:
        _refuse_unknown(f"--{flag}", flag, settings)
        if any(flag in setting.axis for setting in settings):
            raise InputError(f"--{flag}: an axis of {path}; --axes {flag}=VALUE,VALUE replaces its "
                             "values")
        having = [s for s in settings if flag in method_flags(s.flags["method"])]
        if all(flag in setting.grid for setting in having):
            raise InputError(f"--{flag}: every setting of {path} has a grid for it, which "
                             "overrides the flag; change the grid in the file")
        reached = [s for s in settings if flag in s.flags and flag not in s.grid]
        why = [idle(study.config(s, s.points()[0], 0)).get(flag) for s in reached]
        if all(why):
            raise InputError(f"{why[0]} in any setting of {path} that it reaches")


def notes(study: Study, overrides: Collection[str]) -> list[str]:
    """A warning for each flag from the command line that the grid of some setting overrides."""
    gridded = {flag: [s.name for s in study.settings.values() if flag in s.grid]
               for flag in overrides}
    return [f"--{flag} does not apply to {', '.join(names)}, tuned on a grid of it"
            for flag, names in gridded.items() if names]
