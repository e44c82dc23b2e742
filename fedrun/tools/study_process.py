"""A run of a study in processes of its own: how they are started and stopped, and what they do.

A run may diverge, be killed, and own a GPU or ranks. The process of the study writes the run's
whole config to a file. The other one, or each of its ranks, is `fedrun study --child FILE`, which
calls `fedrun.train` with it. How the run ended is read from its folder and, for a run that was
refused before it had one, from a file beside the config.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from fedrun.common.errors import FedrunError, InputError, explain, one_line
from fedrun.common.files import write_atomic
from fedrun.common.limits import shortage
from fedrun.common.log import log
from fedrun.config import FederatedConfig, RunConfig
from fedrun.distributed.launch import detect, without_rank
from fedrun.distributed.stopping import (
    LAUNCHER,
    REFUSED,
    SIGNALS,
    hangup_ignored,
    seconds_of_one_request,
)
from fedrun.flags import config_of
from fedrun.library.opened_run import Run
from fedrun.library.training import train
from fedrun.records.outcome import START_VARIABLE, read_outcome
from fedrun.strategies.plugins import LOADED
from fedrun.tools.study_devices import VISIBLE
from fedrun.tools.study_records import FAILED

FLAG = "--child"  # of `fedrun study`: not for users; torchrun must not take it for one of its own
CONFIG, ERROR = "config.json", "error.txt"
PRINTED_BYTES = 1 << 20  # most of a failed run's error output that are kept


class Children:
    """The processes of runs that this process has started, which end with it."""

    def __init__(self, logs: Path, workers: int = 1) -> None:
        """logs: the folder for the error output of runs that end badly; workers: processes that
        train the clients of one federated run."""
        self.stopped_by = ""
        """What first asked to stop: a signal's name, or the STOP file; empty if nothing did."""
        self.code = 0
        """The exit code that belongs to it."""
        self._logs, self._workers = logs, workers
        self._first = 0.0
        self._running: set[subprocess.Popen[bytes]] = set()

    def run(self, config: RunConfig, gpus: str | None, token: str) -> tuple[int, str]:
        """Run `config` in processes of its own. Returns the exit code, and the line of the error
        that was raised there, or an empty one.

        token: distinguishes this start's outcome from an earlier one. The process has a session of
        its own: Ctrl-C reaches it through this process alone, and if this process is killed, the
        kernel kills it too. Its output goes to a file, since a pipe would break then.
        """
        env = without_rank(os.environ) | {START_VARIABLE: token, LAUNCHER: str(os.getpid())}
        env.pop(REFUSED, None)  # that a run refuses to start is not for our launcher to know
        # Between a signal and the end of the round; torchrun's default is 30 seconds.
        env.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", f"{config.timeout:.0f}")
        if gpus is not None:
            env[VISIBLE] = gpus
        # In this machine's temporary folder: a run goes on while the disk with the results is full,
        # and must still be able to start.
        with (tempfile.TemporaryDirectory(prefix="fedrun-run-", ignore_cleanup_errors=True) as name,
              tempfile.TemporaryFile() as printed):
            file = Path(name) / CONFIG
            file.write_text(json.dumps(config.to_dict()), encoding="utf-8")
            child = subprocess.Popen(
                command(config, file, self._workers), stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL, stderr=printed, start_new_session=True, env=env)
            self._running.add(child)
            if self.stopped_by:  # between the caller's look and the start
                child.terminate()
            try:
                code = child.wait()
            finally:
                self._running.discard(child)
            if code == 0:
                with suppress(OSError):  # of a start that failed before
                    self.log(config).unlink()
            elif not self.stopped_by:
                size = printed.seek(0, os.SEEK_END)
                printed.seek(max(0, size - PRINTED_BYTES))
                with suppress(OSError):
                    write_atomic(self.log(config), printed.read())
            error = file.with_name(ERROR)
            return code, error.read_text(encoding="utf-8") if error.exists() else ""

    def log(self, config: RunConfig) -> Path:
        """The file for what a run prints to standard error if it ends badly."""
        return self._logs / f"{config.name}.log"

    def on_signal(self, number: int, _: FrameType | None = None) -> None:
        """The handler of signals: `stop`, or after an earlier request kill the runs."""
        if not self.stopped_by:
            self.code = 128 + number
            self.stop(signal.Signals(number).name, " (send it again to end them now)")
        elif time.monotonic() - self._first > seconds_of_one_request(number):
            for child in list(self._running):
                child.kill()

    def stop(self, why: str, hint: str = "") -> None:
        """Let every run write a checkpoint and end."""
        if self.stopped_by:
            return
        self.stopped_by, self._first = why, time.monotonic()
        for child in list(self._running):
            child.terminate()
        log(f"{why}: the runs stop after this round{hint}")


