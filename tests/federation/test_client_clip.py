"""--client_clip: what one client can do to the model is bounded, and who was clipped is told."""

from __future__ import annotations

import json
import math
import statistics
from typing import Any

import pytest
import torch
from torch import Tensor

from fedrun.federation.client import Client, LocalLosses
from fedrun.federation.used import UseLog, clipped_to, median_norm
from fedrun.flags import resolve
from fedrun.strategies.base import ClientReport
from tests.support.runs import Run
from tests.support.spoiled import spoil_updates

LENGTHS = (0.2, 0.02, 0.05, 0.4)
"""Norms of the updates that clients are given."""


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> dict[int, Tensor]:
    """Every client moves by its update, (size,) in float64, whatever its text: filled in when it
    first trains. The model of before the round is under -1."""
    made: dict[int, Tensor] = {}

    def train(client: Client, *_: Any, **__: Any) -> LocalLosses:
        vector = client.flat.vector
        made.setdefault(-1, vector.clone())
        drawn = torch.randn(len(vector), generator=torch.Generator().manual_seed(client.index),
                            dtype=torch.float64)
        made[client.index] = LENGTHS[client.index] * drawn / drawn.norm()
        vector.add_(made[client.index])
        return LocalLosses(torch.ones((), dtype=torch.float64), 1)

    monkeypatch.setattr(Client, "train", train)
    return made


@pytest.mark.parametrize("aggregation", ["exact", "float"])
@pytest.mark.parametrize("clip", ["0.1", "median"])
def test_against_a_naive_clip(run_here: Run, trained: dict[int, Tensor], clip: str,
                              aggregation: str) -> None:
    outcome = run_here("fed_avg", "--num_clients", 4, "--rounds", 1, "--dtype", "fp64", "--lr", 0.1,
                       "--weighting", "uniform", "--client_clip", clip, "--aggregation",
                       aggregation)
    assert outcome.code == 0, outcome.output
    longest = 0.1 if clip == "0.1" else statistics.median(LENGTHS)
    factors = [min(1.0, longest / length) for length in LENGTHS]
    moved = sum((f * trained[k] for k, f in enumerate(factors)), start=torch.zeros(())) / 4
    names = sorted(outcome.model)
    found = torch.cat([outcome.model[name].flatten() for name in names])
    # Flat vectors are in the order of the names, each tensor once.
    assert (found - trained[-1] - moved).abs().max() < 1e-9

    clipped = [k for k, factor in enumerate(factors) if factor < 1]
    event, = (e for e in outcome.events if e["event"] == "round")
    assert event["clipped"] == clipped == [0, 3]
    assert [c["used"] for c in event["clients"]] == pytest.approx(factors)
    assert [c["norm"] for c in event["clients"]] == pytest.approx(
        [min(length, longest) for length in LENGTHS])
    record, = outcome.history
    assert record["clipped"] == 2
    assert [one[:2] for one in record["client_used"]] == [[k, 1] for k in range(4)]
    assert [one[2] for one in record["client_used"]] == pytest.approx(factors)
    assert record["update_norms"] == pytest.approx([min(n, longest) for n in LENGTHS])


@pytest.mark.parametrize("clip", ["0.01", "median"])
@pytest.mark.parametrize("value", [45, math.nan])
def test_what_exceeds_the_bound_is_left_out_not_clipped(
        run_here: Run, monkeypatch: pytest.MonkeyPatch, clip: str, value: float) -> None:
    spoil_updates(monkeypatch, value, 2, {1})
    outcome = run_here("fed_avg", "--num_clients", 3, "--rounds", 3, "--client_clip", clip)
    assert outcome.code == 0, outcome.output
    assert outcome.history[-1]["left_out"] == [[2, 1]]
    rounds = [e for e in outcome.events if e["event"] == "round"]
    assert "used" not in rounds[1]["clients"][1]
    used = [client["used"] for e in rounds for client in e["clients"] if "used" in client]
    assert len(used) == 8
    assert min(used) < 1
    if clip == "median":  # of two clients or three
        assert [len(e["clipped"]) for e in rounds] == [1, 1, 1]


def test_without_the_flag_nothing_is_said_of_it(run_here: Run) -> None:
    outcome = run_here("fed_avg", "--num_clients", 2, "--rounds", 1)
    assert not {"clipped", "client_used"} & outcome.history[-1].keys()
    assert not any("clipped" in e for e in outcome.events)


def test_a_clip_that_nobody_reaches_moves_no_bit(run_here: Run) -> None:
    flags = ("--num_clients", 3, "--rounds", 2, "--dtype", "fp32")
    free, held = (run_here("fed_avg", *flags, "--client_clip", clip, name=f"clip_{clip}")
                  for clip in ("none", "1e3"))
    assert held.bits == free.bits
    assert held.history[-1]["clipped"] == 0
    assert held.history[-1]["update_norms"] == free.history[-1]["update_norms"]


def test_what_was_used_is_kept_to_the_next_record_and_over_a_restart() -> None:
    reports = [ClientReport(k, 1, 1.0, weight=0.5, norm=norm) for k, norm in ((0, 1.0), (1, 4.0))]
    assert median_norm(reports) == 2.5
    assert clipped_to(None, reports) == reports
    log = UseLog()
    log.add(clipped_to(2.0, reports))
    log.add([ClientReport(2, 1, 1.0, left_out="delta not finite")])
    later = UseLog()
    later.load(json.loads(json.dumps(log.state())))
    later.add(clipped_to(1.0, reports))
    later.add_clipped(3)
    assert later.take() == ([[0, 2, 1.0], [1, 2, 0.375]], 5)
    assert later.take() == ([], 0)
    later.load({})  # of an older version
    assert later.take() == ([], 0)


@pytest.mark.parametrize(("method", "flags", "message"), [
    ("fed_avg", {"client_clip": "0"}, "--client_clip 0: must be a number from 1e-06 to 1e"),
    ("fed_avg", {"client_clip": "nan"}, "--client_clip nan: must be a number"),
    ("fed_avg", {"client_clip": "mean"}, "or median"),
    ("fed_sgd", {"client_clip": "1"}, "--client_clip 1: must be none with fed_sgd"),
    ("fed_fisher", {"client_clip": "1"}, "--client_clip 1: must be none with fed_fisher"),
    ("fed_avg", {"client_clip": "1", "aggregation": "int8"},
     "--aggregation int8: must be exact or float with --client_clip 1"),
    ("fed_avg", {"client_clip": "1", "aggregation": "int4"},
     "--aggregation int4: must be exact or float with --client_clip 1"),
    ("fed_avg", {"client_clip": "1", "client_moments": "average"}, "--client_moments average: must "
     "be keep, reset or reset_epoch with --client_clip 1"),
    ("fed_avg", {"client_clip": "1", "sync": "epoch"}, "--sync epoch: must be round with"),
    ("fed_avg", {"client_clip": "1", "dp": "client", "dp_clip": 1, "dp_noise": 1, "dp_delta": 1e-3,
                 "weighting": "uniform"}, "--client_clip 1: must be none with --dp client"),
])
def test_what_it_does_not_go_with_names_the_flag(method: str, flags: dict[str, Any], message: str
                                                 ) -> None:
    with pytest.raises(ValueError, match=message):
        resolve(method, flags)
