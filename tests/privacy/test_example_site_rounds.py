"""Rounds with --dp example between sites: each has a secret of its own, and all of them go on, or
none, if one cannot write down what its clients' steps cost, or must not let them cost more."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.prepared import join_ranks, start_ranks
from tests.support.site_runs import make_sites


def run_cases(folder: Path, ranks: int, cases: list[str], limit: float) -> None:
    """All cases in one set of processes (see example_site_ranks.py)."""
    make_sites(folder, 2, 1, 3)
    outputs = [folder / f"rank{rank}" for rank in range(ranks)]
    running = start_ranks([str(folder), *cases], [{}] * ranks, outputs,
                          "tests.support.example_site_ranks")
    code, late = join_ranks(running, limit)
    printed = "\n".join(output.read_text(encoding="utf-8") for output in outputs)
    assert not late, printed
    assert code == 0, printed
    assert f"{len(cases)} cases as they must be" in printed


@pytest.mark.slow
def test_a_site_that_refuses_ends_the_round_of_all(tmp_path: Path) -> None:
    run_cases(tmp_path, 4, ["masked:gloo:south:full"], 100)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_all_go_on_or_none_masked_or_not(tmp_path: Path) -> None:
    run_cases(tmp_path, 5, [f"{masked}:{plane}:{who}" for masked in ("masked", "clear")
                            for plane in ("gloo", "shared")
                            for who in ("nobody:nothing", "north:spent", "east:full")], 500)
