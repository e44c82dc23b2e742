"""Which worker hosts which client: a pure function of the clients' work."""

from __future__ import annotations

import heapq
from collections.abc import Sequence


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
