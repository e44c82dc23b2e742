"""How much of each client's update a round used, where a clip or a robust rule takes less than all.

The server records it: in the round's event of every client, and in the history's records since the
one before.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from fedrun.federation.messages import RoundReport
from fedrun.strategies.base import ClientReport, Strategy
from fedrun.strategies.robust import Robust


def median_norm(clients: Sequence[ClientReport]) -> float:
    """The median of the norms of the updates that are not left out."""
    return statistics.median(c.norm for c in clients if c.norm is not None)


def clipped_to(clip: float | None, clients: Sequence[ClientReport]) -> list[ClientReport]:
    """The reports of clients whose updates were clipped to this norm after they reported; None:
    none was."""
    if clip is None:
        return list(clients)
    return [c if c.norm is None else replace(
        c, norm=min(c.norm, clip), clipped=c.norm > clip,
        used=1.0 if c.norm <= clip else clip / c.norm) for c in clients]


def used_by_rule(reports: Sequence[RoundReport], clients: Sequence[ClientReport],
                 strategy: Strategy) -> list[ClientReport]:
    """The reports of clients with what a robust rule used of their updates. If the rule chooses
    clients, only these have a weight. If the method weighs clients anew, `weight` is the one in its
    last sum, and `used` the share of the planned weight that this is, divided by the largest such
    share. Under other methods the reports are as they were."""
    weighs = strategy.by_distance if isinstance(strategy, Robust) else strategy.reweighted > 0
    if not weighs and not isinstance(strategy, Robust):
        return list(clients)
    found = {int(k): used for report in reports for k, used in report.used}
    if strategy.reweighted and found:
        most = max(found.values())
        found = {k: used / most for k, used in found.items()}
    return [replace(c, used=found[c.client] * (1.0 if c.used is None else c.used),
                    weight=c.weight * found[c.client] if weighs else c.weight)
            if c.client in found else c for c in clients]


class UseLog:
    """Takes in each round's reports, and keeps them to the next record of the history."""

    def __init__(self) -> None:
        self._clients: dict[int, tuple[int, float]] = {}  # rounds, and the sum of what was used
        self._clipped = 0

    def state(self) -> dict[str, Any]:
        """What a run resumes from."""
        return {"used": [[client, *found] for client, found in sorted(self._clients.items())],
                "clipped": self._clipped}

    def load(self, state: Mapping[str, Any]) -> None:
        """Restore `state`; checkpoints of older versions have none of it."""
        self._clients = {client: (rounds, used) for client, rounds, used in state.get("used", [])}
        self._clipped = state.get("clipped", 0)

    def add(self, clients: Sequence[ClientReport]) -> None:
        """A round whose clients are known."""
        for client in clients:
            if client.used is not None:
                rounds, used = self._clients.get(client.client, (0, 0.0))
                self._clients[client.client] = rounds + 1, used + client.used
                self._clipped += client.clipped

    def add_clipped(self, count: int) -> None:
        """A round with sites: how many of its clients were clipped."""
        self._clipped += count

    def take(self) -> tuple[list[list[float]], int]:
        """Since the last call: of every client in whose rounds something may have been left unused,
        its number, how many rounds, and the mean of what they used of its update; and how many
        updates were clipped."""
        found = [[client, rounds, used / rounds]
                 for client, (rounds, used) in sorted(self._clients.items())]
        clipped, self._clients, self._clipped = self._clipped, {}, 0
        return found, clipped
