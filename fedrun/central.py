"""Centralised training, the baseline: one client that owns all the data, and no aggregation."""

from __future__ import annotations

import time
from typing import Any

import torch

from fedrun.client import Client
from fedrun.config import RunConfig
from fedrun.data.tokens import TokenData
from fedrun.evaluate import mean_loss, perplexity, sample_text, validation_pieces
from fedrun.params import FlatParams
from fedrun.rundir import save_model, save_studied, studied, write_json
from fedrun.track import Events, Progress
from fedrun.worker import new_model


def run(config: RunConfig, data: TokenData, device: torch.device) -> None:
    """Train for all epochs or `rounds` optimizer steps, evaluating every `val_freq` of them.

    A record's `grad_cosine` is the cosine between the gradient of this step and the one of the
    record before; `delta_norms` are Frobenius norms of the change since the start.
    """
    model = new_model(config, data.vocab_size, device)
    flat = FlatParams(model)
    client = Client(0, range(len(data.train)), data.train, flat, config)
    steps = config.rounds or config.n_epochs * (len(data.train) // config.batch_size)
    start = studied(flat.views(flat.vector))
    history: list[dict[str, Any]] = []
    seconds = {"local_training_seconds": 0.0, "aggregation_seconds": 0.0, "evaluation_seconds": 0.0}
    progress, events = Progress("step", steps), Events(config.run_dir / "events.jsonl")
    began = time.monotonic()
    loss_since_record, tokens_since_record = 0.0, 0
    last_gradient: torch.Tensor | None = None
    for step in range(1, steps + 1):
        before = time.monotonic()
        losses = client.train(model, 1)
        seconds["local_training_seconds"] += time.monotonic() - before
        loss_since_record += losses.loss_sum
        tokens_since_record += losses.tokens
        if not torch.isfinite(flat.vector.sum()):
            raise RuntimeError(f"step {step}: the model is no longer finite (--lr {config.lr:g} may "
                               f"be too large); the last good one is in {config.run_dir}")
        tokens = step * config.batch_size * config.sequence_length
        train_ppl = perplexity(losses.loss_sum / losses.tokens)
        val_ppl = None
        if step == 1 or step % config.val_freq == 0 or step == steps:
            before = time.monotonic()
            val_loss = mean_loss(validation_pieces(model, data.validation, device))
            seconds["evaluation_seconds"] += time.monotonic() - before
            val_ppl = perplexity(val_loss)
            now = studied(flat.views(flat.vector))
            cosine = None if last_gradient is None else float(
                torch.nn.functional.cosine_similarity(flat.grad, last_gradient, dim=0))
            last_gradient = flat.grad.clone()
            train_loss = loss_since_record / tokens_since_record
            history.append({
                "step": step, "val_loss": val_loss, "val_ppl": val_ppl, "train_loss": train_loss,
                "train_ppl": perplexity(train_loss),
                "generated": sample_text(model, data, device), "grad_cosine": cosine,
                "delta_norms": {k: float(((now[k] - start[k]) ** 2).sum() ** 0.5) for k in now},
                "tokens": tokens, "seconds": time.monotonic() - began, **seconds})
            loss_since_record, tokens_since_record = 0.0, 0
            save_studied(config.run_dir, step, now, start)
            save_model(config.run_dir / "model.safetensors", flat.views(flat.vector))
            write_json(config.run_dir / "training_history.json", history)
        events.add("step", step=step, train_ppl=train_ppl, tokens=tokens,
                   seconds=time.monotonic() - began, **seconds)
        progress.step(step, train_ppl, tokens, val_ppl)
    events.add("end", seconds=time.monotonic() - began)
    events.close()
    progress.close()
