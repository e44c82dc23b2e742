"""Whole studies: their table, their resumption, their figures."""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

import fedrun
from fedrun.common import locks
from fedrun.config import RunConfig
from fedrun.distributed.launch import Launch
from fedrun.flags import resolve
from fedrun.run import run as run_here
from fedrun.tools import (
    plot,
    study,
    study_file,
    study_process,
    study_queue,
    study_runs,
    study_table,
)
from fedrun.tools.study_file import Study
from fedrun.tools.study_process import Children
from fedrun.tools.study_queue import Member
from tests.support.runs import read_history, read_json
from tests.support.studies import ORIGINAL, change, little_study

pytestmark = pytest.mark.usefixtures("signals_of_a_terminal")


def start_here(config: RunConfig, gpus: str | None, children: Children) -> None:
    """`study_queue.start` without its process, whose start would take most of the test."""
    assert run_here(config) == 0


def test_a_study_of_runs_from_a_run(tmp_path: Path, cache_dir: Path,
                                    monkeypatch: pytest.MonkeyPatch,
                                    capsys: pytest.CaptureFixture[str]) -> None:
    """Their folders hold its shape and tokenizer, which are not those of the study's file."""
    path = little_study(tmp_path, cache_dir)
    base = yaml.safe_load(path.read_text())["base"]
    first = resolve("central", base | {"data_dir": tmp_path, "run_name": "first", "rounds": 1})
    start_here(first, None, Children(tmp_path))
    change(path, {"init_from": str(first.run_dir), "config": "pure_ssm_1_layer",
                  "tokenizer": "gpt2"},
           report_seeds=[], extensions=0, grid={}, settings={
               "central": {"method": "central", "rounds": 2},
               "averaged": {"method": "fed_avg", "num_clients": 2, "rounds": 2}})
    monkeypatch.setattr(study_queue, "start", start_here)
    argv = [str(path), "--results", str(tmp_path)]
    for _ in range(2):
        assert study.main(argv) == 0
        assert "| averaged " in capsys.readouterr().out
    model = study_file.read(path, tmp_path, {}).to_dict()["settings"]["averaged"]["model"]
    assert model == first.to_dict()["model"]
    change(path, {"init_from": str(tmp_path / "nowhere")})
    with pytest.raises(ValueError, match=r"--init_from .*nowhere"):
        study_file.read(path, tmp_path, {})


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
    assert f"to do: at most 11 runs, {tokens:,} tokens of training, about" in said
    assert " for this command alone, 1 at a time, " in said
    assert "tiny, 2 x 32 tokens: " in said
    with pytest.MonkeyPatch.context() as patch:  # a member whose rank 0 is lost
        patch.setattr(study, "detect", lambda env: Launch(1, 2, 1, 2))
        assert study.main(argv) == 0
    assert capsys.readouterr().out.count(" s  val ppl") == 11
    assert sorted(path.name for path in (tmp_path / "little").iterdir()) == ["queue", "runs"]
    assert study.main(argv) == 0  # nothing is run a second time
    assert " s  val ppl" not in capsys.readouterr().out
    assert read_json(tmp_path / "little" / "outcome.json")["outcome"] == "finished"
    rows = {r["setting"]: r for r in json.loads((tmp_path / "little" / "table.json").read_text())}
    assert rows["central"]["ratios"] == [1, 1]
    # The best of the two was the larger, so that the grid grew by one, once.
    assert set(rows["averaged"]["tuned_ppl"]) == {"lr 0.001", "lr 0.002", "lr 0.004"}
    assert rows["averaged"]["best"] == {"lr": 0.004}
    assert len(rows["averaged"]["ratios"]) == 2
    assert rows["averaged"]["ratio_mean"] == pytest.approx(sum(rows["averaged"]["ratios"]) / 2)
    assert "ratios" not in rows["slow"]  # pruned
    assert "not repeated" in (tmp_path / "little" / "table.md").read_text()

    assert rows["averaged"]["ratio_range"] == [min(rows["averaged"]["ratios"]),
                                               max(rows["averaged"]["ratios"])]
    # Three int64 vectors and a few numbers more, each way, of two clients for 2 x 32 tokens each.
    model = fedrun.open_run(tmp_path / "little" / "runs" / "slow_lr_1e-06_seed_0").model()
    size = sum(p.numel() for p in model.parameters())
    averaged, slow = (rows[name]["bytes_per_token"] for name in ("averaged", "slow"))
    assert averaged == pytest.approx(2 * 3 * 8 * size / 64, rel=1e-3)
    assert slow == pytest.approx(2 * 4 * size / 64, rel=1e-3)
    assert rows["averaged"]["times_fewer_bytes"] == pytest.approx(1 / 6, rel=1e-3)
    assert "bytes_per_token" not in rows["central"]

    # The numbers are those of the halves: tuned on the first, reported on the second.
    def halves(name: str) -> list[float]:
        history = read_history(tmp_path / "little" / "runs" / name)
        found: list[float] = history[-1]["val_loss_halves"]
        return found

    assert rows["slow"]["tuned_ppl"]["lr 1e-06"] == pytest.approx(
        math.exp(halves("slow_lr_1e-06_seed_0")[0]))
    assert rows["averaged"]["ratios"][0] == pytest.approx(math.exp(
        halves("averaged_lr_0.004_seed_1")[1] - halves("central_lr_0.004_seed_1")[1]))

    with pytest.raises(ValueError, match="another sequence_length"):
        study.main([*argv, "--sequence_length", "16"])

    # What it has recorded makes the same table elsewhere, without a run.
    there = tmp_path / "elsewhere" / "little"
    there.mkdir(parents=True)
    records = (tmp_path / "little" / "runs.jsonl").read_text().splitlines()
    (there / "runs.jsonl").write_text("\n".join(records) + "\n")
    argv[-1] = str(there.parent)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study_queue, "start", None)
        assert study.main([*argv, "--recorded"]) == 0
    for name in ("table.md", "table.json", "runs.jsonl"):
        assert (there / name).read_bytes() == (tmp_path / "little" / name).read_bytes(), name
    # A run whose line is removed is repeated, and nothing else.
    shutil.rmtree(there / "runs")
    (there / "runs.jsonl").write_text("\n".join(records[1:]) + "\n")
    capsys.readouterr()
    assert study.main([*argv, "--recorded"]) == 0
    assert capsys.readouterr().out.count(" s  val ppl") == 1
    repeated = (there / "runs.jsonl").read_text().splitlines()
    assert repeated[1:] == records[1:]
    assert json.loads(repeated[0])["run"] == json.loads(records[0])["run"]
    for line in ('{"run": "../away"}', '{"run": "it", "config.json": 3}', "[]", "{"):
        (there / "runs.jsonl").write_text(f"{records[0]}\n{line}\n")
        with pytest.raises(ValueError, match=r"runs\.jsonl, line 2: is not a run of a study"):
            study.main([*argv, "--recorded"])


