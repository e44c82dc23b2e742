"""Runs between sites of their own: three users with folders that nobody else reads."""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.real_sites import NAMES, Institutions, Ranks
from tests.support.runs import error_lines, read_json, without_clocks
from tests.support.windows import Pieces


@pytest.fixture(scope="module")
def institutions() -> Iterator[Institutions]:
    """In a folder that other users can reach, which those of pytest are not."""
    with tempfile.TemporaryDirectory(prefix="fedrun-sites-") as folder:
        yield Institutions(Path(folder))


@pytest.fixture(scope="module")
def messages(institutions: Institutions) -> Path:
    """The folder in which each rank of `run` records what it sends."""
    folder = institutions.root / "messages"
    folder.mkdir()
    folder.chmod(0o777)
    return folder


@pytest.fixture(scope="module")
def run(institutions: Institutions, messages: Path) -> Ranks:
    """A run of all, which has finished."""
    finished = institutions.train(module="tests.support.recorded_fedrun", env={
        name: {"RECORD": str(messages)} for name in ("server", *NAMES)})
    assert finished.server.code == 0, "\n".join(finished.printed)
    return finished


def test_sites_and_a_simulation_end_in_the_same_bits(institutions: Institutions, run: Ranks
                                                     ) -> None:
    simulated = institutions.simulate()
    assert simulated.code == 0, simulated.output
    assert run.server.bits == simulated.bits
    assert without_clocks(run.server) == without_clocks(simulated)


@pytest.mark.parametrize("site", [
    name if name == NAMES[0] else pytest.param(name, marks=pytest.mark.soak) for name in NAMES])
def test_nothing_of_a_sites_text_is_sent_or_reaches_the_server(
        institutions: Institutions, messages: Path, run: Ranks, site: str) -> None:
    text, tokens = institutions.private_pieces(site)
    assert len(text) > 1000
    assert len(tokens) > 1000
    folder = institutions.root / site
    searched = [Pieces(text), Pieces(tokens)]
    paths = [str(folder).encode(), f"{site}00.txt".encode(), b"identity.pem"]
    looked_at = [*messages.iterdir(), *(path for path in (institutions.root / "server").rglob("*")
                                        if path.is_file() and path.name != "identity.pem")]
    assert {f"rank{rank}" for rank in range(4)} <= {path.name for path in looked_at}
    for path in looked_at:
        content = path.read_bytes()
        for wanted in searched:
            assert not wanted.found(content), path
        assert not [one for one in paths if one in content], path
    # The same search finds what is there.
    assert searched[0].found(b"..." + (folder / "text" / f"{site}00.txt").read_bytes())
    assert searched[1].found(b"." + next(folder.glob("site/tokens/*/train.bin")).read_bytes())


def test_a_site_writes_for_nobody_else_and_into_its_own_folder_alone(
        institutions: Institutions, run: Ranks) -> None:
    assert run.server.run_dir.is_dir()
    for number, site in enumerate(NAMES):
        folder = institutions.root / site / "site"
        names = {path.name.partition("-")[0] for path in folder.iterdir()}
        assert names == {"identity.pem", "log", "tokens", "tokenizer", "tokenizer.lock",
                         "clients", "states"}
        for path in folder.rglob("*"):
            assert not stat.S_IMODE(path.lstat().st_mode) & 0o077, path
            assert path.lstat().st_uid == institutions.uid(site) or not institutions.uid(site)
        assert "sequences of 32 tokens" in run.printed[1 + number]
        assert f"site {site}" not in run.printed[0]
        assert "round 1 is done" in run.printed[1 + number]


def test_the_servers_records_name_sites_and_no_machines(institutions: Institutions, run: Ranks
                                                        ) -> None:
    environment = read_json(run.server.run_dir / "environment.json")
    assert [worker["host"] for worker in environment["workers"]] == [*NAMES]
    config = read_json(run.server.run_dir / "config.json")
    assert not {"site", "site_data", "site_dir"} & set(config)
    assert config["sites"] == str(institutions.file)


