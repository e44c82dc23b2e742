"""The queue of a study: its runs in processes of their own, shared by any number of members.

A member is a process of the study. Whoever runs a run holds a lock of its name in the study's
folder queue/ (common/locks.py). Members on several machines that share the folder therefore take
part in one study: each takes the next run that is neither finished nor locked. The lock of a
process that is lost becomes free, and another takes its run up from the run's checkpoint.
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
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from fedrun.common import locks
from fedrun.common.errors import FedrunError, InputError
from fedrun.common.log import log
from fedrun.common.perplexity import perplexity
from fedrun.config import FederatedConfig, RunConfig
from fedrun.distributed.launch import without_rank
from fedrun.distributed.stopping import (
    LAUNCHER,
    REFUSED,
    SECONDS_OF_ONE_REQUEST,
    SIGNALS,
    hangup_ignored,
)
from fedrun.records import run_files
from fedrun.records.checkpoint import latest_step
from fedrun.records.outcome import START_VARIABLE, read_outcome
from fedrun.strategies.plugins import LOADED
from fedrun.tools.study_devices import VISIBLE
from fedrun.tools.study_runs import loss_halves
from fedrun.unused import NEVER_READ

SECONDS_BETWEEN_LOOKS = 1.0  # for a run that another process has in hand
ERROR_CHARS = 2000  # of a run's error output


class Stopped(FedrunError):
    """The study was asked to stop; `code` is the exit code."""

    def __init__(self, why: str, code: int, kept: int) -> None:
        runs = f"{kept} unfinished run{'s have' if kept != 1 else ' has'} a checkpoint"
        super().__init__(f"study: stopped by {why}: {runs}; the same command resumes the study")
        self.code = code


@dataclass(frozen=True)
class Member:
    """This process in a study."""

    folder: Path
    """The study's."""
    gpus: Sequence[str | None]
    """CUDA_VISIBLE_DEVICES of each run that it makes at the same time; None: as it is."""
    workers: int = 1
    """Processes that train the clients of one federated run."""
    asked_to_stop_by: Callable[[], str] = str
    """What asks the study to stop, beside signals; empty if nothing does."""


class Children:
    """The processes of runs that this process has started, which end with it."""

    def __init__(self, workers: int = 1) -> None:
        self.stopped_by = ""
        """What first asked to stop: a signal's name, or the STOP file; empty if nothing did."""
        self.code = 0
        """The exit code that belongs to it."""
        self._workers = workers
        self._first = 0.0
        self._running: set[subprocess.Popen[bytes]] = set()

    def run(self, config: RunConfig, gpus: str | None, token: str) -> tuple[int, str]:
        """Run `config` in processes of its own; the exit code and the end of the error output.

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
        with tempfile.TemporaryFile() as errors:
            child = subprocess.Popen(
                command(config, self._workers), stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL, stderr=errors, start_new_session=True, env=env)
            self._running.add(child)
            if self.stopped_by:  # between the caller's look and the start
                child.terminate()
            try:
                code = child.wait()
            finally:
                self._running.discard(child)
            errors.seek(0)
            return code, errors.read().decode(errors="replace").strip()[-ERROR_CHARS:]

    def on_signal(self, number: int, _: FrameType | None = None) -> None:
        """The handler of signals: `stop`, or after an earlier request kill the runs."""
        if not self.stopped_by:
            self.code = 128 + number
            self.stop(signal.Signals(number).name, " (send it again to end them now)")
        elif time.monotonic() - self._first > SECONDS_OF_ONE_REQUEST:
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
    def listening(self) -> Iterator[None]:
        """Obey signals inside the block, if this is the main thread."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        wakeup = signal.set_wakeup_fd(-1)  # `interruptible` would end this process
        before = {number: signal.signal(number, self.on_signal) for number in SIGNALS
                  if number != signal.SIGHUP or not hangup_ignored()}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(wakeup)


