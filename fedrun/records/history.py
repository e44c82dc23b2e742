"""What a run's history records of a round: losses, weights, norms, times, tokens."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from fedrun.common.perplexity import perplexity
from fedrun.records.schema import SITE_VAL_PPL
from fedrun.strategies.base import ClientReport
from fedrun.training.evaluate import Piece, mean_loss

SECONDS = ("local_training_seconds", "aggregation_seconds", "evaluation_seconds")
COHORT_NUMBERS = ("step_norm", "update_cosine", "gradient_cosine", "noise_ratio",
                  "effective_clients", "avg_client_entropy", "share_under_floor",
                  SITE_VAL_PPL, "epsilon", "snr", "snr_total")
"""The entries of a record of the clients that are one number each."""


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
        """Mean loss in nats per token, and its perplexity, since the last call; nothing if no
        losses were added."""
        if self._loss_tokens == 0:
            return {}
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


@dataclass(frozen=True)
class CohortSums:
    """Sums over the clients of a round; p: their shares of the weight, |x|: the norms of their
    updates or gradients."""

    squared_shares: float
    """Sum of p^2."""
    norms: float
    """Sum of p |x|."""
    squared_norms: float
    """Sum of p^2 |x|^2."""
    mean_square: float
    """Sum of p |x|^2."""

    @classmethod
    def of(cls, shares: Sequence[float], norms: Sequence[float]) -> Self:
        """Those of clients with these shares and norms."""
        parts = [p * n for p, n in zip(shares, norms, strict=True)]
        return cls(math.fsum(p * p for p in shares), math.fsum(parts),
                   math.fsum(x * x for x in parts),
                   math.fsum(p * n * n for p, n in zip(shares, norms, strict=True)))

    def mean_cosine(self, mean_norm: float) -> float | None:
        """Mean cosine between the vectors of two clients, each pair weighted by p_i p_j |x_i|
        |x_j|; None if there is no pair.

        It is computed from norms alone, since each client's vector is dropped once it is added:
        |sum_i p_i x_i|^2 = sum_i p_i^2 |x_i|^2 + the sum over pairs.

        mean_norm: |sum_i p_i x_i|.
        """
        squares = self.squared_norms
        pairs = self.norms**2 - squares
        return (mean_norm**2 - squares) / pairs if pairs > 1e-12 * squares else None

    def record(self, measured: Mapping[str, float], gradients: bool,
               clients: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """What a record of the history holds of the round.

        measured: what the server update measured (see aggregation/update.py); gradients: whether
        clients sent gradients instead of updates; clients: more of the record.
        """
        record: dict[str, Any] = {
            "effective_clients": 1 / self.squared_shares, "step_norm": measured["step_norm"],
            **{f"share_{name}": share for name, share in measured.items()
               if name not in ("step_norm", "mean_norm")},
            **(clients or {})}
        if "mean_norm" in measured:
            mean_norm = measured["mean_norm"]
            record["gradient_cosine" if gradients else "update_cosine"] = self.mean_cosine(
                mean_norm)
            if gradients and mean_norm > 0:
                record["noise_ratio"] = self.mean_square / mean_norm**2
        return record


def cohort_record(clients: Sequence[ClientReport], measured: Mapping[str, float], gradients: bool
                  ) -> dict[str, Any]:
    """Weights, entropies, norms and cosines of one round whose clients are known, in the order of
    the cohort; the others as in `CohortSums.record`."""
    weights, norms = normalised_weights(clients), [c.norm or 0.0 for c in clients]
    own: dict[str, Any] = {}
    if any(c.entropy is not None for c in clients):
        entropies = [None if c.left_out else c.entropy for c in clients]
        known = [h for h in entropies if h is not None]
        own |= {"client_entropies": entropies, "avg_client_entropy": math.fsum(known) / len(known)}
    own["gradient_norms" if gradients else "update_norms"] = norms
    return {"client_weights": weights} | CohortSums.of(weights, norms).record(
        measured, gradients, own)
