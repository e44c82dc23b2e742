"""Where the processes of a run keep what outlives them."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedrun.data.sites import Site
from fedrun.flags import resolve
from fedrun.records.checkpoint import folder_of
from fedrun.records.folders import Folders

RUN = "0123456789abcdef" * 2


def test_without_sites_all_lies_in_the_runs_folder(tmp_path: Path) -> None:
    config = resolve("fed_avg", {"data_dir": str(tmp_path), "run_name": "run"})
    folders = Folders.of(config)
    assert folders.run == tmp_path / "run"
    assert folders.clients == tmp_path / "run" / "clients"
    assert folders.step(30) == tmp_path / "run" / "checkpoints" / "step_000030" == folder_of(
        tmp_path / "run", 30)
    # What is private of a server, or of a simulation, names no site.
    assert Folders.of(config, Site("", "", tmp_path / "private"), RUN) == folders


def test_a_site_keeps_everything_in_its_own_folder(tmp_path: Path) -> None:
    config = resolve("fed_avg", {"data_dir": str(tmp_path / "results")})
    folders = Folders.of(config, Site("north", "*.txt", tmp_path), RUN)
    assert folders.run is None
    assert folders.clients == tmp_path / "clients" / RUN
    assert folders.step(30) == tmp_path / "states" / RUN / "step_000030"


@pytest.mark.parametrize("run", ["", "..", f"../{RUN}", RUN.upper(), f"{RUN}\n", f"{RUN}0"])
def test_the_servers_word_names_no_other_folder(run: str, tmp_path: Path) -> None:
    config = resolve("fed_avg", {})
    with pytest.raises(ValueError, match="is not the id of a run"):
        Folders.of(config, Site("north", "*.txt", tmp_path), run)
