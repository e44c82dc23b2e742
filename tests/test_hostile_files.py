"""Run folders from others: damaged files are named and skipped, the rest is shown."""

from __future__ import annotations

import io
import json
import math
import threading
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure
from rich.console import Console

from fedrun import cli
from fedrun.common.files import DamagedFile, read_json
from fedrun.plots import deltas, saved, style
from fedrun.plots.runs import find_runs
from fedrun.tools.watch import Follower, RunState, follow, screen
from tests.support import folders, hostile


@pytest.mark.parametrize("kind", [dict, list])
def test_json_is_of_its_kind_or_damaged(tmp_path: Path, kind: type) -> None:
    path = tmp_path / "file.json"
    for name, content in hostile.damaged(kind).items():
        hostile.put(path, content)
        with pytest.raises(OSError if name == "loop" else DamagedFile) as raised:
            read_json(path, kind)
        assert str(path) in str(raised.value), name
    hostile.put(path, b'{"a": [NaN, -Infinity, 1e400, 2.5, 1e308]}')
    assert read_json(path, dict) == {"a": [None, None, None, 2.5, 1e308]}


@pytest.fixture
def many_damaged(tmp_path: Path) -> tuple[Path, set[str], set[str]]:
    """A folder of valid runs and of runs with one damaged file each; the names of both."""
    data_dir = tmp_path / "results"
    valid, broken = set(), set()
    for method in ("central", "fed_avg"):
        run = folders.ours(data_dir, method, "tiny", steps=(1, 30))
        folders.save_steps(run if method == "central" else run / "server", steps=(1, 30))
        valid.add(run.name)
    for file, kind in (("config.json", dict), ("training_history.json", list)):
        for name, content in hostile.damaged(kind).items():
            run = folders.ours(data_dir, name=f"{file[:3]} {name}", seed=7, steps=(1,))
            hostile.put(run / file, content)
            broken.add(run.name)
    for number, wrong in enumerate(hostile.WRONG_TYPES):
        run = folders.ours(data_dir, name=f"types {number}", steps=(1,))
        folders.write(run / "config.json", wrong)
        broken.add(run.name)
    run = folders.ours(data_dir, name="records", steps=(1,))
    folders.write(run / "training_history.json", hostile.ODD_RECORDS)
    broken.add(run.name)
    return data_dir, valid, broken


def test_damaged_folders_are_named_and_the_others_are_drawn(
        many_damaged: tuple[Path, set[str], set[str]], capsys: pytest.CaptureFixture[str]) -> None:
    data_dir, valid, broken = many_damaged
    found = find_runs(data_dir)
    assert {run.name for run in found.runs} == valid
    assert {name for name, _ in found.passed_over} == broken
    reasons = dict(found.passed_over)
    for name, reason in (("con pipe", "config.json is damaged: is not a regular file"),
                         ("con another", "config.json is damaged: does not hold an object"),
                         ("tra folder", "training_history.json is damaged: is not a regular file"),
                         ("tra large", f"training_history.json is damaged: has {1 << 33} bytes"),
                         ("tra nested", "nested more than"), ("tra deep", "nested too deeply"),
                         ("tra long", "a number with thousands of digits"),
                         ("records", "no record"),
                         ("types 4", "config.json is not a run's")):
        assert reason in reasons[name]
    assert cli.main(["report", "--data_dir", str(data_dir), "--skip_deltas"]) == 0
    printed = capsys.readouterr().out
    assert all(printed.count(f"skipped {name}: ") == 1 for name in broken)
    entities = saved.find_entities(data_dir, "server", True, None)
    assert [entity.run.method for entity in entities.entities] == ["fed_avg"]
    assert {name for name, _ in entities.passed_over} >= {n for n in broken if n[:3] == "con"}
    page = (data_dir / "report.html").read_text(encoding="utf-8")
    assert page.count("<li>Run ") == len(broken)


def test_a_damaged_environment_costs_only_its_own_content(tmp_path: Path) -> None:
    run = folders.ours(tmp_path, "central", "tiny")
    for content in hostile.damaged(dict).values():
        hostile.put(run / "environment.json", content)
        found = find_runs(tmp_path)
        assert [r.final.step for r in found.runs] == [folders.STEPS[-1]]
        assert found.passed_over[0][0] == run.name
        assert found.passed_over[0][1].startswith("environment.json ")


