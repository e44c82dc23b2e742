"""Which kernels a GPU would run on, by what is installed: packages of empty modules stand in."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fedrun.common.errors import InputError
from fedrun.distributed.launch import Launch
from fedrun.flags import resolve
from fedrun.model import kernels
from fedrun.model.precision import make_deterministic
from fedrun.run import launch_warnings
from fedrun.tools import evaluate
from tests.support.runs import Run

SCAN = "mamba_ssm/ops/triton/ssd_combined.py"
DETERMINISM = "mamba_ssm/utils/determinism.py"
CONVOLUTION = "causal_conv1d/__init__.py"
DETERMINISTIC: Any = torch.utils.deterministic
Install = Callable[[dict[str, str]], None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """install({"package/module.py": source}): what can be imported besides."""
    ours = ("mamba_ssm", "causal_conv1d", "selective_scan_cuda")

    def forget() -> None:
        for name in [*sys.modules]:
            if name.partition(".")[0] in ours:
                del sys.modules[name]
        importlib.invalidate_caches()
        kernels._probe.cache_clear()

    def put(files: dict[str, str]) -> None:
        for name, source in files.items():
            file = tmp_path / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(source)
            for parent in file.relative_to(tmp_path).parents:
                if parent != Path("."):
                    (tmp_path / parent / "__init__.py").touch()
        forget()

    monkeypatch.syspath_prepend(tmp_path)
    forget()
    yield put
    forget()


def warnings() -> list[str]:
    return launch_warnings(resolve("central", {}), Launch(), {})


@pytest.mark.parametrize(("files", "path", "warning"), [
    ({}, "own", "GPUs scan sequences by torch alone, which is slower: mamba-ssm cannot be imported "
     "(ModuleNotFoundError: No module named 'mamba_ssm'; see tests/README.md on GPUs)"),
    ({SCAN: "from sys import Greedy"}, "own",
     "(ImportError: cannot import name 'Greedy' from 'sys' (unknown location); see"),
    ({SCAN: "import sys\nsys.T"}, "own", "(AttributeError: module 'sys' has no attribute 'T'; see"),
    ({SCAN: ""}, "conv1d_and_chunk_scan", ""),
    ({SCAN: "", CONVOLUTION: "import absent_cuda"}, "conv1d_and_chunk_scan",
     "causal-conv1d is installed and cannot be imported (ModuleNotFoundError: No module named "
     "'absent_cuda')"),
    ({SCAN: "", CONVOLUTION: "raise OSError('libcudart.so.12: cannot open')"},
     "conv1d_and_chunk_scan", "(OSError: libcudart.so.12: cannot open)"),
    ({SCAN: "", CONVOLUTION: ""}, "split_conv1d_scan", "")])
def test_what_cannot_be_imported_is_said_in_its_own_words(
        files: dict[str, str], path: str, warning: str, install: Install,
        monkeypatch: pytest.MonkeyPatch) -> None:
    install(files)
    assert kernels.kernel_path("cuda") == f"cuda: {path}"
    assert warnings() == []  # without a GPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert len(warnings()) == bool(warning)
    assert warning in "".join(warnings())


@pytest.fixture
def restored(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What --deterministic and fp32 set is as before again."""
    for name in ("CUBLAS_WORKSPACE_CONFIG", "MAMBA_DETERMINISTIC", "CAUSAL_CONV1D_DETERMINISTIC",
                 "TRITON_F32_DEFAULT", "TRITON_CACHE_AUTOTUNING", "TRITON_AUTOTUNE_BLOCK_SIZE_M"):
        monkeypatch.setenv(name, "7")
    fill, convolutions, products = (DETERMINISTIC.fill_uninitialized_memory,
                                    torch.backends.cudnn.allow_tf32,
                                    torch.backends.cuda.matmul.allow_tf32)
    yield
    torch.use_deterministic_algorithms(False)
    DETERMINISTIC.fill_uninitialized_memory = fill
    torch.backends.cudnn.allow_tf32 = convolutions
    torch.backends.cuda.matmul.allow_tf32 = products


OLD_MAMBA = "--deterministic: .* mamba-ssm, which must be 2.3.0 or newer"


@pytest.mark.usefixtures("restored")
@pytest.mark.parametrize(("files", "refused"), [
    ({}, ""),
    ({SCAN: ""}, OLD_MAMBA),
    ({SCAN: "", DETERMINISM: ""}, ""),
    ({SCAN: "", CONVOLUTION: "__version__ = '1.6.0'"}, OLD_MAMBA),
    ({SCAN: "", DETERMINISM: "", CONVOLUTION: "__version__ = '1.6.0'"}, ""),
    ({SCAN: "", DETERMINISM: "", CONVOLUTION: "__version__ = '1.10.1.post2'"}, ""),
    ({SCAN: "", DETERMINISM: "", CONVOLUTION: "__version__ = '1.5.3'"},
     "--deterministic: .* causal-conv1d 1.5.3, which must be 1.6.0 or newer"),
    ({SCAN: "", DETERMINISM: "", CONVOLUTION: ""}, "causal-conv1d 0, which")])
def test_deterministic_is_refused_where_the_kernels_ignore_it(
        files: dict[str, str], refused: str, install: Install) -> None:
    install(files)
    if refused:
        with pytest.raises(InputError, match=refused):
            make_deterministic(official_kernels=True)
    else:
        make_deterministic(official_kernels=True)
    make_deterministic(official_kernels=False)  # on CPUs, whatever is installed


@pytest.mark.usefixtures("restored")
def test_deterministic_says_so_to_every_library(run_here: Run) -> None:
    """And takes back what would have Triton choose blocks by a timing."""
    outcome = run_here("central", "--rounds", 1, "--deterministic", "true", "--device", "cpu")
    assert outcome.code == 0, outcome.output
    assert torch.are_deterministic_algorithms_enabled()
    assert not DETERMINISTIC.fill_uninitialized_memory
    assert os.environ["MAMBA_DETERMINISTIC"] == os.environ["CAUSAL_CONV1D_DETERMINISTIC"] == "1"
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == "7", "the user's own"
    assert not {"TRITON_CACHE_AUTOTUNING", "TRITON_AUTOTUNE_BLOCK_SIZE_M"} & {*os.environ}


@pytest.mark.usefixtures("restored")
@pytest.mark.parametrize(("dtype", "exact"), [("fp32", True), ("fp64", False)])
def test_fp32_is_not_tf32(dtype: str, exact: bool, run_here: Run) -> None:
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
    outcome = run_here("central", "--rounds", 1, "--dtype", dtype)
    assert outcome.code == 0, outcome.output
    assert (os.environ["TRITON_F32_DEFAULT"] == "ieee") == exact
    assert torch.backends.cudnn.allow_tf32 != exact
    assert torch.backends.cuda.matmul.allow_tf32 != exact
    os.environ["TRITON_F32_DEFAULT"] = "7"
    assert evaluate.main([str(outcome.run_dir), "--cache_dir", outcome.config["cache_dir"]]) == 0
    assert os.environ["TRITON_F32_DEFAULT"] == "ieee"

