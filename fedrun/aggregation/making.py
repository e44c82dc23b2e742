"""Which aggregator a run has."""

from __future__ import annotations

from torch import Tensor

from fedrun.aggregation.base import Aggregator
from fedrun.aggregation.exact import ExactAggregator
from fedrun.aggregation.int8 import Int8Aggregator
from fedrun.config import FederatedConfig
from fedrun.distributed.data_plane import DataPlane


def make_aggregator(config: FederatedConfig, vector: Tensor, plane: DataPlane) -> Aggregator:
    """A worker's aggregator, by --aggregation. vector: the model's, (size,)."""
    averaged = tuple(config.averaged_moments)
    if config.aggregation == "int8":
        return Int8Aggregator(config.strategy, len(vector), vector, config.cohort_size,
                              config.num_clients, plane, averaged)
    return ExactAggregator(config.strategy, len(vector), vector, config.aggregation == "exact",
                           averaged, plane)
