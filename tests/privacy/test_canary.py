"""Canaries: sequences of random tokens in the text of one client, which a model learns by heart.

The gap is how much lower the loss is on them than on sequences that nobody has, drawn by the same
law, in standard errors of its mean. It shows whether clip and noise reach what a run releases: a
check of the wiring, and no proof. Other ways to look may find what this one does not, and with as
few clients as here noise that hides one leaves little of the model either.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fedrun
from fedrun.training.evaluate import mean_loss, validation_pieces

VOCABULARY, LENGTH, PLANTED, OTHERS = 64, 16, 8, 64
CLIENTS, SEQUENCES = 4, 32
FLAGS: dict[str, Any] = {
    "config": "tiny_1_layer", "sequence_length": LENGTH, "batch_size": 8, "lr": 1e-2,
    "dtype": "fp32", "device": "cpu", "rounds": 12, "local_updates": 8, "val_freq": 100,
    "weighting": "uniform", "client_moments": "reset"}
PRIVATE: dict[str, Any] = {"dp_clip": 0.3, "dp_delta": 1e-3}


def drawn(count: int, seed: int) -> np.ndarray:
    """Sequences of which no token says anything about the next; (count, LENGTH)."""
    return np.random.default_rng(seed).integers(VOCABULARY, size=(count, LENGTH))


def common(count: int, seed: int) -> np.ndarray:
    """Sequences that all clients have the like of: each token is five more than the one before."""
    first = np.random.default_rng(seed).integers(VOCABULARY, size=(count, 1))
    return (first + 5 * np.arange(LENGTH)) % VOCABULARY


def losses(run: fedrun.Run, sequences: np.ndarray) -> np.ndarray:
    """The final model's loss on each, nats per token."""
    model, device = run.model(), torch.device("cpu")
    return np.array([mean_loss(validation_pieces(model, row[None], device)) for row in sequences])


def gap(folder: Path, cache_dir: Path, name: str, **flags: Any) -> float:
    """Train with canaries in the last client's text; the gap in standard errors."""
    planted = drawn(PLANTED, 1)
    clients = [common(SEQUENCES, seed) for seed in range(CLIENTS)]
    clients[-1] = np.concatenate([common(SEQUENCES // 2, CLIENTS),
                                  *[planted] * (SEQUENCES // 2 // PLANTED)])
    run = fedrun.train("fed_avg", clients=[client.reshape(-1) for client in clients],
                       validation=common(4, 99).reshape(-1), vocab_size=VOCABULARY,
                       data_dir=folder, cache_dir=cache_dir, run_name=name, **FLAGS | flags)
    assert run.outcome == "finished", run.reason
    ours, others = losses(run, planted), losses(run, drawn(OTHERS, 2))
    error = math.sqrt(others.var() * (1 / PLANTED + 1 / OTHERS))
    return float(others.mean() - ours.mean()) / error


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_canaries_of_one_client_are_learnt_but_not_behind_noise(tmp_path: Path, cache_dir: Path
                                                                ) -> None:
    """Nor does the clip alone hide them: with next to no noise they are plain."""
    private = PRIVATE | {"dp": "client", "dp_dir": tmp_path / "keys"}
    assert gap(tmp_path, cache_dir, "without") > 10
    assert gap(tmp_path, cache_dir, "clipped", **private, dp_noise=1e-4) > 8
    assert abs(gap(tmp_path, cache_dir, "noised", **private, dp_noise=1)) < 4
