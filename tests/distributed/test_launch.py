"""How a process knows who it is, and the scripts in launch/: what they start and what they decide,
with stand-ins for the programs that they call. tests/test_slurm.py runs them on a real cluster."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from fedrun.distributed.launch import Launch, detect, rendezvous
from fedrun.records import checkpoint, outcome
from tests.support.runs import ROOT, SMALL, listening

RUN, NODE, SBATCH = (ROOT / "launch" / name for name in ("run.sh", "node.sh", "slurm.sbatch"))


# ---- how a process knows who it is ---------------------------------------------------------------

# A step of 9 processes on 2 nodes, as SLURM 22.05 describes it to one of them.
STEP = {"SLURM_JOB_ID": "70", "SLURM_STEP_ID": "1", "SLURM_STEP_NUM_TASKS": "9",
        "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_STEP_TASKS_PER_NODE": "5,4", "SLURM_NTASKS": "9",
        "SLURM_NODEID": "0", "SLURM_PROCID": "3", "SLURM_LOCALID": "3"}
# What the shell of a batch job or of salloc has.
SHELL = {"SLURM_JOB_ID": "70", "SLURM_NTASKS": "9", "SLURM_PROCID": "0", "SLURM_LOCALID": "0",
         "SLURM_NODEID": "0", "SLURM_TASKS_PER_NODE": "5,4"}
TORCHRUN = {"RANK": "5", "WORLD_SIZE": "9", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "4",
            "TORCHELASTIC_RESTART_COUNT": "2"}


@pytest.mark.parametrize(("env", "launch"), [
    ({}, Launch()),
    (SHELL, Launch()),
    # `srun --pty`, and the shell of an allocation that SLURM makes a step of its own
    (SHELL | {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "1"}, Launch()),
    (STEP, Launch(3, 9, 3, 5, on_first_node=True)),
    (STEP | {"SLURM_NODEID": "1", "SLURM_PROCID": "6", "SLURM_LOCALID": "1"},
     Launch(6, 9, 1, 4, on_first_node=False)),
    (STEP | {"SLURM_STEP_TASKS_PER_NODE": "3(x2),2,1", "SLURM_NODEID": "2", "SLURM_PROCID": "7",
             "SLURM_LOCALID": "1"}, Launch(7, 9, 1, 2, on_first_node=False)),
    (TORCHRUN, Launch(5, 9, 0, 4, on_first_node=False, attempt=2)),
    # torchrun's agents are a step of SLURM too, with one task a node
    (STEP | TORCHRUN, Launch(5, 9, 0, 4, on_first_node=False, attempt=2)),
])
def test_detect(env: dict[str, str], launch: Launch) -> None:
    assert detect(env) == launch


def test_rendezvous_is_guessed_by_nobody(programs: Programs, monkeypatch: pytest.MonkeyPatch
                                         ) -> None:
    set_by_user = {"MASTER_ADDR": "first", "MASTER_PORT": "29500"}
    assert rendezvous(STEP | set_by_user) == {}
    monkeypatch.setenv("PATH", str(programs.folder), prepend=os.pathsep)
    assert rendezvous(STEP) == {"MASTER_ADDR": "n1", "MASTER_PORT": str(20000 + 70 * 16 + 1)}
    assert rendezvous(STEP | {"MASTER_ADDR": "first"}) == {"MASTER_PORT": "21121"}
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ValueError, match=r"MASTER_ADDR: not set.*scontrol"):
        rendezvous(STEP)
    for name in set_by_user:
        with pytest.raises(ValueError, match=f"{name}: not set, though 2 processes were started"):
            rendezvous({"RANK": "0", "WORLD_SIZE": "2"} | {
                k: v for k, v in set_by_user.items() if k != name})


def test_restarts_in_place_are_known_by_their_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("SLURM_JOB_ID", None), ("TORCHELASTIC_RUN_ID", "none")):
        monkeypatch.delenv(name, raising=False)
        if value:
            monkeypatch.setenv(name, value)
    mine = outcome.launch_id()  # torchrun's static rendezvous calls every run "none"
    assert mine.startswith(f"process {os.getppid()} on ")
    assert outcome.launch_id() == mine
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "a")
    assert outcome.launch_id() == "a"
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert outcome.launch_id() == "slurm 7"


# ---- stand-ins -----------------------------------------------------------------------------------

PYTHON = """#!/bin/sh
case "$*" in
    *--print_config) printf 'method: %s\\n' "$3"; cat "$CONFIG" ;;
    *--print_run_dir) echo "$RUN_DIR" ;;
    "-c import torch"*) echo "$GPUS" ;;
    *)
        echo "STARTED $*"
        [ -z "$OUTCOME" ] || printf '{\\n "outcome": "%s",\\n "start": "%s"\\n}\\n' "$OUTCOME" \\
            "$FEDRUN_START" >"$RUN_DIR/outcome.json"
        exit "${CODE:-0}"
        ;;
