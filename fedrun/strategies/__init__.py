"""The aggregation methods, by the name of their command. A new method is one line here."""

from __future__ import annotations

from fedrun.strategies.base import Strategy
from fedrun.strategies.fed_avg import FedAvg

STRATEGIES: dict[str, type[Strategy]] = {
    "fed_avg": FedAvg,
}


def strategy_class(method: str) -> type[Strategy]:
    """The method of that name; KeyError where there is none."""
    return STRATEGIES[method]


__all__ = ["STRATEGIES", "FedAvg", "Strategy", "strategy_class"]
