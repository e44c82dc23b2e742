"""Reads a run folder for the figures and the report.

Folders of this project describe themselves in config.json. Folders of the original study have none:
their names give method, config and seed, `central_config_{config}_seed_{seed}` and
`federated_config_{config}_lu_{lu}_seed_{seed}`, and the rest is that study's defaults. Needs no
torch, so that figures of a cluster's runs can be made on a laptop.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

from fedrun.common.files import DamagedFile, Kind, number, read_json, whole
from fedrun.common.old_names import renamed
from fedrun.common.perplexity import perplexity
from fedrun.common.terminal import visible
from fedrun.records.schema import SITE_VAL_PPL, read_field

Axis = Literal["tokens", "steps", "rounds", "seconds", "bytes"]
AXES: tuple[Axis, ...] = get_args(Axis)
Measure = Literal["val_ppl", "train_ppl", "site_val_ppl"]

HISTORY = "training_history.json"
NAME = re.compile(r"(?P<method>\w+?)_config_(?P<config>.+?)(_lu_(?P<lu>\d+))?_seed_(?P<seed>\d+)")

# The study's settings, which its folders do not record.
STUDY_CLIENTS, STUDY_BATCH, STUDY_CENTRAL_BATCH, STUDY_LENGTH = 4, 4, 16, 256
INFERRED = (f"tokens of runs that do not record them: {STUDY_CLIENTS} clients × batch "
            f"{STUDY_BATCH} (central: {STUDY_CENTRAL_BATCH}) × {STUDY_LENGTH} tokens a step")

MOST_NAMES = 5  # of sites in a setting; more are counted
DIVERGED = 1e100  # a perplexity from here on counts as infinite
LARGEST = 1e30  # tokens, seconds or bytes; a larger number is damage


@dataclass(frozen=True)
class Record:
    """One evaluated step of a history; values that it does not record are nan."""

    step: int
    """The global step: a round, or an optimizer step of a central run."""
    train_ppl: float
    val_ppl: float
    site_val_ppl: float
    """On what the sites hold out, with --site_holdout."""
    tokens: float
    seconds: float
    bytes: float
    generated: str | None
    """Sample text, without the prompt."""
    prompt: str | None
    used: dict[int, float] = field(default_factory=dict)
    """Of clients that were clipped, or whose updates a robust rule saw: the mean share of their
    update that was used since the record before."""


@dataclass(frozen=True)
class Run:
    """What a run folder holds, or a study's file of a run (`plots/studies.py`)."""

    path: Path
    """The folder; of a study's run, where its folder would be."""
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

    def local_steps(self, record: Record) -> float:
        """Optimizer steps by then of a client that trains in every round; nan if the settings are
        damaged."""
        settings = self.settings
        if settings.get("local_updates_schedule", "constant") == "constant":
            return record.step * self.local_updates
        clients, batch, length = (number(settings.get(name)) for name in (
            "num_clients", "batch_size", "sequence_length"))
        cohort = clients if settings.get("cohort") is None else number(settings["cohort"])
        if not min(clients, cohort, batch, length) > 0 or not math.isfinite(clients):
            return math.nan
        cohort = max(1, round(cohort * clients)) if cohort < 1 else cohort
        return record.tokens / (cohort * batch * length)

    def points(self, measure: Measure, axis: Axis) -> dict[int, tuple[float, float]]:
        """Global step -> (x, perplexity), in order, of the records that have both values."""
        def position(record: Record) -> float:
            if axis == "steps":
                return self.local_steps(record)
            return float(record.step if axis == "rounds" else getattr(record, axis))

        points = {r.step: (position(r), getattr(r, measure)) for r in self.history}
        return {step: p for step, p in points.items() if math.isfinite(p[0] + p[1])}


class Damaged(Exception):
    """A run folder cannot be used. The message is the reason, safe to print."""

    def __init__(self, reason: str) -> None:
        super().__init__(visible(reason))


def identify(path: Path) -> Run:
    """A run without its history, from the folder's config.json or else from its name.

    Raises Damaged if neither identifies a run.
    """
    settings = renamed(_read(path / "config.json", dict) or {})
    if settings:
        return from_settings(path, settings, "config.json")
    named = NAME.fullmatch(path.name)
    if not named:
        raise Damaged("no config.json, and the folder's name does not give method and seed")
    method = {"federated": "fed_avg"}.get(named["method"], named["method"])
    return _run(path, method, named["config"], int(named["lu"] or 1), int(named["seed"]), {})


