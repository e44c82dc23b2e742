"""Sites with several worker processes, and sites that cannot start."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedrun.data.sites import IDENTITY
from fedrun.federation.site_keys import JOURNAL
from tests.support.real_sites import Institutions
from tests.support.runs import assert_equal, error_lines

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def institutions() -> Iterator[Institutions]:
    """In a folder that other users can reach, which those of pytest are not."""
    with tempfile.TemporaryDirectory(prefix="fedrun-sites-") as folder:
        yield Institutions(Path(folder))


@pytest.mark.parametrize("flags", [(), ("--aggregation", "int8", "--client_store", "disk")])
def test_two_workers_at_a_site_end_in_the_bits_of_one_process(
        institutions: Institutions, flags: tuple[str, ...]) -> None:
    """Saved by two workers of north, and taken up by one of each site."""
    more = ("--checkpoint_freq", 2, "--secure_sum", "true", *flags)
    name = f"workers{len(flags)}"
    run = institutions.train(*more, "--rounds", 4, name=name, ranks=(
        "north", "south", "north", "east"))
    assert run.server.code == 0, "\n".join(run.printed)
    assert len((institutions.root / "north" / "site" / JOURNAL).read_text().splitlines()) >= 4
    placed = json.loads((run.server.run_dir / "environment.json").read_text())["workers"]
    assert [worker["host"] for worker in placed][:2] == ["north", "south"]
    longer = institutions.train(*more, "--rounds", 6, name=name)
    assert longer.server.code == 0, "\n".join(longer.printed)
    simulated = institutions.simulate(*more, "--rounds", 6, name=f"alone{len(flags)}")
    assert simulated.code == 0, simulated.output
    assert_equal(longer.server, simulated)


def test_a_site_that_cannot_start_is_named_to_those_that_wait(institutions: Institutions) -> None:
    key, other = (institutions.root / name / "site" / IDENTITY for name in ("south", "east"))
    before = key.read_bytes()
    key.write_bytes(other.read_bytes())
    began = time.monotonic()
    try:
        run = institutions.train(name="another key")
    finally:
        key.write_bytes(before)
    assert time.monotonic() - began < 50, "the time to start is one minute"
    assert "its key is not the one of south" in error_lines(run.printed[2])[-1]
    for rank in (0, 1, 3):
        line, = error_lines(run.printed[rank])
        assert "site south: a setting or a package does not work there" in line
        assert str(institutions.root) not in line
