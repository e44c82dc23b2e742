"""A figure shows what its runs found: the curves are made up, and end where published ones do."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from fedrun import cli
from fedrun.plots import perplexity
from fedrun.plots.curves import Curve
from fedrun.plots.runs import find_runs
from fedrun.plots.view import View, limits
from tests.support import folders
from tests.support.figures import ends_in_pixels

CONFIG = "pure_ssm_1_layer"
ENDS = {"fed_fisher": 596.0, "federated": 665.0, "fed_entropy": 679.0}
METHODS = f"3_method_comparison_{CONFIG}"


def figure_of(data_dir: Path, name: str, view: View | None = None) -> Figure:
    made, _ = perplexity.figures(find_runs(data_dir).runs, "tokens", view=view or View())
    figure = made[name]
    assert isinstance(figure, Figure), figure
    return figure


def insets(ax: Axes) -> list[Axes]:
    return [child for child in ax.child_axes if isinstance(child, Axes)]


@pytest.mark.parametrize("ends", [
    ENDS, {"fed_fisher": 600.0, "federated": 612.0, "fed_entropy": 624.2}],
    ids=["published", "2 %"])
def test_methods_are_told_apart(tmp_path: Path, ends: dict[str, float]) -> None:
    for method, end in ends.items():
        folders.study(tmp_path, 1, method=method, end=end)
    figure = figure_of(tmp_path, METHODS)
    apart = np.diff(ends_in_pixels(figure))
    width = figure.axes[0].lines[0].get_linewidth() * figure.dpi / 72
    assert (apart > 2 * width).all(), "lines that touch are one line"
    low, high = figure.axes[0].get_ylim()
    assert high < 1100, "the first steps are not what the axis is for"
    assert low < min(min(folders.ending_at(end).values()) for end in ends.values())
    (inset,) = insets(figure.axes[0])
    assert inset.get_ylim()[1] > 40_000, "which the inset is for"
    assert len(inset.lines) == 3


def test_methods_are_told_apart_beside_central_training(tmp_path: Path) -> None:
    """Which ends so far below them that nothing is left of the panel for an inset."""
    folders.study(tmp_path, end=299.0)
    for method, end in ENDS.items():
        folders.study(tmp_path, 1, method=method, end=end)
    figure = figure_of(tmp_path, METHODS)
    apart = np.diff(ends_in_pixels(figure))
    assert (apart > 1.5 * figure.axes[0].lines[0].get_linewidth() * figure.dpi / 72).all()
    (inset,) = insets(figure.axes[0])
    assert len(inset.lines) == 4


def test_curves_of_few_evaluations_are_whole(tmp_path: Path) -> None:
    for method, gain in (("fed_avg", 3.0), ("fed_fisher", 4.0)):
        folders.ours(tmp_path, method, CONFIG, gain=gain)
    (ax,) = figure_of(tmp_path, METHODS).axes
    highest = max(np.asarray(line.get_ydata()).max() for line in ax.lines)
    assert highest < ax.get_ylim()[1]
    assert not insets(ax)
    assert all(line.get_marker() not in (None, "None") for line in ax.lines)


def test_a_curve_alone_is_whole(tmp_path: Path) -> None:
    folders.study(tmp_path, 1, end=600.0)
    (ax,) = figure_of(tmp_path, "0_all_runs").axes
    assert ax.get_ylim()[1] > 40_000
    single = perplexity.single(find_runs(tmp_path).runs[0], "tokens")
    assert isinstance(single, Figure)
    assert single.axes[0].get_ylim()[1] > 40_000
    assert not insets(ax) + insets(single.axes[0])


@pytest.mark.parametrize(("end", "least", "most"), [
    (150.0, 2700, 4000), (900.0, 3300, 4000), (1e7, 100, 5000)], ids=["", "far", "diverged"])
def test_a_shorter_run_is_no_stub(end: float, least: float, most: float) -> None:
    found = limits([falling(40, end), falling(600, 100.0)], View())
    assert not isinstance(found, str)
    assert least < found[1] < most


def falling(steps: int, end: float) -> Curve:
    """From 4000, of ten evaluations."""
    at = np.linspace(1, steps, 10)
    return Curve(at, np.geomspace(4000, end, 10), None, [0], at.astype(int), [])


def test_what_the_user_asks_to_see(tmp_path: Path) -> None:
    for method, end in ENDS.items():
        folders.study(tmp_path / "runs", 1, method=method, end=end)
    whole = figure_of(tmp_path / "runs", METHODS, View(start=0)).axes[0]
    assert whole.get_ylim()[1] > 40_000
    assert not insets(whole)
    late = figure_of(tmp_path / "runs", METHODS, View(start=300)).axes[0]
    assert late.get_xlim()[0] == 300 * 4 * 4 * 256
    assert late.get_ylim()[1] < 720
    assert figure_of(tmp_path / "runs", METHODS, View(y_max=700.0)).axes[0].get_ylim()[1] == 700
    made, _ = perplexity.figures(find_runs(tmp_path / "runs").runs, "tokens", view=View(y_max=10))
    assert "needs --y_max > 4" in str(made[METHODS])
    made, _ = perplexity.figures(find_runs(tmp_path / "runs").runs, "tokens", view=View(601))
    assert made[METHODS] == "needs runs that go beyond --from 601"


def test_flags_of_the_view(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for method, end in ENDS.items():
        folders.study(tmp_path / "runs", 1, method=method, end=end)
    plot = ["plot", "perplexities", "--data_dir", str(tmp_path / "runs"), "--out_dir",
            str(tmp_path / "plots")]
    assert cli.main([*plot, "--from", "30", "--y_max", "900"]) == 0
    assert cli.main([*plot, "--from", "9999"]) == 1
    for flags, wrong in ((["--from", "-1"], "--from -1: must be >= 0"),
                         (["--y_max", "nan"], "--y_max nan: must be"),
                         (["--y_max", "1"], "--y_max 1.0: must be")):
        assert cli.main([*plot, *flags]) == 2
        assert wrong in capsys.readouterr().err


def test_a_run_that_diverged_does_not_flatten_the_others(tmp_path: Path) -> None:
    for method, end in (ENDS | {"fed_momentum": 4e7}).items():
        folders.study(tmp_path, 1, method=method, end=end)
    assert figure_of(tmp_path, METHODS).axes[0].get_ylim()[1] < 5000


def test_seeds_are_a_band_that_the_legend_counts(tmp_path: Path) -> None:
    for seed in range(3):
        folders.study(tmp_path, 1, seed, method="fed_fisher", end=590.0 + 5 * seed)
    folders.study(tmp_path, 1, end=665.0)
    legend = figure_of(tmp_path, METHODS).legends[0]
    assert [t.get_text() for t in legend.get_texts()] == ["FedAvg", "FedFisher, 3 seeds"]
    assert "bands: one standard deviation" in legend.get_title().get_text()


def test_local_updates_and_depths_have_colours(tmp_path: Path) -> None:
    for config in (CONFIG, "pure_ssm_2_layer", "pure_ssm_4_layer"):
        for updates in (1, 8):
            folders.study(tmp_path, updates, config=config, end=600.0 + updates)
    for name, count in ((f"2_lu_comparison_{CONFIG}", 2), ("5_configs_in_one_axes", 3)):
        (ax,) = figure_of(tmp_path, name).axes
        assert len({to_hex(line.get_color()) for line in ax.lines}) == count


def test_an_inset_hides_no_curve(tmp_path: Path) -> None:
    """Two methods far apart leave no corner free."""
    folders.study(tmp_path, end=299.0)
    folders.study(tmp_path, 1, end=665.0)
    figure = figure_of(tmp_path, f"1_central_vs_fed_{CONFIG}")
    ends_in_pixels(figure)
    (ax,), ((inset,),) = figure.axes, [insets(ax) for ax in figure.axes]
    hidden = inset.get_tightbbox()
    assert hidden is not None
    for line in ax.lines:
        points = ax.transData.transform(np.column_stack([
            np.asarray(line.get_xdata(), float), np.asarray(line.get_ydata(), float)]))
        assert not hidden.count_contains(points)
