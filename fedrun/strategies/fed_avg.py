"""FedAvg: the global model moves by the weighted mean of the clients' updates.

    w <- w + sum_k p_k d_k / sum_k p_k,   p_k = tokens of client k's shard

McMahan et al. (2017), "Communication-Efficient Learning of Deep Networks from Decentralized Data",
Algorithm 1. The weights' sum travels with the updates, so that the mean is over those who took part.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedrun.strategies.base import Strategy

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class FedAvg(Strategy):
    """Federated averaging: clients train on their shards, the server takes the weighted mean."""

    def server_update(self, model: Tensor, state: Mapping[str, Tensor], mean: Mapping[str, Tensor]
                      ) -> None:
        model.add_(mean["delta"])