def test_the_better_of_two_references_and_the_table_of_what_is_finished(
        tmp_path: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str]) -> None:
    """Which is better is known once both are tuned; the table so far has what can be compared."""
    path = little_study(tmp_path, cache_dir)
    change(path, {}, reference=["a_short", "c_long"], report_seeds=[1], prune=1.0,
           repeat=["a_short"], extensions=0, grid={"lr": [1e-3, 2e-3]}, figures=["bytes"],
           settings={
               "a_short": {"method": "central", "rounds": 1, "grid": {"lr": [1e-3]}},
               "b_averaged": {"method": "fed_avg", "num_clients": 2, "rounds": 2},
               "c_long": {"method": "central", "rounds": 6, "grid": {"lr": [1e-3]}}})
    argv = [str(path), "--results", str(tmp_path)]
    with pytest.raises(ValueError, match=r"--so_far : must be given once a run of the reference"):
        study.main([*argv, "--so_far"])
    found = study_file.read(path, tmp_path, {})
    started: list[str] = []

    def start_two(config: RunConfig, gpus: str | None, children: Children) -> None:
        if len(started) == 2:
            raise OSError("the machine is switched off")
        started.append(config.name)
        start_here(config, gpus, children)

    monkeypatch.setattr(study_queue, "start", start_two)
    with pytest.raises(OSError, match="switched off"):
        study.main(argv)
    assert started == ["a_short_lr_0.001_seed_0", "b_averaged_lr_0.001_seed_0"]
    capsys.readouterr()

    def table() -> dict[str, dict[str, Any]]:
        rows = json.loads((tmp_path / "little" / "table.json").read_text())
        return {row["setting"]: row for row in rows}

    assert study.main([*argv, "--so_far"]) == 0
    assert "| b_averaged | lr 0.001 |" in capsys.readouterr().out
    assert {name: row["reference"] for name, row in table().items()} == {
        "a_short": "a_short", "b_averaged": "a_short"}
    monkeypatch.setattr(study_queue, "start", start_here)
    assert study.main(argv) == 0
    rows = table()
    assert {row["reference"] for row in rows.values()} == {"c_long"}
    assert rows["a_short"]["tuned_ratio"] > 1
    assert rows["a_short"]["ratios"][0] > 1  # repeated though it is above `prune`
    said = capsys.readouterr().out
    assert "Perplexity against the better of a_short and c_long when tuned." in said
    assert (tmp_path / "little" / "figures" / "perplexity_and_bytes.png").exists()
    only = study_file.read(path, tmp_path, {"settings": "c_long,b_averaged", "name": "part"})
    assert [*only.settings] == ["b_averaged", "c_long"]
    assert (only.references, only.always) == (["c_long"], [])
    assert only.reference_of(only.settings["b_averaged"]).name == "c_long"
    with pytest.raises(ValueError, match="--settings lang: must be one of a_short, b_averaged"):
        study_file.read(path, tmp_path, {"settings": "lang"})
    with pytest.raises(ValueError, match="--recorded true: must be left out: there is no"):
        study.main([*argv, "--name", "other", "--recorded"])
    with pytest.raises(ValueError, match="--settings b_averaged: must be names with a_short or c"):
        study_file.read(path, tmp_path, {"settings": "b_averaged"})
    assert found.references == ["a_short", "c_long"]