Json = st.recursive(
    st.sampled_from([None, True, 0, 3, -1, 2**63, 10**400, 0.5, 2.5, 1e308, -1e308, float("nan"),
                     float("inf"), "", "a", "1e400", "\x1b"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(
        ["event", "round", "global_step", "val_ppl", "train_ppl", "tokens", "clients", "client"]),
        inner, max_size=3), max_leaves=4)
Events = st.dictionaries(st.sampled_from(
    ["round", "step", "total", "unit", "train_ppl", "val_ppl", "tokens", "seconds", "lr", "bytes",
     "clients", "left_out", "tokens_per_second", "evaluation_seconds"]), Json)


@settings(max_examples=50, deadline=None)
@given(st.lists(Events, max_size=3), st.sampled_from(["round", "step", "start", "end"]))
def test_any_events_can_be_shown(events: list[dict[str, object]], kind: str) -> None:
    state = RunState("run")
    for event in events:
        state.update({"event": kind} | event)
    shown = io.StringIO()
    Console(file=shown, width=100).print(screen(state))
    assert "run" in shown.getvalue()


@settings(max_examples=50, deadline=None)
@given(st.lists(Json, max_size=4), st.dictionaries(st.sampled_from(
    ["lr", "num_clients", "batch_size", "sequence_length", "model", "dataset"]), Json, max_size=3))
def test_any_history_is_read_or_named(tmp_path_factory: pytest.TempPathFactory,
                                      history: list[object], odd: dict[str, object]) -> None:
    data_dir = tmp_path_factory.getbasetemp() / "any history"
    if not data_dir.exists():
        folders.ours(data_dir, name="whole")
        folders.ours(data_dir, name="odd")
    content = {"method": "fed_avg", "config": "tiny", "seed": 0, "local_updates": 1}
    folders.write(data_dir / "odd" / "config.json", content | odd)
    folders.write(data_dir / "odd" / "training_history.json", history)
    found = find_runs(data_dir)
    names = [run.name for run in found.runs] + [name for name, _ in found.passed_over]
    assert sorted(names) == ["odd", "whole"]
    assert str(found).startswith("found")
    for run in found.runs:
        assert run.final.val_ppl > 0
        assert all(math.isfinite(x) and math.isfinite(perplexity)
                   for x, perplexity in run.points("val_ppl", "tokens").values())


# ---- events --------------------------------------------------------------------------------------

def test_odd_events_are_skipped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    run.mkdir()
    real = json.dumps({"event": "round", "round": 4, "train_ppl": 8.5, "tokens": 64}).encode()
    (run / "events.jsonl").write_bytes(hostile.ODD_EVENTS + real + b"\n")
    assert cli.main(["watch", str(run), "--once"]) == 0
    screen_text = capsys.readouterr().out
    assert "round 4" in screen_text
    assert "8.5" in screen_text
    assert "64 tokens" in screen_text
    assert "left out 1×" in screen_text  # round 3 is an event


def test_a_line_longer_than_any_event_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch
                                                  ) -> None:
    monkeypatch.setattr("fedrun.tools.watch.LONGEST_LINE", 1000)
    monkeypatch.setattr("fedrun.tools.watch.READ_AT_ONCE", 64)
    path = tmp_path / "events.jsonl"
    follower = Follower(path)
    path.write_bytes(b'{"event": "start"}\n' + b"x" * 5000)
    assert [e["event"] for e in follower.new()] == ["start"]
    with path.open("ab") as file:
        file.write(b"x" * 100 + b'\n{"event": "e')
    assert list(follower.new()) == []
    with path.open("ab") as file:
        file.write(b'nd"}\n')
    assert [e["event"] for e in follower.new()] == ["end"]


@pytest.mark.parametrize(("content", "reason"), [
    ("pipe", "is not a regular file"), ("folder", "is not a regular file"),
    ("loop", "it has no events.jsonl to follow")])
def test_only_regular_files_are_followed(tmp_path: Path, capsys: pytest.CaptureFixture[str],
                                         content: str, reason: str) -> None:
    hostile.put(tmp_path / "events.jsonl", content)
    assert cli.main(["watch", str(tmp_path), "--once"]) == 2
    error = capsys.readouterr().err
    assert reason in error
    assert str(tmp_path) in error
    assert error.count("\n") == 1
    hostile.put(tmp_path / "a_pipe", "pipe")
    assert cli.main(["watch", str(tmp_path / "a_pipe")]) == 2
    assert "no such folder" in capsys.readouterr().err


def test_a_folder_that_is_deleted_while_it_is_watched(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "events.jsonl").write_text('{"event": "round", "round": 1}\n')
    timer = threading.Timer(0.1, run.rename, [tmp_path / "elsewhere"])
    timer.start()
    console = Console(file=io.StringIO())
    with pytest.raises(ValueError, match="deleted or renamed"):
        follow(Follower(run / "events.jsonl"), RunState("run"), console, once=False)
    timer.join()


# ---- models --------------------------------------------------------------------------------------

@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "tokenizer/tokenizer.json"])
def test_models_with_a_damaged_file_are_refused_in_a_line(
        tmp_path: Path, capsys: pytest.CaptureFixture[str], file: str) -> None:
    run = folders.with_model(folders.ours(tmp_path, "central", "tiny"))
    commands = [["generate", str(run), "--prompt", "once"]]
    if file == "config.json":
        commands += [["evaluate", str(run), "--cache_dir", str(tmp_path / "cache")],
                     ["export", str(run), str(tmp_path / "out")]]
    contents = hostile.damaged(dict)
    for number, wrong in enumerate(hostile.WRONG_TYPES[:1] if file == "config.json" else ()):
        contents[f"types {number}"] = json.dumps(wrong).encode()
    for name, content in contents.items():
        hostile.put(run / file, content)
        for argv in commands:
            assert cli.main(argv) == 2, (name, argv)
            error = capsys.readouterr().err
            assert error.startswith("fedrun: error: "), (name, argv)
            assert error.count("\n") == 1, (name, argv)
            assert run.name in error, (name, argv, error)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("setting", "value"), [
    ("sequence_length", "long"), ("dataset", ["wikitext-2"]), ("method", 7), ("model", [])])
