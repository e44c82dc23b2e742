"""FedTrimmedMean: in every element, the mean of the clients' updates without the F lowest and the F
highest.

    w_j <- w_j + mean of d_(F+1)j ... d_(K-F)j,  the updates of the K clients in their order

Yin, Chen, Ramchandran & Bartlett (2018), "Byzantine-Robust Distributed Learning: Towards Optimal
Statistical Rates", definition 2, with F of K in place of a share. Unweighted.
"""

from __future__ import annotations

from dataclasses import dataclass

from fedrun.strategies.robust import Robust


@dataclass(frozen=True)
class FedTrimmedMean(Robust):
    """The mean of the clients' updates, element by element, without the --byzantine lowest and as
    many of the highest."""

    def trimmed(self, clients: int) -> int:
        return self.byzantine
