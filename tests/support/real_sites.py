"""Sites of their own on one machine: three owners of text, each a user with folders that nobody
else can read, and runs in which each has a rank of its own."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from pydoc_data.topics import topics

import pytest

from fedrun.data.sites import IDENTITY, SiteEntry, Sites, write_sites
from fedrun.secure.identity import Identity, public_text
from tests.support.prepared import join_ranks, start_ranks
from tests.support.runs import Outcome
from tests.support.windows import windows

NAMES = ("north", "south", "east")
MACHINE = {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "GLOO_SOCKET_IFNAME": "lo"}
"""Of a rank that is alone on its machine, as it believes."""
TEXT, TOKENS = 24, 16  # bytes of a window of text, and of eight tokens
FIRST_UID = 64_100  # of users that exist in no file, and need not
SETTINGS = ("--config", "tiny", "--tokenizer", "bpe:400", "--sequence_length", "32",
            "--batch_size", "2", "--val_freq", "2", "--lr", "2e-3", "--dtype", "fp32",
            "--device", "cpu", "--rounds", "3", "--local_updates", "2", "--checkpoint_freq", "none",
            "--timeout", "60")


@dataclass(frozen=True)
class Ranks:
    """How a run of several owners ended: rank 0 is the server's."""

    server: Outcome
    printed: list[str]
    """By each rank, for its owner alone."""


@dataclass
class Institutions:
    """A server and three sites, with their folders, keys and texts."""

    root: Path
    sites: Sites = field(init=False)

    def __post_init__(self) -> None:
        self.root.chmod(0o755)
        texts = [topics[name] for name in sorted(topics)]
        keys = {}
        for number, name in enumerate(("server", *NAMES)):
            folder = self.root / name
            for made in (folder, folder / "text", folder / "site"):
                made.mkdir()
            for part, text in enumerate(texts[number:60:4]):
                (folder / "text" / f"{name}{part:02}.txt").write_text(text, encoding="utf-8")
            keys[name] = public_text(Identity.create(folder / "site" / IDENTITY).public)
            self.own(name)
        self.write(Sites("trial", keys["server"], (
            SiteEntry(name="north", key=keys["north"], clients=2, partition="shuffled",
                      rounded_to=4),
            SiteEntry(name="south", key=keys["south"]),
            SiteEntry(name="east", key=keys["east"], clients=2, size_skew=0.3))))

    def write(self, sites: Sites) -> None:
        self.sites = sites
        write_sites(self.file, sites)
        self.file.chmod(0o644)

    def own(self, name: str) -> None:
        """Give all that is in somebody's folder to their user, and to nobody else."""
        folder, uid = self.root / name, self.uid(name)
        for path in (folder, *folder.rglob("*")):
            path.chmod(0o700 if path.is_dir() else 0o600)
            if uid:
                os.chown(path, uid, uid)

    def uid(self, name: str) -> int:
        """The user of a site or of the server; 0 where only one can start processes."""
        return 0 if os.getuid() else FIRST_UID + ("server", *NAMES).index(name)

    @property
    def file(self) -> Path:
        return self.root / "sites.yaml"

    def flags(self, *flags: object, name: str) -> list[str]:
        return ["fed_avg", *SETTINGS, "--dataset", str(self.root / "server/text/*.txt"),
                "--sites", str(self.file), "--run_name", name, *map(str, flags)]

    def private(self, site: str) -> dict[str, str]:
        """The private settings of a site, as its environment has them."""
        folder = self.root / site
        return {"FEDRUN_SITE": site, "FEDRUN_SITE_DATA": str(folder / "text" / "*.txt"),
                "FEDRUN_SITE_DIR": str(folder / "site"), "HOME": str(folder)}

    def train(self, *flags: object, name: str = "run", limit: float = 250,
              ranks: Sequence[str] = NAMES, env: Mapping[str, Mapping[str, str]] | None = None,
              module: str = "fedrun") -> Ranks:
        """A run of the server and these sites' ranks. env: more of the environment, by owner."""
        folder, more = self.root / "server", env or {}
        owners = ["server", *ranks]
        private = [{"FEDRUN_SITE_DIR": str(folder / "site"), "HOME": str(folder)},
                   *map(self.private, ranks)]
        arguments = self.flags("--data_dir", folder / "results", "--cache_dir", folder / "cache",
                               *flags, name=name)
        outputs = [self.root / f"{name}-rank{rank}.out" for rank in range(len(owners))]
        for output in outputs:  # of an earlier run under this name
            output.unlink(missing_ok=True)
        running = start_ranks(
            arguments, [MACHINE | mine | dict(more.get(owner, {})) for mine, owner in zip(
                private, owners, strict=True)], outputs, module, [*map(self.uid, owners)])
        code, late = join_ranks(running, limit)
        printed = [output.read_text(encoding="utf-8") for output in outputs]
        if late:
            pytest.fail(f"rank {late} still running after {limit} s\n" + "\n".join(printed))
        return Ranks(Outcome(code, printed[0], folder / "results" / name), printed)

    def private_pieces(self, site: str) -> tuple[set[bytes], set[bytes]]:
        """Windows of a site's text, and of its tokens, that the server's own text does not have."""
        def text(name: str) -> bytes:
            return b"\0".join(file.read_bytes() for file in sorted(
                (self.root / name / "text").iterdir()))

        def tokens(folder: Path) -> bytes:
            return b"".join(file.read_bytes() for file in sorted(folder.glob("tokens/*/*.bin")))

        public = tokens(self.root / "server" / "cache")
        own = tokens(self.root / site / "site")
        return (windows(text(site), TEXT) - windows(text("server"), TEXT),
                windows(own, TOKENS, 2) - windows(public, TOKENS, 2))

    def simulate(self, *flags: object, name: str = "simulated", processes: int = 1) -> Outcome:
        """The same run by one owner of all text."""
        arguments = self.flags("--data_dir", self.root / "simulated", "--cache_dir",
                               self.root / "simulated" / "cache", "--site_data",
                               self.root / "{site}" / "text" / "*.txt", *flags, name=name)
        output = self.root / f"{name}.out"
        code, late = join_ranks(start_ranks(arguments, [{}] * processes, [output] * processes), 100)
        assert not late
        return Outcome(code, output.read_text(encoding="utf-8"), self.root / "simulated" / name)
