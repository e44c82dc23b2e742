"""A run that is killed or stopped, and started again in the same way, ends with the same bits."""

from __future__ import annotations

import os
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from fedrun.flags import resolve
from fedrun.records import checkpoint
from fedrun.records.outcome import read_outcome
from fedrun.start import prepare_run_dir
from tests.support.prepared import run_ranks
from tests.support.runs import (
    FAULTY,
    FLAGS,
    SMALL,
    Outcome,
    Run,
    assert_equal,
    children_of,
    fault,
    outcome_of,
    start,
    torchrun,
    wait_until,
)


@pytest.mark.parametrize(("method", "flags"), [
    ("central", ("--rounds", 7, "--checkpoint_freq", 1, "--outer_every", 3,
                 "--server_momentum_warmup", "true")),
    *(pytest.param(*case, marks=pytest.mark.slow) for case in [
        ("diloco", (*FLAGS, "--client_moments", "average", "--local_updates", 2,
                    "--server_momentum_warmup", "true")),
        ("fed_avg", (*FLAGS, "--sync", "epoch", "--epoch_passes", 0.01))]),
    *(pytest.param(*case, marks=pytest.mark.soak) for case in [
        ("central", ("--rounds", 7, "--checkpoint_freq", 2)),
        ("fed_fisher", (*FLAGS, "--client_moments", "reset")),
        ("fed_yogi", (*FLAGS, "--sampling", "replacement")),
        ("fed_entropy", FLAGS),
        ("fed_sgd", FLAGS)]),
])
def test_stopped_and_resumed_in_another_world(run: Run, tmp_path: Path, method: str,
                                              flags: tuple[object, ...]) -> None:
    whole = run(method, *flags, name="whole")
    assert whole.code == 0, whole.output
    at = "step:5" if method == "central" else "record:5"
    stopped = run(method, *flags, script=FAULTY, env=fault(tmp_path, "term", at))
    assert stopped.code == 0, stopped.output
    assert "stopped by SIGTERM, after" in stopped.output
    assert outcome_of(stopped) == "stopped"
    last = sorted((stopped.run_dir / "checkpoints").iterdir())[-1].name
    assert last in ("step_000005", "step_000006")  # the signal came while round 5 was recorded
    resumed = run(method, *flags, processes=1 if method == "central" else 3)
    assert resumed.code == 0, resumed.output
    assert f"resuming from step {int(last[5:])}" in resumed.output
    assert_equal(resumed, whole)
    again = run(method, *flags)
    assert again.code == 0
    assert "finished already" in again.output
    assert again.bits == whole.bits


@pytest.mark.parametrize(("rank", "at"), [
    pytest.param(1, "train:3", marks=pytest.mark.slow),
    pytest.param(0, "before-manifest:6", marks=pytest.mark.soak),
    pytest.param(0, "after-manifest:7", marks=pytest.mark.soak)])  # nothing is left to train
def test_killed_and_restarted_in_place(run: Run, tmp_path: Path, undisturbed: Outcome, rank: int,
                                       at: str) -> None:
    """By torchrun --max-restarts."""
    killed = run("fed_avg", *FLAGS, "--overwrite", processes=3, script=FAULTY, restarts=1,
                 env=fault(tmp_path, "kill", at, rank))
    assert killed.code == 0, killed.output
    assert (tmp_path / "struck").exists()
    assert_equal(killed, undisturbed)


@pytest.mark.slow
def test_a_launcher_that_is_killed_leaves_no_orphans(run: Run, tmp_path: Path,
                                                     undisturbed: Outcome) -> None:
    log = tmp_path / "log"
    launcher = start(
        [*torchrun(3), "-m", FAULTY, "fed_avg", *SMALL, *map(str, FLAGS), "--data_dir", tmp_path,
         "--cache_dir", undisturbed.run_dir.parent / "cache", "--run_name", "run"], log,
        fault(tmp_path, "launcher", "reduced:5", 1))
    with children_of(launcher) as children:
        wait_until(lambda: launcher.poll() is not None, 90, log.read_text)
        _, left = psutil.wait_procs(children(), timeout=5)
        assert len(children()) == 3
        assert not left, log.read_text()
    resumed = run("fed_avg", *FLAGS, processes=2)
    assert resumed.code == 0, resumed.output
    assert_equal(resumed, undisturbed)


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory, cache_dir: Path) -> Path:
    """The folder of a run that was killed after its checkpoint of round 6."""
    folder = tmp_path_factory.mktemp("killed")
    code, output = run_ranks(
        1, ["fed_avg", *SMALL, *map(str, FLAGS), "--data_dir", str(folder), "--cache_dir",
            str(cache_dir), "--run_name", "run"], 100, FAULTY,
        fault(folder, "kill", "after-manifest:6"))
    assert code == signal.SIGKILL, output
    checkpoints = folder / "run" / "checkpoints"
    shutil.rmtree(checkpoints / "step_000007", ignore_errors=True)  # half-written, if it was begun
    assert sorted(p.name for p in checkpoints.iterdir()) == ["step_000004", "step_000006"]
    return folder / "run"


