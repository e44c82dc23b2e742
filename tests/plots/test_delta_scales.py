"""Scales on which figures of changes can be compared, and what files do not say."""

from __future__ import annotations

from pathlib import Path

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


def test_singular_values_of_a_wide_range_are_logarithmic(tmp_path: Path) -> None:
    run = folders.ours(tmp_path, "central", CONFIG)
    folders.save_steps(run)
    made = figures_of(saved.find_entities(tmp_path, "server", False, None))
    (ax,) = made[f"averaged_svd_evolution_{CONFIG}"].axes
    assert (len(ax.lines), ax.get_yscale()) == (8, "log")
