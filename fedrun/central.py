"""Centralised training, the baseline: one optimizer on all the data, and no aggregation."""

from __future__ import annotations

import math
import time
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedrun.common.errors import Diverged, FolderLost, InputError
from fedrun.common.files import write_json
from fedrun.common.log import WARNING, log
from fedrun.config import CentralConfig
from fedrun.data.batches import Batches, make_batches
from fedrun.data.partition import client_shards
from fedrun.data.tokens import TokenData
from fedrun.distributed.stopping import StopRequest
from fedrun.federation.client import Client, LocalLosses, to_device
from fedrun.model.build import new_model
from fedrun.records.best import BestModel
from fedrun.records.checkpoint import (
    GLOBAL,
    Checkpoint,
    client_file,
    folder_of,
)
from fedrun.records.checkpoint_writer import CheckpointCoordinator, CheckpointWriter
from fedrun.records.events import Events, Progress
from fedrun.records.history import RunTotals, half_losses
from fedrun.records.outcome import write_outcome
from fedrun.records.provenance import Length
from fedrun.records.snapshots import SnapshotWriter, save_model, tracked_parameters
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
        self.start = tracked_parameters(self.flat.views(self.flat.vector))
        self.snapshots = SnapshotWriter(config.run_dir, self.start)
        self.history: list[dict[str, Any]] = []
        self.clocks = RunTotals()
        self.last_gradient: Tensor | None = None
        self.done = 0
        if checkpoint:
            self._load(checkpoint)
        self.progress = Progress("step", self.steps, self.done, self.clocks.tokens)
        self.events = Events(config, "step", self.steps, self.done)
        losses = [(r["step"], r["val_loss"]) for r in self.history if r["val_loss"] is not None]
        self.best = BestModel(config, losses) if config.keep == "best" else None
        self.saver = CheckpointWriter()
        self.checkpoints = CheckpointCoordinator(config, provenance, 1, self._write_rest)

    def step(self) -> None:
        """One optimizer step, evaluated and recorded where it is due."""
        config, before = self.config, time.monotonic()
        losses: LocalLosses = self.client.train(self.model, 1, self.done)
        loss_sum = losses.loss_sum.item()
        self.clocks.add(config.batch_size * config.sequence_length, loss_sum, losses.tokens,
                        local_training_seconds=time.monotonic() - before)
        self.done += 1
        if not torch.isfinite(self.flat.vector.sum()):
            raise self._diverged("the model is no longer finite")
        train_ppl, seen = perplexity(loss_sum / losses.tokens), {}
        if self.done == 1 or self.done % config.val_freq == 0 or self.done == self.steps:
            seen = {"val_ppl": self._record()}
        self.events.add("step", step=self.done, train_ppl=train_ppl,
                        lr=scheduled_lr(config, self.done - 1, self.steps), **self.clocks.now(),
                        **seen)
        self.progress.step(self.done, train_ppl, self.clocks.tokens, seen.get("val_ppl"))

    def _record(self) -> float:
        """Evaluate, and write what is to be kept of this step; the validation perplexity."""
        config, before = self.config, time.monotonic()
        pieces = validation_pieces(self.model, self.data.validation, self.device)
        val_loss = mean_loss(pieces)
        if not math.isfinite(val_loss):
            raise self._diverged("the validation loss is not finite")
        self.clocks.add(0, 0.0, 0, evaluation_seconds=time.monotonic() - before)
        now = tracked_parameters(self.flat.views(self.flat.vector))
        cosine = None if self.last_gradient is None else float(
            torch.nn.functional.cosine_similarity(self.flat.grad, self.last_gradient, dim=0))
        self.last_gradient = self.flat.grad.clone()
        self.history.append({
            "step": self.done, "val_loss": val_loss, "val_ppl": perplexity(val_loss),
            "val_loss_halves": half_losses(pieces), **self.clocks.take_train_loss(),
            "generated": sample_text(self.model, self.data, self.device), "grad_cosine": cosine,
            "delta_norms": {k: float(((now[k] - self.start[k]) ** 2).sum() ** 0.5) for k in now},
            **self.clocks.now()})
        last_try = self.done == self.steps or self.snapshots.full
        self.snapshots.add(self.done, now)
        try:
            save_model(config.run_dir / "model.safetensors", self.flat.views(self.flat.vector))
            if self.best:
                self.best.offer(self.done, val_loss, self.flat.views(self.flat.vector))
            write_json(config.run_dir / "training_history.json", self.history)
            self.snapshots.write()
        except OSError as error:  # a full disk: the next evaluation tries again
            if last_try:
                raise
            log(f"step {self.done} could not be written to {config.run_dir} ({error.strerror}); "
                "training continues", WARNING)
        return perplexity(val_loss)

    def _diverged(self, what: str) -> Diverged:
        path = self.config.run_dir / "model.safetensors"
        kept = f"; the last good model is in {path}" if path.exists() else ""
        return Diverged(f"step {self.done}: {what}: --lr {self.config.lr:g} may be too large{kept}")

    def _write_rest(self) -> None:
        self.snapshots.write()
        self.events.write()

    def save(self) -> None:
        """Begin a checkpoint of this step."""
        gradient = {} if self.last_gradient is None else {"last_gradient": self.last_gradient}
        folder = folder_of(self.config.run_dir, self.done)
        self.checkpoints.begin(self.done, {"history": self.history.copy(),
                                           "clocks": self.clocks.state()})
        self.saver.begin(folder, self.done, {GLOBAL: {"model": self.flat.vector} | gradient,
                                             client_file(0): self.client.state()})

    def commit(self, wait: bool = False) -> None:
        """Finish the checkpoint whose tensors are written, if there is one."""
        for commit in self.checkpoints.collect([{"saved": self.saver.written(wait)}]):
            commit()

    def _load(self, checkpoint: Checkpoint) -> None:
        state, tensors = checkpoint.server, checkpoint.tensors(GLOBAL)
        self.done, self.history = checkpoint.step, state["history"]
        self.clocks.load_state(state["clocks"])
        self.flat.vector.copy_(tensors["model"])
        if "last_gradient" in tensors:
            self.last_gradient = tensors["last_gradient"].to(self.device)
        self.client.load_state(checkpoint.tensors(client_file(0)))
        write_json(self.config.run_dir / "training_history.json", self.history)

    def close(self, stop: str) -> None:
        """Wait until all is written, and say how the run stands."""
        self.commit(wait=True)
        self.close_records()
        write_outcome(self.config.run_dir, "stopped" if stop else "finished", self.done, stop)

    def close_records(self) -> None:
        """What is told of the run ends here."""
        self.events.add("end", **self.clocks.now())
        self.events.close()
        self.progress.close()


def train_central(config: CentralConfig, data: TokenData, device: torch.device, stopping: StopRequest,
        provenance: dict[str, Any], checkpoint: Checkpoint | None = None) -> str:
    """Train for all epochs or `rounds` optimizer steps, evaluating every `val_freq` of them.

    A record's `grad_cosine` is the cosine between the gradient of this step and the one of the
    record before; `delta_norms` are Frobenius norms of the change since the start. Returns who
    asked for an end before the last step; empty after it. Raises Diverged.
    """
    training = Training(config, data, device, provenance, checkpoint)
    stop = ""
    while training.done < training.steps and not stop:
        try:
            training.step()
        except Diverged:
            training.close_records()
            raise
        training.commit()
        if lost := stopping.lost_folder():
            raise FolderLost(lost)
        if training.done < training.steps:
            stop = stopping.asked_by()
        if stop or training.checkpoints.due(training.done, last=training.done >= training.steps):
            training.save()
    training.close(stop)
    if stop:
        stopping.obeyed()
    return stop and f"{stop}, after step {training.done}"
