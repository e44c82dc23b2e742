"""Which clients train in which round, with what weights, and when to evaluate and save."""

from __future__ import annotations

import math

import numpy as np

from fedrun.aggregation.bounds import gradient_bound, update_bound
from fedrun.common.errors import InputError
from fedrun.config import FederatedConfig
from fedrun.data.site_settings import require_steps
from fedrun.data.sites import Sites
from fedrun.federation.messages import RoundPlan
from fedrun.model.build import longest_side
from fedrun.privacy import client_level, example_level
from fedrun.privacy.shares import spread
from fedrun.secure import FEWEST_SITES, fewest_sites
from fedrun.training.optimizer import scheduled_lr

COHORT_STREAM = 1  # the stream of random numbers that cohorts are drawn from
BALANCED = 0  # key of the permutations that cohorts are cut from; rounds have keys from 1
LEAST_SQUARE = 0.1  # or the last round would have nearly all steps with a low rate
REDRAWN = 64  # draws of a cohort, until it has clients of three sites, or of as many as it needs


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


def round_starts(config: FederatedConfig, rounds: int) -> list[int]:
    """The first local step of each round, and last their number; empty if all rounds have as many.

    A round ends where the squares of the learning rates so far, each as a share of --lr, plus
    LEAST_SQUARE have reached its part of their sum: so its length is inverse to the square, as in
    Gu et al. (2024), "A Quadratic Synchronization Rule", arXiv:2310.14423. Steps of the warmup
    count in full: a new model moves fast.
    """
    steps = rounds * config.local_updates
    if (config.local_updates_schedule == "constant" or config.local_updates == 1
            or config.lr_schedule == "constant"):
        return []
    rates = np.fromiter((scheduled_lr(config, step, steps) for step in range(steps)), float, steps)
    rates /= config.lr
    rates[:config.warmup] = 1
    reached, before = np.cumsum(rates**2 + LEAST_SQUARE), np.arange(1, rounds)
    ends = np.searchsorted(reached, reached[-1] * before / rounds) + 1
    # With 2 local updates a step may be more than a round's part; no round is empty.
    ends = np.maximum.accumulate(ends - before) + before
    return [0, *ends.tolist(), steps]


