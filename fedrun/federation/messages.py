"""The messages of a round, as JSON over the control plane.

    RoundPlan      server -> all    before local training
    WorkerReport   all -> server    after local training
    RoundDecision  server -> all    continue, stop after this round, or end here
    RoundReport    all -> server    at the end of the round
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from fedrun.common.errors import ErrorCode, Failure
from fedrun.distributed.control_plane import ControlPlane
from fedrun.federation.global_state import Vector
from fedrun.strategies.base import ClientReport
from fedrun.training.evaluate import Piece

Message = TypeVar("Message")
Report = TypeVar("Report", "WorkerReport", "RoundReport")


@dataclass(frozen=True)
class RoundPlan:
    """What the server decides before a round, and every rank acts on."""

    round: int
    """Counted from 1: the global step."""
    steps: int
    """Local steps that each client makes in this round."""
    first_step: int
    """How many of a client that trains in every round come before it."""
    cohort: list[int]
    """The clients that train in this round."""
    weights: list[float]
    """The part of each one's weight p_k that is known before training."""
    bound: float
    """No element of an update is larger: the grid of the exact sum."""
    gradient_bound: float
    """No element of a gradient is larger, for methods that sum gradients or their squares."""
    entropy_reference: float
    """The method's reference entropy, computed from the previous round."""
    start_from_global: bool
    """Whether clients receive the global model first (always, except under --sync epoch)."""
    evaluate: bool
    """Whether to evaluate and save the global model at the end."""
    save: bool
    """Whether to write a checkpoint at the end."""
    last: bool
    stop: str = ""
    """Who asked for an end after this round, which is over: nothing is left but to save it."""
    kept: list[int] = field(default_factory=list)
    """The steps whose checkpoints the server has, or may still complete: a real site keeps the
    states of these alone. Empty in other runs."""


@dataclass(frozen=True)
class WorkerReport:
    """What a rank reports after local training; a rank that only serves has trained nothing."""

    clients: list[ClientReport] = field(default_factory=list)
    """The clients of the cohort that it hosts; empty in runs with sites, whose sums are in a tail
    (see tail.py)."""
    bytes: int = 0
    """Payload of the round if every client were a worker of its own: its term up, the sum down."""
    local_training_seconds: float = 0.0
    failure: str = ""
    """One line for an error that the user or the machine caused."""
    traceback: str = ""
    """The traceback of any other error."""
    signal: str = ""
    """Name of a signal that asks this rank to stop."""


@dataclass(frozen=True)
class RoundDecision:
    """What the server decides from the reports of all ranks."""

    error: str = ""
    """Why all ranks end here, and this round is lost; empty if they continue."""
    kind: Failure = "error"
    """The kind of failure, if there is one."""
    stop: str = ""
    """Who asked to stop: this round is the last, and a checkpoint is made of it."""
    clip: float | None = None
    """With --client_clip median: the norm to which the round's updates are clipped."""
    model_is_good: bool = True
    """Whether all workers hold the global model of the last complete round, if there is an error.
    """


@dataclass(frozen=True)
class RoundReport:
    """What a rank reports at the end of a round."""

    aggregation_seconds: float = 0.0
    evaluation_seconds: float = 0.0
    measured: dict[str, float] = field(default_factory=dict)
    """What `ServerUpdate.apply` measured."""
    validation: list[Piece] = field(default_factory=list)
    """Losses of this worker's part of the validation split under the global model."""
    replicas: dict[str, str] = field(default_factory=dict)
    """Digests of the replicated vectors, by name (see replicas.py)."""
    not_finite: list[str] = field(default_factory=list)
    """Names of replicated vectors with an element that is NaN or infinite."""
    written: list[dict[str, Any]] = field(default_factory=list)
    """Checkpoint files that were written since the last report (`CheckpointWriter.written`)."""
    used: list[list[float]] = field(default_factory=list)
    """Of a method that keeps single updates, without sites: clients of this worker, and how much of
    each one's update, or of its weight, the round used (`used_by_rule` makes `ClientReport.used` of
    them)."""
    tail: list[int] = field(default_factory=list)
    """In runs with sites, from the first worker: the words of the round's tail (see tail.py)."""
    site_losses: list[int] = field(default_factory=list)
    """With --site_holdout, from the first worker: the words of `SiteLosses`."""
    charged: bool = False
    """With --dp, from the first worker: whether the round counts. To repeat one that was in the log
    at the start costs nothing."""
    failure: ErrorCode = ""
    """In runs with sites or --dp: why this rank did not update the global model."""
    state: list[Vector] = field(default_factory=list)
    """From the first worker of a run of real sites, in a round that is saved: the global state that
    it sends next."""


_NESTED: dict[type, dict[str, type]] = {WorkerReport: {"clients": ClientReport},
                                       RoundReport: {"state": Vector}}
"""Fields that are lists of dataclasses."""


def encode(message: Any) -> dict[str, Any]:
    """A message as JSON-able values."""
    return dataclasses.asdict(message)


def decode(kind: type[Message], values: Mapping[str, Any]) -> Message:
    """The message of this dataclass that `encode` made `values` of; TypeError for other fields."""
    nested = _NESTED.get(kind, {})
    return kind(**{name: [decode(nested[name], one) for one in value] if name in nested else value
                   for name, value in values.items()})


def clients_of(plan: RoundPlan, reports: Sequence[WorkerReport]) -> list[ClientReport]:
    """The clients' reports in the order of the cohort, whoever hosted them."""
    by_client = {c.client: c for report in reports for c in report.clients}
    assert sorted(by_client) == sorted(plan.cohort)
    return [by_client[k] for k in plan.cohort]


def share(control: ControlPlane, kind: type[Message], message: Message | None) -> Message:
    """All ranks: the server's message; the others pass None."""
    return decode(kind, control.share(None if message is None else encode(message)))


def gather(control: ControlPlane, report: Report) -> list[Report]:
    """All ranks: the reports of all of them in order on the server, an empty list elsewhere."""
    received = control.gather(encode(report))
    return [] if received is None else [decode(type(report), values) for values in received]
