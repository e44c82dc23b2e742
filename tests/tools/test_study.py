"""Studies: grids that grow, pruning, resuming, the table; one whole study of seconds."""

from __future__ import annotations

import json
import math
import os
import signal
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedrun.config import RunConfig
from fedrun.flags import resolve
from fedrun.records.outcome import write_outcome
from fedrun.run import run
from fedrun.tools import plot, study, study_file, study_queue, study_runs
from fedrun.tools.study_file import Study, StudySetting
from tests.support.runs import (
    ROOT,
    SMALL,
    alive,
    children_of,
    read_history,
    read_json,
    wait_until,
)
from tests.support.runs import start as start_process

WHOLE = """
reference: central
report_seeds: [1, 2]
prune: 1.1
extensions: 1
grid: {{lr: [0.001, 0.002]}}
base: {base}
settings:
  central: {{method: central, rounds: 4}}
  averaged: {{method: fed_avg, num_clients: 2, rounds: 4, client_moments: average}}
  slow: {{method: fed_avg, num_clients: 2, rounds: 4, grid: {{lr: [1e-6]}}}}
"""


def little_study(tmp_path: Path, cache_dir: Path) -> Path:
    from pydoc_data.topics import topics
    text = tmp_path / "little.txt"
    text.write_text("\n\n".join(topics[name] for name in sorted(topics)[:25]), encoding="utf-8")
    base = {k.removeprefix("--"): v for k, v in zip(SMALL[::2], SMALL[1::2], strict=True)}
    base |= {"dataset": str(text), "cache_dir": str(cache_dir)}
    del base["lr"]
    path = tmp_path / "little.yaml"
    path.write_text(WHOLE.format(base=json.dumps(base)))
    return path


def start_here(config: RunConfig, children: study_queue.Children) -> None:
    """`study_queue.start` without its process, whose start would take most of the test."""
    assert run(config) == 0


