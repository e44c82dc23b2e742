"""Lines of one figure come from runs with the same protocol."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from fedrun import cli
from fedrun.plots import perplexity
from fedrun.plots.protocols import protocols, where
from fedrun.plots.runs import find_runs
from tests.support import folders

CONFIG = "pure_ssm_1_layer"
METHODS = f"3_method_comparison_{CONFIG}"


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    """Momentum with one --sync is the best of all; with the other it has no peer but FedAvg."""
    folders.ours(tmp_path, "central", CONFIG)
    for method, sync, gain in (("fed_avg", "round", 1.0), ("fed_fisher", "round", 1.1),
                               ("fed_momentum", "round", 0.5), ("fed_avg", "epoch", 0.8),
                               ("fed_momentum", "epoch", 2.0)):
        folders.ours(tmp_path, method, CONFIG, name=f"{method}_{sync}", gain=gain, sync=sync)
    return tmp_path


def lines(figure: Figure | str) -> dict[str, float]:
    """Method -> the last perplexity that is drawn."""
    assert isinstance(figure, Figure), figure
    return {str(line.get_gid()).split()[0]: float(np.asarray(line.get_ydata())[-1])
            for line in figure.axes[0].lines}


def test_each_protocol_has_its_figure(data_dir: Path) -> None:
    made, _ = perplexity.figures(find_runs(data_dir).runs, "tokens")
    assert METHODS not in made
    end = folders.STEPS[-1]
    assert lines(made[f"{METHODS}_sync=round"]) == pytest.approx({
        "central": folders.perplexity_at(end, 0, 1), "fed_avg": folders.perplexity_at(end, 0, 1),
        "fed_fisher": folders.perplexity_at(end, 0, 1.1),
        "fed_momentum": folders.perplexity_at(end, 0, 0.5)})
    other = made[f"{METHODS}_sync=epoch"]
    assert set(lines(other)) == {"central", "fed_avg", "fed_momentum"}
    assert isinstance(other, Figure)
    assert [text.get_text() for text in other.legends[1].get_texts()] == [
        "these runs", "sync", " ", "epoch"]


def test_where_chooses(data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plot = ["plot", "perplexities", "--data_dir", str(data_dir), "--out_dir", str(tmp_path / "out")]
    assert cli.main([*plot, "--where", "sync=epoch"]) == 0
    assert {p.stem for p in (tmp_path / "out").iterdir()} == {
        "0_all_runs", METHODS, f"1_central_vs_fed_{CONFIG}"}
    for wrong, said in (("sync=never", "no run has this value; there are epoch, round"),
                        ("sink=epoch", "no run has the setting 'sink'"),
                        ("sync", "must be SETTING=VALUE")):
        capsys.readouterr()
        assert cli.main([*plot, "--where", wrong]) == 2
        assert f"--where {wrong}: {said}" in capsys.readouterr().err


def test_what_is_tuned_or_compared_is_no_protocol(tmp_path: Path) -> None:
    folders.ours(tmp_path, "central", CONFIG, lr=1.0)
    folders.ours(tmp_path, "fed_avg", CONFIG, lr=0.1, rounds=8)
    folders.ours(tmp_path, "fed_avg", CONFIG, 8, rounds=1, threads=3)
    folders.ours(tmp_path, "fed_momentum", CONFIG, server_lr=2.0, sync="round")
    assert list(protocols(find_runs(tmp_path).runs)) == [()]
    folders.study(tmp_path, 1, seed=9)
    assert [len(its) for its in protocols(find_runs(tmp_path).runs).values()] == [4, 1]


def test_a_method_without_a_setting_is_in_each_protocol_that_differs_in_it(tmp_path: Path) -> None:
    """FedEntropy has no --weighting that could differ from the others."""
    folders.ours(tmp_path, "central", CONFIG)
    folders.ours(tmp_path, "fed_entropy", CONFIG)
    folders.ours(tmp_path, "fed_avg", CONFIG, weighting="uniform")
    folders.ours(tmp_path, "fed_fisher", CONFIG, weighting="uniform")
    runs = find_runs(tmp_path).runs
    assert [len(its) for its in protocols(runs).values()] == [4]
    folders.ours(tmp_path, "fed_momentum", CONFIG, weighting="samples")
    found = protocols(find_runs(tmp_path).runs)
    assert {key: {run.method for run in its} for key, its in found.items()} == {
        (("weighting", "samples"),): {"central", "fed_entropy", "fed_momentum"},
        (("weighting", "uniform"),): {"central", "fed_entropy", "fed_avg", "fed_fisher"}}
    assert {run.method for run in where(find_runs(tmp_path).runs, ["weighting=uniform"])} == {
        "central", "fed_entropy", "fed_avg", "fed_fisher"}


def test_no_protocol_with_two_methods_says_so(tmp_path: Path) -> None:
    folders.ours(tmp_path, "fed_avg", CONFIG, sampling="shuffle")
    folders.ours(tmp_path, "fed_fisher", CONFIG, sampling="replacement")
    made, _ = perplexity.figures(find_runs(tmp_path).runs, "tokens")
    assert "in the same protocol; there are 2: sampling=replacement; sampling=shuffle" in str(
        made[METHODS])
