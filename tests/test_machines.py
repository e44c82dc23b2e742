"""Users as they are: without a home or without rights, and with a umask of their own."""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fedrun import cli
from fedrun.common import locks
from fedrun.common.files import copy_files
from fedrun.data import tokens
from fedrun.plots.runs import find_runs
from tests.support import folders
from tests.support.runs import Run, error_lines


@pytest.mark.parametrize("command", [
    ("fed_avg", "--dataset", "pydocs"), ("partition", "--dataset", "pydocs"),
    ("fed_avg", "--data_dir", "~/results"), ("fed_avg", "--dataset", "~/text")])
def test_a_user_without_a_home(command: tuple[str, ...], monkeypatch: pytest.MonkeyPatch,
                               capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    assert cli.main(command) in (1, 2)
    (line,) = error_lines(capsys.readouterr().err)
    assert "this user has no home directory" in line
    assert "--cache_dir" in line


@contextmanager
def another_user(*private: Path) -> Iterator[None]:
    """Run the block as a user who cannot read these paths; root gives up its rights."""
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in private}
    for path in private:
        path.chmod(0)
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)
        for path, mode in modes.items():
            path.chmod(mode)


@pytest.fixture
def shared() -> Iterator[Path]:
    """A folder that every user can write to."""
    with tempfile.TemporaryDirectory(prefix="fedrun-tests-") as name:
        Path(name).chmod(0o777)
        yield Path(name)


def test_a_run_of_another_user_does_not_keep_others_from_being_found(shared: Path) -> None:
    mine = folders.ours(shared, seed=0)
    theirs = folders.ours(shared, seed=1, name="theirs")
    with another_user(theirs):
        found = find_runs(shared)
    assert [run.path for run in found.runs] == [mine]
    (name, why), = found.passed_over
    assert name == "theirs"
    assert "Permission denied" in why


def test_locks_of_another_user(shared: Path) -> None:
    (shared / "read").touch()
    (shared / "unreadable").touch()
    (shared / "read").chmod(0o444)
    with another_user(shared / "unreadable"):
        held = locks.acquire(shared / "read", 0.0)
        with pytest.raises(PermissionError):
            held.write("a run's folder has to be written")
        with pytest.raises(locks.Busy):
            locks.acquire(shared / "read", 0.0)
        held.release()
        with pytest.raises(PermissionError, match="unreadable"):
            locks.acquire(shared / "unreadable", 0.0)
    shared.chmod(0o755)
    if os.geteuid() == 0:  # otherwise we own the folder and could write anyway
        with another_user(), pytest.raises(PermissionError, match="new"):
            locks.acquire(shared / "new", 0.0)


def test_a_read_only_cache_is_used(shared: Path, tmp_path: Path) -> None:
    text = shared / "tale.txt"
    text.write_text("A ship sailed over the sea to find a new land. " * 200 + "\n\n" + "End. " * 99)
    cache = shared / "cache"
    whole = tokens.prepare(str(text), "bpe:300", 8, cache).train
    for path in (cache, *cache.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    try:
        with another_user():
            data = tokens.prepare(str(text), "bpe:300", 8, cache)
            assert (data.train == whole).all()
            if os.geteuid() == 65534:
                with pytest.raises(ValueError, match=rf"^--cache_dir {cache}: .*Permission denied"):
                    tokens.prepare(str(text), "bpe:301", 8, cache)
    finally:
        for path in (cache, *cache.rglob("*")):
            if path.is_dir():
                path.chmod(0o755)


@pytest.mark.parametrize("umask", [0o002, pytest.param(0o077, marks=pytest.mark.slow)])
def test_files_follow_the_umask(umask: int, run_here: Run, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        done = run_here("fed_avg", "--num_clients", 2, "--rounds", 2, "--checkpoint_freq", 1,
                        "--client_store", "disk", "--save_client_deltas",
                        "--cache_dir", tmp_path / "cache")
        assert done.code == 0, done.output
        assert cli.main(["export", str(done.run_dir), str(tmp_path / "out")]) == 0
    finally:
        os.umask(before)
    made = [p for name in ("run", "cache", "out") for p in (tmp_path / name).rglob("*")]
    assert len(made) > 30
    assert {oct(stat.S_IMODE(p.stat().st_mode)) for p in made if p.is_file()} == {
        oct(0o666 & ~umask)}
    assert {oct(stat.S_IMODE(p.stat().st_mode)) for p in made if p.is_dir()} == {
        oct(0o777 & ~umask)}


def test_a_read_only_cache_leaves_a_run_that_can_be_started_again(tmp_path: Path) -> None:
    (tmp_path / "cache" / "deep").mkdir(parents=True)
    for name in ("tokenizer.json", "deep/more.json"):
        (tmp_path / "cache" / name).write_text(name)
        (tmp_path / "cache" / name).chmod(0o444)
    (tmp_path / "cache" / "deep").chmod(0o555)
    for _ in range(2):
        copy_files(tmp_path / "cache", tmp_path / "run")
    assert (tmp_path / "run" / "deep" / "more.json").read_text() == "deep/more.json"
    assert all(os.stat(p).st_mode & stat.S_IWUSR for p in (tmp_path / "run").rglob("*"))
    (tmp_path / "cache" / "deep").chmod(0o755)
