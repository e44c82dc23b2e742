"""--dp client between sites: rounds by hand, whatever the sites have in them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.prepared import join_ranks, start_ranks
from tests.support.site_runs import make_sites


def run_cases(folder: Path, ranks: int, cases: list[str], limit: float) -> str:
    """All cases in one set of processes (see private_site_ranks.py); what rank 0 prints."""
    for count, clients in (("3", (2, 1, 3)), ("5", (2, 1, 1, 2, 2))):
        (folder / count).mkdir()
        make_sites(folder / count, *clients)
    outputs = [folder / f"rank{rank}" for rank in range(ranks)]
    running = start_ranks([str(folder), *cases], [{}] * ranks, outputs,
                          "tests.support.private_site_ranks")
    code, late = join_ranks(running, limit)
    printed = "\n".join(output.read_text(encoding="utf-8") for output in outputs)
    assert not late, printed
    assert code == 0, printed
    assert f"{len(cases)} cases the same" in printed
    return printed


def test_masked_sums_are_clipped_terms_and_all_shares_to_the_bit(tmp_path: Path) -> None:
    """South has one client, whose update is not finite in the last round."""
    run_cases(tmp_path, 4, ["3:none:gloo:2"], 100)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_shares_are_added_by_sites_without_a_client_and_by_two_workers(tmp_path: Path) -> None:
    """Of five sites at least one has no client in a round of four; then nobody is finite. Of three,
    two have two workers, who add the noise of some blocks each."""
    printed = run_cases(tmp_path, 6, ["5:4:gloo:0+1+2+3+4+5+6+7", "3:none:shared:0+1"], 500)
    assert "\n0 times" not in "\n" + printed.split(" had no client")[0]