esac
"""
# A step: it ends with the outcome and exit code of the next line of $STEPS, or waits for STOP.
SRUN = """#!/bin/bash
nodes=$(sed 's/.*--nodelist \\([^ ]*\\).*/\\1/' <<<"$*")
if [[ $* == *printenv* ]]; then [[ " $ALIVE " == *" $nodes "* ]] && echo "$nodes"; exit; fi
echo "SRUN on $nodes"
outcome() {
    mkdir -p "$RUN_DIR"
    printf '{\\n "outcome": "%s",\\n "step": 5,\\n "start": "%s"\\n}\\n' "$1" "$FEDRUN_START" \\
        >"$RUN_DIR/new"
    mv "$RUN_DIR/new" "$RUN_DIR/outcome.json"
}
trap 'echo "SRUN got TERM"; exit 143' TERM
read -r end code < <(head -n 1 "$STEPS"); sed -i 1d "$STEPS"
if [[ $end == until-STOP ]]; then
    outcome running
    until [[ -e $RUN_DIR/STOP && ! $DEAF ]]; do sleep 0.05; done
    echo "OBEYED $(cat "$RUN_DIR/STOP")"
    end=stopped
fi
[[ $end == nothing ]] || outcome "$end"
exit "$code"
"""
SCONTROL = """#!/bin/sh
case "$*" in
    "show hostnames "*) printf 'n1\\nn2\\n' ;;
    "show job "*) echo "   Requeue=$REQUEUE Restarts=0" ;;
    "requeue "*) echo "REQUEUE $2"; exit "$REFUSED" ;;
