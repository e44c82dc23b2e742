"""Reads run folders for the figures and the report.

Folders of this project describe themselves in config.json. Folders of the original study have none:
their names give method, config and seed, `central_config_{config}_seed_{seed}` and
`federated_config_{config}_lu_{lu}_seed_{seed}`, and the rest is that study's defaults. Needs no
torch, so that figures of a cluster's runs can be made on a laptop.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from fedrun.common.errors import InputError, naming
from fedrun.common.files import DamagedFile, Kind, number, read_json, whole
from fedrun.common.old_names import renamed
from fedrun.common.perplexity import perplexity
from fedrun.common.terminal import shortened, visible
from fedrun.config import FederatedConfig
from fedrun.records.run_files import MARK
from fedrun.records.schema import read_field

Axis = Literal["tokens", "steps", "rounds", "seconds", "bytes"]
AXES: tuple[Axis, ...] = get_args(Axis)
Measure = Literal["val_ppl", "train_ppl"]

NAME = re.compile(r"(?P<method>\w+?)_config_(?P<config>.+?)(_lu_(?P<lu>\d+))?_seed_(?P<seed>\d+)")

# The study's settings, which its folders do not record.
STUDY_CLIENTS, STUDY_BATCH, STUDY_CENTRAL_BATCH, STUDY_LENGTH = 4, 4, 16, 256
INFERRED = (f"tokens of runs that do not record them: {STUDY_CLIENTS} clients × batch "
            f"{STUDY_BATCH} (central: {STUDY_CENTRAL_BATCH}) × {STUDY_LENGTH} tokens a step")

DIVERGED = 1e100  # a perplexity from here on counts as infinite
LARGEST = 1e30  # tokens, seconds or bytes; a larger number is damage
LONGEST = 300  # columns for the settings of a variant in a line

# Settings in which runs may differ and still be repetitions of one experiment.
NO_VARIANT = FederatedConfig.not_in_results | {
    "method", "config", "local_updates", "seed", "device", "threads", "eval_clients",
    "save_client_deltas", "val_freq", MARK}


@dataclass(frozen=True)
class Record:
    """One evaluated step of a history; values that it does not record are nan."""

    step: int
    """The global step: a round, or an optimizer step of a central run."""
    train_ppl: float
    val_ppl: float
    tokens: float
    seconds: float
    bytes: float
    generated: str | None


@dataclass(frozen=True)
class Run:
    """What a run folder holds."""

    path: Path
    method: str
    config: str
    local_updates: int
    seed: int
    settings: dict[str, Any]
    """config.json; empty for a folder of the original study."""
    environment: dict[str, Any]
    """environment.json; empty if it is missing or damaged."""
    history: list[Record]
    tokens_inferred: bool
    damage: str = ""
    """Damage that does not affect the figures, as text."""

    @property
    def name(self) -> str:
        """The folder's name, safe to print."""
        return visible(self.path.name)

    @property
    def final(self) -> Record:
        """The last record with a finite validation perplexity."""
        return self._evaluated[-1]

    @property
    def best(self) -> Record:
        """The record with the lowest validation perplexity."""
        return min(self._evaluated, key=lambda record: record.val_ppl)

    @property
    def _evaluated(self) -> list[Record]:
        return [r for r in self.history if math.isfinite(r.val_ppl)]

    def points(self, measure: Measure, axis: Axis) -> dict[int, tuple[float, float]]:
        """Global step -> (x, perplexity), in order, of the records that have both values."""
        def position(record: Record) -> float:
            if axis == "steps":
                return record.step * self.local_updates
            return float(record.step if axis == "rounds" else getattr(record, axis))

        points = {r.step: (position(r), getattr(r, measure)) for r in self.history}
        return {step: p for step, p in points.items() if math.isfinite(p[0] + p[1])}


@dataclass(frozen=True)
class Found:
    """The runs in a data folder, and the folders that were skipped with the reason."""

    runs: list[Run]
    passed_over: list[tuple[str, str]]

    def __str__(self) -> str:
        lines = [f"found {len(self.runs)} run{'s' * (len(self.runs) != 1)}"]
        for group in groups(self.runs):
            updates = f", local updates {group.local_updates}" * (group.method != "central")
            variant = f", {shortened(group.variant, LONGEST)}" * bool(group.variant)
            seeds = ", ".join(str(seed) for seed in sorted(run.seed for run in group.runs))
            lines.append(f"  {group.config}: {group.method}{updates}{variant}, seeds {seeds}")
        return "\n".join(lines + [f"skipped {n}: {reason}" for n, reason in self.passed_over])


