"""FedEntropy: clients whose trained model is more certain of its predictions get more weight.

    w <- w + sum_k a_k d_k,   a = softmax(-H / T) over the cohort

H_k is the mean predictive entropy, in nats per token, of client k's trained model on a part of its
shard that it never trains on (or on the validation split: --entropy_on). Terms are added as they
come, so the softmax is normalised at the end: a client adds exp((H_ref - H_k) / T) d_k, where H_ref
is the soft minimum of the last round's entropies, which makes the weights sum to about one. (A
method of 2022 is also called FedEntropy; it selects clients by the entropy of their averaged
labels. Ours selects none.)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from fedrun.common.errors import InputError, require
from fedrun.strategies.base import ClientReport, ServerRound, Strategy

if TYPE_CHECKING:
    from torch import Tensor

SMALLEST_TOTAL = 2.0**-16  # below it, the exact sum has too few bits left for the updates


@dataclass(frozen=True)
class FedEntropy(Strategy):
    """Weights by certainty: a softmax over the negative entropies of the clients' predictions."""

    temperature: float = 1.0
    """Temperature T of the softmax over -H, in nats. A small one prefers the most certain clients,
    a large one weighs all alike."""
    entropy_batches: int = 5
    """The entropy is measured on at most this many batches."""
    entropy_on: Literal["holdout", "validation"] = "holdout"
    """Text that the entropy is measured on: what each client holds out of its own shard (holdout),
    or the validation split, the same for all (validation), from which the run's validation loss is
    then not independent. Clients train on their whole shards with validation."""
    entropy_holdout: float = 0.1
    """Fraction of a client's shard, between 0 and 1, that is held out to measure its entropy."""

    weight_headroom: ClassVar[int] = 20

    def __post_init__(self) -> None:
        require(0 < self.temperature < math.inf, "--temperature", self.temperature,
                "> 0")
        require(self.entropy_batches >= 1, "--entropy_batches", self.entropy_batches,
                "an integer >= 1")
        require(0 < self.entropy_holdout < 1, "--entropy_holdout", self.entropy_holdout,
                "in (0, 1)")

    @property
    def holdout(self) -> float:
        return self.entropy_holdout if self.entropy_on == "holdout" else 0.0

    @property
    def holdout_batches(self) -> int:
        return self.entropy_batches

    def plan_weights(self, shard_tokens: Sequence[int], round_tokens: int) -> list[float]:
        return [2.0**self.weight_headroom / len(shard_tokens)] * len(shard_tokens)

    def client_weight(self, planned: float, report: ClientReport, entropy_reference: float
                      ) -> float:
        """exp((H_ref - H_k) / T); `planned` is the largest weight that the exact sum holds."""
        assert report.entropy is not None
        exponent = (entropy_reference - report.entropy) / self.temperature
        if exponent > math.log(planned):
            raise InputError(
                f"--temperature {self.temperature:g}: an entropy of {report.entropy:.4g} nats, "
                f"{entropy_reference:.4g} in the round before, makes a weight of e^{exponent:.4g}, "
                "too large for the grid of the exact sum; must be about "
                f"{(entropy_reference - report.entropy) / math.log(planned):.2g} or more")
        return math.exp(exponent)

    def next_entropy_reference(self, entropies: Sequence[float]) -> float:
        """-T log sum_k exp(-H_k / T)."""
        lowest = min(entropies)
        return lowest - self.temperature * math.log(
            math.fsum(math.exp((lowest - h) / self.temperature) for h in entropies))

    def first_entropy_reference(self, vocab_size: int, clients: int) -> float:
        """An untrained model's predictions are close to uniform."""
        return self.next_entropy_reference([math.log(vocab_size)] * clients)

    def refuse_total(self, total: float) -> str:
        if total >= SMALLEST_TOTAL:
            return ""
        return (f"--temperature {self.temperature:g}: the clients' weights sum to {total:.2g}, too "
                "small for the grid of the exact sum, because their entropies rose by many "
                "temperatures within a round; must be larger")

    def server_update(self, model: Tensor, state: Mapping[str, Tensor], mean: Mapping[str, Tensor],
                      context: ServerRound) -> None:
        model.add_(mean["delta"])
