"""A server and its sites in one process, step by step: what each of them writes of a checkpoint,
and what they take up again. Their clients' states and the global state follow from the step."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedrun.config import RunConfig
from fedrun.data.sites import Site
from fedrun.distributed.handshake import Membership
from fedrun.flags import resolve
from fedrun.records.checkpoint import (
    GLOBAL,
    Checkpoint,
    client_file,
    committed_steps,
    step_folders,
    step_of,
)
from fedrun.records.checkpoint_writer import CheckpointCoordinator, CheckpointWriter
from fedrun.records.folders import Folders
from fedrun.records.provenance import Length
from fedrun.records.run_files import manifest_checksum
from fedrun.records.run_lock import release_run_dir
from fedrun.records.site_states import Holdings, SiteStates, Tags
from fedrun.secure.identity import Identity
from fedrun.start import StartDecision, decide_start, prepare_run_dir, run_id

RANKS = ("", "north", "north", "south", "east")
"""The site of each rank; "" for the server."""
CLIENTS = {"north": (0, 1, 2), "south": (3,), "east": (4, 5)}
PROVENANCE: dict[str, Any] = {"versions": {}}


def config_of(root: Path, **changed: str) -> RunConfig:
    return resolve("fed_avg", {"data_dir": str(root / "server"), "run_name": "run", "rounds": "100",
                               "dtype": "fp32", "num_clients": "6", **changed})


def global_state(step: int) -> dict[str, Tensor]:
    """The model and the server's own vector after a step."""
    return {"model": torch.arange(5.0) + step, "server.velocity": torch.full((3,), step).double()}


def client_state(client: int, step: int) -> dict[str, Tensor]:
    return {"steps_done": torch.tensor(step), "adamw.exp_avg": torch.full((4,), client + step / 8)}


def clients_of(rank: int, ranks: tuple[str, ...]) -> list[int]:
    """A site's clients are dealt to its processes in turn."""
    peers = [other for other, site in enumerate(ranks) if site == ranks[rank]]
    return list(CLIENTS[ranks[rank]][peers.index(rank)::len(peers)])


@dataclass
class Start:
    """The processes of one start: of the server, which decides where the run goes on, and of the
    sites. A kill is the end of it: `kill` frees what the end of a process frees."""

    root: Path
    ranks: tuple[str, ...] = RANKS
    texts: Mapping[str, str] = field(default_factory=dict)
    """Digests of the sites' texts, where they are not as ever."""
    flags: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.config = config_of(self.root, **self.flags)
        self.members = Membership(run_id(self.config), self.ranks)
        self.states = {rank: self._states(rank, site) for rank, site in enumerate(self.ranks)
                       if site}
        self.writers = {rank: CheckpointWriter(states.seal) for rank, states in self.states.items()}

    def _states(self, rank: int, site: str) -> SiteStates:
        folder = self.root / site
        folder.mkdir(parents=True, exist_ok=True)
        key = folder / "identity"
        identity = Identity.load(key) if key.exists() else Identity.create(key)
        peers = self.members.workers_of(site)
        return SiteStates(Folders.of(self.config, Site(site, "", folder), self.members.run),
                          identity.tag, self.members.run, "digest of sites.yaml",
                          self.texts.get(site, f"text of {site}"), peers.index(rank), len(peers))

    def holdings(self) -> Holdings:
        reports: list[Tags] = [self.states[rank].held() if site else {}
                               for rank, site in enumerate(self.ranks)]
        return Holdings.of(self.members.run, self.ranks, json.loads(json.dumps(reports)))

    def decide(self) -> StartDecision:
        release_run_dir(self.config.run_dir)
        return decide_start(self.config, Length(self.config, 100), lambda _: "fp32", PROVENANCE,
                            self.holdings())

    def begin(self) -> int:
        """Up to the first round; returns the step from which the run goes on, 0 from scratch. All
        that is taken up is as it was after that step."""
        start = self.decide()
        found = start.open(self.config.run_dir)
        for rank, states in self.states.items():
            states.hold(start.token)
            if found is not None:
                self.check(states.open(found.step, found.tensors(GLOBAL)), rank)
        prepare_run_dir(self.config, found, self.members.run)
        self.coordinator = CheckpointCoordinator(self.config, PROVENANCE, len(self.states),
                                                 lambda: None, self.members)
        self.keep()
        return start.step or 0

    def check(self, found: Checkpoint, rank: int) -> None:
        """Whether a process has found the states of its clients, and the global one."""
        states = {client_file(k): client_state(k, found.step)
                  for k in clients_of(rank, self.ranks)}
        for name, expected in ({GLOBAL: global_state(found.step)} | states).items():
            tensors = found.tensors(name)
            assert tensors.keys() == expected.keys()
            assert all(torch.equal(tensors[key], vector) for key, vector in expected.items())

    def keep(self) -> None:
        """What each site does with the next plan."""
        for states in self.states.values():
            states.keep(self.coordinator.kept)

    def write(self, step: int) -> Iterator[list[dict[str, Any]]]:
        """Each process of a site in turn writes its part of a checkpoint, and what it reports."""
        self.coordinator.begin(step, {"history": []}, global_state(step))
        for rank, writer in self.writers.items():
            first = self.states[rank].process == 0
            writer.begin(self.states[rank].folders.step(step), step, {
                **({GLOBAL: global_state(step)} if first else {}),
                **{client_file(k): client_state(k, step) for k in clients_of(rank, self.ranks)}})
            yield writer.written(wait=True)

    def save(self, step: int) -> Iterator[str]:
        """A whole checkpoint; yields what has just been done, where anybody may be killed."""
        reports: list[list[dict[str, Any]]] = [[]]
        for report in self.write(step):
            reports.append(report)
            yield f"part {len(reports) - 1} of {len(self.writers)} is written"
        commits = list(self.coordinator.collect(reports))
        yield "all parts are reported"
        for commit in commits:
            commit()
        yield "the manifest is written"
        self.keep()
        yield "the sites keep what is left"

    def kill(self) -> None:
        for writer in self.writers.values():
            writer.close()
        for states in self.states.values():
            states.release()
        release_run_dir(self.config.run_dir)


def saved(root: Path, *steps: int, ranks: tuple[str, ...] = RANKS) -> None:
    """A run that has made these checkpoints and is then killed."""
    start = Start(root, ranks)
    start.begin()
    for step in steps:
        for _ in start.save(step):
            pass
    start.kill()


def steps_at(root: Path, site: str) -> list[int]:
    """The steps of which a site holds anything."""
    return [step_of(folder) for run in (root / site / "states").iterdir()
            for folder in step_folders(run)]


def manifests(root: Path) -> list[int]:
    return committed_steps(config_of(root).run_dir / "checkpoints")


def folder_at(root: Path, site: str, step: int) -> Path:
    (folder,) = (root / site / "states").glob(f"*/step_{step:06d}")
    return folder


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


def forge(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change a manifest or record, and its checksum with it."""
    body = json.loads(path.read_text())
    change(body)
    path.write_text(json.dumps(body | {"sha256": manifest_checksum(body)}))
