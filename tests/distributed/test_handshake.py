"""Server and sites prove who they are, on real ranks; see tests/support/handshakes.py."""

from __future__ import annotations

import json
from typing import Any

import pytest

from fedrun.common.errors import InputError
from fedrun.distributed.handshake import Membership, Proof
from tests.support.handshakes import (
    COUNT,
    NAMES,
    RUN,
    SITES,
    WITHHELD,
    cases,
    honest,
    identity_of,
)
from tests.support.prepared import run_ranks


@pytest.fixture(scope="module")
def results() -> dict[str, list[Any]]:
    """What every rank ends with, of each case."""
    code, output = run_ranks(COUNT, [], 90, "tests.support.handshakes")
    assert code == 0, output
    line = next(line for line in output.splitlines() if line.startswith("results "))
    found = json.loads(line.removeprefix("results "))
    assert isinstance(found, dict)
    return found


def test_all_are_accepted(results: dict[str, list[Any]]) -> None:
    leaders = {"north": 1, "south": 2, "east": 3}
    assert results["accepted"] == [[RUN, list(NAMES), leaders]] * COUNT


@pytest.mark.parametrize("name", [name for name, case in cases({}).items() if case.expected])
def test_who_is_refused_is_named_on_all_ranks(results: dict[str, list[Any]], name: str) -> None:
    found = results[name]
    for line in found:
        assert isinstance(line, str), found
        assert cases({})[name].expected in line
        assert line.startswith("the handshake failed: ")
        assert line.isprintable()
        assert line == found[0] or name == WITHHELD


def test_a_rank_with_another_key_than_the_file_says_does_not_start() -> None:
    for name, key in (("north", "south"), ("", "north"), ("mars", "mars")):
        with pytest.raises(InputError, match=r"^--site_dir: its key is not the one of "
                                             f"{name or 'the server'} in the file of the sites.*: "
                                             "`fedrun sites key` prints the one"):
            Proof(identity_of(key), name, SITES, identity_of("").public)


def test_a_proof_shows_no_private_key() -> None:
    assert "Identity object" in repr(honest(1))


def test_members() -> None:
    members = Membership(RUN, ("", "south", "north", "south", "north", "south"), ("north", "south"))
    assert members.workers_of("south") == (1, 3, 5)
    assert list(members.leaders.items()) == [("north", 2), ("south", 1)]
    assert list(Membership(RUN, members.sites).leaders) == ["south", "north"]
    # Two machines, the second with the ranks from 3 on.
    assert [members.host(rank, rank % 3) for rank in range(6)] == [
        "server", "south", "north", "south/2", "north/2", "south/2"]
