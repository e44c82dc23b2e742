"""Repetitions of one experiment: runs that differ only in their seed."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedrun.common.terminal import visible
from fedrun.config import FederatedConfig
from fedrun.plots.run_folder import Run
from fedrun.records.run_files import MARK, RUN_ID

# Settings in which runs may differ and still be repetitions of one experiment.
NO_VARIANT = FederatedConfig.not_in_results | {
    "method", "config", "local_updates", "seed", "device", "threads", "eval_clients",
    "save_client_deltas", "val_freq", "secure_sum", MARK, RUN_ID}
WITHOUT = "without config.json"

Settings = tuple[tuple[str, str], ...]
"""Settings and their values as text, safe to print."""


@dataclass(frozen=True)
class Group:
    """Runs that differ only in their seed."""

    method: str
    config: str
    local_updates: int
    differs: Settings
    """The settings that differ from other groups of the same three; none if there is no other."""
    runs: list[Run]

    @property
    def variant(self) -> str:
        """`differs` in a line: `lr=0.001, sync=epoch`."""
        return in_a_line(self.differs)

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
        variants: dict[Settings, list[Run]] = {}
        varying = _varying(family)
        for run in family:
            variants.setdefault(_differs(run, varying), []).append(run)
        found += [Group(method, config, local_updates, differs, members)
                  for differs, members in variants.items()]
    return found


def in_a_line(settings: Settings) -> str:
    """`lr=0.001, sync=epoch`; a setting without a value is its name alone."""
    return ", ".join(f"{name}={value}" if value else name for name, value in settings)


def _varying(family: Sequence[Run]) -> list[str]:
    """Settings that differ. One that older runs do not record is not compared."""
    known = [flat(run.settings) for run in family if run.settings]
    shared = [n for n in (known or [{}])[0] if n not in NO_VARIANT and all(n in s for s in known)]
    return [n for n in shared if len({json.dumps(s[n]) for s in known}) > 1]


def _differs(run: Run, varying: Sequence[str]) -> Settings:
    if varying and not run.settings:
        return ((WITHOUT, ""),)
    settings = flat(run.settings)
    return tuple((visible(name), visible(str(settings[name]))) for name in varying)


def flat(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings with nested ones flattened: model.n_layer."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        found |= {f"{name}.{key}": v for key, v in flat(value).items()} if isinstance(
            value, dict) else {name: value}
    if found.get("aggregation") == "float":  # the same sums as exact ones, but for rounding
        found["aggregation"] = "exact"
    return found
