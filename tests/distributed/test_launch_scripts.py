"""The scripts in launch/, with stand-ins for the programs that they call.

test_slurm.py runs them on a real cluster.
"""

from __future__ import annotations

import re
import signal
import sys
from pathlib import Path

import psutil
import pytest

from fedrun.records import checkpoint
from fedrun.records.outcome import Standing, is_restart, read_outcome, write_outcome
from tests.support.launch_programs import STEP, Programs
from tests.support.runs import ROOT, SMALL, alive, listening, start, wait_until

RUN, NODE, SBATCH = (ROOT / "launch" / name for name in ("run.sh", "node.sh", "slurm.sbatch"))


# ---- node.sh -------------------------------------------------------------------------------------

pytestmark = pytest.mark.usefixtures("signals_of_a_terminal")

ALONE = "--max-restarts 0"
STATIC = "--nnodes 2 --node-rank {} --max-restarts 0 --master-addr {} --master-port {}"
BY_HAND = {"NODES": "2", "MASTER_ADDR": "first", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(("env", "config", "torchrun", "message"), [
    ({"GPUS": "4"}, {}, f"{ALONE} --nproc-per-node 5", "workers: 4 (one per GPU), and the server"),
    ({"GPUS": "4"}, {"server": "colocated"}, f"{ALONE} --nproc-per-node 4",
     "workers: 4 (one per GPU)\n"),
    ({}, {}, f"{ALONE} --nproc-per-node 5", "no GPU: one per client, at most one per core"),
    ({}, {"num_clients": "3"}, f"{ALONE} --nproc-per-node 4", "workers: 3 ("),
    ({"GPUS": "2"}, {"device": "cpu"}, f"{ALONE} --nproc-per-node 5", "no GPU"),
    ({"WORKERS_PER_NODE": "2"}, {}, f"{ALONE} --nproc-per-node 3", "(WORKERS_PER_NODE)"),
    ({"RESTARTS": "3", "GPUS": "1"}, {}, "--max-restarts 3 --nproc-per-node 2", ""),
    ({"GPUS": "1", "MASTER_PORT": "29511"}, {},
     f"{ALONE} --master-port 29511 --nproc-per-node 2", ""),
    (BY_HAND, {}, f"{STATIC.format(0, 'first', 29500)} --nproc-per-node 4", "node 0 of 2"),
    (BY_HAND | {"NODE": "1", "GPUS": "4"}, {},
     f"{STATIC.format(1, 'first', 29500)} --nproc-per-node 4", "node 1 of 2"),
    # Nobody restarts one of several agents in place.
    (BY_HAND | {"NODE": "1", "RESTARTS": "3"}, {},
     f"{STATIC.format(1, 'first', 29500)} --nproc-per-node 3", "workers: 3 ("),
    (STEP | {"SLURM_STEP_NUM_NODES": "2", "SLURM_NODEID": "1", "GPUS": "4"}, {},
     "--nnodes 2 --node-rank 1 --max-restarts 0 --nproc-per-node 4", "node 1 of 2"),
])
def test_node_starts_a_worker_for_each_gpu_client_or_core(
        programs: Programs, tmp_path: Path, env: dict[str, str], config: dict[str, str],
        torchrun: str, message: str) -> None:
    settings = {"num_clients": "6", "server": "dedicated", "device": "auto"} | config
    (tmp_path / "config").write_text("".join(f"{k}: {v}\n" for k, v in settings.items()))
    code, output = programs.run(NODE, "fed_avg", "--lr", "1e-3", **env)
    assert code == 0, output
    assert f"STARTED -m fedrun.torchrun {torchrun} -m fedrun fed_avg --lr 1e-3" in output
    assert message in output


def test_node_requires_a_master_address_between_machines(programs: Programs) -> None:
    code, output = programs.run(NODE, "fed_avg", NODES="2", MASTER_PORT="29500")
    assert code != 0
    assert "set MASTER_ADDR to the host name of node 0" in output
    assert "STARTED" not in output


def test_node_starts_a_centralised_run_alone(programs: Programs, tmp_path: Path) -> None:
    (tmp_path / "config").write_text("device: auto\n")
    assert programs.run(NODE, "central", "--lr", "1") == (0, "STARTED -m fedrun central --lr 1\n")
    code, output = programs.run(NODE, "central", NODES="2", NODE="0")
    assert code == 2
    assert "central runs in one process" in output


@pytest.mark.parametrize(("env", "config", "jobs", "message"), [
    ({"GPUS": "4"}, {}, "--jobs 4 ", "a study, runs at a time: 4 (one per GPU)"),
    ({"GPUS": "5"}, {"workers": "2"}, "--jobs 2 ", "runs at a time: 2 (one per GPU)"),
    ({"GPUS": "2"}, {"workers": "4"}, "", "as in its file"),  # which the study refuses
    ({"GPUS": "2"}, {"device": "cpu"}, "", "as in its file"),
    ({}, {}, "", "as in its file"),
    ({"WORKERS_PER_NODE": "3"}, {}, "--jobs 3 ", "3 (WORKERS_PER_NODE)"),
    (BY_HAND | {"NODE": "1", "GPUS": "1"}, {}, "--jobs 1 ", "node 1 of 2"),
    (STEP | {"SLURM_STEP_NUM_NODES": "2", "SLURM_NODEID": "1", "GPUS": "1"}, {}, "--jobs 1 ",
     "node 1 of 2"),
])
def test_node_makes_a_run_of_a_study_on_each_gpu(
        programs: Programs, tmp_path: Path, env: dict[str, str], config: dict[str, str],
        jobs: str, message: str) -> None:
    settings = {"workers": "1", "device": "auto"} | config
    (tmp_path / "config").write_text("".join(f"{k}: {v}\n" for k, v in settings.items()))
    code, output = programs.run(NODE, "study", "a.yaml", "--scale", "small", **env)
    assert code == 0, output
    assert f"STARTED -m fedrun study {jobs}a.yaml --scale small\n" in output
    assert message in output


# ---- slurm.sbatch --------------------------------------------------------------------------------

@pytest.mark.parametrize(("steps", "env", "code", "message", "sruns", "requeued"), [
    (["finished 0"], {}, 0, "done: the run has finished", ["n1,n2"], False),
    (["stopped 0"], {}, 0, "done: the run was stopped by a user", ["n1,n2"], False),
    (["stopped 1"], {}, 0, "done: the run was stopped by a user", ["n1,n2"], False),
    (["nothing 1"], {}, 1, "not retried: the run failed before training started", ["n1,n2"], False),
    (["failed 1"], {}, 0, "requeued: the run failed; restart 1 of 2", ["n1,n2"], True),
    (["running 137"], {}, 0, "requeued: the run failed", ["n1,n2"], True),  # it could not even say
    (["diverged 1"], {}, 1, "not retried: the run diverged, and would again", ["n1,n2"], False),
    (["nothing 1"], {"SLURM_RESTART_COUNT": "1"}, 0, "restart 2 of 2", ["n1,n2"], True),
    (["nothing 0"], {}, 0, "done: the run had already finished", ["n1,n2"], False),
    (["failed 1", "finished 0"], {"REQUEUE": "0"}, 0, "started again on n1 n2", ["n1,n2"] * 2,
     False),
    (["failed 1", "finished 0"], {"REQUEUE": "0", "ALIVE": "n2"}, 0, "started again on n2",
     ["n1,n2", "n2"], False),
    (["failed 1", "nothing 1", "finished 0"], {"REQUEUE": "0"}, 0, "restart 2 of 2 here",
     ["n1,n2"] * 3, False),
    (["failed 1"], {"REQUEUE": "0", "ALIVE": ""}, 1, "failed: no node answers", ["n1,n2"], False),
    (["failed 1"] * 3, {"REQUEUE": "0"}, 1, "started 3 times in this job", ["n1,n2"] * 3, False),
    (["failed 1", "finished 0"], {"SLURM_RESTART_COUNT": "2"}, 0, "restart 1 of 2 here",
     ["n1,n2"] * 2, False),
    (["failed 1", "finished 0"], {"REFUSED": "1"}, 0, "cannot be requeued: scontrol refused",
     ["n1,n2"] * 2, True),
])
def test_a_job_is_finished_requeued_or_restarted_by_the_outcome_of_its_step(
        programs: Programs, tmp_path: Path, steps: list[str], env: dict[str, str], code: int,
        message: str, sruns: list[str], requeued: bool) -> None:
    (tmp_path / "steps").write_text("\n".join(steps) + "\n")
    ended, output = programs.run(SBATCH, "fed_avg", SLURM_JOB_ID="7", SLURM_JOB_NODELIST="n[1-2]",
                                 RESTARTS="2", **env)
    assert (ended, message in output) == (code, True), output
    started = [line.split()[-1] for line in output.splitlines() if line.startswith("SRUN")]
    assert started == sruns
    assert re.findall("^RESTART (.*)$", output, re.M) == [*map(str, range(len(sruns)))]
    assert ("REQUEUE 7" in output) == requeued


@pytest.mark.parametrize(("steps", "code", "message"), [
    (["finished 137"], 0, "done: the run has finished"),  # by the nodes that are left
    (["stopped 0"], 0, "done: the run was stopped by a user"),
    (["stopped 143", "finished 0"], 0, "started again on n1 n2"),  # by SLURM, with a node
    (["failed 2"], 2, "not retried: a run of the study needs a change"),
    (["failed 1", "finished 0"], 0, "started again on n1 n2"),
])
def test_a_study_goes_on_without_a_lost_node(programs: Programs, tmp_path: Path, steps: list[str],
                                             code: int, message: str) -> None:
    (tmp_path / "steps").write_text("\n".join(steps) + "\n")
    ended, output = programs.run(SBATCH, "study", "a.yaml", SLURM_JOB_ID="7", REQUEUE="0",
                                 SLURM_JOB_NODELIST="n[1-2]", RESTARTS="2")
    assert (ended, message in output) == (code, True), output
    assert output.count("(a node goes on without the others)") == len(steps)


@pytest.mark.parametrize("left", ["stopped", "finished"])
@pytest.mark.parametrize(("env", "code", "message", "requeued"), [
    ({}, 1, "not retried: the run failed before training started", False),
    ({"SLURM_RESTART_COUNT": "1"}, 0, "requeued: the run failed; restart 2 of 2", True),
])
def test_an_outcome_left_by_another_start_is_ignored(
        programs: Programs, tmp_path: Path, left: Standing, env: dict[str, str],
        code: int, message: str, requeued: bool) -> None:
    leave(tmp_path / "run", left)
    (tmp_path / "steps").write_text("nothing 1\n")
    ended, output = programs.run(SBATCH, "fed_avg", SLURM_JOB_ID="7", SLURM_JOB_NODELIST="n[1-2]",
                                 RESTARTS="2", **env)
    assert (ended, message in output) == (code, True), output
    assert ("REQUEUE 7" in output) == requeued


def leave(run_dir: Path, outcome: Standing) -> None:
    """What a run that another script started has left in its folder."""
    run_dir.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDRUN_START", "7 0 0 1234 1700000000.5")
        write_outcome(run_dir, outcome, 5)


@pytest.mark.parametrize(("sign", "env", "code", "message", "requeued"), [
    (signal.SIGUSR2, {}, 0, "requeued: stopped for the time limit", True),
    (signal.SIGUSR2, {"SLURM_RESTART_COUNT": "9"}, 0, "requeued: stopped for the time limit", True),
    (signal.SIGUSR2, {"REQUEUE": "0"}, 1, "done: submit the job again to resume the run", False),
    (signal.SIGUSR2, {"REQUEUE": "0", "MORE": "--overwrite"}, 1,
     "done: submit the job again without --overwrite to resume the run", False),
    (signal.SIGTERM, {}, 0, "not requeued: cancelled", False),
])
def test_a_signal_becomes_a_stop_for_this_attempt_of_this_job(
        programs: Programs, tmp_path: Path, sign: int, env: dict[str, str], code: int, message: str,
        requeued: bool) -> None:
    ended, output = signalled(programs, tmp_path, sign, **env)
    assert (ended, message in output) == (code, True), output
    assert f"OBEYED 7 {env.get('SLURM_RESTART_COUNT', '0')}" in output
    assert ("REQUEUE 7" in output) == requeued


@pytest.mark.parametrize(("env", "code", "message"), [
    ({}, 0, "requeued: the run failed; restart 1 of 2"),
    ({"SLURM_RESTART_COUNT": "2"}, 1,
     "done: the time limit is near; submit the job again to resume the run"),
])
def test_a_round_that_is_too_long_for_the_time_limit_is_given_up(
        programs: Programs, tmp_path: Path, env: dict[str, str], code: int, message: str) -> None:
    ended, output = signalled(programs, tmp_path, signal.SIGUSR2, DEAF="1", STOP_SECONDS="1", **env)
    assert (ended, message in output) == (code, True), output
    assert "seconds: it is abandoned" in output
    assert "SRUN got TERM" in output


def signalled(programs: Programs, tmp_path: Path, sign: int, **env: str) -> tuple[int, str]:
    """Start a job whose run waits for STOP, and send a signal to its shell."""
    (tmp_path / "steps").write_text("until-STOP 0\n")
    more = env.pop("MORE", "").split()
    process = programs.start(SBATCH, "fed_avg", *more, SLURM_JOB_ID="7",
                             SLURM_JOB_NODELIST="n[1-2]", RESTARTS="2", **env)
    wait_until((tmp_path / "run" / "outcome.json").exists, 10)
    process.send_signal(sign)
    output, _ = process.communicate(timeout=20)
    return process.returncode, output


def test_what_a_script_starts_again_after_a_failure_resumes(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever --overwrite says: to the run it is a restart by its launcher."""
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    write_outcome(tmp_path, "failed", 3)
    for tries, restart in (("0", False), ("1", True)):
        monkeypatch.setenv("FEDRUN_RESTART", tries)
        assert is_restart(tmp_path) == restart
    monkeypatch.setenv("SLURM_JOB_ID", "8")  # another's
    assert not is_restart(tmp_path)


# ---- run.sh --------------------------------------------------------------------------------------

@pytest.mark.parametrize(("outcome", "code", "ended"), [
    ("stopped", "1", 0), ("failed", "1", 1), ("", "1", 1), ("", "2", 2), ("", "0", 0),
    ("running", "137", 137), ("finished", "0", 0)])
def test_run_takes_only_the_outcome_of_its_own_start(
        programs: Programs, tmp_path: Path, outcome: str, code: str, ended: int) -> None:
    leave(tmp_path / "run", "stopped")
    exit_code, output = programs.run(RUN, "fed_avg", OUTCOME=outcome, CODE=code)
    assert exit_code == ended, output
    assert ("launch: stopped in order" in output) == (outcome == "stopped")


@pytest.mark.slow
def test_run_survives_a_killed_rank_and_stops_in_order(cache_dir: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    process = start(
        [RUN, "fed_avg", *SMALL, "--num_clients", "2", "--rounds", "100000", "--val_freq",
         "100000", "--checkpoint_freq", "2", "--data_dir", tmp_path, "--cache_dir", cache_dir,
         "--run_name", "run"], log, {"PYTHON": sys.executable, "CLIENTS": "1"})
    try:
        rounds(tmp_path / "run", 5, log)
        ranks = {p.environ().get("RANK"): p for p in psutil.Process(process.pid).children(True)}
        assert listening(psutil.Process(process.pid)) == {"127.0.0.1"}
        ranks["1"].kill()
        wait_until(lambda: "fedrun: resuming from step" in log.read_text(), 60, log.read_text)
        step, = re.findall("resuming from step ([0-9]+)", log.read_text())
        rounds(tmp_path / "run", int(step) + 8, log)  # further than the killed ranks can have been
        process.send_signal(signal.SIGHUP)  # the terminal is closed
        assert process.wait(timeout=30) == 0, log.read_text()
    finally:
        if process.poll() is None:
            for child in psutil.Process(process.pid).children(recursive=True):
                child.kill()
            process.wait(timeout=30)
    assert "stopped by SIGHUP, after round" in log.read_text()
    found = checkpoint.latest_valid(tmp_path / "run")
    assert found
    assert found.step == read_outcome(tmp_path / "run")["step"] >= 8


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="orphans are ended by Linux's kernel")
def test_nothing_outlives_run(cache_dir: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    script = start(
        [RUN, "fed_avg", *SMALL, "--num_clients", "2", "--rounds", "100000", "--val_freq",
         "100000", "--data_dir", tmp_path, "--cache_dir", cache_dir, "--run_name", "run"], log,
        {"PYTHON": sys.executable, "CLIENTS": "2"})
    family: list[psutil.Process] = []
    try:
        rounds(tmp_path / "run", 1, log)
        family = psutil.Process(script.pid).children(recursive=True)
        assert len(family) >= 4
        script.kill()
        wait_until(lambda: not any(map(alive, family)), 10, log.read_text)
    finally:
        script.kill()
        script.wait()
        for process in filter(alive, family):
            process.kill()


def rounds(run_dir: Path, number: int, log: Path) -> None:
    """Wait until a run has recorded this round."""
    events = run_dir / "events.jsonl"
    wait_until(lambda: events.exists() and f'"round": {number},' in events.read_text(), 60,
               log.read_text)
