"""What the ranks of a run hold in memory, by item: what plan_memory.py counts, and what does not
show there, after the code that allocates it: the states of clients in their store, copies for a
checkpoint, and what the server holds.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import psutil

from fedrun.aggregation.int4 import Int4Aggregator
from fedrun.common.errors import require
from fedrun.config import FederatedConfig, RunConfig
from fedrun.data.sites import Sites
from fedrun.federation.client_store import InMemory, OnDevice, OnDisk, kind_of_store
from fedrun.federation.placement import Placement, assign_clients
from fedrun.model.config import TransformersShape
from fedrun.model.pretrained import Pretrained
from fedrun.tools.plan_memory import (
    AVERAGED,
    CHECKPOINT,
    CLIPPED,
    DIGESTED,
    EXCHANGED,
    GLOBAL_MODEL,
    LIBRARIES,
    MASK,
    MASKED,
    OF_A_MACHINE,
    OF_SITES,
    RECEIVED,
    SERVER_MODEL,
    SERVERS,
    STATES,
    TRACKED,
    WRITTEN,
    Trains,
    Worker,
    bytes_of,
)


@dataclass(frozen=True)
class Layout:
    """The processes of a run."""

    processes: int
    machines: int
    colocated: bool
    gpu: bool
    """Whether workers compute on GPUs."""
    sites: Sites | None = None
    """Of their own, with processes and a machine for each of them, beside the server's."""

    def __post_init__(self) -> None:
        count = len(self.sites.sites) if self.sites else 1
        require(self.sites is None or (self.processes > 1 and self.workers % count == 0),
                "--processes", self.processes, f"one for the server, and as many for each of the "
                f"{count} sites: {1 + count}, {1 + 2 * count}, ...")

    @property
    def team(self) -> int:
        """Workers of a site of its own, or all."""
        return self.workers // len(self.sites.sites) if self.sites else self.workers

    @property
    def workers(self) -> int:
        return self.processes if self.colocated or self.processes == 1 else self.processes - 1

    @property
    def workers_here(self) -> int:
        """Workers on the machine with the most of them."""
        if self.sites:
            return self.team
        rest = -(-self.processes // self.machines)
        return min(self.workers, rest)

    def hosted(self, clients: int) -> int:
        """Clients of the worker with the most of them."""
        if self.sites:
            clients = max(site.clients for site in self.sites.sites)
        return max(map(len, assign_clients([1] * clients, self.team)))

    @property
    def nodes(self) -> int:
        """Groups of workers that share memory: machines, or GPUs by themselves. Without sites."""
        return self.workers if self.gpu else min(self.machines, self.workers)

    def turns(self, config: FederatedConfig) -> int:
        """Clients that a worker trains in a round, one after the other: at most, or where sites
        have their own and a cohort is drawn, if it is spread over them evenly."""
        if self.sites and config.cohort_size == config.num_clients:
            return self.hosted(config.num_clients)
        return -(-config.cohort_size // self.workers)

    def most(self, config: FederatedConfig) -> int:
        """The most clients that a worker may have to train in a round."""
        if self.sites:
            return min(config.cohort_size, self.hosted(config.num_clients))
        return Placement.of(config, self.workers).most(config.cohort_size)


@dataclass(frozen=True)
class Rank:
    """What a process holds, in bytes by item."""

    name: str
    device: Counter[str]
    """On its GPU; empty on a CPU."""
    host: Counter[str]

    @property
    def shared(self) -> int:
        """Of the host's, what the workers of a machine have together."""
        return 0 if self.device else sum(self.host[item] for item in OF_A_MACHINE)


def ranks(config: FederatedConfig, found: Worker, layout: Layout) -> list[Rank]:
    """The server, and the worker that hosts the most clients; one process may be both."""
    libraries = Counter({LIBRARIES: psutil.Process().memory_info().rss})
    device, host = of_worker(config, found, layout.hosted(config.num_clients), layout.gpu)
    if isinstance(found.aggregator, Int4Aggregator):
        together = layout.most(config) * (1 if layout.gpu else layout.workers_here)
        (device if layout.gpu else host)[EXCHANGED] = found.aggregator.exchanged_bytes(
            layout.nodes, min(config.cohort_size, together))
    server = of_server(config, found)
    if layout.sites:
        host += of_leader(config, found, layout.gpu)
        if config.checkpoint_freq is not None:
            server[OF_SITES] = bytes_of(found.kept)
        return [Rank("the server", Counter(), libraries + server),
                Rank("the first worker of a site", device, libraries + host)]
    if layout.processes == 1:
        return [Rank("the process", device, libraries + host + server)]
    worker = Rank("a worker", device, libraries + host)
    if layout.colocated:
        return [Rank("rank 0, server and worker", device, libraries + host + server), worker]
    return [Rank("the server", Counter(), libraries + server), worker]


def on_machine(found: list[Rank], layout: Layout) -> int:
    """Bytes of the host's memory on the machine of the server, or of a site where they have their
    own, all processes together."""
    if layout.sites:
        leader = found[-1]
        less = leader.shared + leader.host[MASK] + leader.host[MASKED]  # of each of the others
        return layout.team * leader.host.total() - (layout.team - 1) * less
    worker, here = found[-1], layout.workers_here
    if layout.machines > 1 and not layout.colocated:
        here = min(here, -(-layout.processes // layout.machines) - 1)
    total = here * worker.host.total() - max(0, here - 1) * worker.shared
    if len(found) == 1:
        return total
    first = found[0].host.total()
    return total + first - (worker.host.total() if layout.colocated else 0)


def of_worker(config: FederatedConfig, found: Worker, hosted: int, gpu: bool
              ) -> tuple[Counter[str], Counter[str]]:
    """On its GPU and on the host, if it hosts this many clients. On a CPU the first is empty."""
    device, host, state = found.items.copy(), Counter[str](), found.state_bytes
    kind = kind_of_store(config, hosted, gpu)
    if not config.keeps_states:
        hosted = 0
    elif kind is OnDevice:
        device[STATES] = (hosted - 1) * state
    else:  # the next one's is fetched, or the last one's stored, while a client trains
        device[STATES] = state
        host[STATES] = hosted * state if kind is InMemory else 2 * state * gpu
    if config.checkpoint_freq is not None:
        host[CHECKPOINT] = bytes_of(found.kept) + (0 if kind is OnDisk else hosted * state)
    if config.offload == "global":
        host.update({item: device.pop(item, 0) for item in (GLOBAL_MODEL, SERVERS, AVERAGED)})
    if config.save_client_deltas:
        host[TRACKED] = 4 * found.tracked_bytes  # the start, now, the change, and the file
    if gpu and config.private:  # of a client's update, or of the sum of a step, which is int64
        host[DIGESTED] = device[CLIPPED] or found.parameter_bytes
    return (+device, +host) if gpu else (Counter(), device + host)


def of_leader(config: FederatedConfig, found: Worker, gpu: bool) -> Counter[str]:
    """On the host of a site's first worker, with --secure_sum: the mask of the round's largest sum,
    made ahead if a core and the memory for it are free; and from a GPU what it is added to."""
    integers, bits = found.aggregator.layout
    sent = integers * bits // 8 * config.secure_sum
    return +Counter({MASK: sent, MASKED: sent * gpu})


def of_server(config: FederatedConfig, found: Worker) -> Counter[str]:
    """On the host: its model for sample texts, with gradients that it does not use, and
    `of_writing`."""
    return Counter({SERVER_MODEL: 2 * found.parameter_bytes}) + of_writing(config, found)


def of_writing(config: RunConfig, found: Trains) -> Counter[str]:
    """On the host: the copies of the model that are received and written (records/recorder.py)."""
    model, tracked = found.parameter_bytes, found.tracked_bytes
    items = Counter({TRACKED: 2 * tracked,
                     # The copy, and while it is written its file's bytes, or a snapshot's.
                     WRITTEN: model + max(model, 2 * tracked)})
    if config.rounds is None or config.rounds > 1:
        items[RECEIVED] = model
    return items


def starting_bytes(config: RunConfig, found: Trains, pretrained: Pretrained | None) -> int:
    """On the host of each process before the first step, for a moment; 0 for a model of ours from
    scratch, which takes no more than it does later."""
    if pretrained is not None:  # what was read, and the model in float32 that it is copied to
        return pretrained.stored_bytes + 4 * found.flat.size
    # With gradients: whether the library's model can be trained is tried.
    return 8 * found.flat.size if isinstance(config.model, TransformersShape) else 0
