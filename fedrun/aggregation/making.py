"""Which aggregator a run has."""

from __future__ import annotations

from torch import Tensor

from fedrun.aggregation.base import Aggregator
from fedrun.aggregation.exact import ExactAggregator
from fedrun.aggregation.gathering import GatheringAggregator
from fedrun.aggregation.int4 import Int4Aggregator
from fedrun.aggregation.int8 import Int8Aggregator
from fedrun.aggregation.weiszfeld import WeiszfeldAggregator
from fedrun.config import FederatedConfig
from fedrun.distributed.data_plane import DataPlane
from fedrun.strategies.fed_geometric_median import FedGeometricMedian
from fedrun.strategies.robust import Robust


def make_aggregator(config: FederatedConfig, vector: Tensor, plane: DataPlane, most: int
                    ) -> Aggregator:
    """A worker's aggregator, by its method and --aggregation.

    vector: the model's, (size,); most: clients that a worker may have to train in a round.
    """
    if isinstance(config.strategy, Robust):
        return GatheringAggregator(config.strategy, len(vector), vector, most, config.cohort_size,
                                   plane)
    if isinstance(config.strategy, FedGeometricMedian):
        return WeiszfeldAggregator(config.strategy, len(vector), vector, most, plane)
    averaged = tuple(config.averaged_moments)
    if config.aggregation == "int8":
        return Int8Aggregator(config.strategy, len(vector), vector, config.cohort_size,
                              config.num_clients, plane, averaged)
    if config.aggregation == "int4":
        return Int4Aggregator(config.strategy, len(vector), vector, config.cohort_size,
                              config.num_clients, most, plane, averaged)
    return ExactAggregator(config.strategy, len(vector), vector, config.aggregation == "exact",
                           averaged, plane)
