"""The figure of perplexity against bytes, and its front."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from fedrun import cli
from fedrun.plots import traffic
from fedrun.plots.traffic import Point, front, points
from tests.support import folders
from tests.support.figures import is_cut_off


def row(name: str, method: str = "fed_avg", **values: Any) -> dict[str, Any]:
    return {"setting": name, "flags": {"method": method, "config": "tiny"}, "best": {"lr": 1e-3},
            "tuned_ratio": 1.0} | values


ROWS = [
    row("central", "central", ratio_mean=1.0, ratios=[1, 1, 1]),
    row("average_8", tuned_ratio=1.01, ratio_mean=1.007, ratios=[1.0, 1.006, 1.015],
        bytes_per_token=1536.0, times_fewer_bytes=4 / 3),
    row("own_8", tuned_ratio=1.05, ratio_mean=1.08, ratios=[1.07, 1.08, 1.09],
        bytes_per_token=256.0, times_fewer_bytes=8.0),
    row("as_own_8", "diloco", tuned_ratio=1.081, bytes_per_token=256.0, times_fewer_bytes=8.0),
    row("int8_60", tuned_ratio=1.17, bytes_per_token=8.0, times_fewer_bytes=256.0),
    row("worse_than_int8_60", "fed_entropy", tuned_ratio=1.2, bytes_per_token=32.0,
        times_fewer_bytes=64.0),
    row("diloco_60", "diloco", tuned_ratio=1.9, bytes_per_token=32.0, times_fewer_bytes=64.0),
    row("diverged", "diloco", tuned_ratio=None, bytes_per_token=32.0, times_fewer_bytes=64.0)]


def test_a_setting_is_on_the_front_unless_another_betters_it_in_both() -> None:
    random = np.random.default_rng(0)
    found = [Point(str(k), "fed_avg", float(sent), float(ratio), ratio, ratio, True)
             for k, (sent, ratio) in enumerate(random.integers(1, 12, (40, 2)))]
    best = {(p.bytes, p.ratio) for p in found if not any(
        (q.bytes, q.ratio) != (p.bytes, p.ratio) and q.bytes <= p.bytes and q.ratio <= p.ratio
        for q in found)}
    kept = front(found)
    assert [(p.bytes, p.ratio) for p in kept] == sorted(best)
    assert [p.name for p in front(points(ROWS))] == ["int8_60", "own_8", "average_8"]


def test_what_was_repeated_has_its_range() -> None:
    by_name = {p.name: p for p in points(ROWS)}
    assert by_name["own_8"][2:] == (256.0, 1.08, 1.07, 1.09, True)
    assert by_name["int8_60"][2:] == (8.0, 1.17, 1.17, 1.17, False)
    assert by_name.keys() == {"average_8", "own_8", "as_own_8", "int8_60", "worse_than_int8_60",
                              "diloco_60"}


def test_the_figure_of_a_study(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders.write(tmp_path / "table.json", ROWS)
    argv = ["plot", "bytes", "--data_dir", str(tmp_path), "--out_dir", str(tmp_path)]
    assert cli.main(argv) == 0
    assert (tmp_path / "perplexity_and_bytes.png").exists()
    (figure,) = traffic.figures(tmp_path).values()
    assert isinstance(figure, Figure)
    (ax,) = figure.axes
    shown = {text.get_text() for text in ax.texts}
    assert {"average_8", "diloco_60 (1.9)", "fp32 gradients\nsummed at every step"} <= shown
    assert any(np.array_equal(line.get_xdata(), [2048.0] * 2) for line in ax.lines)
    assert not is_cut_off(figure)
    assert {"own_8", "as_own_8"} <= shown
    figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in ax.texts]
    assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))
    folders.write(tmp_path / "table.json", [ROWS[0]])
    assert cli.main(argv) == 1
    assert "skipped perplexity_and_bytes: needs a study" in capsys.readouterr().out
    (tmp_path / "table.json").write_text(json.dumps([{"setting": "x"}]))
    assert cli.main(argv) == 2
    assert "row 1 lacks setting, flags with a method, or best" in capsys.readouterr().err