class Damaged(Exception):
    """A run folder cannot be used. The message is the reason, safe to print."""

    def __init__(self, reason: str) -> None:
        super().__init__(visible(reason))


def find_runs(data_dir: Path) -> Found:
    """All runs directly under `data_dir`. Raises InputError if there is no such folder."""
    runs, passed_over = [], []
    for path in run_folders(data_dir):
        try:
            runs.append(read_run(path))
            if runs[-1].damage:
                passed_over.append((runs[-1].name, f"{runs[-1].damage} (the rest is shown)"))
        except Damaged as damaged:
            passed_over.append((visible(path.name), str(damaged)))
    return Found(runs, passed_over)


def run_folders(data_dir: Path) -> list[Path]:
    """The folders under `data_dir` that look like a run's, even if they turn out to be damaged.

    Raises InputError if `data_dir` is not a folder or cannot be read.
    """
    if not os.path.isdir(data_dir):
        raise InputError(f"--data_dir {data_dir}: no such folder; must be one with run folders")
    with naming("--data_dir", data_dir):
        found = sorted(path for path in data_dir.iterdir() if os.path.isdir(path))
    return [path for path in found if NAME.fullmatch(path.name)
            or any(_may_be_there(path / name) for name in ("config.json", "training_history.json"))]


def _may_be_there(file: Path) -> bool:
    """Whether a file exists, or may exist because its folder's permissions hide it."""
    try:
        file.lstat()
    except PermissionError:
        return True
    except OSError:
        return False
    return True


def identify(path: Path) -> Run:
    """A run without its history, from the folder's config.json or else from its name.

    Raises Damaged if neither identifies a run.
    """
    settings = renamed(_read(path / "config.json", dict) or {})
    named = NAME.fullmatch(path.name)
    if settings:
        method, config = settings.get("method"), settings.get("config")
        seed, local_updates = whole(settings.get("seed")), whole(settings.get("local_updates", 1))
        if not (isinstance(method, str) and isinstance(config, str)):
            raise Damaged("config.json is not a run's: it lacks method or config")
        config = Path(config).stem
    elif named:
        method = {"federated": "fed_avg"}.get(named["method"], named["method"])
        config, seed = named["config"], whole(int(named["seed"]))
        local_updates = whole(int(named["lu"] or 1))
    else:
        raise Damaged("no config.json, and the folder's name does not give method and seed")
    if seed is None or local_updates is None:
        raise Damaged("seed and local_updates must be whole numbers >= 0")
    return Run(path, visible(method), visible(config), local_updates, seed, settings, {}, [], False)


def read_run(path: Path) -> Run:
    """Read the run in a folder. Raises Damaged, with the reason, if it cannot be used."""
    run = identify(path)
    history = _read(path / "training_history.json", list)
    if history is None:
        raise Damaged("no training_history.json (yet)")
    tokens_per_step = _tokens_per_step(run)
    by_step: dict[int, Record] = {}
    inferred = False
    for raw in history:
        record = _record(raw, tokens_per_step)
        if record is not None:
            by_step[record.step] = record  # a resumed run may record a step twice: the last counts
            inferred |= "tokens" not in raw
    if not any(math.isfinite(r.val_ppl) for r in by_step.values()):
        raise Damaged("no record of training_history.json has a validation perplexity")
    environment, damage = {}, ""
    try:
        environment = _read(path / "environment.json", dict) or {}
    except Damaged as damaged:
        damage = str(damaged)
    return replace(run, environment=environment, damage=damage,
                   history=[by_step[step] for step in sorted(by_step)], tokens_inferred=inferred)