def test_a_whole_study_and_its_resumption(tmp_path: Path, cache_dir: Path,
                                          monkeypatch: pytest.MonkeyPatch,
                                          capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(study_queue, "start", start_here)
    argv = [str(little_study(tmp_path, cache_dir)), "--results", str(tmp_path)]
    assert study.main([*argv, "--dry_run"]) == 0
    said = capsys.readouterr().out
    assert "5 runs on the grid (5 to do)" in said
    # 4 steps or rounds of 2 x 32 tokens, of two clients in all but the central runs; each setting's
    # grid, and two seeds more.
    tokens = 4 * 2 * 32 * ((2 + 2) + 2 * ((2 + 2) + (1 + 2)))
    assert f"to do: 11 runs, {tokens:,} tokens of training, about" in said
    assert "tiny, 2 x 32 tokens: " in said
    assert study.main(argv) == 0
    rows = {r["setting"]: r for r in json.loads((tmp_path / "little" / "table.json").read_text())}
    assert rows["central"]["ratios"] == [1, 1]
    # The best of the two was the larger, so that the grid grew by one, once.
    assert set(rows["averaged"]["tuned_ppl"]) == {"lr 0.001", "lr 0.002", "lr 0.004"}
    assert rows["averaged"]["best"] == {"lr": 0.004}
    assert len(rows["averaged"]["ratios"]) == 2
    assert rows["averaged"]["ratio_mean"] == pytest.approx(sum(rows["averaged"]["ratios"]) / 2)
    assert "ratios" not in rows["slow"]  # pruned
    assert "not repeated" in (tmp_path / "little" / "table.md").read_text()

    # The numbers are those of the halves: tuned on the first, reported on the second.
    def halves(name: str) -> list[float]:
        history = read_history(tmp_path / "little" / "runs" / name)
        found: list[float] = history[-1]["val_loss_halves"]
        return found

    assert rows["slow"]["tuned_ppl"]["lr 1e-06"] == pytest.approx(
        math.exp(halves("slow_lr_1e-06_seed_0")[0]))
    assert rows["averaged"]["ratios"][0] == pytest.approx(math.exp(
        halves("averaged_lr_0.004_seed_1")[1] - halves("central_lr_0.004_seed_1")[1]))

    table = (tmp_path / "little" / "table.json").read_bytes()
    capsys.readouterr()
    assert study.main(argv) == 0  # nothing is run a second time
    assert " s  val ppl" not in capsys.readouterr().out
    assert (tmp_path / "little" / "table.json").read_bytes() == table
    with pytest.raises(ValueError, match="another sequence_length"):
        study.main([*argv, "--sequence_length", "16"])


@pytest.mark.skipif(sys.platform != "linux", reason="orphans are ended by Linux's kernel")
@pytest.mark.timeout(150)
def test_a_study_that_is_stopped_killed_and_joined(tmp_path: Path, cache_dir: Path) -> None:
    path = little_study(tmp_path, cache_dir)
    wanted = yaml.safe_load(path.read_text())
    wanted |= {"report_seeds": [], "extensions": 0, "grid": {"lr": [1e-3]}, "settings": {
        "central": {"method": "central", "rounds": 600},
        "one": {"method": "fed_avg", "num_clients": 1, "rounds": 400}}}
    wanted["base"] |= {"checkpoint_freq": 20, "val_freq": 1000, "n_epochs": 1}
    path.write_text(yaml.safe_dump(wanted))
    command = [sys.executable, "-m", "fedrun", "study", str(path), "--results", str(tmp_path)]
    runs = tmp_path / "little" / "runs"
    central, one = runs / "central_lr_0.001_seed_0", runs / "one_lr_0.001_seed_0"

    def steps(run_dir: Path) -> int:
        events = run_dir / "events.jsonl"
        return events.read_bytes().count(b'"seconds"') if events.exists() else 0

    log = tmp_path / "first.log"
    first = start_process(command, log)
    with children_of(first) as children:
        wait_until(lambda: steps(central) > 5, 60, log.read_text)
        first.send_signal(signal.SIGTERM)
        assert first.wait(20) == 128 + signal.SIGTERM, log.read_text()
        assert not any(map(alive, children()))
    said = log.read_text().splitlines()
    assert "Traceback" not in log.read_text()
    assert said[-1] == ("fedrun: warning: study: stopped by SIGTERM: 1 run in hand kept a "
                        "checkpoint; the same command resumes the study")
    assert read_json(central / "outcome.json")["outcome"] == "stopped"
    assert list(central.glob("checkpoints/step_*"))

    # Two processes share the rest. One is killed, its run is killed with it, and the other takes
    # that run up.
    before = steps(central)
    logs = [tmp_path / f"{name}.log" for name in ("second", "third")]
    second = start_process(command, logs[0])
    with children_of(second) as children:
        wait_until(lambda: steps(central) > before, 60, logs[0].read_text)
        third = start_process(command, logs[1])
        with children_of(third):
            wait_until(lambda: steps(one) > 1, 60, logs[1].read_text)
            assert steps(central) < 600
            second.kill()
            wait_until(lambda: not any(map(alive, children())), 5)
            assert third.wait(60) == 0, logs[1].read_text()
    assert "central_lr_0.001_seed_0" in logs[1].read_text()
    assert "resumed from step" in logs[1].read_text()
    assert len(read_history(central)) == 2
    assert not list(runs.glob("*/checkpoints"))
    rows = json.loads((tmp_path / "little" / "table.json").read_text())
    assert {row["setting"] for row in rows} == {"central", "one"}


def test_a_study_under_torchrun_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="2 processes were started together: use `python -m"):
        study.main([str(ORIGINAL)])


