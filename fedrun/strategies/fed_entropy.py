"""FedEntropy: clients whose trained model is surer of its predictions weigh more.

    w <- w + sum_k a_k d_k,   a = softmax(-H / T) over the cohort

H_k is the mean predictive entropy, in nats a token, of client k's trained model on a part of its
shard that is never trained on. Terms stream, so the softmax is divided out at the end: a client
adds exp((H_ref - H_k) / T) d_k, where H_ref is last round's soft minimum of the entropies, around
which the sum of the weights is one. (A method of 2022 is called FedEntropy too; it selects clients
by the entropy of their averaged labels, and ours selects none.)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from fedrun.common.errors import InputError, require
from fedrun.strategies.base import ClientReport, ServerRound, Strategy

if TYPE_CHECKING:
    from torch import Tensor

SMALLEST_TOTAL = 2.0**-16  # below it, too few bits of the exact sum are left for the updates


@dataclass(frozen=True)
class FedEntropy(Strategy):
    """Weights by certainty: a softmax over the negative entropies of the clients' predictions."""

    temperature: float = 1.0
    """Temperature T of the softmax over -H, in nats: small ones prefer the surest clients, large
    ones weigh all alike."""
    entropy_batches: int = 5
    """At most so many batches of the holdout are evaluated."""
    entropy_holdout: float = 0.1
    """Fraction of a client's shard that is kept for its entropy and never trained on."""

    weight_headroom: ClassVar[int] = 20

    def __post_init__(self) -> None:
        require(0 < self.temperature < math.inf, "--temperature", self.temperature,
                "a number above 0")
        require(self.entropy_batches >= 1, "--entropy_batches", self.entropy_batches,
                "a whole number of at least 1")
        require(0 < self.entropy_holdout < 1, "--entropy_holdout", self.entropy_holdout,
                "a number above 0 and below 1")

    @property
    def holdout(self) -> float:
        return self.entropy_holdout

    @property
    def holdout_batches(self) -> int:
        return self.entropy_batches

    def plan_weights(self, shard_tokens: Sequence[int], round_tokens: int) -> list[float]:
        return [2.0**self.weight_headroom / len(shard_tokens)] * len(shard_tokens)

    def client_weight(self, planned: float, report: ClientReport, reference: float) -> float:
        """exp((H_ref - H_k) / T); `planned` is the largest weight that the exact sum holds."""
        assert report.entropy is not None
        exponent = (reference - report.entropy) / self.temperature
        if exponent > math.log(planned):
            raise InputError(
                f"--temperature {self.temperature:g}: an entropy of {report.entropy:.4g} nats, "
                f"{reference:.4g} in the round before, makes a weight of e^{exponent:.4g}, beyond "
                f"the grid of the exact sum; accepted here is about "
                f"{(reference - report.entropy) / math.log(planned):.2g} or more")
        return math.exp(exponent)

    def next_reference(self, entropies: Sequence[float]) -> float:
        """-T log sum_k exp(-H_k / T)."""
        lowest = min(entropies)
        return lowest - self.temperature * math.log(
            math.fsum(math.exp((lowest - h) / self.temperature) for h in entropies))

    def first_reference(self, vocab_size: int, clients: int) -> float:
        """An untrained model's predictions are close to uniform."""
        return self.next_reference([math.log(vocab_size)] * clients)

    def refuse_total(self, total: float) -> str:
        if total >= SMALLEST_TOTAL:
            return ""
        return (f"--temperature {self.temperature:g}: the clients' weights sum to {total:.2g}, too "
                "little for the grid of the exact sum, since their entropies rose by many "
                "temperatures within a round; accepted here is a larger one")

    def server_update(self, model: Tensor, state: Mapping[str, Tensor], mean: Mapping[str, Tensor],
                      context: ServerRound) -> None:
        model.add_(mean["delta"])
