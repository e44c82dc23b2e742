"""Whole runs with --dp example between sites, and in a simulation of sites."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from fedrun.privacy.accountant import example_epsilon
from tests.support.private import PUBLIC
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
from tests.support.real_sites import NAMES, Institutions, Ranks
from tests.support.runs import without_clocks

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

FLAGS = ("--dp", "example", "--dp_clip", 0.5, "--dp_noise", 0.8, "--dp_delta", 1e-5,
         "--batch_size", 8, "--local_updates", 2, "--checkpoint_freq", 1)
MASKED = (*FLAGS, "--secure_sum", "true")
OF_SUMS = {"left_out", "left_out_why", "update_cosine", "effective_clients"}


@pytest.fixture(scope="module")
def institutions() -> Iterator[Institutions]:
    with three_institutions() as made:
        yield made


@pytest.fixture(scope="module")
def undisturbed(institutions: Institutions) -> Ranks:
    return recorded(institutions, MASKED)


def releases(institutions: Institutions, site: str) -> list[list[Any]]:
    return [*map(json.loads, logs(institutions)[site].splitlines())]


def test_what_a_run_releases_costs_and_says(institutions: Institutions, undisturbed: Ranks) -> None:
    server = undisturbed.server
    names = {*(name for each in (*server.history, *server.events) for name in each)}
    assert names - PUBLIC == OF_SUMS
    assert "loss" not in json.dumps(server.events)
    rates = []
    for number, site in enumerate(NAMES):
        clients = [list(range(count)) for count in (2, 1, 2)][number]
        for round_, line in enumerate(releases(institutions, site), 1):
            assert (line[1], line[4], line[5], line[8]) == (round_, "sequence", clients, 2)
            rates += line[7]
        assert f"have cost a sequence of {site} epsilon 0 so far" in undisturbed.printed[1 + number]
    epsilons = [example_epsilon(0.8, max(rates), 2 * k, 1e-5) for k in (1, 2, 3)]
    assert [record["epsilon"] for record in server.history] == pytest.approx(epsilons, rel=1e-4)
    page = (server.run_dir / "privacy.md").read_text()
    for words in (f"epsilon {epsilons[-1]:.3g} at delta 1e-05",
                  "`--site_dir`, `--secure_sum` and `--dp example`",
                  "| by all runs with `--dp example` on a site's text | in the log of that site |"):
        assert words in page
    assert "noise added by the workers of each site" in undisturbed.printed[0]
    # Noise alone has a ratio of zero, but for the estimate's error.
    assert all(0 <= record["snr"] < 0.2 for record in server.history)
    assert "signal to noise of the last steps evaluated: snr" in undisturbed.printed[0]


def test_no_gradient_and_no_secret_leaves_a_site(institutions: Institutions, undisturbed: Ranks
                                                 ) -> None:
    require_nothing_sent(institutions)


def test_masks_change_no_bit_and_cost_nothing(institutions: Institutions, undisturbed: Ranks
                                              ) -> None:
    before = logs(institutions)
    clear = institutions.train(*FLAGS, name="clear", limit=300)
    assert clear.server.code == 0, "\n".join(clear.printed)
    assert clear.server.bits == undisturbed.server.bits
    assert without_clocks(clear.server) == without_clocks(undisturbed.server)
    assert logs(institutions) == before
    page = (clear.server.run_dir / "privacy.md").read_text()
    assert "The guarantee for sequences holds without them" in page


@pytest.mark.parametrize(("kind", "at", "module", "rank"), [
    pytest.param(*KILLS[0], marks=pytest.mark.soak), KILLS[2]])
def test_a_kill_costs_no_bit_and_no_epsilon(kind: str, at: str, module: str, rank: int,
                                            institutions: Institutions, undisturbed: Ranks) -> None:
    require_repeated(institutions, undisturbed, MASKED, kind, at, module, rank)


@pytest.mark.parametrize(("flags", "kind"), [
    (MASKED, "spent"), pytest.param(FLAGS, "full", marks=pytest.mark.soak)])
def test_a_site_that_must_not_let_it_cost_more_ends_the_run(
        flags: tuple[object, ...], kind: str, institutions: Institutions) -> None:
    """Or that cannot write it down."""
    require_refused(institutions, kind, *flags, "--seed", len(kind), "--max_epsilon", 8)


@pytest.mark.soak
def test_a_simulation_has_the_same_bits_in_any_number_of_processes(institutions: Institutions
                                                                   ) -> None:
    alone = simulated(institutions, MASKED)
    assert "noise added by the workers of each site" in alone.output
    assert {"epsilon", *OF_SUMS} <= set(alone.history[-1])
