"""Centralised training, the baseline: one optimizer on all the data, and no aggregation."""

from __future__ import annotations

import math
import time
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedrun.common.errors import Diverged, FolderLost
from fedrun.common.perplexity import perplexity
from fedrun.data.batches import Batches, make_batches
from fedrun.distributed.stopping import StopRequest
from fedrun.experiment import Experiment
from fedrun.federation.client import Client, LocalLosses
from fedrun.records.checkpoint import GLOBAL, Checkpoint, client_file, folder_of
from fedrun.records.checkpoint_writer import CheckpointWriter
from fedrun.records.recorder import ON_ROUND, OnRound, Recorder
from fedrun.records.schema import CENTRAL
from fedrun.records.snapshots import tracked_parameters
from fedrun.training.cosines import StepCosines
from fedrun.training.evaluate import mean_loss, sample_prompt, sample_text, validation_pieces
from fedrun.training.optimizer import LocalOptimizer, scheduled_lr
from fedrun.training.outer import OuterOptimizer
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
        return self.memory.load(torch.cat(rows))


def training_client(experiment: Experiment, flat: FlatParams) -> Client:
    """Who trains, by --batches."""
    config, shards, sequences = experiment.central, experiment.shards.train, experiment.data.train
    owned = np.concatenate(shards)
    optimizer = LocalOptimizer(flat, config, experiment.length.steps)
    if config.batches == "clients":
        return PooledClients(shards, owned, sequences, flat, config, optimizer)
    return Client(0, owned, sequences, flat, config, optimizer)


