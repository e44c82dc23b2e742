"""Shared by all tests: small data prepared once, and whole runs in processes of their own."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from fedrun import cli
from fedrun.data.corpora import local_files
from fedrun.data.pydocs import read_pydocs
from fedrun.data.tokens import TokenData, prepare

torch.set_num_threads(1)
ROOT = Path(__file__).parent.parent
SHARED_DATA = ROOT.parent / "shared" / "data"

# Some of the documentation that comes with Python, for runs of seconds on real text.
_folder = tempfile.TemporaryDirectory(prefix="fedrun-tests-")
CORPUS = Path(_folder.name) / "corpus.txt"
CORPUS.write_text("\n\n".join(read_pydocs(local_files("pydocs")[:40]).values()), encoding="utf-8")

SMALL = ("--config", "tiny", "--dataset", str(CORPUS), "--tokenizer", "bpe:400",
         "--sequence_length", "32", "--batch_size", "2", "--val_freq", "3", "--lr", "2e-3",
         "--dtype", "fp32")


@dataclass
class Outcome:
    """How a run ended, and what it left."""

    code: int
    output: str
    run_dir: Path

    @property
    def history(self) -> list[dict[str, Any]]:
        history: list[dict[str, Any]] = json.loads(
            (self.run_dir / "training_history.json").read_text())
        return history

    @property
    def model(self) -> dict[str, Tensor]:
        return load_file(self.run_dir / "model.safetensors")

    @property
    def bits(self) -> bytes:
        return (self.run_dir / "model.safetensors").read_bytes()


Run = Callable[..., Outcome]


def execute(command: Sequence[str], limit: float = 100, env: dict[str, str] | None = None,
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


def listening(root: psutil.Process) -> set[str]:
    """The addresses at which a process and its descendants listen."""
    processes = {root.pid, *(p.pid for p in root.children(recursive=True))}
    return {c.laddr.ip for c in psutil.net_connections("inet")
            if c.pid in processes and c.status == psutil.CONN_LISTEN}


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def wait_until(condition: Callable[[], bool], timeout: float) -> None:
    """Look every 50 ms until something holds; past the timeout (seconds) the test fails."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.05)


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokenised text for all tests of this session."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def pydocs_tokens(cache_dir: Path) -> TokenData:
    """Real text with documents, sources and topics: about 4,000 sequences of 128 tokens."""
    return prepare("pydocs", "bpe:4096", 128, cache_dir, lambda line: None)


@pytest.fixture
def run(cache_dir: Path, tmp_path: Path) -> Run:
    """run("fed_avg", "--rounds", 4, processes=3): a whole run on SMALL, in its own processes."""

    def run_it(method: str, *flags: object, processes: int = 1, name: str = "run",
               limit: float = 100, script: Path | None = None, restarts: int = 0,
               env: dict[str, str] | None = None) -> Outcome:
        program = [str(script)] if script else ["-m", "fedrun"]
        code, output = execute(
            [*torchrun(processes, restarts), *program, method, *SMALL, "--data_dir", str(tmp_path),
             "--cache_dir", str(cache_dir), "--run_name", name, *map(str, flags)], limit, env)
        return Outcome(code, output, tmp_path / name)

    return run_it


@pytest.fixture
def run_here(cache_dir: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Run:
    """run_here("fed_avg", "--rounds", 3, after=outcome): a run in the process of the test, in a
    copy of another one's folder: whoever has held a folder holds it to the end of its process."""

    def run_it(method: str, *flags: object, name: str = "", after: Outcome | None = None
               ) -> Outcome:
        name = name or f"run{len(list(tmp_path.iterdir()))}"
        if after:
            shutil.copytree(after.run_dir, tmp_path / name)
        code = cli.main([method, *SMALL, "--data_dir", str(tmp_path), "--cache_dir",
                         str(cache_dir), "--run_name", name, *map(str, flags)])
        out, err = capfd.readouterr()
        return Outcome(code, out + err, tmp_path / name)

    return run_it
