"""A real SLURM cluster of two nodes on one machine: one slurmctld, and a slurmd in each of two
network namespaces connected by a virtual cable (veth).

Each namespace has its own addresses. As between real machines, a process that binds to the
loopback, or to the address of the machine's host name, cannot be reached from the other node. The
namespaces also show which processes belong to a test: exactly those inside them.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from tests.support.runs import execute, wait_until

ADDRESSES = {1: "10.77.0.1", 2: "10.77.0.2"}
# As on Debian: the host name resolves to an address that no other machine can reach.
HOSTS = "127.0.0.1 localhost\n127.0.1.1 {host}\n10.77.0.1 n1\n10.77.0.2 n2\n"
NEEDED = ("slurmctld", "slurmd", "srun", "sbatch", "munged", "ip", "nsenter", "unshare",
          "setpriv")


def why_not() -> str:
    """Why this machine cannot run a cluster; empty if it can."""
    if missing := [name for name in NEEDED if shutil.which(name) is None]:
        return f"{', '.join(missing)} not installed (Debian: slurm-wlm munge iproute2)"
    if os.geteuid():
        return "a cluster of network namespaces needs root"
    probe = subprocess.run(["unshare", "--net", "--mount", "true"], capture_output=True, text=True)
    return probe.stderr.strip()


class Cluster:
    """The running cluster. Commands run on its first node by default."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.namespaces = {n: f"fedrun-{os.getpid()}-n{n}" for n in ADDRESSES}
        self.daemons: list[subprocess.Popen[bytes]] = []

    def inside(self, node: int, *command: object) -> list[str]:
        """A command line that runs a command in a node's network, with the cluster's hosts file.
        (`ip netns exec` would hide the machine's cgroups, which slurmd needs.)"""
        hosts = f'mount --bind {self.folder}/hosts /etc/hosts && exec "$@"'
        return ["nsenter", f"--net=/run/netns/{self.namespaces[node]}", "unshare", "--mount",
                "sh", "-c", hosts, "sh", *map(str, command)]

    def run(self, *command: object, node: int = 1, limit: float = 60,
            env: Mapping[str, str] | None = None) -> tuple[int, str]:
        """Run a command to its end; its exit code and all it printed."""
        return execute(self.inside(node, *command), limit, {**self.env, **(env or {})})

    @property
    def env(self) -> dict[str, str]:
        return {"SLURM_CONF": f"{self.folder}/slurm.conf"}

    def start(self) -> None:
        for namespace in self.namespaces.values():
            _ip("netns", "add", namespace)
            _ip("-n", namespace, "link", "set", "lo", "up")
        first, second = self.namespaces.values()
        _ip("link", "add", "eth0", "netns", first, "type", "veth", "peer", "name", "eth0",
            "netns", second)
        for node, namespace in self.namespaces.items():
            _ip("-n", namespace, "addr", "add", f"{ADDRESSES[node]}/24", "dev", "eth0")
            _ip("-n", namespace, "link", "set", "eth0", "up")
        host = socket.gethostname()
        (self.folder / "hosts").write_text(HOSTS.format(host=host))
        template = (Path(__file__).parent / "slurm.conf").read_text()
        for name, value in {"host": host, "folder": self.folder, "address1": ADDRESSES[1],
                            "address2": ADDRESSES[2]}.items():
            template = template.replace(f"{{{name}}}", str(value))
        (self.folder / "slurm.conf").write_text(template)
        (self.folder / "state").mkdir()
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(64))
        key.chmod(0o600)
        files = {name: self.folder / f"munge.{name}" for name in ("socket", "pid", "log", "seed")}
        self._daemon(1, "munged", "--foreground", "--force", f"--key-file={key}",
                     f"--socket={files['socket']}", f"--pid-file={files['pid']}",
                     f"--log-file={files['log']}", f"--seed-file={files['seed']}")
        wait_until(files["socket"].exists, 10, lambda: "munged has no socket")
        self._daemon(1, "slurmctld", "-D", "-c")
        for node in ADDRESSES:
            (self.folder / f"n{node}").mkdir()
            self.start_node(node)
        self.until_idle()

    def start_node(self, node: int) -> None:
        self._daemon(node, "slurmd", "-D", "-N", f"n{node}")

    def lose_node(self, node: int) -> None:
        """Kill all processes of a node at once, as in a power failure."""
        for process in self.processes(node, daemons=True):
            process.kill()

    def until_idle(self) -> None:
        wait_until(lambda: self.run("sinfo", "--noheader", "--format=%D %t")[1] == "2 idle\n", 30,
                   lambda: "the two nodes are not idle")

    def _daemon(self, node: int, *command: object) -> None:
        with (self.folder / "daemons.log").open("ab") as log:
            # setpriv: daemons die even if the test session is killed.
            self.daemons.append(subprocess.Popen(
                self.inside(node, "setpriv", "--pdeathsig=KILL", *command), start_new_session=True,
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, env={**os.environ, **self.env}))

    def stop(self) -> None:
        """End every process in the namespaces, by its ID, and delete the namespaces."""
        for sign in (signal.SIGTERM, signal.SIGKILL):
            for process in self.processes(daemons=True):
                with suppress(psutil.NoSuchProcess):
                    process.send_signal(sign)
            deadline = time.monotonic() + 2
            while self.processes(daemons=True) and time.monotonic() < deadline:
                for daemon in self.daemons:
                    daemon.poll()
                time.sleep(0.05)
        for namespace in self.namespaces.values():
            subprocess.run(["ip", "netns", "delete", namespace], check=False, timeout=10)

    def processes(self, *nodes: int, daemons: bool = False) -> list[psutil.Process]:
        """The processes on these nodes (default: all), without the cluster's own daemons unless
        `daemons` is set."""
        networks = set()
        for node in nodes or self.namespaces:
            with suppress(OSError):
                networks.add(os.stat(f"/run/netns/{self.namespaces[node]}").st_ino)
        found = []
        for process in psutil.process_iter():
            with suppress(OSError, psutil.Error):
                own = process.name().startswith(("munge", "slurm"))
                if (os.stat(f"/proc/{process.pid}/ns/net").st_ino in networks
                        and process.status() != psutil.STATUS_ZOMBIE and (daemons or not own)):
                    found.append(process)
        return found


