"""Locks with and without flock, and runs that lose their folder."""

from __future__ import annotations

import errno
import fcntl
import itertools
import json
import os
import platform
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from fedrun.common import locks
from fedrun.common.errors import FolderLost
from fedrun.common.files import claim, write_atomic
from fedrun.distributed.launch import Launch
from fedrun.distributed.stopping import StopRequest
from fedrun.records.events import Progress
from fedrun.records.outcome import read_outcome, write_failure, write_outcome
from fedrun.records.run_files import LOCK
from fedrun.records.run_lock import lock_run_dir, release_run_dir
from tests.support.runs import Run, wait_until


@pytest.fixture
def no_flock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system without flock, and shorter times than usual."""
    def missing(*_: Any) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))
    monkeypatch.setattr(fcntl, "flock", missing)
    monkeypatch.setattr(locks, "_warned", set())
    for name, seconds in (
            ("SECONDS_BETWEEN_TOUCHES", 0.1), ("SECONDS_UNTIL_STALE", 1.0),
            ("SECONDS_TO_SETTLE", 0.05), ("SECONDS_BETWEEN_ATTEMPTS", 0.02)):
        monkeypatch.setattr(locks, name, seconds)


@pytest.fixture(params=["flock", "no flock"])
def either(request: pytest.FixtureRequest) -> None:
    if request.param == "no flock":
        request.getfixturevalue("no_flock")


def owner(tmp_path: Path, **changes: Any) -> Path:
    """A file lock that another process has left behind."""
    held = tmp_path / "lock.held"
    held.write_text(json.dumps({"holder": "process 5 on elsewhere", "pid": 5, "began": 1.0,
                                "machine": "another", "token": "t"} | changes))
    return held


@pytest.mark.usefixtures("either")
def test_one_at_a_time(tmp_path: Path) -> None:
    first = locks.acquire(tmp_path / "lock", 0.0)
    first.write("token")
    waited: list[str] = []
    with pytest.raises(locks.Busy, match=f"^process {os.getpid()} on {platform.node()}$"):
        locks.acquire(tmp_path / "lock", 0.0, waited.append)
    assert waited == [locks.this_process()]
    threading.Timer(0.2, first.release).start()
    second = locks.acquire(tmp_path / "lock", 20.0)
    second.release()
    assert not (tmp_path / "lock.held").exists()
    assert (tmp_path / "lock").read_text() == f"{locks.this_process()}\ntoken\n"


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
@pytest.mark.usefixtures("no_flock")
def test_one_warning_of_a_file_system_without_locks(
        tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture) -> None:
    def missing(*_: Any) -> None:
        raise OSError(number, os.strerror(number))
    monkeypatch.setattr(fcntl, "flock", missing)
    for name in ("lock", "other"):
        held = locks.acquire(tmp_path / name, 0.0)
        assert json.loads((tmp_path / f"{name}.held").read_text())["pid"] == os.getpid()
        held.release()
    (record,) = caplog.records
    assert "has no locks (flock)" in record.message


@pytest.mark.usefixtures("no_flock")
def test_the_lock_of_a_process_of_this_machine_that_is_gone_counts_for_nothing(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not only once it is stale, which the test would not live to see."""
    monkeypatch.setattr(locks, "SECONDS_UNTIL_STALE", 1000.0)
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    for pid in (gone.pid, os.getpid()):  # and one whose number another process has now
        owner(tmp_path, machine=locks._machine_id(), pid=pid)
        locks.acquire(tmp_path / "lock", 0.0).release()


