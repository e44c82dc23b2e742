"""Whose fault an error is: users and machines get one line, mistakes of the program a traceback."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedrun import cli
from fedrun.common import errors, locks
from fedrun.common.errors import Diverged, explain, naming
from tests.support.disk import no_space


def raised(call: Callable[[], Any]) -> BaseException:
    with pytest.raises(BaseException) as caught:  # noqa: PT011
        call()
    return caught.value


def from_a_library() -> None:
    try:
        raise no_space("/x/data.arrow")
    except OSError as error:
        raise RuntimeError("An error occurred while generating the dataset") from error


@pytest.mark.parametrize(("call", "line"), [
    (Path("/nowhere/x").read_bytes, "/nowhere/x: No such file or directory"),
    (from_a_library, "/x/data.arrow: No space left on device"),
    (lambda: bytearray(2**62), "not enough memory"),
    (lambda: os.fsync(10**6), "Bad file descriptor"),
    (lambda: cli.parse(["fed_avg", "--lr", "x"]), "--lr x: must be a number"),
    (lambda: int("x"), None),
    (lambda: vars(errors)["x"], None),
    (lambda: locks.acquire(Path("/proc/self/nowhere/lock"), 0), "/proc/self/nowhere: No such file "
     "or directory"),
])
def test_faults_of_users_and_machines_have_a_line_and_ours_have_none(call: Callable[[], Any],
                                                                     line: str | None) -> None:
    assert explain(raised(call)) == line


def test_a_library_that_tells_the_system_s_error_in_words() -> None:
    assert explain(Exception("No space left on device (os error 28)")) == (
        "No space left on device (os error 28)")
    assert explain(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate "
                                "9 bytes")) == (
        "not enough memory: DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 "
        "bytes")


def test_an_error_worded_for_users_is_one_line() -> None:
    assert explain(Diverged("the model is\nno longer finite")) == "the model is no longer finite"


def test_the_line_of_a_disk_names_the_flag_once() -> None:
    with pytest.raises(ValueError, match=r"^--out /o: No space left on device$"), \
            naming("--out", Path("/o")):
        raise no_space("/o")
