"""Stopping a run by signals and STOP files, and the lock of its folder."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedrun.distributed.launch import Launch
from fedrun.distributed.stopping import StopRequest, hangup_ignored
from fedrun.records import checkpoint
from fedrun.records.outcome import read_outcome, write_failure
from fedrun.torchrun import wanted_signals
from tests.support.runs import ROOT, SMALL, Run, read_json, torchrun, wait_until

pytestmark = pytest.mark.usefixtures("signals_of_a_terminal", "no_slurm_job")


@pytest.fixture
def no_slurm_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)


@pytest.fixture
def endless(request: pytest.FixtureRequest, tmp_path: Path, cache_dir: Path
            ) -> Iterator[subprocess.Popen[str]]:
    """A run that has started and would take hours; parameter: local updates per round."""
    updates = getattr(request, "param", 4)
    command = [sys.executable, "-m", "fedrun", "fed_avg", *SMALL, "--data_dir", str(tmp_path),
               "--cache_dir", str(cache_dir), "--run_name", "run", "--rounds", "100000",
               "--num_clients", "2", "--val_freq", "100000", "--local_updates", str(updates)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                               cwd=ROOT, start_new_session=True,
                               env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        events = tmp_path / "run" / "events.jsonl"
        lines = 4 if updates < 100 else 1
        wait_until(lambda: events.exists() and events.read_text().count("\n") >= lines, 60)
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


def test_two_runs_in_one_folder(run: Run, endless: subprocess.Popen[str], tmp_path: Path) -> None:
    second = run("fed_avg", "--rounds", 5, "--overwrite")
    assert second.code == 2
    assert f"is in use by process {endless.pid} on " in second.output
    assert endless.poll() is None
    # A process without the lock that fails must not record a failure of the other run.
    write_failure(tmp_path / "run", "no answer from rank 1")
    assert read_outcome(tmp_path / "run")["outcome"] == "running"


def test_a_stop_file_stops_the_run(endless: subprocess.Popen[str], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    other_job = folder / "STOP"
    other_job.write_text("1234 0\n")  # for another job
    time.sleep(1.0)
    assert endless.poll() is None
    other_job.unlink()
    (folder / "STOP").touch()
    output, _ = endless.communicate(timeout=30)
    assert endless.returncode == 0, output
    assert "stopped by the STOP file, after round" in output
    assert not (folder / "STOP").exists()
    assert read_json(folder / "outcome.json")["outcome"] == "stopped"
    assert checkpoint.latest_valid(folder) is not None


@pytest.mark.parametrize("endless", [1_000_000], indirect=True)
def test_a_second_signal_ends_at_once(endless: subprocess.Popen[str]) -> None:
    """In the middle of a round, whose end the first signal waits for."""
    endless.send_signal(signal.SIGHUP)  # the terminal is closed
    time.sleep(1.5)
    assert endless.poll() is None
    endless.send_signal(signal.SIGTERM)
    output, _ = endless.communicate(timeout=10)
    assert "SIGHUP: stopping after this round" in output
    assert "second signal (SIGTERM): exiting now" in output
    assert endless.returncode == 128 + signal.SIGTERM


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_the_launcher_waits_for_ranks_in_the_middle_of_a_round(sent: signal.Signals, tmp_path: Path
                                                               ) -> None:
    (tmp_path / "rank.py").write_text(
        "import os, pathlib, signal, time\n"
        "asked = []\n"
        f"signal.signal({int(sent)}, lambda *_: asked.append(1))\n"
        "pathlib.Path('began' + os.environ['RANK']).touch()\n"
        "while not asked:\n"
        "    time.sleep(0.05)\n"
        "time.sleep(2.5)\n"
        "pathlib.Path('written').touch()\n")
    process = subprocess.Popen([*torchrun(2), "rank.py"], cwd=tmp_path, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               env={**os.environ, "PYTHONPATH": str(ROOT)})
    try:
        wait_until(lambda: all((tmp_path / f"began{rank}").exists() for rank in range(2)), 60)
        process.send_signal(sent)
        output, _ = process.communicate(timeout=30)
    finally:
        process.kill()
        process.wait()
    assert (tmp_path / "written").exists(), output
    assert f"{sent.name}: all processes have ended" in output
    assert process.returncode == 1


@pytest.mark.parametrize(("sent", "raised"), [(signal.SIGTERM, SystemExit),
                                              (signal.SIGINT, KeyboardInterrupt)])
def test_in_one_process_a_second_signal_raises(sent: signal.Signals, raised: type[BaseException],
                                               tmp_path: Path) -> None:
    """So that a notebook survives it; it reaches the main thread, which ends the block."""
    (tmp_path / "lock").touch()

    def send_two() -> None:
        with StopRequest(tmp_path, tmp_path / "lock", list, Launch()).listening() as stopping:
            os.kill(os.getpid(), sent)
            time.sleep(0.7)
            assert stopping.asked_by() == sent.name
            os.kill(os.getpid(), sent)
            time.sleep(20)

    began = time.monotonic()
    with pytest.raises(raised) as caught:
        send_two()
    assert time.monotonic() - began < 10  # although a signal may arrive before the wait begins
    if isinstance(caught.value, SystemExit):
        assert caught.value.code == 128 + sent


@pytest.mark.usefixtures("no_slurm_job")
def test_in_a_slurm_job_a_late_second_sigterm_is_the_forwarded_first_one(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """scancel signals every process, and a busy launcher passes its own on seconds later. Ctrl-C is
    a user's there too."""
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    (tmp_path / "lock").touch()

    def send() -> None:
        with StopRequest(tmp_path, tmp_path / "lock", list, Launch()).listening() as stopping:
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(0.7)
            assert stopping.asked_by() == "SIGTERM"
            asked.append(1)
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(20)

    asked = list[int]()
    with pytest.raises(KeyboardInterrupt):
        send()
    assert asked