class Job:
    """A submitted job and its output."""

    def __init__(self, cluster: Cluster, number: str, output: Path) -> None:
        self.cluster, self.number, self.file = cluster, number, output

    @property
    def output(self) -> str:
        return self.file.read_text() if self.file.exists() else ""

    @property
    def state(self) -> str:
        """As SLURM names it: PENDING, RUNNING, COMPLETED, FAILED, CANCELLED, ..."""
        _, shown = self.cluster.run("scontrol", "show", "job", self.number)
        return shown.partition("JobState=")[2].split()[0]

    def until_said(self, text: str, limit: float = 40) -> None:
        wait_until(lambda: text in self.output, limit,
                   lambda: f"{text!r} is not in\n{self.output}")

    def until_over(self, limit: float = 60) -> str:
        """Wait until the job will not run again; its state."""
        wait_until(lambda: self.state not in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING",
                                              "REQUEUED"), limit, lambda: self.output)
        return self.state


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, timeout=10)


@contextmanager
def running_cluster(folder: Path) -> Iterator[Cluster]:
    """A cluster for the time of the block. If the machine cannot run one, the test is skipped, or
    fails if REQUIRE_SLURM is set, as where a skip must not hide a fault."""
    if reason := why_not():
        if os.environ.get("REQUIRE_SLURM"):
            pytest.fail(f"REQUIRE_SLURM is set, but there can be no cluster: {reason}")
        pytest.skip(f"no SLURM cluster: {reason}")
    cluster = Cluster(folder)
    with ExitStack() as stack:
        stack.callback(cluster.stop)
        cluster.start()
        yield cluster
