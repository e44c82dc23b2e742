"""Every plot of folders in the original study's form.

The curves and the changes of weights are made up. On one layer and at one local update they end at
the means that the study published, with three seeds its deviations apart; nothing that is tracked
is drawn from them.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from fedrun import cli
from fedrun.plots import perplexity
from fedrun.plots.runs import find_runs
from tests.support import folders
from tests.support.figures import all_figures, ends_in_pixels, is_cut_off

CONFIG = "pure_ssm_1_layer"
PUBLISHED = {"federated": (664.6, 9.8), "fed_fisher": (595.9, 3.4), "fed_entropy": (678.6, 8.2),
             "fed_momentum": (682.8, 9.4)}
CENTRAL = 299.0
DEPTHS = ("pure_ssm_2_layer", "pure_ssm_4_layer")


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    data_dir = tmp_path_factory.mktemp("original")
    for config, lower in zip(DEPTHS, (20, 35), strict=True):
        folders.study(data_dir, None, 0, config, end=CENTRAL - lower)
        folders.study(data_dir, 1, 0, config, end=PUBLISHED["federated"][0] - 2 * lower)
    for seed in range(3):
        run = folders.study(data_dir, None, seed, CONFIG, end=CENTRAL)
        folders.save_steps(run, seed, study_keys=True)
        for updates in (1, 8):
            mean, deviation = PUBLISHED["federated"]
            end = mean + 5 * (updates - 1) + (seed - 1) * deviation
            run = folders.study(data_dir, updates, seed, CONFIG, end=end)
            if seed == 0:
                folders.save_steps(run / "server", seed, study_keys=True)
        for method, (mean, deviation) in PUBLISHED.items():
            if method != "federated":
                folders.study(data_dir, 1, seed, CONFIG, method, mean + (seed - 1) * deviation)
    return data_dir


@pytest.mark.slow
def test_every_plot_is_made(data_dir: Path, tmp_path: Path) -> None:
    for kind in ("perplexities", "deltas", "federated-deltas"):
        assert cli.main(["plot", kind, "--data_dir", str(data_dir), "--out_dir",
                         str(tmp_path)]) == 0
    configs = (CONFIG, *DEPTHS)
    methods = [f"fed_avg_{CONFIG}_lu_{lu}" for lu in (1, 8)]
    assert {path.stem for path in tmp_path.glob("*.png")} == {
        "0_all_runs", "4_multi_config_comparison", "5_configs_in_one_axes",
        *(f"{figure}_{config}" for config in configs for figure in (
            "1_central_vs_fed", "3_method_comparison")),
        *(f"{figure}_{CONFIG}" for figure in (
            "2_lu_comparison", "averaged_svd_evolution", "averaged_final_spectrum")),
        *(f"heatmap_structure_central_config_{CONFIG}_seed_{seed}" for seed in range(3)),
        *(f"{figure}_{method}" for method in methods for figure in ("svd_evolution",
                                                                    "svd_spectrum")),
        *(f"heatmap_{method}_seed_0_server" for method in methods)}
    page = tmp_path / "page.html"
    assert cli.main(["report", "--data_dir", str(data_dir), "--out", str(page),
                     "--skip_deltas"]) == 0
    for mean, deviation in PUBLISHED.values():
        assert f"{mean:.2f} ± {deviation:.2f}" in page.read_text(encoding="utf-8")


@pytest.mark.slow
def test_no_plot_cuts_its_text(data_dir: Path) -> None:
    assert [name for name, figure in all_figures(data_dir)
            if isinstance(figure, Figure) and is_cut_off(figure)] == []


def test_methods_end_at_the_published_means_and_are_told_apart(data_dir: Path) -> None:
    """Those that are 2 % apart, within the limits of a picture that has central training in it."""
    figure = perplexity.figures(find_runs(data_dir).runs, "tokens")[0][
        f"3_method_comparison_{CONFIG}"]
    assert isinstance(figure, Figure)
    lines = {str(line.get_gid()).split()[0]: line for line in figure.axes[0].lines}
    ends = {method: float(np.asarray(line.get_ydata())[-1]) for method, line in lines.items()}
    assert ends == pytest.approx({"central": CENTRAL} | {
        {"federated": "fed_avg"}.get(method, method): mean
        for method, (mean, _) in PUBLISHED.items()})
    pixels = ends_in_pixels(figure)
    width = lines["fed_avg"].get_linewidth() * figure.dpi / 72
    for (lower, low), (upper, high) in itertools.pairwise(
            zip(sorted(ends.values()), pixels, strict=True)):
        assert high - low > 1.5 * width or upper < 1.02 * lower