@contextmanager
def handling_signals(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Call `handler` for signals inside the block, if this is the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    wakeup = signal.set_wakeup_fd(-1)  # `interruptible` would end this process
    before = {number: signal.signal(number, handler) for number in SIGNALS
              if number != signal.SIGHUP or not hangup_ignored()}
    try:
        yield
    finally:
        for number, outer in before.items():
            signal.signal(number, outer)
        signal.set_wakeup_fd(wakeup)


def command(config: RunConfig, file: Path, workers: int) -> list[str]:
    """The command line of the run whose config is in `file`: under torchrun if several workers
    train its clients."""
    program = ["fedrun"]
    if workers > 1 and isinstance(config, FederatedConfig):
        processes = workers + int(config.server == "dedicated")
        program = ["fedrun.torchrun", "--nproc-per-node", str(processes), "-m", "fedrun"]
    plugins = [f"--plugin={plugin}" for plugin in LOADED]
    return [sys.executable, "-m", *program, "study", FLAG, str(file), *plugins]


def main(file: Path) -> int:
    """On each rank of a run that a study has started: train, and return the exit code.

    InputError for what the user has to change. Other errors are printed. The first rank with an
    error leaves its line beside the file; where the ranks end together, the run's folder has it.
    """
    launch = detect(os.environ)
    try:
        train(config_of(json.loads(file.read_text(encoding="utf-8"))))
    except Exception as error:
        from fedrun.distributed.connect import NotConnected  # imports torch
        from fedrun.federation.early_end import RunEnded
        from fedrun.run import report
        if not isinstance(error, RunEnded):
            line = shortage(error) or explain(error) or f"{type(error).__name__}: {one_line(error)}"
            with suppress(OSError), file.with_name(ERROR).open(
                    "x", encoding="utf-8", errors="backslashreplace") as first:
                first.write(line)
        if isinstance(error, InputError | NotConnected):
            raise
        report(error, launch)
        return 1
    return 0


def start(config: RunConfig, gpus: str | None, children: Children) -> None:
    """Run `config` on these GPUs to its end, or until it is stopped.

    A run that diverges leaves the reason in failed.txt. Raises FedrunError if it fails in any other
    way, InputError if the user has to change something, or if it was stopped and the study was not.
    """
    token, run = os.urandom(8).hex(), Run(config.run_dir)
    code, line = children.run(config, gpus, token)
    failed = (read_outcome(run.folder).get("start"), run.outcome) == (token, "failed")
    if failed and run.diverged:
        (run.folder / FAILED).write_text(f"{run.reason}\n", encoding="utf-8")
    elif children.stopped_by:
        return
    elif code < 0:
        raise FedrunError(f"study: {config.name} was ended by {signal.Signals(-code).name}; the "
                          "same command resumes the study")
    elif code == 2 and not failed:
        raise InputError(f"study: {config.name}: {line or _printed(config, children)}")
    elif code:
        line = (run.reason if failed else line) or f"ended with exit code {code}"
        raise FedrunError(f"study: {config.name}: {line} ({_printed(config, children)})")
    elif run.outcome != "finished":
        raise InputError(f"study: {config.name} was stopped; the same command resumes the study")


def _printed(config: RunConfig, children: Children) -> str:
    return f"what it printed is in {children.log(config)}"
