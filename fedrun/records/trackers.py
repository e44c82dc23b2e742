"""--track: a run's numbers go to a tracker, an optional package, while the run lasts."""

from __future__ import annotations

import importlib
import importlib.util
import math
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any, Protocol

from fedrun.common.errors import InputError
from fedrun.common.files import DamagedFile, read_json, write_json
from fedrun.config import RunConfig

PROJECT = "fedrun"


class Tracker(Protocol):
    """Takes the numbers of a run."""

    def log(self, values: dict[str, float], step: int) -> None:
        """The numbers of one global step."""

    def close(self) -> None:
        """The run has ended."""


class TensorBoard:
    """Event files under the run's tensorboard/ folder: `tensorboard --logdir results`."""

    def __init__(self, config: RunConfig, done: int) -> None:
        from torch.utils.tensorboard import SummaryWriter
        self.writer = SummaryWriter(str(config.run_dir / "tensorboard"), purge_step=done + 1)

    def log(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


class WandbLikeTracker:
    """Weights & Biases, or Trackio, whose interface is the same as far as we use it.

    A resumed run continues the tracker's run of its earlier starts, whose id (for Trackio, whose
    name) is kept in tracker.json in the run's folder. Rounds repeated after a resume send the same
    numbers again; W&B ignores the second ones.
    """

    def __init__(self, package: str, config: RunConfig) -> None:
        self.package = importlib.import_module(package)
        path = config.run_dir / "tracker.json"
        known: dict[str, Any] = {}
        with suppress(OSError, DamagedFile):
            known = read_json(path, dict)
        common = {"project": PROJECT, "config": config.to_dict()}
        if package == "wandb":
            known["wandb"] = str(os.environ.get("WANDB_RUN_ID") or known.get("wandb")
                                 or secrets.token_hex(4))
            write_json(path, known)  # before `init`: a kill in between loses no id
            self.package.init(**common, name=config.name, id=known["wandb"], resume="allow",
                              allow_val_change=True)  # of settings that change no results
        else:
            # A run that has our name may come from another folder: resume a known one only.
            resume = "allow" if known.get(package) else "never"
            run = self.package.init(**common, name=str(known.get(package) or config.name),
                                    resume=resume)
            write_json(path, known | {package: run.name})

    def log(self, values: dict[str, float], step: int) -> None:
        self.package.log(values, step=step)

    def close(self) -> None:
        self.package.finish()


def check_tracker(config: RunConfig) -> None:
    """Raise InputError, naming what to install, if the package behind --track is missing."""
    if config.track != "none" and importlib.util.find_spec(config.track) is None:
        raise InputError(f"--track {config.track}: the package {config.track} is not installed: "
                         f"pip install 'fedrun[{config.track}]' (or pip install {config.track})")


def open_tracker(config: RunConfig, done: int) -> Tracker | None:
    """The tracker that --track names; None for `none`. done: steps that an earlier start has sent.
    """
    if config.track == "none":
        return None
    return (TensorBoard(config, done) if config.track == "tensorboard"
            else WandbLikeTracker(config.track, config))


_NAMES = {"train_ppl": "perplexity/train", "val_ppl": "perplexity/validation",
          "site_val_ppl": "perplexity/sites",
          "lr": "learning_rate", "tokens_per_second": "tokens_per_second"}


def scalars(values: Mapping[str, Any]) -> dict[str, float]:
    """The finite numbers of an event under their names in a tracker: perplexity/train,
    seconds/aggregation, client_0/weight, ..."""
    def named() -> Iterator[tuple[str, Any]]:
        for name, value in values.items():
            if name == "clients":
                yield from ((f"client_{client['client']}/{what}", number) for client in value
                            for what, number in client.items() if what != "client")
            elif name in ("left_out", "clipped"):
                yield name, value if isinstance(value, int) else len(value)
            elif name.endswith("_seconds"):
                yield f"seconds/{name.removesuffix('_seconds')}", value
            elif name not in ("round", "step"):
                yield _NAMES.get(name, "seconds/all" if name == "seconds" else name), value

    return {name: float(value) for name, value in named()
            if isinstance(value, (int, float)) and math.isfinite(value)}
