"""Whole runs with --dp client between sites, and in a simulation of sites."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from fedrun.privacy.accountant import zcdp_epsilon
from tests.support.private import PRIVATE, PUBLIC
from tests.support.private_sites import (
    KILLS,
    logs,
    recorded,
    require_nothing_sent,
    require_refused,
    require_repeated,
    simulated,
    three_institutions,
)
from tests.support.real_sites import Institutions, Ranks

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

FLAGS = (*(part for name, value in PRIVATE.items() for part in (f"--{name}", value)),
         "--secure_sum", "true", "--checkpoint_freq", 1)


@pytest.fixture(scope="module")
def institutions() -> Iterator[Institutions]:
    with three_institutions() as made:
        yield made


@pytest.fixture(scope="module")
def undisturbed(institutions: Institutions) -> Ranks:
    return recorded(institutions, FLAGS)


def test_what_a_run_releases_costs_and_says(institutions: Institutions, undisturbed: Ranks) -> None:
    server = undisturbed.server
    names = {*(name for each in (*server.history, *server.events) for name in each)}
    assert names <= PUBLIC
    epsilons = [event["epsilon"] for event in server.events if event["event"] == "round"]
    assert epsilons == pytest.approx([zcdp_epsilon(k / (2 * 1.5**2), 1e-3) for k in (1, 2, 3)],
                                     rel=1e-6)
    page = (server.run_dir / "privacy.md").read_text()
    assert f"Epsilon {epsilons[-1]:.3g} at delta 0.001 over all 3 rounds" in page
    assert "Who learns what, with `--sites`, `--site_dir`, `--secure_sum` and `--dp client`" in page
    for number, log in enumerate(logs(institutions).values()):
        clients = [list(range(count)) for count in (2, 1, 2)][number]
        assert [(line[1], line[5]) for line in map(json.loads, log.splitlines())] == [
            (1, clients), (2, clients), (3, clients)], "its own clients, from 0"
        assert "have cost a client of" in undisturbed.printed[1 + number]
    assert "have cost a client of" not in undisturbed.printed[0]


def test_nothing_but_masked_integers_leaves_a_site(institutions: Institutions, undisturbed: Ranks
                                                   ) -> None:
    require_nothing_sent(institutions)


@pytest.mark.parametrize(("kind", "at", "module", "rank"), [
    *(pytest.param(*kill, marks=pytest.mark.soak) for kill in KILLS[:2]), KILLS[2]])
def test_a_kill_costs_no_bit_and_no_epsilon(kind: str, at: str, module: str, rank: int,
                                            institutions: Institutions, undisturbed: Ranks) -> None:
    require_repeated(institutions, undisturbed, FLAGS, kind, at, module, rank)


@pytest.mark.parametrize("kind", ["full", pytest.param("spent", marks=pytest.mark.soak)])
def test_a_site_that_must_not_let_it_cost_more_ends_the_run(
        kind: str, institutions: Institutions, undisturbed: Ranks) -> None:
    """Or that cannot write it down."""
    before = logs(institutions)
    require_refused(institutions, kind, *FLAGS, "--seed", len(kind), "--max_epsilon", 10)
    for site, log in logs(institutions).items():
        added = [*map(json.loads, log[len(before[site]):].splitlines())]
        rounds = [release[1] for release in added if not release[2].startswith("another")]
        assert rounds == ([1] if site == "south" else [1, 2])


def test_a_simulation_has_the_same_bits_in_any_number_of_processes(institutions: Institutions
                                                                   ) -> None:
    """Which are not those of sites, whose secrets are others."""
    alone = simulated(institutions, FLAGS)
    assert "noise added by each of 3 sites, a share before its mask" in alone.output


def test_sites_keep_the_secret_in_their_own_folders(institutions: Institutions) -> None:
    refused = institutions.train(*FLAGS, "--dp_dir", "/keys", name="keys", limit=300)
    assert refused.server.code == 2
    assert "--dp_dir /keys: must be left out with --site_dir" in refused.printed[0]
