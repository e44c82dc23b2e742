"""Shapes of models that others describe: read, refused by name, recorded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fedrun import cli
from fedrun.flags import resolve
from fedrun.model.config import ModelConfig
from fedrun.model.pretrained import find_pretrained, from_mamba_ssm_config
from tests.support.runs import SMALL


def test_the_configs_of_published_models_are_read(tmp_path: Path) -> None:
    """The config files of state-spaces/mamba2-130m and AntonV/mamba2-130m-hf, with fewer layers."""
    original = {"d_model": 768, "d_intermediate": 0, "n_layer": 1, "vocab_size": 50277,
                "ssm_cfg": {"layer": "Mamba2"}, "attn_layer_idx": [], "attn_cfg": {},
                "rms_norm": True, "residual_in_fp32": True, "fused_add_norm": True,
                "pad_vocab_size_multiple": 16, "tie_embeddings": True}
    shape = ModelConfig(n_layer=1, d_model=768)
    assert from_mamba_ssm_config(original) == (shape, 50288)
    (tmp_path / "config.json").write_text(json.dumps({
        "architectures": ["Mamba2ForCausalLM"], "model_type": "mamba2", "bos_token_id": 0,
        "chunk_size": 256, "conv_kernel": 4, "eos_token_id": 0, "expand": 2, "head_dim": 64,
        "hidden_act": "silu", "hidden_size": 768, "initializer_range": 0.1,
        "layer_norm_epsilon": 1e-05, "n_groups": 1, "num_heads": 24, "num_hidden_layers": 1,
        "pad_token_id": 0, "rescale_prenorm_residual": False, "residual_in_fp32": True,
        "rms_norm": True, "state_size": 128, "tie_word_embeddings": True, "time_step_floor": 0.0001,
        "time_step_limit": [0.0, float("inf")], "time_step_max": 0.1, "time_step_min": 0.001,
        "time_step_rank": 48, "torch_dtype": "float32", "use_bias": False, "use_cache": True,
        "use_conv_bias": True, "vocab_size": 50288}))
    found = find_pretrained(str(tmp_path), "RUN")
    assert (found.model, found.vocab_size, found.tokenizer) == (shape, 50288, None)


@pytest.mark.parametrize(("change", "message"), [
    ({"ssm_cfg": {"layer": "Mamba1"}}, "ssm_cfg.layer Mamba1"), ({"ssm_cfg": {}}, "Mamba1"),
    ({"attn_layer_idx": [3]}, "attn_layer_idx"), ({"tie_embeddings": 1}, "model.tie_embeddings 1"),
    ({"ssm_cfg": {"layer": "Mamba2", "D_has_hdim": True}}, "D_has_hdim"),
    ({"d_intermediate": 64}, "d_intermediate"), ({"n_layer": 10**9}, "model.n_layer 1000000000"),
    ({"n_layer": 1.5}, r"model.n_layer 1.5: must be an integer in \[1, 4096\]"),
    ({"d_model": 10**6}, "model.d_model 1000000"), ({"d_model": "wide"}, "model.d_model wide"),
    ({"vocab_size": 10**12}, "vocab_size"), ({"pad_vocab_size_multiple": 0}, "multiple 0"),
    ({"ssm_cfg": {"layer": "Mamba2", "headdim": -64}}, "model.headdim -64"),
    ({"ssm_cfg": {"layer": "Mamba2", "dt_limit": [0.1]}}, "limits of step sizes"),
    ({"ssm_cfg": {"layer": "Mamba2", "norm_before_gate": True}}, "norm_before_gate")])
def test_settings_that_we_do_not_implement_are_refused_by_name(
        change: dict[str, object], message: str) -> None:
    config = {"d_model": 64, "n_layer": 1, "vocab_size": 10, "ssm_cfg": {"layer": "Mamba2"}}
    with pytest.raises(ValueError, match=message):
        from_mamba_ssm_config(config | change)


def test_settings_without_an_effect_on_the_model_are_accepted() -> None:
    config = {"d_model": 64, "n_layer": 1, "vocab_size": 16, "tie_embeddings": False, "ssm_cfg": {
        "layer": "Mamba2", "bias": True, "conv_bias": False, "dt_limit": [0.01, 1e38],
        "A_init_range": [1, 2], "rmsnorm": True, "chunk_size": 32}}
    shape = ModelConfig(n_layer=1, d_model=64, tie_embeddings=False, proj_bias=True,
                        conv_bias=False, dt_lower=0.01)
    assert from_mamba_ssm_config(config) == (shape, 16)


def test_a_usual_shape_is_recorded_as_it_was_before_others_could_be() -> None:
    """So that runs from before can be resumed."""
    recorded = resolve("central", {"config": "tiny"}).to_dict()["model"]
    assert recorded == {"n_layer": 2, "d_model": 64, "d_state": 16, "headdim": 16, "expand": 2,
                        "ngroups": 1, "d_conv": 4, "pad_vocab_multiple": 1}
    unusual = ModelConfig(norm_eps=1e-6, tie_embeddings=False, dt_upper=0.1)
    assert ModelConfig(**json.loads(json.dumps(unusual.to_dict()))) == unusual


@pytest.mark.parametrize(("shape", "message"), [
    ("{n_layer: 100, d_model: 131072}", ": a model of "), ("{n_layer: 1.5}", "model.n_layer 1.5"),
    ("{n_layer: 1000000000}", "model.n_layer 1000000000: must be an integer in [1, "),
    ("{tie_embeddings: 3}", "model.tie_embeddings 3: must be true or false")])
def test_a_shape_that_cannot_be_trained_is_a_line(
        tmp_path: Path, cache_dir: Path, shape: str, message: str,
        capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "shape.yaml").write_text(f"model: {shape}\n")
    argv = [flag for flag in SMALL if flag not in ("--config", "tiny")]
    assert cli.main(["central", *argv, "--config", str(tmp_path / "shape.yaml"), "--data_dir",
                     str(tmp_path / "runs"), "--cache_dir", str(cache_dir)]) == 2
    text = capsys.readouterr().err.splitlines()[-1]
    assert text.startswith(f"fedrun: error: --config {tmp_path / 'shape.yaml'}")
    assert message in text
    assert not (tmp_path / "runs").exists()
