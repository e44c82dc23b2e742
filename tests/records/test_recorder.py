"""The recorder without training: the files of both schemas, a full disk, the order of writes."""

from __future__ import annotations

import errno
import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from fedrun.common.errors import FolderLost
from fedrun.flags import resolve
from fedrun.model.names import mamba2_names
from fedrun.records import checkpoint_writer, recorder
from fedrun.records.checkpoint import GLOBAL, folder_of, latest_valid
from fedrun.records.checkpoint_writer import CheckpointWriter
from fedrun.records.recorder import MAX_PENDING, Recorder
from fedrun.records.schema import CENTRAL, FEDERATED, Schema, read_field
from fedrun.records.snapshots import SnapshotWriter
from fedrun.training.params import FlatParams

TOTAL = 6
BOTH = pytest.mark.parametrize("schema", [FEDERATED, CENTRAL], ids=["federated", "central"])
Start = Callable[..., Recorder]


class Block(nn.Module):
    """A model of one tracked parameter, D (2,), which is 0 at the start."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.ModuleDict({"mixer": nn.ParameterDict(
            {"D": nn.Parameter(torch.zeros(2))})})])
        self.names = mamba2_names(["layers.0.mixer.D"])


@pytest.fixture
def start(tmp_path: Path) -> Start:
    """A recorder as a start of the run makes it, one worker."""
    def make(schema: Schema = FEDERATED, done: int = 0, state: Any = None, **flags: Any
             ) -> Recorder:
        config = resolve("fed_avg" if schema is FEDERATED else "central", {
            "data_dir": str(tmp_path), "run_name": "run", "checkpoint_freq": 2} | flags)
        (config.run_dir / "tokenizer").mkdir(parents=True, exist_ok=True)
        return Recorder(config, schema, TOTAL, FlatParams(Block()), {"versions": {}}, 1, done,
                        state)
    return make


def evaluate(run: Recorder, number: int, loss: float = 2.0, **fields: Any) -> dict[str, Any]:
    """A step that is evaluated, whose model is `number` throughout."""
    run.totals.add(10, 9 * loss, 9)
    record = run.evaluated(number, [(0, 5 * loss, 5)], torch.full((2,), float(number)),
                           lambda: f"text {number}", **fields)
    run.step(number, 7.0, 0.1, record)
    return record


def model_of(run: Recorder) -> list[float]:
    return load_file(run.config.run_dir / "model.safetensors")["layers.0.mixer.D"].tolist()


def history_of(run: Recorder) -> list[dict[str, Any]]:
    history: list[dict[str, Any]] = json.loads(
        (run.config.run_dir / "training_history.json").read_text())
    return history


def snapshots_of(run: Recorder) -> list[str]:
    """The names below params/ and deltas/, which are the same but for the start's parameters."""
    folder = run.config.run_dir / run.schema.snapshots
    names = [sorted(path.name for path in (folder / kind).glob("*.npz"))
             for kind in ("params", "deltas")]
    assert names[0] == ["step_000000.npz", *names[1]]
    start = np.load(folder / "params" / "step_000000.npz")
    for name in names[1]:
        now, change = (np.load(folder / kind / name) for kind in ("params", "deltas"))
        for key in start.files:
            np.testing.assert_array_equal(now[key] - start[key], change[f"delta_{key}"])
    return names[1]


def fill(monkeypatch: pytest.MonkeyPatch, module: Any, name: str) -> Callable[[], None]:
    """Let a function of a module find the disk full until what is returned is called."""
    healthy = getattr(module, name)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "file")

    monkeypatch.setattr(module, name, full)
    return lambda: monkeypatch.setattr(module, name, healthy)


