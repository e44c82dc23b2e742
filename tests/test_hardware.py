"""What workers compute on: compared between them, recorded, and deciding the type of the products.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from fedrun import run as run_module
from fedrun.common.errors import InputError
from fedrun.data.tokens import TokenData
from fedrun.experiment import resolve_dtype, versions
from fedrun.flags import resolve
from fedrun.joining import require_alike
from fedrun.model.hardware import Hardware, gpu_versions, hardware
from fedrun.run import compile_in_turn, describe_gpus
from fedrun.start import RunRefused
from tests.support.experiments import experiment_of
from tests.support.runs import Run, read_json

CPU = Hardware("h", "cpu", "x86_64", "cpu: own", True)
H100 = Hardware("h", "cuda:0", "H100", "cuda: own", True, "H100 (compute capability 9.0)",
                {"triton": "3.6", "NCCL": "2.28"})
A100 = dataclasses.replace(H100, host="g", gpu="A100 (compute capability 8.0)")
T4 = dataclasses.replace(H100, host="t", gpu="T4 (compute capability 7.5)", bf16=False)


def experiment(**flags: Any) -> Any:
    tokens = np.zeros((4, 8), dtype=np.uint16)
    return experiment_of(resolve("fed_avg", {"num_clients": 2, "batch_size": 1, "config": "tiny",
                                             "sequence_length": 8} | flags),
                         TokenData(tokens, tokens[:1], 64, {}, Path()))


def test_a_cpu_has_no_versions_of_what_runs_on_gpus() -> None:
    here = hardware(torch.device("cpu"))
    assert here.kernels == "cpu: own"
    assert not here.gpu
    assert not here.versions
    assert set(gpu_versions()) == {"mamba-ssm", "causal-conv1d", "triton", "CUDA", "cuDNN", "NCCL"}


@pytest.mark.parametrize("deterministic", [False, True])
def test_workers_that_are_alike(deterministic: bool, caplog: pytest.LogCaptureFixture) -> None:
    require_alike({1: H100, 2: dataclasses.replace(H100, host="g", device="cuda:1")},
                  deterministic)
    require_alike({0: CPU, 1: dataclasses.replace(CPU, name="other")}, deterministic)
    assert not caplog.messages


@pytest.mark.parametrize(("other", "found"), [
    (A100, "GPU H100 (compute capability 9.0) on ranks 1-2, A100 (compute capability 8.0) on rank "
           "3"),
    (dataclasses.replace(H100, versions={"triton": "3.5", "NCCL": "2.28"}),
     "triton 3.6 on ranks 1-2, 3.5 on rank 3"),
    (dataclasses.replace(H100, versions={"NCCL": "2.27"}),
     "triton 3.6 on ranks 1-2, none on rank 3; NCCL 2.28 on ranks 1-2, 2.27 on rank 3")])
def test_workers_that_differ_are_a_warning_or_under_deterministic_an_error(
        other: Hardware, found: str, caplog: pytest.LogCaptureFixture) -> None:
    workers = {1: H100, 2: H100, 3: other}
    require_alike(workers, deterministic=False)
    assert caplog.messages == [
        f"the workers differ, and with them the last bits of their clients: {found}"]
    with pytest.raises(RunRefused) as refused:
        require_alike(workers, deterministic=True)
    assert f"--deterministic: the workers differ ({found})" in str(refused.value)


def test_workers_with_different_kernels_never_train_together() -> None:
    other = dataclasses.replace(H100, kernels="cuda: split_conv1d_scan")
    with pytest.raises(RunRefused, match="--device: the workers run different kernels: cuda: own "
                                         "on rank 1, cuda: split_conv1d_scan on rank 2"):
        require_alike({1: H100, 2: other}, deterministic=False)


def test_the_workers_decide_what_dtype_auto_is() -> None:
    auto = resolve("fed_avg", {"dtype": "auto"})
    assert resolve_dtype(auto, [H100, A100]) == "bf16"
    assert resolve_dtype(auto, [H100, T4]) == "fp32"
    bf16 = dataclasses.replace(auto, dtype="bf16")
    assert resolve_dtype(bf16, [H100]) == "bf16"
    with pytest.raises(InputError, match="--dtype bf16: t has no hardware"):
        resolve_dtype(bf16, [H100, T4])


def test_a_run_is_made_with_what_its_workers_have() -> None:
    found = experiment().on([H100, A100, H100]).provenance
    assert found["gpu"] == "A100 (compute capability 8.0) / H100 (compute capability 9.0)"
    assert found["kernels"] == "cuda: own"
    assert found["versions"] == versions() | {"triton": "3.6", "NCCL": "2.28"}
    found = experiment().on([CPU]).provenance
    assert found["gpu"] == ""
    assert found["versions"] == versions()


def test_the_line_about_gpus_has_the_version_of_nccl() -> None:
    assert describe_gpus({0: CPU}) == ""
    assert describe_gpus({1: H100, 2: H100}) == (
        "GPUs: 2 x H100 (compute capability 9.0); kernels cuda: own; triton 3.6, NCCL 2.28")


@pytest.mark.parametrize(("rank", "order"), [
    (0, ["wait", "wait"]), (1, ["compile", "wait", "wait"]), (2, ["wait", "compile", "wait"]),
    (3, ["compile", "wait", "wait"]), (4, ["wait", "compile", "wait"])])
def test_one_worker_of_each_machine_compiles_first(rank: int, order: list[str],
                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks 1 and 2 are on the machine of the server, 3 and 4 on another."""
    there = dataclasses.replace(H100, host="g")
    done: list[str] = []
    silences: list[bool] = []
    control = SimpleNamespace(gather=lambda _: done.append("wait"), share=lambda: None,
                              compiling=silences.append)
    runtime: Any = SimpleNamespace(rank=rank, control=control, device=torch.device("cpu"))
    monkeypatch.setattr(run_module, "compile_kernels", lambda *_: done.append("compile"))
    compile_in_turn(experiment(), runtime, {1: H100, 2: H100, 3: there, 4: there})
    assert done == order
    assert silences == [True]  # ended by the protocol, after the first round
    done.clear()
    compile_in_turn(experiment(), runtime, {1: CPU, 2: CPU})
    assert not done


