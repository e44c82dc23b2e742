"""One side of a comparison that needs several processes, of which rank 0 answers commands."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Any, Self

from fedrun.distributed.stopping import die_with_launcher
from tests.benchmarks.common import ROOT


class Ranks:
    """Runs one command in several processes, in an environment like torchrun's.

    Each process has `threads` threads. At the end of the `with` block, however it ends, all of them
    are ended, together with the processes that they started.
    """

    def __init__(self, command: Sequence[str], processes: int, threads: int = 1,
                 env: Mapping[str, str] | None = None) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.log = tempfile.TemporaryFile(mode="w+")  # noqa: SIM115
        self.processes = []
        for rank in range(processes):
            ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes,
                     "LOCAL_WORLD_SIZE": processes, "MASTER_PORT": port,
                     "OMP_NUM_THREADS": threads, "TORCHELASTIC_RUN_ID": "benchmark"}
            self.processes.append(subprocess.Popen(
                command, cwd=ROOT, stderr=self.log, start_new_session=True,
                stdin=subprocess.DEVNULL if rank else subprocess.PIPE,
                stdout=self.log if rank else subprocess.PIPE,
                env=os.environ | {name: str(value) for name, value in ranks.items()}
                | {"MASTER_ADDR": "127.0.0.1"} | dict(env or {})))

    def ask(self, command: object, timeout: float = 600.0) -> Any:
        """Send a command to rank 0 and return its answer, both one line of JSON.

        Raises RuntimeError, with the end of the log, if a rank ends or does not answer in time.
        """
        first = self.processes[0]
        assert first.stdin is not None
        assert first.stdout is not None
        deadline, answer = time.monotonic() + timeout, b""
        with suppress(BrokenPipeError):  # the log has the reason
            first.stdin.write(json.dumps(command).encode() + b"\n")
            first.stdin.flush()
        while not answer.endswith(b"\n"):
            if select.select([first.stdout], [], [], 1.0)[0]:
                read = os.read(first.stdout.fileno(), 1 << 20)
                if not read:
                    self._give_up("ended")
                answer += read
            elif any(process.poll() for process in self.processes):
                self._give_up("failed")
            elif time.monotonic() > deadline:
                self._give_up(f"did not answer {command!r} within {timeout:g} s")
        return json.loads(answer)

    def _give_up(self, why: str) -> None:
        self.close()
        self.log.seek(0)
        output = "".join(self.log.readlines()[-40:])
        raise RuntimeError(f"{self.processes[0].args!r} {why}:\n{output}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.close(grace=0.0 if kind else 20.0)

    def close(self, grace: float = 0.0) -> None:
        """Close rank 0's input, which ends the processes; after `grace` seconds kill the rest."""
        assert self.processes[0].stdin is not None
        with suppress(BrokenPipeError):
            self.processes[0].stdin.close()
        deadline = time.monotonic() + grace
        for process in self.processes:
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))
            with suppress(ProcessLookupError):  # also kills its children, which are in its session
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


class Commands:
    """Rank 0's end of `Ranks`. Create it before anything prints.

    Standard output is redirected to the log, so that the pipe carries answers only.
    """

    def __init__(self) -> None:
        self._answers = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)

    def next(self) -> Any:
        """The next command, or None after the last one."""
        line = sys.stdin.readline()
        return json.loads(line) if line else None

    def answer(self, answer: object) -> None:
        self._answers.write(json.dumps(answer) + "\n")


def end_with_parent() -> None:
    """Make this process end with its parent; every rank calls it first."""
    die_with_launcher()


class Rounds:
    """Rank 0 of a framework that runs its own loop. A command is a number of rounds, its answer the
    seconds of each. Call `between` before the first round and after every round."""

    def __init__(self, commands: Commands) -> None:
        self.commands = commands
        self._times: list[float] = []
        self._block = 0
        self._began = 0.0

    def between(self) -> bool:
        """Whether there are more rounds; waits for the next command at the end of a block."""
        if self._block:
            self._times.append(time.monotonic() - self._began)
        if len(self._times) == self._block:
            if self._block:
                self.commands.answer({"rounds": self._times})
            self._times, self._block = [], self.commands.next() or 0
        self._began = time.monotonic()
        return self._block > 0
