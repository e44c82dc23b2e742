"""A finished run is trained further by the same command with a larger --rounds or --n_epochs."""

from __future__ import annotations

import json
import shutil
from typing import Any

import pytest

from fedrun.records import checkpoint
from fedrun.records.outcome import read_outcome, write_outcome
from fedrun.tools.watch import Follower, RunState
from tests.support.runs import Outcome, Run, numbers, outcome_of, steps

VAL_FREQ = ("--val_freq", 3)
FEDERATED = ("--num_clients", 3, *VAL_FREQ)


def states(run: Outcome) -> dict[str, Any]:
    """Checksums of the last checkpoint's files, without the server's totals and history."""
    found = checkpoint.latest_valid(run.run_dir)
    assert found is not None
    return {name: entry for name, entry in found.checksums.items() if name != checkpoint.SERVER}


@pytest.mark.parametrize(("method", "flags"), [
    ("central", VAL_FREQ),
    ("fed_avg", (*FEDERATED, "--cohort", 2, "--client_store", "disk")),
    *(pytest.param(*case, marks=pytest.mark.slow) for case in [
        ("central", (*VAL_FREQ, "--batches", "clients", "--batch_size", 4)),
        ("diloco", (*FEDERATED, "--client_moments", "average", "--warmup", 4)),
        ("fed_avg", (*FEDERATED, "--aggregation", "int8")),
        ("fed_avg", (*FEDERATED, "--sync", "epoch", "--epoch_passes", 0.01)),
        ("fed_entropy", FEDERATED)]),
    *(pytest.param(*case, marks=pytest.mark.soak) for case in [
        ("fed_fisher", (*FEDERATED, "--fisher_floor_mode", "relative")),
        ("fed_yogi", (*FEDERATED, "--sampling", "replacement")),
        ("fed_sgd", (*FEDERATED, "--warmup", 3))]),
])
def test_four_rounds_extended_by_four_have_the_bits_of_eight(
        run_here: Run, method: str, flags: tuple[object, ...]) -> None:
    whole = run_here(method, *flags, "--rounds", 8, name="whole")
    half = run_here(method, *flags, "--rounds", 4, name="half")
    further = run_here(method, *flags, "--rounds", 8, after=half)
    assert further.code == 0, further.output
    assert "resuming from step 4" in further.output
    assert further.bits == whole.bits != half.bits
    assert states(further) == states(whole)  # of every client, and the server
    assert steps(whole) == [1, 3, 6, 8]
    assert steps(further) == [1, 3, 4, 6, 8]  # the fourth was the last one at first
    assert further.history[-1]["val_loss_halves"] == whole.history[-1]["val_loss_halves"]
    assert numbers(further) == list(range(1, 9))
    followed = RunState("run")
    for event in Follower(further.run_dir / "events.jsonl").new():
        followed.update(event)
    assert (followed.number, followed.total, followed.ended) == (8, 8, True)
    assert read_outcome(further.run_dir)["step"] == 8
    assert outcome_of(further) == "finished"
    assert further.config["rounds"] == 8
    again = run_here(method, *flags, "--rounds", 8, after=further)
    assert "finished already" in again.output
    assert again.bits == whole.bits
    fewer = run_here(method, *flags, "--rounds", 5, after=further)
    assert fewer.code == 2
    assert "--rounds 5: " in fewer.output
    assert "is finished after 8 steps, more than 5" in fewer.output
    assert fewer.bits == whole.bits


@pytest.mark.slow
def test_a_run_is_extended_by_epochs_as_by_rounds(run_here: Run) -> None:
    epoch = ("--num_clients", 2, "--epoch_passes", 0.004)
    one = run_here("fed_avg", *epoch, "--n_epochs", 1, name="one")
    rounds = steps(one)[-1]
    two = run_here("fed_avg", *epoch, "--n_epochs", 2, after=one)
    assert two.code == 0, two.output
    assert steps(two)[-1] == 2 * rounds
    same = run_here("fed_avg", *epoch, "--rounds", 2 * rounds, after=two)
    assert "finished already" in same.output
    whole = run_here("fed_avg", *epoch, "--rounds", 2 * rounds, name="whole")
    assert two.bits == whole.bits


