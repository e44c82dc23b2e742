"""With --overlap: a round's sum travels while the next round trains.

S_t is the mean update of round t and G_t the global model that has S_1 to S_t: the same as without
--overlap, for the same updates. While clients train in round t + 1, S_t is on its way and workers
hold G_(t-1). A client that trained in round t does not wait for S_t: it makes the server's step
with its own part of it, and starts from there,

    start_k = server_update(G_(t-1), server state, p_k d_k)        d_k, p_k: its update and weight
                                                                   in round t

and its update of round t + 1 is d_k' = w_k - start_k. A client that was not in round t, or was left
out of it, starts from G_(t-1). After its training S_t has arrived, and is applied; then S_(t+1)
sets out. So the model after round t is G_(t-1), except after the last round, which waits for its
own sum too. Two aggregators are used in turn: one sums while the other's sum travels. With int8
each has steps of its own, which follow what its own rounds have told, every other one; a client has
one residual.

Kale et al. (2025), "Eager Updates For Overlapped Communication and Computation in DiLoCo", arXiv
2502.12996. Their clients apply to a model and an outer optimizer of their own the delayed mean,
with their own part of it replaced by that of the round just trained. Where the server update is
w + S, their models are the `start_k` above: all of S_1 to S_(t-1), and p_k d_k. With momentum there
is a difference: their outer momentum is each client's, and keeps a trace of what its own parts came
early, while here it is the server's, which gets every mean once, and the client's step from it is
made for its start alone and then dropped. So a client keeps one vector instead of three.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedrun.aggregation.base import TravellingAggregator
from fedrun.aggregation.bounds import Bounds
from fedrun.aggregation.update import ServerUpdate
from fedrun.federation.client import OWN_PART, Client
from fedrun.federation.global_state import GlobalState
from fedrun.federation.messages import RoundPlan
from fedrun.records.checkpoint import GLOBAL, Checkpoint
from fedrun.strategies.base import ServerRound

SUM = "overlap.sum"  # in a checkpoint's global state
UNMOVED = {"step_norm": 0.0}  # what is measured of a round in which no sum was applied


@dataclass
class _Sent:
    """The sum that is not applied yet."""

    update: ServerUpdate
    context: ServerRound
    """Of its round."""
    arrived: bool


class Overlap:
    """A worker's part of it.

        aggregator = overlap.aggregator(number)                 # of this round
        start = overlap.start(client, in_round_before)          # for each client
        overlap.keep(client, start, weight)                     # after its training
        measured = overlap.aggregate(context, plan)             # workers <-> workers
    """

    def __init__(self, state: GlobalState, updates: Sequence[ServerUpdate]) -> None:
        """updates: two, each with an aggregator of its own."""
        self._state, self._updates = state, updates
        self._sent: _Sent | None = None

    def aggregator(self, number: int) -> TravellingAggregator:
        """What sums round `number`."""
        return _sums_of(self._updates[number % 2])

    def start(self, client: Client, in_round_before: bool) -> Tensor:
        """Where a client starts from, (shared_size,): memory of its own, that `keep` overwrites."""
        model, sent = self._state.shared, self._sent
        part = client.vectors.get(OWN_PART)
        if part is None or sent is None or not in_round_before:
            if part is None:
                part = client.vectors[OWN_PART] = torch.empty_like(client.flat.shared)
            return part.copy_(model, non_blocking=True)
        for a, b in sent.update.aggregator.slices.ranges:  # the global state may be on the host
            mine = part[a:b]
            new = torch.empty_like(mine).copy_(model[a:b], non_blocking=True)
            state = {name: torch.empty_like(mine).copy_(vector[a:b], non_blocking=True)
                     for name, vector in self._state.server.items()}
            sent.update.strategy.server_update(new, state, {"delta": mine}, sent.context)
            mine.copy_(new)
        return part

    def keep(self, client: Client, start: Tensor, weight: float) -> None:
        """Keep a client's own part of the round's mean: its weight times its update, the way from
        `start` to the worker's parameters."""
        torch.sub(client.flat.shared, start, out=start).mul_(weight)

    def aggregate(self, context: ServerRound, plan: RoundPlan) -> dict[str, float]:
        """Workers: apply the sum of the round before, and send that of this one; in the last round
        wait for it and apply it too. In rounds that are evaluated, what `ServerUpdate.apply`
        measures of the sum that was applied last."""
        measured = UNMOVED if self._sent is None else self._apply(plan.evaluate and not plan.last)
        update = self._updates[context.number % 2]
        _sums_of(update).send()
        self._sent = _Sent(update, context, arrived=False)
        if plan.last:
            measured = self._apply(plan.evaluate)
        return measured if plan.evaluate else {}

    def _apply(self, measure: bool) -> dict[str, float]:
        self._wait()
        assert self._sent is not None
        sent, self._sent = self._sent, None
        _sums_of(sent.update).settle()
        return sent.update.apply(self._state.shared, self._state.server, sent.context,
                                 measure=measure)

    def _wait(self) -> None:
        if self._sent is not None and not self._sent.arrived:
            _sums_of(self._sent.update).receive()
            self._sent.arrived = True

    # ---- checkpoints -----------------------------------------------------------------------------

    def held(self, writes: bool) -> dict[str, Tensor]:
        """Workers, after a round: wait for its sum; on one that `writes` it, what a checkpoint
        keeps besides the global state: this sum, which is not applied. None is left after the last
        round."""
        self._wait()
        if self._sent is None or not writes:
            return {}
        return {SUM: _sums_of(self._sent.update).total()}

    def load(self, checkpoint: Checkpoint, bounds: Bounds, context: ServerRound) -> None:
        """Workers: take what a checkpoint holds. bounds, context: of its round. There is no sum
        after the last round of a run, which may be extended."""
        tensors = checkpoint.tensors(GLOBAL)
        if SUM not in tensors:
            return
        update = self._updates[context.number % 2]
        _sums_of(update).begin(bounds)
        _sums_of(update).restore(tensors[SUM])
        self._sent = _Sent(update, context, arrived=True)


def _sums_of(update: ServerUpdate) -> TravellingAggregator:
    assert isinstance(update.aggregator, TravellingAggregator), "--overlap refuses the others"
    return update.aggregator
