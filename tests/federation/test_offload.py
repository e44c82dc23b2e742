"""--offload global: the bits of a run without it, and the global state in pinned memory."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest

from tests.support.every_method import METHODS
from tests.support.offloaded import BESIDES
from tests.support.runs import Run, execute

QUICK = ("average", "diloco")
NEXT = ("int8_moments", "int4")


def compared(gpus: dict[str, str], *names: str, limit: float) -> list[dict[str, Any]]:
    """What a process on a pretended GPU finds of these."""
    code, output = execute([sys.executable, "-m", "tests.support.offloaded", "tiny", *names],
                           limit, env=gpus)
    assert code == 0, output
    found = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    assert [one["name"] for one in found] == [*names]
    return found


def check(found: dict[str, Any]) -> None:
    assert found["same"], found
    assert found["without"]["host"] == 0
    pinned, kept = found["with"]["pinned"], found["with"]["kept"]
    assert pinned == [name for name in kept if not name.startswith((
        "int8.", "int4.", "moments.rows"))]


@pytest.mark.parametrize("names", [QUICK, pytest.param(NEXT, marks=pytest.mark.slow)])
def test_same_bits_and_less_memory_on_the_device(pretended_cuda: dict[str, str],
                                                 names: tuple[str, ...]) -> None:
    """By as much as waits on the host, and as the plan says: model and averaged moments, or the
    server's momentum."""
    for found in compared(pretended_cuda, *names, limit=100):
        check(found)
        held, planned, peak = (found["without"][what] - found["with"][what]
                               for what in ("held", "planned", "counted"))
        assert held == planned == found["with"]["host"] > 0, found
        # A thread fetches the next client's state meanwhile, which moves the peak.
        assert peak > 0.5 * planned, found
        assert (found["with"]["planned on the host"] - found["without"]["planned on the host"]
                == found["with"]["host"])


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_same_bits_with_every_method(pretended_cuda: dict[str, str]) -> None:
    others = [name for name in METHODS | BESIDES if name not in QUICK + NEXT]
    for found in compared(pretended_cuda, *others, limit=280):
        check(found)


def test_on_cpus_it_changes_nothing_and_says_so(run_here: Run) -> None:
    flags = ("--num_clients", 2, "--rounds", 2)
    plain, offloaded = run_here("diloco", *flags), run_here("diloco", *flags, "--offload", "global",
                                                            name="offloaded")
    assert plain.code == offloaded.code == 0, offloaded.output
    assert offloaded.bits == plain.bits
    line = "--offload global has no effect on CPUs"
    assert line in offloaded.output
    assert line not in plain.output
