"""Whole runs with --dp client: the same bits in any number of processes and after a kill, at no
further cost; what is changed is charged; --max_epsilon."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from fedrun.privacy.accountant import gaussian_epsilon
from fedrun.records.run_files import LOCK, manifest_checksum
from fedrun.secure.ledger import Ledger, Release
from fedrun.start import RunRefused
from tests.support.private import PRIVATE, releases, run_private
from tests.support.runs import (
    FAULTY,
    Run,
    assert_equal,
    error_lines,
    fault,
    read_json,
    without_clocks,
)

FLAGS = (*(part for name, value in PRIVATE.items() for part in (f"--{name}", value)),
         "--num_clients", 4, "--cohort", 2, "--rounds", 4, "--checkpoint_freq", 2)


def epsilon_of(participations: float) -> float:
    """What this many participations cost at noise 1.5 and delta 0.001, by the closed form."""
    return gaussian_epsilon(math.sqrt(participations) / 1.5, 1e-3)


def rounds(folder: Path) -> list[int]:
    return [release[1] for release in releases(folder)]


def test_max_epsilon_ends_a_run_with_a_checkpoint_before_the_round_that_would_pass_it(
        tmp_path: Path, cache_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Each client trains in every second round: the third would be the second of two of them."""
    flags: dict[str, Any] = {"rounds": 8, "max_epsilon": epsilon_of(1) * 1.01, "val_freq": 100}
    run = run_private(tmp_path, cache_dir, **flags)
    assert run.code == 0
    assert rounds(tmp_path) == [1, 2]
    assert "(its next round would pass that)" in caplog.text
    assert f"  epsilon {epsilon_of(1):.4g}  " in caplog.text
    page = (run.run_dir / "privacy.md").read_text()
    assert f"epsilon {flags['max_epsilon']:.3g} at delta" in page
    assert run.outcome["outcome"] == "stopped"
    assert run.outcome["reason"].startswith("--max_epsilon")
    assert [record["global_step"] for record in run.history] == [1, 2], "its model is evaluated"
    assert run.history[-1]["epsilon"] == pytest.approx(epsilon_of(1), rel=1e-6)
    assert (run.run_dir / "checkpoints/step_000002/manifest.json").exists()
    bits = run.bits
    again = run_private(tmp_path, cache_dir, **flags)
    assert (again.code, again.outcome, again.bits) == (0, run.outcome, bits)
    assert rounds(tmp_path) == [1, 2]
    more = run_private(tmp_path, cache_dir, **flags | {"max_epsilon": epsilon_of(2) * 1.01})
    assert more.outcome["reason"].startswith("--max_epsilon"), "it went on as far as that allows"
    assert rounds(tmp_path) == [1, 2, 3, 4]


@pytest.mark.parametrize(("flags", "message"), [
    ({"max_epsilon": 0.5}, "--max_epsilon 0.5: must be more: the first round would bring"),
    ({"dp_noise": 1e-8}, "--dp_noise 1e-08, or what --dp_epsilon leads to: must be larger"),
    ({"dp_dir": "/dev/null/keys"}, "--dp_dir /dev/null/keys: "),
])
def test_a_run_that_cannot_make_a_round_says_so_and_replaces_none(
        flags: dict[str, Any], message: str, tmp_path: Path, cache_dir: Path) -> None:
    earlier = run_private(tmp_path, cache_dir, dp_dir=tmp_path / "of_the_earlier_run")
    assert earlier.code == 0
    left = {path: path.read_bytes() for path in earlier.run_dir.rglob("*")
            if path.is_file() and path.name != LOCK}
    with pytest.raises(RunRefused, match=f"^{re.escape(message)}"):
        run_private(tmp_path, cache_dir, **flags, overwrite=True)
    assert {path: path.read_bytes() for path in left} == left
    assert not releases(tmp_path)


