"""The section `model: {transformers: ...}`: read, refused by name, recorded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedrun import cli
from fedrun.common.errors import InputError
from fedrun.flags import resolve
from fedrun.model.config import ModelConfig, TransformersShape, recorded_shape
from fedrun.model.pretrained import parameters_of
from fedrun.model.transformers_config import library_config, shape_of_folder
from fedrun.records.provenance import differing_settings
from tests.support.runs import SMALL, fresh_python

GPT2 = {"model_type": "gpt2", "n_layer": 1, "n_embd": 16, "n_head": 2, "n_positions": 32}


def written(folder: Path, section: Any) -> str:
    path = folder / "shape.yaml"
    path.write_text(yaml.safe_dump({"model": {"transformers": section}}))
    return str(path)


def test_the_shape_of_a_file_is_recorded_and_read_again(tmp_path: Path) -> None:
    """Also of numbers that YAML takes for text."""
    (tmp_path / "shape.yaml").write_text(
        "lr: 1e-3\nmodel:\n  transformers: {model_type: gpt2, n_layer: 1, layer_norm_epsilon: "
        "1e-6, bos: 1}\n")
    config = resolve("fed_avg", {"config": str(tmp_path / "shape.yaml")})
    recorded = json.loads(json.dumps(config.to_dict()))
    assert recorded["model"] == {"transformers": {
        "model_type": "gpt2", "n_layer": 1, "layer_norm_epsilon": 1e-6, "bos": 1}}
    assert recorded_shape(recorded["model"]) == config.model
    assert hash(config.model) == hash(recorded_shape(recorded["model"]))
    assert differing_settings(config, recorded) == {}
    assert recorded_shape({"n_layer": 3}) == ModelConfig(n_layer=3)


def test_another_shape_is_another_run(tmp_path: Path) -> None:
    theirs = resolve("fed_avg", {"config": written(tmp_path, GPT2)})
    wider = resolve("fed_avg", {"config": written(tmp_path, GPT2 | {"n_embd": 32})})
    ours = resolve("fed_avg", {})  # every field of the shape has its default
    assert set(differing_settings(wider, theirs.to_dict())) == {"model.transformers"}
    assert set(differing_settings(theirs, ours.to_dict())) == {"model.transformers"}
    assert "model.n_layer" in differing_settings(ours, theirs.to_dict())


@pytest.mark.parametrize(("section", "message"), [
    ("gpt2", "model.transformers gpt2: must be a mapping with a model_type"),
    ({"n_layer": 1}, "model.transformers.model_type None: must be the name"),
    (GPT2 | {"vocab_size": 100}, "model.transformers.vocab_size: must be left out"),
    (GPT2 | {"eos_token_id": 1}, "model.transformers.eos_token_id: must be left out"),
    (GPT2 | {"attn_pdrop": 0.1}, "model.transformers.attn_pdrop 0.1: must be 0: training has no"),
    (GPT2 | {"n_layer": 10**6}, "model.transformers.n_layer 1000000: must be at most 4096"),
    (GPT2 | {"n_embd": 10**12}, "model.transformers.n_embd 1000000000000: must be at most"),
    (GPT2 | {"model_type": "gpt-2"}, "model_type gpt-2: transformers has no such architecture, "
     "did you mean gpt2?"),
    (GPT2 | {"n_heads": 2}, "model.transformers.n_heads: gpt2 has no such field, did you mean "
     "n_head?"),
    (GPT2 | {"model_type": "t5"}, "model_type t5: must be a causal language model"),
    (GPT2 | {"n_embd": 2**20}, "a model of "), (GPT2 | {"n_positions": 16}, "must be at most 16")])
def test_a_shape_that_cannot_be_trained_is_a_line(
        tmp_path: Path, cache_dir: Path, capsys: pytest.CaptureFixture[str], section: Any,
        message: str) -> None:
    """Whether the file or only the library can tell; before anything is written."""
    argv = [flag for flag in SMALL if flag not in ("--config", "tiny")]
    path = written(tmp_path, section)
    assert cli.main(["central", *argv, "--config", path, "--data_dir", str(tmp_path / "runs"),
                     "--cache_dir", str(cache_dir)]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    where = "--sequence_length 32: " if "at most 16" in message else f"--config {path}: "
    assert line.startswith(f"fedrun: error: {where}")
    assert message in line
    assert not (tmp_path / "runs").exists()


def test_a_section_with_both_kinds_of_shapes_is_refused(tmp_path: Path) -> None:
    (tmp_path / "both.yaml").write_text("model: {n_layer: 2, transformers: {model_type: gpt2}}")
    with pytest.raises(InputError, match="or transformers alone"):
        resolve("fed_avg", {"config": str(tmp_path / "both.yaml")})


def test_neither_torch_nor_transformers_is_imported_for_a_file(tmp_path: Path) -> None:
    code = ("import sys\nfrom fedrun.flags import resolve\n"
            "resolve('fed_avg', {'config': sys.argv[1]})\n"
            "print({'torch', 'transformers'} & set(sys.modules))")
    assert fresh_python(code, written(tmp_path, GPT2)).strip() == "set()"


def test_the_architectures_that_are_compared_have_equal_parameters() -> None:
    """Within 2 %, with the vocabulary of configs/experiments/architectures.yaml."""
    counts = {name: parameters_of(resolve("fed_avg", {"config": f"architectures_{name}"}).model,
                                  4096) for name in ("mamba2", "mamba1", "gpt2")}
    assert max(counts.values()) < 1.02 * min(counts.values()), counts


# ---- the library's configs ----------------------------------------------------------------------

def test_what_a_file_leaves_out() -> None:
    """No dropout, no special tokens, the tokenizer's vocabulary; else the library's defaults."""
    config = library_config(TransformersShape(GPT2), 77)
    assert (config.vocab_size, config.eos_token_id, config.pad_token_id) == (77, None, None)
    assert config.resid_pdrop == config.embd_pdrop == config.attn_pdrop == 0
    assert config.layer_norm_epsilon == 1e-5
    given = library_config(TransformersShape(GPT2 | {"resid_pdrop": 0.1}), 77)
    assert given.resid_pdrop == 0.1  # of a folder: for evaluation, which has no dropout


def test_of_a_folders_config_only_the_shape_is_taken() -> None:
    noise = {"architectures": ["Other"], "auto_map": {"AutoModelForCausalLM": "evil.Model"},
             "_name_or_path": "x", "torch_dtype": "float16", "transformers_version": "4.0",
             "transformers_weights": "../other.safetensors", "attn_implementation": "kernels/x"}
    assert shape_of_folder(GPT2 | noise | {"vocab_size": 50}) == (TransformersShape(GPT2), 50)
    older = {"model_type": "llama", "num_hidden_layers": 1, "rope_theta": 500.0, "vocab_size": 9}
    shape, rows = shape_of_folder(older)
    assert rows == 9
    config = library_config(shape, rows)
    theta = getattr(config, "rope_parameters", None) or {"rope_theta": config.rope_theta}
    assert theta["rope_theta"] == 500
    assert shape_of_folder({"model_type": "gpt2"})[1] == 50257  # the class's default


@pytest.mark.parametrize(("change", "message"), [
    ({"quantization_config": {"bits": 4}}, "quantization_config"), ({"vocab_size": -1}, "-1"),
    ({"vocab_size": "x"}, "vocab_size x"), ({"n_layer": 10**9}, "n_layer 1000000000"),
    ({"model_type": "nonsense"}, "no such architecture"), ({"model_type": 3}, "model_type 3")])
def test_a_hostile_config_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        shape_of_folder(GPT2 | change)
