"""Centralised training, the baseline: one optimizer on all the data, and no aggregation."""

from __future__ import annotations

import math
import time
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedrun.common.errors import Diverged, FolderLost, InputError
from fedrun.config import CentralConfig
from fedrun.data.batches import Batches, make_batches
from fedrun.data.partition import client_shards
from fedrun.data.tokens import TokenData
from fedrun.distributed.stopping import StopRequest
from fedrun.federation.client import Client, LocalLosses, to_device
from fedrun.model.build import new_model
from fedrun.records.checkpoint import (
    GLOBAL,
    Checkpoint,
    CheckpointWriter,
    client_file,
    folder_of,
)
from fedrun.records.provenance import Length
from fedrun.records.recorder import Recorder
from fedrun.records.run_dir import studied
from fedrun.records.schema import CENTRAL
from fedrun.training.evaluate import mean_loss, perplexity, sample_text, validation_pieces
from fedrun.training.optimizer import LocalOptimizer, scheduled_lr
from fedrun.training.params import FlatParams


class PooledClients(Client):
    """The clients of a federated run as one: a batch is the concatenation of theirs."""

    def __init__(self, shards: list[np.ndarray], *args: Any) -> None:
        super().__init__(0, *args)
        each = self.config.batch_size // len(shards)
        self.parts: list[tuple[np.ndarray, Batches]] = [
            (shard, make_batches(self.config.sampling, len(shard), each, self.config.seed, k))
            for k, shard in enumerate(shards)]

    def next_batch(self) -> Tensor:
        rows = [torch.from_numpy(batches.read(self.steps_done, self.sequences, shard))
                for shard, batches in self.parts]
        self.steps_done += 1
        return to_device(torch.cat(rows), self.flat.vector.device)


def owned_shards(config: CentralConfig, data: TokenData) -> list[np.ndarray]:
    """What is trained on, by --batches: one shard, or those of the clients of a federated run."""
    if config.batches == "all":
        return [np.arange(len(data.train))]
    shards = client_shards(data, config.num_clients, config.partition, config.alpha,
                           config.size_skew, config.seed)
    return shards if config.batches == "clients" else shards[:1]


