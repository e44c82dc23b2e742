"""The geometric median of a round's updates by sums alone: see strategies/fed_geometric_median.py.

A worker keeps its clients' updates until all have trained. Then each step is one sum over all
workers, of the same updates with other weights: a client's follows from its distance to the mean
that the sum before has given, which every worker has. The last mean is applied as after one sum.

A distance is taken in double precision over slices, by the one worker that trains the client, and
its weight is a whole number of grid steps: the same bits in any number of processes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fedrun.aggregation.bounds import Bounds
from fedrun.aggregation.keeping import KeepingAggregator
from fedrun.aggregation.slices import norm
from fedrun.distributed.data_plane import DataPlane
from fedrun.strategies.fed_geometric_median import SMOOTHING, FedGeometricMedian


class WeiszfeldAggregator(KeepingAggregator):
    """Keeps a round's updates until all have trained, and sums them several times."""

    def __init__(self, strategy: FedGeometricMedian, size: int, like: Tensor, most: int,
                 plane: DataPlane | None = None) -> None:
        """like: as in ExactAggregator; most: clients of a round that one worker may train."""
        super().__init__(strategy, size, like, True, (), plane)
        self.collectives = strategy.weiszfeld_steps
        self.rows = torch.empty(most, size, dtype=like.dtype, device=like.device).unbind()
        self.centre = self.plane.replicated(torch.zeros(size, dtype=like.dtype, device=like.device))
        """The mean that the last sum but one has given; one for each node."""
        self.kept = set()
        self.used = {}
        """What the last sum took of the weight of each of this worker's clients."""
        self._weights: list[tuple[int, float, Tensor]] = []  # client, planned weight, update
        self._smoothing = 0.0

    @property
    def bytes_sent(self) -> int:
        return self.collectives * super().bytes_sent

    def begin(self, bounds: Bounds, moments: Sequence[str] | None = None) -> None:
        super().begin(bounds, moments)
        self._smoothing = SMOOTHING * bounds.update * math.sqrt(self.size)

    def expect(self, turns: Sequence[Sequence[int]]) -> None:
        self.kept.clear()
        self._weights.clear()

    def keep(self, client: int, update: Tensor, weight: float) -> None:
        row = self.rows[len(self.kept)].copy_(update)
        self.kept.add(client)
        self._weights.append((client, weight, row))

    def reduce(self) -> None:
        """Workers: make the steps. Where no client is left in the first sum, there is no other."""
        for step in range(self.collectives):
            if step and not self._move_centre():
                return
            self._add_weighted(self.centre if step else None)
            super().reduce()

    def _add_weighted(self, centre: Tensor | None) -> None:
        """Begin a sum, and add this worker's clients. centre: what distances are from, (size,);
        None: zeros."""
        self._stale = True
        self.used = {}
        for client, planned, update in self._weights:
            distance = norm(update, centre)
            share = self._smoothing / max(self._smoothing, distance)
            self.used[client] = share
            # One step at least: the weights of a sum of clients are never 0.
            steps = max(1, round(planned * share * 2.0**self._bits))
            left_out = self.add({"delta": update}, steps / 2.0**self._bits)
            assert not left_out, left_out

    def _move_centre(self) -> bool:
        """Workers: let the centre be the mean of the sum. False if there is nothing in it."""
        weight = self.total_weight()
        if weight > 0:
            for _, a, b in self.slices.own():
                self.centre[a:b] = self.means(a, b, weight)[0]["delta"]
        self.plane.barrier()  # until then others read this worker's terms
        return weight > 0