esac
"""


@dataclass
class Programs:
    """A folder of stand-ins, and the environment that finds them."""

    folder: Path
    env: dict[str, str]

    def start(self, script: Path, *arguments: str, **env: str) -> subprocess.Popen[str]:
        return subprocess.Popen([script, *arguments], stdout=subprocess.PIPE, text=True, cwd=ROOT,
                                stderr=subprocess.STDOUT, env={**self.env, **env})

    def run(self, script: Path, *arguments: str, **env: str) -> tuple[int, str]:
        process = self.start(script, *arguments, **env)
        output, _ = process.communicate(timeout=20)
        return process.returncode, output


@pytest.fixture
def programs(tmp_path: Path) -> Programs:
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in {"python": PYTHON, "srun": SRUN, "scontrol": SCONTROL,
                       "nproc": "#!/bin/sh\necho 4\n"}.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    (tmp_path / "config").write_text("num_clients: 6\nserver: dedicated\ndevice: auto\n")
    return Programs(folder, {
        "PATH": f"{folder}:{os.environ['PATH']}", "PYTHON": str(folder / "python"),
        "CONFIG": str(tmp_path / "config"), "RUN_DIR": str(tmp_path / "run"), "GPUS": "0",
        "STEPS": str(tmp_path / "steps"), "REQUEUE": "1", "REFUSED": "0", "ALIVE": "n1 n2",
        "DEAF": ""})


# ---- node.sh -------------------------------------------------------------------------------------

ALONE = "--max-restarts 0"
STATIC = "--nnodes 2 --node-rank {} --max-restarts 0 --master-addr {} --master-port {}"
BY_HAND = {"NODES": "2", "MASTER_ADDR": "first", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(("env", "config", "torchrun", "said"), [
    ({"GPUS": "4"}, {}, f"{ALONE} --nproc-per-node 5", "workers: 4 (one a GPU), and the server"),
    ({"GPUS": "4"}, {"server": "colocated"}, f"{ALONE} --nproc-per-node 4",
     "workers: 4 (one a GPU)\n"),
    ({}, {}, f"{ALONE} --nproc-per-node 5", "no GPU: one a client, at most one a core"),
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
     f"{STATIC.format(1, 'n1', 21121)} --nproc-per-node 4", "node 1 of 2"),
])
def test_node(programs: Programs, tmp_path: Path, env: dict[str, str], config: dict[str, str],
              torchrun: str, said: str) -> None:
    settings = {"num_clients": "6", "server": "dedicated", "device": "auto"} | config
    (tmp_path / "config").write_text("".join(f"{k}: {v}\n" for k, v in settings.items()))
    code, output = programs.run(NODE, "fed_avg", "--lr", "1e-3", **env)
    assert code == 0, output
    assert f"STARTED -m fedrun.torchrun {torchrun} -m fedrun fed_avg --lr 1e-3" in output
    assert said in output


def test_node_takes_no_address_for_granted(programs: Programs) -> None:
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


# ---- slurm.sbatch --------------------------------------------------------------------------------

@pytest.mark.parametrize(("steps", "env", "code", "said", "sruns", "requeued"), [
    (["finished 0"], {}, 0, "over: finished", ["n1,n2"], False),
    (["stopped 0"], {}, 0, "over: someone stopped the run", ["n1,n2"], False),
    (["stopped 1"], {}, 0, "over: someone stopped the run", ["n1,n2"], False),
    (["nothing 1"], {}, 1, "over: the run did not begin", ["n1,n2"], False),
    (["failed 1"], {}, 0, "requeued: the run failed; restart 1 of 2", ["n1,n2"], True),
    (["running 137"], {}, 0, "requeued: the run failed", ["n1,n2"], True),  # it could not even say
    (["nothing 1"], {"SLURM_RESTART_COUNT": "1"}, 0, "restart 2 of 2", ["n1,n2"], True),
    (["nothing 0"], {}, 0, "over: the run was finished before", ["n1,n2"], False),
    (["failed 1", "finished 0"], {"REQUEUE": "0"}, 0, "started again on n1 n2", ["n1,n2"] * 2,
     False),
    (["failed 1", "finished 0"], {"REQUEUE": "0", "ALIVE": "n2"}, 0, "started again on n2",
     ["n1,n2", "n2"], False),
    (["failed 1", "nothing 1", "finished 0"], {"REQUEUE": "0"}, 0, "restart 2 of 2 here",
     ["n1,n2"] * 3, False),
    (["failed 1"], {"REQUEUE": "0", "ALIVE": ""}, 1, "over: no node answers", ["n1,n2"], False),
    (["failed 1"] * 3, {"REQUEUE": "0"}, 1, "started 3 times in this job", ["n1,n2"] * 3, False),
    (["failed 1", "finished 0"], {"SLURM_RESTART_COUNT": "2"}, 0, "restart 1 of 2 here",
     ["n1,n2"] * 2, False),
    (["failed 1", "finished 0"], {"REFUSED": "1"}, 0, "may not be requeued: scontrol refused",
     ["n1,n2"] * 2, True),
])
def test_what_follows_a_step(programs: Programs, tmp_path: Path, steps: list[str],
                             env: dict[str, str], code: int, said: str, sruns: list[str],
                             requeued: bool) -> None:
    (tmp_path / "steps").write_text("\n".join(steps) + "\n")
    ended, output = programs.run(SBATCH, "fed_avg", SLURM_JOB_ID="7", SLURM_JOB_NODELIST="n[1-2]",
                                 RESTARTS="2", **env)
    assert (ended, said in output) == (code, True), output
    started = [line.split()[-1] for line in output.splitlines() if line.startswith("SRUN")]
    assert started == sruns
    assert ("REQUEUE 7" in output) == requeued


@pytest.mark.parametrize("left", ["stopped", "finished"])
@pytest.mark.parametrize(("env", "code", "said", "requeued"), [
    ({}, 1, "over: the run did not begin", False),
    ({"SLURM_RESTART_COUNT": "1"}, 0, "requeued: the run failed; restart 2 of 2", True),
])
def test_what_another_start_has_left_is_no_outcome(
        programs: Programs, tmp_path: Path, left: str, env: dict[str, str], code: int, said: str,
        requeued: bool) -> None:
    leave(tmp_path / "run", left)
    (tmp_path / "steps").write_text("nothing 1\n")
    ended, output = programs.run(SBATCH, "fed_avg", SLURM_JOB_ID="7", SLURM_JOB_NODELIST="n[1-2]",
                                 RESTARTS="2", **env)
    assert (ended, said in output) == (code, True), output
    assert ("REQUEUE 7" in output) == requeued


def leave(run_dir: Path, standing: outcome.Standing) -> None:
    """What a run that another script started has left in its folder."""
    run_dir.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDRUN_START", "7 0 0 1234 1700000000.5")
        outcome.write_outcome(run_dir, standing, 5)


@pytest.mark.parametrize(("sign", "env", "code", "said", "requeued"), [
    (signal.SIGUSR2, {}, 0, "requeued: stopped for the time limit", True),
    (signal.SIGUSR2, {"SLURM_RESTART_COUNT": "9"}, 0, "requeued: stopped for the time limit", True),
    (signal.SIGUSR2, {"REQUEUE": "0"}, 1, "over: submit it again to go on", False),
    (signal.SIGTERM, {}, 0, "not requeued: cancelled", False),
])
def test_a_signal_becomes_a_stop_for_this_attempt_of_this_job(
        programs: Programs, tmp_path: Path, sign: int, env: dict[str, str], code: int, said: str,
        requeued: bool) -> None:
    ended, output = signalled(programs, tmp_path, sign, **env)
    assert (ended, said in output) == (code, True), output
    assert f"OBEYED 7 {env.get('SLURM_RESTART_COUNT', '0')}" in output
    assert ("REQUEUE 7" in output) == requeued


@pytest.mark.parametrize(("env", "code", "said"), [
    ({}, 0, "requeued: the run failed; restart 1 of 2"),
    ({"SLURM_RESTART_COUNT": "2"}, 1, "over: the time limit is near; submit it again to go on"),
])
def test_a_round_that_is_too_long_for_the_time_limit_is_given_up(
        programs: Programs, tmp_path: Path, env: dict[str, str], code: int, said: str) -> None:
    ended, output = signalled(programs, tmp_path, signal.SIGUSR2, DEAF="1", STOP_SECONDS="1", **env)
    assert (ended, said in output) == (code, True), output
    assert "seconds: it is given up" in output
    assert "SRUN got TERM" in output


def signalled(programs: Programs, tmp_path: Path, sign: int, **env: str) -> tuple[int, str]:
    """Start a job whose run waits for STOP, and send a signal to its shell."""
    (tmp_path / "steps").write_text("until-STOP 0\n")
    process = programs.start(SBATCH, "fed_avg", SLURM_JOB_ID="7", SLURM_JOB_NODELIST="n[1-2]",
                             RESTARTS="2", **env)
    deadline = time.monotonic() + 10
    while not (tmp_path / "run" / "outcome.json").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(sign)
    output, _ = process.communicate(timeout=20)
    return process.returncode, output


# ---- run.sh --------------------------------------------------------------------------------------

@pytest.mark.parametrize(("outcome", "code", "ended"), [
    ("stopped", "1", 0), ("failed", "1", 1), ("", "1", 1), ("", "2", 2), ("", "0", 0),
    ("running", "137", 137), ("finished", "0", 0)])
def test_run_believes_the_outcome_of_its_own_start_alone(
        programs: Programs, tmp_path: Path, outcome: str, code: str, ended: int) -> None:
    leave(tmp_path / "run", "stopped")
    exit_code, output = programs.run(RUN, "fed_avg", OUTCOME=outcome, CODE=code)
    assert exit_code == ended, output
    assert ("launch: stopped in order" in output) == (outcome == "stopped")


@pytest.mark.slow
def test_run_survives_a_killed_rank_and_stops_in_order(cache_dir: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    with log.open("w") as file:
        process = subprocess.Popen(
            [ROOT / "launch" / "run.sh", "fed_avg", *SMALL, "--num_clients", "2", "--rounds",
             "100000", "--val_freq", "100000", "--checkpoint_freq", "2", "--data_dir", tmp_path,
             "--cache_dir", cache_dir, "--run_name", "run"], stdout=file, stderr=file, cwd=ROOT,
            env={**os.environ, "PYTHON": sys.executable, "CLIENTS": "1"}, start_new_session=True)
    try:
        rounds(tmp_path / "run", 5, log)
        ranks = {p.environ().get("RANK"): p for p in psutil.Process(process.pid).children(True)}
        assert listening(psutil.Process(process.pid)) == {"127.0.0.1"}
        ranks["1"].kill()
        deadline = time.monotonic() + 60
        while "fedrun: resuming from step" not in log.read_text():
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        rounds(tmp_path / "run", 8, log)
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
    assert found.step == outcome.read_outcome(tmp_path / "run")["step"] >= 8


def rounds(run_dir: Path, number: int, log: Path) -> None:
    """Wait until a run has recorded this round."""
    deadline = time.monotonic() + 60
    while f'"round": {number},' not in ((run_dir / "events.jsonl").read_text()
                                        if (run_dir / "events.jsonl").exists() else ""):
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)
