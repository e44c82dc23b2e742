"""Figures draw what is in the histories and the saved weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure

from fedrun import cli
from fedrun.plots import deltas, perplexity, saved, style
from fedrun.plots.pieces import Result
from fedrun.plots.run_folder import AXES, Axis
from fedrun.plots.runs import find_runs
from tests.support import folders
from tests.support.runs import fresh_python, read_history

CONFIG = "pure_ssm_1_layer"


def drawn(figure: Figure | str, gid: str, panel: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """x and y of the line with that gid."""
    assert isinstance(figure, Figure), figure
    (line,) = [li for li in figure.axes[panel].lines if li.get_gid() == gid]
    return np.asarray(line.get_xdata()), np.asarray(line.get_ydata())


def figure_of(made: Mapping[str, Figure | str], name: str) -> Figure:
    """The figure of that name, which is there instead of a reason why it is not."""
    figure = made[name]
    assert isinstance(figure, Figure), figure
    return figure


def bands(ax: Axes) -> list[tuple[np.ndarray, np.ndarray]]:
    """Lowest and highest y at the x of each band, in drawing order."""
    found = []
    for collection in ax.collections:
        corners = np.asarray(collection.get_paths()[0].vertices)
        at = np.unique(corners[:, 0])
        found.append((np.array([corners[corners[:, 0] == x, 1].min() for x in at]),
                      np.array([corners[corners[:, 0] == x, 1].max() for x in at])))
    return found


def make(data_dir: Path, axis: Axis = "tokens", config: str | None = CONFIG
         ) -> tuple[dict[str, Result], list[str]]:
    return perplexity.figures(find_runs(data_dir).runs, axis, config)


def test_mean_and_band_are_those_of_the_histories(tmp_path: Path) -> None:
    paths = [folders.ours(tmp_path, config=CONFIG, seed=seed) for seed in (0, 1, 5)]
    folders.ours(tmp_path, "central", CONFIG)
    histories = [read_history(p) for p in paths]
    figure = figure_of(make(tmp_path)[0], f"1_central_vs_fed_{CONFIG}")
    for key, measure, band in (("server_val_ppl", "val_ppl", 0), ("train_ppl", "train_ppl", 1)):
        values = np.array([[r[key] for r in h] for h in histories])
        x, y = drawn(figure, f"fed_avg {CONFIG} 1 {measure}")
        np.testing.assert_allclose(x, [r["tokens"] for r in histories[0]])
        np.testing.assert_allclose(y, values.mean(axis=0))
        low, high = bands(figure.axes[0])[band]
        np.testing.assert_allclose(high - y, values.std(axis=0, ddof=1))
        np.testing.assert_allclose(y - low, values.std(axis=0, ddof=1))
    assert len(bands(figure.axes[0])) == 2, "one central seed has no band"


@pytest.mark.parametrize("axis", AXES)
def test_x_is_what_the_axis_asks_for(tmp_path: Path, axis: Axis) -> None:
    folders.ours(tmp_path, "fed_fisher", CONFIG, local_updates=8)
    folders.ours(tmp_path, "fed_avg", CONFIG, local_updates=8)
    figure = figure_of(make(tmp_path, axis)[0], f"3_method_comparison_{CONFIG}")
    steps = np.array(folders.STEPS)
    expected = {"tokens": steps * 4 * 8 * 4 * 256, "steps": steps * 8, "rounds": steps,
                "seconds": steps * 0.5, "bytes": steps * 1000}[axis]
    np.testing.assert_allclose(drawn(figure, f"fed_fisher {CONFIG} 8 val_ppl")[0], expected)


def test_seconds_of_seeds_are_averaged(tmp_path: Path) -> None:
    folders.ours(tmp_path, "central", CONFIG)
    folders.ours(tmp_path, config=CONFIG, seed=0)
    slow = folders.ours(tmp_path, config=CONFIG, seed=1)
    history = read_history(slow)
    folders.write(slow / "training_history.json",
                  [record | {"seconds": 1000.0 + record["global_step"]} for record in history])
    x, y = drawn(make(tmp_path, "seconds")[0][f"1_central_vs_fed_{CONFIG}"],
                 f"fed_avg {CONFIG} 1 val_ppl")
    steps = np.array(folders.STEPS)
    np.testing.assert_allclose(x, (0.5 * steps + 1000 + steps) / 2)
    np.testing.assert_allclose(y, [folders.perplexity_at(s, 0, 1) + 1.5 for s in folders.STEPS])


def test_folders_of_the_study(tmp_path: Path) -> None:
    folders.study(tmp_path)
    folders.study(tmp_path, local_updates=8, seed=0)
    folders.study(tmp_path, local_updates=8, seed=1)
    folders.study(tmp_path, local_updates=1, method="fed_entropy")
    made, _ = make(tmp_path)
    figure = figure_of(made, f"1_central_vs_fed_{CONFIG}")
    x, y = drawn(figure, f"central {CONFIG} 1 val_ppl")
    np.testing.assert_allclose(x, np.array(folders.STEPS) * 16 * 256)
    np.testing.assert_allclose(y, [folders.perplexity_at(s, 0, 1) for s in folders.STEPS])
    x, y = drawn(figure, f"fed_avg {CONFIG} 8 train_ppl")
    np.testing.assert_allclose(x, np.array(folders.STEPS) * 4 * 8 * 4 * 256)
    np.testing.assert_allclose(y, [folders.perplexity_at(s, 0, 1) + 21.5 for s in folders.STEPS])
    assert "do not record them" in figure.legends[0].get_title().get_text()
    panels = figure_of(made, f"3_method_comparison_{CONFIG}")
    assert drawn(panels, f"fed_entropy {CONFIG} 1 val_ppl", panel=0)[0][0] == 4 * 4 * 256


def test_plot_perplexities_draws_its_figures(
        tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for config in ("pure_ssm_1_layer", "pure_ssm_2_layer"):
        folders.ours(tmp_path, "central", config)
        for method in ("fed_avg", "diloco", "a_method_of_mine"):
            for updates in (1, 8):
                folders.ours(tmp_path, method, config, updates)
    out = tmp_path / "plots"
    assert cli.main(["plot", "perplexities", "--data_dir", str(tmp_path), "--out-dir", str(out),
                     "--config", CONFIG]) == 0
    assert sorted(p.name for p in out.iterdir()) == sorted(
        f"{name}.{ending}" for name in ("0_all_runs", f"1_central_vs_fed_{CONFIG}",
                                        f"2_lu_comparison_{CONFIG}",
                                        f"3_method_comparison_{CONFIG}",
                                        "4_multi_config_comparison",
                                        "5_configs_in_one_axes") for ending in ("png", "svg"))
    said = capsys.readouterr().out
    assert "found 14 runs" in said
    assert f"  {CONFIG}: diloco, local updates 8, seeds 0\n" in said
    made, _ = make(tmp_path)
    for name, figure in made.items():
        assert isinstance(figure, Figure)
        if name.startswith(("0_", "2_", "5_")):
            continue  # whose colours tell runs, local updates or configs apart
        for line in (li for ax in figure.axes for li in ax.lines if " " in str(li.get_gid())):
            method = str(line.get_gid()).split()[0]
            assert to_hex(line.get_color()).upper() == style.look(method).colour
    final = figure_of(made, "4_multi_config_comparison").axes[-1]
    assert [label.get_text() for label in final.get_xticklabels()] == ["1\nlayer", "2\nlayer"]
    (bars,) = [c for c in final.containers if isinstance(c, ErrorbarContainer)][:1]
    ends = np.asarray(bars.lines[0].get_ydata()).astype(float)
    np.testing.assert_allclose(ends, [
        folders.perplexity_at(folders.STEPS[-1], 0, 1)] * 2)


def test_no_two_methods_look_alike() -> None:
    assert len({look.colour for look in style.LOOKS.values()}) == len(style.LOOKS)
    assert len({look.marker for look in style.LOOKS.values()}) == len(style.LOOKS)
    unknown = style.look("a_method_of_mine")
    assert unknown.colour not in {look.colour for look in style.LOOKS.values()}
    assert unknown.marker not in {look.marker for look in style.LOOKS.values()}


def test_damaged_and_shorter_runs_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]
                                            ) -> None:
    folders.ours(tmp_path, "central", CONFIG)
    whole = folders.ours(tmp_path, config=CONFIG, seed=0)
    folders.ours(tmp_path, config=CONFIG, seed=1, steps=(1, 30))
    torn = folders.ours(tmp_path, config=CONFIG, seed=2)
    (torn / "training_history.json").write_text('[{"global_step": 1, "server')
    young = folders.ours(tmp_path, config=CONFIG, seed=3)
    (young / "training_history.json").unlink()
    empty = folders.ours(tmp_path, config=CONFIG, seed=4)
    folders.write(empty / "training_history.json", [{"global_step": 1}, 7, {"loss": 1}])
    strange = folders.ours(tmp_path, config=CONFIG, seed=5)
    folders.write(strange / "config.json", {"method": "fed_avg"})
    nameless = tmp_path / "mine"
    nameless.mkdir()
    folders.write(nameless / "training_history.json", [])
    (tmp_path / "plots").mkdir()

    found = find_runs(tmp_path)
    assert [name for name, _ in found.passed_over] == [
        torn.name, young.name, empty.name, strange.name, nameless.name]
    assert cli.main(["plot", "perplexities", "--data_dir", str(tmp_path),
                     "--out_dir", str(tmp_path / "plots")]) == 0
    said = capsys.readouterr().out
    for path, reason in ((torn, "training_history.json is damaged"), (young, "(yet)"),
                         (empty, "no record"), (strange, "config.json is not a run's"),
                         (nameless, "does not give")):
        (line,) = [li for li in said.splitlines() if li.startswith(f"skipped {path.name}:")]
        assert reason in line
    assert f"left out federated_config_{CONFIG}_lu_1_seed_1: shorter" in said
    assert f"skipped 2_lu_comparison_{CONFIG}: needs" in said
    history = read_history(whole)
    _, y = drawn(make(tmp_path)[0][f"1_central_vs_fed_{CONFIG}"], f"fed_avg {CONFIG} 1 val_ppl")
    np.testing.assert_allclose(y, [r["server_val_ppl"] for r in history])


def test_of_variants_the_best_is_drawn_and_named(tmp_path: Path) -> None:
    folders.ours(tmp_path, "central", CONFIG)
    for gain, lr in ((0.5, 1e-3), (2.0, 2e-3), (1.0, 4e-3)):
        folders.ours(tmp_path, config=CONFIG, name=f"grid_{lr}", gain=gain, lr=lr)
    figure = figure_of(make(tmp_path)[0], f"1_central_vs_fed_{CONFIG}")
    _, y = drawn(figure, f"fed_avg {CONFIG} 1 val_ppl")
    np.testing.assert_allclose(y, [folders.perplexity_at(s, 0, 2.0) for s in folders.STEPS])
    note = figure.legends[0].get_title().get_text()
    assert "lr=0.002, the best of 3 variants" in note


def test_diverged_points_are_left_out(tmp_path: Path) -> None:
    run = folders.ours(tmp_path, "central", CONFIG)
    history = read_history(run)
    history[1] |= {"val_ppl": float("inf"), "val_loss": float("nan")}
    folders.write(run / "training_history.json", history)
    (read,) = find_runs(tmp_path).runs
    assert list(read.points("val_ppl", "rounds")) == [1, 60, 90]


def test_nothing_to_draw_says_what_is_wanted(tmp_path: Path, capsys: pytest.CaptureFixture[str]
                                             ) -> None:
    assert cli.main(["plot", "perplexities", "--data_dir", str(tmp_path), "--config", "tiny"]) == 1
    said = capsys.readouterr().out
    assert said.count("skipped") == 6
    assert "needs central and fed_avg runs of --config tiny" in said
    for argv, wrong in ((["plot", "perplexity"], "did you mean perplexities?"),
                        (["plot", "perplexities", "--x", "miles"], "--x"),
                        (["plot", "deltas", "--layer", "first"], "--layer first"),
                        (["plot", "deltas", "--data_dir", "/nowhere"], "--data_dir /nowhere")):
        assert cli.main(argv) == 2
        assert wrong in capsys.readouterr().err


@given(st.floats(1.0, 1e6), st.floats(1.001, 1e6))
def test_ticks_are_few_and_inside(low: float, ratio: float) -> None:
    ticks = style.log_ticks(low, low * ratio)
    assert 2 <= len(ticks) <= 9
    assert all(low * (1 - 1e-6) <= t <= low * ratio * (1 + 1e-6) for t in ticks)
    assert ticks == sorted(set(ticks))


def test_no_torch_is_needed(tmp_path: Path) -> None:
    folders.ours(tmp_path, "central", CONFIG)
    folders.ours(tmp_path, config=CONFIG)
    program = ("import sys; from fedrun import cli; "
               f"assert cli.main(['plot', 'perplexities', '--data_dir', {str(tmp_path)!r}, "
               f"'--out_dir', {str(tmp_path / 'out')!r}]) == 0; "
               f"assert cli.main(['report', '--data_dir', {str(tmp_path)!r}]) == 0; "
               "import fedrun.tools.watch; assert 'torch' not in sys.modules; "
               "assert 'matplotlib.pyplot' not in sys.modules")
    fresh_python(program)


# ---- how weights changed -------------------------------------------------------------------------

def test_strongest_rows_and_columns() -> None:
    change = folders.change(30, 0)
    rows, columns = deltas.strongest(change, 5)
    norms = [sum(x * x for x in row) for row in change.tolist()]
    assert list(rows) == sorted(sorted(range(len(norms)), key=lambda i: -norms[i])[:5])
    assert len(columns) == 5
    assert len(deltas.strongest(change, 80)[0]) == folders.ROWS


def test_spectrum_and_energy_rank() -> None:
    change = folders.change(30, 0)
    values = deltas.singular_values(change)
    gram = change.astype(np.float64).T @ change
    np.testing.assert_allclose(values, np.sqrt(np.linalg.eigvalsh(gram)[::-1]), rtol=1e-6)
    rank = deltas.energy_rank(values)
    assert sum(values[:rank] ** 2) >= 0.95 * sum(values**2) > sum(values[:rank - 1] ** 2)
    assert deltas.energy_rank(np.array([2.0, 0.0, 0.0])) == 1


@pytest.mark.parametrize("study_keys", [False, True])
def test_central_figures(tmp_path: Path, study_keys: bool) -> None:
    for seed in (0, 1):
        run = folders.study(tmp_path, seed=seed) if study_keys else \
            folders.ours(tmp_path, "central", CONFIG, seed=seed)
        folders.save_steps(run, seed, study_keys=study_keys)
    out = tmp_path / "plots"
    assert cli.main(["plot", "deltas", "--data_dir", str(tmp_path), "--output_dir", str(out)]) == 0
    assert {p.name for p in out.glob("*.png")} == {
        f"heatmap_structure_central_config_{CONFIG}_seed_0.png",
        f"heatmap_structure_central_config_{CONFIG}_seed_1.png",
        f"averaged_svd_evolution_{CONFIG}.png", f"averaged_final_spectrum_{CONFIG}.png"}
    made = deltas.figures(saved.find_entities(tmp_path, "server", False, None))
    expected = np.array([[np.linalg.svd(folders.change(step, seed), compute_uv=False)
                          for step in folders.STEPS] for seed in (0, 1)]).mean(axis=0)
    evolution = figure_of(made, f"averaged_svd_evolution_{CONFIG}")
    for index, line in enumerate(evolution.axes[0].lines):
        assert tuple(np.asarray(line.get_xdata())) == folders.STEPS
        np.testing.assert_allclose(np.asarray(line.get_ydata()), expected[:, index], rtol=1e-5)
    spectrum = figure_of(made, f"averaged_final_spectrum_{CONFIG}")
    mean, mark = spectrum.axes[0].lines
    np.testing.assert_allclose(np.asarray(mean.get_ydata()), expected[-1], rtol=1e-5)
    assert np.asarray(mark.get_xdata())[0] == deltas.energy_rank(expected[-1])
    heatmap = figure_of(made, f"heatmap_structure_central_config_{CONFIG}_seed_1")
    images = [ax.images[0] for ax in heatmap.axes if ax.images]
    assert len({image.get_clim() for image in images}) == 1
    np.testing.assert_allclose(np.asarray(images[-1].get_array()),
                               folders.change(folders.STEPS[-1], 1))


@pytest.mark.slow
def test_federated_figures_of_server_clients_and_layers(tmp_path: Path) -> None:
    run = folders.ours(tmp_path, "fed_momentum", CONFIG, 8, seed=3)
    folders.ours(tmp_path, "central", CONFIG)
    folders.save_steps(run / "server", layers=2)
    folders.save_steps(run / "client_0", layers=2, seed=9)
    base = f"fed_momentum_{CONFIG}_lu_8"

    def names(*flags: str) -> set[str]:
        out = tmp_path / "_".join(["plots", *flags])
        assert cli.main(["plot", "federated-deltas", "--data_dir", str(tmp_path), "--output-dir",
                         str(out), *flags]) == 0
        return {p.stem for p in out.glob("*.png")}

    server = {f"heatmap_{base}_seed_3_server", f"svd_evolution_{base}", f"svd_spectrum_{base}"}
    assert names() == server
    assert names("--layer", "1") == {f"{name}_layer1" for name in server}
    assert names("--layer", "all") == server | {f"{name}_layer1" for name in server}
    assert names("--entity", "client_0") == {
        f"heatmap_{base}_seed_3_client_0", f"svd_evolution_{base}_client_0",
        f"svd_spectrum_{base}_client_0"}


def test_changes_are_computed_where_only_parameters_were_saved(tmp_path: Path) -> None:
    run = folders.study(tmp_path, local_updates=1)
    folders.save_steps(run / "server", deltas=False, study_keys=True)
    (entity,) = saved.find_entities(tmp_path, "server", True, None).entities
    assert entity.changed_steps == list(folders.STEPS[1:])
    change = entity.changes(0, [30])[30]
    np.testing.assert_allclose(change, folders.change(30, 0) - folders.change(1, 0), atol=1e-6)
    title = deltas.heatmap(entity, 0, 1.0).get_suptitle()
    assert "since step 1, layer not said by its files" in title


def test_damaged_arrays_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = folders.ours(tmp_path, "central", CONFIG)
    folders.save_steps(run, params=False)
    torn = run / "deltas" / "step_000060.npz"
    torn.write_bytes(torn.read_bytes()[:100])
    np.savez(run / "deltas" / "step_000090.npz", other=np.ones(3))
    folders.ours(tmp_path, "central", CONFIG, seed=1)
    assert cli.main(["plot", "deltas", "--data_dir", str(tmp_path), "--output_dir",
                     str(tmp_path / "plots")]) == 0
    said = capsys.readouterr().out
    assert f"skipped {run.name}/deltas/step_000060.npz: is damaged" in said
    assert f"skipped {run.name}/deltas/step_000090.npz: has no in_proj" in said
    assert f"skipped central_config_{CONFIG}_seed_1: no deltas" in said
    assert cli.main(["plot", "federated-deltas", "--data_dir", str(tmp_path)]) == 1
