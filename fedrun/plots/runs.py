"""Run folders as they are found on a disk: what the figures and the report are made from.

Folders of this project describe themselves (config.json). Folders of the study that it grew from
are read by their names, `central_config_{config}_seed_{seed}` and
`federated_config_{config}_lu_{lu}_seed_{seed}`, and by that study's defaults. Nothing here needs
torch: figures are made on a laptop from runs of a cluster.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from fedrun.config import FederatedConfig
from fedrun.errors import naming
from fedrun.run_files import MARK

Axis = Literal["tokens", "steps", "rounds", "seconds", "bytes"]
AXES: tuple[Axis, ...] = get_args(Axis)
Measure = Literal["val_ppl", "train_ppl"]

NAME = re.compile(r"(?P<method>\w+?)_config_(?P<config>.+?)(_lu_(?P<lu>\d+))?_seed_(?P<seed>\d+)")

# What the study used where its folders do not say.
STUDY_CLIENTS, STUDY_BATCH, STUDY_CENTRAL_BATCH, STUDY_LENGTH = 4, 4, 16, 256
INFERRED = (f"tokens of runs that do not record them: {STUDY_CLIENTS} clients × batch "
            f"{STUDY_BATCH} (central: {STUDY_CENTRAL_BATCH}) × {STUDY_LENGTH} tokens a step")

# Settings in which runs may differ and still be repetitions of one experiment.
_NO_VARIANT = FederatedConfig.neutral | {
    "method", "config", "local_updates", "seed", "device", "threads", "eval_clients",
    "save_client_deltas", "val_freq", "reduce", MARK}


@dataclass(frozen=True)
class Record:
    """One evaluated step of a history; nan where the history does not say."""

    step: int
    """The global step: a round, or in a central run an optimizer step."""
    train_ppl: float
    val_ppl: float
    tokens: float
    seconds: float
    bytes: float
    generated: str | None


@dataclass(frozen=True)
class Run:
    """One run folder with a history that can be read."""

    path: Path
    method: str
    config: str
    local_updates: int
    seed: int
    settings: dict[str, Any]
    """config.json; empty for a folder of the study."""
    environment: dict[str, Any]
    """environment.json; empty where there is none."""
    history: list[Record]
    tokens_inferred: bool

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def final(self) -> Record:
        """The last record that was evaluated."""
        return self._evaluated[-1]

    @property
    def best(self) -> Record:
        """The record with the lowest validation perplexity."""
        return min(self._evaluated, key=lambda record: record.val_ppl)

    @property
    def _evaluated(self) -> list[Record]:
        return [r for r in self.history if math.isfinite(r.val_ppl)]

    def points(self, measure: Measure, axis: Axis) -> dict[int, tuple[float, float]]:
        """Global step -> (x, perplexity), in order, of the records that have both."""
        def position(record: Record) -> float:
            if axis == "steps":
                return record.step * self.local_updates
            return float(record.step if axis == "rounds" else getattr(record, axis))

        points = {r.step: (position(r), getattr(r, measure)) for r in self.history}
        return {step: p for step, p in points.items() if math.isfinite(p[0] + p[1])}


@dataclass(frozen=True)
class Found:
    """What a data folder holds: runs, and what had to be passed over with the reason."""

    runs: list[Run]
    passed_over: list[tuple[str, str]]

    def __str__(self) -> str:
        lines = [f"found {len(self.runs)} run{'s' * (len(self.runs) != 1)}"]
        for group in groups(self.runs):
            updates = f", local updates {group.local_updates}" * (group.method != "central")
            variant = f", {group.variant}" * bool(group.variant)
            seeds = ", ".join(str(seed) for seed in sorted(run.seed for run in group.runs))
            lines.append(f"  {group.config}: {group.method}{updates}{variant}, seeds {seeds}")
        return "\n".join(lines + [f"passed over {n}: {reason}" for n, reason in self.passed_over])


class Damaged(Exception):
    """A run folder that cannot be used; the text says why."""


def find_runs(data_dir: Path) -> Found:
    """All runs directly under `data_dir`. ValueError where there is no such folder."""
    if not data_dir.is_dir():
        raise ValueError(f"--data_dir {data_dir}: no such folder; accepted is one with run folders")
    runs, passed_over = [], []
    with naming("--data_dir", data_dir):
        folders = sorted(p for p in data_dir.iterdir() if p.is_dir())
    for path in folders:
        if is_run(path):
            try:
                runs.append(read_run(path))
            except Damaged as damage:
                passed_over.append((path.name, str(damage)))
    return Found(runs, passed_over)


def is_run(path: Path) -> bool:
    """Whether a folder is, or was meant to be, a run's; one that may not be looked into may be."""
    try:
        return bool(NAME.fullmatch(path.name) or (path / "config.json").is_file()
                    or (path / "training_history.json").is_file())
    except PermissionError:
        return True


