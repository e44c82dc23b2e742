"""What an aggregation method is: a sum of client terms, then a server update.

The terms of one round are summed over the cohort; the update runs on the workers, from the same sum
to the same bits, so that nothing is sent back. A method is a frozen
dataclass: its fields are its flags (the docstring under a field is the flag's help), its two
functions `client_term` and `server_update` are its algebra. Both are **elementwise**: they are
called on matching slices of the flat vectors, small enough to stay in the cache. Nothing here knows
of processes, and nothing imports torch: tensors bring their own operations.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from torch import Tensor

ADAMW_EPS = 1e-8  # torch.optim.AdamW's default; of local training and of methods that run AdamW


@dataclass(frozen=True)
class BoundExponents:
    """The largest element of a summed vector, in powers of what is known before training:
    the furthest that local steps move a parameter, and the largest element of a gradient."""

    update: int = 0
    gradient: int = 0


# What a client can report, each as long as the model: its update d_k = w_k - w; the gradient of its
# mean loss; its Fisher diagonal; AdamW's two moments, corrected for their bias.
CLIENT_VECTORS: dict[str, BoundExponents] = {
    "delta": BoundExponents(update=1), "gradient": BoundExponents(gradient=1), "fisher": BoundExponents(gradient=2),
    "exp_avg": BoundExponents(gradient=1), "exp_avg_sq": BoundExponents(gradient=2)}


@dataclass(frozen=True)
class ClientReport:
    """What a client's weight may depend on, besides its shard."""

    tokens: int
    """Tokens in this round's losses."""
    entropy: float | None = None
    """Mean predictive entropy of the trained model on the client's holdout, in nats a token."""


@dataclass(frozen=True)
class ServerRound:
    """What a server update may depend on, besides the vectors."""

    number: int
    """The round, counted from 1."""
    lr: float = 0.0
    """--lr by its schedule, and the other settings of AdamW, for methods that run it here."""
    beta1: float = 0.9
    beta2: float = 0.999
    weight_decay: float = 0.0
    global_mean: Mapping[str, float] | None = None
    """Means over all elements of the vectors that the method asks for in `global_means`."""

    def with_global_mean(self, means: Mapping[str, float]) -> ServerRound:
        return dataclasses.replace(self, global_mean=means)


@dataclass(frozen=True)
class Strategy:
    """A method of aggregation: what is summed over the clients, and what the sum does."""

    inputs: ClassVar[tuple[str, ...]] = ("delta",)
    """The client vectors that the terms are made of: names in CLIENT_VECTORS."""
    global_means: ClassVar[tuple[str, ...]] = ()
    """Summed vectors whose mean over all elements the server update needs."""
    diagnostics: ClassVar[tuple[str, ...]] = ()
    """Names of what `counts` counts."""
    weight_headroom: ClassVar[int] = 0
    """The weights of a cohort sum to at most 2 to this power (one, where they are known ahead)."""

    @property
    def sums(self) -> Mapping[str, BoundExponents]:
        """The vectors that are summed over the cohort, each as long as the model."""
        return {"delta": BoundExponents(update=1)}

    @property
    def state(self) -> Mapping[str, float]:
        """The server's own vectors, which live on from round to round, and their first values."""
        return {}

    @property
    def holdout(self) -> float:
        """Fraction of a client's shard that is kept for its entropy and never trained on."""
        return 0.0

    @property
    def holdout_batches(self) -> int:
        """At most so many batches of it are evaluated for the client's entropy."""
        return 0

    def plan_weights(self, shard_tokens: Sequence[int], round_tokens: int) -> list[float]:
        """The part of the cohort's weights p_k that is known before training.

        shard_tokens: of each client of the cohort; round_tokens: the most that a client can train
        on in a round. `client_weight` of all clients must sum to at most 2**weight_headroom.
        """
        raise NotImplementedError(f"{type(self).__name__} has no plan_weights")

    def client_weight(self, planned: float, report: ClientReport, reference: float) -> float:
        """A client's weight after its training. Weights need not sum to one: the sum is divided by
        their sum. `reference` is what `next_reference` made of the round before. A client for
        which this raises a ValueError is left out."""
        return planned

    def next_reference(self, entropies: Sequence[float]) -> float:
        """A number for the next round's `client_weight`, from this round's entropies."""
        return 0.0

    def first_reference(self, vocab_size: int, clients: int) -> float:
        """The same for the first round."""
        return 0.0

    def refuse_total(self, total: float) -> str:
        """Why a round whose weights sum to `total` cannot be used; empty where it can."""
        return ""

    def gradient_scale(self, batch_size: int, sequence_length: int) -> float:
        """How many times as large as an element of a batch's mean gradient one may be that the
        method squares or sums; for gradients of other losses than the mean."""
        return 1.0

    def client_term(self, client: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """What a client adds to the sums, before its weight: one tensor for each name in `sums`.

        `client` holds slices of the vectors in `inputs`.
        """
        return (client["delta"],)

    def server_update(self, model: Tensor, state: Mapping[str, Tensor], mean: Mapping[str, Tensor],
                      context: ServerRound) -> None:
        """Change the global model (and `state`) in place; `mean` may be overwritten.

        `mean[name]` is sum_k p_k term_k / sum_k p_k over the clients that took part.
        """
        raise NotImplementedError(f"{type(self).__name__} has no server_update")

    def count_diagnostics(self, mean: Mapping[str, Tensor], context: ServerRound) -> Mapping[str, Tensor]:
        """Numbers of elements (0-dim) with a property that the history shows as a share of all, by
        the names in `counted`; called before `server_update`, with the same arguments."""
        return {}

    def warnings(self, local_updates: int) -> list[str]:
        """Settings that work but hardly do what was meant."""
        return []
