"""Sample texts that training on GPUs does not wait for, and warnings that name what is slow."""

from __future__ import annotations

import json
import logging
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from fedrun.flags import resolve
from fedrun.records import recorder, sample_texts
from fedrun.records.recorder import MAX_PENDING, Recorder
from fedrun.records.sample_texts import SampleTexts
from fedrun.records.schema import FEDERATED
from fedrun.training.params import FlatParams

TOTAL = 3 * MAX_PENDING
SECONDS = 20.0


@pytest.fixture
def run(tmp_path: Path, request: pytest.FixtureRequest) -> Recorder:
    """A recorder, of a run on GPUs unless the test says otherwise."""
    config = resolve("fed_avg", {"data_dir": str(tmp_path), "run_name": "run"})
    config.run_dir.mkdir()
    return Recorder(config, FEDERATED, TOTAL, FlatParams(torch.nn.Linear(2, 2)), {}, 1,
                    skips_texts=getattr(request, "param", True))


ON_CPUS = pytest.mark.parametrize("run", [False], indirect=True)


def evaluate(run: Recorder, number: int, make: Any) -> dict[str, Any]:
    run.totals.add(10, 9.0, 9)
    record = run.evaluated(number, [(0, 5.0, 5)], torch.ones(6), make)
    run.step(number, 7.0, 0.1, record)
    return record


def texts(run: Recorder) -> list[str | None]:
    history = json.loads((run.config.run_dir / "training_history.json").read_text())
    return [record["generated"] for record in history]


def test_no_round_waits_for_a_text(run: Recorder, caplog: pytest.LogCaptureFixture) -> None:
    """All evaluations but the first, whose text is not complete, and the last go without."""
    free = threading.Event()

    def make() -> str:
        assert free.wait(SECONDS)
        return "text"

    caplog.set_level(logging.INFO, "fedrun")
    for number in range(1, TOTAL):
        evaluate(run, number, make)
        run.wait()
    assert texts(run) == [None] * (TOTAL - 1)  # everything else is on the disk
    free.set()
    evaluate(run, TOTAL, make)
    run.finish(TOTAL, "", [])
    assert texts(run) == ["text", *[None] * (TOTAL - 2), "text"]
    assert caplog.text.count("a sample text takes longer than the rounds between evaluations") == 1
    assert "training waits" not in caplog.text


def test_texts_take_at_most_half_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next one is begun when as much time has passed as the last one took."""
    now, made = [0.0], list[int]()
    monkeypatch.setattr(sample_texts, "monotonic", lambda: now[0])
    samples = SampleTexts(1, "round")

    def take(seconds: float, number: int) -> str:
        now[0] += seconds
        made.append(number)
        return f"text {number}"

    for number in range(10):
        record: dict[str, Any] = {"generated": None}
        samples.offer(record, partial(take, 2.5, number), last=False)
        samples.wait()
        assert record["generated"] == (f"text {number}" if number in made else None)
        now[0] += 1
    assert made == [0, 3, 6, 9]
    samples.end_thread()


def test_an_error_in_a_text_is_raised(run: Recorder) -> None:
    def fail() -> str:
        raise ZeroDivisionError("a bug")

    evaluate(run, 1, fail)
    with pytest.raises(ZeroDivisionError):
        run.finish(1, "", [])
    run.end_thread()


@ON_CPUS
def test_on_cpus_every_evaluation_has_its_text_and_the_warning_names_it(
        run: Recorder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    free, healthy = threading.Event(), vars(recorder)["log"]

    def log(*args: Any) -> None:
        free.set()
        healthy(*args)

    def make() -> str:
        begun.set()
        assert free.wait(SECONDS)
        return "text"

    begun = threading.Event()
    monkeypatch.setattr(recorder, "log", log)
    for number in range(1, TOTAL + 1):
        evaluate(run, number, make)
        if number == 1:
            assert begun.wait(SECONDS)
            time.sleep(0.3)  # longer than the thread needs for anything else
    run.finish(TOTAL, "", [])
    assert texts(run) == ["text"] * TOTAL
    assert ("a sample text takes longer than the rounds between evaluations: training waits for it"
            in caplog.text)
    assert "disk" not in caplog.text
