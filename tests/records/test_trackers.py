"""What trackers receive: TensorBoard itself, the hosted ones as stand-ins with their interface
(init, log, finish)."""

from __future__ import annotations

import json
import math
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from fedrun import cli
from fedrun.flags import resolve
from fedrun.records.events import Events, cohort_event
from fedrun.records.run_dir import clear_run_dir, truncate_after
from fedrun.records.trackers import check_tracker, scalars
from fedrun.strategies.base import ClientReport
from tests.support.runs import Run, read_json


def test_tensorboard_has_the_numbers_of_the_history(run: Run) -> None:
    event_accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator",
        reason="tensorboard is not installed")
    outcome = run("fed_avg", "--rounds", 4, "--track", "tensorboard")
    assert outcome.code == 0, outcome.output
    read = event_accumulator.EventAccumulator(str(outcome.run_dir / "tensorboard")).Reload()
    tags = set(read.Tags()["scalars"])
    assert {"perplexity/train", "perplexity/validation", "learning_rate", "tokens",
            "tokens_per_second", "bytes", "seconds/local_training", "seconds/aggregation",
            "seconds/evaluation", "client_3/weight", "client_0/norm", "client_0/loss",
            "step_norm"} <= tags
    received = {point.step: point.value for point in read.Scalars("perplexity/validation")}
    assert received == {r["global_step"]: pytest.approx(r["server_val_ppl"])
                        for r in outcome.history}
    assert [p.step for p in read.Scalars("perplexity/train")] == [1, 2, 3, 4]
    assert read.Scalars("client_0/weight")[0].value == pytest.approx(0.25, abs=1e-3)


def test_bytes_count_every_parameter_both_ways(run: Run) -> None:
    outcome = run("fed_avg", "--rounds", 2)
    assert outcome.code == 0, outcome.output
    parameters = sum(t.numel() for t in outcome.model.values())
    per_round = outcome.history[0]["bytes"]
    assert outcome.history[-1]["bytes"] == 2 * per_round
    sent = per_round / (2 * 4)  # of one client, one way
    assert 4 * parameters <= sent <= 4 * parameters + 64, "int32 elements and the weight"


def stand_in(package: str, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """Install a module with the interface of a hosted tracker; returns the calls it gets. Trackio's
    `init` has no id: it identifies a run by its name, and makes up another one if that is taken."""
    calls: list[tuple[str, Any]] = []
    names: list[str] = []
    fake = types.ModuleType(package)

    def init(*, project: str, name: str, config: dict[str, Any], resume: str, **how: Any) -> Any:
        assert set(how) == ({"id", "allow_val_change"} if package == "wandb" else set())
        if resume == "never" and name in names:
            name = f"{name}-{len(names)}"
        names.append(name)
        calls.append(("init", (project, name, how.get("id"), resume,
                               json.loads(json.dumps(config))["lr"])))
        return types.SimpleNamespace(name=name)

    def log(values: dict[str, float], *, step: int) -> None:
        calls.append(("log", (step, values)))

    vars(fake).update(init=init, log=log, finish=lambda: calls.append(("finish", None)),
                      __spec__=types.SimpleNamespace())
    monkeypatch.setitem(sys.modules, package, fake)
    monkeypatch.delenv("WANDB_RUN_ID", raising=False)
    return calls


@pytest.mark.parametrize("package", ["wandb", "trackio"])
def test_hosted_trackers_get_every_round_and_their_runs_id(
        package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = stand_in(package, monkeypatch)
    config = resolve("fed_avg", {"track": package, "data_dir": str(tmp_path), "run_name": "mine",
                                 "lr": "0.25"})
    check_tracker(config)
    config.run_dir.mkdir()
    events = Events(config, "round", total=2)
    events.add("round", round=1, train_ppl=math.inf, tokens=10, seconds=2.0)
    events.add("round", round=2, train_ppl=3.0, tokens=40, seconds=4.0)
    events.add("end", tokens=40, seconds=4.0)
    events.close()
    (_, (*first, identifier, resume, lr)), *logged = calls
    assert (first, lr) == (["fedrun", "mine"], 0.25)
    assert resume == ("allow" if package == "wandb" else "never")
    assert logged == [
        ("log", (1, {"tokens": 10.0, "seconds/all": 2.0, "tokens_per_second": 5.0})),
        ("log", (2, {"perplexity/train": 3.0, "tokens": 40.0, "seconds/all": 4.0,
                     "tokens_per_second": 15.0})),
        ("finish", None)]
    kept = read_json(config.run_dir / "tracker.json")
    assert kept == {package: identifier if package == "wandb" else "mine"}


@pytest.mark.parametrize("package", ["wandb", "trackio"])
def test_a_resumed_run_is_one_run_for_its_tracker(
        package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = stand_in(package, monkeypatch)
    config = resolve("fed_avg", {"track": package, "data_dir": str(tmp_path), "run_name": "mine"})
    config.run_dir.mkdir()
    Events(config, "round", total=4).close()
    truncate_after(config.run_dir, 2)
    Events(config, "round", total=4, done=2).close()
    clear_run_dir(config.run_dir, lambda: None)  # --overwrite
    Events(config, "round", total=4).close()
    (_, name, identifier, *_), resumed, other = (what for call, what in calls if call == "init")
    assert resumed[1:4] == (name, identifier, "allow")
    assert name == "mine"
    assert other[1:3] != (name, identifier)  # the run that was replaced is not continued
    monkeypatch.setenv("WANDB_RUN_ID", "theirs")
    Events(config, "round", total=4, done=2).close()
    assert calls[-2][1][2] == ("theirs" if package == "wandb" else None)


@pytest.mark.parametrize("content", ["", "[]", '{"wandb": null}'])
def test_a_damaged_id_costs_the_tracker_a_second_run(
        content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = stand_in("wandb", monkeypatch)
    config = resolve("fed_avg", {"track": "wandb", "data_dir": str(tmp_path), "run_name": "mine"})
    config.run_dir.mkdir()
    (config.run_dir / "tracker.json").write_text(content)
    Events(config, "round", total=4).close()
    assert read_json(config.run_dir / "tracker.json") == {"wandb": calls[0][1][2]}


@pytest.mark.parametrize("package", ["tensorboard", "wandb", "trackio"])
def test_missing_package_says_what_to_install(
        package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str]) -> None:
    find = __import__("importlib.util").util.find_spec
    monkeypatch.setattr("importlib.util.find_spec",
                        lambda name, *a: None if name == package else find(name, *a))
    assert cli.main(["fed_avg", "--track", package, "--data_dir", str(tmp_path)]) == 2
    assert f"pip install 'fedrun[{package}]'" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_events_of_clients_have_loss_weight_and_norm() -> None:
    clients = cohort_event([
        ClientReport(0, 3, 6.0, weight=1.0, norm=0.5),
        ClientReport(1, 3, math.nan, left_out="delta not finite"),
        ClientReport(2, 3, 3.0, weight=3.0, entropy=4.0)])
    assert clients == [{"client": 0, "loss": 2.0, "weight": 0.25, "norm": 0.5},
                       {"client": 1, "loss": None, "weight": 0.0},
                       {"client": 2, "loss": 1.0, "weight": 0.75, "entropy": 4.0}]
    assert scalars({"round": 3, "clients": clients[1:], "left_out": [1], "val_ppl": 7}) == {
        "client_1/weight": 0.0, "client_2/loss": 1.0, "client_2/weight": 0.75,
        "client_2/entropy": 4.0, "left_out": 1.0, "perplexity/validation": 7.0}