def _read(path: Path, kind: type[Kind]) -> Kind | None:
    """A file's content, None if there is no file. Raises Damaged if it does not hold a `kind`."""
    try:
        return read_json(path, kind)
    except FileNotFoundError:
        return None
    except DamagedFile as error:
        raise Damaged(f"{path.name} is damaged: {str(error).removeprefix(str(path)).strip()}"
                      ) from None
    except OSError as error:
        raise Damaged(f"{path.name} cannot be read: {error.strerror}") from None


def _tokens_per_step(run: Run) -> float:
    """Tokens per step of a run whose history does not record them; nan if the settings are damaged.
    """
    central = run.method == "central"
    settings = {"num_clients": STUDY_CLIENTS, "sequence_length": STUDY_LENGTH,
            "batch_size": STUDY_CENTRAL_BATCH if central else STUDY_BATCH} | run.settings
    batch_tokens = number(settings["batch_size"]) * number(settings["sequence_length"])
    return batch_tokens * (1 if central else number(settings["num_clients"]) * run.local_updates)


def _record(raw: Any, tokens_per_step: float) -> Record | None:
    """A record from any of the formats that histories have had; None if it has no step."""
    if not isinstance(raw, dict):
        return None
    step = whole(read_field(raw, "step"))
    if step is None:
        return None
    tokens = number(raw["tokens"]) if "tokens" in raw else step * tokens_per_step
    seconds, sent = number(raw.get("seconds")), number(raw.get("bytes"))
    tokens, seconds, sent = (value if abs(value) < LARGEST else math.nan
                             for value in (tokens, seconds, sent))
    return Record(step, _perplexity(raw.get("train_ppl"), raw.get("train_loss")),
                  _perplexity(read_field(raw, "val_ppl"), read_field(raw, "val_loss")), tokens,
                  seconds, sent,
                  raw.get("generated") if isinstance(raw.get("generated"), str) else None)


def _perplexity(ppl: Any, loss: Any) -> float:
    """A record's perplexity, or that of its loss in nats per token if it has none; nan if it has
    neither, infinite if the run has diverged."""
    found, loss = number(ppl), number(loss)
    if math.isnan(found) and not math.isnan(loss):
        found = perplexity(loss)
    if found > 0:
        return found if found < DIVERGED else math.inf
    return math.nan


# ---- repetitions of one experiment ---------------------------------------------------------------

@dataclass(frozen=True)
class Group:
    """Runs that differ only in their seed."""

    method: str
    config: str
    local_updates: int
    variant: str
    """The settings that differ from other groups of the same three, `lr=0.001`; else empty."""
    runs: list[Run]

    @property
    def final_ppl(self) -> float:
        """Mean over seeds of the last validation perplexity."""
        return float(np.mean([run.final.val_ppl for run in self.runs]))


def groups(runs: Iterable[Run]) -> list[Group]:
    """Group runs into repetitions of one experiment.

    Runs with the same method, config and number of local updates whose other settings differ form a
    group for each variant.
    """
    families: dict[tuple[str, str, int], list[Run]] = {}
    for run in runs:
        families.setdefault((run.method, run.config, run.local_updates), []).append(run)
    found = []
    for (method, config, local_updates), family in sorted(families.items()):
        variants: dict[str, list[Run]] = {}
        varying = _varying(family)
        for run in family:
            variants.setdefault(_variant(run, varying), []).append(run)
        found += [Group(method, config, local_updates, variant, members)
                  for variant, members in variants.items()]
    return found


def _varying(family: Sequence[Run]) -> list[str]:
    """Settings that differ. One that older runs do not record is not compared."""
    known = [flat(run.settings) for run in family if run.settings]
    shared = [n for n in (known or [{}])[0] if n not in NO_VARIANT and all(n in s for s in known)]
    return [n for n in shared if len({json.dumps(s[n]) for s in known}) > 1]


def _variant(run: Run, varying: Sequence[str]) -> str:
    if varying and not run.settings:
        return "without config.json"
    settings = flat(run.settings)
    return visible(", ".join(f"{name}={settings[name]}" for name in varying))


def flat(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings with nested ones flattened: model.n_layer."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat |= {f"{name}.{key}": v for key, v in value.items()} if isinstance(value, dict) \
            else {name: value}
    if flat.get("aggregation") == "float":  # the same sums as exact ones, but for rounding
        flat["aggregation"] = "exact"
    return flat
