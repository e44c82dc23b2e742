"""What a site no longer has, or another has written, is not taken up; nobody writes into the states
of another start, and of what a site has only tags leave it."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path

import pytest

from fedrun.common.errors import FolderLost, InputError
from fedrun.common.files import read_json, write_atomic
from fedrun.records import checkpoint, run_lock
from fedrun.records.checkpoint import GLOBAL
from fedrun.records.provenance import Length
from fedrun.records.run_lock import RunDirLocked, release_run_dir
from fedrun.records.site_states import TextChanged
from fedrun.start import RunRefused, decide_start, prepare_run_dir, run_id
from tests.support import disk
from tests.support.site_starts import (
    CLIENTS,
    PROVENANCE,
    Start,
    config_of,
    flip,
    folder_at,
    forge,
    global_state,
    manifests,
    saved,
    steps_at,
)

SITES = tuple(CLIENTS)


# ---- damage --------------------------------------------------------------------------------------

def damage(kind: str, folder: Path, root: Path) -> None:
    """Spoil a step at a site."""
    client, record = folder / "client_1.safetensors", folder / "site_1.json"
    if kind == "a flipped bit":
        flip(client)
    elif kind == "a file is gone":
        client.unlink()
    elif kind == "a record is gone":
        record.unlink()
    elif kind == "the step is gone":
        shutil.rmtree(folder)
    elif kind == "a folder in place of a file":
        client.unlink()
        client.mkdir()
    elif kind == "a record that is no JSON":
        record.write_text("{")
    elif kind == "a flipped bit in a record":
        record.write_text(record.read_text().replace('"step"', '"stop"'))
    elif kind == "another state, with a record made to fit":
        other = (folder.with_name("step_000004") / client.name).read_bytes()
        entry = checkpoint._checksum(other)
        client.write_bytes(other)
        forge(record, lambda body: body["files"].update({client.name: entry}))
    elif kind == "a record that names a file elsewhere":
        forge(record, lambda body: body["files"].update({"../site_0.json": {}}))
    else:
        assert kind == "the step of another run"
        saved(root / "other", 6)
        shutil.rmtree(folder)
        shutil.copytree(folder_at(root / "other", "north", 6), folder)


KINDS = ("a flipped bit", "a file is gone", "a record is gone", "the step is gone",
         "a folder in place of a file", "a record that is no JSON", "a flipped bit in a record",
         "another state, with a record made to fit", "a record that names a file elsewhere",
         "the step of another run")


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_that_is_damaged_at_a_site_is_not_taken_up(
        kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    saved(tmp_path, 4, 6)
    damage(kind, folder_at(tmp_path, "north", 6), tmp_path)
    start = Start(tmp_path)
    assert start.begin() == 4
    assert "step_000006 is skipped: north no longer holds it" in caplog.text
    assert steps_at(tmp_path, "north") == [4]
    for _ in start.save(6):
        pass
    start.kill()
    again = Start(tmp_path)
    assert again.begin() == 6
    again.kill()


def test_sites_without_a_step_in_common_are_named(tmp_path: Path) -> None:
    saved(tmp_path, 4, 6)
    shutil.rmtree(folder_at(tmp_path, "south", 6))
    flip(folder_at(tmp_path, "north", 4) / "client_2.safetensors")
    flip(folder_at(tmp_path, "north", 6) / "client_2.safetensors")
    start = Start(tmp_path)
    with pytest.raises(RunRefused, match=r"^--resume: north does not hold step 6 or 4; south does "
                       r"not hold step 6, and no other checkpoint is in .*/run; restore the "
                       r"folders of these sites, or start over with --overwrite$"):
        start.decide()
    start.kill()
    over = Start(tmp_path, flags={"overwrite": "true"})
    assert over.begin() == 0
    assert manifests(tmp_path) == []
    over.kill()


def test_a_step_that_is_damaged_at_the_server_is_not_taken_up(tmp_path: Path) -> None:
    saved(tmp_path, 4, 6)
    flip(config_of(tmp_path).run_dir / "checkpoints" / "step_000006" / GLOBAL)
    start = Start(tmp_path)
    assert start.begin() == 4
    assert steps_at(tmp_path, "east") == [4]
    start.kill()


def test_an_exchanged_global_model_is_refused_by_the_sites(tmp_path: Path) -> None:
    saved(tmp_path, 4, 6)
    folder = config_of(tmp_path).run_dir / "checkpoints" / "step_000006"
    other = global_state(6)
    other["model"][2] += 1e-6
    entry = checkpoint.write_tensors(folder, {GLOBAL: other})
    forge(folder / "manifest.json", lambda body: body["files"].update(entry))
    start = Start(tmp_path)
    found = start.decide()
    assert found.step == 6
    for rank in start.states:
        with pytest.raises(InputError, match="the global model that the server hands out for step 6"
                           " is not the one that this site has trained with"):
            start.states[rank].open(6, other)
        start.states[rank].open(6, global_state(6))
    start.kill()


def test_a_site_refuses_its_own_text_if_that_has_changed(tmp_path: Path) -> None:
    saved(tmp_path, 4, 6)
    start = Start(tmp_path, texts={"south": "another"})
    with pytest.raises(TextChanged, match=r"^--site_data: the text of this site has changed since "
                                          "step 4; with the text as it was") as refused:
        start.holdings()
    assert refused.value.code == "text"
    assert start.states[1].held().keys() == {"4", "6"}  # the others do not mind
    start.kill()
    # A new run takes it as it is.
    over = Start(tmp_path, texts={"south": "another"}, flags={"overwrite": "true"})
    assert over.begin() == 0
    over.kill()


# ---- what leaves, and what does not --------------------------------------------------------------

def test_only_tags_leave_a_site(tmp_path: Path) -> None:
    saved(tmp_path, 2)
    start = Start(tmp_path)
    start.begin()
    reports = [report for part in start.write(4) for report in part]
    assert [sorted(report) for report in reports] == [["step", "tag"]] * 4
    held = start.holdings().tags
    tags = [*(report["tag"] for report in reports),
            *(tag for steps in held.values() for some in steps.values() for tag in some)]
    assert len(set(tags)) == 8
    assert all(len(bytes.fromhex(tag)) == 32 for tag in tags)
    start.kill()
    # The same files under another key have other tags; no checksum of them is at the server.
    (tmp_path / "north" / "identity").unlink()
    other = Start(tmp_path)
    assert not set(other.states[1].held()["4"]) & set(tags)
    other.kill()
    theirs = [entry["sha256"] for path in tmp_path.glob("*/states/*/*/site_*.json")
              for entry in json.loads(path.read_text())["files"].values()]
    for path in (tmp_path / "server").rglob("*"):
        assert not path.is_file() or not any(
            word.encode() in path.read_bytes() for word in [*theirs, "text of", "client_1.safe"])


def test_a_disk_that_is_full_at_one_site_costs_the_checkpoint(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    start = Start(tmp_path)
    start.begin()
    for _ in start.save(2):
        pass
    real = os.replace

    def replace(source: str, target: Path) -> None:
        if "south" in str(target):
            raise disk.no_space(target)
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    reports = list(start.write(4))
    assert [report for part in reports for report in part if "tag" not in report] == [
        {"step": 4, "error": "disk"}]
    assert list(start.coordinator.collect([[], *reports])) == []
    assert ("step_000004 could not be written (south: a file or folder there cannot be read or "
            "written); training continues") in caplog.text
    start.keep()
    assert [steps_at(tmp_path, site) for site in SITES] == [[2]] * 3
    monkeypatch.undo()
    for _ in start.save(6):
        pass
    assert [steps_at(tmp_path, site) for site in SITES] == [[2, 6]] * 3
    start.kill()


def test_a_disk_that_is_full_at_the_server_costs_the_checkpoint(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path, 2)
    start = Start(tmp_path)
    start.begin()
    with monkeypatch.context() as full:
        full.setattr(start.coordinator, "before_commit", disk.full)
        for _ in start.save(4):
            pass
    assert start.coordinator.kept == [2] == steps_at(tmp_path, "north")
    start.kill()


def test_two_starts_do_not_write_into_the_same_states(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "SECONDS_TO_DIE", 0.1)
    first = Start(tmp_path)
    first.begin()
    for _ in first.save(2):
        pass
    states = first.states[1].folders.states
    for folder in (states, first.states[1].folders.clients):
        assert folder.stat().st_mode & 0o077 == 0
    with pytest.raises(RunDirLocked, match="is in use by process"):
        first.states[1].hold("another")
    # Where there are no locks, a process of an earlier start may live on.
    (states / "lock").write_text("process 7 on another machine\nanother token\n")
    for rank in (1, 2):
        with pytest.raises(FolderLost, match="taken by process 7 on another machine"):
            first.states[rank].seal(states / "step_000004", 4, {}, {})
        with pytest.raises(FolderLost):
            write_atomic(first.states[rank].folders.clients / "client_0.safetensors", b"")
    with pytest.raises(FolderLost):
        first.states[1].keep([])
    first.kill()


# ---- whose run it is -----------------------------------------------------------------------------

def test_a_run_has_one_id_until_it_is_replaced(tmp_path: Path) -> None:
    saved(tmp_path, 2)
    config = config_of(tmp_path)
    (folder,) = (tmp_path / "north" / "states").iterdir()
    assert read_json(config.run_dir / "config.json", dict)["run_id"] == folder.name
    assert read_json(config.run_dir / "checkpoints" / "step_000002" / "manifest.json", dict)[
        "run_id"] == folder.name
    for _ in range(2):
        assert run_id(config) == folder.name
        (config.run_dir / "config.json").unlink(missing_ok=True)  # the manifest knows it too
    for flags in ({"overwrite": "true"}, {"resume": "never"}, {"run_name": "other"}):
        assert run_id(config_of(tmp_path, **flags)) != folder.name


def test_sites_are_not_left_out_or_added_when_a_run_resumes(tmp_path: Path) -> None:
    saved(tmp_path, 2)
    start = Start(tmp_path)
    with pytest.raises(RunRefused, match=r"^--site_dir: the run in .*/run was started with it"):
        decide_start(start.config, Length(start.config, 100), lambda _: "fp32", PROVENANCE)
    release_run_dir(start.config.run_dir)
    other = dataclasses.replace(start.holdings(), run="0" * 32)
    with pytest.raises(RunRefused, match="was changed by another start meanwhile"):
        decide_start(start.config, Length(start.config, 100), lambda _: "fp32", PROVENANCE, other)
    start.kill()
    plain = config_of(tmp_path, run_name="plain")
    prepare_run_dir(plain, None)
    with pytest.raises(RunRefused, match=r"^--site_dir: the run in .*/plain was started without"):
        decide_start(plain, Length(plain, 100), lambda _: "fp32", PROVENANCE, start.holdings())
    release_run_dir(plain.run_dir)


def test_a_checkpoint_of_this_run_may_be_named_and_no_other(tmp_path: Path) -> None:
    saved(tmp_path, 2, 4)
    saved(tmp_path / "other", 2)
    folder = config_of(tmp_path).run_dir / "checkpoints" / "step_000002"
    assert Start(tmp_path, flags={"resume": str(folder)}).decide().step == 2
    shutil.rmtree(folder_at(tmp_path, "south", 2))
    refused = {str(folder): "south no longer holds step 2",
               str(config_of(tmp_path / "other").run_dir): "must be auto, never or a checkpoint of"}
    for path, why in refused.items():
        start = Start(tmp_path, flags={"resume": path})
        with pytest.raises(RunRefused, match=f"^--resume {path}.*{why}"):
            start.decide()
        start.kill()
