"""What was used of each client's update, from a run's history to the report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import AxesImage

from fedrun import cli
from fedrun.plots import used
from fedrun.plots.run_folder import read_run
from tests.support import folders


def with_used(data_dir: Path, entries: list[Any]) -> Path:
    """A run whose records, from the first on, have these entries."""
    folder = folders.ours(data_dir, "fed_krum", "tiny")
    path = folder / "training_history.json"
    history = json.loads(path.read_text())
    for record, entry in zip(history, entries, strict=False):
        record["client_used"] = entry
    path.write_text(json.dumps(history))
    return folder


def test_the_figure_has_a_row_for_each_client(tmp_path: Path) -> None:
    run = read_run(with_used(tmp_path, [[[0, 1, 1.0], [3, 1, 0.25]], [[3, 5, 0.0], [4, 2, 0.5]]]))
    steps, clients, shares = used.table(run)
    assert steps == [record.step for record in run.history[:2]]
    assert clients == [0, 3, 4]
    np.testing.assert_array_equal(shares, [[1, np.nan], [0.25, 0], [np.nan, 0.5]])
    figure = used.figure(run)
    assert figure is not None
    image, = (child for child in figure.axes[0].get_children() if isinstance(child, AxesImage))
    np.testing.assert_array_equal(np.ma.filled(np.ma.asarray(image.get_array()), np.nan), shares)


def test_of_many_clients_those_that_were_used_least_are_shown(tmp_path: Path) -> None:
    run = read_run(with_used(tmp_path, [[[k, 1, k / 100] for k in range(100)]]))
    figure = used.figure(run)
    assert figure is not None
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert (labels[0], labels[-1]) == ("0", str(used.MOST_CLIENTS - 1))


@pytest.mark.parametrize("damaged", [
    None, 3, "0", [3], [[0, 1]], [["a", 1, 0.5]], [[0, 1, "x"]], [[0, 1, 7.0]], [[-1, 1, 0.5]]])
def test_damaged_entries_are_passed_over(tmp_path: Path, damaged: Any) -> None:
    assert used.figure(read_run(with_used(tmp_path, [damaged]))) is None


def test_the_report_shows_it_where_there_is_any(tmp_path: Path) -> None:
    folders.ours(tmp_path, "fed_avg", "tiny")
    with_used(tmp_path, [[[0, 1, 1.0], [3, 1, 0.25]]])
    assert cli.main(["report", "--data_dir", str(tmp_path), "--skip_deltas"]) == 0
    page = (tmp_path / "report.html").read_text()
    assert page.count('data-figure="used of each client"') == 1
    assert page.count("What was used of each client") == 1