def test_a_run_that_diverges_counts_as_infinitely_bad(tmp_path: Path, cache_dir: Path) -> None:
    path = little_study(tmp_path, cache_dir)
    wanted = yaml.safe_load(path.read_text())
    wanted["settings"] = {"central": {"method": "central", "rounds": 3}}
    wanted |= {"report_seeds": [], "extensions": 0, "grid": {"lr": [1e-3, 1e30]}}
    path.write_text(yaml.safe_dump(wanted))
    assert study.main([str(path), "--results", str(tmp_path)]) == 0
    (row,) = json.loads((tmp_path / "little" / "table.json").read_text())
    assert row["best"] == {"lr": 1e-3}
    assert row["tuned_ppl"]["lr 1e+30"] is None  # JSON has no infinity
    failed = tmp_path / "little" / "runs" / "central_lr_1e+30_seed_0" / "failed.txt"
    assert "not finite: --lr 1e+30 may be too large" in failed.read_text()


def test_grids_grow_at_their_edges_alone() -> None:
    setting = StudySetting("s", {}, {"lr": [1.0, 2.0, 4.0], "mu": [0.1]}, extensions=2)
    losses = {0.5: 3.5, 1.0: 3.0, 2.0: 2.0, 4.0: 1.0, 8.0: 0.5, 16.0: 0.7}

    def score() -> None:
        setting.tuned = {p: losses[dict(p)["lr"]] for p in setting.points()}

    score()
    assert setting.extend()
    assert sorted(setting.grid["lr"]) == [1, 2, 4, 8]
    score()
    assert setting.extend()
    score()
    assert dict(setting.best) == {"lr": 8.0, "mu": 0.1}
    assert not setting.extend()  # interior, and no extension is left
    hopeless = StudySetting("h", {}, {"lr": [1.0, 2.0]}, extensions=2)
    hopeless.tuned = dict.fromkeys(hopeless.points(), math.inf)
    assert not hopeless.extend()


ORIGINAL = ROOT / "configs" / "experiments" / "original.yaml"


def test_the_original_grid(tmp_path: Path) -> None:
    found = study_file.read(ORIGINAL, tmp_path, {})
    configs = {config.name: config for config in study.unfinished(found)}
    assert len(configs) == 36
    assert Counter(config.method for config in configs.values()) == {
        "central": 9, "fed_avg": 18, "fed_momentum": 3, "fed_entropy": 3, "fed_fisher": 3}
    assert set(found.published) < set(found.settings)
    assert not study_file.read(ORIGINAL, tmp_path, {"dataset": "pydocs"}).published
    small = study_file.read(ORIGINAL, tmp_path, {"scale": "small"})
    assert len(study.unfinished(small)) == 36
    assert not small.published
    for config in study.unfinished(small):
        whole = configs[config.name.replace("tiny_1_layer", "ssm_1_layer_padded")
                        .replace("tiny_4_layer", "ssm_4_layer_padded")
                        .replace("tiny", "ssm_2_layer_padded").replace("0.002", "0.0005")]
        assert config.model.n_layer == whole.model.n_layer
        differing = {name for name, value in config.results_dict().items()
                     if whole.results_dict()[name] != value}
        assert differing == {"dataset", "tokenizer", "model", "lr"} - (
            set() if config.model != whole.model else {"model"})


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_part_of_the_original_grid_at_its_small_scale(tmp_path: Path, cache_dir: Path) -> None:
    """One seed of one layer, for ten rounds: all methods, both numbers of local updates, and their
    figures."""
    argv = [str(ORIGINAL), "--scale", "small", "--results", str(tmp_path), "--axes",
            "config=tiny_1_layer", "--axes", "seed=0", "--rounds", "10", "--val_freq", "5",
            "--cache_dir", str(cache_dir), "--jobs", "2"]
    assert study.main(argv) == 0
    rows = json.loads((tmp_path / "original_small" / "table.json").read_text())
    assert len(rows) == 6
    assert {row["reference"] for row in rows} == {"central_tiny_1_layer"}
    assert plot.main(["perplexities", "--data_dir", str(tmp_path / "original_small" / "runs"),
                      "--out_dir", str(tmp_path / "figures")]) == 0
    assert list((tmp_path / "figures").glob("*.png"))


