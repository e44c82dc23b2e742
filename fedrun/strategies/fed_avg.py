"""FedAvg: the global model moves by the weighted mean of the clients' updates.

    w <- w + sum_k p_k d_k / sum_k p_k

McMahan et al. (2017), "Communication-Efficient Learning of Deep Networks from Decentralized Data",
Algorithm 1, with p_k proportional to the size of client k's shard. The sum of the weights travels
with the updates, so the mean is over the clients that took part.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from fedrun.strategies.base import ClientReport, ServerRound, Strategy

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class FedAvg(Strategy):
    """Federated averaging: clients train on their shards, the server takes the weighted mean."""

    weighting: Literal["samples", "trained", "uniform"] = "samples"
    """What a client's weight is proportional to: the tokens of its shard (samples) or those it
    trained on in the round (trained); uniform: the same weight for all."""

    def plan_weights(self, shard_tokens: Sequence[int], round_tokens: int) -> list[float]:
        clients = len(shard_tokens)
        if self.weighting == "samples":
            return [n / sum(shard_tokens) for n in shard_tokens]
        # `trained` is a weight per token. No client trains on more than round_tokens, so weights
        # that are known only after training still sum to at most one.
        each = 1 / clients if self.weighting == "uniform" else 1 / (clients * round_tokens)
        return [each] * clients

    def client_weight(self, planned: float, report: ClientReport, entropy_reference: float
                      ) -> float:
        return planned * report.tokens if self.weighting == "trained" else planned

    def server_update(self, model: Tensor, state: Mapping[str, Tensor], mean: Mapping[str, Tensor],
                      context: ServerRound) -> None:
        model.add_(mean["delta"])
