"""The plan of a round: what the server decides and every rank acts on."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fedrun.config import FederatedConfig
from fedrun.data.shards import contiguous_shards, split_holdout
from fedrun.fisher import gradient_bound
from fedrun.optimizer import update_bound


@dataclass(frozen=True)
class Plan:
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
class Verdict:
    """What the server decides after local training, when all ranks have reported; JSON-able."""

    error: str = ""
    """Why all ranks end here, with this round lost."""
    stop: str = ""
    """Who asked for an end: this round is the last, and a checkpoint is made of it."""


class Shards:
    """Who owns which sequences of the train split: what a client trains on, what it holds out."""

    def __init__(self, config: FederatedConfig, n_sequences: int) -> None:
        whole = contiguous_shards(n_sequences, config.num_clients)
        fraction = config.strategy.holdout
        parts = [split_holdout(shard, fraction) for shard in whole]
        self.train = [train for train, _ in parts]
        self.holdout = [held for _, held in parts]
        for client, held in enumerate(self.holdout):
            if fraction and not held:
                raise ValueError(f"--entropy_holdout {fraction:g}: nothing of client {client}'s "
                                 f"shard of {len(whole[client])} sequences is held out; accepted "
                                 f"here is {1 / len(whole[client]):.2g} or more")

    @property
    def sizes(self) -> list[int]:
        """Sequences that each client trains on."""
        return [len(shard) for shard in self.train]


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
            raise ValueError(
                f"--local_updates {config.local_updates}: a round takes {each} sequences of every "
                f"client (--batch_size {config.batch_size} each update), but a shard has "
                f"{smallest}; accepted is up to {smallest // config.batch_size}")
        self.rounds = config.rounds or config.n_epochs * self.rounds_per_epoch

    def plan(self, number: int, reference: float, save: bool = False) -> Plan:
        """The plan of round `number`, counted from 1."""
        config = self.config
        in_epoch = (number - 1) % max(self.rounds_per_epoch, 1)
        every_round = config.sync == "round"
        # Clients that are not brought back move on from where they were, and so does the global
        # model, their mean: twice the way of a client lies between them at most.
        ways = 1 if every_round else 2 * (in_epoch + 1)
        length = config.sequence_length
        weights = config.strategy.plan_weights(
            [n * length for n in self.shard_sizes],
            config.local_updates * config.batch_size * (length - 1))
        return Plan(number, list(range(config.num_clients)), weights,
                    bound=update_bound(config, ways * config.local_updates),
                    gradient_bound=gradient_bound(config.strategy, config.batch_size, length),
                    reference=reference,
                    start_from_global=every_round or in_epoch == 0,
                    evaluate=number == 1 or number % config.val_freq == 0 or number == self.rounds,
                    save=save,
                    last=number == self.rounds)
