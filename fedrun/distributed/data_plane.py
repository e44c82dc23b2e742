"""The data plane: vectors between workers. With control_plane.py the only caller of collectives.

Between machines, and on GPUs, vectors travel by all-reduce. Workers on the CPUs of one machine do
not send to each other: what they sum lies where all of them can read it (shared_memory.py), and one
global model is common to them. Each takes a section of every vector, adds up the others' terms
there and updates the model there, which moves less memory than a copy to the next process would.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from fedrun.distributed.shared_memory import NOWHERE, SharedBuffer, attach


class DataPlane:
    """Sums and maxima over the workers, and vectors that those of one machine have in common.

    All workers call its methods, in the same order. On one worker nothing runs.
    """

    def __init__(self, group: dist.ProcessGroup | None = None, machine: int | None = None) -> None:
        """machine: a number of this worker's machine, 0 where it can share no memory. Without, as
        on GPUs, on every worker, all send."""
        self.group = group if group is not None and dist.get_world_size(group) > 1 else None
        self.worker = dist.get_rank(self.group) if self.group else 0
        self.node: tuple[int, ...] = (self.worker,)
        """This worker and those that share its memory."""
        self.bytes_sent = 0
        """Payload bytes that this worker has sent in sums and maxima."""
        self.node_leaders = tuple(range(dist.get_world_size(self.group) if self.group else 1))
        """The first worker of each machine, and all that share no memory."""
        self.inter_node_group = self.group
        """The group of the senders: to be set where it is neither all workers nor one alone."""
        self.cannot_map = False
        """Whether this worker failed to map the memory of others on its machine."""
        self._sharing = False  # do any workers?
        if self.group and machine is not None:
            self._discover_neighbours(machine)

    def _discover_neighbours(self, machine: int) -> None:
        """Find out who shares memory: those on one machine, if each can reach all the others."""
        machines = [number or -1 - worker
                    for worker, (number,) in enumerate(self._all_gather(machine))]
        self._sharing = True
        self.node = nodes(machines, [True] * len(machines))[self.worker]
        try:
            self._allocate(1, torch.uint8, self.node)
        except OSError:
            self.cannot_map = True
        everyone = nodes(machines, [not blind for blind, in self._all_gather(int(self.cannot_map))])
        self.node = everyone[self.worker]
        self.node_leaders = tuple(sorted({node[0] for node in everyone}))
        self._sharing = len(self.node_leaders) < len(machines)
        if len(self.node_leaders) == 1:
            self.inter_node_group = None

    @property
    def node_rank(self) -> int:
        """This worker's place among those of its machine."""
        return self.node.index(self.worker)

    def allocate(self, size: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
        """New vectors of zeros, (size,): one for each worker of this machine, which all of them
        see; where no memory is shared, this worker's alone."""
        return self._allocate(size, dtype, self.node) if self._sharing else (
            torch.zeros(size, dtype=dtype, device=device),)

    def _allocate(self, size: int, dtype: torch.dtype, makers: Sequence[int]
                  ) -> tuple[Tensor, ...]:
        """New vectors of zeros, of these workers of the machine. OSError on a worker that cannot
        make or map one; the others do not wait for it."""
        failure, offer = None, None
        try:
            offer = SharedBuffer(size * dtype.itemsize) if len(self.node) > 1 else None
        except OSError as error:
            failure = error
        addresses = self._all_gather(*(offer.address if offer else NOWHERE))
        try:
            if failure:
                raise failure
            if not offer:
                return (torch.zeros(size, dtype=dtype),)
            return tuple(attach(addresses[maker], size, dtype) for maker in makers)
        finally:
            self.barrier()  # all have it
            if offer:
                offer.close()

    def replicated(self, vector: Tensor) -> Tensor:
        """A copy of a vector that is the same on all workers: one for all workers of a machine."""
        if not self._sharing:
            return vector.clone()
        copy, = self._allocate(vector.numel(), vector.dtype, self.node[:1])
        self.write(copy, vector)
        return copy

    def write(self, common: Tensor, vector: Tensor) -> None:
        """Replace a common vector by one that is the same on all workers."""
        self.barrier()  # nobody reads it any longer
        if self.node_rank == 0:
            common.copy_(vector)
        self.barrier()

    def section(self, count: int) -> range:
        """This worker's part of so many things that its machine has to do."""
        share = -(-count // len(self.node))
        return range(count)[self.node_rank * share:(self.node_rank + 1) * share]

    def reduce(self, parts: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The sum over all workers, of `parts` that come from `allocate`, each filled by its owner.

        Returns vectors whose sum, in this order, it is. They hold until the next `barrier`: change
        them after it.
        """
        if self.group is None:
            return tuple(parts)
        self.barrier()  # all are filled
        if self.inter_node_group is None:
            return tuple(parts)
        first, *others = parts
        mine = self.section(first.numel())
        for other in others:
            first[mine.start:mine.stop].add_(other[mine.start:mine.stop])
        self.barrier()
        if self.node_rank == 0:
            dist.all_reduce(first, group=self.inter_node_group)
            self.bytes_sent += first.nbytes
        self.barrier()
        return (first,)

    def all_max(self, vector: Tensor) -> None:
        """The largest of each element over all workers, in place."""
        if self.group is not None:
            dist.all_reduce(vector, dist.ReduceOp.MAX, group=self.group)
            self.bytes_sent += vector.nbytes

    def barrier(self) -> None:
        """Where workers share memory: wait until all workers are here."""
        if self._sharing:
            dist.all_reduce(torch.zeros(1), group=self.group)

    def _all_gather(self, *numbers: int) -> list[list[int]]:
        """Every worker's numbers."""
        found = [torch.zeros(len(numbers), dtype=torch.int64)
                 for _ in range(dist.get_world_size(self.group))]
        dist.all_gather(found, torch.tensor(numbers), group=self.group)
        return [one.tolist() for one in found]


def nodes(machines: Sequence[int], reached: Sequence[bool]) -> list[tuple[int, ...]]:
    """For every worker, the workers that share its memory: all of its machine, if each of them has
    reached the others; otherwise itself."""
    same = [tuple(w for w, other in enumerate(machines) if other == machine)
            for machine in machines]
    return [node if all(reached[w] for w in node) else (worker,)
            for worker, node in enumerate(same)]
