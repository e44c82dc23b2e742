"""Centralised training, the baseline: one optimizer on all the data, and no aggregation."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from fedrun.client import Client, LocalLosses
from fedrun.config import CentralConfig
from fedrun.data.shards import Batches, contiguous_shards, make_batches
from fedrun.data.tokens import TokenData
from fedrun.evaluate import mean_loss, perplexity, sample_text, validation_pieces
from fedrun.history import Clocks, half_losses
from fedrun.optimizer import LocalOptimizer, scheduled_lr
from fedrun.params import FlatParams
from fedrun.rundir import save_model, save_studied, studied, write_json
from fedrun.track import Events, Progress
from fedrun.worker import new_model


class PooledClients(Client):
    """The clients of a federated run as one: a batch is the concatenation of theirs."""

    def __init__(self, shards: list[range], *args: Any) -> None:
        super().__init__(0, *args)
        each = self.config.batch_size // len(shards)
        self.parts: list[tuple[range, Batches]] = [
            (shard, make_batches(self.config.sampling, len(shard), each, self.config.seed, k))
            for k, shard in enumerate(shards)]

    def next_batch(self) -> Tensor:
        rows = [torch.from_numpy(batches.read(self.steps_done, self.sequences, shard))
                for shard, batches in self.parts]
        self.steps_done += 1
        return torch.cat(rows).to(self.flat.vector.device)


def training_client(config: CentralConfig, data: TokenData, flat: FlatParams) -> tuple[Client, int]:
    """Who trains, by --batches, and for how many steps."""
    everything = range(len(data.train))
    shards = [everything] if config.batches == "all" else contiguous_shards(
        len(data.train), config.num_clients)
    if config.batches == "one_client":
        shards = shards[:1]
    owned = range(shards[0].start, shards[-1].stop)
    epoch = int(len(owned) * config.epoch_passes) // config.batch_size
    steps = config.rounds or config.n_epochs * epoch
    if steps == 0:
        raise ValueError(f"--batch_size {config.batch_size}: there are {len(owned)} sequences to "
                         "train on; accepted is up to their number")
    optimizer = LocalOptimizer(flat, config, steps)
    if config.batches == "clients":
        return PooledClients(shards, owned, data.train, flat, config, optimizer), steps
    return Client(0, owned, data.train, flat, config, optimizer), steps


def run(config: CentralConfig, data: TokenData, device: torch.device) -> None:
    """Train for all epochs or `rounds` optimizer steps, evaluating every `val_freq` of them.

    A record's `grad_cosine` is the cosine between the gradient of this step and the one of the
    record before; `delta_norms` are Frobenius norms of the change since the start.
    """
    model = new_model(config, data.vocab_size, device)
    flat = FlatParams(model)
    client, steps = training_client(config, data, flat)
    start = studied(flat.views(flat.vector))
    history: list[dict[str, Any]] = []
    progress = Progress("step", steps)
    events = Events(config.run_dir / "events.jsonl", config)
    events.add("start", unit="step", total=steps)
    clocks = Clocks()
    last_gradient: Tensor | None = None
    for step in range(1, steps + 1):
        before = time.monotonic()
        losses: LocalLosses = client.train(model, 1, step - 1)
        loss_sum = losses.loss_sum.item()
        clocks.add(config.batch_size * config.sequence_length, loss_sum, losses.tokens,
                   local_training_seconds=time.monotonic() - before)
        if not torch.isfinite(flat.vector.sum()):
            raise RuntimeError(f"step {step}: the model is no longer finite (--lr {config.lr:g} "
                               f"may be too large); the last good one is in {config.run_dir}")
        train_ppl = perplexity(loss_sum / losses.tokens)
        val_ppl = None
        if step == 1 or step % config.val_freq == 0 or step == steps:
            before = time.monotonic()
            pieces = validation_pieces(model, data.validation, device)
            val_loss = mean_loss(pieces)
            clocks.add(0, 0.0, 0, evaluation_seconds=time.monotonic() - before)
            val_ppl = perplexity(val_loss)
            now = studied(flat.views(flat.vector))
            cosine = None if last_gradient is None else float(
                torch.nn.functional.cosine_similarity(flat.grad, last_gradient, dim=0))
            last_gradient = flat.grad.clone()
            history.append({
                "step": step, "val_loss": val_loss, "val_ppl": val_ppl,
                "val_loss_halves": half_losses(pieces), **clocks.take_train_loss(),
                "generated": sample_text(model, data, device), "grad_cosine": cosine,
                "delta_norms": {k: float(((now[k] - start[k]) ** 2).sum() ** 0.5) for k in now},
                **clocks.now()})
            save_studied(config.run_dir, step, now, start)
            save_model(config.run_dir / "model.safetensors", flat.views(flat.vector))
            write_json(config.run_dir / "training_history.json", history)
        seen = {} if val_ppl is None else {"val_ppl": val_ppl}
        events.add("step", step=step, train_ppl=train_ppl, lr=scheduled_lr(config, step - 1, steps),
                   **clocks.now(), **seen)
        progress.step(step, train_ppl, clocks.tokens, val_ppl)
    events.add("end", **clocks.now())
    events.close()
    progress.close()
