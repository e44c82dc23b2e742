"""launch/slurm.sbatch and srun on a real SLURM cluster: the same bits as in one process, whatever
happens to the job."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import yaml
from safetensors.torch import load_file

from fedrun.records import checkpoint
from fedrun.records.outcome import read_outcome
from tests.slurm.cluster import Cluster, Job, running_cluster
from tests.support.runs import ROOT, execute, read_json, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(450)]

ROUNDS = 50


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with running_cluster(tmp_path_factory.mktemp("cluster")) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Flags of a run with five clients on a text of a few pages."""
    folder = tmp_path_factory.mktemp("small")
    (folder / "text").mkdir()
    (folder / "text" / "readme.txt").write_text((ROOT / "README.md").read_text())
    return ["--config", "tiny", "--dataset", str(folder / "text"), "--tokenizer", "bpe:300",
            "--sequence_length", "16", "--batch_size", "2", "--lr", "2e-3", "--dtype", "fp32",
            "--device", "cpu", "--num_clients", "5", "--rounds", str(ROUNDS), "--val_freq", "10",
            "--checkpoint_freq", "7", "--cache_dir", str(folder / "cache")]


@pytest.fixture(scope="module")
def undisturbed(flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> str:
    """The hash of the parameters after an undisturbed run in one process."""
    folder = tmp_path_factory.mktemp("alone")
    code, output = execute([sys.executable, "-m", "fedrun", "fed_avg", *flags, "--data_dir",
                            str(folder), "--run_name", "run"])
    assert code == 0, output
    return parameters(folder / "run")


def parameters(run_dir: Path) -> str:
    """A hash of the names and bits of a model's parameters."""
    digest = hashlib.sha256()
    for name, tensor in sorted(load_file(run_dir / "model.safetensors").items()):
        digest.update(name.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


@pytest.fixture
def submit(cluster: Cluster, flags: list[str], tmp_path: Path) -> Callable[..., Job]:
    """submit(options=["--no-requeue"]): a job of launch/slurm.sbatch."""
    run = ("fed_avg", *flags, "--data_dir", tmp_path, "--run_name", "run")

    def submit_it(*words: object, options: tuple[str, ...] = (), **env: str) -> Job:
        output = tmp_path / "slurm.out"
        code, reported = cluster.run(
            "sbatch", "--parsable", f"--output={output}", *options, "launch/slurm.sbatch",
            *(words or run), env={
                "PYTHON": sys.executable, "WORKERS_PER_NODE": "1", "RESTARTS": "2",
                "LOG_DIR": str(tmp_path / "logs"), **env})
        assert code == 0, reported
        return Job(cluster, reported.strip(), output)
    return submit_it


def test_two_nodes_give_the_bits_of_one_process(
        submit: Callable[..., Job], undisturbed: str, tmp_path: Path) -> None:
    job = submit()
    assert job.until_over() == "COMPLETED", job.output
    assert "node 0 of 2" in job.output
    assert "node 1 of 2" in job.output
    assert f"[rank 0] fedrun: round {ROUNDS}/{ROUNDS}" in job.output
    assert "[rank 1]" not in job.output
    assert list((tmp_path / "logs" / "node1").rglob("stderr.log"))
    assert parameters(tmp_path / "run") == undisturbed


def test_a_job_is_requeued_after_a_failure_and_before_its_time_limit(
        cluster: Cluster, submit: Callable[..., Job], undisturbed: str, tmp_path: Path) -> None:
    job = submit()
    job.until_said("round 10/")
    rank(cluster, 2).kill()
    job.until_said("attempt 0: requeued: the run failed; restart 1 of 2")
    job.until_said("round 20/")
    cluster.run("scancel", "--signal=USR2", "--batch", job.number)  # as #SBATCH --signal does
    job.until_said("attempt 1: requeued: stopped for the time limit")
    job.until_said("attempt 2: run folder")
    (tmp_path / "run" / "STOP").write_text(f"{job.number} 1\n")  # for the previous attempt: ignored
    assert job.until_over() == "COMPLETED", job.output
    assert job.output.count("fedrun: resuming from step") == 2
    assert "attempt 2: done: the run has finished" in job.output
    assert parameters(tmp_path / "run") == undisturbed


def test_scancel_leaves_a_checkpoint_and_no_process(
        cluster: Cluster, submit: Callable[..., Job], tmp_path: Path) -> None:
    job = submit()
    job.until_said("round 10/")
    cluster.run("scancel", job.number)
    job.until_said("not requeued: cancelled", 150)
    assert "preempted, or requeued by a user" in job.output, job.output  # not killed by SLURM
    assert job.until_over() == "CANCELLED"
    wait_until(lambda: not cluster.processes(), 5, lambda: str(cluster.processes()))
    found = checkpoint.latest_valid(tmp_path / "run")
    assert found
    outcome = read_outcome(tmp_path / "run")
    assert (outcome["outcome"], outcome["step"]) == ("stopped", found.step)
    assert (outcome["job"], outcome["attempt"]) == (job.number, 0)


def test_without_requeueing_the_remaining_nodes_take_over_the_clients_of_a_lost_one(
        cluster: Cluster, submit: Callable[..., Job], undisturbed: str, tmp_path: Path) -> None:
    job = submit(options=("--no-requeue",))
    job.until_said("round 10/")
    cluster.lose_node(2)
    try:
        assert job.until_over() == "COMPLETED", job.output
    finally:
        cluster.start_node(2)
        cluster.until_idle()
    assert "cannot be requeued: it was submitted with --no-requeue" in job.output
    assert "started again on n1: the run failed; restart 1 of 2 here" in job.output
    assert "node 0 of 1" in job.output
    assert "fedrun: resuming from step" in job.output
    assert parameters(tmp_path / "run") == undisturbed


def test_srun_without_torchrun(cluster: Cluster, flags: list[str], undisturbed: str,
                               tmp_path: Path) -> None:
    code, output = cluster.run(
        "srun", "--nodes=2", "--ntasks=3", "--overcommit", sys.executable, "-m", "fedrun",
        "fed_avg", *flags, "--data_dir", tmp_path, "--run_name", "run", limit=200)
    assert code == 0, output
    assert read_json(tmp_path / "run" / "environment.json")["processes"] == 3
    assert parameters(tmp_path / "run") == undisturbed


@pytest.mark.soak
@pytest.mark.timeout(450)
def test_nodes_share_a_study_and_one_is_lost(
        cluster: Cluster, submit: Callable[..., Job], flags: list[str], tmp_path: Path) -> None:
    base = dict(zip((flag.removeprefix("--") for flag in flags[::2]), flags[1::2], strict=True))
    for name in ("lr", "num_clients", "rounds", "val_freq"):
        del base[name]
    path = tmp_path / "shared.yaml"
    path.write_text(yaml.safe_dump({
        "reference": "central", "grid": {"lr": [1e-3]}, "base": base | {"val_freq": 10**6},
        "settings": {"central": {"method": "central", "rounds": 900},  # outlast the loss
                     "one": {"method": "fed_avg", "rounds": 250},
                     "other": {"method": "fed_momentum", "rounds": 5}}}))
    job = submit("study", path, "--results", tmp_path, options=("--no-requeue",))
    runs = tmp_path / "shared" / "runs"

    def checkpoints() -> int:  # complete ones
        return sum(checkpoint.latest_step(run) is not None for run in runs.glob("*"))

    wait_until(lambda: checkpoints() == 2, 150, lambda: job.output)
    cluster.lose_node(2)
    try:
        assert job.until_over(240) == "COMPLETED", job.output
    finally:
        cluster.start_node(2)
        cluster.until_idle()
    assert "node 1 of 2" in job.output
    # Either before SLURM knows of the loss and ends the step, or in the next one.
    assert job.output.count(", resumed from step ") in (1, 2)
    assert job.output.count("| setting |") == 1
    assert "done: the run has finished" in job.output
    for name in ("central", "one", "other"):
        assert job.output.count(f"/3  {name}_lr_0.001_seed_0  ") == 1


def rank(cluster: Cluster, number: int) -> psutil.Process:
    """The process of a rank of the running job."""
    return next(p for p in cluster.processes() if p.environ().get("RANK") == str(number))
