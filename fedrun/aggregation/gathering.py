"""Robust rules over the single updates of a round, which workers gather by sections.

A worker keeps the updates of its own clients, rounded once to the round's grid. Then every worker
has a section of the model's elements, and makes the rule's result there from that section of all
clients' updates. The workers of a machine read each other's memory; between machines each sends the
others their sections, and has the memory of its own section of all updates besides. The results are
put together as a sum is, so all that follows is as after one.

A rule works on integers, element by element, or chooses clients by distances that are exact sums
over the sections: the same bits in any number of processes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fedrun.aggregation.keeping import KeepingAggregator
from fedrun.aggregation.ordering import products, rounded_mean, squared_distances, trimmed_mean
from fedrun.distributed.data_plane import DataPlane
from fedrun.strategies.robust import Robust

GRID_BITS = 30
"""Bits of an update's largest element."""


class GatheringAggregator(KeepingAggregator):
    """Keeps a round's updates until all have trained, and applies a robust rule to them."""

    def __init__(self, strategy: Robust, size: int, like: Tensor, most: int, cohort: int,
                 plane: DataPlane | None = None) -> None:
        """like: as in ExactAggregator; cohort: clients that train in a round; most: how many of
        them one worker may train."""
        super().__init__(strategy, size, like, True, (), plane)
        self.rule = strategy
        self.rows = [part.view(-1, size) for part in self.plane.allocate(
            most * size, torch.int32, like.device)]
        self._nodes = self.plane.nodes
        self._ends = self.plane.node_sections(size)
        own = self._ends[self.plane.node]
        self._section: Tensor | None = None
        """This node's section of all clients' updates, where there are others."""
        if len(self._nodes) > 1:
            self._section = self.plane.replicated(torch.empty(
                cohort * len(own), dtype=torch.int32, device=like.device)).view(cohort, len(own))
        self._pieces = [range(a, min(a + self._width, own.stop))
                        for a in range(own.start, own.stop, self._width)]
        self._places: dict[int, tuple[int, int]] = {}  # client: worker, row
        self.kept = set()
        self.used = {}
        """What the last round used of each client's update: the share of its elements."""

    def expect(self, turns: Sequence[Sequence[int]]) -> None:
        self.kept.clear()
        self._places = {client: (worker, row) for worker, clients in enumerate(turns)
                        for row, client in enumerate(clients)}

    def keep(self, client: int, update: Tensor, weight: float = 1.0) -> None:
        """As in KeepingAggregator; a rule takes every client for as much."""
        worker, number = self._places[client]
        assert worker == self.plane.worker
        row = self.rows[self.plane.node_rank][number]
        scale = self.scale / 2.0 ** (self._bits - GRID_BITS)
        for whole, part in zip(row.split(self._width), update.split(self._width), strict=True):
            whole.copy_(torch.mul(part, scale).round_())
        self.kept.add(client)

    def reduce(self) -> None:
        """Workers: apply the rule, each to its section, and put the results together."""
        clients = self._taken()
        self._gather(clients)
        if self.rule.by_distance:
            chosen = [clients[place] for place in self.rule.choose(self._distances(clients))]
            self._combine_chosen(chosen)
            self.used = {client: float(client in chosen) for client in clients}
        else:
            self._combine_middle(clients)
        super().reduce()

    def _taken(self) -> list[int]:
        """Workers: the clients of the round whose updates are kept, in order."""
        cohort = sorted(self._places)
        flags = self.plane.sum_words([int(client in self.kept) for client in cohort])
        return [client for client, kept in zip(cohort, flags, strict=True) if kept]

    def _gather(self, clients: Sequence[int]) -> None:
        """Workers: let every node have its section of all these clients' updates."""
        node = self._nodes[self.plane.node]
        self._updates = {client: self.rows[node.index(worker)][row]
                         for client in clients for worker, row in [self._places[client]]
                         if worker in node}
        self._first = 0  # the element that rows begin with
        if self._section is None:
            return
        by_node = [[client for client in clients if self._places[client][0] in node]
                   for node in self._nodes]
        self._first, done, received = self._ends[self.plane.node].start, 0, dict[int, Tensor]()
        for turn in range(max(map(len, by_node))):
            senders = [turn < len(of_node) for of_node in by_node]
            here = [of_node[turn] for of_node in by_node if turn < len(of_node)]
            into = self._section[done:done + len(here)]
            if self.plane.node_rank == 0:
                mine = by_node[self.plane.node]
                own = self._updates[mine[turn]] if senders[self.plane.node] else None
                self.plane.send_sections(own, self._ends, senders, into.view(-1))
            received |= zip(here, into, strict=True)
            done += len(here)
        self._updates = received
        self.plane.barrier()  # the others of the node read what the first has received

    def _own_pieces(self) -> list[range]:
        """The elements of this worker's section, in pieces that fit the cache."""
        mine = self.plane.section(len(self._pieces))
        return self._pieces[mine.start:mine.stop]

    def _piece(self, clients: Sequence[int], piece: range) -> list[Tensor]:
        """These elements of the clients' updates."""
        return [self._updates[client][piece.start - self._first:piece.stop - self._first]
                for client in clients]

    def _distances(self, clients: Sequence[int]) -> list[list[int]]:
        """Workers: the squared distance between each two updates, exact."""
        count = 2 * len(clients)
        found = torch.zeros(count, count, dtype=torch.int64)
        for piece in self._own_pieces():
            found += products(self._piece(clients, piece)).cpu()
        summed = self.plane.sum_words(found.flatten().tolist())
        return squared_distances([summed[k * count:(k + 1) * count] for k in range(count)])

    def _combine_chosen(self, chosen: Sequence[int]) -> None:
        self._begin_result()
        for piece in self._own_pieces():
            self._write(piece, rounded_mean(self._piece(chosen, piece)))

    def _combine_middle(self, clients: Sequence[int]) -> None:
        self._begin_result()
        cut = self.rule.trimmed(len(clients))
        taken = torch.zeros(len(clients), dtype=torch.int64)
        for piece in self._own_pieces():
            mean, counts = trimmed_mean(self._piece(clients, piece), cut)
            self._write(piece, mean)
            taken += torch.stack(counts).cpu()
        shares = self.plane.sum_words(taken.tolist())
        self.used = {client: count / self.size
                     for client, count in zip(clients, shares, strict=True)}

    def _begin_result(self) -> None:
        """Zeros but for the weight: that of one, which the first worker writes."""
        buffer = self.buffer
        if self.plane.worker == 0:
            buffer[-1] = 1 << self._bits

    def _write(self, piece: range, mean: Tensor) -> None:
        self._buffer[piece.start:piece.stop] = mean << (self._bits - GRID_BITS)
