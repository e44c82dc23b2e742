"""Turns the fields of dataclasses into flags and YAML keys, and these into the config of a run.

A field's type says what its flag accepts, the docstring under it is the help text. Later sources
override earlier ones: field default < configs/methods/<method>.yaml < --config < flags.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import datetime
import difflib
import functools
import inspect
import os
import textwrap
import types
import typing
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

import yaml

from fedrun.common.errors import InputError, require
from fedrun.common.old_names import NEW_NAMES, moved, renamed
from fedrun.config import CentralConfig, FederatedConfig, RunConfig
from fedrun.data.site_settings import DEALT_BY_SITES, refuse_dealt, require_fit
from fedrun.data.sites import read_sites
from fedrun.model.config import ModelConfig, ModelShape, TransformersShape, recorded_shape
from fedrun.strategies import STRATEGIES, Strategy, strategy_class
from fedrun.strategies.plugins import load_installed

_TEXT = (str, os.PathLike, int, float, datetime.date)
"""What is given as text: in YAML a name may look like a number or a date."""


@dataclass(frozen=True)
class Flag:
    """A field of a dataclass as a flag."""

    name: str
    kind: type
    choices: tuple[str, ...]
    optional: bool
    default: Any
    help: str

    def parse(self, value: Any, where: str) -> Any:
        """The value of the field's type for a flag's text or a YAML value.

        where: what stands before the value in the message of the ValueError: "--lr ".
        """
        if self.optional and (value is None or value == "none"):
            return None
        if self.kind is str and not isinstance(value, _TEXT):
            raise InputError(f"{where}is of type {type(value).__name__}; must be text")
        try:
            if self.kind is bool:
                return {"true": True, "false": False}[str(value).lower()]
            if self.choices:
                return {c: c for c in self.choices}[str(value)]
            if self.kind is int:
                number = float(value)
                whole = {True: int(number)}[number.is_integer() and not isinstance(value, bool)]
                with suppress(ValueError):  # for a text such as 1e3
                    whole = int(value)  # exact, which a float above 2**53 is not
                return whole
            return self.kind(value)
        except (KeyError, ValueError, TypeError, OverflowError):
            accepted = " or ".join(self.choices) or {bool: "true or false", int: "an integer",
                                                     float: "a number"}.get(self.kind, "text")
            raise InputError(f"{where}{value}: must be {accepted}") from None


def flags_of(cls: type) -> dict[str, Flag]:
    """The flags of a dataclass, by name: one for each field but `method` and nested dataclasses."""
    helps: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if dataclasses.is_dataclass(base):
            helps |= _docstrings(base)
    hints = typing.get_type_hints(cls)
    found = {}
    for f in dataclasses.fields(cls):
        hint = hints[f.name]
        if f.name == "method" or dataclasses.is_dataclass(hint):
            continue
        args = typing.get_args(hint)
        optional = isinstance(hint, types.UnionType) and type(None) in args
        choices = args if typing.get_origin(hint) is Literal else ()
        kind = str if choices else next(a for a in args if a is not type(None)) if args else hint
        require(kind in (str, int, float, bool, Path) and f.default is not dataclasses.MISSING,
                f"{cls.__name__}.{f.name}", hint,
                "an int, float, bool, str or Literal, perhaps | None, with a default")
        found[f.name] = Flag(f.name, kind, choices, optional, f.default,
                             f.metadata.get("help") or helps.get(f.name, ""))
    return found


@functools.cache  # a study resolves hundreds of configs
def _docstrings(cls: type) -> dict[str, str]:
    """Field name -> the string literal below the field in the class body; {} without a source file,
    as in a notebook."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    except (OSError, TypeError):
        return {}
    assert isinstance(tree, ast.ClassDef)
    return {a.target.id: " ".join(s.value.value.split())
            for a, s in zip(tree.body, tree.body[1:], strict=False)
            if isinstance(a, ast.AnnAssign) and isinstance(a.target, ast.Name)
            and isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant)
            and isinstance(s.value.value, str)}


# ---- resolving defaults, files and flags to a config --------------------------------------------

def config_classes(method: str) -> tuple[type[RunConfig], type[Strategy] | None]:
    """The dataclasses whose fields are the method's flags."""
    if method == "central":
        return CentralConfig, None
    return FederatedConfig, strategy_class(method)


