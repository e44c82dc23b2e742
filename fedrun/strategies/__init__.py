"""The aggregation methods, by the name of their command. A new method is one line here."""

from __future__ import annotations

from fedrun.strategies.base import Strategy
from fedrun.strategies.fed_avg import FedAvg
from fedrun.strategies.fed_entropy import FedEntropy
from fedrun.strategies.fed_fisher import FedFisher
from fedrun.strategies.fed_geometric_median import FedGeometricMedian
from fedrun.strategies.fed_krum import FedKrum
from fedrun.strategies.fed_median import FedMedian
from fedrun.strategies.fed_momentum import DiLoCo, FedMomentum
from fedrun.strategies.fed_opt import FedAdagrad, FedAdam, FedYogi
from fedrun.strategies.fed_sgd import FedSGD
from fedrun.strategies.fed_trimmed_mean import FedTrimmedMean

STRATEGIES: dict[str, type[Strategy]] = {
    "fed_avg": FedAvg,
    "fed_momentum": FedMomentum,
    "diloco": DiLoCo,
    "fed_entropy": FedEntropy,
    "fed_fisher": FedFisher,
    "fed_adam": FedAdam,
    "fed_yogi": FedYogi,
    "fed_adagrad": FedAdagrad,
    "fed_sgd": FedSGD,
    "fed_median": FedMedian,
    "fed_trimmed_mean": FedTrimmedMean,
    "fed_krum": FedKrum,
    "fed_geometric_median": FedGeometricMedian,
}


def strategy_class(method: str) -> type[Strategy]:
    """The method of that name; KeyError where there is none."""
    return STRATEGIES[method]


__all__ = ["STRATEGIES", "FedAvg", "Strategy", "strategy_class"]