@pytest.mark.parametrize("name", sorted(
    path.stem for path in (ROOT / "configs" / "experiments").glob("*.yaml")))
def test_shipped_studies_are_valid(name: str, tmp_path: Path) -> None:
    read: Study = study_file.read(ROOT / "configs" / "experiments" / f"{name}.yaml", tmp_path, {})
    for setting in read.settings.values():
        for point in setting.points():
            config = read.config(setting, point, 1)
            assert config.seed == 1
    if name == "methods":  # all at equal tokens
        for setting in read.settings.values():
            config = read.config(setting, setting.points()[0], 0)
            steps = (config.rounds or 0) * getattr(config, "local_updates", 1)
            assert steps == 240


AXES = """
reference: central
axes: {config: [study, tiny], local_updates: [1, 8], seed: [3, 4]}
grid: {lr: [0.001]}
scales: {small: {base: {dataset: pydocs}, axes: {config: [tiny]}}}
base: {rounds: 8, num_clients: 2}
settings:
  central: {method: central}
  averaged: {method: fed_avg}
  entropy: {method: fed_entropy, only_first: [config], local_updates: 2}
"""


def test_axes_make_rows_with_a_reference_each(tmp_path: Path) -> None:
    path = tmp_path / "axes.yaml"
    path.write_text(AXES)
    found = study_file.read(path, tmp_path, {})
    assert (found.tune_seed, found.report_seeds) == (3, [3, 4])
    assert {name: found.reference_of(s).name for name, s in found.settings.items()} == {
        "central_study": "central_study", "central_tiny": "central_tiny",
        "averaged_study_local_updates_1": "central_study",
        "averaged_study_local_updates_8": "central_study",
        "averaged_tiny_local_updates_1": "central_tiny",
        "averaged_tiny_local_updates_8": "central_tiny",
        "entropy_study": "central_study"}
    row = found.settings["averaged_tiny_local_updates_8"]
    config = found.config(row, row.points()[0], 4)
    assert (config.config, config.to_dict()["local_updates"]) == ("tiny", 8)
    assert config.name == "averaged_tiny_local_updates_8_lr_0.001_seed_4"

    small = study_file.read(path, tmp_path, {
        "scale": "small", "axes": ["local-updates=4"], "report_seeds": "7", "temperature": "2"})
    assert small.folder == tmp_path / "axes_small"
    assert small.report_seeds == [7]
    assert [*small.settings] == ["central_tiny", "averaged_tiny_local_updates_4", "entropy_tiny"]
    settings = small.to_dict()["settings"]
    assert {row["dataset"] for row in settings.values()} == {"pydocs"}
    assert settings["entropy_tiny"]["temperature"] == 2  # which only this method has
    assert study_file.read(path, tmp_path, {"name": "mine"}).folder == tmp_path / "mine"

    path.write_text(AXES.replace("{method: fed_avg}", "{method: fed_avg, config: wide.yaml}"))
    with pytest.raises(ValueError, match=r"wide\.yaml"):
        study_file.read(path, tmp_path, {})
    path.write_text(AXES.replace("{method: fed_avg}", "{method: fed_avg, config: study_federated}"))
    with pytest.raises(ValueError, match=r"averaged.*: central is not run at the same values"):
        study_file.read(path, tmp_path, {})


