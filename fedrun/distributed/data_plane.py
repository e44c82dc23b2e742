"""The data plane: vectors between workers. Only this module and control_plane.py call collectives.

Between machines, and on GPUs, vectors are summed by all-reduce. Workers on the CPUs of one machine
do not send to each other: their terms lie in memory that all of them can read (shared_memory.py),
and they share one replica of the global model. Each worker sums the terms in its own section of
every vector and updates that section of the model, which moves less memory than copying the terms
to another process.

Node: the workers that share memory. Those are the workers of one machine, unless they cannot map
each other's memory; then each of them is a node of its own.

If the workers belong to several sites, a plane is that of one site, with nodes of its workers
alone, and only its first worker, the leader, sends to other sites: what it has masked before.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import pairwise
from typing import Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from fedrun.common.errors import FedrunError
from fedrun.distributed.control_plane import ControlPlane
from fedrun.distributed.shared_memory import NO_ADDRESS, SharedBuffer
from fedrun.distributed.waiting import Travelling, wait_for


class Mask(Protocol):
    """What hides a site's term, and cancels in the sum over all sites."""

    def add_to(self, vector: np.ndarray) -> None:
        """Add the mask, in place; vector: (size,), of int32 or int64."""


class DataPlane:
    """Sums over all workers, and vectors shared by the workers of a node.

    Every method is called by all workers, in the same order. A single worker communicates with
    nobody.
    """

    def __init__(self, group: dist.ProcessGroup | None = None, machine: int | None = None,
                 control: ControlPlane | None = None, of_site: bool = False) -> None:
        """group: all workers, or those of one site. machine: ID of this worker's machine; 0 if it
        cannot share memory. None on every worker (GPUs): all workers use all-reduce, and poll it.
        control: names ranks that are lost while workers wait for each other; without it their
        errors are those of torch. of_site: whether there are other sites besides."""
        self.group = group if group is not None and dist.get_world_size(group) > 1 else None
        self.worker = dist.get_rank(self.group) if self.group else 0
        """Index of this worker in the group."""
        self.workers = dist.get_world_size(self.group) if self.group else 1
        """How many there are in the group."""
        self.node_workers: tuple[int, ...] = (self.worker,)
        """The workers of this node, in order, including this one."""
        self.bytes_sent = 0
        """Payload bytes that this worker has sent in sums."""
        self.of_site = of_site
        self.leaders_group: dist.ProcessGroup | None = None
        """The group of the first workers of all sites. The caller sets it, on these alone."""
        self.masked = False
        """Whether a leader sends nothing to other sites without a mask. The caller sets it."""
        self.nodes: tuple[tuple[int, ...], ...] = tuple((w,) for w in range(self.workers))
        """The workers of each node, in order."""
        self.inter_node_group = self.group
        """The group of the node leaders. The caller sets it if it is neither all workers nor a
        single one."""
        self.machines = 1
        """On how many machines these workers are, of those that are known by an ID."""
        self.cannot_map = False
        """Whether this worker failed to map the memory of other workers on its machine."""
        self._sharing = False  # whether any node has more than one worker
        self._control = control
        self._polls = machine is None and control is not None
        if self.group and machine is not None:
            self._discover_neighbours(machine)

    def _discover_neighbours(self, machine: int) -> None:
        """Find the workers of this node: those on one machine, if each can map the memory of all
        others."""
        numbers = [number for number, in self._all_gather(machine)]
        self.machines = max(1, len({*numbers} - {0}))
        machines = [number or -1 - worker for worker, number in enumerate(numbers)]
        self._sharing = True
        self.node_workers = group_by_node(machines, [True] * len(machines))[self.worker]
        try:
            self._allocate(1, torch.uint8, self.node_workers)
        except OSError:
            self.cannot_map = True
        nodes = group_by_node(machines, [not failed for failed, in
                                         self._all_gather(int(self.cannot_map))])
        self.node_workers = nodes[self.worker]
        self.nodes = tuple(sorted(set(nodes)))
        self._sharing = len(self.node_leaders) < len(machines)
        if len(self.node_leaders) == 1:
            self.inter_node_group = None

    @property
    def node_leaders(self) -> tuple[int, ...]:
        """The first worker of each node."""
        return tuple(node[0] for node in self.nodes)

    @property
    def node(self) -> int:
        """Index of this worker's node."""
        return self.nodes.index(self.node_workers)

    @property
    def site_leader(self) -> bool:
        """Whether this is the first worker of its site, or of all if there are no sites."""
        return self.worker == 0

    @property
    def node_rank(self) -> int:
        """Index of this worker among the workers of its node."""
        return self.node_workers.index(self.worker)

    def allocate(self, size: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
        """Vectors of zeros, each (size,): one for each worker of this node, all of them visible to
        each; without shared memory only this worker's own, on `device`."""
        return self._allocate(size, dtype, self.node_workers) if self._sharing else (
            torch.zeros(size, dtype=dtype, device=device),)

    def _allocate(self, size: int, dtype: torch.dtype, creators: Sequence[int]
                  ) -> tuple[Tensor, ...]:
        """Vectors of zeros, one created by each of these workers of the node. OSError on a worker
        that cannot create or map one; the others do not wait for it."""
        failure, buffer = None, None
        try:
            buffer = SharedBuffer.create(size * dtype.itemsize) if len(self.node_workers) > 1 \
                else None
        except OSError as error:
            failure = error
        addresses = self._all_gather(*(buffer.address if buffer else NO_ADDRESS))
        try:
            if failure:
                raise failure
            if not buffer:
                return (torch.zeros(size, dtype=dtype),)
            return tuple(SharedBuffer.open(addresses[worker], size, dtype) for worker in creators)
        finally:
            self.barrier()  # all workers have mapped it
            if buffer:
                buffer.close()

    def replicated(self, vector: Tensor) -> Tensor:
        """A copy of a vector that has the same values on all workers: one copy for each node."""
        if not self._sharing:
            return vector.clone()
        copy, = self._allocate(vector.numel(), vector.dtype, self.node_workers[:1])
        self.write(copy, vector)
        return copy

    def write(self, replica: Tensor, vector: Tensor) -> None:
        """Overwrite a vector made by `replicated` with one that has the same values on all
        workers."""
        self.barrier()  # no worker reads the old values any more
        if self.node_rank == 0:
            replica.copy_(vector)
        self.barrier()

    def section(self, count: int) -> range:
        """The slice of range(count) that this worker handles for its node."""
        share = -(-count // len(self.node_workers))
        return range(count)[self.node_rank * share:(self.node_rank + 1) * share]

    def node_sections(self, count: int) -> list[range]:
        """The slice of range(count) of each node: as long as any other, or one shorter."""
        ends = [count * node // len(self.nodes) for node in range(len(self.nodes) + 1)]
        return [range(first, end) for first, end in pairwise(ends)]

    def send_sections(self, row: Tensor | None, sections: Sequence[range], senders: Sequence[bool],
                      out: Tensor) -> None:
        """Leaders of the nodes: each node that is a sender sends every node its section of a row,
        (size,). out: for this node's section of all their rows, one after the other."""
        assert self.inter_node_group is not None
        assert (row is not None) == senders[self.node]
        lengths = [len(section) for section in sections]
        sent = out[:0] if row is None else row
        work = dist.all_to_all_single(
            out, sent, [lengths[self.node] * sends for sends in senders],
            [length * senders[self.node] for length in lengths], self.inter_node_group,
            async_op=True)
        wait_for(work, self._control, self._polls)
        self.bytes_sent += sent.nbytes - sent.itemsize * lengths[self.node] * senders[self.node]

    def gather_sections(self, whole: Tensor) -> None:
        """Leaders of the nodes: each sends all others its section of a vector, of which there are
        as many as nodes, of equal lengths. Afterwards `whole`, (size,), has all of them."""
        assert self.inter_node_group is not None
        sections = whole.view(len(self.nodes), -1).unbind()
        mine = sections[self.node].clone()
        work = dist.all_gather(list(sections), mine, self.inter_node_group, async_op=True)
        wait_for(work, self._control, self._polls)
        self.bytes_sent += mine.nbytes * (len(self.nodes) - 1)

    def reduce(self, parts: Sequence[Tensor], mask: Mask | None = None) -> tuple[Tensor, ...]:
        """Sum vectors over all workers of all sites. `parts` come from `allocate`; each worker has
        filled its own. mask: on leaders; added to the sum over the site before it is sent.

        Returns buffers; their elementwise sum, in this order, is the result. Read-only until the
        next `barrier`.
        """
        parts = self._sum_in_node(parts)
        if self.inter_node_group is None and not self.of_site:
            return tuple(parts)
        if self.node_rank == 0:
            self._sum_over_groups(parts[0], self.inter_node_group, mask)
        self.barrier()
        return tuple(parts)

    def _sum_in_node(self, parts: Sequence[Tensor]) -> Sequence[Tensor]:
        """Wait until all workers of the site have filled their parts; returns those of this node,
        or their sum where other nodes or sites come in."""
        self.barrier()
        if self.inter_node_group is None and not self.of_site:
            return parts
        first, *others = parts
        mine = self.section(first.numel())
        for other in others:
            first[mine.start:mine.stop].add_(other[mine.start:mine.stop])
        self.barrier()
        return parts[:1]

    def send(self, parts: Sequence[Tensor]) -> Travelling:
        """Begin `reduce`, in a run without sites. The sum travels, by threads of the backend, until
        `receive`; meanwhile the parts must not change, and nothing else may be sent."""
        assert not self.of_site
        parts, work, began = self._sum_in_node(parts), None, time.monotonic()
        if self.inter_node_group is not None and self.node_rank == 0:
            work = dist.all_reduce(parts[0], group=self.inter_node_group, async_op=True)
        return Travelling(tuple(parts), work, began)

    def receive(self, sum_: Travelling) -> tuple[Tensor, ...]:
        """Wait for a sum that travels; returns what `reduce` does."""
        if sum_.work is not None:
            wait_for(sum_.work, self._control, self._polls, sum_.since)
            self.bytes_sent += sum_.parts[0].nbytes
        self.barrier()
        return sum_.parts

    def sum_words(self, words: Sequence[int], mask: Mask | None = None) -> list[int]:
        """Sums of integers over all workers of all sites, each modulo 2^64, from -2^63 to 2^63 - 1.
        mask: as in `reduce`."""
        vector = self._summable(torch.from_numpy(np.array(
            [word % (1 << 64) for word in words], np.uint64).view(np.int64)))
        self._sum_over_groups(vector, self.group, mask)
        return [int(word) for word in vector]

    def sum_in_site(self, words: Sequence[int]) -> list[int]:
        """Sums of integers of 64 bits, with their sign, over the workers of this site, each modulo
        2^64."""
        vector = self._summable(torch.tensor(words, dtype=torch.int64))
        if self.group is not None:
            self._all_reduce(vector)
            self.bytes_sent += vector.nbytes
        return [int(word) for word in vector]

    def _summable(self, vector: Tensor) -> Tensor:
        """A vector where the group can sum it: NCCL sums nothing but what is on a GPU. Not run on a
        GPU."""
        on_gpus = self.group is not None and dist.get_backend(self.group) != "gloo"
        return vector.cuda() if on_gpus else vector

    def _sum_over_groups(self, vector: Tensor, group: dist.ProcessGroup | None, mask: Mask | None
                         ) -> None:
        """Sum a vector over a group of this site, and then over all sites, in place."""
        if group is not None:
            self._all_reduce(vector, group=group)
            self.bytes_sent += vector.nbytes
        leads = self.of_site and self.site_leader
        assert leads == (self.leaders_group is not None)
        assert mask is None or leads
        if self.leaders_group is not None:
            if mask is not None:
                term = vector.cpu()  # the same memory, unless it is on a GPU
                mask.add_to(term.numpy())
                vector.copy_(term)
            elif self.masked:
                raise FedrunError("a sum over the sites has no mask: nothing is sent")
            # From here on the vector is one that others may read.
            self._all_reduce(vector, group=self.leaders_group)
            self.bytes_sent += vector.nbytes
        if self.of_site and group is not None:
            self._broadcast(vector, group)

    def barrier(self) -> None:
        """If any workers of the site share memory: wait until all of them have called this."""
        if self._sharing:
            self._all_reduce(torch.zeros(1))

    def probe(self, device: torch.device) -> str:
        """Workers: sum small vectors on a device in every type that rounds use.

        Returns the first type whose result is wrong; empty if all are right. The first collective
        of a group also connects its members, so most faults of a network show here.
        """
        for group in (self.group, self.leaders_group):
            if group is not None and (wrong := self._probe(group, device)):
                return wrong
        return ""

    def _probe(self, group: dist.ProcessGroup, device: torch.device) -> str:
        if device.type == "cuda":
            torch.cuda.set_device(device)  # each thread has its own
        rank, count = dist.get_rank(group), dist.get_world_size(group)
        # Of each type the largest integers, so that a sum in a narrower one is wrong.
        for dtype, bits in ((torch.int32, 30), (torch.int64, 62), (torch.float32, 23),
                            (torch.float64, 52)):
            ramp = torch.arange(1, 65, dtype=dtype) * ((1 << bits) // (64 * count))
            total = ramp * count - count * (count - 1) // 2
            found = (ramp - rank).to(device)
            self._all_reduce(found, group)
            if not torch.equal(found.cpu(), total):
                return f"the sum of {str(dtype).removeprefix('torch.')}"
        return ""

    def _all_reduce(self, vector: Tensor, group: dist.ProcessGroup | None = None) -> None:
        """Sum a vector over all workers, or over the group, in place."""
        work = dist.all_reduce(vector, group=group or self.group, async_op=True)
        wait_for(work, self._control, self._polls)

    def _broadcast(self, vector: Tensor, group: dist.ProcessGroup) -> None:
        """Send the first member's vector to all others of a group."""
        wait_for(dist.broadcast(vector, group=group, group_src=0, async_op=True), self._control,
                 self._polls)
        if dist.get_rank(group) == 0:
            self.bytes_sent += vector.nbytes

    def _all_gather(self, *numbers: int) -> list[list[int]]:
        """The numbers of every worker, in order."""
        found = [torch.zeros(len(numbers), dtype=torch.int64)
                 for _ in range(dist.get_world_size(self.group))]
        wait_for(dist.all_gather(found, torch.tensor(numbers), group=self.group, async_op=True),
                 self._control, self._polls)
        return [one.tolist() for one in found]


def group_by_node(machines: Sequence[int], maps_all: Sequence[bool]) -> list[tuple[int, ...]]:
    """For every worker, the workers of its node: all workers of its machine if each of them
    `maps_all` the others' memory, else the worker alone.

    machines: ID of each worker's machine.
    """
    same = [tuple(w for w, other in enumerate(machines) if other == machine)
            for machine in machines]
    return [node if all(maps_all[w] for w in node) else (worker,)
            for worker, node in enumerate(same)]
