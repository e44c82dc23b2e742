"""Whole runs with --dp example: the same bits in any number of processes and after a kill, at no
further cost; what is changed is charged; nothing of the text is written but through noise."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fedrun.federation.private_gradient as module
from fedrun.common.errors import InputError
from fedrun.privacy.accountant import example_epsilon
from fedrun.start import RunRefused
from tests.support.private import EXAMPLE, PRIVATE, releases, run_private
from tests.support.runs import (
    FAULTY,
    Run,
    assert_equal,
    error_lines,
    fault,
    without_clocks,
)

SETTINGS: dict[str, Any] = EXAMPLE | {"batch_size": 16, "dp_delta": "1e-5", "dp_noise": "0.8"}
SMALL_SAMPLES = SETTINGS | {"batch_size": 4}
"""For what does not depend on the size of a sample: each of its sequences takes a gradient."""
FLAGS = (*(part for name, value in (PRIVATE | SMALL_SAMPLES).items()
           for part in (f"--{name}", value)),
         "--num_clients", 4, "--cohort", 2, "--rounds", 4, "--checkpoint_freq", 2,
         "--local_updates", 2)


def rounds(folder: Path) -> list[int]:
    return [release[1] for release in releases(folder)]


def test_a_run_writes_no_losses_and_says_what_it_cost(
        tmp_path: Path, cache_dir: Path, caplog: pytest.LogCaptureFixture,
        monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, sample = list[int](), module.poisson_sample

    def counted(*args: Any) -> np.ndarray:
        found = sample(*args)
        sizes.append(len(found))
        return found

    monkeypatch.setattr(module, "poisson_sample", counted)
    run = run_private(tmp_path, cache_dir, **SETTINGS, val_freq=1, local_updates=3)
    assert run.code == 0
    assert len(sizes) == 2 * 2 * 3
    assert len(set(sizes)) > 3, "samples have no fixed size"
    assert 8 < np.mean(sizes) < 24
    assert [event["loss"] for record in run.events if record["event"] == "round"
            for event in record["clients"]] == [None] * 4
    written = json.dumps(run.history) + json.dumps(run.events)
    assert "train" not in written.replace("local_training_seconds", "")
    assert "train ppl" not in caplog.text
    (_, (_, _, _, _, unit, cohort, noise, _, steps, _)) = releases(tmp_path)
    assert (unit, len(cohort), noise, steps) == ("sequence", 2, 0.8, 3)
    most = max(rate for release in releases(tmp_path) for rate in release[7])
    epsilon = example_epsilon(0.8, most, 3, 1e-5)
    assert run.history[-1]["epsilon"] == pytest.approx(epsilon, rel=1e-4)
    assert run.history[-1]["snr"] >= 0
    assert all("epsilon" in event for event in run.events if event["event"] == "round")
    assert f"privacy: epsilon {epsilon:.4g} spent at delta 1e-05" in caplog.text
    assert "unit a sequence of 32 tokens, its gradients against zeros; clip 0.5" in caplog.text
    page = (run.run_dir / "privacy.md").read_text()
    for words in (f"epsilon {epsilon:.3g} at delta 1e-05", "| clients, in a round | 4, 2 |",
                  "| steps of a client | 3 at most, in 2 rounds", "| denominator | 16,",
                  "A document is more than a sequence", "Not covered"):
        assert words in page
    bits, known = run.bits, releases(tmp_path)
    again = run_private(tmp_path, cache_dir, name="again", **SETTINGS, val_freq=1, local_updates=3)
    assert again.bits == bits
    assert releases(tmp_path) == known


@pytest.mark.parametrize(("flags", "message"), [
    ({"max_epsilon": 0.01}, "--max_epsilon 0.01: must be more: the first round would bring"),
    ({"dp_noise": 1e-8}, "--dp_noise 1e-08, or what --dp_epsilon leads to: must be larger"),
])
def test_a_run_that_cannot_make_a_round_says_so(
        flags: dict[str, Any], message: str, tmp_path: Path, cache_dir: Path) -> None:
    with pytest.raises(RunRefused, match=f"^{re.escape(message)}"):
        run_private(tmp_path, cache_dir, **(SETTINGS | flags))
    assert not releases(tmp_path)


def test_what_the_shards_do_not_allow_is_refused_before_anything_is_overwritten(
        tmp_path: Path, cache_dir: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.json").write_text("{}")
    with pytest.raises(InputError, match=r"^--dp_delta 0\.01: must be below 1/79"):
        run_private(tmp_path, cache_dir, **SETTINGS | {"dp_delta": 0.01, "overwrite": True})
    assert (tmp_path / "run/config.json").read_text() == "{}"


@pytest.mark.slow
@pytest.mark.parametrize(("method", "flags"), [
    ("fed_avg", {"aggregation": "int8", "weighting": "trained"}), ("fed_sgd", {}),
    ("diloco", {"prox_mu": 0.1, "local_updates": 3, "client_store": "disk"}),
    *(pytest.param("fed_avg", flags, marks=pytest.mark.soak) for flags in (
        {"client_moments": "average", "eval_clients": True}, {"moments_dtype": "bf16"},
        {"local_optimizer": "muon"},
        {"sync": "epoch", "cohort": None, "client_moments": "reset_epoch"}))])
def test_other_methods_go_with_it_and_repeat(method: str, flags: dict[str, Any], tmp_path: Path,
                                             cache_dir: Path) -> None:
    run = run_private(tmp_path, cache_dir, method=method, **(SMALL_SAMPLES | flags))
    assert run.code == 0
    assert run.history[-1]["epsilon"] > 0
    known = releases(tmp_path)
    again = run_private(tmp_path, cache_dir, "again", method, **(SMALL_SAMPLES | flags))
    assert again.bits == run.bits
    assert releases(tmp_path) == known


@pytest.mark.slow
def test_max_epsilon_ends_a_run_with_a_checkpoint_before_the_round_that_would_pass_it(
        tmp_path: Path, cache_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Each client trains in every second round: the third would be the second of two of them."""
    limit = example_epsilon(0.8, 16 / 793, 1, 1e-5) * 1.01
    run = run_private(tmp_path, cache_dir, **SETTINGS, rounds=8, max_epsilon=limit, val_freq=100)
    assert run.code == 0
    assert rounds(tmp_path) == [1, 2]
    assert "(its next round would pass that)" in caplog.text
    assert run.outcome["reason"].startswith("--max_epsilon")
    assert [record["global_step"] for record in run.history] == [1, 2]
    assert (run.run_dir / "checkpoints/step_000002/manifest.json").exists()


