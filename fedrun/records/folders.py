"""Where a process keeps what outlives it.

Of most runs all lies in the run's folder. A site keeps its clients' states in a folder of its own,
which nobody else reads, and has no run's folder at all: that is the server's.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from fedrun.common.errors import InputError
from fedrun.config import RunConfig
from fedrun.data.sites import Site
from fedrun.records.checkpoint import CHECKPOINTS, step_name
from fedrun.records.run_files import CLIENTS

_RUN = re.compile(r"[0-9a-f]{32}")  # a run's id: it comes from the server, and names a folder


@dataclass(frozen=True)
class Folders:
    """The folders of one process."""

    run: Path | None
    """The run's folder; None at a site."""
    states: Path
    """Clients' states in checkpoints, a folder a step."""
    clients: Path
    """Clients' states between their turns, with --client_store disk."""

    @classmethod
    def of(cls, config: RunConfig, site: Site | None = None, run: str = "") -> Folders:
        """site: of a run with sites, what is private here; run: the id of such a run."""
        if site is None or not site.name:
            path = config.run_dir
            return cls(path, path / CHECKPOINTS, path / CLIENTS)
        if not _RUN.fullmatch(run):
            raise InputError(f"the server calls the run {run[:80]!r}, which is not the id of a run")
        assert site.folder is not None, "which a site always has"
        return cls(None, site.folder / "states" / run, site.folder / CLIENTS / run)

    def step(self, step: int) -> Path:
        """The folder of the checkpoint after a global step."""
        return self.states / step_name(step)
