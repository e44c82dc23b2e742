"""`fedrun plan central`: held against counted allocations and the files of a run."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fedrun import central, cli
from fedrun.central import Training
from fedrun.config import CentralConfig
from fedrun.data.partition import Shards
from fedrun.data.tokens import TokenData
from fedrun.experiment import Experiment
from fedrun.flags import resolve
from fedrun.model import loss
from fedrun.tools import plan_central
from fedrun.tools.plan_disk import files
from fedrun.tools.plan_memory import (
    CHECKPOINT,
    COMPARED,
    GRADIENTS,
    LIBRARIES,
    MOMENTS,
    OUTER,
    PARAMETERS,
    TRACKED,
)
from fedrun.tools.plan_ranks import Layout
from fedrun.training.evaluate import BATCH_SEQUENCES
from tests.support.allocations import peak_bytes
from tests.support.runs import Run

VOCAB, STEPS = 1000, 3
ALONE = Layout(processes=1, machines=1, colocated=False, gpu=False)
Flags = dict[str, object]


@pytest.fixture(autouse=True)
def _fresh_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing is kept that earlier tests have computed in, and no file written elsewhere."""
    monkeypatch.setattr(loss, "_scratch", loss._Scratch())
    monkeypatch.chdir(tmp_path)


def config_of(**flags: object) -> CentralConfig:
    config = resolve("central", {"rounds": STEPS, **flags})
    assert isinstance(config, CentralConfig)
    return dataclasses.replace(config, dtype="fp32")


def experiment_of(config: CentralConfig) -> Experiment:
    """Random tokens."""
    random, length = np.random.default_rng(0), config.sequence_length
    train, held = (random.integers(VOCAB, size=(count, length), dtype=np.int32)
                   for count in (STEPS * config.batch_size, BATCH_SEQUENCES))
    return Experiment(config, TokenData(train, held, VOCAB, {}, Path()),
                      Shards([np.arange(len(train))]), None, {})


@pytest.mark.parametrize("flags", [{}, {"outer_every": 2}, {"local_optimizer": "muon"},
                                   {"moments_dtype": "bf16", "micro_batch": 1}])
def test_memory_is_what_it_allocates(flags: Flags, tmp_path: Path,
                                     monkeypatch: pytest.MonkeyPatch) -> None:
    """All together within a tenth, and item by item where a tensor can be named."""
    monkeypatch.setattr(central, "sample_text", lambda *_: None)  # there is no tokenizer
    monkeypatch.setattr(central, "sample_prompt", lambda _: SimpleNamespace(text=""))
    config = config_of(config="study", batch_size=2, sequence_length=32, val_freq=1,
                       checkpoint_freq=1, data_dir=str(tmp_path), **flags)
    config.run_dir.mkdir(parents=True)
    seen: dict[str, int] = {}

    def train() -> None:
        training = Training(experiment_of(config), torch.device("cpu"), None)
        for step in range(1, STEPS + 1):
            training.step()
            if step == STEPS - 1:
                training.save()
        kept = [training.last_gradient, training.step_cosines.previous]
        outer = {} if training.outer is None else training.outer.state()
        moments = training.client.state().items()
        seen.update({
            PARAMETERS: training.flat.vector.nbytes, GRADIENTS: training.flat.grad.nbytes,
            COMPARED: sum(t.nbytes for t in kept if t is not None),
            OUTER: sum(t.nbytes for t in outer.values()),
            MOMENTS: sum(t.nbytes for name, t in moments if name.startswith("adamw."))})
        seen[CHECKPOINT] = sum(seen.values()) - seen[GRADIENTS]
        training.recorder.wait()
        training.recorder.end_thread()
        training.checkpoint_writer.close()

    counted = peak_bytes(partial(train))
    found = plan_central.process(config, VOCAB, gpu=False)
    planned = plan_central.ranks(config, found, gpu=False)[0].host
    assert {item: planned[item] for item in seen} == pytest.approx(seen, rel=0.01, abs=16)
    # What is no tensor: besides these two, the bytes of a file that is written, as much as the loss
    # keeps from step to step.
    tensors = planned.total() - planned[LIBRARIES] - planned[TRACKED]
    assert tensors == pytest.approx(counted, rel=0.1)


def test_files_are_those_that_a_run_leaves(run_here: Run) -> None:
    run = run_here("central", "--rounds", 5, "--checkpoint_freq", 2, "--outer_every", 2)
    assert run.code == 0, run.output
    config = config_of(**{name: run.config[name] for name in (
        "config", "rounds", "checkpoint_freq", "outer_every", "batch_size", "sequence_length",
        "val_freq")})
    found = plan_central.process(config, len(run.model["backbone.embedding.weight"]), gpu=False)
    planned = files(config, found, ALONE, 5)

    def of(folder: Path, pattern: str) -> int:
        return sum(file.stat().st_size for file in folder.glob(pattern))

    assert planned.left == {"the model": of(run.run_dir, "model.safetensors"),
                            "snapshots": of(run.run_dir, "**/*.npz"),
                            "2 checkpoints": of(run.run_dir / "checkpoints", "*/*.safetensors")}


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    asked = ("plan", "central", "--config", "tiny", "--dataset", "pydocs", "--tokenizer", "bpe:400",
             "--sequence_length", "32", "--cache_dir", "cache", "--rounds", "4")
    assert cli.main([*asked, "--device_rates", "h100", "--device_memory", "1MB"]) == 0
    out = capsys.readouterr().out
    assert "central, tiny: 81,968 parameters" in out
    assert "one process, on GPUs" in out
    assert "DOES NOT FIT" in out
    assert "4 steps" in out
    assert "on the wire" not in out
    assert cli.main([*asked, "--processes", "2"]) == 2
    assert "--processes 2: must be 1 for central" in capsys.readouterr().err
