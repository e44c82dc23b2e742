"""Sites with keys in files."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedrun.secure.identity import Identity
from tests.support.sites import NAMES, MakeSites, Sites


@pytest.fixture
def make_sites(tmp_path: Path) -> MakeSites:
    """A function that makes as many sites as it is asked for."""
    def make(count: int) -> Sites:
        return Sites({name: Identity.create(tmp_path / name) for name in NAMES[:count]})
    return make