def test_settings_of_other_types_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str],
                                           setting: str, value: object) -> None:
    run = folders.with_model(folders.ours(tmp_path, "central", "tiny"))
    content = json.loads((run / "config.json").read_text())
    folders.write(run / "config.json", content | {setting: value})
    for argv in (["generate", str(run)], ["evaluate", str(run)],
                 ["export", str(run), str(tmp_path / "out")]):
        assert cli.main(argv) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert setting in error


# ---- arrays --------------------------------------------------------------------------------------

def test_invalid_arrays_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = folders.ours(tmp_path, "central", "tiny")
    folders.save_steps(run, params=False, steps=tuple(range(1, 30)))
    deltas = run / "deltas"
    key = "delta_layers.0.in_proj"
    good = folders.change(1, 0)
    bad: dict[str, Any] = {
        "text": np.full((24, 16), "x"), "complex": good * 1j, "flat": good[0], "none": good[:0],
        "nan": good * np.nan, "infinite": good.astype(np.float64) * 1e300 * 1e9,
        "large": good.astype(np.float64) * 1e300, "other shape": good.T,
        "dates": np.zeros((24, 16), "datetime64[s]"), "truth": good > 0,
        "fields": np.zeros((24, 16), [("a", "f4")])}
    steps = iter(range(2, 30))
    for array in bad.values():
        np.savez(deltas / f"step_{next(steps):06d}.npz", **{key: array})
    for content in ("pipe", "folder", "loop", "large", b"", b"PK\3\4", bytes(100)):
        hostile.put(deltas / f"step_{next(steps):06d}.npz", content)
    objects = deltas / f"step_{next(steps):06d}.npz"
    pickled: dict[str, Any] = {key: np.array([[{}]], dtype=object)}
    np.savez(objects, **pickled)
    with (deltas / f"step_{next(steps):06d}.npz").open("wb") as file:
        np.save(file, good)  # not an archive
    bomb = deltas / f"step_{next(steps):06d}.npz"
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(
            header, {"descr": "<f4", "fortran_order": False, "shape": (10**6, 10**6)})
        archive.writestr(f"{key}.npy", header.getvalue() + bytes(1000))
    wrong = set(range(2, next(steps)))
    found = saved.find_entities(tmp_path, "server", False, None)
    assert found.entities[0].steps == sorted({*range(1, 30)} - wrong)
    assert [name for name, _ in found.passed_over] == [
        f"{run.name}/deltas/step_{step:06d}.npz" for step in sorted(wrong)]
    assert "\n" not in "".join(reason for _, reason in found.passed_over)


def test_arrays_that_would_fill_the_memory_are_refused(tmp_path: Path,
                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    run = folders.ours(tmp_path, "central", "tiny")
    folders.save_steps(run, params=False, steps=(1,))
    monkeypatch.setattr(saved, "LARGEST_ARRAY", 24 * 16 * 4)  # without the header
    (passed_over,) = saved.find_entities(tmp_path, "server", False, None).passed_over
    assert "has more than 1536 bytes" in passed_over[1]


@pytest.mark.parametrize(("other", "wanted"), [
    ({"steps": (60, 90)}, "runs that saved a step in common"),
    ({"layers": 1}, "runs whose in_proj have the same shape")])
def test_runs_without_a_common_mean_are_reported(tmp_path: Path, other: dict[str, Any], wanted: str
                                         ) -> None:
    folders.save_steps(folders.ours(tmp_path, "central", "tiny", steps=(1,)), steps=(1, 30))
    second = folders.ours(tmp_path, "central", "tiny", seed=1, steps=(1,))
    folders.save_steps(second, 1, **{"steps": (1, 30), **other})
    if "layers" in other:
        for path in second.glob("*/*.npz"):
            np.savez(path, delta_in_proj=np.ones((3, 4)), in_proj=np.ones((3, 4)))
    made = deltas.figures(saved.find_entities(tmp_path, "server", False, None))
    for name in ("averaged_svd_evolution_tiny", "averaged_final_spectrum_tiny"):
        assert wanted in str(made[name])
    assert sum(isinstance(figure, Figure) for figure in made.values()) == 2  # heatmaps


def test_a_model_that_has_not_changed_can_be_drawn(tmp_path: Path) -> None:
    run = folders.ours(tmp_path, "central", "tiny", steps=(1,))
    (run / "deltas").mkdir()
    for step in (1, 30):
        np.savez(run / "deltas" / f"step_{step:06d}.npz", delta_in_proj=np.zeros((5, 4)))
    figure = deltas.figures(saved.find_entities(tmp_path, "server", False, None))[
        "averaged_final_spectrum_tiny"]
    assert isinstance(figure, Figure)
    style.write(figure, io.BytesIO(), "svg")
    assert not np.asarray(figure.axes[0].lines[0].get_ydata()).any()
