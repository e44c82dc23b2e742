"""The pretended device behaves as a GPU where it promises to; its build says what it lacks."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.pretended_cuda import build
from tests.support.runs import ROOT, execute, fresh_python, torchrun


def test_the_device(pretended_cuda: dict[str, str]) -> None:
    """In one process, which sticky errors leave without a device."""
    code, output = execute([sys.executable, "-m", "tests.pretended_cuda.device_checks",
                            "memory", "same_values", "mixed_devices", "launches_and_waits",
                            "wide_products", "rms_norm", "sticky_errors"], env=pretended_cuda)
    assert code == 0, output


SEEN = "import torch; print(torch.cuda.device_count(), torch.cuda.is_available(), *(" \
       "torch.cuda.get_device_properties(i).uuid for i in range(torch.cuda.device_count())))"


@pytest.mark.slow
@pytest.mark.parametrize(("chosen", "seen"), [
    ("5,2", "2 True GPU-pretended-5 GPU-pretended-2\n"), ("", "0 False\n")])
def test_devices_are_chosen_by_the_usual_variable(pretended_cuda: dict[str, str], chosen: str,
                                                  seen: str) -> None:
    env = pretended_cuda | {"CUDA_VISIBLE_DEVICES": chosen}
    assert fresh_python(SEEN, env=env) == seen


SUMS = r"""
import os, sys
from datetime import timedelta
import torch
import torch.distributed as dist

rank = int(os.environ["RANK"])
dist.init_process_group("gloo", timeout=timedelta(seconds=30))
device = torch.device("cuda", rank if sys.argv[1] == "own" else 0)
group = dist.new_group([0, 1], backend="nccl", timeout=timedelta(seconds=30))
tensor = torch.full((4,), rank + 1, dtype=torch.int32, device=device)
try:
    dist.all_reduce(tensor, group=group)
    work = dist.all_reduce(tensor, dist.ReduceOp.MAX, group=group, async_op=True)
    while not work.is_completed():
        pass
    dist.all_reduce(torch.ones(1), group=group)
except RuntimeError as error:
    # Whole: print may write a line and its end apart, and two ranks share the output.
    os.write(1, f"{tensor.tolist()} {error}\n".encode())
"""


@pytest.mark.slow
@pytest.mark.parametrize(("devices", "hosts", "found"), [
    ("own", False, "[3, 3, 3, 3] No backend type associated with device type cpu"),
    ("one", False, "Duplicate GPU detected"),
    ("one", True, "[3, 3, 3, 3] No backend type associated with device type cpu")])
def test_nccl_sums_tensors_of_gpus_alone_and_one_rank_has_each(
        pretended_cuda: dict[str, str], tmp_path: Path, devices: str, hosts: bool, found: str
        ) -> None:
    """Two ranks share a GPU only under two host IDs."""
    script = tmp_path / "sums.py"
    host = 'import os; os.environ["NCCL_HOSTID"] = os.environ["RANK"]\n' if hosts else ""
    script.write_text(host + SUMS)
    code, output = execute([*torchrun(2), str(script), devices], env=pretended_cuda)
    assert code == 0, output
    assert output.count(found) == 2, output


def test_a_missing_compiler_or_a_failed_build_says_so(monkeypatch: pytest.MonkeyPatch,
                                                      tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with monkeypatch.context() as without:
        without.setenv("PATH", "")
        with pytest.raises(build.NotHere, match="install g"):
            build.environment()
    compiler = tmp_path / "compiler"
    compiler.write_text("#!/bin/sh\necho 'device.cpp:7: error: no such thing' >&2; exit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    with pytest.raises(RuntimeError, match="no such thing"):
        build.environment()
    assert not list(tmp_path.rglob("device.so"))


def test_the_device_is_built_from_all_its_sources() -> None:
    here = {p for p in (ROOT / "tests/pretended_cuda").iterdir() if p.suffix in (".cpp", ".h")}
    assert here == {*build.SOURCES}
