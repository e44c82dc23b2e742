"""A slow disk: rounds continue while the server's and the workers' files are being written."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedrun.federation.messages import RoundPlan
from fedrun.federation.worker import Worker
from fedrun.records import checkpoint, snapshots
from fedrun.records.recorder import MAX_PENDING, Recorder
from tests.support.runs import Run, assert_equal

MAX_HELD_SECONDS = 60.0  # of a write
WRITERS = ("fedrun-writer", "fedrun-saver")


class Disk:
    """Holds every write of a background thread until `free` is set, and records the order of
    events."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: list[str] = []
        self.held = threading.Semaphore(0)
        self.free = threading.Event()
        for module in (snapshots, checkpoint):
            monkeypatch.setattr(module, "write_atomic", self._slowly(module.write_atomic))
        self.note(monkeypatch, Worker, "train")
        self.note(monkeypatch, Worker, "aggregate")

    def _slowly(self, write: Callable[..., None]) -> Callable[..., None]:
        def slow(path: Path, *content: Any, **how: Any) -> None:
            if threading.current_thread().name.startswith(WRITERS):
                self.held.release()
                assert self.free.wait(MAX_HELD_SECONDS), "nobody continued without the disk"
                self.seen.append("wrote")
            elif self.seen:  # in a round, on a thread that it waits for
                self.seen.append(f"{path.name} written in the round's own thread")
            write(path, *content, **how)
        return slow

    def note(self, monkeypatch: pytest.MonkeyPatch, owner: type, name: str) -> None:
        healthy = getattr(owner, name)

        def noted(*args: Any) -> Any:
            self.seen.append(name)
            return healthy(*args)
        monkeypatch.setattr(owner, name, noted)


def test_all_rounds_pass_while_writes_are_held(run_here: Run,
                                               monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluations, and a checkpoint that the workers' thread is held with."""
    flags = ("--num_clients", 2, "--rounds", MAX_PENDING, "--val_freq", 1, "--checkpoint_freq", 1)
    undisturbed = run_here("fed_avg", *flags, name="undisturbed")
    disk = Disk(monkeypatch)
    finish = Worker.finish

    def finish_when_held(worker: Worker, plan: RoundPlan) -> Any:
        """All rounds have passed: the server's first piece and the workers' first are held."""
        assert disk.held.acquire(timeout=MAX_HELD_SECONDS)
        assert disk.held.acquire(timeout=MAX_HELD_SECONDS)
        disk.free.set()
        return finish(worker, plan)

    monkeypatch.setattr(Worker, "finish", finish_when_held)
    slow = run_here("fed_avg", *flags)
    assert slow.code == 0, slow.output
    assert disk.seen[:2 * MAX_PENDING] == ["train", "aggregate"] * MAX_PENDING
    assert "more slowly" not in slow.output
    assert_equal(slow, undisturbed)


def test_an_error_of_the_writer_ends_the_run(run_here: Run, monkeypatch: pytest.MonkeyPatch
                                             ) -> None:
    def broken(*_: Any) -> None:
        raise ZeroDivisionError("in the writer")
    monkeypatch.setattr(Recorder, "_save", broken)
    outcome = run_here("fed_avg", "--num_clients", 2, "--rounds", 2)
    assert outcome.code == 1
    assert "in the writer" in outcome.output


@pytest.mark.slow
def test_workers_of_other_processes_do_not_wait_either(run: Run, tmp_path: Path) -> None:
    """The server's writes are held until a worker has trained in the last round."""
    script, trained = tmp_path / "held.py", tmp_path / "trained"
    script.write_text(f"""
import os, sys, threading, time
from fedrun.records import snapshots
from fedrun.federation.worker import Worker

write, train = snapshots.write_atomic, Worker.train
def held(*args, **how):
    deadline = time.monotonic() + {MAX_HELD_SECONDS}
    while threading.current_thread().name.startswith("fedrun-writer") and (
            not os.path.exists({str(trained)!r})):
        if time.monotonic() > deadline:
            print("nobody continued without the disk", flush=True)
            os._exit(1)
        time.sleep(0.01)
    write(*args, **how)
def noted(worker, plan):
    report = train(worker, plan)
    if plan.last:
        open({str(trained)!r}, "w").close()
    return report
snapshots.write_atomic, Worker.train = held, noted
from fedrun.__main__ import main
main()
""")
    outcome = run("fed_avg", "--num_clients", 2, "--rounds", 4, "--val_freq", 1,
                  "--checkpoint_freq", "none", processes=3, script=script)
    assert outcome.code == 0, outcome.output
    assert [record["global_step"] for record in outcome.history] == [1, 2, 3, 4]
