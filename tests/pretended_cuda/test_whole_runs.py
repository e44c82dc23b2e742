"""Whole runs on pretended GPUs: the same bits in any number of processes and with any store.

The reference is a run in one process on one of the same devices. A run on a CPU is none: it splits
its work into other pieces.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.support.every_method import METHODS
from tests.support.runs import (
    FAULTY,
    SMALL,
    Outcome,
    Run,
    execute,
    fault,
    read_json,
    torchrun,
    without_clocks,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(500)]

CLIENTS, ROUNDS = 4, 4
FLAGS = ("--device", "cuda", "--num_clients", CLIENTS, "--rounds", ROUNDS, "--local_updates", 2,
         "--checkpoint_freq", 2)
Gpus = dict[str, str]


@pytest.fixture(scope="module")
def alone(pretended_cuda: Gpus, tmp_path_factory: pytest.TempPathFactory, cache_dir: Path
          ) -> Outcome:
    """FedAvg in one process on one device: what the other layouts are compared with."""
    folder = tmp_path_factory.mktemp("alone")
    code, output = execute([sys.executable, "-m", "fedrun", "fed_avg", *SMALL, *map(str, FLAGS),
                            "--data_dir", str(folder), "--cache_dir", str(cache_dir),
                            "--run_name", "run"], env=pretended_cuda)
    assert code == 0, output
    return Outcome(code, output, folder / "run")


def assert_same(run: Outcome, other: Outcome) -> None:
    assert run.code == other.code == 0, run.output
    assert run.bits == other.bits
    # Beside GPUs a sample text that would delay the run is left out: which are there is chance.
    ours, theirs = ([{k: v for k, v in record.items() if k != "generated"}
                     for record in without_clocks(r)] for r in (run, other))
    assert ours == theirs


def test_one_process_trains_on_its_gpu(alone: Outcome) -> None:
    assert read_json(alone.run_dir / "environment.json")["device"].startswith("cuda")
    assert len(alone.history) > 1
    assert alone.history[-1]["server_val_loss"] < alone.history[0]["server_val_loss"]


@pytest.mark.parametrize(("processes", "flags"), [
    pytest.param(3, (), id="server and 2 GPUs", marks=pytest.mark.soak),
    pytest.param(2, ("--server", "colocated"), id="colocated", marks=pytest.mark.soak),
    pytest.param(1, ("--client_store", "disk"), id="disk store", marks=pytest.mark.soak),
    pytest.param(3, ("--client_store", "disk"), id="disk store, 2 GPUs"),
    pytest.param(9, (), id="server and 8 GPUs", marks=pytest.mark.soak)])
def test_any_layout_has_the_bits_of_one_process(pretended_cuda: Gpus, run: Run, alone: Outcome,
                                                processes: int, flags: tuple[str, ...]) -> None:
    assert_same(run("fed_avg", *FLAGS, *flags, processes=processes, launcher=True,
                    env=pretended_cuda, limit=400), alone)


def test_killed_and_resumed_on_other_gpus(pretended_cuda: Gpus, run: Run, alone: Outcome,
                                          tmp_path: Path) -> None:
    killed = run("fed_avg", *FLAGS, processes=3, script=FAULTY, launcher=True, limit=200,
                 env=pretended_cuda | fault(tmp_path, "kill", "reduce:4", rank=2))
    assert killed.code == 1
    assert (tmp_path / "struck").exists()
    resumed = run("fed_avg", *FLAGS, "--server", "colocated", "--offload", "global", processes=2,
                  launcher=True, env=pretended_cuda, limit=200)
    assert "resuming from step" in resumed.output
    assert_same(resumed, alone)


@pytest.mark.parametrize(("method", "flags"), [
    pytest.param("diloco", ("--aggregation", "int4"), marks=pytest.mark.soak),
    pytest.param("diloco", ("--aggregation", "int8"), marks=pytest.mark.soak),
    pytest.param("fed_avg", ("--client_moments", "average"), marks=pytest.mark.soak),
    pytest.param("fed_avg", ("--client_moments", "average_rows", "--grad_clip", 1, "--aggregation",
                             "int4"), marks=pytest.mark.soak),
    ("fed_avg", ("--client_moments", "average_sqrt", "--grad_clip", 1, "--moments_every", "2,1",
                 "--aggregation", "int8")),
    pytest.param("fed_fisher", ("--client_moments", "reset", "--eval_clients",
                                "--save_client_deltas"), marks=pytest.mark.soak)])
def test_few_bits_and_averaged_moments(pretended_cuda: Gpus, run: Run, method: str,
                                         flags: tuple[object, ...]) -> None:
    one, three = (run(method, *FLAGS, *flags, processes=n, name=f"in{n}", launcher=True,
                      env=pretended_cuda, limit=200) for n in (1, 3))
    assert_same(three, one)


def test_every_method(pretended_cuda: Gpus, tmp_path: Path, cache_dir: Path) -> None:
    shared = [*SMALL, "--cache_dir", str(cache_dir), "--device", "cuda", "--num_clients", "3",
              "--rounds", "2", "--local_updates", "2"]
    for processes in (1, 3):
        code, output = execute(
            [*torchrun(processes), "-m", "tests.support.every_method",
             str(tmp_path / f"in{processes}"), *shared], limit=240, env=pretended_cuda)
        assert code == 0, output
    for name in METHODS:
        one, three = (tmp_path / f"in{n}" / name / "model.safetensors" for n in (1, 3))
        assert one.read_bytes() == three.read_bytes(), name


STUDY = """
reference: central
report_seeds: [1]
extensions: 0
grid: {{lr: [1e-3]}}
base: {base}
settings:
  central: {{method: central, rounds: 2}}
  averaged: {{method: fed_avg, num_clients: 2, rounds: 2}}
"""


def test_a_study_by_two_processes_with_a_gpu_each(pretended_cuda: Gpus, tmp_path: Path,
                                                  cache_dir: Path) -> None:
    base = dict(zip((flag.removeprefix("--") for flag in SMALL[::2]), SMALL[1::2], strict=True))
    del base["lr"]
    file = tmp_path / "little.yaml"
    file.write_text(STUDY.format(base=json.dumps(base | {"device": "cuda",
                                                         "cache_dir": str(cache_dir)})))

    def study(folder: str, processes: int, **env: str) -> set[str]:
        """Run the study there; the devices that it has used."""
        used = tmp_path / f"devices of {folder}"
        used.mkdir()
        code, output = execute([*torchrun(processes), "-m", "fedrun", "study", str(file),
                                "--results", str(tmp_path / folder)], limit=400,
                               env=pretended_cuda | {"PRETENDED_LOG": str(used), **env})
        assert code == 0, output
        return {path.name for path in used.iterdir()}

    assert study("alone", 1) == {"GPU-pretended-0"}
    assert study("shared", 2, CUDA_VISIBLE_DEVICES="2,5") == {"GPU-pretended-2", "GPU-pretended-5"}
    shared, by_one = ({path.parent.name: path.read_bytes() for path in
                       (tmp_path / folder / "little" / "runs").glob("*/model.safetensors")}
                      for folder in ("shared", "alone"))
    assert len(by_one) == 4
    assert shared == by_one
