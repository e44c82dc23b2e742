"""Every failure ends all ranks with a message of one line; nothing hangs."""

from __future__ import annotations

import re
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from tests.support.runs import (
    SMALL,
    Run,
    alive,
    error_lines,
    listening,
    start,
    torchrun,
    wait_until,
)


def error_line(output: str) -> str:
    lines = error_lines(output)
    assert len(lines) == 1, output
    return lines[0]


@pytest.mark.parametrize(("flags", "message"), [
    (("--num_clients", 50_000), r"--num_clients 50000"),
    (("--num_clients", 2, "--batch_size", 30_000), r"--batch_size"),
    (("--num_clients", 2, "--local_updates", 30_000), r"--local_updates 30000: .*must be at most"),
    (("--device", "cuda"), r"--device cuda: no CUDA device is available"),
])
def test_impossible_settings_are_an_error_of_one_line(run: Run, flags: tuple[object, ...],
                                                      message: str) -> None:
    outcome = run("fed_avg", *flags)
    assert outcome.code == 2
    assert re.search(message, error_line(outcome.output))
    assert not outcome.run_dir.exists()


def test_an_empty_corpus(run: Run, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    outcome = run("fed_avg", "--dataset", tmp_path / "*.txt")
    assert outcome.code == 2
    assert "--dataset" in error_line(outcome.output)


@pytest.mark.slow
def test_under_torchrun_the_error_is_printed_once(run: Run) -> None:
    outcome = run("fed_avg", "--lr", "-1", processes=3, launcher=True)
    assert outcome.code == 2
    assert re.search("--lr -1.0: must be > 0", error_line(outcome.output))
    assert "launch: " not in outcome.output  # which would bury it


def test_central_under_torchrun_is_refused(run: Run) -> None:
    outcome = run("central", processes=2, launcher=True)
    assert "central runs in one process" in error_line(outcome.output)


def test_a_folder_with_another_config_is_refused_unless_overwritten(run: Run) -> None:
    assert run("fed_avg", "--rounds", 1).code == 0
    refused = run("fed_avg", "--rounds", 2, "--lr", "1e-3")
    assert refused.code == 2
    line = error_line(refused.output)
    assert "--overwrite" in line
    assert "lr 0.002 there, 0.001 here" in line
    assert [r["global_step"] for r in refused.history] == [1]
    again = run("fed_avg", "--rounds", 2, "--overwrite")
    assert again.code == 0
    assert [r["global_step"] for r in again.history] == [1, 2]


def test_a_folder_that_is_no_run_is_never_replaced(run: Run, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("precious")
    outcome = run("fed_avg", "--rounds", 1, "--overwrite")
    assert outcome.code == 2
    assert "is not a run's folder" in error_line(outcome.output)
    assert (tmp_path / "run" / "thesis.tex").read_text() == "precious"


def test_a_data_dir_that_cannot_be_written(run: Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    outcome = run("fed_avg", "--rounds", 1, "--data_dir", tmp_path / "file")
    assert outcome.code == 2
    assert "--data_dir" in error_line(outcome.output)


@contextmanager
def launched(tmp_path: Path, cache_dir: Path, processes: int, rounds: int, timeout: int
             ) -> Iterator[tuple[subprocess.Popen[bytes], dict[int, psutil.Process], Path]]:
    """torchrun, its ranks and the log of a run that has started; all are killed at the end."""
    log, events = tmp_path / "log", tmp_path / "run" / "events.jsonl"
    command = [*torchrun(processes), "-m", "fedrun", "fed_avg", *SMALL, "--data_dir", str(tmp_path),
               "--cache_dir", str(cache_dir), "--run_name", "run", "--rounds", str(rounds),
               "--num_clients", str(processes - 1), "--val_freq", "100000", "--timeout",
               str(timeout)]
    launcher = start(command, log)
    ranks: dict[int, psutil.Process] = {}
    try:
        wait_until(lambda: events.exists() and events.read_text().count("\n") > 3, 60)
        ranks = {int(c.environ()["RANK"]): c for c in psutil.Process(launcher.pid).children()}
        assert len(ranks) == processes
        yield launcher, ranks, log
    finally:
        if launcher.poll() is None:
            launcher.kill()
            launcher.wait()
        for process in filter(alive, ranks.values()):
            process.kill()


@pytest.mark.parametrize(("sent", "timeout"), [
    pytest.param(signal.SIGKILL, 600, marks=pytest.mark.slow),
    pytest.param(signal.SIGSTOP, 4, marks=pytest.mark.slow)])
def test_a_lost_worker_ends_all_ranks(sent: signal.Signals, timeout: int, cache_dir: Path,
                                      tmp_path: Path) -> None:
    """A killed worker is noticed at once, a stopped one at the timeout. The server names it."""
    with launched(tmp_path, cache_dir, 4, 100_000, timeout) as (launcher, ranks, log):
        ranks[2].send_signal(sent)
        began = time.monotonic()
        wait_until(lambda: not any(alive(ranks[r]) for r in (0, 1, 3)), timeout=60)
        took = time.monotonic() - began
        if sent == signal.SIGSTOP:
            # torchrun waits: the stopped process cannot handle the SIGTERM that it was sent.
            assert took < timeout + 20
            assert "no heartbeat from rank 2, " in log.read_text(), log.read_text()
            ranks[2].kill()
        else:
            assert took < 10
        assert launcher.wait(60) == 1


@pytest.mark.slow
def test_a_signal_while_another_rank_is_lost_ends_at_once(cache_dir: Path, tmp_path: Path) -> None:
    """The end of the round, which a signal waits for, would come only at the timeout."""
    with launched(tmp_path, cache_dir, 3, 100_000, timeout=600) as (launcher, ranks, log):
        assert listening(psutil.Process(launcher.pid)) == {"127.0.0.1"}
        ranks[2].send_signal(signal.SIGSTOP)
        ranks[0].send_signal(signal.SIGTERM)
        wait_until(lambda: not alive(ranks[0]), timeout=30)
        assert "SIGTERM, and no heartbeat from rank 2: exiting now" in log.read_text()


@pytest.mark.slow
def test_a_stopped_launcher_does_not_stop_the_run(cache_dir: Path, tmp_path: Path) -> None:
    """It hosts the store, whose calls have no timeout; but training does not use the store."""
    with launched(tmp_path, cache_dir, 3, 200, timeout=20) as (launcher, ranks, log):
        launcher.send_signal(signal.SIGSTOP)
        wait_until(lambda: not any(map(alive, ranks.values())), timeout=90)
        assert "done: " in log.read_text()
        launcher.send_signal(signal.SIGCONT)
        assert launcher.wait(60) == 0
