"""The processes that make a study together: what each takes, and how they stop or are lost."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path

import psutil
import pytest

from fedrun.config import RunConfig
from fedrun.distributed.launch import Launch
from fedrun.flags import resolve
from fedrun.tools import study_queue
from fedrun.tools.study_devices import places, remark, visible_gpus
from fedrun.tools.study_process import Children
from fedrun.tools.study_queue import Member, Stopped
from tests.support.runs import (
    ROOT,
    alive,
    children_of,
    fresh_python,
    read_history,
    read_json,
    start,
    suspended,
    torchrun,
    wait_until,
)
from tests.support.studies import change, little_study

ONE, SECOND_OF_TWO, LAST_OF_FOUR = Launch(), Launch(1, 2, 1, 2), Launch(3, 4, 3, 4)
ON_NODE_2 = Launch(5, 8, 1, 4, on_first_node=False)


@pytest.mark.parametrize(("launch", "jobs", "variable", "count", "workers", "wanted"), [
    # CUDA_VISIBLE_DEVICES is not set
    (ONE, 1, None, 0, 1, [None]),
    (ONE, 3, None, 0, 2, [None, None, None]),
    (ONE, 1, None, 4, 1, ["0"]),
    (ONE, 4, None, 4, 1, ["0", "1", "2", "3"]),
    (SECOND_OF_TWO, 2, None, 4, 1, ["2", "3"]),
    (LAST_OF_FOUR, 1, None, 8, 1, ["3"]),
    (ON_NODE_2, 1, None, 4, 1, ["1"]),
    # groups
    (ONE, 2, None, 4, 2, ["0,1", "2,3"]),
    (SECOND_OF_TWO, 1, None, 8, 4, ["4,5,6,7"]),
    (SECOND_OF_TWO, 1, "2,5,6,7", 8, 2, ["6,7"]),
    (ONE, 1, None, 3, 2, ["0,1"]),
    # it is
    (ONE, 2, "2,5", 8, 1, ["2", "5"]),
    (SECOND_OF_TWO, 1, "2, 5", 8, 1, ["5"]),
    (SECOND_OF_TWO, 1, "GPU-8932f937,MIG-4a", 8, 1, ["MIG-4a"]),
    (ONE, 2, "", 8, 1, [None, None]),
    (ONE, 1, "-1", 8, 1, [None]),
    (ONE, 1, "NoDevFiles", 8, 1, [None]),
    (ONE, 2, "3,-1,5", 8, 1, ["3", "3"]),
    # one visible GPU a task, renumbered or not, or one group
    (LAST_OF_FOUR, 1, "0", 1, 1, ["0"]),
    (LAST_OF_FOUR, 1, "3", 8, 1, ["3"]),
    (LAST_OF_FOUR, 1, "0,1", 2, 2, ["0,1"]),
    # fewer GPUs than runs
    (ONE, 3, None, 2, 1, ["0", "1", "0"]),
    (Launch(2, 3, 2, 3), 1, None, 2, 1, ["0"]),
])
def test_each_run_has_its_own_gpus(launch: Launch, jobs: int, variable: str | None, count: int,
                                   workers: int, wanted: list[str | None]) -> None:
    env = {} if variable is None else {"CUDA_VISIBLE_DEVICES": variable}
    assert places(launch, jobs, visible_gpus(env, lambda: count), workers) == wanted


def test_too_few_gpus_idle_ones_and_shared_ones_are_named() -> None:
    with pytest.raises(ValueError, match="--workers 4: must be at most 2, the number of GPUs"):
        places(ONE, 1, ["0", "1"], 4)
    four = ["0", "1", "2", "3"]
    assert "3 of 4 GPUs are idle" in remark(ONE, 1, four, 1)
    assert "2 of 4 GPUs are idle" in remark(ONE, 1, four, 2)
    assert remark(ONE, 3, ["0", "1"], 1) == "3 runs at a time share 2 GPUs"
    assert remark(Launch(0, 3, 0, 3), 1, ["0", "1"], 1) == "3 runs at a time share 2 GPUs"
    for launch, jobs, visible, workers in (
            (ONE, 2, four, 2), (ONE, 4, [], 1), (LAST_OF_FOUR, 1, four, 1), (ONE, 1, four[:3], 2),
            (LAST_OF_FOUR, 1, ["0"], 1)):  # perhaps a GPU of its own
        assert not remark(launch, jobs, visible, workers)


def test_devices_are_chosen_without_torch() -> None:
    assert fresh_python("import sys, fedrun.tools.study_devices; print('torch' in sys.modules)"
                        ) == "False\n"


def test_a_stop_file_stops_a_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def begin(config: RunConfig, gpus: str | None, children: Children) -> None:
        asked.append("the STOP file")
        wait_until(lambda: bool(children.stopped_by), 10)

    monkeypatch.setattr(study_queue, "start", begin)
    member = Member(tmp_path, [None], asked_to_stop_by=lambda: "".join(asked))
    configs = [resolve("central", {"data_dir": tmp_path / "runs", "run_name": name})
               for name in ("a", "b")]
    with pytest.raises(Stopped, match="stopped by the STOP file: 0 unfinished runs") as caught:
        study_queue.run_all(member, configs)
    assert caught.value.code == 0
    assert len(asked) == 1


def two_long_runs(tmp_path: Path, cache_dir: Path) -> tuple[Path, list[Path]]:
    """A study's file, and the folders that its runs will have."""
    path = little_study(tmp_path, cache_dir)
    change(path, {"checkpoint_freq": 20, "device": "cpu"}, report_seeds=[],
           extensions=0, grid={"lr": [1e-3]}, settings={
               "central": {"method": "central", "rounds": 600},
               "one": {"method": "fed_avg", "num_clients": 1, "rounds": 400}})
    return path, [tmp_path / "little" / "runs" / f"{name}_lr_0.001_seed_0"
                  for name in ("central", "one")]


