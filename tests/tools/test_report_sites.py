"""What the report shows of runs between sites: who they were, and what privacy.md says."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import pytest

from fedrun import cli
from fedrun.data.sites import write_sites
from fedrun.plots import perplexity
from fedrun.plots.groups import groups
from fedrun.plots.run_folder import read_run
from fedrun.tools.report_sites import paragraphs, sites_part
from tests.support.folders import STEPS, ours, perplexity_at, write
from tests.support.site_files import THREE, sites_of
from tests.support.site_folders import NAMED, at_sites, of_sites


def report(data_dir: Path) -> str:
    assert cli.main(["report", "--data_dir", str(data_dir), "--skip_deltas"]) == 0
    return (data_dir / "report.html").read_text(encoding="utf-8")


def words(page: str) -> str:
    return " ".join(re.sub(r"<[^>]*>", " ", page).split())


@pytest.mark.parametrize(("secure", "real", "first"), [
    (True, True, "Who learns what, with --sites , --site_dir and --secure_sum ."),
    (False, True, "This run had no secure sums: the server's machine could read"),
    (True, False, "This run simulated its sites: its owner has read the text of all")])
def test_the_page_says_which_protections_held(tmp_path: Path, secure: bool, real: bool, first: str
                                              ) -> None:
    run = of_sites(tmp_path / "results", secure=secure, real=real, holdout=secure)
    shown = words(report(tmp_path / "results")).replace("&#39;", "'")
    assert f"fingerprint of the key the server {NAMED.listed[0]['fingerprint']}" in shown
    part = shown.split(NAMED.listed[-1]["fingerprint"])[1]
    assert part.startswith(f" {first}")
    said = (run / "privacy.md").read_text(encoding="utf-8")
    for sentence in ("Everybody follows the protocol.", "that is a demonstration."):
        assert sentence in said.replace("\n", " ")
        assert sentence in part
    assert "**" not in part
    assert "`" not in part


def test_it_names_the_sites_as_the_command_does(tmp_path: Path, capsys: pytest.CaptureFixture[str]
                                                ) -> None:
    of_sites(tmp_path / "results")
    write_sites(tmp_path / "sites.yaml", NAMED)
    assert cli.main(["sites", "show", "--sites", str(tmp_path / "sites.yaml")]) == 0
    told = [re.fullmatch(r"  (\w{4} \w{4} \w{4} \w{4})  ([^,]+)(?:, clients: (\d+))?", line)
            for line in capsys.readouterr().out.splitlines()[1:]]
    table = report(tmp_path / "results").split('<table class="sites">')[1].split("</table>")[0]
    rows = re.findall(r'<th scope="row">(.*?)</th><td class="number">(.*?)</td><td>(.*?)</td>',
                      table)
    assert rows == [(found[2], found[3] or "", found[1]) for found in told if found]
    assert [name for name, *_ in rows] == ["the server", "north", "south", "east"]


def test_the_table_has_a_column_where_something_is_held_out(tmp_path: Path) -> None:
    of_sites(tmp_path / "both")
    ours(tmp_path / "both", name="plain")
    page = report(tmp_path / "both")
    assert '<th class="number">held out by the sites</th>' in page
    end = at_sites(perplexity_at(STEPS[-1], 0, 1))
    assert f'<td class="number">{end:,.2f}</td>' in page
    assert page.count("Its sites, and what it showed") == 1
    ours(tmp_path / "without", name="plain")
    assert "held out" not in report(tmp_path / "without")


def test_a_page_that_is_lost_or_forged(tmp_path: Path) -> None:
    run = of_sites(tmp_path)
    (run / "privacy.md").write_text("# A\n\n**<script>** `<b>`\u202e\n\n\n")
    write(run / "environment.json", {
        "sites": [3, {"name": "<script>"}, {"clients": [1]}], "made_with": []})
    page = report(tmp_path)
    assert "<p><b>&lt;script&gt;</b> <code>&lt;b&gt;</code>" in page
    assert "<script>" not in page
    assert "\u202e" not in page
    for content, said in ((b"a" * 70_000, "its privacy.md cannot be read: "),
                          (b"# A\n", "privacy.md is empty"),
                          (None, "there is no privacy.md in its folder")):
        (run / "privacy.md").unlink()
        if content is not None:
            (run / "privacy.md").write_bytes(content)
        part = sites_part(read_run(run))
        assert part is not None
        assert part.missing.startswith(said)
        assert not part.privacy
    began = time.monotonic()
    paragraphs("**`" * 20_000)
    assert time.monotonic() - began < 2


def test_sites_are_told_by_what_their_file_says(tmp_path: Path) -> None:
    """Not by its path: a copy is the same, and another file under the same path is another."""
    other = sites_of(THREE | {"west": {}})
    of_sites(tmp_path, name="a")
    of_sites(tmp_path, name="b", seed=1, secure=False)
    of_sites(tmp_path, name="c", seed=2, sites=other)
    settings = json.loads((tmp_path / "b" / "config.json").read_text())
    write(tmp_path / "b" / "config.json", settings | {"sites": "copy/of.yaml"})
    found = groups(read_run(tmp_path / name) for name in "abc")
    assert [[run.name for run in group.runs] for group in found] == [["a", "b"], ["c"]]
    assert [dict(group.differs)["sites"] for group in found] == [
        f"north, south, east ({NAMED.digest()[:8]})",
        f"north, south, east, west ({other.digest()[:8]})"]


def test_central_training_on_the_servers_text_is_not_compared_with_sites(tmp_path: Path) -> None:
    ours(tmp_path, "central")
    of_sites(tmp_path)
    runs = [read_run(path) for path in sorted(tmp_path.iterdir())]
    made, _ = perplexity.figures(runs, "tokens")
    assert "in the same protocol; there are 2: sites=None; sites=north, south, east" in str(
        made["1_central_vs_fed_tiny"])
    ours(tmp_path, sites=None, secure_sum=False, site_holdout=None, name="plain")
    made, _ = perplexity.figures([read_run(path) for path in sorted(tmp_path.iterdir())], "tokens")
    (drawn,) = (name for name, figure in made.items()
                if name.startswith("1_") and not isinstance(figure, str))
    assert drawn.endswith("_sites=None")


def test_a_study_whose_runs_are_elsewhere(tmp_path: Path) -> None:
    write_sites(tmp_path / "sites.yaml", NAMED)
    history = json.loads((of_sites(tmp_path / "runs") / "training_history.json").read_text())
    study = tmp_path / "study"
    study.mkdir()
    write(study / "histories.json", {"held_lr_0.001_seed_1": history})
    write(study / "table.json", [{"setting": "held", "best": {"lr": 0.001}, "flags": {
        "method": "fed_avg", "sites": str(tmp_path / "sites.yaml"), "rounds": 90,
        "secure_sum": "true", "site_holdout": 0.05}}])
    page = report(study)
    assert "not known here: its folder, with privacy.md, is not here." in page
    assert '<th class="number">held out by the sites</th>' in page