class Training:
    """A central run: its model, its one client, and its recorder."""

    def __init__(self, experiment: Experiment, device: torch.device,
                 checkpoint: Checkpoint | None, on_round: OnRound | None = None) -> None:
        config = experiment.central
        self.config, self.data, self.device = config, experiment.data, device
        self.model = experiment.new_model(device)
        self.flat = FlatParams(self.model)
        self.client, self.steps = training_client(experiment, self.flat), experiment.length.steps
        self.outer = None if config.outer_every is None else OuterOptimizer(self.flat, config)
        self.last_gradient: Tensor | None = None
        """Of the last evaluated step, (size,)."""
        self.step_cosines = StepCosines(self._next_evaluated)
        self.done, state = (0, None) if checkpoint is None else (checkpoint.step, checkpoint.server)
        self.recorder = Recorder(config, CENTRAL, self.steps, self.flat, experiment.provenance, 1,
                                 self.done, state, on_round=on_round)
        if checkpoint is not None:
            self._load(checkpoint)
        self.checkpoint_writer = CheckpointWriter()

    def step(self) -> None:
        """One optimizer step, recorded, and evaluated if that is due."""
        config, before = self.config, time.monotonic()
        losses: LocalLosses = self.client.train(self.model, 1, self.done)
        loss_sum = losses.loss_sum.item()  # the step's only wait for a GPU
        if not math.isfinite(loss_sum):  # of the model that the step before has left
            raise self._diverged("the model is no longer finite")
        self.recorder.totals.add(config.batch_size * config.sequence_length, loss_sum,
                                 losses.tokens, local_training_seconds=time.monotonic() - before)
        self.done += 1
        if self.outer is not None:
            self.outer.after(self.done)
        self.step_cosines.add(self.done, self.flat.grad)
        record = self._evaluate() if self.done == self._next_evaluated(self.done) else None
        self.recorder.step(self.done, perplexity(loss_sum / losses.tokens),
                           scheduled_lr(config, self.done - 1, self.steps), record)

    def _next_evaluated(self, step: int) -> int:
        """The first step that is evaluated, from `step` on."""
        every = self.config.val_freq
        return 1 if step == 1 else min(-(-step // every) * every, self.steps)

    def _require_finite(self) -> None:
        """Raise Diverged rather than write a model that is not finite. After every step its loss
        tells as much, at the next one, without another pass over the parameters."""
        if not torch.isfinite(self.flat.vector.sum()):
            raise self._diverged("the model is no longer finite")

    def _evaluate(self) -> dict[str, Any]:
        """Evaluate the model and record it; returns the record."""
        self._require_finite()
        before = time.monotonic()
        pieces = validation_pieces(self.model, self.data.validation, self.device)
        if not math.isfinite(mean_loss(pieces)):
            raise self._diverged("the validation loss is not finite")
        self.recorder.totals.add(0, 0.0, 0, evaluation_seconds=time.monotonic() - before)
        model = self.flat.vector.to("cpu", copy=True)
        start, now = self.recorder.start, tracked_parameters(self.flat, model)
        cosine = None if self.last_gradient is None else float(
            torch.nn.functional.cosine_similarity(self.flat.grad, self.last_gradient, dim=0))
        self.last_gradient = self.flat.grad.clone()
        return self.recorder.evaluated(
            self.done, pieces, model, sample_text(self.model, self.data, self.device),
            prompt=sample_prompt(self.data).text, grad_cosine=cosine,
            grad_cosine_mean10=self.step_cosines.mean(self.done),
            delta_norms={k: float(((now[k] - start[k]) ** 2).sum() ** 0.5) for k in now})

    def _diverged(self, what: str) -> Diverged:
        self.recorder.wait()  # for the last good model, if it is still being written
        path = self.config.run_dir / "model.safetensors"
        kept = f"; the last good model is in {path}" if path.exists() else ""
        step = max(self.done, 1)
        return Diverged(f"step {step}: {what}: --lr {self.config.lr:g} may be too large{kept}")

    def save(self) -> None:
        """Start to write a checkpoint of this step. Raises Diverged."""
        self._require_finite()
        kept = {"last_gradient": self.last_gradient,
                "previous_gradient": self.step_cosines.previous}
        more = {name: gradient for name, gradient in kept.items() if gradient is not None}
        if self.outer is not None:
            more |= self.outer.state()
        folder = folder_of(self.config.run_dir, self.done)
        self.recorder.begin_checkpoint(self.done, step_cosines=self.step_cosines.state())
        self.checkpoint_writer.begin(
            folder, self.done, {GLOBAL: {"model": self.flat.vector} | more,
                                client_file(0): self.client.state()})

    def commit(self) -> None:
        """Complete the checkpoint whose tensors are written, if there is one."""
        self.recorder.commit_checkpoints([self.checkpoint_writer.written()])

    def _load(self, checkpoint: Checkpoint) -> None:
        tensors = checkpoint.tensors(GLOBAL)
        self.flat.vector.copy_(tensors["model"])
        if self.outer is not None:
            self.outer.load_state(tensors)
        if "last_gradient" in tensors:
            self.last_gradient = tensors["last_gradient"].to(self.device)
        previous = tensors.get("previous_gradient")
        # A copy, because sums over a file's bytes, which need not be aligned, may round otherwise.
        self.step_cosines.load_state(
            checkpoint.server.get("step_cosines", []),  # older checkpoints have none
            None if previous is None else previous.to(self.device, copy=True))
        self.client.load_state(checkpoint.tensors(client_file(0)))

    def close(self, stop: str) -> None:
        """Wait until everything is written, and record how the run ended."""
        self.recorder.finish(self.done, stop, [self.checkpoint_writer.written(wait=True)])


def train_central(experiment: Experiment, device: torch.device, stopping: StopRequest,
                  checkpoint: Checkpoint | None = None, on_round: OnRound | None = None) -> str:
    """Train for all epochs or `rounds` optimizer steps, evaluating every `val_freq` of them.

    In a record, `grad_cosine` is the cosine between the gradient of this step and that of the
    record before, `grad_cosine_mean10` the mean of the last ten between a step and the step before
    it, and `delta_norms` are Frobenius norms of the change since the start. Returns who asked to
    stop before the last step, or "" after it. Raises Diverged.
    """
    training = Training(experiment, device, checkpoint, on_round)
    stop = ""
    try:
        while training.done < training.steps and not stop:
            training.step()
            training.commit()
            if lost := stopping.lost_folder():
                raise FolderLost(lost)
            if training.done < training.steps:
                stop = ON_ROUND if training.recorder.stop else stopping.asked_by()
            if stop or training.recorder.checkpoint_due(training.done):
                training.save()
        training.close(stop)
    except Diverged:
        training.recorder.close()
        raise
    finally:
        training.recorder.end_thread()  # the caller releases the run's folder
        training.checkpoint_writer.close()
    if stop:
        stopping.obeyed()
    return f"{stop}, after step {training.done}" if stop else ""
