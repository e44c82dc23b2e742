"""Aggregators that keep the single updates of a round until all clients have trained.

    aggregator.expect(turns)
    for client in mine:
        aggregator.keep(client, update, weight)
    aggregator.reduce()                        # workers <-> workers
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

from torch import Tensor

from fedrun.aggregation.exact import ExactAggregator


class KeepingAggregator(ExactAggregator):
    """Keeps the updates of a worker's clients, which its `reduce` makes the sum of."""

    rows: Sequence[Tensor]
    """The memory of the updates."""
    kept: set[int]
    """The clients of this worker whose updates are kept, in this round."""
    used: dict[int, float]
    """What the last round used of each client's update, or of its weight; of this worker's clients
    at least."""

    @abstractmethod
    def expect(self, turns: Sequence[Sequence[int]]) -> None:
        """A round begins. turns: the clients that each worker trains in it."""

    @abstractmethod
    def keep(self, client: int, update: Tensor, weight: float) -> None:
        """Keep a client's update, (size,), whose elements are within the round's bound."""
