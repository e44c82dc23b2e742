"""Experiments and workers of tests and benchmarks, on tokens that they bring themselves."""

from __future__ import annotations

from fedrun.config import FederatedConfig, RunConfig
from fedrun.data.tokens import TokenData
from fedrun.distributed.runtime import Runtime
from fedrun.experiment import Experiment, shards_of
from fedrun.federation.schedule import Schedule
from fedrun.federation.worker import Worker


def experiment_of(config: RunConfig, data: TokenData) -> Experiment:
    """An experiment from scratch, without a provenance."""
    return Experiment(config, data, shards_of(config, data), None, {})


def worker_of(config: FederatedConfig, data: TokenData, runtime: Runtime) -> Worker:
    """A worker as a run makes it."""
    experiment = experiment_of(config, data)
    return Worker(config, data, experiment.shards, Schedule(config, experiment.shards.sizes),
                  experiment.new_model(runtime.device), runtime)
