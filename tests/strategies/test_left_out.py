"""Clients that are left out of a round's sum, and what is left of a run that ends for them."""

from __future__ import annotations

import math
import re

import pytest
import torch

from tests.support.runs import Run, error_lines
from tests.support.spoiled import spoil_updates


@pytest.mark.parametrize(("method", "flags", "what", "bound"), [
    ("fed_avg", (), "delta", r"0\.01\d+"),
    ("fed_avg", ("--aggregation", "int8"), "delta", r"0\.01\d+"),
    ("fed_sgd", (), "gradient", "16")])
def test_a_client_beyond_the_bound_is_left_out(
        run_here: Run, monkeypatch: pytest.MonkeyPatch, method: str, flags: tuple[str, ...],
        what: str, bound: str) -> None:
    spoil_updates(monkeypatch, 45, 2, {1})
    outcome = run_here(method, "--num_clients", 3, "--rounds", 3, *flags)
    assert outcome.code == 0, outcome.output
    last = outcome.history[-1]
    assert last["left_out"] == [[2, 1]]
    why, = last["left_out_why"]
    assert re.fullmatch(rf"{what} exceeds its bound: (45|44\.9\d*|45\.0\d*) > {bound}", why), why
    assert f"round 2: client 1 is left out: {why}; its moments are reset" in outcome.output
    events = outcome.events
    reported = [(e["left_out"], e["left_out_why"]) for e in events if e["event"] == "round"]
    assert reported == [([], []), ([1], [why]), ([], [])]
    assert all(bool(torch.isfinite(v).all()) for v in outcome.model.values())
    if method == "fed_avg" and not flags:  # the same as with one that is not finite
        monkeypatch.undo()
        spoil_updates(monkeypatch, math.nan, 2, {1})
        other = run_here(method, "--num_clients", 3, "--rounds", 3, name="nan")
        assert other.bits == outcome.bits
        assert other.history[-1]["left_out_why"] == ["delta not finite"]


@pytest.mark.parametrize(("entropy", "why"), [
    (math.nan, "entropy not finite"), (1.0, "--temperature 0.1: an entropy of 1 nats, ")])
def test_a_client_whose_weight_cannot_be_summed_is_left_out(
        run_here: Run, monkeypatch: pytest.MonkeyPatch, entropy: float, why: str) -> None:
    drawn = iter([6.0, 6.0, 6.0, 6.0, entropy, 6.0])
    monkeypatch.setattr("fedrun.federation.client_measures.mean_entropy", lambda *_: next(drawn))
    outcome = run_here("fed_entropy", "--num_clients", 3, "--rounds", 2, "--temperature", 0.1)
    assert outcome.code == 0, outcome.output
    assert outcome.history[-1]["left_out"] == [[2, 1]]
    assert outcome.history[-1]["left_out_why"][0].startswith(why)
    assert outcome.history[-1]["client_weights"] == [0.5, 0.0, 0.5]


@pytest.mark.parametrize(("clients", "cohort", "bad", "ends"), [
    (4, None, {0, 1, 2}, True), (4, None, {0, 1}, False), (3, 1, {0, 1, 2}, True)])
def test_a_round_ends_the_run_where_more_than_half_are_left_out(
        run_here: Run, monkeypatch: pytest.MonkeyPatch, clients: int, cohort: int | None,
        bad: set[int], ends: bool) -> None:
    chosen = ("--num_clients", clients, "--cohort", "none" if cohort is None else cohort)
    good = run_here("fed_avg", *chosen, "--rounds", 1, name="good")
    spoil_updates(monkeypatch, 45, 1 if cohort else 2, bad)
    outcome = run_here("fed_avg", *chosen, "--rounds", 3)
    assert outcome.code == int(ends), outcome.output
    if not ends:
        assert outcome.history[-1]["left_out"] == [[2, 0], [2, 1]]
        return
    (line,) = error_lines(outcome.output)
    counts = f"{len(bad) if cohort is None else 1} of {cohort or clients}"
    assert re.search(counts + r" clients are left out, more than half \(client \d: delta exceeds "
                     r"its bound: 4\d[.\d]* > 0\.\d+"
                     r"[^)]*\): --lr 0\.002 may be too large "
                     r"\(--aggregation float has no bound\)", line)
    if cohort is None:
        assert outcome.bits == good.bits


@pytest.mark.parametrize(("off", "val_freq", "checkpoint_freq", "message"), [
    (3e38, 1, "none", r"round 2: the global model is no longer finite \(model\): "),
    (3e38, 3, 2, r"round 2: the global model is no longer finite \(model\): "),
    (3e38, 3, "none", r"round 3: 2 of 2 clients are left out, more than half \(client 0: delta not "
                      r"finite; client 1: delta not finite\): "),
    (1.5e38, 1, "none", r"round 2: the validation loss is not finite: ")])
def test_a_ruined_model_is_not_kept_for_the_last_good_one(
        run_here: Run, monkeypatch: pytest.MonkeyPatch, off: float, val_freq: int,
        checkpoint_freq: int | str, message: str) -> None:
    """Of floats that are finite each, while a server's momentum makes more of them."""
    flags = ("--num_clients", 2, "--aggregation", "float", "--server_lr", 1, "--val_freq", val_freq,
             "--checkpoint_freq", checkpoint_freq)
    good = run_here("diloco", *flags, "--rounds", 1, name="good")
    spoil_updates(monkeypatch, off, 2, {0, 1})
    outcome = run_here("diloco", *flags, "--rounds", 4)
    assert outcome.code == 1, outcome.output
    assert "Traceback" not in outcome.output
    (line,) = error_lines(outcome.output)
    assert re.search(rf"{message}--lr (0\.002 )?may be too large$", line)
    assert f"the last good model is in {outcome.run_dir / 'model.safetensors'}" in outcome.output
    assert outcome.bits == good.bits
    assert [r["global_step"] for r in outcome.history] == [1]
    assert not (outcome.run_dir / "checkpoints" / "step_000002" / "manifest.json").exists()
