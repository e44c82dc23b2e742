"""The messages of a round: what is decoded is what was encoded, also through JSON."""

from __future__ import annotations

import json
from typing import Any

import pytest

from fedrun.federation.messages import (
    RoundDecision,
    RoundPlan,
    RoundReport,
    WorkerReport,
    clients_of,
    decode,
    encode,
)
from fedrun.strategies.base import ClientReport

CLIENTS = [ClientReport(4, 254, 1021.7, entropy=5.25, weight=0.1 + 0.2, norm=3e-3),
           ClientReport(1, 254, 1e-300, left_out="entropy not finite"),
           ClientReport(2, 0, 0.0, validation=[[0, 2.5, 31], [1, 2.25, 17]])]  # type: ignore[list-item]
PLAN = RoundPlan(7, 8, 48, [1, 2, 4], [0.25, 0.25, 0.5], 1e-3, 16.0, 5.99, True, False, True, False)


@pytest.mark.parametrize("message", [
    PLAN,
    WorkerReport(CLIENTS, bytes=1 << 40, local_training_seconds=0.1, signal="SIGTERM"),
    WorkerReport(traceback="Traceback\n  é\n"),
    RoundDecision("round 7: rank 2 failed", "diverged"),
    RoundDecision(stop="SIGTERM"),
    RoundReport(0.1, 0.2, {"step_norm": 1 / 3}, [[0, 2.5, 31]],  # type: ignore[list-item]
                {"model": "0f"}, ["moments.exp_avg"], [{"step": 7, "files": {}}]),
    RoundReport(),
])
def test_a_message_survives_json(message: Any) -> None:
    received = decode(type(message), json.loads(json.dumps(encode(message))))
    assert received == message
    assert type(received) is type(message)


def test_an_unknown_field_is_refused() -> None:
    with pytest.raises(TypeError, match="colour"):
        decode(RoundDecision, {"colour": "red"})


def test_clients_come_in_the_order_of_the_cohort_whoever_hosted_them() -> None:
    reports = [WorkerReport(), WorkerReport(CLIENTS[:1]), WorkerReport(CLIENTS[1:])]
    assert [c.client for c in clients_of(PLAN, reports)] == [1, 2, 4]
    with pytest.raises(AssertionError):
        clients_of(PLAN, reports[:2])
