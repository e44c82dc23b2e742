"""What the server knows of the clients of a round, whoever told it, and what it records of them."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from fedrun.common.log import WARNING, log
from fedrun.common.perplexity import perplexity
from fedrun.config import FederatedConfig
from fedrun.distributed.handshake import Membership
from fedrun.federation.messages import RoundPlan, RoundReport
from fedrun.federation.spending import Spending
from fedrun.federation.tail import Tail
from fedrun.federation.used import UseLog
from fedrun.records.events import cohort_event
from fedrun.records.history import cohort_record, half_losses
from fedrun.records.schema import CLIENTS_HALVES, CLIENTS_LOSS, CLIENTS_VAL_LOSS
from fedrun.strategies.base import ClientReport
from fedrun.strategies.robust import Robust
from fedrun.training.evaluate import mean_loss


@dataclass(frozen=True)
class RoundSums:
    """What the server knows of a round's clients."""

    loss_sum: float
    """In nats; of the clients in the sum, as `tokens`."""
    tokens: int
    """0 if it knows nothing of their losses."""
    event: dict[str, Any]
    """Fields of the round's line in events.jsonl."""
    record: Callable[[Mapping[str, float], bool], dict[str, Any]]
    """Makes fields of the history's record: of what the server update measured, and whether clients
    sent gradients."""


class CohortLog:
    """Takes in each round, and keeps who was left out since the last evaluation."""

    def __init__(self, config: FederatedConfig, members: Membership | None) -> None:
        """members: who takes part, if the run has several owners."""
        self.config, self.members = config, members
        self._left_out: list[list[int]] = []  # round and client, where clients are known
        self._why: list[str] = []
        self._uses = UseLog()

    def state(self) -> dict[str, Any]:
        """What a run resumes from."""
        return {"left_out": list(self._left_out), "left_out_why": list(self._why)
                } | self._uses.state()

    def load(self, state: Mapping[str, Any]) -> None:
        """Restore `state`."""
        self._left_out = state["left_out"]
        # Older checkpoints lack the reasons, because there was only one.
        self._why = state.get("left_out_why", ["not finite"] * len(self._left_out))
        self._uses.load(state)

    def of_clients(self, plan: RoundPlan, clients: list[ClientReport]) -> RoundSums:
        """A round whose clients report to the server."""
        taken = [c for c in clients if not c.left_out]
        left_out = [c for c in clients if c.left_out]
        for client in left_out:
            self._left_out.append([plan.round, client.client])
            self._why.append(client.left_out)
            log(f"round {plan.round}: client {client.client} is left out: {client.left_out}; its "
                "moments are reset", WARNING)

        self._uses.add(clients)

        def record(measured: Mapping[str, float], gradients: bool) -> dict[str, Any]:
            strategy = self.config.strategy
            if (isinstance(strategy, Robust) and not strategy.by_distance) or self.config.overlap:
                measured = _without_mean(measured)
            fields = cohort_record(clients, measured, gradients)
            if self.config.eval_clients:
                fields["client_val_ppls"] = [perplexity(mean_loss(client.validation))
                                             for client in clients]
            if self.config.eval_clients and self.config.client_holdout:
                fields["client_own_ppls"] = [perplexity(mean_loss(client.on_own))
                                             for client in clients]
            if self.config.measures_own_models:
                for name, losses in (
                        (CLIENTS_LOSS, [mean_loss(c.on_own or c.validation) for c in taken]),
                        (CLIENTS_VAL_LOSS, [mean_loss(c.validation) for c in taken])):
                    loss = statistics.fmean(losses)
                    fields[name] = loss if math.isfinite(loss) else math.inf
                fields[CLIENTS_HALVES] = [*map(statistics.fmean, zip(*(
                    half_losses(client.validation) for client in taken), strict=True))]
            return fields

        return RoundSums(math.fsum(c.loss_sum for c in taken), sum(c.tokens for c in taken), {
            "left_out": [c.client for c in left_out],
            "left_out_why": [c.left_out for c in left_out],
            "clients": cohort_event(clients)} | self._clipped(
                [c.client for c in taken if c.clipped]), record)

    def of_tail(self, plan: RoundPlan, tail: Tail) -> RoundSums:
        """A round with sites, of whose clients the server has sums."""
        left_out = sum(tail.left_out.values())
        if left_out:
            log(f"round {plan.round}: {left_out} of {len(plan.cohort)} clients are left out "
                f"({tail.reasons}); their moments are reset", WARNING)
        if tail.clamped:
            log(f"round {plan.round}: {tail.clamped} numbers of clients were too large for what is "
                "recorded of them", WARNING)
        self._why += [why for why, count in tail.left_out.items() for _ in range(count)]
        self._uses.add_clipped(tail.clipped)

        def record(measured: Mapping[str, float], gradients: bool) -> dict[str, Any]:
            if self.config.strategy.reweighted:  # with weights that leave no site
                measured = _without_mean(measured)
            return tail.sums().record(measured, gradients)

        return RoundSums(tail.loss_sum, tail.tokens, {
            "left_out": left_out, "left_out_why": tail.left_out}
            | self._clipped(tail.clipped), record)

    def _clipped(self, clients: list[int] | int) -> dict[str, Any]:
        """Fields of an event: whose updates were clipped, or of how many clients."""
        return {} if self.config.client_clip is None else {"clipped": clients}

    def of_private(self, spending: Spending, plan: RoundPlan, reports: list[RoundReport],
                   clients: list[ClientReport], model: Tensor | None) -> RoundSums:
        """A round with --dp client, of whose clients the server has nothing, or with --dp example,
        of whose clients it has no losses, with sites in sums. model: the global one, (size,), if it
        was evaluated."""
        charged = {"": any(report.charged for report in reports)}
        if self.members is not None:
            charged = {name: reports[rank].charged for name, rank in self.members.leaders.items()}
        spending.charge(plan, charged)
        sums = RoundSums(0.0, 0, {}, lambda *_: {})
        norms = [client.noised_norm for client in clients if client.noised_norm is not None]
        if clients:
            sums = self.of_clients(plan, clients)
        elif words := next((report.tail for report in reports if report.tail), []):
            tail = Tail.from_words(words)
            sums, norms = self.of_tail(plan, tail), [tail.noised_norm]

        def record(measured: Mapping[str, float], gradients: bool) -> dict[str, Any]:
            return sums.record(measured, gradients) | spending.record(plan.round, measured, model,
                                                                      norms)

        return replace(sums, event=sums.event | spending.event(plan.evaluate), record=record)

    def left_out(self) -> dict[str, Any]:
        """Fields of the history's record: who was left out since the last call, and whose updates
        were used in part."""
        left_out, why = self._left_out, self._why
        self._left_out, self._why = [], []
        used, clipped = self._uses.take()
        if self.config.dp == "client":
            return {}
        fields: dict[str, Any] = {"left_out": left_out, "left_out_why": why}
        if self.config.sites:
            fields = {"left_out": len(why), "left_out_why": dict(Counter(why))}
        if self.config.client_clip is not None:
            fields["clipped"] = clipped
        return fields | ({"client_used": used} if used else {})


def _without_mean(measured: Mapping[str, float]) -> dict[str, float]:
    """What was measured of a round whose result is not the mean of the clients' updates by the
    weights that are recorded, or with --overlap that of the round before: cosines follow from the
    norm of that mean alone."""
    return {name: number for name, number in measured.items() if name != "mean_norm"}
