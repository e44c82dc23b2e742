"""FedMedian: in every element, the global model moves by the median of the clients' updates.

    w_j <- w_j + median_k d_kj

Yin, Chen, Ramchandran & Bartlett (2018), "Byzantine-Robust Distributed Learning: Towards Optimal
Statistical Rates", definition 1. Of an even number of clients it is the mean of the two in the
middle. Unweighted. It holds while fewer than half of the clients are wrong.
"""

from __future__ import annotations

from dataclasses import dataclass

from fedrun.strategies.robust import Robust


@dataclass(frozen=True)
class FedMedian(Robust):
    """The median of the clients' updates, element by element, which fewer than half cannot move
    far."""

    def trimmed(self, clients: int) -> int:
        return (clients - 1) // 2
