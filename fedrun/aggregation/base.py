"""What every aggregator does: add clients' terms, reduce over the workers, give the means.

    aggregator.begin(bounds)
    for client in mine:
        left_out = aggregator.add(vectors, weight, start=global_model)
    aggregator.reduce()                        # workers <-> workers
    mean, moments = aggregator.means(a, b, aggregator.total_weight())

The server update computed from the means is in update.py.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor

from fedrun.aggregation.bounds import Bounds
from fedrun.aggregation.slices import Slices
from fedrun.distributed.data_plane import DataPlane, Mask
from fedrun.distributed.waiting import Travelling


class Aggregator(ABC):
    """A weighted sum over a cohort, first over the clients of a worker, then over the workers.

    Where workers share memory, each reads the others' buffers, and nothing is sent.
    """

    collectives = 1
    """Sums over all workers that `reduce` makes."""
    moments: tuple[str, ...] = ()
    """AdamW's moments that are averaged in this round, besides the method's own sums."""
    moment_steps: Mapping[str, Tensor] = MappingProxyType({})
    """With few bits, of a run that averages moments: the next round's step of each block of theirs,
    by name. Then a client's `peaks` are asked for in every round."""
    averages: Mapping[str, Tensor] = MappingProxyType({})
    """With these: the moments' last averages, (size,) each, from which differences are sent. The
    caller sets them."""

    def __init__(self, size: int, plane: DataPlane | None, length: int, dtype: torch.dtype,
                 scratch: Tensor) -> None:
        """plane: None for a worker alone; length, dtype: of the buffer; scratch: (rows, width), one
        slice of each vector, in the model's type."""
        self.size = size
        self.plane = plane or DataPlane()
        self._scratch = scratch
        self.slices = Slices(size, scratch.shape[1], self.plane)
        self._memory = self.plane.allocate(length, dtype, scratch.device)
        self._shorten(length)
        self.masks: list[Mask | None] = []
        """With secure sums, on the first worker of a site: what hides its terms in the sums of the
        next `reduce`, in their order."""

    def _shorten(self, length: int) -> None:
        """Use this much of the memory for the round: no more is sent."""
        self._buffers = tuple(part[:length] for part in self._memory)
        self._buffer = self._buffers[self.plane.node_rank]
        self._reduced: tuple[Tensor, ...] = (self._buffer,)
        """Buffers whose elementwise sum is the sum over all workers, after `reduce`."""

    @property
    def buffer(self) -> Tensor:
        """The sum over this worker's clients so far."""
        return self._buffer

    @property
    def memory(self) -> tuple[Tensor, ...]:
        """This worker's buffers as long as any round needs them."""
        return (self._memory[self.plane.node_rank],)

    @property
    def device(self) -> torch.device:
        return self._scratch.device

    @property
    def layout(self) -> tuple[int, int]:
        """How many numbers this round's buffer holds, and the bits of each."""
        return self._buffer.numel(), 8 * self._buffer.itemsize

    @property
    def bytes_sent(self) -> int:
        """Payload of this round for a worker that sends."""
        return self._buffer.nbytes

    @property
    def bytes_received(self) -> int:
        """Payload of what comes back to it."""
        return self.bytes_sent

    @property
    def residuals(self) -> tuple[str, ...]:
        """This round's vectors of which a client keeps what it has not sent."""
        return ()

    @property
    def carried(self) -> dict[str, Tensor]:
        """What is needed of this round in the next, by name: the same on every worker."""
        return {}

    @property
    def carried_in_sections(self) -> dict[str, Tensor]:
        """More of it, (size,) each, of which every node has its own section until `complete`."""
        return {}

    def complete(self) -> None:
        """Workers, after a round: let every node have all of `carried_in_sections`."""
        assert not self.carried_in_sections, "who has some says how"

    @abstractmethod
    def begin(self, bounds: Bounds, moments: Sequence[str] | None = None) -> None:
        """Start a round whose clients stay within these bounds. moments: those that are averaged in
        it; None: all."""

    @abstractmethod
    def add(self, client: Mapping[str, Tensor], weight: float, start: Tensor | None = None) -> str:
        """Add one client's terms, times its weight.

        client: its vectors by name, (size,) each; `parameters` stands for its update, the
        difference from `start`, the model that it started from, which may wait in the host's
        memory. Returns why the client is left out, with nothing of it added, if an element is not
        finite or exceeds its bound; empty otherwise.
        """

    def reduce(self) -> None:
        """Workers: sum over all of them."""
        mask = self.masks.pop(0) if self.masks else None
        self._reduced = self.plane.reduce(self._buffers, mask)

    @abstractmethod
    def total_weight(self) -> float:
        """Sum of the weights of the clients that were not left out, over all workers."""

    @abstractmethod
    def means(self, a: int, b: int, weight: float) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Weighted means of elements a to b, by name, for this total weight: of the method's sums,
        and of the averaged moments. They are in scratch memory that the next call overwrites."""

    def global_means(self, weight: float) -> dict[str, float]:
        """Workers: the mean over all elements of each weighted mean that the method asks for in
        its `global_means`, by name."""
        return {}

    def _sum_over_workers(self, a: int, b: int, out: Tensor) -> Tensor:
        """Elements a to b of the buffers' sum over all workers; `out` is used if there is more than
        one buffer to add up."""
        first, *others = (part[a:b] for part in self._reduced)
        for other in others:
            first = torch.add(first, other, out=out[:b - a])
        return first


class TravellingAggregator(Aggregator):
    """One that sums once, and can do something else while the sum travels (--overlap)."""

    _travelling: Travelling | None = None

    def reduce(self) -> None:
        super().reduce()
        self.settle()

    def send(self) -> None:
        """Workers: begin `reduce`, whose sum travels while they do something else, to `receive`."""
        self._travelling = self.plane.send(self._buffers)

    def receive(self) -> None:
        """Workers: wait for a sum that travels; afterwards all is as after `reduce`, but for what
        `settle` does."""
        assert self._travelling is not None, "`send` comes first"
        self._reduced, self._travelling = self.plane.receive(self._travelling), None

    def settle(self) -> None:
        """Workers, once after the sum: draw from it what `carried` needs for the next one."""

    def total(self) -> Tensor:
        """After the sum: all of it, as long as the buffer, in memory of its own."""
        total = self._reduced[0].clone()
        for other in self._reduced[1:]:
            total.add_(other)
        return total

    def restore(self, total: Tensor) -> None:
        """Workers, after `begin` as in its round: all is as after the `receive` that brought this
        total."""
        self.plane.write(self._buffers[0], total)
        self._reduced = self._buffers[:1]
