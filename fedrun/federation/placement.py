"""Which worker hosts which client: a pure function of the clients' work."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

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


def hosted_clients(shards: Shards, runtime: Runtime) -> list[int]:
    """The clients of this rank's worker, in order; all do the same work in a round.

    At a site: of the clients whose text is here, on the workers of the site.
    """
    own = [k for k, shard in enumerate(shards.train) if len(shard)]
    members, rank = runtime.control.membership, runtime.rank
    team = runtime.workers if members is None else members.workers_of(members.sites[rank])
    return [own[place] for place in assign_clients([1] * len(own), len(team))[team.index(rank)]]
