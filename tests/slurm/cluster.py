"""A real SLURM cluster of two nodes on one machine: one slurmctld, and a slurmd on each of two
machines of tests/support/namespaces.py, which show what belongs to a test: exactly the processes on
them."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import psutil

from tests.support.namespaces import Machine, machines, skip_or_fail, why_not
from tests.support.runs import wait_until

ADDRESSES = {1: "10.77.0.1", 2: "10.77.0.2"}
# As on Debian: the host name resolves to an address that no other machine can reach.
HOSTS = "127.0.0.1 localhost\n127.0.1.1 {host}\n10.77.0.1 n1\n10.77.0.2 n2\n"
NEEDED = ("slurmctld", "slurmd", "srun", "sbatch", "munged")


class Cluster:
    """The running cluster. Commands run on its first node by default."""

    def __init__(self, folder: Path, nodes: Mapping[int, Machine]) -> None:
        self.folder, self.nodes = folder, nodes

    def run(self, *command: object, node: int = 1, limit: float = 60,
            env: Mapping[str, str] | None = None) -> tuple[int, str]:
        """Run a command to its end; its exit code and all it printed."""
        return self.nodes[node].run(*command, limit=limit, env={**self.env, **(env or {})})

    @property
    def env(self) -> dict[str, str]:
        return {"SLURM_CONF": f"{self.folder}/slurm.conf"}

    def start(self) -> None:
        host = socket.gethostname()
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
        self.nodes[node].kill()

    def until_idle(self) -> None:
        wait_until(lambda: self.run("sinfo", "--noheader", "--format=%D %t")[1] == "2 idle\n", 30,
                   lambda: "the two nodes are not idle")

    def _daemon(self, node: int, *command: object) -> None:
        self.nodes[node].start(*command, log=self.folder / "daemons.log", env=self.env)

    def processes(self) -> list[psutil.Process]:
        """The processes on the nodes, without the cluster's own daemons."""
        return [process for node in self.nodes.values() for process in node.processes
                if not process.name().startswith(("munge", "slurm"))]


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

    def until_said(self, text: str, limit: float = 90) -> None:
        wait_until(lambda: text in self.output, limit,
                   lambda: f"{text!r} is not in\n{self.output}")

    def until_over(self, limit: float = 120) -> str:
        """Wait until the job will not run again; its state."""
        wait_until(lambda: self.state not in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING",
                                              "REQUEUED"), limit, lambda: self.output)
        return self.state


@contextmanager
def running_cluster(folder: Path) -> Iterator[Cluster]:
    """A cluster for the time of the block. If the machine cannot run one, the test is skipped, or
    fails if REQUIRE_SLURM is set."""
    reason = why_not(*NEEDED)
    skip_or_fail(reason and f"no SLURM cluster (Debian: slurm-wlm munge iproute2): {reason}",
                 "REQUIRE_SLURM")
    hosts = folder / "hosts"
    hosts.write_text(HOSTS.format(host=socket.gethostname()))
    with machines({f"n{node}": address for node, address in ADDRESSES.items()},
                  f'mount --bind "{hosts}" /etc/hosts') as made:
        cluster = Cluster(folder, {node: made[f"n{node}"] for node in ADDRESSES})
        cluster.start()
        yield cluster
