"""Masked sums between sites are those of one process, to the bit, whatever is summed and how."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from tests.support.every_site import FEWEST, METHODS
from tests.support.prepared import join_ranks, start_ranks
from tests.support.site_runs import make_sites


def run_cases(folder: Path, ranks: int, cases: list[str], limit: float) -> None:
    """All cases in one set of processes. A case is METHOD:SITES:COHORT:PLANE."""
    for count, clients in (("3", (2, 1, 3)), ("5", (2, 1, 1, 2, 1))):
        (folder / count).mkdir()
        make_sites(folder / count, *clients)
    outputs = [folder / f"rank{rank}" for rank in range(ranks)]
    running = start_ranks([str(folder), *cases], [{}] * ranks, outputs, "tests.support.every_site")
    code, late = join_ranks(running, limit)
    printed = "\n".join(output.read_text(encoding="utf-8") for output in outputs)
    assert not late, printed
    assert code == 0, printed
    assert f"{len(cases)} cases the same" in printed


def test_masked_sums_are_the_plain_ones(tmp_path: Path) -> None:
    """Of int32, int64 and four bytes to a word, between three workers of as many sites."""
    run_cases(tmp_path, 4, ["fed_avg:3:none:gloo", "clipped:3:4:gloo", "average:3:4:gloo",
                            "average_sqrt:3:4:gloo", "average_rows:3:4:gloo", "int8:3:4:gloo",
                            "int8_moments:3:4:gloo", "fast:3:4:gloo"], 100)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_masked_sums_of_the_same_updates_are_the_plain_ones(tmp_path: Path) -> None:
    """Several a round, between five workers of as many sites."""
    run_cases(tmp_path, 6, ["three_steps:5:none:gloo", "two_steps:5:4:gloo"], 500)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_masked_sums_are_the_plain_ones_in_every_way(tmp_path: Path) -> None:
    """Every method twice, with two workers at some sites, which share memory or do not: with all
    clients or a cohort, at three sites or five."""
    everywhere = list(itertools.product(("3", "5"), ("none", "4"), ("shared", "gloo")))
    cases = []
    for number, method in enumerate(METHODS):
        fewest = FEWEST.get(method, 3)
        ways = [(sites, cohort, plane) for sites, cohort, plane in everywhere
                if int(sites) >= fewest and (cohort == "none" or int(cohort) >= fewest)]
        cases += [(method, *ways[(number + turn) % len(ways)]) for turn in (0, 5)]
    run_cases(tmp_path, 7, [":".join(case) for case in cases], 500)