@pytest.fixture
def stopped(killed: Path, tmp_path: Path) -> Outcome:
    """A copy of it that a test may resume."""
    shutil.copytree(killed, tmp_path / "run")
    return Outcome(-signal.SIGKILL, "", tmp_path / "run")


@pytest.mark.parametrize("damage", ["flip", "truncate", "no manifest", "no file", "other step"])
def test_a_damaged_checkpoint_is_skipped(stopped: Outcome, damage: str,
                                         caplog: pytest.LogCaptureFixture) -> None:
    folder = stopped.run_dir / "checkpoints" / "step_000006"
    assert checkpoint.read(folder).step == 6
    break_it(folder, damage)
    with pytest.raises(ValueError, match="is invalid"):
        checkpoint.read(folder)
    found = checkpoint.latest_valid(stopped.run_dir)
    assert found is not None
    assert found.step == 4
    assert "step_000006 is invalid" in caplog.messages[0]


def break_it(folder: Path, damage: str) -> None:
    file = folder / "client_1.safetensors"
    if damage == "flip":
        content = bytearray(file.read_bytes())
        content[-1000] ^= 1
        file.write_bytes(content)
    elif damage == "truncate":
        os.truncate(file, file.stat().st_size - 1)
    elif damage == "other step":
        manifest = folder / "manifest.json"
        manifest.write_text(manifest.read_text().replace('"step": 6', '"step": 7'))
    else:
        (file if damage == "no file" else folder / "manifest.json").unlink()


def test_invalid_checkpoints_are_not_thrown_away(run: Run, stopped: Outcome) -> None:
    for step in ("step_000004", "step_000006"):
        break_it(stopped.run_dir / "checkpoints" / step, "truncate")
    refused = run("fed_avg", *FLAGS)
    assert refused.code == 2
    assert "all checkpoints in" in refused.output
    assert "--overwrite starts over" in refused.output
    assert (stopped.run_dir / "model.safetensors").exists()


def test_a_kill_while_the_folder_is_emptied(stopped: Outcome, monkeypatch: pytest.MonkeyPatch
                                            ) -> None:
    """Between any two removals: a run can start from what is left, and it is not a finished run."""
    removals, limit, ready = 0, 0, False

    def counted(remove: Callable[..., Any]) -> Callable[..., Any]:
        def removed(*args: Any, **kwargs: Any) -> Any:
            nonlocal removals
            removals += 1
            if removals > limit:
                raise KeyboardInterrupt
            return remove(*args, **kwargs)
        return removed

    monkeypatch.setattr(shutil, "rmtree", counted(shutil.rmtree))
    monkeypatch.setattr(Path, "unlink", counted(Path.unlink))
    held = stopped.config
    config = resolve("fed_avg", {"data_dir": stopped.run_dir.parent, "run_name": "run"})
    while not ready:
        removals = 0
        try:
            prepare_run_dir(config, None)
            ready = True
        except KeyboardInterrupt:
            assert stopped.config != held
            assert read_outcome(stopped.run_dir)["outcome"] == "running"
            assert checkpoint.latest_valid(stopped.run_dir) is None
            limit += 1
    assert limit > 3
    left = {path.name for path in stopped.run_dir.iterdir()}
    assert left == {"lock", "config.json", "outcome.json"}


@pytest.mark.slow
def test_a_disk_that_is_full_for_a_while(run: Run, tmp_path: Path, undisturbed: Outcome) -> None:
    """What cannot be written at one evaluation is there after the next."""
    script = tmp_path / "full.py"
    script.write_text(
        "import errno, os\nfrom fedrun.records import snapshots\nfrom fedrun.__main__ import main\n"
        "write, calls = snapshots.write_atomic, 0\n"
        "def full(path, *content, **how):\n"
        "    global calls\n"
        "    calls += path.name == 'model.safetensors'\n"
        "    if 2 <= calls <= 3:\n"
        "        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))\n"
        "    write(path, *content, **how)\n"
        "snapshots.write_atomic = full\nmain()\n")
    full = run("fed_avg", *FLAGS, script=script)
    assert full.code == 0, full.output
    assert "round 3 could not be written" in full.output
    assert_equal(full, undisturbed)


def test_a_run_resumes_from_the_checkpoint_before_a_damaged_one(
        run: Run, stopped: Outcome, undisturbed: Outcome) -> None:
    break_it(stopped.run_dir / "checkpoints" / "step_000006", "flip")
    stale = stopped.run_dir / "STOP"  # of an earlier start: ignored
    stale.touch()
    os.utime(stale, (1, 1))
    resumed = run("fed_avg", *FLAGS)
    assert resumed.code == 0, resumed.output
    assert re.search(r"step_000006 is invalid: client_1.* is damaged", resumed.output)
    assert "resuming from step 4" in resumed.output
    assert_equal(resumed, undisturbed)


