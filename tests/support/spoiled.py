"""Clients whose updates are wrong, in runs in the process of the test."""

from __future__ import annotations

from typing import Any

import pytest

from fedrun.federation.client import Client
from tests.support.runs import Outcome, Run


def spoil_updates(monkeypatch: pytest.MonkeyPatch, value: float, round_: int, clients: set[int]
                  ) -> None:
    """Add `value` to one element of these clients' updates, or gradients, in that round."""
    seen: dict[int, int] = {}
    for name in ("train", "gradient"):
        healthy = getattr(Client, name)

        def faulty(client: Client, *args: Any, healthy: Any = healthy, name: str = name,
                   **how: Any) -> Any:
            losses = healthy(client, *args, **how)
            seen[client.index] = seen.get(client.index, 0) + 1
            if client.index in clients and seen[client.index] == round_:
                vector = client.flat.vector if name == "train" else client.flat.grad
                vector[-7] += value
            return losses

        monkeypatch.setattr(Client, name, faulty)


def shout(monkeypatch: pytest.MonkeyPatch, clients: set[int]) -> None:
    """These clients send the largest update of all, the wrong way."""
    healthy = Client.train

    def train(client: Client, *args: Any, **how: Any) -> Any:
        before = client.flat.vector.clone()
        losses = healthy(client, *args, **how)
        if client.index in clients:
            wrong = (client.flat.vector - before).sign().neg_()
            client.flat.vector.copy_(before).add_(wrong, alpha=0.02)
        return losses

    monkeypatch.setattr(Client, "train", train)


def held_against_one_of_five(run: Run, monkeypatch: pytest.MonkeyPatch, *method: str
                             ) -> tuple[Outcome, list[dict[str, Any]]]:
    """A run of four rounds in which client 3 of five shouts, and the events of its rounds. It gets
    better as without that client."""
    shout(monkeypatch, {3})
    held = run(*method, "--num_clients", 5, "--rounds", 4, "--local_updates", 2, "--val_freq", 2)
    assert held.code == 0, held.output
    assert held.history[-1]["server_val_ppl"] < 0.97 * held.history[0]["server_val_ppl"]
    rounds = [event for event in held.events if event["event"] == "round"]
    assert len(rounds) == 4
    return held, rounds