def steps(run_dir: Path) -> int:
    """How many steps or rounds a run has made."""
    events = run_dir / "events.jsonl"
    return events.read_bytes().count(b'"seconds"') if events.exists() else 0


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="orphans are ended by Linux's kernel")
@pytest.mark.timeout(280)
def test_a_study_that_is_stopped_killed_and_joined(tmp_path: Path, cache_dir: Path) -> None:
    path, (central, one) = two_long_runs(tmp_path, cache_dir)
    arguments = ["study", str(path), "--results", str(tmp_path)]
    log = tmp_path / "first.log"
    first = start([ROOT / "launch" / "run.sh", *arguments], log, {"PYTHON": sys.executable})
    with children_of(first):
        wait_until(lambda: steps(central) > 5, 60, log.read_text)
        family = psutil.Process(first.pid).children(recursive=True)
        first.send_signal(signal.SIGTERM)
        assert first.wait(20) == 0, log.read_text()
        assert not any(map(alive, family))
    said = log.read_text().splitlines()
    assert "Traceback" not in log.read_text()
    assert said[-2:] == ["fedrun: warning: study: stopped by SIGTERM: 1 unfinished run has a "
                         "checkpoint; the same command resumes the study",
                         "launch: stopped in order; the same command resumes it"]
    assert read_json(central / "outcome.json")["outcome"] == "stopped"
    assert list(central.glob("checkpoints/step_*"))

    # Two processes share the rest. One is killed, its run is killed with it, and the other takes
    # that run up.
    command = [sys.executable, "-m", "fedrun", *arguments]
    before = steps(central)
    logs = [tmp_path / f"{name}.log" for name in ("second", "third")]
    second = start(command, logs[0])
    with children_of(second) as children:
        wait_until(lambda: steps(central) > before, 60, logs[0].read_text)
        (in_hand,) = children()
        with suspended(in_hand):
            third = start(command, logs[1])
            with children_of(third):
                wait_until(lambda: steps(one) > 1, 90, logs[1].read_text)
                assert steps(central) < 600
                second.kill()
                wait_until(lambda: not alive(in_hand), 5)
                assert third.wait(90) == 0, logs[1].read_text()
    assert "central_lr_0.001_seed_0" in logs[1].read_text()
    assert "resumed from step" in logs[1].read_text()
    assert len(read_history(central)) == 2
    assert not list((tmp_path / "little" / "runs").glob("*/checkpoints"))
    rows = json.loads((tmp_path / "little" / "table.json").read_text())
    assert {row["setting"] for row in rows} == {"central", "one"}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="orphans are ended by Linux's kernel")
@pytest.mark.timeout(240)
def test_processes_of_torchrun_share_a_study_and_one_is_lost(tmp_path: Path, cache_dir: Path
                                                             ) -> None:
    """Each takes a run, one of them with ranks of its own."""
    path, (central, _) = two_long_runs(tmp_path, cache_dir)
    change(path, {}, workers=2, settings={
        "central": {"method": "central", "rounds": 600},
        "two": {"method": "fed_avg", "num_clients": 2, "rounds": 300}})
    two = central.with_name("two_lr_0.001_seed_0")
    log = tmp_path / "log"
    launcher = start([*torchrun(2, restarts=1), "-m", "fedrun", "study", str(path), "--results",
                      str(tmp_path)], log)
    with children_of(launcher) as members:
        wait_until(lambda: steps(central) > 25, 90, log.read_text)
        (alone,) = (run for member in members() for run in member.children()
                    if "fedrun.torchrun" not in run.cmdline())
        with suspended(alone):
            wait_until(lambda: steps(two) > 25, 90, log.read_text)
        assert steps(central) < 600
        (lost,) = (member for member in members() if member.environ()["RANK"] == "1")
        family = lost.children(recursive=True)
        assert family
        lost.kill()
        wait_until(lambda: not any(map(alive, family)), 10)
        assert launcher.wait(120) == 0, log.read_text()
    said = log.read_text()
    assert "Traceback" not in said
    assert said.count("| setting |") == 1
    assert said.count(", resumed from step ") == 2
    for run_dir, rounds in ((central, 600), (two, 300)):
        assert said.count(f"/2  {run_dir.name}  ") == 1
        numbers = [event.get("round", event.get("step")) for event in map(
            json.loads, (run_dir / "events.jsonl").read_text().splitlines())
            if event["event"] in ("round", "step")]
        assert numbers == list(range(1, rounds + 1))
    assert read_json(two / "environment.json")["processes"] == 3
    assert read_json(central / "environment.json")["processes"] == 1