def test_under_nohup_a_closed_terminal_has_no_effect(tmp_path: Path) -> None:
    (tmp_path / "lock").touch()
    names = "SIGTERM,SIGINT,SIGHUP,SIGQUIT"
    assert not hangup_ignored()
    assert wanted_signals(names) == names
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # what nohup does
    try:
        assert wanted_signals(names) == "SIGTERM,SIGINT,SIGQUIT"
        with StopRequest(tmp_path, tmp_path / "lock", list, Launch()).listening() as stopping:
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(0.2)
            assert stopping.asked_by() == ""
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_site_has_no_folder_in_which_to_stop_a_run() -> None:
    with StopRequest(None, None, list, Launch(1, 3)).listening() as stopping:
        assert (stopping.asked_by(), stopping.lost_folder()) == ("", "")
        stopping.obeyed()
        os.kill(os.getpid(), signal.SIGTERM)
        wait_until(lambda: stopping.signal == "SIGTERM", 5)


def test_writing_to_a_closed_terminal_is_no_error() -> None:
    code = """
import os, sys
from fedrun.distributed.stopping import outlive_terminal
outlive_terminal()
print("seen")
sys.stdin.read()
print("lost")
print("lost", file=sys.stderr)
sys.exit(7)
"""
    master, terminal = os.openpty()
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE,
                               stdout=terminal, stderr=terminal)
    os.close(terminal)
    assert os.read(master, 100) == b"seen\r\n"
    os.close(master)
    process.communicate(timeout=30)
    assert process.returncode == 7


# Between Python's own instructions, and in a library call that does not return to them.
@pytest.mark.parametrize("work", ["time.sleep(60)",
                                  "hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)"])
def test_ctrl_c_before_the_run_starts_is_one_line(work: str) -> None:
    code = f"""
import hashlib, sys, time
from fedrun.common.log import print_log
from fedrun.distributed.stopping import interruptible
print_log()
def command():
    print("begun", flush=True)
    {work}
    return 0
sys.exit(interruptible(command))
"""
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout
            assert process.stdout.readline() == "begun\n"
            process.send_signal(signal.SIGINT)
            _, message = process.communicate(timeout=20)
        finally:
            process.kill()
    assert message == ("fedrun: warning: interrupted; run the same command again to start over or "
                    "resume\n")
    assert process.returncode == 128 + signal.SIGINT
