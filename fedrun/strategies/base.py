"""What an aggregation method is: a sum of client terms, then a server update.

The terms of one round are summed over the cohort by one collective; the update runs on every
worker, from the same sum to the same bits, so that nothing is sent back. A method is a frozen
dataclass: its fields are its flags (the docstring under a field is the flag's help), its two
functions are its algebra. Both are **elementwise**: they are called on matching slices of the flat
vectors, small enough to stay in the cache. Nothing here knows of processes, and nothing imports
torch: tensors bring their own operations.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Strategy:
    """A method of aggregation: what is summed over the clients, and what the sum does."""

    sums: ClassVar[tuple[str, ...]] = ("delta",)
    """Names of the vectors that are summed over the cohort, each as long as the model."""
    state: ClassVar[tuple[str, ...]] = ()
    """Names of the server's own vectors; they start at zero and live on from round to round."""

    def client_term(self, client: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """What a client adds to the sums, before its weight: one tensor for each name in `sums`.

        `client["delta"]` is d_k = w_k - w, the client's update against the global model.
        """
        return (client["delta"],)

    def server_update(self, model: Tensor, state: Mapping[str, Tensor], mean: Mapping[str, Tensor]
                      ) -> None:
        """Change the global model (and `state`) in place.

        `mean[name]` is sum_k p_k term_k / sum_k p_k over the clients that took part.
        """
        raise NotImplementedError(f"{type(self).__name__} has no server_update")
