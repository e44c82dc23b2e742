"""A run's folder is recognised, and only files that a run writes are ever removed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fedrun import start
from fedrun.common.errors import is_component
from fedrun.flags import resolve
from fedrun.records import checkpoint, run_files
from fedrun.records.provenance import Length
from fedrun.records.run_dir import clear_run_dir, truncate_after
from fedrun.tools.study_file import read
from tests.support.runs import Run

CONFIG = resolve("fed_avg", {"run_name": "run"}).to_dict()


def write(path: Path, content: object = "precious") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def contents(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): p.read_text(errors="replace")
            for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("name", ["..", ".", "", "a/b", "../other", "/tmp", "a\0b"])
def test_a_run_name_is_one_path_component(name: str) -> None:
    with pytest.raises(ValueError, match="--run_name"):
        resolve("fed_avg", {"run_name": name})
    assert not is_component(name)


def test_a_study_name_is_one_path_component(tmp_path: Path) -> None:
    file = write(tmp_path / "study.yaml", "name: ../..\nreference: a\nsettings: {a: {method: x}}")
    with pytest.raises(ValueError, match=r"name \.\./\.\.: must be a folder name without"):
        read(file, tmp_path, {})


@pytest.mark.parametrize("held", [
    {"config.json": {"name": "my-web-app", "version": "1.0.0"}, "src/main.py": "precious"},
    {"config.json": {"architectures": ["Mamba2ForCausalLM"]}, "model.safetensors": "precious"},
    {"config.json": {"method": "fed_avg", "model": {}}, "outcome.json": "{}"},
    {"config.json": CONFIG},  # the settings of an old run, without its other files
    {"config.json": "null"},
    {"model.safetensors": "precious"},
    {"notes.txt": "precious"},
    {"checkpoints/step_000002/manifest.json": {"config": CONFIG, "sha256": "0"}},
])
def test_a_folder_that_is_not_a_runs_is_refused_and_left_alone(
        tmp_path: Path, held: dict[str, object]) -> None:
    for name, content in held.items():
        write(tmp_path / "run" / name, content)
    before = contents(tmp_path)
    for overwrite in (False, True):
        config = resolve("fed_avg", {"data_dir": tmp_path, "run_name": "run",
                                     "overwrite": overwrite})
        with pytest.raises(start.RunRefused, match="exists and is not a run's folder"):
            start.decide_start(config, Length(config, 1), lambda c: "fp32", {})
    assert contents(tmp_path) == before


@pytest.mark.parametrize("held", [
    {"config.json": {run_files.MARK: "0.1"}},
    {"config.json": CONFIG, "outcome.json": {"outcome": "running"}},
    {"config.json": CONFIG, "events.jsonl": ""},
])
def test_a_run_is_recognised_by_its_mark_or_by_what_old_ones_wrote(
        tmp_path: Path, held: dict[str, object]) -> None:
    for name, content in held.items():
        write(tmp_path / name, content)
    assert run_files.recorded_settings(tmp_path) == held["config.json"]


def test_a_run_whose_config_is_damaged_is_recognised_by_its_checkpoint(tmp_path: Path) -> None:
    for step in (2, 4):
        folder = checkpoint.folder_of(tmp_path, step)
        checkpoint.commit(folder, step, CONFIG | {"seed": step}, {}, {}, {})
    write(tmp_path / "config.json", "null")
    assert run_files.recorded_settings(tmp_path) == json.loads(json.dumps(CONFIG | {"seed": 4}))


def test_overwrite_refuses_a_run_with_files_of_the_user_and_names_one(run_here: Run) -> None:
    flags = ("fed_avg", "--rounds", 1, "--num_clients", 2, "--checkpoint_freq", 1,
             "--save_client_deltas", "--track", "tensorboard")
    first = run_here(*flags)
    assert first.code == 0, first.output
    assert run_files.foreign(first.run_dir) is None  # every file that a run writes is known
    held = first.config
    assert held.pop(run_files.MARK)
    thesis = write(first.run_dir / "server" / "thesis" / "chapter.tex")
    refused = run_here(*flags, "--overwrite")
    assert refused.code == 2
    assert f"--overwrite: {thesis} is not written by a run" in refused.output
    assert refused.bits == first.bits


def test_weights_that_do_not_fit_are_refused_before_an_earlier_run_is_removed(
        run_here: Run, tmp_path: Path) -> None:
    flags = ("fed_avg", "--rounds", 1, "--num_clients", 2)
    earlier = run_here(*flags)
    assert earlier.code == 0, earlier.output
    bits, ended = earlier.bits, earlier.outcome
    other = Path(shutil.copytree(earlier.run_dir, tmp_path / "of_another"))
    weights = load_file(other / "model.safetensors")
    save_file(weights | {"backbone.norm_f.weight": torch.ones(3)}, other / "model.safetensors")
    refused = run_here(*flags, "--init_from", other, "--overwrite")
    assert refused.code == 2
    assert f"{other}: weights and config.json do not belong together" in refused.output
    assert (refused.bits, refused.outcome) == (bits, ended)


def test_an_empty_folder_of_the_user_counts(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    assert run_files.foreign(tmp_path) == tmp_path / "data"


MINE = (".git/config", ".gitignore", "thesis/step_000009.npz", "notes/.draft.aaaaaaaa",
        "checkpoints/step_000006/why.txt", "checkpoints/old/step_000006/manifest.json",
        "clients/list.csv", "params/step_000009.npz.bak", "tokenizer/README.txt")
RUNS = ("params/step_000009.npz", "server/deltas/step_000009.npz", "clients/client_3.safetensors",
        ".config.json.a_b1c2d3", "server/params/.step_000009.npz.abcdefgh",
        ".checkpoints-17-5/step_000002/manifest.json")


def test_truncating_and_clearing_leave_files_of_the_user(tmp_path: Path) -> None:
    for name in (*MINE, *RUNS, "params/step_000003.npz", "events.jsonl", "training_history.json",
                 "checkpoints/step_000006/manifest.json", "checkpoints/step_000002/manifest.json"):
        write(tmp_path / name)
    elsewhere = write(tmp_path.parent / "elsewhere" / "params" / "step_000009.npz")
    (tmp_path / "client_1").symlink_to(elsewhere.parent.parent)
    truncate_after(tmp_path, 3)
    checkpoint.delete_after(tmp_path, 3)
    left = contents(tmp_path)
    assert set(MINE) < set(left)
    assert not set(RUNS) & set(left)
    assert {"params/step_000003.npz", "checkpoints/step_000002/manifest.json"} < set(left)
    assert "checkpoints/step_000006/manifest.json" not in left
    clear_run_dir(tmp_path, lambda: None)
    assert set(contents(tmp_path)) == set(MINE)
    assert elsewhere.exists()
