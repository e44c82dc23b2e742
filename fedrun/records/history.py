"""What a run's history records of a round: losses, weights, norms, times, tokens."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

from fedrun.common.perplexity import perplexity
from fedrun.strategies.base import ClientReport
from fedrun.training.evaluate import Piece, mean_loss

SECONDS = ("local_training_seconds", "aggregation_seconds", "evaluation_seconds")
COHORT_NUMBERS = ("step_norm", "update_cosine", "gradient_cosine", "noise_ratio",
                  "effective_clients", "avg_client_entropy", "share_under_floor")
"""The entries of a `cohort_record` that are one number each."""


class RunTotals:
    """Totals of a run so far: seconds since the start and in each kind of work, tokens, bytes
    exchanged, losses."""

    def __init__(self) -> None:
        self.began = time.monotonic()
        self.seconds = dict.fromkeys(SECONDS, 0.0)
        self.tokens = 0
        self.bytes = 0
        self._loss_sum, self._loss_tokens = 0.0, 0

    def add(self, tokens: int, loss_sum: float, loss_tokens: int, **seconds: float) -> None:
        """Add a step or round.

        tokens: seen in it. loss_sum: in nats, over `loss_tokens` predictions. seconds: by the names
        in SECONDS.
        """
        self.tokens += tokens
        self._loss_sum += loss_sum
        self._loss_tokens += loss_tokens
        for name, value in seconds.items():
            self.seconds[name] += value

    def now(self) -> dict[str, Any]:
        """The totals that every line of events.jsonl and every record holds."""
        sent = {"bytes": self.bytes} if self.bytes else {}
        return {"tokens": self.tokens, "seconds": time.monotonic() - self.began
                } | self.seconds | sent

    def state(self) -> dict[str, Any]:
        """All of it as JSON-able values, for a checkpoint. The time between this and `load_state`
        does not count."""
        kept = {name: value for name, value in vars(self).items() if name != "began"}
        return kept | {"seconds": dict(self.seconds), "elapsed": time.monotonic() - self.began}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restore a saved state."""
        vars(self).update(state)
        self.began = time.monotonic() - vars(self).pop("elapsed")

    def take_train_loss(self) -> dict[str, float]:
        """Mean loss in nats per token, and its perplexity, since the last call."""
        loss = self._loss_sum / self._loss_tokens
        self._loss_sum, self._loss_tokens = 0.0, 0
        return {"train_loss": loss, "train_ppl": perplexity(loss)}


def half_losses(pieces: Sequence[Piece]) -> list[float]:
    """Mean loss (nats per token) over the first and the second half of the validation batches, so
    that settings can be chosen on one half and reported on the other. If there is one batch, it
    counts as both halves."""
    ordered = sorted(pieces)
    middle = max(len(ordered) // 2, 1)
    halves = (ordered[:middle], ordered[middle:] or ordered)
    return [mean_loss([(i, loss, tokens) for i, (_, loss, tokens) in enumerate(half)])
            for half in halves]


def normalised_weights(clients: Sequence[ClientReport]) -> list[float]:
    """The clients' shares of the total weight, in their order; 0 for those that are left out."""
    total = math.fsum(c.weight for c in clients)
    return [c.weight / total for c in clients]


def cohort_record(clients: Sequence[ClientReport], measured: Mapping[str, float], gradients: bool
                  ) -> dict[str, Any]:
    """Weights, entropies, norms and cosines of one round.

    clients: in the order of the cohort; measured: what the server update measured (see
    aggregation/update.py); gradients: whether clients sent gradients instead of updates.
    """
    weights = normalised_weights(clients)
    record: dict[str, Any] = {
        "client_weights": weights, "effective_clients": 1 / math.fsum(p * p for p in weights),
        "step_norm": measured["step_norm"]}
    if any(c.entropy is not None for c in clients):
        entropies = [None if c.left_out else c.entropy for c in clients]
        known = [h for h in entropies if h is not None]
        record |= {"client_entropies": entropies,
                   "avg_client_entropy": math.fsum(known) / len(known)}
    record |= {f"share_{name}": share for name, share in measured.items()
               if name not in ("step_norm", "mean_norm")}
    norms = [c.norm or 0.0 for c in clients]
    record["gradient_norms" if gradients else "update_norms"] = norms
    if "mean_norm" in measured:
        mean_norm = measured["mean_norm"]
        record["gradient_cosine" if gradients else "update_cosine"] = mean_cosine(
            weights, norms, mean_norm)
        if gradients and mean_norm > 0:
            record["noise_ratio"] = math.fsum(
                p * n * n for p, n in zip(weights, norms, strict=True)) / mean_norm**2
    return record


def mean_cosine(weights: Sequence[float], norms: Sequence[float], mean_norm: float) -> float | None:
    """Mean cosine between the vectors of two clients, each pair weighted by p_i p_j |x_i| |x_j|;
    None if there is no pair.

    It is computed from norms alone, since each client's vector is dropped once it is added:
    |sum_i p_i x_i|^2 = sum_i p_i^2 |x_i|^2 + the sum over pairs.

    weights: p_i. norms: |x_i|. mean_norm: |sum_i p_i x_i|.
    """
    parts = [p * n for p, n in zip(weights, norms, strict=True)]
    squares = math.fsum(x * x for x in parts)
    pairs = math.fsum(parts) ** 2 - squares
    return (mean_norm**2 - squares) / pairs if pairs > 1e-12 * squares else None