def test_a_key_that_others_can_read_is_refused(tmp_path: Path, cache_dir: Path) -> None:
    (tmp_path / "keys").mkdir(0o700)
    (tmp_path / "keys/noise.key").write_bytes(bytes(32))
    (tmp_path / "keys/noise.key").chmod(0o644)
    with pytest.raises(RunRefused, match=r"noise\.key"):
        run_private(tmp_path, cache_dir)
    assert not releases(tmp_path)


def test_without_cryptography_it_says_what_to_install(
        tmp_path: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fedrun.secure.ledger", None)
    with pytest.raises(RunRefused, match=r"pip install 'fedrun\[secure\]'"):
        run_private(tmp_path, cache_dir)


@pytest.mark.slow
def test_an_edited_run_has_other_noise_and_is_charged_for_all(tmp_path: Path, cache_dir: Path
                                                              ) -> None:
    """A setting is changed everywhere where the folder has it."""
    flags: dict[str, Any] = {"rounds": 4, "checkpoint_freq": 2, "val_freq": 1}
    run = run_private(tmp_path, cache_dir, **flags)
    shutil.rmtree(run.run_dir / "checkpoints/step_000004")
    manifest = run.run_dir / "checkpoints/step_000002/manifest.json"
    for path in (run.run_dir / "config.json", manifest):
        content = read_json(path)
        settings = content["config"] if path == manifest else content
        settings["lr"] = 1e-3
        if path == manifest:
            content["sha256"] = manifest_checksum(content)
        path.write_text(json.dumps(content))
    (run.run_dir / "outcome.json").unlink()
    edited = run_private(tmp_path, cache_dir, **flags, lr=1e-3)
    assert edited.code == 0
    assert rounds(tmp_path) == [1, 2, 3, 4, 3, 4]
    assert len({release[2] for release in releases(tmp_path)}) == 6, "no noise is used twice"
    assert len({release[0] for release in releases(tmp_path)}) == 2
    assert edited.history[-1]["global_step"] == 4
    assert edited.history[-1]["epsilon"] == pytest.approx(epsilon_of(3), rel=1e-6)


@pytest.mark.slow
def test_where_the_cost_cannot_be_written_down_no_sum_is_made(
        tmp_path: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture) -> None:
    def full(_: Ledger, release: Release) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    assert run_private(tmp_path, cache_dir, name="whole").code == 0
    monkeypatch.setattr(Ledger, "record", full)
    assert run_private(tmp_path, cache_dir, lr=1e-3).code == 1
    assert "No space left on device" in caplog.text
    assert "round 1: the noise cannot be drawn, or what it costs not be written" in caplog.text
    assert rounds(tmp_path) == [1, 2]


@pytest.mark.slow
def test_all_ranks_end_where_the_first_worker_has_no_noise(run: Run, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("no folder")
    ended = run("fed_avg", *FLAGS, "--dp_dir", tmp_path / "keys", processes=3, limit=60)
    assert ended.code != 0
    assert "keys" in error_lines(ended.output)[0]


@pytest.mark.slow
def test_all_ranks_end_with_a_line_where_the_noise_does_not_fit_the_grid(run: Run, tmp_path: Path
                                                                         ) -> None:
    ended = run("fed_avg", *FLAGS, "--dp_noise", 1e8, "--dp_dir", tmp_path / "keys", processes=3,
                limit=60)
    assert ended.code == 2
    line = error_lines(ended.output)[0]  # on a busy machine the others say that rank 0 has ended
    assert "--dp_noise 1e+08" in line
    assert "must be smaller" in line


@pytest.mark.slow
def test_the_same_bits_in_1_3_and_5_processes_at_no_further_cost(run: Run, tmp_path: Path) -> None:
    alone = run("fed_avg", *FLAGS, "--dp_dir", tmp_path / "keys", name="alone")
    assert alone.code == 0, alone.output
    before = releases(tmp_path)
    assert rounds(tmp_path) == [1, 2, 3, 4]
    for processes in (3, 5):
        other = run("fed_avg", *FLAGS, "--dp_dir", tmp_path / "keys", processes=processes,
                    name=f"of_{processes}")
        assert other.code == 0, other.output
        assert other.bits == alone.bits
        assert without_clocks(other) == without_clocks(alone)
        assert releases(tmp_path) == before


@pytest.mark.slow
@pytest.mark.parametrize("at", ["reduced:1", *(
    pytest.param(at, marks=pytest.mark.soak) for at in ("reduced:3", "record:4"))])
def test_a_run_that_was_killed_ends_in_the_same_bits_and_log(at: str, run: Run, tmp_path: Path
                                                             ) -> None:
    """Killed before the first checkpoint too. The log is a new one beside the same key."""
    undisturbed = run("fed_avg", *FLAGS, "--dp_dir", tmp_path / "keys", name="undisturbed")
    (tmp_path / "others").mkdir(0o700)
    shutil.copy(tmp_path / "keys/noise.key", tmp_path / "others")
    flags = (*FLAGS, "--dp_dir", tmp_path / "others")
    killed = run("fed_avg", *flags, processes=3, script=FAULTY,
                 env=fault(tmp_path, "kill", at, rank=0 if at.startswith("record") else 1))
    assert killed.code != 0
    resumed = run("fed_avg", *flags, processes=2)
    assert_equal(resumed, undisturbed)
    first, second = ((tmp_path / name / "privacy.log").read_bytes() for name in ("keys", "others"))
    assert first == second


@pytest.mark.slow
def test_a_copied_folder_costs_nothing_but_with_other_text(run: Run, tmp_path: Path) -> None:
    flags = (*FLAGS, "--dp_dir", tmp_path / "keys")
    whole = run("fed_avg", *flags, name="whole")
    shutil.copytree(whole.run_dir, tmp_path / "copied")
    shutil.rmtree(tmp_path / "copied/checkpoints/step_000004")
    (tmp_path / "copied/outcome.json").unlink()
    before = releases(tmp_path)
    copied = run("fed_avg", *flags, name="copied")
    assert copied.bits == whole.bits
    assert releases(tmp_path) == before
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"Line {n} of another text, {n * n}." for n in range(4000)))
    other = run("fed_avg", *flags, "--dataset", text, "--overwrite", name="copied")
    assert other.code == 0, other.output
    added = releases(tmp_path)[4:]
    assert [release[1] for release in added] == [1, 2, 3, 4]
    assert not {release[2] for release in added} & {release[2] for release in before}
    assert len({release[3] for release in releases(tmp_path)}) == 2, "two texts"