def test_other_settings_are_refused_with_their_names(run: Run, stopped: Outcome) -> None:
    refused = run("fed_avg", *FLAGS, "--lr", "1e-3")
    assert refused.code == 2
    assert "lr 0.002 there, 0.001 here" in refused.output
    neutral = run("fed_avg", *FLAGS, "--timeout", 100, "--checkpoint_freq", "none")
    assert neutral.code == 0, neutral.output
    assert "resuming from step 6" in neutral.output


@pytest.mark.slow
def test_resume_never_and_from_another_run(run: Run, killed: Path, stopped: Outcome,
                                           undisturbed: Outcome) -> None:
    fresh = run("fed_avg", *FLAGS, "--resume", "never")
    assert "resuming" not in fresh.output
    assert_equal(fresh, undisturbed)
    other = run("fed_avg", *FLAGS, "--resume", "never", "--lr", "1e-3")
    assert other.code == 2
    assert fresh.bits == undisturbed.bits
    finished = run("fed_avg", *FLAGS, processes=3)
    assert "finished already" in finished.output
    shutil.rmtree(fresh.run_dir)
    shutil.copytree(killed, fresh.run_dir)
    branch = run("fed_avg", *FLAGS, "--resume", stopped.run_dir, name="branch")
    assert "resuming from step 6" in branch.output
    assert branch.bits == undisturbed.bits
    exact = run("fed_avg", *FLAGS, "--resume", stopped.run_dir / "checkpoints" / "step_000004",
                name="exact")
    assert "resuming from step 4" in exact.output
    assert exact.bits == undisturbed.bits
    missing = run("fed_avg", *FLAGS, "--resume", stopped.run_dir / "nowhere", name="missing")
    assert missing.code == 2
    assert "--resume" in missing.output


def test_a_full_disk_costs_only_the_checkpoint(run: Run, tmp_path: Path,
                                                           undisturbed: Outcome) -> None:
    """A limit on the size of files, between that of the model and of a client's moments."""
    size = (undisturbed.run_dir / "model.safetensors").stat().st_size * 3 // 2
    script = tmp_path / "limited.py"
    script.write_text(f"import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, ({size},) * 2)\n"
                      "from fedrun.__main__ import main\nmain()\n")
    full = run("fed_avg", *FLAGS, script=script)
    assert full.code == 0, full.output
    assert "step_000002 could not be written" in full.output
    assert "File too large" in full.output
    assert not list((full.run_dir / "checkpoints").glob("*"))
    assert_equal(full, undisturbed)


@pytest.mark.slow
def test_a_folder_that_not_all_ranks_share_is_refused(run: Run, tmp_path: Path) -> None:
    script = tmp_path / "elsewhere.py"
    script.write_text("import os, sys\nimport fedrun.run\nfrom fedrun.__main__ import main\n"
                      "fedrun.run.SECONDS_TO_SEE_A_FILE = 0.5\n"
                      "if os.environ['RANK'] == '2':\n"
                      f"    sys.argv += ['--data_dir', {str(tmp_path / 'local')!r}]\nmain()\n")
    apart = run("fed_avg", *FLAGS, processes=3, script=script)
    assert apart.code == 1
    assert "--data_dir must be on a file system that all machines share" in apart.output
    assert "2: ''" in apart.output, apart.output


@pytest.mark.slow
def test_the_type_of_products_is_one_that_all_workers_have_and_stays(run: Run, tmp_path: Path
                                                                     ) -> None:
    """With --dtype auto, whatever the server's hardware has. A resumed run keeps its type, whatever
    the hardware has by then."""
    script = tmp_path / "hardware.py"
    script.write_text("import os\nimport fedrun.model.hardware\nfrom fedrun.__main__ import main\n"
                      "has = os.environ['HAS_BF16'].split()\n"
                      "fedrun.model.hardware.bf16_in_hardware = (\n"
                      "    lambda _: os.environ.get('RANK', '0') in has)\n"
                      "main()\n")
    workers = run("fed_avg", *FLAGS, "--rounds", 1, "--dtype", "auto", processes=3, script=script,
                  name="workers", env={"HAS_BF16": "1 2"})
    assert workers.code == 0, workers.output
    assert workers.config["dtype"] == "bf16"
    env = fault(tmp_path, "term", "record:4") | {"HAS_BF16": "none"}
    script.write_text(script.read_text().replace(
        "main()\n", "from tests.support import faulty_fedrun\nfaulty_fedrun.__main__.main()\n"))
    begun = run("fed_avg", *FLAGS, "--dtype", "auto", script=script, env=env)
    assert outcome_of(begun) == "stopped", begun.output
    resumed = run("fed_avg", *FLAGS, "--dtype", "auto", script=script, env={**env, "HAS_BF16": "0"})
    assert "resuming from step" in resumed.output, resumed.output
    assert resumed.config["dtype"] == "fp32"
