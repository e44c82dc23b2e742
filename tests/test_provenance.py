"""Which run a folder holds: settings of older runs, and what was read under another name."""

from __future__ import annotations

import json
from typing import Any

import pytest

from fedrun.config import RunConfig
from fedrun.provenance import differing, told
from fedrun.settings import resolve


def held_by(config: RunConfig) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(json.dumps(config.to_dict()))
    return content


@pytest.mark.parametrize("method", ["central", "fed_fisher", "fed_yogi"])
def test_a_setting_that_an_older_run_does_not_know_had_its_default(method: str) -> None:
    config = resolve(method, {})
    for name in config.results_dict():
        held = held_by(config)
        del held[name]
        found = differing(config, held)
        # What is not a default here, as central's batch size is not, cannot be told from nothing.
        assert set(found) <= ({name} if name in ("method", "batch_size", "val_freq") else set())
    for name in held_by(config)["model"]:
        held = held_by(config)
        del held["model"][name]
        assert not differing(config, held)


def test_settings_that_are_not_the_default_differ_from_a_run_that_lacks_them() -> None:
    config = resolve("fed_avg", {"config": "tiny", "lr": "1e-3", "weighting": "uniform"})
    held = held_by(config)
    del held["lr"], held["weighting"], held["model"]["n_layer"]
    assert differing(config, held) == {"lr": (5e-4, 1e-3), "weighting": ("samples", "uniform"),
                                       "model.n_layer": (1, 2)}


@pytest.mark.parametrize("odd", [None, 7, [], "x" * 10**6, {"n_layer": [[]]}, [[]] * 10**5])
def test_a_message_stays_a_line_whatever_a_file_holds(odd: object) -> None:
    config = resolve("fed_avg", {})
    found = differing(config, held_by(config) | {"model": odd, "lr": odd})
    assert len(told(found)) < 1000
    assert "0.0005 here" in told(found)
