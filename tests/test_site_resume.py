"""Runs between sites of their own are killed, at a site or at the server, and taken up again by the
same command: they end in the bits of the undisturbed run."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.real_sites import NAMES, Institutions, Ranks
from tests.support.runs import FAULTY, assert_equal, error_lines

pytestmark = pytest.mark.slow

FLAGS = ("--checkpoint_freq", 2, "--rounds", 7)


@pytest.fixture(scope="module")
def institutions() -> Iterator[Institutions]:
    """In a folder that other users can reach, which those of pytest are not."""
    with tempfile.TemporaryDirectory(prefix="fedrun-sites-") as folder:
        yield Institutions(Path(folder))


@pytest.fixture(scope="module")
def undisturbed(institutions: Institutions) -> Ranks:
    run = institutions.train(*FLAGS, name="undisturbed")
    assert run.server.code == 0, "\n".join(run.printed)
    return run


def steps_at(institutions: Institutions, site: str, run: Ranks) -> list[str]:
    run_id = json.loads((run.server.run_dir / "config.json").read_text())["run_id"]
    folder = institutions.root / site / "site" / "states" / run_id
    return sorted(path.name for path in folder.iterdir() if path.name != "lock")


def test_states_stay_at_their_sites(institutions: Institutions, undisturbed: Ranks) -> None:
    simulated = institutions.simulate(*FLAGS)
    assert simulated.code == 0, simulated.output
    assert_equal(undisturbed.server, simulated)
    # A checkpoint that is due while one is being written is made after it: 6, or later.
    before, last = steps_at(institutions, NAMES[0], undisturbed)
    assert last == "step_000007"
    for site in NAMES:
        assert steps_at(institutions, site, undisturbed) == [before, last]
    folder = undisturbed.server.run_dir / "checkpoints"
    assert sorted(str(path.relative_to(folder)) for path in folder.rglob("*.*")) == sorted(
        f"{step}/{name}" for step in (before, last)
        for name in ("global.safetensors", "manifest.json", "server.json"))
    manifest = json.loads((folder / "step_000007" / "manifest.json").read_text())
    assert list(manifest["sites"]) == list(NAMES)


KILLS = [("reduced:4", 1), ("half-written:4", 2), ("before-manifest:4", 0),
         *(pytest.param(*kill, marks=pytest.mark.soak) for kill in (
             ("train:3", 2), ("after-manifest:6", 0), ("finish:7", 0), ("train:5", 3),
             ("half-written:6", 1), ("before-manifest:2", 0), ("after-manifest:4", 0),
             ("record:6", 0)))]


@pytest.mark.parametrize(("at", "rank"), KILLS)
def test_a_kill_costs_no_bit(at: str, rank: int, institutions: Institutions, undisturbed: Ranks
                             ) -> None:
    name = f"{at.replace(':', '_')}_{rank}"
    struck = institutions.root / name
    struck.mkdir()
    struck.chmod(0o777)
    store = ("--client_store", "disk") if rank == 1 else ()
    fault = {"FAULT": "kill", "FAULT_AT": at, "FAULT_RANK": str(rank),
             "FAULT_ONCE": str(struck / "once")}
    env = dict.fromkeys(("server", *NAMES), fault)
    killed = institutions.train(*FLAGS, *store, name=name, module=FAULTY, env=env)
    assert killed.server.code != 0
    assert (struck / "once").exists(), "\n".join(killed.printed)
    again = institutions.train(*FLAGS, *store, name=name, module=FAULTY, env=env)
    assert again.server.code == 0, "\n".join([*killed.printed, *again.printed])
    assert_equal(again.server, undisturbed.server)
    # Where a manifest was on the disk for certain, however slow that is.
    if at in ("before-manifest:4", "after-manifest:4", "after-manifest:6", "finish:7"):
        assert "resuming from step" in again.printed[0]
    for site in NAMES:
        assert len(steps_at(institutions, site, again)) == 2


def test_a_longer_run_goes_on_from_a_finished_one(institutions: Institutions, undisturbed: Ranks
                                                  ) -> None:
    short = institutions.train(*FLAGS[:2], "--rounds", 3, name="longer")
    assert short.server.code == 0, "\n".join(short.printed)
    longer = institutions.train(*FLAGS, name="longer")
    assert "resuming from step 3" in longer.printed[0]
    assert longer.server.bits == undisturbed.server.bits
    again = institutions.train(*FLAGS, name="longer")
    assert again.server.code == 0
    assert "finished already" in again.printed[0]


def test_what_a_site_has_lost_or_changed_is_named_on_all_ranks(institutions: Institutions) -> None:
    run = institutions.train(*FLAGS[:2], "--rounds", 4, name="lost")
    assert run.server.code == 0, "\n".join(run.printed)
    run_id = json.loads((run.server.run_dir / "config.json").read_text())["run_id"]
    south = institutions.root / "south" / "site" / "states" / run_id
    file = next((south / "step_000004").glob("client_*"))
    file.write_bytes(file.read_bytes()[:-1] + b"~")
    resumed = institutions.train(*FLAGS[:2], "--rounds", 5, name="lost")
    assert "resuming from step 2" in resumed.printed[0], resumed.printed[0]
    assert "is damaged" in resumed.printed[2]
    # Another text, and then the folder of another site.
    text = institutions.root / "south" / "text" / "south00.txt"
    before = text.read_text()
    text.write_text(before + before)
    changed = institutions.train(*FLAGS[:2], "--rounds", 6, name="lost")
    assert changed.server.code != 0
    text.write_text(before)
    for rank, printed in enumerate(changed.printed):
        lines = error_lines(printed)
        assert "site south cannot go on" in lines[-1], printed
        assert any("the text of this site has changed since step" in line for line in lines) == (
            rank == 2), printed
    shutil.rmtree(south)
    lost = institutions.train(*FLAGS[:2], "--rounds", 6, name="lost")
    assert lost.server.code != 0
    for printed in lost.printed:
        assert "south does not hold step 5 or 4" in error_lines(printed)[-1], printed