@pytest.mark.parametrize(("text", "said"), [
    ("{reference: a, axes: {config: tiny}, settings: {a: {method: central}}}",
     "axes.config tiny: must be a list"),
    ("{reference: a, base: {temperature: 1}, settings: {a: {method: central}}}",
     "base: temperature: no setting"),
    ("{reference: a, settings: {a: {method: fedavg}}}", "settings.a: method fedavg: must be one"),
    ("{reference: a, settings: {a: {method: central, only_first: [lr]}}}", "only_first"),
    ("{settings: {a: {method: central}}}", "reference"),
    ("{reference: a, settings: {a: {lr: 1}}}", "settings.a"),
    ("{reference: a, seeds: [1], settings: {a: {method: central}}}", "unknown key 'seeds'"),
    ("{reference: a, settings: {a: {method: fed_avg, temperature: 1}}}", "temperature"),
    ("{reference: a}", "settings"),
    ("{reference: a, base: {seed: 1}, settings: {a: {method: central}}}", "base: seed: not used"),
    ("{reference: a, settings: {a: {method: central, data_dir: x}}}",
     "settings.a: data_dir: not used by study"),
    ("{reference: a, settings: {a: null}}", "settings.a"),
    ("{reference: a, jobs: 0, settings: {a: {method: central}}}", "jobs 0: must be an integer"),
    ("{reference: a, grid: {lr: fast}, settings: {a: {method: central}}}", "settings.a: grid"),
    ("{reference: a, grid: 3, settings: {a: {method: central}}}", "grid 3: must be a mapping"),
    ("[" * 1100, "cannot be read as YAML"),
])
def test_an_invalid_study_is_reported_before_any_run(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=said):
        study_file.read(path, tmp_path, {})


@pytest.mark.parametrize(("name", "content", "said"), [
    ("config.json", b"null", "config.json does not hold an object"),
    ("config.json", b"[" * 10**5, "config.json is not JSON"),
    ("training_history.json", b"{}", "training_history.json does not hold an array"),
    ("training_history.json", b"[]", "does not hold a list of records"),
    ("training_history.json", b"[3]", "does not hold a list of records"),
    ("training_history.json", b"\xff[]", "training_history.json is not JSON"),
    ("training_history.json", b'[{"val_loss_halves": 3}]', "has no val_loss_halves at its end"),
    ("training_history.json", None, "training_history.json is not a regular file"),
])
@pytest.mark.timeout(20)
def test_a_damaged_run_is_named(name: str, content: bytes | None, said: str, tmp_path: Path
                                ) -> None:
    config = resolve("central", {"data_dir": tmp_path, "run_name": "run", "rounds": 2})
    config.run_dir.mkdir()
    (config.run_dir / "config.json").write_text(json.dumps(config.to_dict()))
    (config.run_dir / "training_history.json").write_text(
        '[{"val_loss_halves": [1.5, null]}]')
    write_outcome(config.run_dir, "finished", 2)
    assert study_runs.loss_halves(config) == [1.5, math.inf]
    if content is None:
        (config.run_dir / name).unlink()
        os.mkfifo(config.run_dir / name)
    else:
        (config.run_dir / name).write_bytes(content)
    with pytest.raises(ValueError, match=said) as caught:
        study_runs.loss_halves(config)
    assert str(config.run_dir) in str(caught.value)
    assert "remove the run's folder" in str(caught.value)


def test_the_same_text_by_another_path_is_the_same_run(tmp_path: Path, cache_dir: Path,
                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    flags: dict[str, Any] = {
        k.removeprefix("--"): v for k, v in zip(SMALL[::2], SMALL[1::2], strict=True)}
    flags |= {"data_dir": tmp_path, "cache_dir": cache_dir, "run_name": "run", "rounds": 1}
    assert run(resolve("central", flags)) == 0
    monkeypatch.chdir(Path(flags["dataset"]).parent)
    there = resolve("central", flags | {"dataset": Path(flags["dataset"]).name})
    assert study_runs.loss_halves(there) == study_runs.loss_halves(resolve("central", flags))
    (tmp_path / "other.txt").write_text(Path(flags["dataset"]).read_text() + "more\n")
    with pytest.raises(ValueError, match="holds a run with another dataset"):
        study_runs.loss_halves(resolve("central", flags | {"dataset": str(tmp_path / "other.txt")}))
