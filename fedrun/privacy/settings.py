"""The settings of differential privacy, and which others go with them. Does not import torch."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fedrun.common.errors import require
from fedrun.strategies.base import Strategy

STATE_HOME = "XDG_STATE_HOME"
SMALLEST_DELTA = 1e-11  # of single sequences: see `accountant.example_epsilon`
SMALLEST_CLIP, LARGEST_CLIP = 1e-6, 1e6
"""Between them nothing of a clipped update, scaled to the grid, leaves the range of fp32."""


@dataclass(frozen=True)
class PrivacySettings:
    """Flags of a federated run."""

    # ---- differential privacy
    dp: Literal["none", "client", "example"] = "none"
    """Differential privacy: what the model tells about one client (client: its updates are clipped
    to --dp_clip, and noise is added to their sum) or one sequence (example: the same of its
    gradients, in each local step on a batch that is drawn in secret) is bounded. Workers and
    whoever runs them are trusted. With --sites a site's workers are trusted with its own text
    alone: each site adds noise to its own gradients (example), or a share of the sum's noise before
    its mask (client, which needs --secure_sum). Needs --dp_clip, --dp_delta and --dp_noise or
    --dp_epsilon."""
    dp_clip: float | None = None
    """Longest update of a client, or gradient of a sequence, in L2 norm: a longer one is scaled
    down to it. Noise is in proportion."""
    dp_noise: float | None = None
    """Noise multiplier: the noise's standard deviation, in units of how far one client's update, or
    one sequence's gradient, can move a sum."""
    dp_epsilon: float | None = None
    """In place of --dp_noise: what the whole run may cost a client or sequence, at --dp_delta. The
    noise follows from it, from how often each client trains, and from the smallest shard; a run
    that comes to more, since it was changed or interrupted, is refused."""
    dp_delta: float | None = None
    """The probability with which the guarantee may not hold: below 1 / --num_clients, or one
    divided by the sequences of the largest shard."""
    dp_colluding: int = 1
    """With --dp client and --sites: how many other sites a site, or the server, may put together
    what it knows with, at most all but two. The noise of the remaining sites alone is then as much
    as is charged."""
    max_epsilon: float | None = None
    """End the run, with a checkpoint, before the round that would cost a client or sequence more
    than this. Of this run: others on the same text cost too."""
    dp_dir: Path | None = None
    """Folder for the key of the noise and the log of what was spent, for all runs on a text; never
    a run's. none: fedrun in XDG_STATE_HOME, or in ~/.local/state. Sites of their own have both in
    --site_dir."""

    @property
    def private(self) -> bool:
        """Whether anything is protected."""
        return self.dp != "none"

    @property
    def dp_folder(self) -> Path:
        """What --dp_dir means."""
        if self.dp_dir is not None:
            return self.dp_dir.expanduser()
        return Path(os.environ.get(STATE_HOME) or "~/.local/state").expanduser() / "fedrun"


def check_privacy(config: Any) -> None:
    """InputError, naming the flag, for settings of a federated run that do not go with --dp.

    config: the run's FederatedConfig.
    """
    _require(config, "dp_colluding", config.dp_colluding == 1 or bool(
        config.dp == "client" and config.sites), "left out without --dp client and --sites")
    if not config.private:
        for name in ("dp_clip", "dp_noise", "dp_epsilon", "dp_delta", "max_epsilon"):
            _require(config, name, getattr(config, name) is None, "none without --dp client "
                     "or --dp example")
        return
    _check_numbers(config)
    if config.dp == "client":
        _check_terms(config)
        _check_sites(config)
        _check_records(config)
    else:
        _check_example(config)
    _require(config, "site_holdout", config.site_holdout is None, f"none with --dp {config.dp}: "
             "its loss is of the clients' text, and has no noise")
    _require(config, "cohort", config.num_clients % config.cohort_size == 0, "a divisor of "
             f"--num_clients {config.num_clients} with --dp {config.dp} (it gives "
             f"{config.cohort_size} clients a round): all train equally often")
    folder, run, runs = (Path(os.path.realpath(path)) for path in (
        config.dp_folder, config.run_dir, config.data_dir))
    others = [path for path in (folder, *folder.parents)
              if path.parent == runs and (path / "config.json").exists()]
    _require(config, "dp_dir", not folder.is_relative_to(run) and not others, "outside the folders "
             f"of runs, such as {others[0] if others else config.run_dir}, which are shown to "
             "others")


