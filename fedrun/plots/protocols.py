"""The protocol of a run: all of its settings that a figure of methods, local updates and configs
does not compare, such as --sync, --sampling or --client_moments.

Lines of one figure have the same protocol. What a study tunes or a method has for itself is no part
of it: --lr and the settings of a strategy.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Sequence
from typing import Any

from fedrun.common.errors import InputError
from fedrun.common.terminal import visible
from fedrun.config import CentralConfig, FederatedConfig
from fedrun.flags import closest, method_flags, methods
from fedrun.plots.groups import NO_VARIANT, WITHOUT, Settings, flat
from fedrun.plots.run_folder import Run

_NOT_COMPARED = NO_VARIANT | {"model", "strategy", "rounds", "n_epochs", "epoch_passes", "lr"}
_NOT_CENTRAL = {"batch_size", "num_clients", "partition", "alpha", "size_skew", "batches"}
"""Settings in which a central run cannot agree with federated ones, or that it does not use."""
MOST_VALUES = 10  # in a message
ONE: Settings = ()
"""The protocol of runs that have only one."""


def _defaults(config: type) -> dict[str, Any]:
    """A setting that an older run does not record had its default."""
    return {f.name: f.default for f in dataclasses.fields(config)
            if f.default is not dataclasses.MISSING and f.name not in _NOT_COMPARED}


_FEDERATED = _defaults(FederatedConfig) | {"weighting": "samples"}
_CENTRAL = {n: v for n, v in _defaults(CentralConfig).items() if n not in _NOT_CENTRAL} | {
    "sites": None}  # it trains on --dataset, which with sites nobody trains on


def protocols(runs: Iterable[Run]) -> dict[Settings, list[Run]]:
    """The runs of each protocol, which is told by the settings in which the protocols differ.

    A run that lacks some of these settings, as central runs do and methods without --weighting,
    belongs to every protocol that it agrees with in those that it has. Where there is one protocol,
    it is ONE.
    """
    own = [(run, _settings(run)) for run in runs]
    known = [settings for _, settings in own if settings]
    varying = sorted(name for name in _FEDERATED
                     if len({s[name] for s in known if name in s}) > 1)
    found: dict[Settings, list[Run]] = {}
    values: dict[Settings, dict[str, str]] = {}
    def settings_that_vary(settings: dict[str, str]) -> dict[str, str]:
        return {name: settings[name] for name in varying if name in settings}

    # Whoever has the most of them first: the others may belong to several protocols.
    for run, settings in sorted(own, key=lambda one: -len(settings_that_vary(one[1]))):
        its = settings_that_vary(settings)
        protocol = tuple((n, visible(str(json.loads(v)))) for n, v in its.items()) \
            if settings else ((WITHOUT, ""),)
        homes = [other for other, theirs in values.items()
                 if len(its) < len(theirs) and settings
                 and all(its[n] == theirs[n] for n in its if n in theirs)] or [protocol]
        for home in homes:
            values.setdefault(home, its)
            found.setdefault(home, []).append(run)
    if len(found) == 1:
        return {ONE: next(iter(found.values()))}
    return dict(sorted(found.items()))


def where(runs: Sequence[Run], conditions: Sequence[str]) -> list[Run]:
    """The runs that meet all `conditions`, NAME=VALUE, or whose method does not have the setting.

    Raises InputError for a condition in another form, and for a setting or a value that no run has.
    """
    kept = list(runs)
    for condition in conditions:
        name, equals, value = condition.partition("=")
        if not (name and equals):
            raise InputError(f"--where {condition}: must be SETTING=VALUE, such as sync=epoch")
        name = name.replace("-", "_")
        all_settings = {run.path: settings_of(run) for run in runs}
        known = {n for settings in all_settings.values() for n in settings}
        if name not in known:
            raise InputError(f"--where {condition}: no run has the setting {name!r}"
                             f"{closest(name, known)}")
        values = {_text(s[name]) for s in all_settings.values() if name in s}
        if value.lower() not in values:
            raise InputError(f"--where {condition}: no run has this value; there are "
                             + visible(", ".join(sorted(values)[:MOST_VALUES])))
        kept = [run for run in kept if _text(all_settings[run.path].get(name)) == value.lower()
                or (run.settings and name not in all_settings[run.path])]
    return kept


def _settings(run: Run) -> dict[str, str]:
    """The values that belong to the protocol, as JSON; none for a run without config.json."""
    if not run.settings:
        return {}
    recorded = flat(run.settings)
    return {name: json.dumps(recorded.get(name, default))
            for name, default in _defaults_of(run).items()}


def _defaults_of(run: Run) -> dict[str, Any]:
    """The defaults of the settings that a run's method has."""
    defaults = _CENTRAL if run.method == "central" else _FEDERATED
    has = method_flags(run.method) if run.method in methods() else flat(run.settings)
    return {name: default for name, default in defaults.items() if name in has or name == "sites"}


def settings_of(run: Run) -> dict[str, Any]:
    """All settings of a run, with the defaults of those that it does not record, and whatever its
    folder's name tells."""
    named = {"method": run.method, "config": run.config, "seed": run.seed}
    if run.method != "central":
        named["local_updates"] = run.local_updates
    if not run.settings:
        return named
    return _defaults_of(run) | flat(run.settings) | named


def _text(value: Any) -> str:
    return str(value).lower()
