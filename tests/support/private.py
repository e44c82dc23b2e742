"""Settings of runs with --dp client and --dp example."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from fedrun.config import FederatedConfig
from fedrun.federation.schedule import Schedule
from fedrun.flags import resolve
from fedrun.privacy.discrete_gaussian import DiscreteGaussian
from fedrun.run import run
from fedrun.secure.noise import stream
from tests.support.runs import SMALL, Outcome

PRIVATE: dict[str, Any] = {"dp": "client", "dp_clip": "0.5", "dp_noise": "1.5", "dp_delta": "1e-3"}
CLIP, NOISE = float(PRIVATE["dp_clip"]), float(PRIVATE["dp_noise"])
PUBLIC = {"event", "time", "unit", "total", "round", "epsilon", "snr", "snr_total", "step_norm",
          "lr", "tokens", "tokens_per_second", "bytes", "seconds", "local_training_seconds",
          "aggregation_seconds", "evaluation_seconds", "val_ppl", "global_step", "generated",
          "prompt", "server_val_loss", "server_val_ppl", "val_loss_halves", "cohort"}
"""All names that the history and the events of a private run may use."""
EXAMPLE: dict[str, Any] = {"dp": "example", "sequence_length": 32, "batch_size": 2}
"""With those: on single sequences."""
PROVENANCE: dict[str, Any] = {"versions": {"torch": "1"}, "kernels": "cpu", "gpu": "",
                              "init_from": None, "plugin": ""}
"""What decides the bits of a run besides its settings."""


def private_config(method: str = "fed_avg", /, **flags: object) -> FederatedConfig:
    """The settings above, these changed or added; None leaves one out."""
    given = {k: str(v) for k, v in (PRIVATE | flags).items() if v is not None}
    config = resolve(method, given)
    assert isinstance(config, FederatedConfig)
    return config


def private_schedule(**flags: object) -> Schedule:
    """The schedule of 12 clients with shards of different sizes."""
    config = private_config(**{"num_clients": 12, "cohort": 4, "rounds": 9} | flags)
    return Schedule(config, [8 * (k + 1) for k in range(config.num_clients)])


def run_private(folder: Path, cache_dir: Path, name: str = "run", method: str = "fed_avg",
                **flags: object) -> Outcome:
    """A run of two rounds in this process, of 4 clients, of which 2 train in each; in FOLDER/NAME,
    with its key in FOLDER/keys."""
    small = {flag[2:]: value for flag, value in zip(SMALL[::2], SMALL[1::2], strict=True)}
    config = private_config(method, **(small | {
        "num_clients": 4, "cohort": 2, "rounds": 2, "data_dir": folder, "cache_dir": cache_dir,
        "dp_dir": folder / "keys", "run_name": name} | flags))
    return Outcome(run(config), "", folder / name)


def releases(folder: Path) -> list[list[Any]]:
    """What the log of a run of `run_private` says was released: run, round, binding, ..."""
    path = folder / "keys" / "privacy.log"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def round_by_hand(start: np.ndarray, updates: Sequence[np.ndarray], keys: Sequence[bytes],
                  cohort: int, hidden: int = 1) -> np.ndarray:
    """The model after a round, with wide integers and one rounding to fp32 for each operation that
    is defined so. hidden: shares that are counted on, of as many as there are keys."""
    size, single = len(start), np.float32
    noise = NOISE * math.sqrt(len(keys) / hidden)
    bound = CLIP * (1 + 2**-20 + 8 * noise * (1 + 2**-20 + 1 / 8) / cohort)
    scale = 2 ** (30 - math.ceil(math.log2(bound)))
    total = np.zeros(size, np.int64)
    for update in updates:
        length = math.sqrt(math.fsum(x * x for x in map(float, update)))
        if not math.isfinite(length):
            continue
        clipped = update * single(CLIP / length) if length > CLIP else update
        assert clipped.dtype == single
        total += np.rint(clipped * single(scale / cohort)).astype(np.int64)
    sigma = NOISE * (CLIP / cohort * scale * (1 + 2**-20) + math.sqrt(size) / 2)
    sampler = DiscreteGaussian(Fraction(math.ceil(Fraction(math.ceil(sigma**2 + 4), hidden))))
    for key in keys:
        total += np.concatenate([
            sampler.sample(stream(key, block), min(65536, size - block * 65536))
            for block in range(math.ceil(size / 65536))])
    assert abs(total).max() < 2**31
    made: np.ndarray = start + total.astype(single) * single(1 / scale)
    return made