@pytest.mark.parametrize(("prune", "grid", "in_turn"), [
    (math.inf, [1e-3], [["a_0", "b_0", "a_1", "b_1", "a_2", "b_2"]]),
    (1.5, [1e-3], [["a_0", "b_0"], ["a_1", "a_2"]]),
    (math.inf, [1e-3, 2e-3], [["a_0", "a_0", "b_0", "b_0"], ["a_1", "b_1", "a_2", "b_2"]])])
def test_seeds_wait_for_the_tuning_only_if_it_decides(
        tmp_path: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch, prune: float,
        grid: list[float], in_turn: list[list[str]]) -> None:
    path = little_study(tmp_path, cache_dir)
    change(path, {}, report_seeds=[1, 2], prune=prune, grid={"lr": grid}, extensions=0, settings={
        "a": {"method": "central", "rounds": 2}, "b": {"method": "central", "rounds": 3}},
        reference="a")
    found = study_file.read(path, tmp_path, {})
    queues: list[list[str]] = []
    run: set[str] = set()

    def run_all(member: Member, configs: Iterable[RunConfig]) -> None:
        new = [config for config in configs if config.name not in run]
        run.update(config.name for config in new)
        if new:
            queues.append([f"{c.name[0]}_{c.seed}" for c in new])

    monkeypatch.setattr(study, "run_all", run_all)
    monkeypatch.setattr(study, "loss_halves", lambda config: [float(config.rounds)] * 2)
    member = Member(tmp_path, [None])
    study.tune(found, member)
    study.repeat(found, member)
    assert queues == in_turn


