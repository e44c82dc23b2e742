"""The bench of attacks: what hostile clients send in it, and its table."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from fedrun.aggregation.bounds import update_bound
from fedrun.federation.client import Client
from tests.benchmarks import attacks
from tests.benchmarks.attacks import Setting, attacked, forged, table
from tests.support.runs import Run


def test_what_is_forged() -> None:
    update = torch.tensor([1.0, -2.0, 0.0])
    honest = [torch.tensor([1.0, 2.0, 3.0]), torch.tensor([3.0, 2.0, 5.0])]
    assert forged("none", update, honest, 9, 0).tolist() == [1, -2, 0]
    assert forged("sign_flip", update, honest, 9, 0).tolist() == [-1, 2, 0]
    assert forged("bound", update, honest, 9, 0).tolist() == [-9, 9, 0]
    assert forged("boost", update, honest, 9, 0).tolist() == [10, -20, 0]
    root = 1.5 * math.sqrt(2)
    assert forged("little", update, honest, 9, 0).tolist() == pytest.approx(
        [2 - root, 2, 4 - root])
    noise = forged("noise", torch.zeros(10_000), honest, 8, 3)
    assert float(noise.std()) == pytest.approx(2, rel=0.05)


@pytest.mark.parametrize("attack", ["none", "bound", "little", "shuffled"])
def test_the_last_clients_are_hostile_and_stay_within_the_bound(run_here: Run, attack: str) -> None:
    """So none is left out: what there is to see of them is what a method makes of it."""
    train, next_batch = Client.train, Client.next_batch
    with attacked(attack, 3, 1):
        outcome = run_here("fed_avg", "--num_clients", 3, "--rounds", 1, "--local_updates",
                           attacks.STEPS, "--lr", attacks.LR)
    assert outcome.code == 0, outcome.output
    assert (Client.train, Client.next_batch) == (train, next_batch)
    assert outcome.history[-1]["left_out"] == []
    *honest, hostile = outcome.history[-1]["update_norms"]
    if attack == "bound":
        size = sum(v.numel() for v in outcome.model.values())
        whole = update_bound(attacks.STEPS, attacks.LR, 0.01, 0.9, 0.999) * math.sqrt(size)
        assert hostile == pytest.approx(0.999 * whole, rel=0.05)
    else:
        assert 0.3 * max(honest) < hostile < 3 * max(honest)


def test_the_table_tells_what_failed_and_what_is_not_made() -> None:
    def run(method: str, attack: str, perplexity: float | None, used: float | None
            ) -> dict[str, Any]:
        return {**Setting(method, attack, "8:3", 40)._asdict(), "perplexity": perplexity,
                "used_honest": used, "used_hostile": used and used / 2, "seconds": 1}

    shown = table([run("FedAvg", "none", 232.04, None), run("FedAvg", "bound", 5e44, None),
                   run("FedAvg", "noise", None, None), run("FedMedian", "bound", 240.0, 0.5)])
    rows = {line.split(" | ")[0].strip("| "): [cell.strip(" |") for cell in line.split(" | ")[1:]]
            for line in shown.splitlines() if line.startswith("| Fed")}
    assert rows["FedAvg"] == ["232.0", "", "5.0e+44", "diverged", "", "", ""]
    assert rows["FedMedian"] == ["", "", "240.0 (0.50, 0.25)", "", "", "", ""]
    assert rows["FedKrum"] == ["refused"] * 7, "8 clients are fewer than 2 * 3 + 3"