def command(config: RunConfig, workers: int) -> list[str]:
    """The command line of a run: under torchrun if several workers train its clients."""
    flags = [f"--{name}={'none' if value is None else value}"
             for name, value in config.to_dict().items()
             if name not in ("method", "model") and name not in NEVER_READ.get(config.method, {})]
    program = ["fedrun"]
    if workers > 1 and isinstance(config, FederatedConfig):
        processes = workers + int(config.server == "dedicated")
        program = ["fedrun.torchrun", "--nproc-per-node", str(processes), "-m", "fedrun"]
    plugins = [f"--plugin={plugin}" for plugin in LOADED]
    return [sys.executable, "-m", *program, config.method, *flags, *plugins]


def start(config: RunConfig, gpus: str | None, children: Children) -> None:
    """Run `config` on these GPUs to its end, or until it is stopped.

    A run that diverges leaves the end of its error output in failed.txt. Raises FedrunError if it
    fails in any other way, InputError if the user has to change something, or if it was stopped and
    the study was not.
    """
    token = os.urandom(8).hex()
    code, errors = children.run(config, gpus, token)
    outcome = read_outcome(config.run_dir)
    if code and (outcome.get("start"), outcome.get("kind")) == (token, "diverged"):
        (config.run_dir / "failed.txt").write_text(errors, encoding="utf-8")
    elif children.stopped_by:
        return
    elif code < 0:
        raise FedrunError(f"study: {config.name} was ended by {signal.Signals(-code).name}; the "
                          "same command resumes the study")
    elif code == 2:
        raise InputError(f"study: {config.name}: {errors}")
    elif code:
        raise FedrunError(f"study: {config.name}: {errors}")
    elif loss_halves(config) is None:
        raise InputError(f"study: {config.name} was stopped; the same command resumes the study")


class Queue:
    """What is left of some runs. Several threads of a member take from it."""

    def __init__(self, member: Member, configs: Iterable[RunConfig]) -> None:
        self._member, self._configs = member, list(configs)
        self._children = Children(member.workers)
        self._failed = threading.Event()
        self._finished: set[str] = set()

    def run_all(self) -> None:
        """Run what is not finished yet, a run on each of the member's `gpus` at a time; return when
        all of it is finished, by this process or by others.

        Raises Stopped if the study was asked to stop, and FedrunError if a run fails for another
        reason than diverging; other runs in hand are then completed first.
        """
        left = [config for config in self._configs if not self._is_finished(config)]
        if not left:
            return
        with self._children.listening():
            with ThreadPoolExecutor(len(self._member.gpus)) as pool:
                threads = [pool.submit(self._work, gpus)
                           for gpus in self._member.gpus[:len(left)]]
                while wait(threads, SECONDS_BETWEEN_LOOKS).not_done:
                    if why := self._member.asked_to_stop_by():
                        self._children.stop(why)
            if why := self._children.stopped_by:
                raise Stopped(why, self._children.code, sum(
                    latest_step(c.run_dir) is not None for c in left if not self._is_finished(c)))
        for thread in threads:
            thread.result()

    def _work(self, gpus: str | None) -> None:
        try:
            while not (self._children.stopped_by or self._failed.is_set()):
                if all(map(self._is_finished, self._configs)):
                    return
                if not any(self._take(config, gpus) for config in self._configs):
                    time.sleep(SECONDS_BETWEEN_LOOKS)
        except BaseException:
            self._failed.set()
            raise

    def _take(self, config: RunConfig, gpus: str | None) -> bool:
        """Run a run if it is not finished and no other process has it; whether it was run."""
        if self._is_finished(config) or self._children.stopped_by or self._failed.is_set():
            return False
        try:
            lock = locks.acquire(self._member.folder / "queue" / f"{config.name}.lock", patience=0)
        except locks.Busy:
            return False
        try:
            if self._is_finished(config):  # since the look above
                return False
            lock.write()
            began, step = time.monotonic(), latest_step(config.run_dir)
            start(config, gpus, self._children)
            if not self._is_finished(config):
                return False
            _remove_checkpoints(config)
            loss = loss_halves(config)
            assert loss is not None, f"{config.run_dir} is not finished"
            resumed = f", resumed from step {step}" * bool(step)
            done = sum(map(self._is_finished, self._configs))  # by others too
            print(f"{done}/{len(self._configs)}  {config.name}  "
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


def run_all(member: Member, configs: Iterable[RunConfig]) -> None:
    """See `Queue.run_all`."""
    Queue(member, configs).run_all()
