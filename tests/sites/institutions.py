"""Institutions on one machine: a server and sites, each a machine of tests/support/namespaces.py
behind the firewall and the tunnel of launch/sites.md, with a user and a folder of its own."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from tests.support.namespaces import (
    Machine,
    machines,
    readable_by_all,
    skip_or_fail,
    why_not,
)
from tests.support.runs import ROOT, wait_until

PAGE = (ROOT / "launch" / "sites.md").read_text(encoding="utf-8")
NAMES = ("server", "north", "south", "east")
OUTSIDE = {name: f"203.0.113.{number}" for number, name in enumerate(NAMES, 1)}
"""Addresses in the Internet, and below in the tunnel, as on the page."""
TUNNEL = {name: f"10.88.0.{number}" for number, name in enumerate(NAMES, 1)}
NEEDED = ("wireguard-go", "wg", "wg-quick", "nft", "setpriv", "nsenter")
_FIRST_USER = 61000
# What each machine has for itself: where WireGuard's programs look for each other and their files.
_PREPARE = """
mount -t tmpfs -o size=1m none /run
mkdir -p /run/wireguard
mount -t tmpfs -o size=1m none /etc/wireguard
"""


def blocks(language: str) -> list[str]:
    """The page's blocks in a language, in order."""
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


class Institution:
    """The server or a site."""

    def __init__(self, name: str, machine: Machine, folder: Path) -> None:
        self.name, self.machine, self.folder = name, machine, folder
        self.user = _FIRST_USER + NAMES.index(name)
        self.log = folder.parent / f"{name}.log"
        """What its commands print that are started and not waited for."""
        folder.mkdir(mode=0o700)
        os.chown(folder, self.user, self.user)

    def command(self, *command: object, env: Mapping[str, str] | None = None) -> list[str]:
        """A command as the institution's user, for its machine."""
        env = {"HOME": str(self.folder), "TMPDIR": str(self.folder), "OMP_NUM_THREADS": "1",
               **(env or {})}
        return ["setpriv", f"--reuid={self.user}", f"--regid={self.user}", "--clear-groups",
                "--no-new-privs", "--inh-caps=-all", "env",
                *(f"{name}={value}" for name, value in env.items()), *map(str, command)]

    def run(self, *command: object, limit: float = 60) -> tuple[int, str]:
        """Run a command to its end; its exit code and all it printed."""
        return self.machine.run(*self.command(*command), limit=limit)

    def start(self, *command: object) -> subprocess.Popen[bytes]:
        return self.machine.start(*self.command(*command), log=self.log)

    def must(self, script: str) -> str:
        """Run commands of a shell in its folder, which must not fail; what they printed."""
        return self.machine.must(*self._shell(script))

    def start_here(self, script: str) -> None:
        """Start commands of a shell in its folder."""
        self.machine.start(*self._shell(script), log=self.log)

    def _shell(self, script: str) -> list[str]:
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        return self.command("env", "-C", self.folder, "sh", "-ec", script,
                            env={"PATH": path, "PYTHONPATH": str(ROOT)})

    @property
    def running(self) -> bool:
        """Whether its user has any processes."""
        return any(map(self._own, self.machine.processes))

    def start_rank(self, *arguments: object, port: int = 29500) -> subprocess.Popen[bytes]:
        """Start its process of a run, `python -m fedrun` with these arguments, as on the page."""
        return self.start(
            sys.executable, "-m", "fedrun.torchrun", "--nnodes", len(NAMES), "--node-rank",
            NAMES.index(self.name), "--nproc-per-node", 1, "--max-restarts", 0, "--master-addr",
            TUNNEL["server"], "--master-port", port, "-m", "fedrun", *arguments)

    def kill(self) -> None:
        """Kill the processes of its user at once."""
        self.machine.kill(self._own)

    def _own(self, process: psutil.Process) -> bool:
        with suppress(psutil.NoSuchProcess):
            return bool(process.uids().real == self.user)
        return False

    def give(self, name: str, content: bytes) -> Path:
        """A file of its own."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        for made in (path, *path.relative_to(self.folder).parents):
            os.chown(self.folder / made, self.user, self.user)
        return path

    @property
    def said(self) -> str:
        return self.log.read_text() if self.log.exists() else ""


@contextmanager
def institutions() -> Iterator[dict[str, Institution]]:
    """The server and three sites, connected by the tunnel and by nothing else, for the time of the
    block. The test is skipped if there is no root or a program is missing; with REQUIRE_SITES set
    it fails."""
    reason = why_not(*NEEDED)
    skip_or_fail(reason and "there can be no sites (Debian: wireguard-go wireguard-tools nftables "
                            f"iproute2): {reason}", "REQUIRE_SITES")
    base = Path(tempfile.mkdtemp(prefix="fedrun-sites-"))  # which every user can reach
    base.chmod(0o755)
    try:
        opened = readable_by_all([sys.prefix, sys.base_prefix, ROOT, *filter(os.path.isdir,
                                                                             sys.path)])
        with machines(OUTSIDE, _PREPARE + opened) as made:
            found = {name: Institution(name, made[name], base / name) for name in NAMES}
            _open_tunnel(found, base)
            yield found
    finally:
        shutil.rmtree(base)


def _open_tunnel(found: Mapping[str, Institution], base: Path) -> None:
    """Steps 2 and 3 of the page, word for word but for keys and addresses."""
    make_key, *_ = (block for block in blocks("bash") if "wg genkey" in block)
    keys = {name: one.machine.must("sh", "-c", make_key).strip() for name, one in found.items()}
    (hub, spoke), (hubs_firewall, spokes_firewall) = blocks("ini"), blocks("nft")
    for name, key in keys.items():
        hub = hub.replace(f"{name.upper()}_PUBLIC_KEY", key)
        spoke = spoke.replace(f"{name.upper()}_PUBLIC_KEY", key)
    for name, one in found.items():
        written = {"fedrun.conf": hub, "fedrun.nft": hubs_firewall} if name == "server" else {
            "fedrun.conf": spoke.replace(TUNNEL["north"], TUNNEL[name]),
            "fedrun.nft": spokes_firewall}
        for file, content in written.items():
            _write(one.machine, f"/etc/wireguard/{file}", content)
    for name, one in found.items():
        log = base / f"{name}.tunnel.log"
        code = one.machine.start("wg-quick", "up", "fedrun", log=log).wait(20)
        assert code == 0, log.read_text()

    def shaken() -> bool:
        told = found["server"].machine.must("wg", "show", "fedrun", "latest-handshakes")
        return all(not line.endswith("\t0") for line in told.splitlines())

    wait_until(shaken, 20, lambda: found["server"].machine.must("wg", "show"))


def _write(machine: Machine, path: str, content: str) -> None:
    """Write a file that only this machine sees."""
    subprocess.run(machine.inside("sh", "-c", 'umask 077 && cat > "$1"', "sh", path), check=True,
                   input=content.encode(), timeout=10)