@BOTH
def test_the_files_of_a_run(start: Start, schema: Schema) -> None:
    run = start(schema)
    evaluate(run, 1, effective_clients=2.0)
    run.totals.add(10, 1.0, 1)
    run.step(2, 5.0, 0.2, left_out=[])
    run.finish(2, "SIGTERM", [])
    folder = run.config.run_dir
    record, = history_of(run)
    assert record[schema.step] == read_field(record, "step") == 1
    assert record[schema.val_loss] == read_field(record, "val_loss") == 2.0
    assert record[schema.val_ppl] == read_field(record, "val_ppl") == pytest.approx(np.exp(2.0))
    assert record["train_loss"] == 2.0
    assert record["val_loss_halves"] == [2.0, 2.0]
    assert (record["generated"], record["tokens"], record["effective_clients"]) == ("text 1", 10, 2)
    assert model_of(run) == [1.0, 1.0]
    assert snapshots_of(run) == ["step_000001.npz"]
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    assert [event["event"] for event in events] == ["start", schema.unit, schema.unit, "end"]
    evaluated, trained = events[1:3]
    assert (evaluated[schema.unit], evaluated["effective_clients"]) == (1, 2.0)
    assert evaluated["val_ppl"] == record[schema.val_ppl]
    assert (trained[schema.unit], trained["train_ppl"], trained["lr"]) == (2, 5.0, 0.2)
    assert trained["left_out"] == []
    assert "val_ppl" not in trained
    outcome = json.loads((folder / "outcome.json").read_text())
    assert (outcome["outcome"], outcome["step"], outcome["reason"]) == ("stopped", 2, "SIGTERM")


@BOTH
def test_a_checkpoint_holds_the_history_until_its_step(start: Start, schema: Schema) -> None:
    """With the sample text that was still to be made as it began. A run resumes from it."""
    run, saver = start(schema), CheckpointWriter()
    evaluate(run, 1)
    evaluate(run, 2)
    assert run.checkpoint_due(2)
    run.begin_checkpoint(2, reference=0.5)
    saver.begin(folder_of(run.config.run_dir, 2), 2, {GLOBAL: {"model": torch.ones(2)}})
    assert not run.checkpoint_due(4)  # since the worker still writes
    evaluate(run, 3)
    run.commit_checkpoints([saver.written(wait=True)])
    run.close()
    found = latest_valid(run.config.run_dir)
    assert found is not None
    assert found.step == 2
    state = found.server
    assert [record["generated"] for record in state["history"]] == ["text 1", "text 2"]
    assert state["reference"] == 0.5
    resumed = start(schema, 2, state)
    assert [record[schema.step] for record in history_of(resumed)] == [1, 2]
    assert resumed.totals.tokens == 20
    evaluate(resumed, 4)
    resumed.finish(6, "", [])
    assert [record[schema.step] for record in history_of(resumed)] == [1, 2, 4]
    delta = np.load(resumed.config.run_dir / schema.snapshots / "deltas" / "step_000004.npz")
    assert delta["delta_layers.0.D"].tolist() == [4.0, 4.0]  # since the start of the run


def test_the_thread_writes_in_the_order_of_the_calls(start: Start, monkeypatch: pytest.MonkeyPatch
                                                     ) -> None:
    """One checkpoint after the evaluation before it; both while training continues."""
    written: list[str] = []
    free = threading.Event()

    def noting(module: Any, name: str) -> None:
        healthy = getattr(module, name)

        def note(*args: Any, **how: Any) -> Any:
            assert threading.current_thread().name.startswith("fedrun-writer")
            assert free.wait(60)
            written.append(name)
            return healthy(*args, **how)
        monkeypatch.setattr(module, name, note)

    run, saver = start(), CheckpointWriter()
    noting(recorder, "save_model")
    noting(recorder, "write_json")
    noting(checkpoint_writer, "commit")
    evaluate(run, 1)
    run.begin_checkpoint(1)
    saver.begin(folder_of(run.config.run_dir, 1), 1, {GLOBAL: {"model": torch.ones(2)}})
    run.commit_checkpoints([saver.written(wait=True)])
    evaluate(run, 2)
    assert written == []
    free.set()
    run.close()
    assert written == ["save_model", "write_json", "commit", "save_model", "write_json"]


