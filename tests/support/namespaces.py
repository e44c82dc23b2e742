"""Machines on one machine: each a set of namespaces with a network, mounts and processes of its
own, and all of them at one switch.

As between real machines, a process that binds to the loopback of one, or to an address that its
host name has there alone, cannot be reached from the others; and no process sees those of another
machine. A machine dies with its first process, and this one with the test session, however that
ends: the kernel ends all processes of the machine and removes its interfaces.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from tests.support.runs import ROOT, execute, start

SECONDS_TO_START = 20
SECONDS_TO_END = 2  # between SIGTERM and SIGKILL
# Every orphan of a machine becomes a child of its first process, which has to wait for it.
_FIRST_PROCESS = """
import os, time
print("ready", flush=True)
while True:
    try:
        os.wait()
    except ChildProcessError:
        time.sleep(0.05)
"""


def why_not(*programs: str) -> str:
    """Why this machine cannot have such machines, or lacks programs; empty if it can."""
    if os.geteuid():
        return "network namespaces need root"
    probe = subprocess.run(["unshare", "--net", "--mount", "--pid", "--fork", "ip", "link"],
                           capture_output=True, text=True, timeout=10)
    lacking = [name for name in programs if not any(
        os.access(f"{folder}/{name}", os.X_OK) for folder in os.get_exec_path())]
    return probe.stderr.strip() or (f"not installed: {', '.join(lacking)}" if lacking else "")


def skip_or_fail(reason: str, variable: str) -> None:
    """Skip the test for a reason, if there is one. With this variable set it fails, as where a skip
    must not hide a fault."""
    if reason and os.environ.get(variable):
        pytest.fail(f"{variable} is set, but {reason}")
    if reason:
        pytest.skip(reason)


class Machine:
    """One set of namespaces."""

    def __init__(self, name: str, address: str, prepare: str) -> None:
        """Start it, without a cable. address: "" or what its interface eth0 will have.
        prepare: shell commands that run in it first, such as mounts that no other machine sees."""
        self.name, self.address = name, address
        self.daemons: list[subprocess.Popen[bytes]] = []
        script = f"set -e\nip link set lo up\n{prepare}\n" + 'exec "$@"'
        self._holder = subprocess.Popen(
            ["setpriv", "--pdeathsig=KILL", "unshare", "--net", "--mount", "--pid", "--fork",
             "--kill-child=KILL", "--mount-proc", "sh", "-c", script, "sh", sys.executable, "-I",
             "-S", "-c", _FIRST_PROCESS], start_new_session=True, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        try:
            assert self._holder.stdout
            assert self._holder.stderr
            told, _, _ = select.select([self._holder.stdout], [], [], SECONDS_TO_START)
            if not told or self._holder.stdout.readline() != b"ready\n":
                self._holder.kill()
                pytest.fail(f"machine {name} did not start: {self._holder.stderr.read().decode()}")
            (first,) = psutil.Process(self._holder.pid).children()
        except BaseException:
            self.stop()
            raise
        self.first = first.pid
        """The ID of its first process, as seen from outside."""

    def inside(self, *command: object) -> list[str]:
        """A command line that runs a command in this machine."""
        return ["nsenter", f"--target={self.first}", "--net", "--mount", "--pid",
                f"--wdns={ROOT}", *map(str, command)]

    def run(self, *command: object, limit: float = 60, env: Mapping[str, str] | None = None
            ) -> tuple[int, str]:
        """Run a command to its end; its exit code and all it printed."""
        return execute(self.inside(*command), limit, dict(env or {}))

    def must(self, *command: object) -> str:
        """`run` a command that must not fail; what it printed."""
        code, output = self.run(*command)
        assert code == 0, f"{self.name}: {' '.join(map(str, command))}\n{output}"
        return output

    def start(self, *command: object, log: Path, env: Mapping[str, str] | None = None
              ) -> subprocess.Popen[bytes]:
        """Start a command; all that it prints is appended to `log`."""
        self.daemons.append(start(self.inside(*command), log, env))
        return self.daemons[-1]

    @property
    def processes(self) -> list[psutil.Process]:
        """Its processes, but for the first."""
        found = []
        with suppress(OSError):
            mine = os.stat(f"/proc/{self.first}/ns/pid").st_ino
            for process in psutil.process_iter():
                with suppress(OSError, psutil.Error):
                    if (os.stat(f"/proc/{process.pid}/ns/pid").st_ino == mine
                            and process.pid != self.first
                            and process.status() != psutil.STATUS_ZOMBIE):
                        found.append(process)
        return found

    def kill(self, which: Callable[[psutil.Process], bool] = lambda process: True) -> None:
        """Kill its processes, or some of them, at once, as in a power failure. Its interfaces and
        their addresses stay."""
        for process in self.processes:
            with suppress(psutil.NoSuchProcess):
                if which(process):
                    process.kill()

    def stop(self) -> None:
        """End all its processes, first politely, and the machine."""
        if hasattr(self, "first"):
            for process in self.processes:
                with suppress(psutil.NoSuchProcess):
                    process.send_signal(signal.SIGTERM)
            deadline = time.monotonic() + SECONDS_TO_END
            while self.processes and time.monotonic() < deadline:
                time.sleep(0.05)
        self._holder.kill()
        for started in (self._holder, *self.daemons):
            started.wait(timeout=10)
        for pipe in (self._holder.stdout, self._holder.stderr):
            if pipe:
                pipe.close()


@contextmanager
def machines(addresses: Mapping[str, str], prepare: str = "") -> Iterator[dict[str, Machine]]:
    """Machines by name, with these addresses (of one /24) on their interface eth0, for the time of
    the block; beside them "switch", which connects them. Nothing of them is left in the end, also
    if they could not all be made.

    prepare: as in `Machine`.
    """
    with ExitStack() as stack:
        made = {}
        for name, address in {"switch": "", **addresses}.items():
            made[name] = Machine(name, address, prepare if address else "")
            stack.callback(made[name].stop)
        switch = made["switch"]
        switch.must("ip", "link", "add", "switch", "type", "bridge")
        switch.must("ip", "link", "set", "switch", "up")
        for name, address in addresses.items():
            # Seen from the switch, a process has the ID that it has here only by /proc outside.
            subprocess.run(["nsenter", f"--target={switch.first}", "--net", "ip", "link", "add",
                            name, "type", "veth", "peer", "name", "eth0", "netns",
                            str(made[name].first)], check=True, timeout=20)
            switch.must("ip", "link", "set", name, "master", "switch", "up")
            made[name].must("ip", "addr", "add", f"{address}/24", "dev", "eth0")
            made[name].must("ip", "link", "set", "eth0", "up")
        yield made


def readable_by_all(paths: Sequence[Path | str]) -> str:
    """Shell commands for `prepare` after which users without a name can reach these folders, though
    one above them is closed, as an interpreter in the home of root. The closed folder is covered
    by an empty one that holds these alone, in this machine only."""
    covered: dict[Path, list[Path]] = {}
    for path in sorted({Path(path).resolve() for path in paths}):
        closed = [folder for folder in reversed(path.parents)
                  if not folder.stat().st_mode & 0o001]
        if closed and not any(path.is_relative_to(p) for p in covered.get(closed[0], [])):
            covered.setdefault(closed[0], []).append(path)
    script = ""
    for closed_one, wanted in covered.items():
        script += ('aside=$(mktemp -d)\n'
                   f'mount --rbind "{closed_one}" "$aside"\n'
                   f'mount -t tmpfs -o mode=755,size=1m none "{closed_one}"\n')
        for path in wanted:
            script += (f'mkdir -p "{path}"\n'
                       f'mount --rbind "$aside/{path.relative_to(closed_one)}" "{path}"\n')
        script += 'umount --lazy "$aside"\nrmdir "$aside"\n'
    return script
