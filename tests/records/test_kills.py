"""Kill any process at any moment and start again: the final model is the undisturbed one, bit for
bit.

20 kills (rank, stage, round) from a seeded generator, spread over local training, reduction,
evaluation and the writing of checkpoints; some kill torchrun itself. Clients' states are kept in
memory or on disk, before and after the kill. `make soak` draws 200.
"""

from __future__ import annotations

import os
import random
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from tests.support.runs import (
    FAULTY,
    FLAGS,
    ROOT,
    SMALL,
    Outcome,
    alive,
    assert_equal,
    fault,
    torchrun,
)

STAGES = {"train": "worker", "reduce": "worker", "reduced": "worker", "evaluate": "worker",
          "half-written": "worker", "decide": "server", "record": "server",
          "before-manifest": "server", "after-manifest": "server", "finish": "server"}
KILLS = int(os.environ.get("KILLS", "20"))
WORKERS = 2
LIMIT_SECONDS = 100.0

pytestmark = pytest.mark.slow


def draw(number: int) -> tuple[str, str, int]:
    """(what is killed, stage:round, the rank that reaches it)."""
    generator = random.Random(1000 + number)
    stage = list(STAGES)[number % len(STAGES)]  # each equally often
    rank = 0 if STAGES[stage] == "server" else generator.randint(1, WORKERS)
    rounds = {"evaluate": [1, 3, 6, 7], "finish": [7], "half-written": [2, 4, 6],
              "before-manifest": [2, 4, 6], "after-manifest": [2, 4, 6]}
    step = generator.choice(rounds.get(stage, [1, 2, 3, 4, 5, 6, 7]))
    what = generator.choice(["kill", "kill", "kill", "launcher"])
    return what, f"{stage}:{step}", rank


def start(tmp_path: Path, cache_dir: Path, processes: int, store: str, env: dict[str, str],
          log: Path) -> subprocess.Popen[bytes]:
    with log.open("ab") as out:
        return subprocess.Popen(
            [*torchrun(processes), "-m", FAULTY, "fed_avg", *SMALL, *map(str, FLAGS), "--data_dir",
             str(tmp_path), "--cache_dir", str(cache_dir), "--run_name", "run",
             "--client_store", store], stdout=out,
            stderr=subprocess.STDOUT, cwd=ROOT, start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", **env})


def wait_for_all(launcher: subprocess.Popen[bytes], struck: Path, log: Path) -> float:
    """Wait until the launcher and all its children have ended; seconds from the kill until then."""
    children: list[psutil.Process] = []
    began = time.monotonic()
    try:
        while launcher.poll() is None or any(map(alive, children)):
            if launcher.poll() is None:
                children = psutil.Process(launcher.pid).children() or children
            assert time.monotonic() < began + LIMIT_SECONDS, log.read_text()
            time.sleep(0.02)
        assert struck.exists(), log.read_text()
        return time.time() - struck.stat().st_mtime
    finally:
        for child in filter(alive, children):
            child.kill()
        if launcher.poll() is None:
            launcher.kill()
            launcher.wait()


seconds_to_end: list[float] = []


@pytest.mark.parametrize("number", range(KILLS))
def test_a_kill_costs_no_bit(number: int, tmp_path: Path, cache_dir: Path, undisturbed: Outcome,
                             capsys: pytest.CaptureFixture[str]) -> None:
    what, at, rank = draw(number)
    env, log = fault(tmp_path, what, at, rank), tmp_path / "log"
    generator = random.Random(number)
    processes = generator.choice([1, 2, 3])
    stores = generator.choices(["memory", "disk"], k=2)
    killed = start(tmp_path, cache_dir, 1 + WORKERS, stores[0], env, log)
    seconds_to_end.append(wait_for_all(killed, tmp_path / "struck", log))
    assert seconds_to_end[-1] < 15, (what, at, rank)
    again = start(tmp_path, cache_dir, processes, stores[1], env, log)
    assert again.wait(LIMIT_SECONDS) == 0, log.read_text()
    assert_equal(Outcome(0, log.read_text(), tmp_path / "run"), undisturbed)
    if number == KILLS - 1:
        with capsys.disabled():
            print(f"\n{len(seconds_to_end)} kills survived; from a kill to the last process's end: "
                  f"{max(seconds_to_end):.1f} s at most")
