"""FedKrum: the mean of the updates that lie closest to their nearest others (multi-Krum).

    s_k = sum of |d_k - d_l|^2 over the K - F - 2 clients l that are closest to k
    w <- w + mean of d_k over the M clients with the lowest s_k

Blanchard, El Mhamdi, Guerraoui & Stainer (2017), "Machine Learning with Adversaries: Byzantine
Tolerant Gradient Descent", section 4, and multi-Krum of section 6.3; K >= 2 F + 3. M is K - F - 2
unless given: more than that may take a wrong one (El Mhamdi, Guerraoui & Rouault 2018, "The Hidden
Vulnerability of Distributed Learning in Byzantium"). Unweighted. Equal scores: the client with the
lower number first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from fedrun.common.errors import require
from fedrun.strategies.robust import Robust


@dataclass(frozen=True)
class FedKrum(Robust):
    """Multi-Krum: the mean of the updates that are closest to others, of which --byzantine may be
    anything."""

    krum_clients: int | None = None
    """How many updates are taken, those with the lowest scores: 1 is Krum, the
    clients of the round less --byzantine are the most. none: 2 less than that."""

    by_distance: ClassVar[bool] = True

    @property
    def fewest(self) -> int:
        return 2 * self.byzantine + 3

    def check(self, config: Any) -> None:
        super().check(config)
        most = config.cohort_size - self.byzantine
        require(self.krum_clients is None or 1 <= self.krum_clients <= most, "--krum_clients",
                self.krum_clients, f"from 1 to {most}, the clients of a round less --byzantine")

    def choose(self, distances: Sequence[Sequence[int]]) -> list[int]:
        near = len(distances) - self.byzantine - 2
        scores = [sum(sorted(row[:k] + row[k + 1:])[:near])
                  for k, row in enumerate(map(list, distances))]
        ranked = sorted(range(len(scores)), key=lambda k: (scores[k], k))
        return sorted(ranked[:min(self.krum_clients or near, len(scores) - self.byzantine)])
