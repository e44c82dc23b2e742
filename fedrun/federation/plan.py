"""The plan of a round: what the server decides and every rank acts on."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from fedrun.aggregation.bounds import gradient_bound, update_bound
from fedrun.common.errors import Failure, InputError
from fedrun.config import FederatedConfig

COHORT_STREAM = 1  # the stream of random numbers that cohorts are drawn from


@dataclass(frozen=True)
class RoundPlan:
    """One round. JSON-able, since it travels over the control plane."""

    round: int
    """Counted from 1: the global step."""
    cohort: list[int]
    """The clients that train in this round."""
    weights: list[float]
    """What is known before training of each one's weight p_k."""
    bound: float
    """No element of an update is larger: the grid of the exact sum."""
    gradient_bound: float
    """No element of a gradient is larger, for methods that sum them or their squares."""
    reference: float
    """What the method made of the clients' entropies in the round before."""
    start_from_global: bool
    """Whether clients receive the global model first (always, but for --sync epoch)."""
    evaluate: bool
    """Whether to evaluate and save the global model at the end."""
    save: bool
    """Whether to begin a checkpoint at the end."""
    last: bool


@dataclass(frozen=True)
class RoundDecision:
    """What the server decides after local training, when all ranks have reported; JSON-able."""

    error: str = ""
    """Why all ranks end here, with this round lost."""
    kind: Failure = "error"
    """What kind of an end that is."""
    stop: str = ""
    """Who asked for an end: this round is the last, and a checkpoint is made of it."""


class Schedule:
    """All plans of a run, from its config and the clients' shard sizes (in sequences)."""

    def __init__(self, config: FederatedConfig, shard_sizes: list[int]) -> None:
        self.config = config
        self.shard_sizes = shard_sizes
        smallest = min(shard_sizes)
        each = config.batch_size * config.local_updates
        # In this order: --sync epoch repeats a study that rounded so.
        batches = math.ceil(smallest * config.epoch_passes) // config.batch_size
        self.rounds_per_epoch = batches // config.local_updates
        # A round may be longer than an epoch where nothing counts in epochs.
        needs_epochs = config.rounds is None or config.sync == "epoch"
        if (needs_epochs and self.rounds_per_epoch == 0) or smallest < config.batch_size:
            raise InputError(
                f"--local_updates {config.local_updates}: a round takes {each} sequences of every "
                f"client (--batch_size {config.batch_size} each update), but client "
                f"{shard_sizes.index(smallest)} has {smallest}; accepted is up to "
                f"{smallest // config.batch_size}")
        self.rounds = config.rounds or config.n_epochs * self.rounds_per_epoch

    def plan(self, number: int, reference: float, save: bool = False) -> RoundPlan:
        """The plan of round `number`, counted from 1."""
        config = self.config
        in_epoch = (number - 1) % max(self.rounds_per_epoch, 1)
        every_round = config.sync == "round"
        # Clients that are not brought back move on from where they were, and so does the global
        # model, their mean: twice the way of a client lies between them at most.
        ways = 1 if every_round else 2 * (in_epoch + 1)
        length = config.sequence_length
        cohort = self.cohort(number)
        weights = config.strategy.plan_weights(
            [self.shard_sizes[k] * length for k in cohort],
            config.local_updates * config.batch_size * (length - 1))
        return RoundPlan(number, cohort, weights,
                    bound=update_bound(ways * config.local_updates, config.lr, config.weight_decay,
                                       config.beta1, config.beta2),
                    gradient_bound=gradient_bound(config.strategy, config.batch_size, length),
                    reference=reference,
                    start_from_global=every_round or in_epoch == 0,
                    evaluate=number == 1 or number % config.val_freq == 0 or number >= self.rounds,
                    save=save,
                    last=number >= self.rounds)

    def cohort(self, number: int) -> list[int]:
        """The clients of a round, drawn without replacement, a function of (seed, round) alone."""
        clients, size = self.config.num_clients, self.config.cohort_size
        if size == clients:
            return list(range(clients))
        entropy = np.random.SeedSequence(self.config.seed, spawn_key=(COHORT_STREAM, number))
        drawn = np.random.default_rng(entropy).choice(clients, size, replace=False)
        return sorted(int(k) for k in drawn)
