"""Clients that keep no state: any worker trains them, and thousands of them cost nothing."""

from __future__ import annotations

import collections
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fedrun.config import FederatedConfig
from fedrun.distributed.control_plane import ControlPlane
from fedrun.distributed.data_plane import DataPlane
from fedrun.distributed.launch import detect
from fedrun.distributed.runtime import Runtime
from fedrun.federation.client import STEPS_DONE, Client
from fedrun.federation.counted_store import Counted
from fedrun.federation.schedule import Schedule
from fedrun.federation.worker import Worker
from fedrun.flags import resolve
from tests.support.experiments import worker_of
from tests.support.made_data import made


def settings(clients: int, cohort: int, **flags: str) -> FederatedConfig:
    config = resolve("fed_avg", {
        "config": "tiny", "num_clients": str(clients), "cohort": str(cohort), "rounds": "40",
        "batch_size": "1", "sequence_length": "4", "local_updates": "3", "dtype": "fp32",
        "device": "cpu", "client_moments": "reset", **flags})
    assert isinstance(config, FederatedConfig)
    return config


@pytest.mark.parametrize("lengths", ["constant", "quadratic"])
def test_a_clients_place_follows_from_the_rounds_in_which_it_was_drawn(lengths: str) -> None:
    schedule = Schedule(settings(7, 3, lr_schedule="cosine", local_updates_schedule=lengths),
                        [10] * 7)
    trained = collections.Counter[int]()
    straight = Counted(schedule)
    for number in range(1, 21):
        straight.begin(number)
        resumed = Counted(schedule)  # as after a start from the checkpoint of the round before
        resumed.begin(number)
        for client in schedule.cohort(number):
            for store in (straight, resumed):
                assert int(store.checkout(client)[STEPS_DONE]) == trained[client]
            trained[client] += schedule.plan(number, 0.0).steps
    assert len(trained) == 7
    assert sum(trained.values()) == (180 if lengths == "constant" else 3 * schedule.first_step(21))


@pytest.mark.parametrize(("flags", "keeps"), [
    ({}, False), ({"client_moments": "average"}, False),
    ({"client_moments": "average_sqrt", "grad_clip": "1"}, False),
    ({"client_moments": "average_sqrt", "grad_clip": "1", "moments_every": "3,6"}, True),
    ({"client_moments": "average_rows", "grad_clip": "1"}, True),
    ({"client_moments": "keep"}, True), ({"aggregation": "int8"}, True),
    ({"personal": "*norm*"}, True)])
def test_which_clients_keep_a_state(flags: dict[str, str], keeps: bool) -> None:
    assert settings(7, 3, **flags).keeps_states == keeps
    whole = replace(settings(7, 7, **flags), cohort=None)
    assert whole.keeps_states == keeps
    if "average" not in whole.client_moments:
        assert replace(whole, sync="epoch", aggregation="exact").keeps_states


def test_ten_thousand_clients_are_made_for_their_turns(monkeypatch: pytest.MonkeyPatch,
                                                       tmp_path: Path) -> None:
    """Of a cohort each of two workers trains one half, whoever is in it, and nothing is kept."""
    config = replace(settings(10_000, 50), data_dir=tmp_path, local_updates=1)
    data = made([40_000])
    made_for: list[int] = []
    begin = Client.__init__

    def noting(self: Client, index: int, *given: object, **named: object) -> None:
        made_for.append(index)
        begin(self, index, *given, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(Client, "__init__", noting)
    workers: list[Worker] = []
    for place in range(2):
        runtime = Runtime(detect({}), torch.device("cpu"), (0, 1), ControlPlane(), DataPlane())
        monkeypatch.setattr(Runtime, "worker", place)
        worker = worker_of(config, data, runtime)
        plan = worker.schedule.plan(1, 0.0)
        worker.train(replace(plan, evaluate=False))
        assert len(worker.clients) == 0
        workers.append(worker)
    assert len(made_for) == 50
    assert sorted(made_for) == plan.cohort
    assert made_for[:25] == plan.cohort[::2]