@BOTH
def test_a_full_disk_is_tried_again_by_the_next_evaluation(
        start: Start, schema: Schema, monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture) -> None:
    run = start(schema, keep="best")
    evaluate(run, 1)
    run.wait()
    empty = fill(monkeypatch, recorder, "save_model")
    evaluate(run, 2)
    run.wait()
    assert f"{schema.unit} 2 could not be written to {run.config.run_dir}" in caplog.text
    assert (model_of(run), len(history_of(run)), len(snapshots_of(run))) == ([1.0, 1.0], 1, 1)
    empty()
    evaluate(run, 3)
    run.close()
    assert (model_of(run), len(history_of(run)), len(snapshots_of(run))) == ([3.0, 3.0], 3, 3)


@pytest.mark.parametrize("last", [TOTAL, 5], ids=["the last evaluation", "a full queue"])
def test_a_disk_that_stays_full_ends_the_run(start: Start, last: int,
                                             monkeypatch: pytest.MonkeyPatch) -> None:
    run = start()
    fill(monkeypatch, recorder, "save_model")
    for number in [1, 2, 3, last] if last == 5 else [last]:
        evaluate(run, number)
    with pytest.raises(OSError, match="No space"):
        run.close()


def test_no_checkpoint_without_the_snapshots_before_it(
        start: Start, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    run, saver = start(), CheckpointWriter()
    empty = fill(monkeypatch, SnapshotWriter, "write")
    for number in (1, 2):
        if number == 2:
            empty()
        else:
            evaluate(run, number)
        run.begin_checkpoint(number)
        saver.begin(folder_of(run.config.run_dir, number), number,
                    {GLOBAL: {"model": torch.ones(2)}})
        run.commit_checkpoints([saver.written(wait=True)])
        run.wait()
    folders = sorted(path.name for path in (run.config.run_dir / "checkpoints").iterdir())
    assert folders == ["step_000002"]
    assert "step_000001" in "".join(caplog.messages)
    assert snapshots_of(run) == ["step_000001.npz"]
    run.close()


@pytest.mark.parametrize("error", [FolderLost("taken"), ZeroDivisionError("a bug")])
def test_errors_of_the_thread_are_raised_where_tasks_are_handed_over(
        start: Start, error: Exception) -> None:
    run = start()

    def fail() -> str:
        raise error

    def evaluate_until_the_queue_is_full() -> None:
        for number in range(2, 3 + MAX_PENDING):
            evaluate(run, number)

    run.totals.add(1, 1.0, 1)
    run.evaluated(1, [(0, 1.0, 1)], torch.ones(2), fail)
    with pytest.raises(type(error)):
        evaluate_until_the_queue_is_full()
    run.end_thread()


def test_training_waits_for_a_slow_disk_with_one_warning(
        start: Start, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """When as many tasks are pending as may be, and not before."""
    free = threading.Event()
    run, healthy, warned = start(), vars(recorder)["log"], []

    def log(*args: Any) -> None:
        warned.append(len(run.history))
        free.set()
        healthy(*args)

    monkeypatch.setattr(recorder, "log", log)
    monkeypatch.setattr(recorder, "save_model", lambda *_: free.wait(60))
    for number in range(1, MAX_PENDING + 1):
        evaluate(run, number)
    assert not free.is_set()
    evaluate(run, MAX_PENDING + 1)
    free.clear()  # and it falls behind again
    threading.Timer(0.2, free.set).start()
    for number in range(MAX_PENDING + 2, 2 * MAX_PENDING + 4):
        evaluate(run, number)
    run.close()
    assert warned == [MAX_PENDING + 1]
    assert "written more slowly than rounds finish" in caplog.text
    assert len(history_of(run)) == 2 * MAX_PENDING + 3
