"""Runs with --aggregation int4: the same bits in every world, killed and resumed, fewer bytes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fedrun.aggregation.int4 import BLOCK
from fedrun.flags import resolve
from tests.support.runs import FAULTY, Run, fault, without_clocks

FLAGS = ("--aggregation", "int4", "--num_clients", 5, "--local_updates", 2, "--rounds", 5)


@pytest.mark.slow
def test_the_same_bits_in_every_world(run: Run) -> None:
    alone, *many = (run("fed_avg", *FLAGS, processes=n, name=f"in_{n}") for n in (1, 3, 5))
    for other in many:
        assert alone.code == other.code == 0, other.output
        assert alone.bits == other.bits
        assert without_clocks(alone) == without_clocks(other)


def test_half_the_bytes_of_int8_for_nearly_the_same_model(run_here: Run) -> None:
    exact, int8, int4 = (run_here("fed_avg", *FLAGS, "--aggregation", kind, name=kind)
                         for kind in ("exact", "int8", "int4"))
    size = sum(t.numel() for t in int4.model.values())
    blocks = -(-size // BLOCK)
    # Half a byte an element each way, a byte or three a block, the sum of the weights.
    assert int4.history[-1]["bytes"] == 5 * 5 * (33 * blocks + 8 + 35 * blocks + 8)
    assert int4.history[-1]["bytes"] < 0.53 * int8.history[-1]["bytes"]
    losses = [one.history[-1]["server_val_loss"] for one in (exact, int8, int4)]
    assert losses[2] == pytest.approx(losses[0], rel=0.02)
    assert losses[2] == pytest.approx(losses[1], rel=0.02)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_both_residuals_are_part_of_a_checkpoint(run: Run, tmp_path: Path) -> None:
    """Also on two machines, of which each has its section alone of what the server keeps; and those
    of averaged moments."""
    flags = (*FLAGS, "--cohort", 3, "--checkpoint_freq", 1, "--client_moments", "average_sqrt",
             "--moments_every", "2,1", "--grad_clip", 1, "--local_optimizer", "muon")
    alone = run("diloco", *flags, name="alone")
    stopped = run("diloco", *flags, script=FAULTY, env=fault(tmp_path, "kill", "record:4"))
    assert stopped.code != 0
    held = [load_file(file) for file in stopped.run_dir.glob("checkpoints/*/client_*")]
    assert sum("residual" in client for client in held) >= 3
    assert sum("residual.momentum" in client for client in held) >= 3
    first, *_, last = (load_file(file) for file in
                       sorted(stopped.run_dir.glob("checkpoints/*/global.safetensors")))
    assert last["int4.residual"].shape == last["model"].shape
    for name in ("int4.residual", "int4.steps", "int4.scales", "moments.momentum"):
        assert not torch.equal(first[name], last[name])
    resumed = run("diloco", *flags, processes=4, limit=200, script="tests.support.two_machines")
    assert resumed.code == 0, resumed.output
    assert "resuming from step" in resumed.output
    assert resumed.bits == alone.bits
    ends = [load_file(one.run_dir / "checkpoints/step_000005/global.safetensors")
            for one in (alone, resumed)]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    assert all(bool(vector.isfinite().all()) for vector in ends[0].values())


@pytest.mark.parametrize(("method", "flags", "message"), [
    ("fed_fisher", {}, "--aggregation int4: must be exact or float for fed_fisher"),
    ("fed_entropy", {}, "--aggregation int4: must be exact or float for fed_entropy"),
    ("fed_sgd", {}, "--aggregation int4: must be exact or float for fed_sgd"),
    ("fed_median", {}, "--aggregation int4: must be exact with fed_median"),
    ("fed_avg", {"client_moments": "average"}, "--client_moments average: must be keep, reset, "
     "reset_epoch, average_sqrt or average_rows with --aggregation int4"),
    ("fed_avg", {"client_moments": "average_sqrt", "grad_clip": "1", "num_clients": "127"},
     "--cohort 127: must be at most 126 clients in a round with --aggregation int4 and averaged"),
    ("fed_avg", {"sync": "epoch"}, "--sync epoch: must be round with --aggregation int4"),
    ("fed_avg", {"num_clients": "4682"}, "--cohort 4682: must be at most 4681 clients"),
])
def test_what_four_bits_cannot_carry_is_refused(method: str, flags: dict[str, str], message: str
                                                ) -> None:
    with pytest.raises(ValueError, match=message):
        resolve(method, {"aggregation": "int4"} | flags)
