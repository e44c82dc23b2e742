"""Ranks of several sites, connected as in a run; what they check is in tests/support/site_ranks."""

from __future__ import annotations

import re
import time

import pytest

from fedrun.common.errors import InputError
from fedrun.distributed.launch import detect
from fedrun.distributed.runtime import connect
from tests.support.handshakes import honest
from tests.support.prepared import run_ranks

PROGRAM = "tests.support.site_ranks"
SLOW = pytest.mark.slow


def ranks(what: str, sizes: str, machines: int = 1) -> tuple[int, str]:
    count = 1 + sum(map(int, sizes.split(",")))
    return run_ranks(count, [what, sizes, str(machines)], 100, PROGRAM)


@pytest.mark.parametrize(("sizes", "machines"), [
    ("2,1,1", 1),
    *(pytest.param(*case, marks=SLOW) for case in (("2,2,2", 2), ("1,1,1,1,1", 1))),
    *(pytest.param(sizes, machines, marks=pytest.mark.soak) for sizes, machines in (
        ("1,1,1", 1), ("1,1,1", 2), ("2,2,2", 1), ("4,2,1", 1), ("4,2,1", 2), ("1,1,1,1,1", 2),
        ("2,2,2,2,2", 1), ("2,2,2,2,2", 2))),
])
def test_sums_over_sites(sizes: str, machines: int) -> None:
    """Masked and plain to the same bits, masked before they are sent, in memory of one site."""
    code, output = ranks("sums", sizes, machines)
    assert code == 0, output
    assert "all the same" in output


def test_a_stranger_gets_neither_plan_nor_model() -> None:
    """Also if it goes on as if it were not refused; all others end within seconds."""
    code, output = ranks("stranger", "1,1,1")
    assert code == 3, output
    lines = re.findall(r"^rank (\d): (the handshake failed: east \(rank 3\): its proof is not "
                       r"signed by ed25519:.*)$", output, re.MULTILINE)
    assert sorted(rank for rank, _ in lines) == ["0", "1", "2", "3"], output
    assert len({line for _, line in lines}) == 1
    assert "stranger was told []: " in output


@SLOW
def test_a_rank_that_never_says_who_it_is() -> None:
    began = time.monotonic()
    code, output = ranks("silent", "1,1,1")
    assert code == 3, output
    for rank in (0, 1, 3):
        line, = re.findall(rf"^rank {rank}: (.*)$", output, re.MULTILINE)
        assert "no answer from rank 2 to rank 0" in line, output
    assert time.monotonic() - began < 60


def test_one_process_is_no_run_of_several_sites() -> None:
    with (pytest.raises(InputError, match=r"^--site_dir: a run of several sites has a process of "),
          connect(detect({}), True, 60, honest(0))):
        pass
