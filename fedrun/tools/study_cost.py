"""What the runs of a study cost on this machine, from one measured step of each shape."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fedrun.common.log import LOGGER, WARNING
from fedrun.config import FederatedConfig, RunConfig
from fedrun.data.sites import take_private
from fedrun.distributed.launch import detect
from fedrun.distributed.runtime import choose_device
from fedrun.experiment import Experiment, prepare_experiment, resolve_dtype
from fedrun.federation.client import Client
from fedrun.model.hardware import hardware
from fedrun.training.evaluate import BATCH_SEQUENCES, validation_pieces
from fedrun.training.optimizer import LocalOptimizer
from fedrun.training.params import FlatParams

NOT_IN_LENGTH = {"seed", "lr"}  # settings that do not change how much a run computes


@dataclass(frozen=True)
class Shape:
    """Seconds of work of one shape, on one device."""

    name: str
    step: float
    """One optimizer step of one client."""
    evaluation: float
    """One pass over the validation split."""


@dataclass(frozen=True)
class Cost:
    """The sum over some runs."""

    runs: int
    tokens: int
    """Tokens that the clients train on."""
    seconds: float
    """One run after the other, without their starts and the aggregation."""
    shapes: list[Shape]

    def describe(self, jobs: int) -> str:
        """A line, and one for each shape. jobs: runs at the same time."""
        took = self.seconds / min(jobs, max(1, self.runs))
        shown = f"{took / 3600:.1f} hours" if took >= 3600 else f"{took / 60:.1f} minutes"
        lines = [f"to do: at most {self.runs} runs, {self.tokens:,} tokens of training, about "
                 f"{shown} for this command alone, {jobs} at a time, besides starts and "
                 "aggregation; processes on other nodes that join it share the work"]
        return "\n".join(lines + [f"  {shape.name}: {shape.step:.3g} s a step, "
                                  f"{shape.evaluation:.3g} s an evaluation"
                                  for shape in self.shapes])


def estimate(configs: Iterable[RunConfig], workers: int = 1) -> Cost:
    """Prepare the text, and measure. Raises InputError as the runs would, for settings that do not
    fit the text or the machine.

    workers: processes that train the clients of one federated run, as fast as one alone.
    """
    site, _ = take_private([], os.environ)
    lengths: dict[str, Experiment] = {}
    shapes: dict[str, Shape] = {}
    texts: set[str] = set()
    runs, tokens, seconds = 0, 0, 0.0
    for config in configs:
        device = choose_device(config.device, detect({}), False)
        key = _key({k: v for k, v in config.results_dict().items() if k not in NOT_IN_LENGTH})
        if key not in lengths:
            text = _key([config.dataset, config.tokenizer, config.sequence_length,
                         dataclasses.asdict(config.text_options)])
            with _saying(text not in texts):
                lengths[key] = prepare_experiment(config, device, site=site)
            texts.add(text)
        experiment = lengths[key]
        shape_key = _key([config.to_dict()[name] for name in (
            "model", "init_from", "tokenizer", "dataset", "batch_size", "sequence_length", "dtype",
            "device", "threads", "local_optimizer")])
        if shape_key not in shapes:
            shapes[shape_key] = measure(experiment, device)
        steps, updates, in_turn = experiment.length.steps, 1, 1
        if isinstance(config, FederatedConfig):
            updates = config.local_updates * config.cohort_size
            in_turn = config.local_updates * math.ceil(config.cohort_size / workers)
        evaluations = 1 + steps // config.val_freq + bool(steps % config.val_freq)
        runs += 1
        tokens += steps * updates * config.batch_size * config.sequence_length
        shape = shapes[shape_key]
        seconds += steps * in_turn * shape.step + evaluations * shape.evaluation
    return Cost(runs, tokens, seconds, list(shapes.values()))


def measure(experiment: Experiment, device: torch.device) -> Shape:
    """Time the second of two steps, and one batch of the validation split."""
    config = experiment.config
    experiment = experiment.decided(resolve_dtype(config, [hardware(device)]), experiment.data)
    config, data = experiment.config, experiment.data
    threads = torch.get_num_threads()
    torch.set_num_threads(config.threads)
    try:
        model = experiment.new_model(device)
        flat = FlatParams(model)
        client = Client(0, np.arange(len(data.train)), data.train, flat, config,
                        LocalOptimizer(flat, config, 2))
        client.train(model, 1, 0)
        step = _seconds(lambda: client.train(model, 1, 1), device)
        batch = _seconds(lambda: validation_pieces(model, data.validation[:BATCH_SEQUENCES],
                                                   device), device)
    finally:
        torch.set_num_threads(threads)
    return Shape(f"{config.config_name}, {config.batch_size} x {config.sequence_length} tokens",
                 step, batch * math.ceil(len(data.validation) / BATCH_SEQUENCES))


@contextmanager
def _saying(aloud: bool) -> Iterator[None]:
    """Print messages in the block, unless the same text was described before."""
    level = LOGGER.level
    if not aloud:
        LOGGER.setLevel(WARNING)
    try:
        yield
    finally:
        LOGGER.setLevel(level)


def _seconds(work: Callable[[], Any], device: torch.device) -> float:
    began = time.monotonic()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.monotonic() - began


def _key(values: Any) -> str:
    return json.dumps(values, sort_keys=True, default=os.fspath)