@pytest.mark.usefixtures("no_flock")
def test_a_lock_from_another_machine_counts_while_its_owner_shows_life(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, over = owner(tmp_path), threading.Event()

    def touch() -> None:
        while not over.wait(0.1):
            os.utime(file)

    living = threading.Thread(target=touch)
    living.start()
    with monkeypatch.context() as patch:
        patch.setattr(locks, "SECONDS_UNTIL_STALE", 1000.0)  # which is not waited for
        with pytest.raises(locks.Busy, match="process 5 on elsewhere"):
            locks.acquire(tmp_path / "lock", 0.0)
    over.set()
    living.join()
    last_sign = file.stat().st_mtime
    held = locks.acquire(tmp_path / "lock", 0.0)  # waits until it is stale, whatever its patience
    assert time.time() - last_sign > locks.SECONDS_UNTIL_STALE - 0.1
    file.write_text("{}")  # who has lost the lock does not take it from the next
    held.release()
    assert file.exists()


@pytest.mark.usefixtures("no_flock")
def test_only_one_process_takes_over_a_stale_lock(tmp_path: Path) -> None:
    owner(tmp_path, machine=locks._machine_id(), pid=2**22)
    got: list[locks.Held] = []
    refused: list[BaseException] = []

    def try_it() -> None:
        try:
            got.append(locks.acquire(tmp_path / "lock", 0.0))
        except locks.Busy as busy:
            refused.append(busy)

    threads = [threading.Thread(target=try_it) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(got), len(refused)) == (1, 7)
    got[0].release()


@pytest.mark.usefixtures("no_flock")
def test_an_owner_touches_its_lock(tmp_path: Path) -> None:
    held = locks.acquire(tmp_path / "lock", 0.0)
    os.utime(tmp_path / "lock.held", (1, 1))
    wait_until(lambda: (tmp_path / "lock.held").stat().st_mtime > 1, 10)
    held.release()


def test_the_lock_on_a_removed_file_does_not_count(tmp_path: Path,
                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    """It would not keep other processes away, since they cannot see that file."""
    path, flock = tmp_path / "lock", fcntl.flock

    def removed(file: int, how: int) -> None:
        monkeypatch.setattr(fcntl, "flock", flock)
        path.unlink()
        flock(file, how)

    monkeypatch.setattr(fcntl, "flock", removed)
    held = locks.acquire(path, 0.0)
    held.write("token")
    assert path.read_text().endswith("\ntoken\n")
    with pytest.raises(locks.Busy):
        locks.acquire(path, 0.0)
    held.release()


@pytest.mark.usefixtures("no_flock")
def test_a_run_without_locks_of_the_file_system(run_here: Run) -> None:
    done = run_here("fed_avg", "--rounds", 1, "--num_clients", 1)
    assert done.code == 0, done.output
    assert done.output.count("has no locks (flock)") == 1
    assert not (done.run_dir / "lock.held").exists()


# ---- a folder that is lost ----------------------------------------------------------------------

def lose(run_dir: Path, how: str) -> None:
    old, new = run_dir.with_name("old"), run_dir.with_name("new")
    new.mkdir()
    (new / "lock").write_text("process 7 on elsewhere\ntheirs\n")
    (new / "model.safetensors").write_text("theirs")
    (new / "outcome.json").write_text('{"outcome": "running", "step": 3}')
    run_dir.rename(old)  # atomically, whatever other threads write
    if how == "taken":  # another run was started there after it was removed
        new.rename(run_dir)
    if how != "renamed":
        shutil.rmtree(old)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # tensorboard
@pytest.mark.parametrize(("how", "flags"), [
    ("removed", ("central",)), ("taken", ("fed_avg", "--num_clients", 2)),
    *(pytest.param(how, (*flags, *more), marks=pytest.mark.slow) for how, flags, more in [
        ("renamed", ("fed_avg",), ()),
        ("removed", ("fed_avg", "--num_clients", 2, "--client_store", "disk"), ()),
        ("taken", ("fed_avg", "--num_clients", 2, "--client_store", "disk"),
         ("--track", "tensorboard"))])])
def test_a_run_that_loses_its_folder_ends_with_one_line_and_writes_nothing(
        run_here: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str,
        flags: tuple[object, ...]) -> None:
    run_dir, step, state = tmp_path / "run", Progress.step, {}

    def after_three(progress: Progress, number: int, *args: Any) -> None:
        step(progress, number, *args)
        if number == 3:
            lose(run_dir, how)
            state.update({p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()})

    monkeypatch.setattr(Progress, "step", after_three)
    outcome = run_here(*flags, "--rounds", 8, "--val_freq", 2, "--checkpoint_freq", 2)
    assert outcome.code == 1, outcome.output
    assert "Traceback" not in outcome.output
    message = [line for line in outcome.output.splitlines() if "the folder of this run was" in line]
    assert len(message) == 1, outcome.output
    expected = "taken by process 7 on elsewhere" if how == "taken" else "removed or renamed"
    assert expected in message[0]
    if how != "renamed":
        assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == state
    assert run_dir.exists() == (how == "taken")


@pytest.mark.parametrize("checks", range(5))
def test_a_folder_that_is_lost_between_a_check_and_a_write_is_not_made_again(
        tmp_path: Path, checks: int) -> None:
    folder, seen = tmp_path / "run", itertools.count()
    folder.mkdir()

    def check() -> None:
        if not folder.exists():
            raise FolderLost
        if next(seen) == checks:
            shutil.rmtree(folder)

    def write() -> None:
        for name in "abc":
            write_atomic(folder / "below" / name / "file", b"")

    claim(folder, check)
    try:
        with pytest.raises(FolderLost):
            write()
    finally:
        claim(folder, None)
    assert not folder.exists()


def test_final_writes_are_checked_too(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    lock_run_dir(run_dir, "ours")
    write_outcome(run_dir, "running", 1)
    lose(run_dir, "taken")
    with pytest.raises(FolderLost, match="taken by process 7 on elsewhere"):
        write_outcome(run_dir, "finished", 3)
    write_failure(run_dir, "why")
    with pytest.raises(FolderLost):
        write_atomic(run_dir / "server" / "params" / "step_000001.npz", b"")
    assert sorted(p.name for p in run_dir.rglob("*")) == ["lock", "model.safetensors",
                                                          "outcome.json"]
    assert read_outcome(run_dir) == {"outcome": "running", "step": 3}
    release_run_dir(run_dir)
    write_atomic(run_dir / "x", b"")  # no run claims this folder


# ---- STOP ---------------------------------------------------------------------------------------

@pytest.mark.timeout(20)
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: path.write_bytes(b"x" * 2000)])
def test_a_stop_that_is_not_a_small_file_is_ignored(tmp_path: Path, make: Any,
                                                    caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "lock").touch()
    stopping = StopRequest(tmp_path, tmp_path / LOCK, list, Launch())
    make(tmp_path / "STOP")
    for _ in range(3):
        assert stopping.asked_by() == ""
    assert caplog.text.count("ignoring STOP: ") == 1
    if not (tmp_path / "STOP").is_file():
        stopping.obeyed()
        assert (tmp_path / "STOP").exists()
    (tmp_path / "STOP").rename(tmp_path / "other")
    (tmp_path / "STOP").touch()
    assert stopping.asked_by() == "the STOP file"
    stopping.obeyed()
    assert not (tmp_path / "STOP").exists()
