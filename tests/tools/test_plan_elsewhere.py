"""`fedrun plan` of models of transformers, and of those that --init_from names."""

from __future__ import annotations

import dataclasses
import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from fedrun import cli
from fedrun.common.errors import InputError
from fedrun.model.build import uninitialised_model
from fedrun.model.config import TransformersShape
from fedrun.model.pretrained import Pretrained, parameters_of
from fedrun.model.transformers_lm import (
    TransformersLM,
    build,
    ends_in_its_head,
    one_layer,
    require_trainable,
)
from fedrun.tools import plan_memory, plan_time
from fedrun.tools.plan_ranks import starting_bytes
from fedrun.tools.plan_report import amount
from tests.support.allocations import peak_bytes
from tests.support.planned import GEMMA2, GPT2, PLAN, config_of, printed

VOCAB = 1000


@pytest.fixture(autouse=True)
def _elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)


def test_the_shape_of_a_folder_is_read_without_its_weights(
        capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
        ) -> None:
    """Of a run, and of a model of transformers: bytes of the start are those of files and model."""
    monkeypatch.setattr(Pretrained, "weights", lambda _: pytest.fail("weights are read"))
    run, theirs = tmp_path / "run", tmp_path / "theirs"
    for folder in (run, theirs):
        folder.mkdir()
    config = config_of("fed_avg", config="tiny")
    model = uninitialised_model(config, 408)
    save_file({name: p.detach() for name, p in model.named_parameters()},
              run / "model.safetensors")
    (run / "config.json").write_text(json.dumps(config.to_dict(), default=str))
    (theirs / "config.json").write_text(json.dumps(GPT2 | {"vocab_size": 500}))
    (theirs / "model.safetensors").write_bytes(bytes(1000))
    out = printed(capsys, "--init_from", str(run), "--rounds", "2")
    size = sum(p.numel() for p in model.parameters())
    assert f"{size:,} parameters, a vocabulary of 408" in out
    read = (run / "model.safetensors").stat().st_size + 4 * size
    assert f"takes {amount(read)} of its host, where the model is read" in out
    out = printed(capsys, "--init_from", str(theirs), "--rounds", "2", "--device_rates", "h100",
                  "--processes", "3")
    size = parameters_of(TransformersShape(GPT2), 500)
    assert f"{size:,} parameters, a vocabulary of 500" in out
    assert f"takes {amount(1000 + 4 * size)} of its host" in out


def test_a_model_of_transformers_is_tried_at_the_start() -> None:
    """With its gradients, 8 bytes a parameter, beside what those of two short sequences take for a
    moment; and what its head needs is known without them."""
    shape = TransformersShape(GPT2 | {"n_embd": 256})
    counted = peak_bytes(partial(require_trainable, shape, VOCAB, 32))
    model = TransformersLM(build(shape, VOCAB, 0))
    gradient = partial(model.compute_grad, torch.zeros(2, 32, dtype=torch.int64))
    gradient()
    counted -= peak_bytes(gradient)
    found: Any = SimpleNamespace(flat=SimpleNamespace(size=parameters_of(shape, VOCAB)))
    config: Any = SimpleNamespace(model=shape)
    assert starting_bytes(config, found, None) == pytest.approx(counted, rel=0.1)
    assert one_layer(shape)[1] == 3
    assert ends_in_its_head(shape)
    assert not ends_in_its_head(TransformersShape(GEMMA2))


def test_a_preset_of_transformers(capsys: pytest.CaptureFixture[str], tmp_path: Path,
                                  monkeypatch: pytest.MonkeyPatch) -> None:
    """Measured on one layer where a step would take long; no settings that need other names."""
    monkeypatch.setattr(plan_time, "LONGEST", 1e6)
    preset = tmp_path / "theirs.yaml"
    preset.write_text(json.dumps({"model": {"transformers": GPT2}}))
    flags = ("--config", str(preset), "--rounds", "2")
    out = printed(capsys, *flags)
    assert "on 1 of 3 layers and 1 sequence" in out
    assert "snapshots" not in out
    assert cli.main([*PLAN, *flags, "--save_client_deltas", "true"]) == 2
    assert "--save_client_deltas true: must be false" in capsys.readouterr().err


def test_bloom_is_planned_in_bf16() -> None:
    """Its attention multiplies by a method of a tensor."""
    shape = TransformersShape({"model_type": "bloom", "hidden_size": 64, "n_layer": 2, "n_head": 4})
    config = dataclasses.replace(config_of("fed_avg", sequence_length=16), model=shape,
                                 dtype="bf16")
    assert plan_memory.gradient(config, 300, 2, gpu=False).flop > 0


def test_an_architecture_that_has_no_outline_is_one_line() -> None:
    shape = TransformersShape({"model_type": "mixtral", "hidden_size": 64, "num_hidden_layers": 2,
                               "intermediate_size": 64, "num_attention_heads": 4,
                               "num_key_value_heads": 2, "num_local_experts": 2})
    config = dataclasses.replace(config_of("fed_avg", sequence_length=16), model=shape)
    with pytest.raises(InputError, match=r"^--config \S+: a model of this architecture cannot be"):
        plan_memory.gradient(config, 300, 2, gpu=False)