def identify(path: Path) -> Run:
    """What a folder's config.json, or else its name, says of a run; its history stays unread.

    Raises Damaged where that cannot be told.
    """
    settings = _read_json(path / "config.json", dict) or {}
    named = NAME.fullmatch(path.name)
    if settings:
        try:
            method, seed = str(settings["method"]), int(settings["seed"])
            config = Path(str(settings["config"])).stem
            local_updates = int(settings.get("local_updates", 1))
        except (KeyError, TypeError, ValueError) as error:
            raise Damaged(f"config.json is not a run's: {error!r}") from None
    elif named:
        method = {"federated": "fed_avg"}.get(named["method"], named["method"])
        config, seed = named["config"], int(named["seed"])
        local_updates = int(named["lu"] or 1)
    else:
        raise Damaged("no config.json, and the folder's name does not tell method and seed")
    return Run(path, method, config, local_updates, seed, settings, {}, [], False)


def read_run(path: Path) -> Run:
    """The run in a folder. Raises Damaged with the reason where it cannot be read."""
    run = identify(path)
    history = _read_json(path / "training_history.json", list)
    if history is None:
        raise Damaged("no training_history.json (yet)")
    tokens_a_step = _tokens_a_step(run)
    by_step: dict[int, Record] = {}
    inferred = False
    for raw in history:
        record = _record(raw, tokens_a_step)
        if record is not None:
            by_step[record.step] = record  # a resumed run may tell a step twice: the last counts
            inferred |= "tokens" not in raw
    if not any(math.isfinite(r.val_ppl) for r in by_step.values()):
        raise Damaged("no record of training_history.json has a validation perplexity")
    return replace(run, environment=_read_json(path / "environment.json", dict) or {},
                   history=[by_step[step] for step in sorted(by_step)], tokens_inferred=inferred)


def _read_json(path: Path, kind: type) -> Any:
    """The file's content, None where there is no file; Damaged where it is not a `kind`."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise Damaged(f"{path.name} is damaged: {error}") from None
    if not isinstance(content, kind):
        raise Damaged(f"{path.name} is damaged: a {kind.__name__} is expected")
    return content


def _tokens_a_step(run: Run) -> int:
    settings = run.settings
    if run.method == "central":
        batches, batch = 1, settings.get("batch_size", STUDY_CENTRAL_BATCH)
    else:
        batches = settings.get("num_clients", STUDY_CLIENTS) * run.local_updates
        batch = settings.get("batch_size", STUDY_BATCH)
    return int(batches * batch * settings.get("sequence_length", STUDY_LENGTH))


def _record(raw: Any, tokens_a_step: int) -> Record | None:
    """A record from any of the forms that histories have; None where it has no step."""
    if not isinstance(raw, dict):
        return None
    step = _number(raw, "global_step", "step")
    if not math.isfinite(step):
        return None
    return Record(int(step), _perplexity(raw, "train"), _perplexity(raw, "server_val", "val"),
                  _number(raw, "tokens") if "tokens" in raw else step * tokens_a_step,
                  _number(raw, "seconds"), _number(raw, "bytes"),
                  raw.get("generated") if isinstance(raw.get("generated"), str) else None)


def _perplexity(raw: dict[str, Any], *prefixes: str) -> float:
    """The perplexity under the first prefix that has one, or has a loss in nats."""
    for prefix in prefixes:
        found = _number(raw, f"{prefix}_ppl")
        if math.isnan(found) and f"{prefix}_loss" in raw:
            loss = _number(raw, f"{prefix}_loss")
            found = math.nan if math.isnan(loss) else math.exp(loss) if loss < 700 else math.inf
        if not math.isnan(found):
            return found
    return math.nan


def _number(raw: dict[str, Any], *names: str) -> float:
    for name in names:
        value = raw.get(name)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
    return math.nan


# ---- repetitions of one experiment ---------------------------------------------------------------

@dataclass(frozen=True)
class Group:
    """Runs that differ in their seed alone."""

    method: str
    config: str
    local_updates: int
    variant: str
    """The settings that tell it from other groups of the same three, `lr=0.001`; else empty."""
    runs: list[Run]

    @property
    def final_ppl(self) -> float:
        """Mean over the seeds of the last validation perplexity."""
        return float(np.mean([run.final.val_ppl for run in self.runs]))


def groups(runs: Iterable[Run]) -> list[Group]:
    """Runs grouped into repetitions; where the settings of runs with one method, config and number
    of local updates differ, a group for each variant."""
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
    """Settings that differ; one that only newer runs know does not tell them from older ones."""
    known = [_flat(run.settings) for run in family if run.settings]
    shared = [n for n in (known or [{}])[0] if n not in _NO_VARIANT and all(n in s for s in known)]
    return [n for n in shared if len({json.dumps(s[n]) for s in known}) > 1]


def _variant(run: Run, varying: Sequence[str]) -> str:
    if varying and not run.settings:
        return "without config.json"
    settings = _flat(run.settings)
    return ", ".join(f"{name}={settings[name]}" for name in varying)


def _flat(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings with those of a section beside the others: model.n_layer."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat |= {f"{name}.{key}": v for key, v in value.items()} if isinstance(value, dict) \
            else {name: value}
    return flat


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