def one_run(tmp_path: Path, cache_dir: Path) -> tuple[list[str], Path]:
    """The arguments of a study with one run and a figure, and the run's folder."""
    path = little_study(tmp_path, cache_dir)
    change(path, {"checkpoint_freq": 1}, report_seeds=[], extensions=0, grid={"lr": [1e-3]},
           figures=["perplexities"], settings={"central": {"method": "central", "rounds": 2}})
    return ([str(path), "--results", str(tmp_path)],
            tmp_path / "little" / "runs" / "central_lr_0.001_seed_0")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_the_figures_are_drawn(
        tmp_path: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture, number: int) -> None:
    monkeypatch.setattr(study_queue, "start", start_here)
    argv, _ = one_run(tmp_path, cache_dir)
    drawn, before = [], signal.getsignal(number)

    def draw(words: Sequence[str]) -> int:
        drawn.append(words[0])
        if len(drawn) == 1:
            os.kill(os.getpid(), number)
            time.sleep(5)
        return 0

    monkeypatch.setattr(plot, "main", draw)
    assert study.main(argv) == 128 + number
    name = signal.Signals(number).name
    (line,) = (r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING)
    assert line == (f"study: stopped by {name}: its runs are finished, not its table and figures; "
                    "the same command resumes the study")
    assert "Traceback" not in capsys.readouterr().err
    assert signal.getsignal(number) == before
    outcome = read_json(tmp_path / "little" / "outcome.json")
    assert (outcome["outcome"], outcome["reason"]) == ("stopped", line)
    assert study.main(argv) == 0
    assert drawn == ["perplexities"] * 2
    assert read_json(tmp_path / "little" / "outcome.json")["outcome"] == "finished"


