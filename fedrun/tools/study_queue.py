"""The queue of a study: its runs in processes of their own, shared by any number of members.

A member is a process of the study. Whoever runs a run holds a lock of its name in the study's
folder queue/ (common/locks.py). Members on several machines that share the folder therefore take
part in one study: each takes the next run that is neither finished nor locked. The lock of a
process that is lost becomes free, and another takes its run up from the run's checkpoint.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from fedrun.common import locks
from fedrun.common.perplexity import perplexity
from fedrun.config import RunConfig
from fedrun.records import run_files
from fedrun.records.checkpoint import latest_step
from fedrun.tools.study_process import Children, handling_signals, start
from fedrun.tools.study_runs import loss_halves

SECONDS_BETWEEN_LOOKS = 1.0  # for a run that another process has in hand


class Stopped(BaseException):
    """The study was asked to stop; `code` is the exit code, `left` what there is to go on from. No
    `except Exception` of a library holds it up."""

    def __init__(self, why: str, code: int, left: str) -> None:
        super().__init__(f"study: stopped by {why}: {left}; the same command resumes the study")
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


class Queue:
    """What is left of some runs. Several threads of a member take from it."""

    def __init__(self, member: Member, configs: Iterable[RunConfig]) -> None:
        self._member = member
        self._configs = [*{config.name: config for config in configs}.values()]
        self._children = Children(member.folder / "queue", member.workers)
        self._failed = threading.Event()
        self._finished: set[str] = set()

    def run_all(self) -> None:
        """Run what is not finished yet, a run on each of the member's `gpus` at a time; return when
        all of it is finished, by this process or by others.

        Raises Stopped if the study was asked to stop, and FedrunError if a run fails for another
        reason than diverging; other runs in hand are then completed first.
        """
        left = [config for config in self._configs if not self._is_finished(config)]
        self._clean_up()
        if not left:
            return
        with handling_signals(self._children.on_signal):
            with ThreadPoolExecutor(len(self._member.gpus)) as pool:
                threads = [pool.submit(self._work, gpus)
                           for gpus in self._member.gpus[:len(left)]]
                while wait(threads, SECONDS_BETWEEN_LOOKS).not_done:
                    if why := self._member.asked_to_stop_by():
                        self._children.stop(why)
            if why := self._children.stopped_by:
                kept = sum(latest_step(c.run_dir) is not None for c in left
                           if not self._is_finished(c))
                raise Stopped(why, self._children.code, f"{kept} unfinished run"
                              f"{'s have' if kept != 1 else ' has'} a checkpoint")
        for thread in threads:
            thread.result()
        self._clean_up()

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
            lock = self._lock(config)
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

    def _clean_up(self) -> None:
        """Remove the checkpoints of finished runs whose member was lost before it did so."""
        for config in self._configs:
            if self._is_finished(config) and (config.run_dir / "checkpoints").is_dir():
                with suppress(locks.Busy):
                    lock = self._lock(config)
                    try:
                        _remove_checkpoints(config)
                    finally:
                        lock.release()

    def _lock(self, config: RunConfig) -> locks.Held:
        """The right to work on a run's folder. locks.Busy if another process has it."""
        return locks.acquire(self._member.folder / "queue" / f"{config.name}.lock", patience=0)

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