def from_settings(path: Path, settings: dict[str, Any], file: str) -> Run:
    """A run without its history, from its settings. Raises Damaged, naming the file that they are
    from, if they are not those of a run."""
    method, config = settings.get("method"), settings.get("config")
    if not (isinstance(method, str) and isinstance(config, str)):
        raise Damaged(f"{file} is not a run's: it lacks method or config")
    return _run(path, method, Path(config).stem, settings.get("local_updates", 1),
                settings.get("seed"), settings)


def _run(path: Path, method: str, config: str, local_updates: Any, seed: Any,
         settings: dict[str, Any]) -> Run:
    seed, local_updates = whole(seed), whole(local_updates)
    if seed is None or local_updates is None:
        raise Damaged("seed and local_updates must be whole numbers >= 0")
    return Run(path, visible(method), visible(config), local_updates, seed, settings, {}, [], False)


def read_run(path: Path) -> Run:
    """Read the run in a folder. Raises Damaged, with the reason, if it cannot be used."""
    run = identify(path)
    history = _read(path / HISTORY, list)
    if history is None:
        raise Damaged(f"no {HISTORY} (yet)")
    environment, damage = {}, ""
    try:
        environment = _read(path / "environment.json", dict) or {}
    except Damaged as damaged:
        damage = str(damaged)
    return replace(with_history(run, history, HISTORY), environment=environment, damage=damage,
                   settings=_with_sites(run.settings, environment))


def _with_sites(settings: dict[str, Any], environment: dict[str, Any]) -> dict[str, Any]:
    """The settings with the names of the sites and the digest of their file in place of its path:
    another file under the same path is another setting, and a copy is none."""
    made_with = environment.get("made_with")
    digest = made_with.get("sites") if isinstance(made_with, dict) else None
    if not (settings.get("sites") and isinstance(digest, str)):
        return settings
    names = [visible(str(one.get("name"))) for one in sites_of(environment) if "clients" in one]
    who = f"{len(names)} sites" if len(names) > MOST_NAMES else ", ".join(names) or "sites"
    return settings | {"sites": f"{who} ({digest[:8]})"}


def sites_of(environment: dict[str, Any]) -> list[dict[str, Any]]:
    """The server and the sites of a run as `Sites.listed` has them; empty without sites."""
    listed = environment.get("sites")
    return [one for one in listed if isinstance(one, dict)] if isinstance(listed, list) else []


def with_history(run: Run, history: list[Any], file: str) -> Run:
    """The run with the records of its history. Raises Damaged, naming the file that they are from,
    if none has a perplexity."""
    tokens_per_step = _tokens_per_step(run)
    by_step: dict[int, Record] = {}
    inferred = False
    for raw in history:
        record = _record(raw, tokens_per_step)
        if record is not None:
            by_step[record.step] = record  # a resumed run may record a step twice: the last counts
            inferred |= "tokens" not in raw
    if not any(math.isfinite(r.val_ppl) for r in by_step.values()):
        raise Damaged(f"no record of {file} has a validation perplexity")
    return replace(run, history=[by_step[step] for step in sorted(by_step)],
                   tokens_inferred=inferred)


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
    generated, prompt = (raw[name] if isinstance(raw.get(name), str) else None
                         for name in ("generated", "prompt"))
    return Record(step, _perplexity(raw.get("train_ppl"), raw.get("train_loss")),
                  _perplexity(read_field(raw, "val_ppl"), read_field(raw, "val_loss")),
                  _perplexity(raw.get(SITE_VAL_PPL), raw.get("site_val_loss")), tokens, seconds,
                  sent, generated, prompt, _used(raw.get("client_used")))


def _used(found: Any) -> dict[int, float]:
    """`client_used` of a record: entries that are not a client, its rounds and a share are passed
    over."""
    entries = [one for one in found if isinstance(one, list) and len(one) == 3
               ] if isinstance(found, list) else []
    return {client: share for client, share in ((whole(k), number(s)) for k, _, s in entries)
            if client is not None and 0 <= share <= 1}


def _perplexity(ppl: Any, loss: Any) -> float:
    """A record's perplexity; where it is missing, computed from the loss (nats per token). nan if
    both are missing; infinite if the run has diverged."""
    found, loss = number(ppl), number(loss)
    if math.isnan(found) and not math.isnan(loss):
        found = perplexity(loss)
    if found > 0:
        return found if found < DIVERGED else math.inf
    return math.nan
