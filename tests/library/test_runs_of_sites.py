"""What readers of run folders show of runs between sites: no numbers of a single client, and the
perplexity on what the sites hold out."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text

import fedrun
from fedrun import cli
from fedrun.plots import perplexity
from fedrun.plots.run_folder import Run, read_run
from fedrun.records.events import Progress
from fedrun.records.trackers import scalars
from tests.support.folders import STEPS, ours, perplexity_at
from tests.support.real_sites import Institutions
from tests.support.site_folders import at_sites, of_sites

LAST = perplexity_at(STEPS[-1], 0, 1)


def watched(run: Path, capfd: pytest.CaptureFixture[str]) -> str:
    assert cli.main(["watch", str(run)]) == 0
    return capfd.readouterr().out


def test_watch_shows_the_sites_curve_and_how_many_were_left_out(
        tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    text = watched(of_sites(tmp_path), capfd)
    (line,) = [line for line in text.splitlines() if line.startswith("held out by the sites")]
    assert line.split()[-2:] == ["lowest", f"{at_sites(LAST):.1f}"]
    assert "clients left out 4× (not finite: 2, exceeds its bound: 2)" in text
    text = watched(of_sites(tmp_path, holdout=False, name="plain"), capfd)
    assert "held out" not in text
    assert f"lowest {LAST:.1f}" in text


def test_watch_counts_a_round_that_a_resumed_run_repeats_once(
        tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = of_sites(tmp_path)
    lines = (run / "events.jsonl").read_text().splitlines(keepends=True)
    forged = {"event": "round", "round": 60, "left_out": 1, "left_out_why": {"\u202eother": 1,
              "not finite": "many", "exceeds its bound": -1}, "site_val_ppl": None}
    (run / "events.jsonl").write_text("".join([*lines[:3], *lines[2:3], json.dumps(forged) + "\n",
                                               *lines[4:]]))
    text = watched(run, capfd)
    assert "clients left out 5× (not finite: 2, exceeds its bound: 2, " in text
    assert "\u202e" not in text


def test_the_line_of_an_evaluated_round_has_it(caplog: pytest.LogCaptureFixture) -> None:
    progress = Progress("round", 2)
    progress.step(1, 9.0, 100, 1.0, {"train ppl": 9.04, "val ppl": 8.0, "site val ppl": 7.25})
    progress.step(2, 8.0, 200, 2.0, {"train ppl": 8.5, "val ppl": 7.0})
    progress.close()
    assert [record.getMessage() for record in caplog.records] == [
        "round 1/2  train ppl 9.0  val ppl 8.0  site val ppl 7.2  tokens/s 100",
        "round 2/2  train ppl 8.5  val ppl 7.0  tokens/s 100"]


def test_trackers_have_it_beside_the_other_perplexities() -> None:
    assert scalars({"round": 3, "site_val_ppl": 7.5, "left_out": 2,
                    "left_out_why": {"not finite": 2}}) == {
        "perplexity/sites": 7.5, "left_out": 2.0}


def test_an_opened_run_has_it(tmp_path: Path) -> None:
    run = fedrun.open_run(of_sites(tmp_path))
    frame = run.history.frame()
    assert [*frame.columns[:4]] == ["global_step", "train_ppl", "server_val_ppl", "site_val_ppl"]
    assert frame["left_out"].tolist() == [1, 3, 0, 0]
    end = f"{at_sites(LAST):.2f}"
    assert f"perplexity {LAST:.2f}, held out by the sites {end};" in repr(run.history)
    assert f"<td>perplexity held out by the sites</td><td>{end}</td>" in run._repr_html_()
    validation, train, sites = run.plot("rounds").axes[0].lines
    assert sites.get_ydata() == pytest.approx([at_sites(r["server_val_ppl"])
                                              for r in run.history])
    assert sites.get_label() == "held out by the sites"
    assert len({line.get_linestyle() for line in (validation, train, sites)}) == 3
    without = fedrun.open_run(of_sites(tmp_path, holdout=False, name="plain"))
    assert len(without.plot().axes[0].lines) == 2
    for shown in (repr(without.history), without._repr_html_()):
        assert "held out" not in shown


def test_figures_draw_it_beside_the_validation_curve(tmp_path: Path) -> None:
    for holdout in (True, False):
        of_sites(tmp_path, holdout=holdout, name=f"sites {holdout}", lr=1e-3 if holdout else 2e-3)
    ours(tmp_path, name="without sites")
    runs = [read_run(path) for path in sorted(tmp_path.iterdir())]  # sites False, True, without
    for run in runs:
        figure = perplexity.single(run, "tokens")
        assert not isinstance(figure, str)
        labels = [text.get_text() for text in figure.legends[0].get_texts()]
        assert labels == ["validation", "train", "held out by the sites"][:2 + (
            run.name == "sites True")]
    overview = all_runs(runs)
    gids = [line.get_gid() for line in overview.axes[0].lines]
    assert sorted(filter(None, gids)) == ["fed_avg tiny 1 site_val_ppl",
                                          *["fed_avg tiny 1 val_ppl"] * 3]
    (alone,) = (line for line in overview.axes[0].lines if "site" in (line.get_gid() or ""))
    (own,) = (line for line in overview.axes[0].lines if line.get_color() == alone.get_color()
              and line is not alone)
    assert alone.get_ydata() == pytest.approx(at_sites(np.asarray(own.get_ydata())))
    words = {text.get_text() for text in overview.findobj(Text)}
    assert {"held out\nby sites", f"{at_sites(LAST):,.1f}"} <= words
    assert not any("held out" in text.get_text() for text in all_runs(runs[:1]).findobj(Text))


def all_runs(runs: list[Run]) -> Figure:
    made = perplexity.figures(runs, "tokens")[0]["0_all_runs"]
    assert isinstance(made, Figure)
    return made


# ---- what runs write -----------------------------------------------------------------------------

@pytest.fixture(scope="module")
def institutions() -> Iterator[Institutions]:
    with tempfile.TemporaryDirectory(prefix="fedrun-sites-") as folder:
        yield Institutions(Path(folder))


@pytest.mark.slow
@pytest.mark.parametrize("real", [True, False])
def test_a_run_is_read_as_the_folders_here(real: bool, institutions: Institutions, tmp_path: Path,
                                           capfd: pytest.CaptureFixture[str]) -> None:
    """These have the form of what real sites and a simulation write, and every reader takes it."""
    flags = ("--secure_sum", "--site_holdout", "0.2", "--rounds", "4")
    made = institutions.train(*flags).server if real else institutions.simulate(*flags)
    assert made.code == 0, made.output
    run, record = made.run_dir, made.history[-1]
    by_hand = of_sites(tmp_path, sites=institutions.sites, real=real)
    assert read(by_hand, "training_history.json")[-1].keys() <= record.keys()
    timed = {"event", "time", "tokens_per_second", "local_training_seconds", "aggregation_seconds",
             "evaluation_seconds"}
    *_, event, _ = made.events
    *_, ours, _ = map(json.loads, (by_hand / "events.jsonl").read_text().splitlines())
    assert ours.keys() - timed == event.keys() - timed
    assert [type(ours[name]) for name in ("left_out", "left_out_why")] == [
        type(event[name]) for name in ("left_out", "left_out_why")] == [int, dict]
    written, listed = read(run, "environment.json"), read(by_hand, "environment.json")
    assert written["sites"] == listed["sites"]
    assert written["made_with"]["sites"] == listed["made_with"]["sites"]
    assert (run / "privacy.md").read_text() == (by_hand / "privacy.md").read_text()

    end, ppl = f"{record['server_val_ppl']:.1f}", f"{record['site_val_ppl']:.1f}"
    assert re.search(rf"round 4/4  train ppl \S+  val ppl {end}  site val ppl {ppl}  tokens/s",
                     made.output)
    (line,) = [line for line in watched(run, capfd).splitlines() if "held out" in line]
    assert line.startswith(f"held out by the sites  {ppl}  ")
    opened = fedrun.open_run(run)
    assert f"held out by the sites {record['site_val_ppl']:.2f}" in repr(opened.history)
    assert len(opened.plot().axes[0].lines) == 3
    assert opened.evaluate(cache_dir=tmp_path)["loss"] == pytest.approx(
        record["server_val_loss"], rel=1e-3)
    assert opened.generate("The", max_new_tokens=3).startswith("The")
    assert "held out by the sites" in (opened.export(tmp_path / "out") / "README.md").read_text()
    for command in (["report", "--data_dir"], ["plot", "perplexities", "--data_dir"],
                    ["plot", "federated-deltas", "--data_dir"]):
        more = ["--out_dir", str(tmp_path / "plots")] * (command[0] == "plot")
        assert cli.main([*command, str(run.parent), *more]) == 0
    page = (run.parent / "report.html").read_text(encoding="utf-8")
    assert f'<td class="number">{record["site_val_ppl"]:,.2f}</td>' in page
    for one in institutions.sites.listed:
        assert one["fingerprint"] in page
    assert ("This run simulated its sites" in page) == (not real)
    assert re.search(r"sites</th><td>north, south, east \(\w{8}\)</td>", page)


def read(run: Path, name: str) -> Any:
    return json.loads((run / name).read_text())
