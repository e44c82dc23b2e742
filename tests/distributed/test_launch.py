"""How a process knows which rank it is, where it meets the others, and whose restart it is."""

from __future__ import annotations

import os

import pytest

from fedrun.distributed.launch import Launch, detect, rendezvous, without_rank
from fedrun.records import outcome
from fedrun.records.outcome import launch_id
from tests.support.launch_programs import SHELL, STEP, Programs

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
    # torchrun's agents are a SLURM step too, with one task per node
    (STEP | TORCHRUN, Launch(5, 9, 0, 4, on_first_node=False, attempt=2)),
])
def test_rank_and_world_are_read_from_slurms_and_torchruns_variables(
        env: dict[str, str], launch: Launch) -> None:
    assert detect(env) == launch
    alone = without_rank(env | {"MASTER_ADDR": "n1", "MASTER_PORT": "1", "HOME": "/"})
    assert detect(alone) == Launch()
    assert not {"MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK", "SLURM_LOCALID"} & set(alone)
    assert alone["HOME"] == "/"
    assert alone.get("SLURM_JOB_ID") == env.get("SLURM_JOB_ID")


def test_a_missing_rendezvous_address_is_an_error_or_slurms_first_node(
        programs: Programs, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_launch_ids(monkeypatch: pytest.MonkeyPatch) -> None:
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
    assert launch_id() == "slurm 7"
