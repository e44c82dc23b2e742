"""Which worker hosts which client: a pure function of the clients' work."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

from fedrun.config import FederatedConfig
from fedrun.data.partition import Shards
from fedrun.distributed.runtime import Runtime


def assign_clients(sizes: Sequence[int], n_workers: int) -> list[list[int]]:
    """The clients of each worker, balanced by work: the largest first, to the least loaded worker.

    `sizes[k]` is the work of client k in a round: the sequences that it trains on, which do not
    depend on the size of its shard. Every rank computes the same answer. Each worker has at least
    one client, unless there are more workers than clients. Graham (1969), "Bounds on
    Multiprocessing Timing Anomalies": at most 4/3 of the best makespan.
    """
    assert n_workers >= 1
    hosted: list[list[int]] = [[] for _ in range(n_workers)]
    load = [(0, 0, worker) for worker in range(n_workers)]  # size, clients, worker
    for client in sorted(range(len(sizes)), key=lambda k: (-sizes[k], k)):
        size, count, worker = heapq.heappop(load)
        hosted[worker].append(client)
        heapq.heappush(load, (size + sizes[client], count + 1, worker))
    return [sorted(clients) for clients in hosted]


@dataclass(frozen=True)
class Placement:
    """Which worker trains which client in a round: the one that has its state, or whoever is free.
    """

    workers: int
    hosted: Sequence[Sequence[int]] | None
    """The clients of each worker; None if clients keep no state."""

    @classmethod
    def of(cls, config: FederatedConfig, workers: int) -> Placement:
        """Of a run without sites."""
        return cls(workers, assign_clients([1] * config.num_clients, workers)
                   if config.keeps_states else None)

    def turns(self, cohort: Sequence[int]) -> list[list[int]]:
        """The clients of a cohort that each worker trains, in order."""
        if self.hosted is None:
            return [list(cohort[worker::self.workers]) for worker in range(self.workers)]
        chosen = set(cohort)
        return [[client for client in clients if client in chosen] for clients in self.hosted]

    def most(self, cohort: int) -> int:
        """The most clients that a worker may have to train of a cohort of this size."""
        if self.hosted is None:
            return -(-cohort // self.workers)
        return min(cohort, max(map(len, self.hosted)))


def hosted_clients(shards: Shards, runtime: Runtime) -> list[int]:
    """The clients of this rank's worker, in order; all do the same work in a round.

    At a site: of the clients whose text is here, on the workers of the site.
    """
    own = [k for k, shard in enumerate(shards.train) if len(shard)]
    members, rank = runtime.control.membership, runtime.rank
    team = runtime.workers if members is None else members.workers_of(members.sites[rank])
    return [own[place] for place in assign_clients([1] * len(own), len(team))[team.index(rank)]]
