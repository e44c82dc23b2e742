"""Errors name the limit of the machine that is too low."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys

import pytest
import torch

from fedrun.common.limits import shortage
from tests.support.runs import ROOT


def limited(limit: int, soft: int, hard: int, code: str) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False,
        timeout=60, preexec_fn=lambda: resource.setrlimit(limit, (soft, hard)))
    return done.returncode, done.stdout + done.stderr


def test_the_limit_of_open_files_is_raised_if_possible_and_else_named() -> None:
    code = ("import resource; from fedrun.common.limits import require_files; require_files(5); "
            "print(resource.getrlimit(resource.RLIMIT_NOFILE))")
    assert limited(resource.RLIMIT_NOFILE, 24, 64, code) == (0, "(40, 64)\n")
    assert limited(resource.RLIMIT_NOFILE, 50, 64, code) == (0, "(50, 64)\n")
    ended, message = limited(resource.RLIMIT_NOFILE, 24, 32, code)
    assert ended == 1
    assert message.endswith("TooLittle: a process may have 32 open files here (`ulimit -n`), but 5 "
                         "processes need 40 each: raise the limit or start fewer\n")


@pytest.mark.parametrize("module", ["fedrun", "fedrun.torchrun"])
def test_too_little_memory_is_named_before_torch_is_loaded(module: str) -> None:
    code = (f"import sys, runpy; sys.argv[1:] = ['fed_avg']; "
            f"runpy.run_module('{module}', run_name='__main__', alter_sys=True)")
    ended, message = limited(resource.RLIMIT_AS, 300 << 20, 300 << 20, code)
    assert ended in (1, 2)
    who = "launch" if "torchrun" in module else "fedrun"
    assert message == (f"{who}: error: a process may have "
                    "300 MiB of memory here (`ulimit -v`), but needs at least 700 MiB to "
                    "start: raise the limit\n")


def test_shortages_are_recognised_by_the_messages_of_libraries() -> None:
    def oserror(number: int) -> OSError:
        return OSError(number, os.strerror(number))

    assert shortage(oserror(errno.EMFILE)).startswith("too many open files; a process may have ")
    assert shortage(oserror(errno.ENOMEM)) == "out of memory: [Errno 12] Cannot allocate memory"
    assert shortage(MemoryError()) == "out of memory: no room for Python itself"
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 50, dtype=torch.uint8)
    assert shortage(caught.value).startswith("out of memory: ")
    assert shortage(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")) == (
        "out of memory: CUDA out of memory. Tried to allocate 2 GiB")
    assert "`ulimit -u`" in shortage(RuntimeError("can't start new thread"))
    assert shortage(ImportError("libtorch_cpu.so: failed to map segment from shared object"))
    for other in (RuntimeError("shape mismatch"), oserror(errno.ENOSPC), KeyError("memory")):
        assert shortage(other) == ""