@pytest.mark.timeout(400)
@pytest.mark.slow
def test_the_same_bits_in_1_3_and_5_processes_at_no_further_cost(run: Run, tmp_path: Path) -> None:
    alone = run("fed_avg", *FLAGS, "--dp_dir", tmp_path / "keys", name="alone")
    assert alone.code == 0, alone.output
    before = releases(tmp_path)
    assert rounds(tmp_path) == [1, 2, 3, 4]
    for processes in (3, 5):
        other = run("fed_avg", *FLAGS, "--dp_dir", tmp_path / "keys", processes=processes,
                    name=f"of_{processes}", limit=300)
        assert other.code == 0, other.output
        assert other.bits == alone.bits
        assert without_clocks(other) == without_clocks(alone)
        assert releases(tmp_path) == before


@pytest.mark.timeout(400)
@pytest.mark.slow
@pytest.mark.soak
@pytest.mark.parametrize("at", ["reduced:1", "reduced:3", "record:4"])
def test_a_run_that_was_killed_ends_in_the_same_bits_and_log(at: str, run: Run, tmp_path: Path
                                                             ) -> None:
    """Killed before the first checkpoint too. The log is a new one beside the same key."""
    undisturbed = run("fed_avg", *FLAGS, "--dp_dir", tmp_path / "keys", name="undisturbed")
    (tmp_path / "others").mkdir(0o700)
    shutil.copy(tmp_path / "keys/noise.key", tmp_path / "others")
    flags = (*FLAGS, "--dp_dir", tmp_path / "others")
    killed = run("fed_avg", *flags, processes=3, script=FAULTY, limit=300,
                 env=fault(tmp_path, "kill", at, rank=0 if at.startswith("record") else 1))
    assert killed.code != 0
    resumed = run("fed_avg", *flags, processes=2, limit=300)
    assert_equal(resumed, undisturbed)
    first, second = ((tmp_path / name / "privacy.log").read_bytes() for name in ("keys", "others"))
    assert first == second


@pytest.mark.slow
def test_other_settings_or_text_draw_afresh_and_are_charged(run: Run, tmp_path: Path) -> None:
    flags = (*FLAGS, "--dp_dir", tmp_path / "keys")
    whole = run("fed_avg", *flags, name="whole")
    before = releases(tmp_path)
    shutil.copytree(whole.run_dir, tmp_path / "copied")
    shutil.rmtree(tmp_path / "copied/checkpoints/step_000004")
    (tmp_path / "copied/outcome.json").unlink()
    assert run("fed_avg", *flags, name="copied").bits == whole.bits
    assert releases(tmp_path) == before, "a copy costs nothing"
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"Line {n} of another text, {n * n}." for n in range(4000)))
    for changed in (("--dataset", text), ("--seed", 5)):
        count = len(releases(tmp_path))
        other = run("fed_avg", *flags, *changed, "--overwrite", name="copied")
        assert other.code == 0, other.output
        added = releases(tmp_path)[count:]
        assert [release[1] for release in added] == [1, 2, 3, 4]
    assert len({release[2] for release in releases(tmp_path)}) == 12, "no noise is used twice"


@pytest.mark.slow
def test_noise_for_an_epsilon_comes_to_it(run: Run, tmp_path: Path) -> None:
    at = FLAGS.index("--dp_noise")
    planned = (*FLAGS[:at], "--dp_epsilon", 2, *FLAGS[at + 2:], "--batch_size", 16, "--dp_dir",
               tmp_path / "keys")
    made = run("fed_avg", *planned, name="planned")
    assert 1.9 < made.history[-1]["epsilon"] <= 2
    longer = run("fed_avg", *planned, "--rounds", 8, name="planned")
    assert longer.code == 2
    assert "--dp_epsilon 2: the run would come to epsilon" in error_lines(longer.output)[0]


@pytest.mark.slow
@pytest.mark.soak
def test_pages_and_figures_do_without_what_is_not_shown(run: Run, tmp_path: Path) -> None:
    from fedrun import cli
    from fedrun.library.opened_run import Run as OpenedRun

    made = run("fed_avg", *FLAGS, "--dp_dir", tmp_path / "keys", "--track", "tensorboard")
    assert made.code == 0, made.output
    for argv in (["watch", str(made.run_dir), "--once"],
                 ["plot", "perplexities", "--data_dir", str(tmp_path), "--out_dir",
                  str(tmp_path / "figures")],
                 ["report", "--data_dir", str(tmp_path)]):
        assert cli.main(argv) == 0, argv
    frame = OpenedRun(made.run_dir).history.frame()
    assert "train_ppl" not in frame
    assert {"epsilon", "snr"} <= set(frame)
