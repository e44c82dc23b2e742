"""Whole runs in processes of their own, and what tests look at of them."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from fedrun.data.corpora import local_files
from fedrun.data.pydocs import read_pydocs
from fedrun.data.text_options import TextOptions

torch.set_num_threads(1)
ROOT = Path(__file__).resolve().parents[2]

# Some of the documentation that comes with Python, for runs of seconds on real text.
_folder = tempfile.TemporaryDirectory(prefix="fedrun-tests-")
CORPUS = Path(_folder.name) / "corpus.txt"
CORPUS.write_text("\n\n".join(read_pydocs(local_files("pydocs")[:40]).values()), encoding="utf-8")

SMALL = ("--config", "tiny", "--dataset", str(CORPUS), "--tokenizer", "bpe:400",
         "--sequence_length", "32", "--batch_size", "2", "--val_freq", "3", "--lr", "2e-3",
         "--dtype", "fp32", "--val_fraction", "0.02")


OF_SMALL = TextOptions(val_fraction=0.02)
"""The options with which SMALL reads its text: little of it is held out, since evaluations take as
long as training otherwise."""


def read_json(path: Path) -> dict[str, Any]:
    content = json.loads(path.read_text(encoding="utf-8"))
    assert isinstance(content, dict)
    return content


def read_history(run_dir: Path) -> list[dict[str, Any]]:
    history = json.loads((run_dir / "training_history.json").read_text(encoding="utf-8"))
    assert isinstance(history, list)
    return history


@dataclass
class Outcome:
    """How a run ended, and what it left."""

    code: int
    output: str
    run_dir: Path

    @property
    def history(self) -> list[dict[str, Any]]:
        return read_history(self.run_dir)

    @property
    def config(self) -> dict[str, Any]:
        return read_json(self.run_dir / "config.json")

    @property
    def outcome(self) -> dict[str, Any]:
        return read_json(self.run_dir / "outcome.json")

    @property
    def events(self) -> list[dict[str, Any]]:
        return [json.loads(line)
                for line in (self.run_dir / "events.jsonl").read_text().splitlines()]

    @property
    def model(self) -> dict[str, Tensor]:
        return load_file(self.run_dir / "model.safetensors")

    @property
    def bits(self) -> bytes:
        return (self.run_dir / "model.safetensors").read_bytes()


Run = Callable[..., Outcome]


def execute(command: Sequence[str], limit: float = 250, env: dict[str, str] | None = None,
            cwd: Path = ROOT) -> tuple[int, str]:
    """Run a command; its exit code and all it printed. Past the limit (seconds) it and the
    processes it started, which share its session, are killed, and the test fails."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                               cwd=cwd, start_new_session=True,
                               env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})})
    try:
        output, _ = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        pytest.fail(f"still running after {limit} s: {' '.join(command)}\n{output}")
    return process.returncode, output


def fresh_python(code: str, *arguments: str, env: Mapping[str, str] | None = None,
                 limit: float = 60) -> str:
    """What a program prints to stdout in a Python of its own, with these variables set as well."""
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True,
                          timeout=limit, cwd=ROOT, env={**os.environ, **(env or {})}, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def start(command: Sequence[str | Path], log: Path, env: Mapping[str, str] | None = None
          ) -> subprocess.Popen[bytes]:
    """Start a command in a session of its own; all it prints is appended to `log`."""
    with log.open("ab") as out:
        return subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, cwd=ROOT,
                                start_new_session=True,
                                env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})})


def torchrun(processes: int, restarts: int = 0) -> list[str]:
    """The command line's beginning: our torchrun, or plain Python for one process."""
    if processes == 1:
        return [sys.executable]
    return [sys.executable, "-m", "fedrun.torchrun", "--nproc-per-node", str(processes),
            "--max-restarts", str(restarts)]


def alive(process: psutil.Process) -> bool:
    """Whether a process still runs; one that has ended and not been waited for does not."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@contextmanager
def children_of(launcher: subprocess.Popen[bytes]) -> Iterator[Callable[[], list[psutil.Process]]]:
    """A function that returns the processes a launcher has started, also after its end: a thread
    looks every 20 ms while it runs. All of them and the launcher are killed in the end."""
    children: list[psutil.Process] = []
    over = threading.Event()

    def watch() -> None:
        while launcher.poll() is None and not over.wait(0.02):
            with suppress(psutil.NoSuchProcess):
                children[:] = psutil.Process(launcher.pid).children() or children

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield lambda: list(children)
    finally:
        over.set()
        watcher.join()
        for child in filter(alive, children):
            child.kill()
        if launcher.poll() is None:
            launcher.kill()
            launcher.wait()


@contextmanager
def suspended(process: psutil.Process) -> Iterator[None]:
    """Stop a process inside the block, so that it cannot come to its end before others have begun,
    however slow the machine is."""
    process.suspend()
    try:
        yield
    finally:
        with suppress(psutil.NoSuchProcess):
            process.resume()


def listening(root: psutil.Process) -> set[str]:
    """The addresses at which a process and its descendants listen."""
    processes = {root.pid, *(p.pid for p in root.children(recursive=True))}
    return {c.laddr.ip for c in psutil.net_connections("inet")
            if c.pid in processes and c.status == psutil.CONN_LISTEN and c.laddr}


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def wait_until(condition: Callable[[], bool], timeout: float,
               shown: Callable[[], str] = lambda: "") -> None:
    """Look every 50 ms until something holds; past the timeout (seconds) the test fails, and
    prints `shown()`."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail(f"still waiting after {timeout} s\n{shown()}")
        time.sleep(0.05)


CLOCKS = {"seconds", "local_training_seconds", "aggregation_seconds", "evaluation_seconds"}


def without_clocks(outcome: Outcome) -> list[dict[str, Any]]:
    return [{k: v for k, v in r.items() if k not in CLOCKS} for r in outcome.history]


FAULTY = "tests.support.faulty_fedrun"
FLAGS = ("--num_clients", 3, "--rounds", 7, "--checkpoint_freq", 2)
"""Of the run that those that are disturbed are compared with."""


def fault(tmp_path: Path, kind: str, at: str, rank: int = 0) -> dict[str, str]:
    return {"FAULT": kind, "FAULT_AT": at, "FAULT_RANK": str(rank),
            "FAULT_ONCE": str(tmp_path / "struck")}


def error_lines(output: str) -> list[str]:
    """The errors in what a command printed, which has to be without a traceback."""
    assert "Traceback" not in output
    return [line for line in output.splitlines() if line.startswith("fedrun: error:")]


def outcome_of(run: Outcome) -> str:
    return str(run.outcome["outcome"])


def assert_equal(disturbed: Outcome, undisturbed: Outcome) -> None:
    """The same model, history and npz files, and an event for each round."""
    assert outcome_of(disturbed) == "finished", disturbed.output
    assert disturbed.bits == undisturbed.bits
    assert without_clocks(disturbed) == without_clocks(undisturbed)
    ours, theirs = ({p.relative_to(r.run_dir): p.read_bytes()
                     for p in r.run_dir.glob("**/step_*.npz")} for r in (disturbed, undisturbed))
    assert ours == theirs
    assert numbers(disturbed) == numbers(undisturbed)


def numbers(run: Outcome) -> list[int]:
    """The rounds or steps that events.jsonl tells of."""
    return [int(event["round" if "round" in event else "step"]) for event in run.events
            if event["event"] in ("round", "step")]


def steps(run: Outcome) -> list[int]:
    return [int(record["global_step" if "global_step" in record else "step"])
            for record in run.history]
