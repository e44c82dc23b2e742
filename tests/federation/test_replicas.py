"""A bit that flips in one worker's replica of the global model ends the run, and is not kept."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from fedrun.distributed.control_plane import ControlPlane
from fedrun.federation import replicas
from fedrun.federation.messages import RoundReport
from fedrun.federation.worker import Worker
from fedrun.records import checkpoint
from tests.support.runs import Outcome, Run, execute, torchrun

FLAGS = ("--num_clients", "3", "--rounds", "5")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1, 2, 77, 1 << 16, 5 * (1 << 16) + 77])
def test_a_digest_sees_every_bit_and_depends_on_no_split(
        dtype: torch.dtype, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    vector = torch.randn(size, generator=torch.Generator().manual_seed(0), dtype=dtype)
    reported = replicas.digest(vector)
    monkeypatch.setitem(replicas._ROWS_AT_ONCE, "cpu", 256)  # as on a GPU
    assert replicas.digest(vector.clone()) == reported
    monkeypatch.undo()
    bits = vector.view(torch.int32)
    for place in {0, size // 2, size - 1}:
        for bit in (1, 1 << 20, -(1 << 31)):
            bits[place] ^= bit
            assert replicas.digest(vector) != reported
            bits[place] ^= bit
    assert replicas.digest(vector) == reported


def test_a_digest_depends_on_the_place() -> None:
    vector = torch.arange(200_000, dtype=torch.float64)
    reported = {replicas.digest(vector)}
    for a, b in ((0, 1), (0, 1 << 15), (5, 199_999)):  # of a row, of a column, of neither
        vector[[a, b]] = vector[[b, a]]
        reported.add(replicas.digest(vector))
    assert len(reported) == 4


NONE = RoundReport()  # of a rank without a replica of its own


def report(model: str, state: str = "s", not_finite: str = "") -> RoundReport:
    return RoundReport(replicas={"model": model, "server.v": state},
                       not_finite=[not_finite] if not_finite else [])


@pytest.mark.parametrize(("reports", "message"), [
    ([NONE, report("a"), report("a"), NONE], ""),
    ([NONE, NONE], ""),
    ([NONE, report("a"), report("b"), report("a")],
     r"\(model\) on rank 2 differs from that on ranks 1, 3: "),
    ([NONE, report("a"), report("a"), report("a", "t"), report("b"), report("a")],
     r"\(model, server\.v\) on rank 3 and rank 4 differs from that on ranks 1, 2, 5: "),
    ([report("a"), report("b")],
     r"on rank 0 and rank 1 differ, and nothing shows which one is right"),
    ([report("a"), report("a", not_finite="model")], r"no longer finite \(model\)"),
])
def test_the_ranks_of_the_minority_are_named(reports: list[RoundReport], message: str) -> None:
    wrong = replicas.compare(reports)
    assert bool(re.search(message, wrong)) if message else not wrong


def test_the_copy_that_is_written_is_compared_too() -> None:
    model = torch.randn(1000)
    reported = [NONE, RoundReport(replicas=replicas.digests({"model": model}))]
    assert replicas.compare(reported, model) == ""
    copy = model.clone()
    copy[5] = -copy[5]
    assert "the copy of the global model that rank 0 received differs from that of rank 1" in (
        replicas.compare(reported, copy))


def test_a_copy_that_differs_is_not_written(run_here: Run, monkeypatch: pytest.MonkeyPatch
                                            ) -> None:
    healthy = ControlPlane.receive_copy

    def faulty(control: ControlPlane, size: int, dtype: torch.dtype) -> torch.Tensor:
        copy = healthy(control, size, dtype)
        if round_of[0] == 3:
            copy.view(torch.int32)[1000] ^= 1 << 20
        return copy

    round_of = seen_rounds(monkeypatch)
    monkeypatch.setattr(ControlPlane, "receive_copy", faulty)
    ended = run_here("fed_avg", *FLAGS)
    assert ended.code == 1
    assert re.search(r"round 3: the copy of the global model that rank 0 received differs",
                     ended.output)
    assert [record["global_step"] for record in ended.history] == [1]
    monkeypatch.setattr(ControlPlane, "receive_copy", healthy)
    assert ended.bits == run_here("fed_avg", *FLAGS, "--rounds", 1, name="first").bits


def seen_rounds(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list whose one element is the round that is under way."""
    current, healthy = [0], Worker.train

    def train(worker: Worker, plan: Any) -> Any:
        current[0] = plan.round
        return healthy(worker, plan)

    monkeypatch.setattr(Worker, "train", train)
    return current


@pytest.fixture(scope="module")
def flipped(tmp_path_factory: pytest.TempPathFactory, little_text: tuple[str, ...]
            ) -> tuple[Path, str]:
    """Where flipped_bit.py's runs are, of a server and three workers that all send; its output."""
    folder = tmp_path_factory.mktemp("flipped")
    code, output = execute([*torchrun(4), "-m", "tests.support.flipped_bit", str(folder),
                            *little_text, *FLAGS], limit=150)
    assert code == 0, output
    return folder, output


@pytest.mark.slow
def test_a_flipped_bit_ends_the_run_and_costs_none(flipped: tuple[Path, str], run_here: Run,
                                                   little_text: tuple[str, ...]) -> None:
    folder, output = flipped
    ended = Outcome(1, output, folder / "model")
    line = next(line for line in output.splitlines() if line.startswith("fedrun: error: round 3: "))
    assert line.startswith("fedrun: error: round 3: the replica of the global model (model) on "
                           "rank 2 differs from that on ranks 1, 3: ")
    assert f"the last good model is in {ended.run_dir / 'model.safetensors'}" in output
    assert "Traceback" not in output
    reported, reason = ended.outcome, line.removeprefix("fedrun: error: ")
    assert (reported["outcome"], reported["reason"]) == ("failed", reason)
    assert [record["global_step"] for record in ended.history] == [1]
    assert ended.bits == run_here("fed_avg", *FLAGS, "--rounds", 1, name="first").bits
    whole = run_here("fed_avg", *FLAGS, name="whole")
    resumed = run_here("fed_avg", *FLAGS, "--data_dir", folder, name="model")
    assert resumed.code == 0, resumed.output
    assert ended.bits == whole.bits


@pytest.mark.slow
def test_flipped_bits_in_state_moments_and_float_sums_are_found(flipped: tuple[Path, str]) -> None:
    folder, output = flipped
    assert re.search(r"round 2: .*\(server\.momentum\) on rank 3 differs", output)
    assert re.search(r"round 3: .*\(moments\.exp_avg_sq\) on rank 1 differs", output)
    assert re.search(r"round 3: .*\(model\) on rank 2 differs", output)
    codes = re.findall(r"(\w+): exit code (\d)", output)
    assert dict(codes) == {"model": "1", "state": "1", "moments": "1", "float": "0",
                           "float_flipped": "1", "ruined": "1"}
    assert re.search(r"round 3: the global model is no longer finite \(model\): --lr may", output)
    kept = [Outcome(1, "", folder / name) for name in ("float_flipped", "ruined")]
    assert kept[0].bits == kept[1].bits  # both of round 1
    assert all(bool(v.isfinite().all()) for v in kept[1].model.values())
    assert not any((step / checkpoint.MANIFEST).exists()
                   for step in (folder / "state" / "checkpoints").iterdir())
