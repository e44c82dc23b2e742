"""Processes of one side of a comparison that talk among themselves: rank 0 answers commands."""

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
    """So many processes of one command, in the environment that torchrun gives its own.

    Each runs on `threads` threads. Whatever happens inside the `with`, and whatever they have
    started themselves, no process outlives it.
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
        """Rank 0's answer to a command, both one line of JSON; RuntimeError where none comes."""
        first = self.processes[0]
        assert first.stdin is not None
        assert first.stdout is not None
        deadline, answer = time.monotonic() + timeout, b""
        with suppress(BrokenPipeError):  # why, the log tells
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
        told = "".join(self.log.readlines()[-40:])
        raise RuntimeError(f"{self.processes[0].args!r} {why}:\n{told}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.close(grace=0.0 if kind else 20.0)

    def close(self, grace: float = 0.0) -> None:
        """End all processes: by the end of the commands, and after `grace` seconds by force."""
        assert self.processes[0].stdin is not None
        with suppress(BrokenPipeError):
            self.processes[0].stdin.close()
        deadline = time.monotonic() + grace
        for process in self.processes:
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))
            with suppress(ProcessLookupError):  # a session of its own: its children die with it
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


class Commands:
    """Rank 0's end of `Ranks`: make it before anything prints.

    What others print goes to the log, so that an answer is alone on its pipe.
    """

    def __init__(self) -> None:
        self._answers = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)

    def next(self) -> Any:
        """The next command; None after the last."""
        line = sys.stdin.readline()
        return json.loads(line) if line else None

    def answer(self, answer: object) -> None:
        self._answers.write(json.dumps(answer) + "\n")


def end_with_parent() -> None:
    """A rank: at the start."""
    die_with_launcher()


class Rounds:
    """Rank 0 of a framework that loops by itself: call `between` before the first round and after
    each. A command is a number of rounds, its answer the seconds that each took."""

    def __init__(self, commands: Commands) -> None:
        self.commands = commands
        self._times: list[float] = []
        self._block = 0
        self._began = 0.0

    def between(self) -> bool:
        """Whether there are more rounds; waits for a command where a block has ended."""
        if self._block:
            self._times.append(time.monotonic() - self._began)
        if len(self._times) == self._block:
            if self._block:
                self.commands.answer({"rounds": self._times})
            self._times, self._block = [], self.commands.next() or 0
        self._began = time.monotonic()
        return self._block > 0
