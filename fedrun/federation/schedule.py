"""Which clients train in which round, with what weights, and when to evaluate and save."""

from __future__ import annotations

import math

import numpy as np

from fedrun.aggregation.bounds import gradient_bound, update_bound
from fedrun.common.errors import InputError
from fedrun.config import FederatedConfig
from fedrun.federation.messages import RoundPlan

COHORT_STREAM = 1  # the stream of random numbers that cohorts are drawn from


def rounds_per_epoch(config: FederatedConfig, shard_sizes: list[int]) -> int:
    """Rounds in an epoch, which the smallest shard (in sequences) determines; 0 if one round is
    longer. InputError if the run would have no round."""
    smallest = min(shard_sizes)
    # In this order, because --sync epoch repeats a study that rounded this way.
    batches = math.ceil(smallest * config.epoch_passes) // config.batch_size
    rounds = batches // config.local_updates
    # A round may be longer than an epoch if nothing is counted in epochs.
    needs_epochs = config.rounds is None or config.sync == "epoch"
    if (needs_epochs and rounds == 0) or smallest < config.batch_size:
        raise InputError(
            f"--local_updates {config.local_updates}: a round takes "
            f"{config.batch_size * config.local_updates} sequences of every client (--batch_size "
            f"{config.batch_size} for each update), but client {shard_sizes.index(smallest)} has "
            f"{smallest}; must be at most {smallest // config.batch_size}")
    return rounds


class Schedule:
    """The plans of all rounds, from the config and the sizes of the clients' shards."""

    def __init__(self, config: FederatedConfig, shard_sizes: list[int]) -> None:
        """shard_sizes: sequences that each client trains on."""
        self.config = config
        self.shard_sizes = shard_sizes
        self.rounds_per_epoch = rounds_per_epoch(config, shard_sizes)
        self.rounds = config.rounds or config.n_epochs * self.rounds_per_epoch

    def plan(self, number: int, entropy_reference: float, save: bool = False) -> RoundPlan:
        """The plan of round `number`, counted from 1."""
        config = self.config
        in_epoch = self.in_epoch(number)
        every_round = config.sync == "round"
        # Without a sync, clients and their mean, the global model, each drift by at most one
        # round's bound per round, so they are at most twice that apart.
        drift = 1 if every_round else 2 * (in_epoch + 1)
        length = config.sequence_length
        cohort = self.cohort(number)
        weights = config.strategy.plan_weights(
            [self.shard_sizes[k] * length for k in cohort],
            config.local_updates * config.batch_size * (length - 1))
        last = number >= self.rounds
        return RoundPlan(
            number, cohort, weights,
            bound=update_bound(drift * config.local_updates, config.lr, config.weight_decay,
                               config.beta1, config.beta2),
            gradient_bound=gradient_bound(config.strategy, config.batch_size, length),
            entropy_reference=entropy_reference,
            start_from_global=every_round or in_epoch == 0,
            evaluate=number == 1 or number % config.val_freq == 0 or last,
            save=save, last=last)

    def in_epoch(self, number: int) -> int:
        """A round's place in its epoch, from 0; an epoch shorter than a round has that one."""
        return (number - 1) % max(self.rounds_per_epoch, 1)

    def cohort(self, number: int) -> list[int]:
        """The clients of a round, drawn without replacement: a function of (seed, round) alone."""
        clients, size = self.config.num_clients, self.config.cohort_size
        if size == clients:
            return list(range(clients))
        entropy = np.random.SeedSequence(self.config.seed, spawn_key=(COHORT_STREAM, number))
        drawn = np.random.default_rng(entropy).choice(clients, size, replace=False)
        return sorted(int(k) for k in drawn)
