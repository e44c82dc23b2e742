"""What a worker never sends, whatever the server decides: part of a round, or a sum over sites
without a mask."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from fedrun.common.errors import FedrunError
from fedrun.distributed.data_plane import DataPlane
from fedrun.distributed.runtime import Runtime
from fedrun.federation.client import Client
from fedrun.federation.messages import RoundDecision
from fedrun.federation.schedule import Schedule
from fedrun.federation.secure_sum import SecureSum
from fedrun.federation.server import Server
from fedrun.federation.site_keys import Leader
from fedrun.protecting import require_one_machine
from tests.support.runs import Run
from tests.support.site_runs import config_with, make_sites


def test_a_leader_sends_no_sum_without_a_mask(tmp_path: Path) -> None:
    """Whoever asks for it."""
    sites, plane = make_sites(tmp_path, 2, 1, 1), DataPlane(of_site=True)
    plane.leaders_group = cast(Any, "the leaders")
    config = config_with(tmp_path)
    SecureSum(config, sites, Schedule(config, [20] * 4), 50, plane, 0, cast(Leader, "a leader"))
    for send in (lambda: plane.sum_words([1]), lambda: plane.reduce((torch.ones(3),))):
        with pytest.raises(FedrunError, match=r"^a sum over the sites has no mask"):
            send()


@pytest.mark.parametrize("failing", [0, 2])
def test_a_worker_sums_no_round_that_it_has_not_trained(
        failing: int, run_here: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even if the server continues: a sum without one client shows its term beside the sum
    of the repeated round."""
    healthy, trained = Client.train, list[int]()

    def train(client: Client, *args: Any, **how: Any) -> Any:
        trained.append(client.index)
        if len(trained) > 4 and client.index == failing:
            raise ValueError("a client fails in the second round")
        return healthy(client, *args, **how)

    monkeypatch.setattr(Client, "train", train)
    monkeypatch.setattr(Server, "decide", lambda *_: RoundDecision())
    ended = run_here("fed_avg", "--num_clients", 4, "--rounds", 3)
    assert ended.code == 1
    assert "round 2: the server continues, but this worker has not trained its clients" in (
        ended.output)
    assert [record["global_step"] for record in ended.history] == [1]


@pytest.mark.parametrize(("of_site", "machines", "refused"), [
    (True, 2, True), (True, 1, False), (False, 2, False)])
def test_workers_of_a_site_are_on_one_machine(of_site: bool, machines: int, refused: bool) -> None:
    """What they sum among themselves would leave the machine without a mask."""
    plane = DataPlane(of_site=of_site)
    plane.machines = machines
    runtime = cast(Runtime, SimpleNamespace(data_plane=plane))
    with pytest.raises(FedrunError, match="on 2 machines; must be on one"
                       ) if refused else nullcontext():
        require_one_machine(runtime)