def test_checkpoints_of_a_member_that_died_are_removed(
        tmp_path: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the end of its run and their removal."""
    monkeypatch.setattr(study_queue, "start", start_here)
    argv, run_dir = one_run(tmp_path, cache_dir)
    checkpoints = run_dir / "checkpoints"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study_queue, "_remove_checkpoints", lambda config: None)
        assert study.main(argv) == 0
    assert list(checkpoints.glob("step_*/server.json")) or list(checkpoints.glob("step_*/*"))
    lock = locks.acquire(tmp_path / "little" / "queue" / f"{run_dir.name}.lock", 0)
    assert study.main(argv) == 0
    assert checkpoints.is_dir()  # another process still has the run
    lock.release()

    def interrupted(config: RunConfig) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study_queue, "_remove_checkpoints", interrupted)
        with pytest.raises(KeyboardInterrupt) as kept:  # with its frames
            study.main(argv)
    locks.acquire(tmp_path / "little" / "queue" / f"{run_dir.name}.lock", 0).release()
    assert kept
    (checkpoints / "notes.txt").write_text("the user's own")
    assert study.main(argv) == 0
    assert [path.name for path in checkpoints.iterdir()] == ["notes.txt"]


def test_a_run_that_diverges_counts_as_infinitely_bad(tmp_path: Path, cache_dir: Path) -> None:
    path = little_study(tmp_path, cache_dir)
    change(path, {}, settings={"central": {"method": "central", "rounds": 3}}, report_seeds=[],
           grid={"lr": [1e-3, 1e30]})
    found = study_file.read(path, tmp_path, {})
    central = found.settings["central"]
    good, bad = central.points()
    config = found.config(central, bad, 0)
    study_process.start(config, None, study_process.Children(tmp_path))
    assert study_runs.loss_halves(config) == [math.inf, math.inf]
    run = fedrun.open_run(config.run_dir)
    assert (run.outcome, run.diverged) == ("failed", True)
    assert "not finite: --lr 1e+30 may be too large" in run.reason
    assert (config.run_dir / "failed.txt").read_text() == f"{run.reason}\n"
    central.tuned = {good: 3.0, bad: math.inf}
    study_table.write(found)
    (row,) = json.loads((tmp_path / "little" / "table.json").read_text())
    assert row["best"] == {"lr": 1e-3}
    assert row["tuned_ppl"]["lr 1e+30"] is None  # JSON has no infinity
    found.report_seeds[:] = [0, 1, 2]  # of which one diverges: the others make no deviation of it
    central.tuned = {bad: 3.0, good: 9.0}
    for seed in (1, 2):
        folder = found.config(central, bad, seed).run_dir
        shutil.copytree(config.run_dir, folder)
        contents = read_json(folder / "config.json") | {"seed": seed}
        (folder / "config.json").write_text(json.dumps(contents))
    study_table.write(found)
    (row,) = json.loads((tmp_path / "little" / "table.json").read_text())
    assert (row["ratio_mean"], row["ratio_std"]) == (None, None)


def test_gpus_are_left_to_the_runs(tmp_path: Path, cache_dir: Path,
                                   monkeypatch: pytest.MonkeyPatch) -> None:
    """The cost is measured by another process, which gives its GPU back."""
    commands: list[list[str]] = []
    taken: list[list[str | None]] = []

    def take(study: Study, launch: Launch, gpus: Sequence[str | None]) -> int:
        taken.append(list(gpus))
        return 0

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5,6,7")
    monkeypatch.setattr(study, "LOADED", [])
    monkeypatch.setattr(study, "take_part", take)
    monkeypatch.setattr(subprocess, "run", lambda command, **how: commands.append(command))
    argv = [str(little_study(tmp_path, cache_dir)), "--results", str(tmp_path)]
    assert study.main([*argv, "--jobs", "2", "--workers", "2"]) == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study, "detect", lambda env: Launch(1, 2, 1, 2))
        assert study.main([*argv, "--jobs", "2"]) == 0
    assert taken == [["2,5", "6,7"], ["6", "7"]]
    (command,) = commands
    assert command[1:] == ["-m", "fedrun", "study", *argv, "--jobs", "2", "--workers", "2",
                           "--dry_run", "--jobs", "2"]
    with pytest.raises(ValueError, match="--workers 5: must be at most 4"):
        study.main([*argv, "--workers", "5"])


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_part_of_the_original_grid_at_its_small_scale(tmp_path: Path, cache_dir: Path) -> None:
    """One seed of one and two layers, for six rounds: all methods, both numbers of local updates,
    and their figures, by one command."""
    argv = [str(ORIGINAL), "--scale", "small", "--results", str(tmp_path), "--axes",
            "config=tiny_1_layer,tiny", "--axes", "seed=0", "--rounds", "6", "--val_freq", "3",
            "--cache_dir", str(cache_dir), "--jobs", "2"]
    assert study.main(argv) == 0
    folder = tmp_path / "original_small"
    rows = json.loads((folder / "table.json").read_text())
    assert {row["reference"] for row in rows} == {"central_tiny_1_layer", "central_tiny"}
    assert len(rows) == 9
    drawn = sorted(path.stem for path in (folder / "figures").glob("*.png"))
    svd = [f"{kind}_fed_avg_{{}}_lu_{updates}{entity}" for kind in ("svd_evolution", "svd_spectrum")
           for updates in (1, 8) for entity in ("", "_client_0")]
    for name in (
            "1_central_vs_fed_{}", "2_lu_comparison_{}", "3_method_comparison_{}",
            "averaged_svd_evolution_{}", "averaged_final_spectrum_{}", *svd,
            "heatmap_structure_central_{}", "heatmap_fed_avg_{}_lu_8_seed_0_client_0"):
        for config in ("tiny_1_layer", "tiny"):
            assert any(stem.startswith(name.format(config)) for stem in drawn), (name, drawn)
    for name in ("4_multi_config_comparison", "5_configs_in_one_axes",
                 "heatmap_fed_fisher_tiny_1_layer_lu_1_seed_0_server"):
        assert any(stem.startswith(name) for stem in drawn), (name, drawn)