def test_a_start_finds_its_tokens_again(institutions: Institutions, run: Ranks) -> None:
    tokens = {path: path.stat() for site in NAMES
              for path in (institutions.root / site / "site").rglob("*.bin")}
    again = institutions.train(name="again")
    assert again.server.code == 0, "\n".join(again.printed)
    assert again.server.bits == run.server.bits
    assert {path: path.stat() for site in NAMES
            for path in (institutions.root / site / "site").rglob("*.bin")} == tokens


# ---- a site that cannot take part ----------------------------------------------------------------

REFUSED = ("site south: its text cannot be read, or is too little for its clients (its own log "
           "says more)")


def assert_told_at_the_site_alone(run: Ranks, institutions: Institutions, line: str, detail: str
                                  ) -> None:
    """All ranks print one line; what it is about, south alone does, and its log has it too."""
    for rank, printed in enumerate(run.printed):
        lines = error_lines(printed)
        assert lines[-1].endswith(line), printed
        assert len(lines) == 1 + (rank == 2), printed
        assert (detail in printed) == (rank == 2), printed
    assert detail in (institutions.root / "south" / "site" / "log").read_text()


def test_a_site_without_text_ends_the_run_with_one_line_everywhere(institutions: Institutions
                                                                   ) -> None:
    nothing = f"{institutions.root}/south/text/nothing*.txt"
    refused = institutions.train(name="nothing", env={"south": {"FEDRUN_SITE_DATA": nothing}})
    assert refused.server.code == 2
    assert not (refused.server.run_dir / "events.jsonl").exists()
    assert_told_at_the_site_alone(refused, institutions, REFUSED, "must be an existing file")


@pytest.mark.slow
@pytest.mark.parametrize(("content", "mode", "detail"), [
    (b"A patient.", 0o600, "--sequence_length 32"), (b"A patient." * 1000, 0o000, "Permission"),
    pytest.param(b"", 0o600, "no text", marks=pytest.mark.soak),
    pytest.param(b"\xfa\xfb" * 100, 0o600, "--site_data", marks=pytest.mark.soak)])
def test_text_that_cannot_be_used_is_told_at_the_site_alone(
        institutions: Institutions, content: bytes, mode: int, detail: str) -> None:
    folder = institutions.root / "south" / "wrong"
    folder.mkdir(exist_ok=True)
    file = folder / "ward.txt"
    file.unlink(missing_ok=True)
    file.write_bytes(content)
    institutions.own("south")
    file.chmod(mode)
    refused = institutions.train(name="wrong", env={"south": {"FEDRUN_SITE_DATA": str(file)}})
    assert_told_at_the_site_alone(refused, institutions, REFUSED, detail)
    assert "ward" not in "".join(refused.printed[:2] + refused.printed[3:])


@pytest.mark.slow
def test_an_error_in_training_stays_at_the_site(institutions: Institutions) -> None:
    failed = institutions.train(name="failed", module="tests.support.faulty_fedrun", env={
        name: {"FAULT": "raise" if name == "south" else "none", "FAULT_CLIENT": "2",
               "FAULT_STEP": "1", "FAULT_RANK": "9"} for name in ("server", *NAMES)})
    assert failed.server.code == 1
    line = "rank 2 failed: site south: an unexpected error (its own log says more); all ranks end"
    assert any(line in each for each in error_lines(failed.printed[0])), failed.printed[0]
    assert line in str(failed.server.outcome["reason"])
    assert "Traceback" in failed.printed[2]
    assert "Traceback" in (institutions.root / "south" / "site" / "log").read_text()
    assert "Traceback" not in failed.printed[0] + failed.printed[1] + failed.printed[3]


def test_the_ranks_are_of_several_users(institutions: Institutions) -> None:
    """Where only one can start processes, the tests above say less."""
    assert len({os.getuid(), *map(institutions.uid, ("server", *NAMES))}) == (
        5 if os.getuid() == 0 else 2)
