"""Flags without effect: an error if the command never reads them, a warning if the other settings
make them idle. Does not import torch."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from fedrun.common.errors import InputError
from fedrun.config import RunConfig
from fedrun.flags import method_flags

NEVER_READ: dict[str, dict[str, str]] = {
    "central": {"timeout": "a single process waits for no other"},
    "study": {"seed": "the study's file sets the seeds: tune_seed and report_seeds",
              "run_name": "a study names its runs after their settings",
              "data_dir": "the runs of a study are in its folder under --results",
              "overwrite": "a study resumes its runs; to repeat one, remove its folder",
              "resume": "a study resumes its runs; to repeat one, remove its folder"}}
"""Command -> the flags that it refuses, each with the reason."""


def refuse_unread(command: str, flags: Collection[str], where: str = "--") -> None:
    """Raise ValueError if one of `flags` is never read by `command`; `where` is put before its name
    in the message."""
    for name, why in NEVER_READ.get(command, {}).items():
        if name in flags:
            raise InputError(f"{where}{name}: not used by {command} ({why}); leave it out")


def _batches_all(config: Any) -> str:
    return "with --batches all" if getattr(config, "batches", "") == "all" else ""


def _rounds(config: Any) -> str:
    return "with --rounds" if config.rounds else ""


def _one_client(config: Any) -> str:
    return "with one client in a round" if config.cohort_size == 1 else ""


def _nothing_to_store(config: Any) -> str:
    if config.num_clients == 1:
        return "with one client, whose state always stays in place"
    return "" if config.keeps_states else "with clients that keep no state between their rounds"


def _no_outer(config: Any) -> str:
    """Of a central run; a method whose server has these flags always uses them."""
    return "without --outer_every" if getattr(config, "outer_every", 1) is None else ""


def _without_momentum(config: Any) -> str:
    momentum = getattr(config, "strategy", config).server_momentum
    return _no_outer(config) or ("" if momentum else "with --server_momentum 0")


# Flag -> a function that says why it has no effect under a config; empty if it has one.
IDLE: dict[str, Callable[[Any], str]] = {
    "n_epochs": _rounds,
    "epoch_passes": lambda c: "" if getattr(c, "sync", "round") == "epoch" else _rounds(c),
    "partition": _batches_all,
    "size_skew": _batches_all,
    "num_clients": _batches_all,
    "alpha": lambda c: _batches_all(c) or (
        "" if c.partition == "dirichlet" else "without --partition dirichlet"),
    "extend": lambda c: "" if c.lr_schedule != "constant" or getattr(c, "overlap", False) else
    "with --lr_schedule constant: such a run can be trained further without it",
    "local_updates_schedule": lambda c: "with --local_updates 1" if c.local_updates == 1 else (
        "" if c.lr_schedule != "constant" else "with --lr_schedule constant"),
    "muon_momentum": lambda c: "" if c.local_optimizer == "muon" else "without --local_optimizer "
    "muon",
    "prox_mu": lambda c: "with --local_updates 1" if c.local_updates == 1 else "",
    "client_store": _nothing_to_store,
    "moments_every": lambda c: "" if c.client_moments in ("average_sqrt", "average_rows")
    else "without --client_moments average_sqrt or average_rows",
    "dp_dir": lambda c: "" if c.private else "without --dp client or example",
    "weighting": _one_client,
    "temperature": _one_client,
    "entropy_holdout": lambda c: "" if c.strategy.entropy_on == "holdout"
    else "with --entropy_on validation",
    "fisher_microbatches": lambda c: "" if c.strategy.fisher == "corrected"
    else "without --fisher corrected",
    "momentum_form": _without_momentum,
    "server_lr": _no_outer,
    "server_momentum": _no_outer,
    "server_momentum_warmup": _without_momentum}


def idle(config: RunConfig) -> dict[str, str]:
    """Flag -> a warning, for each setting that was changed from its default and has no effect."""
    known = method_flags(config.method)
    values = config.to_dict()
    found = {name: f"--{name} {_shown(values[name])} has no effect {reason}"
             for name, why in IDLE.items() if name in known
             and values[name] != known[name].default and (reason := why(config))}
    if config.init_from and config.config != known["config"].default:
        found["config"] = (f"the model of --config {config.config} has no effect with --init_from, "
                           "which brings its own")
    return found


def _shown(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