@pytest.mark.slow
def test_a_run_whose_workers_have_gpus(run: Run) -> None:
    """The same bits, though kernels are compiled first and sums polled; and the folder tells of the
    workers, not of the server, which has no GPU."""
    flags = ("--num_clients", 3, "--checkpoint_freq", 1)
    alone = run("fed_avg", *flags, "--rounds", 3, name="alone")
    gpus = {"script": "tests.support.as_if_gpus", "processes": 3}
    found = run("fed_avg", *flags, "--rounds", 3, **gpus, env={"GPU_0": "none", "GPU_1": "A100"})
    assert alone.code == found.code == 0, alone.output + found.output
    assert found.bits == alone.bits
    for line in ("GPUs: 2 x A100 (compute capability 9.0) / H100", "NCCL 2.28.9",
                 "compiling kernels", "GPU A100 (compute capability 9.0) on rank 1, H100 (compute "
                 "capability 9.0) on rank 2"):
        assert line in found.output
    environment = read_json(found.run_dir / "environment.json")
    assert environment["device"] == "cuda"
    assert environment["device_name"] == "A100 / H100"
    assert environment["kernels"] == "cuda: conv1d_and_chunk_scan"
    assert [worker["rank"] for worker in environment["workers"]] == [1, 2]
    for made_with in (environment["made_with"],
                      read_json(found.run_dir / "checkpoints" / "step_000003" / "manifest.json"
                                )["made_with"]):
        assert made_with["kernels"] == "cuda: conv1d_and_chunk_scan"
        assert made_with["gpu"].startswith("A100 (compute capability 9.0) / H100")
        assert made_with["versions"]["NCCL"] == "2.28.9"
    refused = run("fed_avg", *flags, "--rounds", 4, "--deterministic", **gpus,
                  env={"GPU_0": "none", "GPU_1": "A100"})
    assert refused.code == 2
    assert "--deterministic: the workers differ (GPU A100" in refused.output
    further = run("fed_avg", *flags, "--rounds", 4, **gpus, env={"GPU_0": "none"})
    assert further.code == 0, further.output
    assert "the last bits may differ: this run was started with GPU A100" in further.output
    elsewhere = run("fed_avg", *flags, "--rounds", 5)
    assert elsewhere.code == 2
    assert "--device: the kernels of this run was cuda: conv1d_and_chunk_scan" in elsewhere.output


@pytest.mark.slow
def test_a_run_on_pretended_gpus_tells_of_them(run: Run, pretended_cuda: dict[str, str],
                                               tmp_path: Path) -> None:
    """Which its server does not use; and compiled kernels have a folder on the local disk."""
    found = run("fed_avg", "--device", "cuda", "--num_clients", 2, "--rounds", 1, processes=3,
                launcher=True, env=pretended_cuda | {
                    "TMPDIR": str(tmp_path), "TRITON_CACHE_DIR": "", "PRETENDED_GPUS": "2"})
    assert found.code == 0, found.output
    environment = read_json(found.run_dir / "environment.json")
    assert environment["device"] == "cuda"
    assert environment["device_name"] == "pretended GPU"
    assert [worker["device"] for worker in environment["workers"]] == ["cuda:0", "cuda:1"]
    assert environment["made_with"]["kernels"] == environment["kernels"] == "cuda: own"
    assert environment["made_with"]["versions"]["NCCL"] == "2.0.0"
    assert (tmp_path / f"fedrun-triton-{os.getuid()}").is_dir()
