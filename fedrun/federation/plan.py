"""The plan of a round: what the server decides and every rank acts on."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import numpy as np

from fedrun.aggregation.bounds import gradient_bound, update_bound
from fedrun.common.errors import Failure, InputError
from fedrun.config import FederatedConfig
from fedrun.data.batches import split_holdout
from fedrun.data.partition import client_shards
from fedrun.data.tokens import TokenData

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


class Shards:
    """Who owns which sequences of the train split: what a client trains on, what it holds out.

    Both are ascending indices of rows of `data.train`, int64, for each client.
    """

    def __init__(self, config: FederatedConfig, data: TokenData) -> None:
        whole = client_shards(data, config.num_clients, config.partition, config.alpha,
                              config.size_skew, config.seed)
        fraction = config.strategy.holdout
        parts = [split_holdout(shard, fraction) for shard in whole]
        self.train = [train for train, _ in parts]
        self.holdout = [held for _, held in parts]
        for client, (train, held) in enumerate(parts):
            size = len(train) + len(held)
            if fraction and size and not len(held):
                raise InputError(f"--entropy_holdout {fraction:g}: nothing of client {client}'s "
                                 f"shard of {size} sequences is held out; accepted here is "
                                 f"{1 / size:.2g} or more")
            if len(train) < config.batch_size:
                accepted = [f"--batch_size up to {len(train)}"] if len(train) else []
                accepted += ["a smaller --size_skew"] if config.size_skew else []
                raise InputError(f"--partition {config.partition}: client {client} would train on "
                                 f"{len(train)} sequences, fewer than a batch of "
                                 f"{config.batch_size}; accepted is "
                                 f"{', '.join([*accepted, 'fewer --num_clients'])}")

    @property
    def sizes(self) -> list[int]:
        """Sequences that each client trains on."""
        return [len(shard) for shard in self.train]

    def digest(self) -> str:
        """Hex digits that are equal on two ranks where all their shards are."""
        hashed = hashlib.sha256()
        for part in (*self.train, *self.holdout):
            hashed.update(b"%d sequences\n" % len(part))
            hashed.update(part.tobytes())
        return hashed.hexdigest()[:16]


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
