"""The queue of a study: its runs in processes of their own, shared by any number of studies.

Whoever runs a run holds a lock of its name in the study's folder queue/ (common/locks.py).
Processes on several machines that share the folder therefore take part in one study: each takes the
next run that is neither finished nor locked. The lock of a process that is lost becomes free, and
another takes its run up from the run's checkpoint.
"""

from __future__ import annotations

import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from fedrun.common import locks
from fedrun.common.errors import FedrunError, InputError
from fedrun.common.log import log
from fedrun.common.perplexity import perplexity
from fedrun.config import RunConfig
from fedrun.distributed.stopping import (
    LAUNCHER,
    SECONDS_OF_ONE_REQUEST,
    SIGNALS,
    hangup_ignored,
)
from fedrun.records import run_files
from fedrun.records.checkpoint import latest_step
from fedrun.records.outcome import START_VARIABLE, read_outcome
from fedrun.tools.study_runs import loss_halves
from fedrun.unused import NEVER_READ

SECONDS_BETWEEN_LOOKS = 1.0  # for a run that another process has in hand
ERROR_CHARS = 2000  # of a run's error output


class Stopped(FedrunError):
    """A signal asked the study to stop; `number` is the signal's."""

    def __init__(self, number: int, kept: int) -> None:
        runs = f"{kept} run{'s' * (kept != 1)}"
        super().__init__(f"study: stopped by {signal.Signals(number).name}: {runs} in hand kept a "
                         "checkpoint; the same command resumes the study")
        self.number = number


class Children:
    """The processes of runs that this process has started, which end with it."""

    def __init__(self) -> None:
        self.stopped_by = 0
        """The first signal that asked to stop; 0 if there was none."""
        self._first = 0.0
        self._running: set[subprocess.Popen[bytes]] = set()

    def run(self, config: RunConfig, token: str) -> tuple[int, str]:
        """Run `config` in a process of its own; its exit code and the end of its error output.

        token: distinguishes this start's outcome from an earlier one. The process has a session of
        its own: Ctrl-C reaches it through this process alone, and if this process is killed, the
        kernel kills it too. Its output goes to a file, since a pipe would break then.
        """
        flags = [f"--{name}={'none' if value is None else value}"
                 for name, value in config.to_dict().items()
                 if name not in ("method", "model")
                 and name not in NEVER_READ.get(config.method, {})]
        with tempfile.TemporaryFile() as errors:
            child = subprocess.Popen(
                [sys.executable, "-m", "fedrun", config.method, *flags], stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL, stderr=errors, start_new_session=True,
                env={**os.environ, START_VARIABLE: token, LAUNCHER: str(os.getpid())})
            self._running.add(child)
            if self.stopped_by:  # between the caller's look and the start
                child.terminate()
            try:
                code = child.wait()
            finally:
                self._running.discard(child)
            errors.seek(0)
            return code, errors.read().decode(errors="replace").strip()[-ERROR_CHARS:]

    def ask_to_stop(self, number: int, _: FrameType | None = None) -> None:
        """The handler of signals: let every run write a checkpoint and end. A second signal kills
        them."""
        now = time.monotonic()
        if self.stopped_by and now - self._first < SECONDS_OF_ONE_REQUEST:
            return
        for child in list(self._running):
            child.kill() if self.stopped_by else child.terminate()
        if not self.stopped_by:
            self.stopped_by, self._first = number, now
            for child in list(self._running):  # started meanwhile
                child.terminate()
            log(f"{signal.Signals(number).name}: the runs stop after this round (send it again to "
                "end them now)")

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Obey signals inside the block, if this is the main thread."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        wakeup = signal.set_wakeup_fd(-1)  # `interruptible` would end this process
        before = {number: signal.signal(number, self.ask_to_stop) for number in SIGNALS
                  if number != signal.SIGHUP or not hangup_ignored()}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(wakeup)