@pytest.mark.parametrize("method", ["central",
                                    pytest.param("fed_avg", marks=pytest.mark.slow)])
def test_where_the_schedule_depends_on_the_length_it_has_to_be_asked_for(
        run_here: Run, method: str) -> None:
    flags = ("--lr_schedule", "cosine", "--num_clients", 2)
    half = run_here(method, *flags, "--rounds", 3, name="half")
    refused = run_here(method, *flags, "--rounds", 5, after=half)
    assert refused.code == 2
    message = [line for line in refused.output.splitlines() if "error" in line]
    assert len(message) == 1
    assert "--rounds 5: this run was started with 3 steps" in message[0]
    assert "--extend allows that" in message[0]
    further = run_here(method, *flags, "--rounds", 5, "--extend", after=half)
    assert further.code == 0, further.output
    assert "the result differs from that of one long run" in further.output
    assert steps(further)[-1] == 5
    whole = run_here(method, *flags, "--rounds", 5, name="whole")
    assert further.bits != whole.bits
    again = run_here(method, *flags, "--rounds", 5, after=further)
    assert "finished already" in again.output


def test_a_run_that_kept_no_checkpoint_cannot_be_trained_further(run_here: Run) -> None:
    kept_none = run_here("central", "--rounds", 2, "--checkpoint_freq", "none", name="kept_none")
    assert not (kept_none.run_dir / "checkpoints").exists()
    refused = run_here("central", "--rounds", 3, after=kept_none)
    assert refused.code == 2
    assert "kept no checkpoint (--checkpoint_freq)" in refused.output
    assert refused.bits == kept_none.bits


@pytest.mark.parametrize("method", [pytest.param("central", marks=pytest.mark.slow), "fed_avg"])
def test_a_run_that_was_ended_after_its_last_checkpoint_is_finished_from_it(
        run_here: Run, method: str) -> None:
    """It must not train forever: no round follows the last one."""
    done = run_here(method, "--rounds", 2, name="done")
    root = done.run_dir if method == "central" else done.run_dir / "server"
    parameters = (root / "deltas" / "step_000002.npz").read_bytes()
    write_outcome(done.run_dir, "running", 0)
    (root / "deltas" / "step_000002.npz").unlink()
    history = (done.run_dir / "training_history.json").read_bytes()
    bits = done.bits
    (done.run_dir / "training_history.json").unlink()
    (done.run_dir / "model.safetensors").write_bytes(b"half of it")
    again = run_here(method, "--rounds", 2, after=done)
    assert again.code == 0, again.output
    assert f"done: {again.run_dir}" in again.output
    assert again.bits == bits
    assert json.loads((again.run_dir / "training_history.json").read_bytes()) == json.loads(history)
    root = again.run_dir / root.relative_to(done.run_dir)
    assert (root / "deltas" / "step_000002.npz").read_bytes() == parameters
    assert outcome_of(again) == "finished"
    assert numbers(again) == [1, 2]
    assert '"end"' in (again.run_dir / "events.jsonl").read_text().splitlines()[-1]


def test_a_stop_is_no_end_unless_it_was_evaluated(run_here: Run) -> None:
    """Stopped after its second step: as the last one it would have been evaluated."""
    config = ("central", "--val_freq", 3)
    done = run_here(*config, "--rounds", 4, "--checkpoint_freq", 2, name="done")
    shutil.rmtree(done.run_dir / "checkpoints" / "step_000004")
    write_outcome(done.run_dir, "stopped", 2, "SIGTERM")
    refused = run_here(*config, "--rounds", 2, after=done)
    assert refused.code == 2
    assert "--rounds 2: the run has already done 2 steps" in refused.output
    less = run_here(*config, "--rounds", 1, after=done)
    assert less.code == 2
    assert "is at step 2, more than 1" in less.output
    shorter = run_here(*config, "--rounds", 3, after=done)
    assert shorter.code == 0, shorter.output
    assert steps(shorter) == [1, 3]
    assert shorter.bits == run_here(*config, "--rounds", 3, name="whole").bits
