"""What a study reads from the folders of its runs."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest

from fedrun.common.errors import InputError
from fedrun.flags import resolve
from fedrun.records.outcome import write_outcome
from fedrun.run import run
from fedrun.tools import study_runs
from tests.support.runs import SMALL
from tests.support.site_files import THREE, sites_file, sites_of


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


def test_a_file_of_sites_that_has_changed_makes_another_run(tmp_path: Path) -> None:
    """As it does for a run that is resumed; a comment changes nothing."""
    flags: dict[str, Any] = {"data_dir": tmp_path, "run_name": "run", "rounds": 2,
                             "sites": sites_file(tmp_path, THREE)}
    config = resolve("fed_avg", flags)
    config.run_dir.mkdir()
    for name, content in (("config.json", config.to_dict()),
                          ("training_history.json", [{"val_loss_halves": [1.5, 2.5]}]),
                          ("environment.json", {"made_with": {
                              "sites": sites_of(THREE).digest()[:16]}})):
        (config.run_dir / name).write_text(json.dumps(content))
    assert study_runs.loss_halves(config) is None
    write_outcome(config.run_dir, "finished", 2)
    assert study_runs.loss_halves(config) == [1.5, 2.5]
    flags["sites"].write_text("# the same\n" + flags["sites"].read_text())
    assert study_runs.loss_halves(config) == [1.5, 2.5]
    changed = {**THREE, "east": {**THREE["east"], "size_skew": 0.4}}
    sites_file(tmp_path, changed)
    with pytest.raises(InputError, match=r"holds a run with other sites than --sites \S+ has now"):
        study_runs.loss_halves(resolve("fed_avg", flags))
    (config.run_dir / "failed.txt").write_text("diverged")
    with pytest.raises(InputError, match="holds a run with other sites"):
        study_runs.loss_halves(resolve("fed_avg", flags))
