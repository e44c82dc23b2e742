"""Experiments of tests and benchmarks, on tokens that they bring themselves."""

from __future__ import annotations

from fedrun.config import RunConfig
from fedrun.data.tokens import TokenData
from fedrun.experiment import Experiment, shards_of


def experiment_of(config: RunConfig, data: TokenData) -> Experiment:
    """An experiment from scratch, without a provenance."""
    return Experiment(config, data, shards_of(config, data), None, {})
