"""The page on what a run between sites shows, and its claim in the README."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from fedrun.config import FederatedConfig
from fedrun.records import run_files
from fedrun.records.client_privacy import ClientGuarantee
from fedrun.records.example_privacy import BY_SITES, EXAMPLE_CLAIM, ExampleGuarantee
from fedrun.records.example_privacy import part as of_sequences
from fedrun.records.privacy import CLAIM, write_privacy
from fedrun.records.shared_privacy import SHARED_CLAIM, add_part, noised_by, part
from fedrun.strategies.fed_avg import FedAvg
from fedrun.strategies.fed_geometric_median import FedGeometricMedian
from tests.support.runs import ROOT


def words(text: str) -> str:
    """Without line breaks and the marks of a quotation."""
    return " ".join(text.replace("\n>", "\n").split())


def test_the_readme_has_the_claim_word_for_word() -> None:
    assert words(CLAIM) in words((ROOT / "README.md").read_text(encoding="utf-8"))


@pytest.mark.parametrize(("real", "demonstration", "secure", "clip", "said"), [
    (False, False, True, None, ["simulated its sites"]),
    (True, False, True, None, []),
    (True, False, True, "0.5", ["how many clients had a longer update"]),
    (True, True, True, None, ["this was a demonstration"]),
    (True, False, False, None, ["no secure sums"]),
    (True, True, False, None, ["this was a demonstration", "no secure sums"])])
def test_the_page_says_what_did_not_hold(tmp_path: Path, real: bool, demonstration: bool,
                                         secure: bool, clip: str | None, said: list[str]) -> None:
    config = SimpleNamespace(run_dir=tmp_path, secure_sum=secure, dp="none", private=False,
                             client_clip=clip, strategy=FedAvg())
    write_privacy(cast(FederatedConfig, config), real, demonstration)
    page = words((config.run_dir / run_files.PRIVACY).read_text(encoding="utf-8"))
    assert words(CLAIM) in page
    # A start that resumes the run on other machines does not unsay it.
    write_privacy(cast(FederatedConfig, config), real, demonstration=False)
    assert words((config.run_dir / run_files.PRIVACY).read_text(encoding="utf-8")) == page
    for remark in ("simulated its sites", "this was a demonstration", "no secure sums",
                   "how many clients had a longer update"):
        assert (remark in page) == (remark in said)


@pytest.mark.parametrize(("steps", "others", "fewest"), [(1, 2, 3), (3, 4, 5)])
def test_several_sums_of_the_same_updates_hide_among_more_sites(tmp_path: Path, steps: int,
                                                                others: int, fewest: int) -> None:
    config = SimpleNamespace(run_dir=tmp_path, secure_sum=True, dp="none", private=False,
                             client_clip=None, strategy=FedGeometricMedian(weiszfeld_steps=steps),
                             method="fed_geometric_median")
    write_privacy(cast(FederatedConfig, config), real=True, demonstration=False)
    page = words((tmp_path / run_files.PRIVACY).read_text(encoding="utf-8"))
    assert f"a round of `fed_geometric_median` with `--weiszfeld_steps {steps}`" in page
    assert f"at least {others} sites do not share what they know" in page
    assert f"clients of at least {fewest} sites" in page
    assert words(CLAIM) in page
    # Without masks no round needs more sites, and the page does not say so.
    config.secure_sum = False
    write_privacy(cast(FederatedConfig, config), real=True, demonstration=False)
    page = words((tmp_path / run_files.PRIVACY).read_text(encoding="utf-8"))
    assert "All learn each of these sums" in page
    assert "clients of at least" not in page


@pytest.mark.parametrize(("colluding", "said"), [
    (0, ["against the server and any one site.", "shares that are counted on | 4: all but"]),
    (2, ["any 3 sites together.", "| 2: all but those of 3 sites |"])])
def test_with_noise_between_sites_the_page_says_both(tmp_path: Path, colluding: int,
                                                     said: list[str]) -> None:
    config = SimpleNamespace(run_dir=tmp_path, secure_sum=True, dp="client", private=True,
                             client_clip=None, strategy=FedAvg())
    guarantee = ClientGuarantee(12, 4, 9, 3, 0.5, 1.5, 1e-3, 0.25, 4.5, 0.0,
                                noised_by(5, colluding))
    for _ in range(2):  # also of a start that resumes the run
        write_privacy(cast(FederatedConfig, config), False, demonstration=False)
        add_part(tmp_path, part(guarantee, 5, colluding))
    # A start that ends before it has numbers of its own leaves those of the one before.
    write_privacy(cast(FederatedConfig, config), False, demonstration=False)
    page = words((tmp_path / run_files.PRIVACY).read_text(encoding="utf-8"))
    for piece in (SHARED_CLAIM, "simulated its sites", "Epsilon 4.5 at delta 0.001 over all 9",
                 *said, "each of 5 sites a share", "| 3 at most, of 9,",
                 "`null` there is infinite", "| epsilon 0.25 by this run |"):
        assert page.count(words(piece)) == 1, piece
    assert "differential privacy is not part of this" not in page
    assert "no protection" not in page
    assert "noise added by each of 5 sites, a share before its mask" in guarantee.line


@pytest.mark.parametrize(("real", "secure"), [(False, True), (True, True), (True, False)])
def test_with_noise_in_gradients_the_page_says_both(tmp_path: Path, real: bool, secure: bool
                                                    ) -> None:
    config = SimpleNamespace(run_dir=tmp_path, secure_sum=secure, dp="example", private=True,
                             client_clip=None, strategy=FedAvg())
    guarantee = ExampleGuarantee(12, 4, 9, 3, 2, 8, 100, 32, 0.5, 1.5, 1e-3, 0.25, 4.5, 7.0,
                                 BY_SITES)
    for _ in range(2):
        write_privacy(cast(FederatedConfig, config), real, demonstration=False)
        add_part(tmp_path, of_sequences(guarantee))
    page = words((tmp_path / run_files.PRIVACY).read_text(encoding="utf-8"))
    for piece in (EXAMPLE_CLAIM, "epsilon 4.5 at delta 0.001 over all 9 rounds",
                  "| rate | 0.02 to 0.25: each", "A document is more than a sequence",
                  "| by all runs with `--dp example` on a site's text | in the log of that site |",
                  "`null` there is infinite", "| epsilon 0.25 by this run |",
                  "Losses of clients leave no site"):
        assert page.count(words(piece)) == 1, piece
    for wrong in ("differential privacy is not part of this", "sums over a round's clients of "
                  "losses", "workers and the machines they run on are trusted", "epsilon 7",
                  "much of what its text says"):
        assert wrong not in page
    assert ("simulated its sites" in page) == (not real)
    assert ("made of gradients with noise. The guarantee for sequences holds without them" in page
            ) == (not secure)
    assert guarantee.line.endswith("noise added by the workers of each site, who are trusted with "
                                   "its text")
