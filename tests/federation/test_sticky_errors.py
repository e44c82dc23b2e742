"""An error in a CUDA call is the last that a process makes: it is reported as itself, and costs no
model that another worker can send."""

from __future__ import annotations

import pytest

from tests.support.runs import ROOT, Outcome, Run

STICKY = ROOT / "tests" / "support" / "sticky_fedrun.py"
FLAGS = ("--num_clients", 2, "--rounds", 5)


def ended(outcome: Outcome, rank: int) -> None:
    """All ranks have, by one message and one traceback."""
    assert outcome.code == 1
    (line,) = [line for line in outcome.output.splitlines() if line.startswith("fedrun: error: ")]
    assert line == ("fedrun: error: round 3: "
                    f"rank {rank} failed with the error above; all ranks end")
    assert outcome.output.count("Traceback") == 1
    assert "RuntimeError: CUDA error: an illegal memory access was encountered" in outcome.output
    assert outcome.outcome["reason"] == line.removeprefix("fedrun: error: ")
    assert f"the last good model is in {outcome.run_dir / 'model.safetensors'}" in outcome.output


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "rank", "last_good"), [
    (3, 1, 2),  # the first worker, which sends the model else
    pytest.param(3, 2, 2, marks=pytest.mark.soak),
    (1, 0, 1)])  # nobody else has the model of round 2
def test_it_is_reported_as_itself_and_the_last_model_comes_from_another_worker(
        run: Run, processes: int, rank: int, last_good: int) -> None:
    outcome = run("fed_avg", *FLAGS, processes=processes, script=STICKY,
                  env={"STICKY_RANK": str(rank)})
    ended(outcome, rank)
    shorter = run("fed_avg", *FLAGS, "--rounds", last_good, name="shorter")
    assert outcome.bits == shorter.bits


@pytest.mark.slow
def test_a_worker_that_does_not_answer_is_waited_for_only_shortly(run: Run) -> None:
    outcome = run("fed_avg", *FLAGS, processes=3, script=STICKY, launcher=True,
                  env={"STICKY_RANK": "1", "SILENT_RANK": "2"}, limit=90)
    ended(outcome, 1)
    shorter = run("fed_avg", *FLAGS, "--rounds", 1, name="shorter")
    assert outcome.bits == shorter.bits  # which was evaluated
