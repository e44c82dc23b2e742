"""Resuming in a folder that was moved, renamed, edited, damaged or forged."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedrun import cli
from fedrun.flags import resolve
from fedrun.records import checkpoint, run_files
from fedrun.records.outcome import write_outcome
from fedrun.records.provenance import settings_equal_on_all_ranks
from tests.support import hostile
from tests.support.runs import CORPUS, Outcome, Run, numbers, outcome_of, steps

FLAGS = ("--num_clients", 2, "--rounds", 4, "--checkpoint_freq", 2)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, little_text: tuple[str, ...]) -> Outcome:
    folder = tmp_path_factory.mktemp("whole")
    assert cli.main(["fed_avg", *little_text, *map(str, FLAGS), "--data_dir", str(folder),
                     "--run_name", "whole"]) == 0
    return Outcome(0, "", folder / "whole")


@pytest.fixture
def killed(whole: Outcome, tmp_path: Path) -> Outcome:
    """The folder of the same run, killed in its last round."""
    folder = tmp_path / "killed"
    shutil.copytree(whole.run_dir, folder)
    shutil.rmtree(folder / "checkpoints" / "step_000004")
    write_outcome(folder, "running", 0)
    return Outcome(-9, "", folder)


# ---- the same inputs under other names -----------------------------------------------------------

def test_the_same_text_and_settings_under_other_names(
        run_here: Run, whole: Outcome, killed: Outcome, monkeypatch: pytest.MonkeyPatch,
        tmp_path: Path) -> None:
    text = Path(whole.config["dataset"])
    (tmp_path / "mine.yaml").write_text(
        "model: {n_layer: 2, d_model: 64, d_state: 16, headdim: 16}\n")
    monkeypatch.chdir(text.parent)
    again = run_here("fed_avg", *FLAGS, "--dataset", text.name, "--config",
                     tmp_path / "mine.yaml", "--device", "cpu", "--val_freq", 2, after=killed)
    assert again.code == 0, again.output
    assert again.bits == whole.bits
    assert steps(again) == [1, 4]  # not 3, as with the frequency before
    named = run_here("fed_avg", *FLAGS, "--dataset", f"../{text.parent.name}/{text.name}",
                     "--eval_clients", after=again)
    assert "finished already" in named.output


@pytest.mark.slow
def test_other_names_of_the_same_inputs_are_the_same_experiment(
        run_here: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = tmp_path / "texts"
    (texts / "in").mkdir(parents=True)
    shutil.copy(CORPUS, texts / "in" / "a.txt")
    (texts / "tiny.yaml").write_text("model: {n_layer: 2, d_model: 64, d_state: 16, headdim: 16}\n")
    start = run_here("central", "--rounds", 1, name="start")
    flags = ("--num_clients", 2, "--batches", "clients", "--batch_size", 2, "--device")
    first = run_here("central", *flags, "auto", "--rounds", 2, "--dataset", texts / "in",
                     "--tokenizer", start.run_dir / "tokenizer", "--init_from", start.run_dir,
                     name="first")
    assert first.code == 0, first.output
    whole = run_here("central", *flags, "auto", "--rounds", 5, "--dataset", texts / "in",
                     "--tokenizer", start.run_dir / "tokenizer", "--init_from", start.run_dir,
                     name="whole")
    monkeypatch.chdir(texts)
    relative = Path("..") / start.run_dir.name
    again = run_here("central", *flags, "cpu", "--rounds", 5, "--val_freq", 2, "--dataset",
                           "in/", "--config", "tiny.yaml", "--tokenizer", f"{relative}/tokenizer/",
                           "--init_from", f"{relative}/.", after=first)
    assert again.code == 0, again.output
    assert "resuming from step 2" in again.output
    assert again.bits == whole.bits
    assert steps(again) == [1, 2, 4, 5]
    # Finished, and asked for by yet another name.
    (texts / "other").symlink_to("in")
    same = run_here("central", *flags, "cpu", "--rounds", 5, "--dataset", "other", "--config",
                          "tiny.yaml", "--init_from", start.run_dir, after=again)
    assert "finished already" in same.output, same.output
    # Another text, or another first model, is another experiment whatever its name.
    text = (texts / "in" / "a.txt").read_text()
    (texts / "in" / "a.txt").write_text(text.replace("the", "teh", 1))
    other = run_here("central", *flags, "cpu", "--rounds", 6, "--dataset", "in",
                           "--init_from", start.run_dir, after=again)
    assert other.code == 2
    assert re.search(r"other settings \(dataset in/ \(\w{16}\) there, in \(\w{16}\) here\)",
                     other.output)
    other = run_here("central", *flags, "cpu", "--rounds", 6, "--dataset", "in/",
                           "--init_from", start.run_dir, after=again)
    assert other.code == 2
    assert "--dataset: the text of this run was" in other.output
    (texts / "in" / "a.txt").write_text(text)
    (texts / "changed").symlink_to(first.run_dir)
    other = run_here("central", *flags, "cpu", "--rounds", 6, "--dataset", "in",
                           "--init_from", "changed", after=again)
    assert other.code == 2
    assert re.search(r"init_from .* \(\w{16}\) there, changed \(\w{16}\) here", other.output)
    assert again.bits == whole.bits


def test_ranks_compare_inputs_by_their_digests() -> None:
    shared = settings_equal_on_all_ranks(resolve("fed_avg", {"eval_clients": True}))
    assert not shared.keys() & {"dataset", "tokenizer", "init_from", "data_dir", "config"}
    assert shared.keys() > {"method", "model", "lr", "rounds", "n_epochs", "device", "val_freq",
                            "eval_clients", "save_client_deltas", "weighting"}


# ---- --resume FOLDER -----------------------------------------------------------------------------

def test_the_folder_that_resume_names_must_exist(run_here: Run, whole: Outcome,
                                                 killed: Outcome, tmp_path: Path) -> None:
    for after in (whole, killed):
        refused = run_here("fed_avg", *FLAGS, "--resume", tmp_path / "nowhere", after=after)
        assert refused.code == 2
        assert f"--resume {tmp_path / 'nowhere'}: no such folder" in refused.output
    empty = run_here("fed_avg", *FLAGS, "--resume", tmp_path, name="new")
    assert empty.code == 2
    assert f"--resume {tmp_path}: no checkpoint there" in empty.output


def test_the_folders_own_checkpoint_goes_before_that_of_resume(
        run_here: Run, whole: Outcome, killed: Outcome) -> None:
    resumed = run_here("fed_avg", *FLAGS, "--resume", whole.run_dir, after=killed)
    assert resumed.code == 0, resumed.output
    assert f"--resume {whole.run_dir} is ignored" in resumed.output
    assert f"resuming from step 2, from {resumed.run_dir}" in resumed.output
    assert resumed.bits == whole.bits
    # Another run can be resumed too, and trained further; its events are not copied.
    branch = run_here("fed_avg", *FLAGS[:2], "--rounds", 6, "--resume", whole.run_dir,
                            name="new")
    assert branch.code == 0, branch.output
    assert f"resuming from step 4, from {whole.run_dir}" in branch.output
    assert "events of 4 of the first 4 rounds are missing from" in branch.output
    assert branch.bits == run_here("fed_avg", *FLAGS[:2], "--rounds", 6, name="six").bits
    assert numbers(branch) == [5, 6]


# ---- damaged and forged files --------------------------------------------------------------------

def write(content: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "null": write(b"null"), "list": write(b"[1]"), "number": write(b"1e999"),
    "huge": write(b'{"step": ' + b"9" * 5000 + b"}"), "empty": write(b""),
    "strange": write(b'{"step": "x", "outcome": 7, "dtype": [], "made_with": 3, "round": {}}\n7\n'),
    "nested": write(b"[" * 10**5), "bit": lambda path: path.write_bytes(
        bytes([path.read_bytes()[0] | 128]) + path.read_bytes()[1:]),
    "pipe": lambda path: hostile.put(path, "pipe"),
    "folder": lambda path: hostile.put(path, "folder"), "gone": Path.unlink}


@pytest.mark.parametrize("damage", [
    pytest.param(name, marks=[pytest.mark.soak] * (name not in ("null", "bit", "pipe", "folder")))
    for name in DAMAGES])
@pytest.mark.timeout(60)
def test_damaged_files_are_written_again_from_the_checkpoint(
        run_here: Run, whole: Outcome, killed: Outcome, damage: str) -> None:
    for name in ("config.json", "outcome.json", "events.jsonl", "training_history.json",
                 "environment.json", "model.safetensors"):
        DAMAGES[damage](killed.run_dir / name)
    if damage == "strange":  # settings of another run
        shutil.copy(whole.run_dir / "config.json", killed.run_dir)
    # Pipes cannot be copied: they are made in the copy that the run is resumed in.
    pipes = [p for p in killed.run_dir.iterdir() if p.is_fifo()]
    for pipe in pipes:
        pipe.unlink()
    shutil.copytree(killed.run_dir, killed.run_dir.with_name("copy"))
    for pipe in pipes:
        os.mkfifo(killed.run_dir.with_name("copy") / pipe.name)
    resumed = run_here("fed_avg", *FLAGS, name="copy")
    assert resumed.code == 0, resumed.output
    assert "resuming from step 2" in resumed.output
    assert "Traceback" not in resumed.output
    assert resumed.bits == whole.bits
    assert [r["server_val_loss"] for r in resumed.history] == [
        r["server_val_loss"] for r in whole.history]
    assert outcome_of(resumed) == "finished"
    held = resumed.config
    assert held["rounds"] == 4
    lost = 1 if damage == "bit" else 2
    assert f"events of {lost} of the first 2 rounds are missing from" in resumed.output or (
        lost == 1 and numbers(resumed) == [1, 2, 3, 4])
    assert numbers(resumed) == ([3, 4] if lost == 2 else [1, 2, 3, 4])
    if damage == "folder":
        assert "is not a file; renamed to events.jsonl.damaged-" in resumed.output


def test_missing_parameters_are_a_warning(run_here: Run, killed: Outcome) -> None:
    shutil.rmtree(killed.run_dir / "server" / "deltas")
    resumed = run_here("fed_avg", *FLAGS, after=killed)
    assert "saved parameters of 1 of the first 2 rounds are missing from" in resumed.output


def test_other_settings_than_those_of_a_checkpoint_are_refused(run_here: Run, killed: Outcome
                                                               ) -> None:
    (killed.run_dir / "config.json").write_text("null")
    refused = run_here("fed_avg", *FLAGS, "--lr", "1e-3", after=killed)
    assert refused.code == 2
    assert "lr 0.002 there, 0.001 here" in refused.output
    assert (refused.run_dir / "checkpoints" / "step_000002" / "manifest.json").exists()


def crafted(folder: Path, **changes: Any) -> None:
    """Change a manifest and make its own checksum right again."""
    body = json.loads((folder / "manifest.json").read_text()) | changes
    (folder / "manifest.json").write_text(
        json.dumps(body | {"sha256": run_files.manifest_checksum(body)}))


def in_manifest(spoil: Callable[[Path], object]) -> Callable[[Path], object]:
    return lambda folder: spoil(folder / "manifest.json")


HOSTILE: dict[str, Callable[[Path], object]] = {
    **{name: in_manifest(spoil) for name, spoil in DAMAGES.items()},
    "files are a list": lambda folder: crafted(folder, files=[1]),
    "checksums are numbers": lambda folder: crafted(folder, files={"client_0.safetensors": 3}),
    "no settings": lambda folder: crafted(folder, config=None),
    "a step of its own": lambda folder: crafted(folder, step="4"),
    "a file elsewhere": lambda folder: crafted(
        folder, files={"../step_000002/server.json": {"bytes": 0, "sha256": ""}}),
    "a device": lambda folder: crafted(folder, files={"/dev/zero": {"bytes": 0, "sha256": ""}}),
    "a pipe for a file": lambda folder: DAMAGES["pipe"](folder / "client_0.safetensors"),
    "a pipe for a folder": lambda folder: hostile.put(folder, "pipe"),
    "a file for a folder": lambda folder: hostile.put(folder, b"")}


@pytest.mark.timeout(60)
def test_a_hostile_checkpoint_is_skipped(whole: Outcome, tmp_path: Path,
                                         caplog: pytest.LogCaptureFixture) -> None:
    for number, (name, spoil) in enumerate(HOSTILE.items()):
        run_dir = tmp_path / f"hostile{number}"
        shutil.copytree(whole.run_dir / "checkpoints", run_dir / "checkpoints")
        spoil(run_dir / "checkpoints" / "step_000004")
        (run_dir / "checkpoints" / ("step_" + "9" * 200)).mkdir()
        caplog.clear()
        found = checkpoint.latest_valid(run_dir)
        assert found is not None, name
        assert found.step == 2, name
        warning, = caplog.messages
        assert "step_000004 is invalid" in warning, name
        assert len(warning) < 500, name
        config = run_files.recorded_settings(run_dir)
        assert config is not None, name
        assert config["num_clients"] == 2, name
        checkpoint.delete_after(run_dir, 2)
        left = sorted(p.name for p in (run_dir / "checkpoints").iterdir())
        assert left[0] == "step_000002", name
        assert "step_000004" not in left, name
