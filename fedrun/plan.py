"""The plan of a round: what the server decides and every rank acts on."""

from __future__ import annotations

from dataclasses import dataclass

from fedrun.client import update_bound
from fedrun.config import FederatedConfig


@dataclass(frozen=True)
class Plan:
    """One round. JSON-able, since it travels over the control plane."""

    round: int
    """Counted from 1: the global step."""
    cohort: list[int]
    """The clients that train in this round."""
    weights: list[float]
    """p_k of each of them; they sum to one."""
    bound: float
    """No element of an update is larger: the grid of the exact sum."""
    start_from_global: bool
    """Whether clients receive the global model first (always, but for --sync epoch)."""
    evaluate: bool
    """Whether to evaluate and save the global model at the end."""
    last: bool


class Schedule:
    """All plans of a run, from its config and the clients' shard sizes (in sequences)."""

    def __init__(self, config: FederatedConfig, shard_sizes: list[int]) -> None:
        self.config = config
        self.shard_sizes = shard_sizes
        each = config.batch_size * config.local_updates
        self.rounds_per_epoch = min(shard_sizes) // each
        if self.rounds_per_epoch == 0:
            raise ValueError(
                f"--local_updates {config.local_updates}: a round takes {each} sequences of every "
                f"client (--batch_size {config.batch_size} each update), but a shard has "
                f"{min(shard_sizes)}; accepted is up to {min(shard_sizes) // config.batch_size}")
        self.rounds = config.rounds or config.n_epochs * self.rounds_per_epoch

    def plan(self, number: int) -> Plan:
        """The plan of round `number`, counted from 1."""
        config = self.config
        in_epoch = (number - 1) % self.rounds_per_epoch
        every_round = config.sync == "round"
        # Clients that are not brought back move on from where they were, and so does the global
        # model, their mean: twice the way of a client lies between them at most.
        ways = 1 if every_round else 2 * (in_epoch + 1)
        total = sum(self.shard_sizes)
        return Plan(number, list(range(config.num_clients)), [n / total for n in self.shard_sizes],
                    bound=update_bound(config, ways * config.local_updates),
                    start_from_global=every_round or in_epoch == 0,
                    evaluate=number == 1 or number % config.val_freq == 0 or number == self.rounds,
                    last=number == self.rounds)