def method_flags(method: str) -> dict[str, Flag]:
    """All flags of a method, with the defaults of its YAML file where it has one."""
    classes: Any = config_classes(method)  # mypy takes classes for values without a hash
    return _method_flags(method, *classes)


@functools.cache
def _method_flags(method: str, run_class: Any, strategy: Any) -> dict[str, Flag]:
    """For these two classes: a notebook may define a method's class again."""
    known, own = flags_of(run_class), flags_of(strategy) if strategy else {}
    if taken := known.keys() & own.keys():
        raise InputError(f"the method {method} has a field {min(taken)!r}, which is a flag of "
                         "every run; give it another name")
    known |= own
    defaults = _read_yaml(configs_dir() / "methods" / f"{method}.yaml", optional=True)
    unknown = set(defaults) - set(known)
    assert not unknown, f"configs/methods/{method}.yaml sets {unknown}"
    return {name: dataclasses.replace(flag, default=flag.parse(defaults[name], f"{name}: "))
            if name in defaults else flag for name, flag in known.items()}


def resolve(method: str, flags: Mapping[str, Any]) -> RunConfig:
    """The config of a run, from the flags that were given (name -> value).

    Raises ValueError for wrong or unknown flags and keys, naming the flag, or the file and the key.
    """
    run_class, strategy = config_classes(method)
    known = method_flags(method)
    for name in flags:
        if name not in known:
            raise InputError(moved(name, flags[name])
                             or f"unknown flag --{name}{closest(name, known)} for {method}")
    values = {name: flag.default for name, flag in known.items()}
    if "config" in flags:
        values["config"] = flags["config"]
    path, chosen = file_settings(str(values["config"]))
    model = chosen.pop("model", {})
    for name, value in chosen.items():
        if name == "config" or name not in known:
            hint = f", now {NEW_NAMES[name]}" if name in NEW_NAMES else closest(name, known)
            raise InputError(f"--config {path}: unknown key {name!r}{hint}")
        values[name] = known[name].parse(value, f"--config {path}: {name} ")
    values |= {name: known[name].parse(value, f"--{name} ") for name, value in flags.items()}
    given = flags.keys() | chosen.keys()
    sites = read_sites(values["sites"]) if values.get("sites") else None
    if sites is not None and "num_clients" not in given:
        values["num_clients"] = sites.num_clients
    if values.get("dp", "none") != "none" and "weighting" not in given and "weighting" in values:
        values["weighting"] = "uniform"  # the only one that goes with it

    shapes = flags_of(ModelConfig)
    if not isinstance(model, dict) or (set(model) - set(shapes) and set(model) != {"transformers"}):
        raise InputError(f"--config {path}: the section `model` accepts " + ", ".join(shapes)
                         + "; or transformers alone")
    try:
        shape: ModelShape = TransformersShape.of_file(model["transformers"]) \
            if "transformers" in model else ModelConfig(
                **{k: shapes[k].parse(v, f"model.{k} ") for k, v in model.items()})
    except ValueError as error:
        raise InputError(f"--config {path}: {error}") from None
    rest: dict[str, Any] = {}
    if strategy:
        rest["strategy"] = strategy(
            **{f.name: values.pop(f.name) for f in dataclasses.fields(strategy)})
    config = run_class(method=method, model=shape, **rest, **values)
    if sites is not None:
        for name in DEALT_BY_SITES:  # the default too, where it was asked for
            refuse_dealt(config, name, name in given)
        require_fit(config, sites)
    return config


def config_of(values: Mapping[str, Any]) -> RunConfig:
    """The inverse of `RunConfig.to_dict`, also after a way through JSON: all settings of a run, and
    nothing looked up in files.

    Raises what the classes raise for wrong values, and KeyError for an unknown method or a setting
    that is missing.
    """
    run_class, strategy = config_classes(values["method"])
    known = method_flags(values["method"])
    read: dict[str, Any] = {
        name: Path(value) if name in known and known[name].kind is Path and value is not None
        else value for name, value in values.items()} | {"model": recorded_shape(values["model"])}
    if strategy:
        read["strategy"] = strategy(**{f.name: read[f.name] for f in dataclasses.fields(strategy)})
    return run_class(**{f.name: read[f.name] for f in dataclasses.fields(run_class)})


