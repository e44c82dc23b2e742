"""Kill any process at any moment and start again: the final model is the undisturbed one, bit for
bit.

3 kills (rank, stage, round) from a seeded generator, each at another stage of local training,
reduction, evaluation and the writing of checkpoints; some kill torchrun itself. Clients' states are
kept in memory or on disk, before and after the kill. `make soak` draws 200, at all ten stages.
"""

from __future__ import annotations

import os
import random
import subprocess
import time
from pathlib import Path

import pytest

from tests.support.runs import (
    FAULTY,
    FLAGS,
    SMALL,
    Outcome,
    alive,
    assert_equal,
    children_of,
    fault,
    start,
    torchrun,
    wait_until,
)

STAGES = {"train": "worker", "record": "server", "reduced": "worker", "before-manifest": "server",
          "half-written": "worker", "after-manifest": "server", "reduce": "worker",
          "decide": "server", "evaluate": "worker", "finish": "server"}
KILLS = int(os.environ.get("KILLS", "3"))
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


def begin(tmp_path: Path, cache_dir: Path, processes: int, store: str, env: dict[str, str],
          log: Path) -> subprocess.Popen[bytes]:
    return start(
        [*torchrun(processes), "-m", FAULTY, "fed_avg", *SMALL, *map(str, FLAGS), "--data_dir",
         tmp_path, "--cache_dir", cache_dir, "--run_name", "run", "--client_store", store],
        log, env)


def end_of_all(launcher: subprocess.Popen[bytes], struck: Path, log: Path) -> float:
    """Wait for the launcher and all it started; seconds from the kill to the last one's end."""
    with children_of(launcher) as children:
        wait_until(lambda: launcher.poll() is not None and not any(map(alive, children())),
                   LIMIT_SECONDS, log.read_text)
        assert struck.exists(), log.read_text()
        return time.time() - struck.stat().st_mtime


seconds_to_end: list[float] = []


@pytest.mark.parametrize("number", range(KILLS))
def test_a_kill_costs_no_bit(number: int, tmp_path: Path, cache_dir: Path, undisturbed: Outcome,
                             capsys: pytest.CaptureFixture[str]) -> None:
    what, at, rank = draw(number)
    env, log = fault(tmp_path, what, at, rank), tmp_path / "log"
    generator = random.Random(number)
    processes = generator.choice([1, 2, 3])
    stores = generator.choices(["memory", "disk"], k=2)
    killed = begin(tmp_path, cache_dir, 1 + WORKERS, stores[0], env, log)
    seconds_to_end.append(end_of_all(killed, tmp_path / "struck", log))
    assert seconds_to_end[-1] < 15, (what, at, rank)
    again = begin(tmp_path, cache_dir, processes, stores[1], env, log)
    assert again.wait(LIMIT_SECONDS) == 0, log.read_text()
    assert_equal(Outcome(0, log.read_text(), tmp_path / "run"), undisturbed)
    if number == KILLS - 1:
        with capsys.disabled():
            print(f"\n{len(seconds_to_end)} kills survived; from a kill to the last process's end: "
                  f"{max(seconds_to_end):.1f} s at most")