@pytest.mark.slow
def test_a_longer_run_is_the_shorter_one_and_more_but_for_an_epsilon(run: Run, tmp_path: Path
                                                                     ) -> None:
    flags = (*FLAGS, "--dp_dir", tmp_path / "keys")
    whole = run("fed_avg", *flags, name="whole")
    run("fed_avg", *flags, "--rounds", 2, name="extended")
    assert run("fed_avg", *flags, name="extended").bits == whole.bits
    assert rounds(tmp_path) == [1, 2, 3, 4]
    at = FLAGS.index("--dp_noise")
    planned = (*FLAGS[:at], "--dp_epsilon", 8, *FLAGS[at + 2:], "--dp_dir", tmp_path / "keys")
    short = run("fed_avg", *planned, "--rounds", 2, name="planned")
    assert 7.98 < short.history[-1]["epsilon"] <= 8
    longer = run("fed_avg", *planned, name="planned")
    assert longer.code == 2
    assert "--dp_epsilon 8: the run would come to epsilon" in error_lines(longer.output)[0]


@pytest.mark.slow
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
    assert f"epsilon {made.history[-1]['epsilon']:.1f}" in made.output
    frame = OpenedRun(made.run_dir).history.frame()
    assert "train_ppl" not in frame
    assert {"epsilon", "snr", "snr_total"} <= set(frame)