class Schedule:
    """The plans of all rounds, from the config and the sizes of the clients' shards."""

    def __init__(self, config: FederatedConfig, shard_sizes: list[int],
                 sites: Sites | None = None) -> None:
        """shard_sizes: sequences that each client trains on. sites: who owns them, with --sites."""
        self.config = config
        self.shard_sizes = shard_sizes
        self.sites = sites
        self.rounds_per_epoch = rounds_per_epoch(config, shard_sizes)
        self.rounds = config.rounds or config.n_epochs * self.rounds_per_epoch
        self._starts = round_starts(config, self.rounds)
        require_steps(config, min(map(int.__sub__, self._starts[1:], self._starts),
                                  default=config.local_updates))
        self._muon_side = longest_side(config.model) if config.local_optimizer == "muon" else 0
        self.noise = 0.0
        """The noise multiplier of --dp."""
        if config.dp == "client":
            self.noise = client_level.multiplier(config, self.rounds)
        elif config.dp == "example":
            self.noise = example_level.multiplier(config, self.rounds, shard_sizes)
        self._fewest = fewest_sites(config.strategy.reweighted)
        self._turn = 0, list[np.ndarray]()  # the cohorts of the last one asked for, from 1

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
            self.steps(number) * config.batch_size * (length - 1))
        bound = update_bound(*self._way(number, drift), config.weight_decay, config.beta1,
                             config.beta2, self._muon_side)
        if config.dp == "client":
            assert config.dp_clip is not None
            weights = [1 / len(cohort)] * len(cohort)
            of_sum = self.noise if self.sites is None else spread(
                self.noise, len(self.sites.sites), config.dp_colluding)
            bound = client_level.update_bound(config.dp_clip, of_sum, len(cohort))
        last = number >= self.rounds
        return RoundPlan(
            number, self.steps(number), self.first_step(number), cohort, weights, bound=bound,
            gradient_bound=gradient_bound(config.strategy, config.batch_size, length),
            entropy_reference=entropy_reference,
            start_from_global=every_round or in_epoch == 0,
            evaluate=number == 1 or number % config.val_freq == 0 or last,
            save=save, last=last)

    def first_step(self, number: int) -> int:
        """The local steps before round `number` of a client that trains in every round."""
        before = max(number, 1) - 1
        return self._starts[before] if self._starts else before * self.config.local_updates

    def steps(self, number: int) -> int:
        """The local steps of each client in round `number`; none in round 0."""
        return self.first_step(number + 1) - self.first_step(number)

    def _way(self, number: int, rounds: int) -> tuple[int, float]:
        """Steps of which none exceeds a learning rate, that lead at least as far as those of this
        many rounds like round `number`."""
        config = self.config
        if not self._starts:
            return rounds * config.local_updates, config.lr
        # As rates fall so does how far a step leads: with one rate for all the grid would be coarse
        # where rounds are long. Rounded up, as all ranks shall find the same.
        total = self.rounds * config.local_updates
        way = math.fsum(scheduled_lr(config, step, total) for step in range(
            self.first_step(number), self.first_step(number + 1)))
        return rounds, config.lr * math.ceil(1024 * way / config.lr) / 1024

    def moments(self, number: int) -> tuple[str, ...]:
        """The moments that a round averages besides the updates. Round 0, before the first, is one
        that has averaged all: every client starts from them, zeros.

        Moments that are not averaged in every round are so from the second on: those of the first,
        of a model that knows nothing, mislead for rounds. In few bits all are, because they need a
        round before, whose sums say how large moments are."""
        first = 2 if self.config.sends_few_bits else 1
        return tuple(name for name, every in self.config.averaged_moments.items()
                     if number == 0 or (number >= first and (number - 2) % every == 0))

    def averages_rows(self, number: int) -> bool:
        """Whether a round averages rows (--client_moments average_rows)."""
        every = self.config.rows_every
        return every is not None and number >= 2 and (number - 2) % every == 0

    def in_epoch(self, number: int) -> int:
        """A round's place in its epoch, from 0; an epoch shorter than a round has that one."""
        return (number - 1) % max(self.rounds_per_epoch, 1)

    def cohort(self, number: int) -> list[int]:
        """The clients of a round, drawn without replacement: a function of (seed, round) alone.

        With sites, three or more, they are drawn again until three are among their owners, with
        --secure_sum or without; if that needs luck, one client of each of three sites comes first.
        A method that sums the same updates again needs more than three (`fewest_sites`).
        With --dp all train equally often: as many rounds as it takes for each client to train once
        cut one permutation of the clients into their cohorts, which is drawn again until each of
        them has clients of three sites.
        """
        clients, size = self.config.num_clients, self.config.cohort_size
        if size == clients:
            return list(range(clients))
        if self.config.private:
            turn, place = divmod(number - 1, clients // size)
            if self._turn[0] != turn + 1:
                self._turn = turn + 1, self._balanced(turn)
            return sorted(int(k) for k in self._turn[1][place])
        drawn = self._drawn(number)
        if self.sites is None or min(len(self.sites.sites), size) < self._fewest:
            return drawn
        for again in range(1, REDRAWN):
            if len(set(map(self.sites.site_of, drawn))) >= self._fewest:
                return drawn
            drawn = self._drawn(number, again)
        random = self._random(number, REDRAWN)
        chosen = random.permutation(self.sites.names)[:self._fewest]
        first = [int(random.choice(self.sites.clients_of(name))) for name in chosen]
        others = np.setdiff1d(np.arange(clients), first)
        return sorted([*first, *random.choice(others, size - len(first), replace=False).tolist()])

    def _balanced(self, turn: int) -> list[np.ndarray]:
        """The cohorts of the rounds in which all clients train once."""
        clients, size = self.config.num_clients, self.config.cohort_size
        rounds = clients // size
        cohorts = np.split(self._random(BALANCED, turn).permutation(clients), rounds)
        if self.sites is None or min(len(self.sites.sites), size) < FEWEST_SITES:
            return cohorts
        for again in range(1, REDRAWN):
            if all(self._owners(cohort) >= FEWEST_SITES for cohort in cohorts):
                return cohorts
            cohorts = np.split(self._random(BALANCED, turn, again).permutation(clients), rounds)
        return self._spread_over_sites(self._random(BALANCED, turn, REDRAWN), rounds)

    def _spread_over_sites(self, random: np.random.Generator, rounds: int) -> list[np.ndarray]:
        """Such cohorts where that needs luck: the sites deal their clients to the rounds one after
        the other, none twice to one round, until each round has clients of three sites; the others
        fill up what is left, at random. `require_fit` has seen that there are enough."""
        assert self.sites is not None
        first: list[int] = []
        for name in random.permutation(self.sites.names):
            own = random.permutation(self.sites.clients_of(str(name)))
            first += own[:min(rounds, FEWEST_SITES * rounds - len(first))].tolist()
        assert len(first) == FEWEST_SITES * rounds
        others = random.permutation(np.setdiff1d(np.arange(self.config.num_clients), first))
        dealt = [np.concatenate(pair) for pair in zip(
            (first[place::rounds] for place in range(rounds)), np.split(others, rounds),
            strict=True)]
        return [dealt[place] for place in random.permutation(rounds)]

    def _owners(self, cohort: np.ndarray) -> int:
        assert self.sites is not None
        return len({self.sites.site_of(int(client)) for client in cohort})

    def _drawn(self, *key: int) -> list[int]:
        drawn = self._random(*key).choice(self.config.num_clients, self.config.cohort_size,
                                          replace=False)
        return sorted(int(k) for k in drawn)

    def _random(self, *key: int) -> np.random.Generator:
        return np.random.default_rng(np.random.SeedSequence(
            self.config.seed, spawn_key=(COHORT_STREAM, *key)))
