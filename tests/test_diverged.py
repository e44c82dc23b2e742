"""A run that diverges: one line if it ends; JSON that every reader accepts if it continues."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch

from fedrun.federation.client import Client
from fedrun.flags import resolve
from fedrun.plots import runs
from fedrun.tools import study_runs, watch
from tests.support.runs import Run, error_lines
from tests.support.spoiled import spoil_updates


def refuse(constant: str) -> NoReturn:
    raise AssertionError(f"{constant} is not JSON")


def strictly(text: str) -> Any:
    return json.loads(text, parse_constant=refuse)


def test_central_ends_in_one_line_and_keeps_the_last_good_model(
        run_here: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    good = run_here("central", "--rounds", 3, name="good")
    healthy = Client.train

    def faulty(client: Client, *args: Any, **how: Any) -> Any:
        losses = healthy(client, *args, **how)
        if client.steps_done == 5:
            client.flat.vector[-7] = math.inf
        return losses

    monkeypatch.setattr(Client, "train", faulty)
    outcome = run_here("central", "--rounds", 9)
    assert outcome.code == 1
    model = outcome.run_dir / "model.safetensors"
    (line,) = error_lines(outcome.output)
    assert line == ("fedrun: error: step 5: the model is no longer finite: --lr 0.002 may be too "
                    f"large; the last good model is in {model}")
    assert "Traceback" not in outcome.output
    assert outcome.bits == good.bits
    recorded = strictly((outcome.run_dir / "outcome.json").read_text())
    assert (recorded["outcome"], "fedrun: error: " + recorded["reason"]) == ("failed", line)
    events = [strictly(e) for e in (outcome.run_dir / "events.jsonl").read_text().splitlines()]
    assert events[-1]["event"] == "end"


@pytest.mark.parametrize("frequencies", [("--val_freq", 100, "--checkpoint_freq", 4),
                                         ("--val_freq", 4)])
def test_central_looks_at_the_parameters_before_it_writes_them(
        run_here: Run, monkeypatch: pytest.MonkeyPatch, frequencies: tuple[object, ...]) -> None:
    """The step's own loss cannot tell. Else it looks at losses alone, without a pass over the
    parameters after each step."""
    good = run_here("central", *frequencies, "--rounds", 1, name="good")
    healthy, isfinite = Client.train, torch.isfinite
    done, looks = [0], list[int]()

    def faulty(client: Client, *args: Any, **how: Any) -> Any:
        losses = healthy(client, *args, **how)
        done[0] = client.steps_done
        if client.steps_done == 4:
            client.flat.vector[-7] = math.nan
        return losses

    def look(tensor: torch.Tensor) -> torch.Tensor:
        looks.append(done[0])
        return isfinite(tensor)

    monkeypatch.setattr(torch, "isfinite", look)
    monkeypatch.setattr(Client, "train", faulty)
    outcome = run_here("central", *frequencies, "--rounds", 9)
    assert outcome.code == 1
    (line,) = error_lines(outcome.output)
    assert line.startswith("fedrun: error: step 4: the model is no longer finite: --lr 0.002 ")
    assert outcome.outcome["kind"] == "diverged"
    assert outcome.bits == good.bits
    assert not list(outcome.run_dir.glob("checkpoints/*"))
    assert looks == [1, 4]


def test_numbers_that_are_not_finite_are_null_and_readers_accept_them(
        run_here: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
        capfd: pytest.CaptureFixture[str]) -> None:
    """A perplexity that no float can hold, of a model that is finite."""
    spoil_updates(monkeypatch, 1e20, 2, {0, 1})
    outcome = run_here("fed_avg", "--num_clients", 2, "--aggregation", "float", "--val_freq", 1,
                       "--rounds", 4, "--checkpoint_freq", 2)
    assert outcome.code == 0, outcome.output
    for file in (*outcome.run_dir.glob("*.json"), *outcome.run_dir.glob("checkpoints/*/*.json")):
        strictly(file.read_text())
    history = strictly((outcome.run_dir / "training_history.json").read_text())
    assert [r["server_val_ppl"] is None for r in history] == [False, True, True, True]
    assert math.isfinite(history[-1]["server_val_loss"])
    state = watch.RunState("run")
    for line in (outcome.run_dir / "events.jsonl").read_text().splitlines():
        state.update(strictly(line))
    assert [math.isinf(state.validation[n]) for n in (1, 2, 3, 4)] == [False, True, True, True]
    assert watch.main([str(outcome.run_dir), "--once"]) == 0
    assert "inf" in capfd.readouterr().out
    found = runs.find_runs(tmp_path).runs
    assert [math.isinf(r.val_ppl) for r in found[0].history] == [False, True, True, True]
    config = resolve("fed_avg", {"data_dir": str(tmp_path), "run_name": "run", "num_clients": 2,
                                 "rounds": 4, "aggregation": "float", "val_freq": 1})
    history[-1]["val_loss_halves"] = [None, 3.0]
    (outcome.run_dir / "training_history.json").write_text(json.dumps(history))
    held = outcome.config
    (outcome.run_dir / "config.json").write_text(json.dumps(held | config.to_dict() | {
        "dtype": "fp32"}, default=str))
    assert study_runs.loss_halves(config) == [math.inf, 3.0]
