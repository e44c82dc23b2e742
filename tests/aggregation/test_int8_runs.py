"""Runs with --aggregation int8: the same bits in every world, killed and resumed, fewer bytes."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fedrun.aggregation.int8 import BLOCK
from fedrun.federation import replicas
from fedrun.federation.client import Client
from fedrun.flags import resolve
from fedrun.records.checkpoint import GLOBAL, MANIFEST, write_tensors
from fedrun.records.run_files import manifest_checksum
from tests.support.runs import FAULTY, Run, fault, without_clocks

FLAGS = ("--aggregation", "int8", "--num_clients", 5, "--local_updates", 2, "--rounds", 5)


def test_a_residual_survives_a_round_in_which_its_client_is_left_out(
        run_here: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a residual that is lost would be seen: the final bits depend on it."""
    healthy, residuals_seen = Client.forget, []

    def forget(client: Client) -> None:
        before = client.vectors["residual"].clone()
        healthy(client)
        residuals_seen.append((before, client.vectors["residual"].clone()))

    monkeypatch.setattr(Client, "forget", forget)
    broken_train = Client.train

    def train(client: Client, *args: Any, **kwargs: Any) -> Any:
        losses = broken_train(client, *args, **kwargs)
        if client.index == 1 and client.steps_done > 2:
            client.flat.vector[0] = math.nan
        return losses

    monkeypatch.setattr(Client, "train", train)
    outcome = run_here("fed_avg", "--num_clients", 2, "--rounds", 3, "--aggregation", "int8",
                       "--local_updates", 2)
    assert outcome.code == 0, outcome.output
    assert len(residuals_seen) == 2
    for before, after in residuals_seen:
        assert bool(before.any())
        assert torch.equal(before, after)


@pytest.mark.slow
def test_the_same_bits_in_every_world(run: Run) -> None:
    alone, *many = (run("fed_avg", *FLAGS, processes=n, name=f"in_{n}") for n in (1, 2, 3, 5))
    for other in many:
        assert alone.code == other.code == 0, other.output
        assert alone.bits == other.bits
        assert without_clocks(alone) == without_clocks(other)


def test_a_quarter_of_the_bytes_for_nearly_the_same_model(run: Run) -> None:
    exact = run("fed_avg", *FLAGS, "--aggregation", "exact", name="exact")
    int8 = run("fed_avg", *FLAGS, name="int8")
    size = sum(t.numel() for t in int8.model.values())
    blocks = -(-size // BLOCK)
    assert exact.history[-1]["bytes"] == 5 * 5 * 2 * 4 * (size + 1)
    # A byte an element, two for each block, the sums of weights and of levels.
    assert int8.history[-1]["bytes"] == 5 * 5 * 2 * (BLOCK * blocks + 8 * -(-blocks // 4) + 8)
    assert int8.bits != exact.bits
    assert int8.history[-1]["server_val_loss"] == pytest.approx(
        exact.history[-1]["server_val_loss"], rel=0.02)


@pytest.mark.slow
def test_residuals_and_steps_are_part_of_a_checkpoint(run: Run, tmp_path: Path) -> None:
    flags = (*FLAGS, "--cohort", 3, "--checkpoint_freq", 1)
    alone = run("diloco", *flags, name="alone")
    stopped = run("diloco", *flags, script=FAULTY, env=fault(tmp_path, "term", "record:3"))
    held = [load_file(file) for file in stopped.run_dir.glob("checkpoints/*/client_*")]
    assert sum("residual" in client for client in held) >= 3
    steps = [load_file(file)["int8.steps"] for file in
             sorted(stopped.run_dir.glob("checkpoints/*/global.safetensors"))]
    assert not torch.equal(steps[0], steps[-1])
    resumed = run("diloco", *flags, processes=3)
    assert "resuming from step" in resumed.output
    assert resumed.bits == alone.bits


@pytest.mark.parametrize("aggregation", ["int8", "int4"])
def test_a_checkpoint_without_steps_resumes_with_a_warning(run_here: Run, aggregation: str) -> None:
    """Those made when int8 took a maximum over the clients, and int4 had blocks of 256; residuals
    are still right."""
    flags = ("--aggregation", aggregation, "--num_clients", 3, "--checkpoint_freq", 2)
    first = run_here("fed_avg", *flags, "--rounds", 2)
    whole = run_here("fed_avg", *flags, "--rounds", 4, name="whole")
    made, = first.run_dir.glob("checkpoints/step_*")
    held = load_file(made / GLOBAL)
    if aggregation == "int8":
        del held["int8.steps"]
    else:
        held["int4.steps"] = held["int4.steps"][::4].clone()
    manifest = json.loads((made / MANIFEST).read_text())
    manifest["files"] |= write_tensors(made, {GLOBAL: held})
    (made / MANIFEST).write_text(json.dumps(manifest | {"sha256": manifest_checksum(manifest)}))
    further = run_here("fed_avg", *flags, "--rounds", 4, after=first)
    assert further.code == 0, further.output
    assert further.output.count(f"has no steps for --aggregation {aggregation} as this") == 1
    assert further.bits != whole.bits
    last = [one.history[-1]["server_val_loss"] for one in (further, whole)]
    assert last[0] == pytest.approx(last[1], rel=0.01)


def test_replicas_are_compared_with_their_steps(run_here: Run, monkeypatch: pytest.MonkeyPatch
                                                ) -> None:
    seen: list[set[str]] = []
    healthy = replicas.digests
    monkeypatch.setattr(replicas, "digests",
                        lambda held: seen.append(set(held)) or healthy(held))  # type: ignore[func-returns-value]
    assert run_here("fed_avg", "--aggregation", "int8", "--rounds", 1).code == 0
    assert seen
    assert all("int8.steps" in names for names in seen)


@pytest.mark.parametrize(("method", "flags", "message"), [
    ("fed_fisher", {}, "--aggregation int8: must be exact or float for fed_fisher"),
    ("fed_entropy", {}, "--aggregation int8: must be exact or float for fed_entropy"),
    ("fed_sgd", {}, "--aggregation int8: must be exact or float for fed_sgd"),
    ("fed_avg", {"client_moments": "average"}, "--client_moments average: must be keep, reset, r"),
    ("fed_avg", {"sync": "epoch"}, "--sync epoch: must be round with --aggregation int8"),
    ("fed_avg", {"num_clients": "127"}, "--cohort 127: must be at most 126 clients"),
])
def test_what_eight_bits_cannot_carry_is_refused(method: str, flags: dict[str, str], message: str
                                                 ) -> None:
    with pytest.raises(ValueError, match=message):
        resolve(method, {"aggregation": "int8"} | flags)