def configs_dir() -> Path:
    """configs/ in the checkout, or its copy in an installed wheel."""
    installed = Path(__file__).parent / "configs"
    return installed if installed.is_dir() else Path(__file__).parent.parent / "configs"


def file_settings(config: str) -> tuple[Path, dict[str, Any]]:
    """The YAML file behind --config, and its settings as they are written there."""
    path = find_config(config)
    return path, renamed(_read_yaml(path))


def find_config(config: str) -> Path:
    """The YAML file behind --config: a preset's name, or a path that ends in .yaml or .yml."""
    if config.endswith((".yaml", ".yml")):
        path = Path(config).expanduser()
        require(path.is_file(), "--config", config, "an existing file, or a preset's name")
        return path
    presets = {p.stem: p for p in sorted((configs_dir() / "models").glob("*.yaml"))}
    if config not in presets:
        raise InputError(f"--config {config}: unknown preset{closest(config, presets)}; must be "
                         f"{', '.join(presets)} or the path of a .yaml file")
    return presets[config]


def closest(name: str, known: typing.Iterable[str]) -> str:
    """', did you mean NAME?' if a known name is similar, else an empty string."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f", did you mean {near[0]}?" if near else ""


def _read_yaml(path: Path, optional: bool = False) -> dict[str, Any]:
    if optional and not path.exists():
        return {}
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise InputError(f"--config {path}: cannot be read as YAML: "
                         + " ".join(str(error).split())) from None
    if content is not None and not isinstance(content, dict):
        raise InputError(f"--config {path}: must be a mapping of settings")
    return content or {}


# ---- parsing ------------------------------------------------------------------------------------

def methods() -> dict[str, str]:
    """Command -> what it does, in one line; those of plugins last."""
    load_installed()
    return {"central": "centralised training, the baseline: all the data in one process"} | {
        name: (cls.__doc__ or "").split("\n")[0] for name, cls in STRATEGIES.items()}


def with_underscores(argument: str) -> str:
    """--num-clients=4 as --num_clients=4: flags may be spelled either way."""
    if not argument.startswith("--"):
        return argument
    flag, equals, value = argument.partition("=")
    return "--" + flag[2:].replace("-", "_") + equals + value


class Parser(argparse.ArgumentParser):
    """argparse with its errors raised as InputError, one line each."""

    def error(self, message: str) -> NoReturn:
        rest = message.removeprefix("unrecognized arguments: ")
        words = rest.split()
        if message.startswith("unrecognized") and words and not words[0].startswith("-"):
            message = (f"unexpected argument {rest.partition(' --')[0]!r} ({self.prog} --help "
                       "lists what it accepts)")
        elif message.startswith("unrecognized") and words:
            known = [s for a in self._actions for s in a.option_strings
                     if not isinstance(a, _OldFlag)]
            message = (f"unknown flag {words[0]}{closest(words[0].split('=')[0], known)} "
                       f"({self.prog} --help lists them)")
        raise InputError(message.removeprefix("argument "))


class _OldFlag(argparse.Action):
    """A flag's former name: an error that gives today's name."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace,
                 values: Any, option_string: str | None = None) -> None:
        raise InputError(moved(self.dest, values))


def add_flags(parser: argparse._ActionsContainer, flags: Mapping[str, Flag],
              hidden: bool = False) -> None:
    """Add the flags to a parser, with their defaults in the help. A flag that is not given is None
    in the parsed arguments.

    hidden: leave them out of the help, for a command that only passes them on.
    """
    for name, flag in flags.items():
        text = flag.help.replace("%", "%%")
        shown = "none" if flag.default is None else flag.default
        extra: dict[str, Any] = {"metavar": "|".join(flag.choices) or {
            int: "N", float: "X", bool: "true|false"}.get(flag.kind, "TEXT")}
        if flag.kind is bool:
            extra |= {"nargs": "?", "const": "true"}
        parser.add_argument(f"--{name}", default=None, **extra,
                            help=argparse.SUPPRESS if hidden else f"{text} (default: {shown})")
    for old, new in NEW_NAMES.items():
        if new in flags:
            parser.add_argument(f"--{old}", action=_OldFlag, nargs="?", default=argparse.SUPPRESS,
                                help=argparse.SUPPRESS)
