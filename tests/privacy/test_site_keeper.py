"""--dp example at sites: each keeps the secret of its own clients' steps and the log of what they
cost, the server counts what all logs say, and a site that must not go on ends the round for all."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from fedrun.config import FederatedConfig
from fedrun.data.sites import Sites, read_sites
from fedrun.federation.example_spending import ExampleSpending
from fedrun.federation.noise_keeper import TooMuchSpent, level_of
from fedrun.federation.schedule import Schedule
from fedrun.federation.site_noise import SiteKeeper, together
from fedrun.privacy.accountant import example_epsilon
from fedrun.privacy.example_level import ExampleLevel
from tests.support.private import EXAMPLE, PRIVATE, PROVENANCE
from tests.support.site_runs import config_with, make_sites

SIZE = 3000
SIZES = [8, 9, 10, 12, 14, 16]
TERMS = [1, 2, 3, 4]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Of four sites, with six clients: in a round of two rounds one of them has none."""
    make_sites(tmp_path, 2, 1, 1, 2)
    return tmp_path


def config_of(folder: Path, **flags: object) -> FederatedConfig:
    given = PRIVATE | EXAMPLE | {"rounds": 4, "cohort": 3, "local_updates": 2} | flags
    return config_with(folder, flags={k: str(v) for k, v in given.items() if v is not None})


class Run:
    """A start of a run: what each site has, and the server."""

    def __init__(self, folder: Path, done: int = 0, texts: Sequence[str] = ("text",) * 4,
                 earlier: Sequence[str] = (), **flags: object) -> None:
        config = config_of(folder, **flags)
        self.sites: Sites = read_sites(folder / "sites.yaml")
        self.schedule = Schedule(config, SIZES, self.sites)
        level = level_of(config, self.schedule, SIZE)
        self.keepers = {name: SiteKeeper(config, level, self.schedule, PROVENANCE, text, earlier,
                                         done, folder / name, name)
                        for name, text in zip(self.sites.names, texts, strict=True)}
        standing = together([one.standing for one in self.keepers.values()], self.schedule)
        self.runs = standing.runs
        self.spending = ExampleSpending(config, self.schedule, level, standing, done)

    def make(self, number: int, model: str = "", without: str = "") -> dict[str, bool]:
        """A round, before which the site `without` is killed; which of the others charged it."""
        plan = self.schedule.plan(number, 0.0)
        charged = {name: keeper.release(plan, model or f"model {number}", TERMS)[1]
                   for name, keeper in self.keepers.items() if name != without}
        if not without:
            self.spending.charge(plan, charged)
        return charged

    @property
    def spent(self) -> dict[int, Any]:
        """By the server, for each client: noise, rate and steps."""
        return dict(self.spending._spent.by_client)


def lines(folder: Path, name: str) -> list[list[Any]]:
    return [json.loads(line) for line in (folder / name / "privacy.log").read_text().splitlines()]


def test_each_site_charges_its_own_clients_and_the_server_the_largest(folder: Path) -> None:
    run = Run(folder)
    assert len({keeper.secret() for keeper in run.keepers.values()}) == 4
    for number in range(1, 5):
        assert run.make(number) == dict.fromkeys(run.sites.names, True)
    without = 0
    for name in run.sites.names:
        own = run.sites.clients_of(name)
        for number, line in enumerate(lines(folder, name), 1):
            clients = [k for k in run.schedule.cohort(number) if k in own]
            assert line[1] == number
            assert line[4:9] == ["sequence", [k - own.start for k in clients], 1.5,
                                 [2 / SIZES[k] for k in clients], 2]
            without += not clients
    assert without, "a site without a client in a round writes it down too"
    assert run.spent == {k: (1.5, 2 / size, 4) for k, size in enumerate(SIZES)}
    epsilon = example_epsilon(1.5, 2 / 8, 4, 1e-3)
    assert run.spending.epsilon == pytest.approx(epsilon, rel=1e-4)
    again = Run(folder, done=4)
    assert again.spent == run.spent
    assert again.spending.epsilon == run.spending.epsilon
    assert {name: keeper.secret() for name, keeper in again.keepers.items()} == {
        name: keeper.secret() for name, keeper in run.keepers.items()}
    assert again.make(4) == dict.fromkeys(run.sites.names, False), "which costs nothing"
    assert again.spent == run.spent


@pytest.mark.parametrize("killed", ["north", "south", "west"])
def test_a_site_that_was_killed_before_it_wrote_charges_its_clients_alone(folder: Path, killed: str
                                                                          ) -> None:
    run = Run(folder)
    run.make(1)
    run.make(2, without=killed)
    again = Run(folder, done=1)
    own = again.sites.clients_of(killed)
    ahead = {k: (1.5, 2 / SIZES[k], 2) for k in range(6)
             if k in again.schedule.cohort(1) or k not in own}
    assert again.spent == ahead
    planned = again.spending._after(2)
    assert planned.by_client == {k: (1.5, 2 / size, 2) for k, size in enumerate(SIZES)}
    assert again.make(2) == {name: name == killed for name in again.sites.names}
    assert again.spent == planned.by_client
    assert again.spending.epsilon == again.spending._spent.epsilon


def test_what_has_changed_at_one_site_is_charged_there(folder: Path) -> None:
    run = Run(folder)
    for number in (1, 2):
        run.make(number)
    again = Run(folder, done=1, texts=("text", "text", "text", "another"), earlier=run.runs)
    assert again.make(2) == {name: name == "west" for name in again.sites.names}
    steps = {k: 2 + 2 * (k in again.sites.clients_of("west") and k in again.schedule.cohort(2))
             for k in range(6)}
    assert {k: cost[2] for k, cost in again.spent.items()} == steps
    assert again.make(3) == dict.fromkeys(again.sites.names, True)


def test_max_epsilon_holds_by_a_sites_own_log(folder: Path) -> None:
    """Where another process of the same run has released more since the start."""
    limit = example_epsilon(1.5, 2 / 8, 4, 1e-3) * 1.01  # of two rounds of client 0
    run, other = (Run(folder, max_epsilon=limit) for _ in range(2))
    for number in (1, 2, 3):
        run.make(number)
    plan = run.schedule.plan(4, 0.0)
    (client,) = (k for k in plan.cohort if k in run.sites.clients_of("north"))
    plan = dataclasses.replace(plan, cohort=[0 if k == client else k for k in plan.cohort])
    assert other.keepers["north"].release(dataclasses.replace(plan, round=3), "other", TERMS)[1]
    with pytest.raises(TooMuchSpent, match="round 4: it would cost more than --max_epsilon"):
        run.keepers["north"].release(plan, "model 4", TERMS)
    assert run.keepers["south"].release(plan, "model 4", TERMS)[1]
    assert run.keepers["north"].release(run.schedule.plan(2, 0.0), "model 2", TERMS)[1] is False


def test_of_one_owner_all_are_charged_or_none(folder: Path) -> None:
    """In a simulation of sites: it has one log."""
    run = Run(folder)
    plan = run.schedule.plan(1, 0.0)
    run.spending.charge(plan, {"": False})
    assert run.spent == {}
    run.spending.charge(plan, {"": True})
    assert sorted(run.spent) == plan.cohort
    assert isinstance(run.spending.level, ExampleLevel)
