"""Scales on which figures of changes can be compared, and what files do not say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from fedrun.plots import deltas, saved
from tests.support import folders

CONFIG = "pure_ssm_1_layer"


def figures_of(found: saved.FoundEntities) -> dict[str, Figure]:
    made = deltas.figures(found).items()
    return {name: figure for name, figure in made if isinstance(figure, Figure)}


def test_heatmaps_of_one_call_share_their_colours(tmp_path: Path) -> None:
    for seed in (0, 1):
        run = folders.study(tmp_path, seed=seed)
        folders.save_steps(run, seed, study_keys=seed == 0)
    found = saved.find_entities(tmp_path, "server", False, None)
    made = figures_of(found)
    scales = {ax.images[0].get_clim() for name in made if name.startswith("heatmap")
              for ax in made[name].axes if ax.images}
    assert len(scales) == 1
    (note,) = [line for line in str(found).splitlines() if line.startswith("note")]
    assert "_seed_0: its files hold one layer without saying which" in note


def test_small_changes_are_seen_and_clipped_ones_told(tmp_path: Path) -> None:
    """A run that moved a hundredth of another is not white, on the scale that they share."""
    for seed, factor in ((0, 1.0), (1, 0.01)):
        run = folders.ours(tmp_path, "central", CONFIG, seed=seed)
        (run / "deltas").mkdir()
        change = factor * folders.change(90, 0)
        arrays: dict[str, Any] = {"delta_layers.0.in_proj": change}
        np.savez(run / "deltas" / "step_000090.npz", **arrays)
    made = figures_of(saved.find_entities(tmp_path, "server", False, None))
    strong, weak = (made[name] for name in sorted(made) if name.startswith("heatmap"))
    image = weak.axes[0].images[0]
    change = np.asarray(image.get_array())
    away = np.abs(np.asarray(image.norm(change)) - 0.5) / 0.5  # from white
    assert np.quantile(away, 0.9) > 0.05, "0.01 on a linear scale"
    limit = image.get_clim()[1]
    shown = np.asarray(strong.axes[0].images[0].get_array())
    assert f"({(np.abs(shown) > limit).mean():.1%} beyond the ends)" in strong.axes[-1].get_ylabel()
    assert (np.abs(shown) > limit).any()


def test_singular_values_of_a_wide_range_are_logarithmic(tmp_path: Path) -> None:
    run = folders.ours(tmp_path, "central", CONFIG)
    folders.save_steps(run)
    made = figures_of(saved.find_entities(tmp_path, "server", False, None))
    (ax,) = made[f"averaged_svd_evolution_{CONFIG}"].axes
    assert (len(ax.lines), ax.get_yscale()) == (8, "log")


def test_a_table_beside_a_heatmap_leaves_its_labels_below_and_above_the_panels(tmp_path: Path
                                                                              ) -> None:
    for sync in ("round", "epoch"):
        run = folders.ours(tmp_path, "fed_avg", CONFIG, name=sync, sync=sync)
        folders.save_steps(run / "server")
    made = figures_of(saved.find_entities(tmp_path, "server", True, None))
    heatmaps = [figure for name, figure in made.items() if name.startswith("heatmap")]
    assert len(heatmaps) == 2
    for figure in heatmaps:
        assert figure.legends
        above, below = (text.get_window_extent() for text in figure.texts
                        if text.get_text() in (figure.get_suptitle(), figure.get_supxlabel()))
        assert (above.x0 + above.x1) / 2 < 0.48 * figure.bbox.width
        assert abs(above.x0 + above.x1 - below.x0 - below.x1) / 2 < 2, "pixels"