def start(config: RunConfig, children: Children) -> None:
    """Run `config` to its end, or until it is stopped.

    A run that diverges leaves the end of its error output in failed.txt. Raises InputError if it
    fails in any other way, or if it was stopped and the study was not.
    """
    token = os.urandom(8).hex()
    code, errors = children.run(config, token)
    outcome = read_outcome(config.run_dir)
    if code and (outcome.get("start"), outcome.get("kind")) == (token, "diverged"):
        (config.run_dir / "failed.txt").write_text(errors, encoding="utf-8")
    elif children.stopped_by:
        return
    elif code < 0:
        raise InputError(f"study: {config.name} was ended by {signal.Signals(-code).name}; the "
                         "same command resumes the study")
    elif code:
        raise InputError(f"study: {config.name}: {errors}")
    elif loss_halves(config) is None:
        raise InputError(f"study: {config.name} was stopped; the same command resumes the study")


class Queue:
    """What is left of some runs. Several threads take from it."""

    def __init__(self, folder: Path, configs: Iterable[RunConfig]) -> None:
        """folder: the study's."""
        self._folder, self._configs = folder / "queue", list(configs)
        self._children = Children()
        self._failed = threading.Event()
        self._finished: set[str] = set()

    def run_all(self, jobs: int) -> None:
        """Run what is not finished yet, `jobs` at a time; return when all of it is finished, by
        this process or by others.

        Raises Stopped after a signal, and InputError if a run fails for another reason than
        diverging; other runs in hand are then completed first.
        """
        left = [config for config in self._configs if not self._is_finished(config)]
        if not left:
            return
        with self._children.listening():
            with ThreadPoolExecutor(jobs) as pool:
                threads = [pool.submit(self._work) for _ in range(min(jobs, len(left)))]
                wait(threads)
            if number := self._children.stopped_by:
                raise Stopped(number, sum(latest_step(c.run_dir) is not None for c in left
                                          if not self._is_finished(c)))
        for thread in threads:
            thread.result()

    def _work(self) -> None:
        try:
            while not (self._children.stopped_by or self._failed.is_set()):
                if all(map(self._is_finished, self._configs)):
                    return
                if not any(map(self._take, self._configs)):
                    time.sleep(SECONDS_BETWEEN_LOOKS)
        except BaseException:
            self._failed.set()
            raise

    def _take(self, config: RunConfig) -> bool:
        """Run a run if it is not finished and no other process has it; whether it was run."""
        if self._is_finished(config) or self._children.stopped_by or self._failed.is_set():
            return False
        try:
            lock = locks.acquire(self._folder / f"{config.name}.lock", patience=0)
        except locks.Busy:
            return False
        try:
            if self._is_finished(config):  # since the look above
                return False
            lock.write()
            began, step = time.monotonic(), latest_step(config.run_dir)
            start(config, self._children)
            if not self._is_finished(config):
                return False
            _remove_checkpoints(config)
            loss = loss_halves(config)
            assert loss is not None, f"{config.run_dir} is not finished"
            resumed = f", resumed from step {step}" * bool(step)
            print(f"{len(self._finished)}/{len(self._configs)}  {config.name}  "
                  f"{time.monotonic() - began:.0f} s{resumed}  "
                  f"val ppl {perplexity(statistics.mean(loss)):.2f}", flush=True)
            return True
        finally:
            lock.release()

    def _is_finished(self, config: RunConfig) -> bool:
        if config.name not in self._finished and loss_halves(config) is not None:
            self._finished.add(config.name)
        return config.name in self._finished


def _remove_checkpoints(config: RunConfig) -> None:
    """Of a finished run, which a study does not train further: they are most of its size."""
    with suppress(OSError):
        run_files.remove(config.run_dir, lambda name: name.startswith("checkpoints/"))
        (config.run_dir / "checkpoints").rmdir()


def run_all(folder: Path, configs: Iterable[RunConfig], jobs: int) -> None:
    """See `Queue.run_all`."""
    Queue(folder, configs).run_all(jobs)