def _check_numbers(config: Any) -> None:
    clip, delta = config.dp_clip, config.dp_delta
    _require(config, "dp_clip", clip is not None and SMALLEST_CLIP <= clip <= LARGEST_CLIP,
             f"from {SMALLEST_CLIP:g} to {LARGEST_CLIP:g} with --dp {config.dp}")
    one = (config.dp_noise is None) != (config.dp_epsilon is None)
    _require(config, "dp_noise", one, f"given with --dp {config.dp}, or --dp_epsilon in its place, "
             "and not both")
    for name in ("dp_noise", "dp_epsilon", "max_epsilon"):
        value = getattr(config, name)
        _require(config, name, value is None or 0 < value < math.inf, "> 0")
    if config.dp == "example":  # the shards say what it must be below: see example_level.py
        _require(config, "dp_delta", delta is not None and SMALLEST_DELTA <= delta < 1,
                 f"given with --dp example, from {SMALLEST_DELTA:g} to 1")
        return
    _require(config, "dp_delta", delta is not None and 0 < delta < 1 / config.num_clients,
             f"given with --dp client, above 0 and below 1/{config.num_clients} (1 / "
             "--num_clients): at more, to publish one client's text would count as private")


def _check_terms(config: Any) -> None:
    """A sum has to be of clipped updates alone, each with the same weight, on the grid."""
    method = config.strategy
    plain = (set(method.sums) == {"delta"} and method.inputs == ("delta",)
             and not method.weight_headroom and not method.holdout_batches
             and type(method).client_term is Strategy.client_term)
    _require(config, "dp", plain, f"none with {config.method}, whose sums are not of updates alone")
    weighting = getattr(method, "weighting", "uniform")
    require(weighting == "uniform", "--weighting", weighting, "uniform with --dp client, or one "
            "client could move a sum further than another")
    _require(config, "aggregation", config.aggregation == "exact", "exact with --dp client: its "
             "noise is of integers")
    _require(config, "dtype", config.dtype != "fp64", "auto, fp32 or bf16 with --dp client")
    _require(config, "client_moments", not config.averages_moments, "keep, reset or "
             "reset_epoch with --dp client: of moments nothing is clipped")
    _require(config, "sync", config.sync == "round", "round with --dp client")


def _check_sites(config: Any) -> None:
    """Between sites each adds a share of the noise, which the sum alone has enough of."""
    _require(config, "dp_colluding", config.dp_colluding >= 0, "0 or more")
    _require(config, "secure_sum", config.sites is None or config.secure_sum, "true with --dp "
             "client and --sites, or the server would read what each site sends, which has no more "
             "than that site's share of the noise")


def _check_records(config: Any) -> None:
    for name in ("eval_clients", "save_client_deltas"):
        _require(config, name, not getattr(config, name), "false with --dp client: nothing of a "
                 "single client is written")


def _check_example(config: Any) -> None:
    """Nothing but the private gradients may see the text; what is made of them is free."""
    method = config.strategy
    plain = "fisher" not in method.inputs and not method.holdout_batches
    _require(config, "dp", plain, f"none or client with {config.method}, which measures more of a "
             "client's text than the gradients of its steps")
    _require(config, "client_moments", config.client_moments not in (
        "average_sqrt", "average_rows"), "another with --dp example: it rests on --grad_clip, and "
             "noise exceeds that")
    _require(config, "grad_clip", config.grad_clip is None, "none with --dp example: --dp_clip is "
             "for every sequence")
    _require(config, "sampling", config.sampling == "shuffle", "shuffle with --dp example, whose "
             "batches are drawn in secret")
    _require(config, "save_client_deltas", not config.save_client_deltas, "false with --dp "
             "example: they are written before it is known what they cost")


def _require(config: Any, name: str, condition: bool, accepted: str) -> None:
    value = getattr(config, name)
    require(condition, f"--{name}", "none" if value is None else f"{value:g}" if isinstance(
        value, float) else str(value).lower() if isinstance(value, bool) else value, accepted)