def length(config: CentralConfig, owned: int) -> Length:
    """The optimizer steps of the run and of an epoch, where a client owns `owned` sequences.
    ValueError where that makes no step."""
    found = Length(config, int(owned * config.epoch_passes) // config.batch_size)
    if found.steps == 0:
        raise InputError(f"--batch_size {config.batch_size}: there are {owned} sequences to "
                         "train on; it must be at most that")
    return found


def training_client(config: CentralConfig, data: TokenData, flat: FlatParams) -> tuple[Client, int]:
    """Who trains, by --batches, and for how many steps."""
    shards = owned_shards(config, data)
    owned = np.concatenate(shards)
    steps = length(config, len(owned)).steps
    optimizer = LocalOptimizer(flat, config, steps)
    if config.batches == "clients":
        return PooledClients(shards, owned, data.train, flat, config, optimizer), steps
    return Client(0, owned, data.train, flat, config, optimizer), steps


class Training:
    """A run in one process: the model, its client, and what is recorded of them."""

    def __init__(self, config: CentralConfig, data: TokenData, device: torch.device,
                 provenance: dict[str, Any], checkpoint: Checkpoint | None) -> None:
        self.config, self.data, self.device = config, data, device
        self.model = new_model(config, data.vocab_size, device)
        self.flat = FlatParams(self.model)
        self.client, self.steps = training_client(config, data, self.flat)
        self.last_gradient: Tensor | None = None
        self.done = checkpoint.step if checkpoint else 0
        self.recorder = Recorder(config, CENTRAL, self.steps, self.flat, provenance, 1, self.done,
                                 checkpoint.server if checkpoint else None)
        if checkpoint:
            self._load(checkpoint)
        self.saver = CheckpointWriter()

    def step(self) -> None:
        """One optimizer step, evaluated and recorded where it is due."""
        config, before = self.config, time.monotonic()
        losses: LocalLosses = self.client.train(self.model, 1, self.done)
        loss_sum = losses.loss_sum.item()
        self.recorder.totals.add(config.batch_size * config.sequence_length, loss_sum,
                                 losses.tokens, local_training_seconds=time.monotonic() - before)
        self.done += 1
        if not torch.isfinite(self.flat.vector.sum()):
            raise self._diverged("the model is no longer finite")
        record = None
        if self.done == 1 or self.done % config.val_freq == 0 or self.done == self.steps:
            record = self._evaluate()
        self.recorder.step(self.done, perplexity(loss_sum / losses.tokens),
                           scheduled_lr(config, self.done - 1, self.steps), record)

    def _evaluate(self) -> dict[str, Any]:
        """Evaluate the model; the record of this step."""
        before = time.monotonic()
        pieces = validation_pieces(self.model, self.data.validation, self.device)
        if not math.isfinite(mean_loss(pieces)):
            raise self._diverged("the validation loss is not finite")
        self.recorder.totals.add(0, 0.0, 0, evaluation_seconds=time.monotonic() - before)
        model = self.flat.vector.to("cpu", copy=True)
        start, now = self.recorder.start, studied(self.flat.views(model))
        cosine = None if self.last_gradient is None else float(
            torch.nn.functional.cosine_similarity(self.flat.grad, self.last_gradient, dim=0))
        self.last_gradient = self.flat.grad.clone()
        return self.recorder.evaluated(
            self.done, pieces, model, sample_text(self.model, self.data, self.device),
            grad_cosine=cosine,
            delta_norms={k: float(((now[k] - start[k]) ** 2).sum() ** 0.5) for k in now})

    def _diverged(self, what: str) -> Diverged:
        self.recorder.wait()  # for the last good model, if it is still being written
        path = self.config.run_dir / "model.safetensors"
        kept = f"; the last good model is in {path}" if path.exists() else ""
        return Diverged(f"step {self.done}: {what}: --lr {self.config.lr:g} may be too large{kept}")

    def save(self) -> None:
        """Begin a checkpoint of this step."""
        gradient = {} if self.last_gradient is None else {"last_gradient": self.last_gradient}
        folder = folder_of(self.config.run_dir, self.done)
        self.recorder.begin_checkpoint(self.done)
        self.saver.begin(folder, self.done, {GLOBAL: {"model": self.flat.vector} | gradient,
                                             client_file(0): self.client.state()})

    def commit(self) -> None:
        """Finish the checkpoint whose tensors are written, if there is one."""
        self.recorder.commit_checkpoints([{"saved": self.saver.written()}])

    def _load(self, checkpoint: Checkpoint) -> None:
        tensors = checkpoint.tensors(GLOBAL)
        self.flat.vector.copy_(tensors["model"])
        if "last_gradient" in tensors:
            self.last_gradient = tensors["last_gradient"].to(self.device)
        self.client.load_state(checkpoint.tensors(client_file(0)))

    def close(self, stop: str) -> None:
        """Wait until all is written, and say how the run stands."""
        self.recorder.finish(self.done, stop, [{"saved": self.saver.written(wait=True)}])


def train_central(config: CentralConfig, data: TokenData, device: torch.device, stopping: StopRequest,
        provenance: dict[str, Any], checkpoint: Checkpoint | None = None) -> str:
    """Train for all epochs or `rounds` optimizer steps, evaluating every `val_freq` of them.

    A record's `grad_cosine` is the cosine between the gradient of this step and the one of the
    record before; `delta_norms` are Frobenius norms of the change since the start. Returns who
    asked for an end before the last step; empty after it. Raises Diverged.
    """
    training = Training(config, data, device, provenance, checkpoint)
    stop = ""
    try:
        while training.done < training.steps and not stop:
            training.step()
            training.commit()
            if lost := stopping.lost_folder():
                raise FolderLost(lost)
            if training.done < training.steps:
                stop = stopping.asked_by()
            if stop or training.recorder.checkpoint_due(training.done):
                training.save()
        training.close(stop)
    except Diverged:
        training.recorder.close()
        raise
    finally:
        training.recorder.end_thread()  # whoever called us gives the run's folder up
    if stop:
        stopping.obeyed()
    return stop and f"{stop}, after step {training.done}"
