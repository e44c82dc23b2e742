"""The overview shows every run, and what differs stands in tables: nothing is cut off."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fedrun import cli
from fedrun.plots import perplexity, style
from fedrun.plots.runs import find_runs
from tests.support import folders
from tests.support.figures import all_figures, is_cut_off

CONFIG = "pure_ssm_1_layer"
EIGHT: tuple[dict[str, Any], ...] = (
    {"lr": 0.001, "sync": "round", "sampling": "shuffle", "client_moments": "average",
     "weight_decay": 0.01, "num_clients": 4, "partition": "contiguous", "warmup": 0},
    {"lr": 0.002, "sync": "epoch", "sampling": "replacement", "client_moments": "keep",
     "weight_decay": 0.1, "num_clients": 16, "partition": "dirichlet", "warmup": 20})


def overview(data_dir: Path) -> Figure:
    figure = perplexity.figures(find_runs(data_dir).runs, "tokens")[0]["0_all_runs"]
    assert isinstance(figure, Figure), figure
    return figure


def table(figure: Figure) -> list[dict[str, str]]:
    """The rows of the table below the overview."""
    texts = figure.legends[0].get_texts()
    cells = [text.get_text().strip().replace("\n", "_") for text in texts]
    across = sum(text.get_fontweight() == "bold" for text in texts)
    columns = np.array(cells).reshape(across, -1)
    return [dict(zip(columns[:, 0], row, strict=True)) for row in columns.T[1:]]


def made_up(data_dir: Path, count: int) -> Path:
    """So many runs, whose settings differ in more the fewer they are."""
    for number in range(count):
        method = "central" if number == 4 else ("fed_avg", "fed_fisher", "fed_momentum")[
            number % 3 if count > 5 else 0]
        settings: dict[str, Any] = dict(EIGHT[number % 2]) if count < 20 else {
            "sync": ("round", "epoch")[number // 3 % 2], "lr": 0.001}
        run = folders.ours(
            data_dir, method, CONFIG, (1, 8)[number // 10] if method != "central" else 1,
            seed=number // 6 if count > 5 else 0, gain=1 + 0.1 * number,
            name=f"a_run_with_quite_a_long_name_of_mine_number_{number}", **settings)
        if number < 3:
            folders.save_steps(run if method == "central" else run / "server", number)
    return data_dir


@pytest.mark.parametrize("count", [2, *(pytest.param(n, marks=pytest.mark.slow) for n in (5, 20))])
def test_nothing_is_cut_off(tmp_path: Path, count: int) -> None:
    made_up(tmp_path, count)
    made = dict(all_figures(tmp_path))
    drawn = {name: figure for name, figure in made.items() if isinstance(figure, Figure)}
    assert len(drawn) > 4
    assert [name for name, figure in drawn.items() if is_cut_off(figure)] == []
    assert len(table(overview(tmp_path))) == {2: 2, 5: 5, 20: 12}[count]


def test_three_runs_of_one_method_are_three_lines(tmp_path: Path) -> None:
    for seed in range(3):
        folders.ours(tmp_path, "fed_avg", CONFIG, seed=seed)
    figure = overview(tmp_path)
    lines = figure.axes[0].lines
    for seed, line in enumerate(lines):
        np.testing.assert_allclose(np.asarray(line.get_ydata()), [
            folders.perplexity_at(step, seed, 1) for step in folders.STEPS])
    assert len({(str(line.get_color()), str(line.get_marker())) for line in lines}) == 3
    assert [row["seed"] for row in table(figure)] == ["0", "1", "2"]
    assert not figure.axes[0].collections, "a band"


def test_lines_have_the_same_dashes_in_the_panel_the_inset_and_the_table(tmp_path: Path) -> None:
    for seed in range(3):
        folders.study(tmp_path, seed, end=300.0 + 10 * seed)
    figure = overview(tmp_path)
    (ax,), (legend,) = figure.axes, figure.legends
    (inset,) = ax.child_axes
    assert isinstance(inset, Axes)
    samples = [line for line in legend.get_lines() if line.get_linestyle() != "None"]
    panel, small, table_ = ([vars(line)["_unscaled_dash_pattern"] for line in lines]
                            for lines in (ax.lines, inset.lines, samples))
    assert len(set(map(str, panel))) == 3
    assert panel == small == table_
    for line in inset.lines:
        assert line.get_transform() == inset.transData
        assert str(line.get_marker()) == "none"


def test_equal_runs_are_two_lines(tmp_path: Path) -> None:
    for name in ("one", "two"):
        folders.ours(tmp_path, "fed_avg", CONFIG, name=name)
    figure = overview(tmp_path)
    assert len(figure.axes[0].lines) == 2
    assert table(figure) == [{"run": name, "final_perplexity": "179.3"} for name in ("one", "two")]
    assert not figure.axes[0].collections, "a band"


def test_protocols_are_together_and_told_in_the_table(tmp_path: Path) -> None:
    for number, settings in enumerate(EIGHT):
        folders.ours(tmp_path, "fed_avg", CONFIG, name=f"run {number}", **settings)
    rows = table(overview(tmp_path))
    assert {row["run"]: {name: row[name] for name in EIGHT[0]}
            for row in rows} == {f"run {number}": {k: str(v) for k, v in its.items()}
                                 for number, its in enumerate(EIGHT)}


def test_runs_on_other_text_are_in_a_panel_of_their_own(tmp_path: Path) -> None:
    for name, dataset in (("one", "pydocs"), ("two", "pydocs"), ("toy", "notes.txt")):
        folders.ours(tmp_path, "fed_avg", CONFIG, name=name, dataset=dataset)
    figure = overview(tmp_path)
    assert {ax.get_title(): len(ax.lines) for ax in figure.axes} == {
        "notes.txt, bpe:400": 1, "pydocs, bpe:400": 2}
    assert not is_cut_off(figure)


def test_runs_known_at_their_ends_alone_are_dots(tmp_path: Path) -> None:
    for method, gain in (("fed_avg", 1.0), ("fed_fisher", 2.0)):
        folders.ours(tmp_path, method, CONFIG, steps=(1, 90), gain=gain)
    (ax,) = overview(tmp_path).axes
    dots = [(np.asarray(line.get_xdata()).tolist(), np.asarray(line.get_ydata()).tolist(),
             line.get_linestyle()) for line in ax.lines]
    assert dots == [([place], [pytest.approx(folders.perplexity_at(90, 0, gain))], "None")
                    for place, gain in ((1, 2.0), (2, 1.0))]
    assert ax.get_xlabel() == "row of the table below"


def test_many_runs_share_the_look_of_their_settings(tmp_path: Path) -> None:
    for seed in range(6):
        for updates, gain in ((1, 1.0), (8, 2.0)):
            folders.ours(tmp_path, "fed_avg", CONFIG, updates, seed=seed, gain=gain)
    figure = overview(tmp_path)
    lines = figure.axes[0].lines
    assert len(lines) == 12
    assert len({str(line.get_color()) for line in lines}) == 2
    ends = [folders.perplexity_at(folders.STEPS[-1], seed, 1.0) for seed in range(6)]
    best, other = table(figure)
    assert (best["local_updates"], other["local_updates"]) == ("8", "1")
    assert other["final_perplexity"] == f"{np.mean(ends):.1f} ± {np.std(ends, ddof=1):.1f}"
    assert other["seeds"] == "0, 1, 2, 3, 4, 5"


def test_cells_of_a_row_are_on_a_line(tmp_path: Path) -> None:
    """Whatever letters are in them."""
    for number in range(30):
        folders.ours(tmp_path, "fed_avg", CONFIG, name=str(number), lr=0.001 * number,
                     tokenizer="gg__" if number % 2 else "nn")
    figure = overview(tmp_path)
    assert not is_cut_off(figure)
    texts = figure.legends[0].get_texts()
    heights = [text.get_transform().transform((0, 0))[1] for text in texts]
    rows = np.array(heights).reshape(-1, len(table(figure)) + 1)
    assert np.ptp(rows, axis=0).max() < 1, "pixels"


def test_looks_of_lines_differ() -> None:
    looks = [style.line_look(place) for place in range(27)]
    assert len({(look["color"], look["linestyle"]) for look in looks}) == 27


def test_hundreds_of_settings_do_not_fill_the_figure(tmp_path: Path) -> None:
    for number in range(60):
        mine: dict[str, Any] = {f"mine_{n}": number for n in range(15)}
        folders.ours(tmp_path, "fed_avg", CONFIG, name=f"{number}", lr=0.001 * (number + 1), **mine)
    figure = overview(tmp_path)
    assert len(table(figure)) == 40
    notes = figure.legends[0].get_title().get_text()
    assert "the 40 best of 60" in notes
    assert "6 more settings" in notes


def test_the_overview_is_of_one_config_if_asked(tmp_path: Path) -> None:
    folders.ours(tmp_path, "fed_avg", CONFIG)
    folders.ours(tmp_path, "fed_avg", "tiny")
    runs = find_runs(tmp_path).runs
    for config, count in ((None, 2), ("tiny", 1)):
        figure = perplexity.figures(runs, "tokens", config)[0]["0_all_runs"]
        assert isinstance(figure, Figure)
        assert len(figure.axes[0].lines) == count
    assert perplexity.figures(runs, "bytes", "no")[0]["0_all_runs"] == "needs at least one run"


def test_a_protocol_is_a_table_beside_its_figure(tmp_path: Path) -> None:
    for method in ("fed_avg", "fed_fisher"):
        for number, settings in enumerate(EIGHT):
            folders.ours(tmp_path, method, CONFIG, name=f"{method} {number}", **settings)
    made = perplexity.figures(find_runs(tmp_path).runs, "tokens")[0]
    (figure,) = [figure for name, figure in made.items()
                 if name.startswith("3_method") and "sync=epoch" in name]
    assert isinstance(figure, Figure)
    told = [text.get_text() for text in figure.legends[1].get_texts()]
    names, values = told[1:len(told) // 2], told[len(told) // 2 + 1:]
    assert dict(zip(names, values, strict=True)) == {
        name: str(value) for name, value in EIGHT[1].items() if name != "lr"}
    assert not is_cut_off(figure)


def test_plot_writes_the_overview_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders.ours(tmp_path / "runs", "fed_avg", CONFIG)
    assert cli.main(["plot", "perplexities", "--data_dir", str(tmp_path / "runs"), "--out_dir",
                     str(tmp_path / "plots")]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[2] == f"wrote {tmp_path / 'plots' / '0_all_runs.png'}"
