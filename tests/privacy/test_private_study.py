"""What is concluded from the study of what differential privacy costs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from tests.benchmarks import private_study
from tests.benchmarks.private_study import HEADER
from tests.support import folders

FLAGS = {"dp": "client", "dp_clip": 1.0, "dp_delta": 1e-5}


def study(folder: Path, start: float, *private: float) -> Path:
    """A finished study whose runs end at these perplexities."""
    histories: dict[str, list[dict[str, Any]]] = {
        f"start_lr_1e-12_seed_{seed}": [{"val_loss_halves": [9.0, math.log(start)]}]
        for seed in (1, 2, 3)}
    histories |= {f"epsilon_8_lr_0.003_seed_{seed}": [
        {"val_loss_halves": [9.0, 9.0]},
        {"val_loss_halves": [9.0, math.log(value)], "epsilon": 7.99, "snr": 1.5, "snr_total": 3.0}]
        for seed, value in enumerate(private, 1)}
    folders.write(folder / "histories.json", histories)
    folders.write(folder / "table.json", [
        {"setting": "epsilon_8", "flags": FLAGS, "best": {"lr": 0.003}},
        {"setting": "start", "flags": {"dp_delta": "none"}, "best": {"lr": 1e-12}}])
    return folder


@pytest.mark.parametrize(("ends", "succeeded"), [
    ((49.0, 49.5, 49.8), False),  # by 0.2 at least, and the seeds differ by 0.8
    ((49.0, 49.1, 49.2), True),
    ((51.0, 51.0, 51.0), False),
    ((49.0, 49.0), False),  # not three seeds
])
def test_it_succeeds_if_the_gain_is_more_than_the_seeds_differ(
        ends: tuple[float, ...], succeeded: bool, tmp_path: Path) -> None:
    found = private_study.read(study(tmp_path, 50.0, *ends))
    if len(ends) == 3:
        assert private_study.report(found).startswith(
            f"The demonstration {'succeeded' if succeeded else 'FAILED'}: epsilon_8 ")
    else:
        found["start"].records.pop()
    assert private_study.succeeded(found) == succeeded


def test_the_table_has_what_was_recorded(tmp_path: Path) -> None:
    text = private_study.report(private_study.read(study(tmp_path, 50.0, 49.0, 49.1, 49.2)))
    assert HEADER in text
    assert ("| epsilon_8 | 1.0 | 7.99 at 1e-05 | 49.00, 49.10, 49.20 | +0.90 | 0.20 | 1.5 | 3 |"
            in text)
    assert "| start |  |  | 50.00, 50.00, 50.00 | +0.00 | 0.00 |  |  |" in text
