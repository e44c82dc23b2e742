"""What is measured of one client's model between its training and the next client's turn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from fedrun.config import FederatedConfig
from fedrun.data.partition import Shards
from fedrun.data.tokens import TokenData
from fedrun.federation.client import Client
from fedrun.model.base import Model
from fedrun.records.folders import Folders
from fedrun.records.snapshots import save_snapshot, tracked_parameters
from fedrun.strategies.base import ClientReport
from fedrun.training.evaluate import validation_pieces
from fedrun.training.params import FlatParams


class ClientMeasures:
    """Measures of the worker's model, which then is the client's. `between_batches` is called while
    they last."""

    def __init__(self, config: FederatedConfig, data: TokenData, shards: Shards, folders: Folders,
                 model: Model, flat: FlatParams, global_model: Tensor,
                 between_batches: Callable[[], None]) -> None:
        """global_model: (size,), as at the start of the run."""
        self._config, self._data, self._shards, self._folders = config, data, shards, folders
        self._model, self._flat = model, flat
        self._start = tracked_parameters(flat, global_model) if config.save_client_deltas else {}
        self._between_batches = between_batches

    def entropy(self, client: Client) -> float | None:
        """The mean entropy of the trained model on the client's holdout, or without one on the
        validation split; None if the method does not measure it."""
        strategy = self._config.strategy
        if not strategy.holdout_batches:
            return None
        sequences, rows = self._data.validation, np.arange(len(self._data.validation))
        if strategy.holdout:
            sequences, rows = self._data.train, self._shards.holdout[client.index]
        return mean_entropy(self._model, sequences, rows, self._config.batch_size,
                            strategy.holdout_batches)

    def add(self, client: Client, report: ClientReport, number: int) -> ClientReport:
        """In round `number`, which is evaluated: the report with what the flags ask for besides.
        --save_client_deltas writes snapshots."""
        device = self._flat.vector.device
        if self._config.save_client_deltas:
            assert self._folders.run is not None
            save_snapshot(self._folders.run / f"client_{client.index}", number,
                          tracked_parameters(self._flat, self._flat.vector), self._start)
        if self._config.eval_clients:
            report = replace(report, validation=validation_pieces(
                self._model, self._data.validation, device,
                between_batches=self._between_batches))
            if self._config.client_holdout is not None:
                held = client.sequences[self._shards.holdout[client.index]]
                report = replace(report, on_own=validation_pieces(
                    self._model, held, device, between_batches=self._between_batches))
        return report


def mean_entropy(model: Model, sequences: np.ndarray, numbers: np.ndarray,
                 batch_size: int, batches: int) -> float:
    """Mean predictive entropy in nats per token over at most `batches` batches of the sequences
    with these numbers, from the first on."""
    device = next(model.parameters()).device
    entropy, tokens = 0.0, 0
    for start in range(0, len(numbers), batch_size)[:batches]:
        rows = numbers[start:start + batch_size]
        batch = torch.from_numpy(sequences[rows].astype(np.int64)).to(device)
        summed, count = model.entropy(batch)
        entropy += float(summed)
        tokens += count
    return entropy / tokens
