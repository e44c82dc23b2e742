"""Weights and configurations converted to other libraries and back."""

from __future__ import annotations

import pytest
import torch

from fedrun.model.config import ModelConfig
from fedrun.model.convert import (
    from_transformers,
    from_transformers_config,
    to_mamba_ssm_config,
    to_transformers,
    to_transformers_config,
)
from fedrun.model.mamba2 import Mamba2LM

transformers = pytest.importorskip("transformers")
CONFIG = ModelConfig(n_layer=2, d_model=64, d_state=32, headdim=16, ngroups=2)
UNUSUAL = ModelConfig(n_layer=2, d_model=64, d_state=32, headdim=16, tie_embeddings=False,
                      proj_bias=True, conv_bias=False, norm_eps=1e-6, dt_lower=0.01, dt_upper=0.05)
VOCAB = 61


@pytest.mark.parametrize("shape", [CONFIG, UNUSUAL], ids=["usual", "unusual"])
def test_a_transformers_model_becomes_ours(shape: ModelConfig) -> None:
    theirs = transformers.Mamba2ForCausalLM(to_transformers_config(shape, VOCAB)).eval()
    for name, p in theirs.named_parameters():
        if name.endswith("proj.bias"):
            p.data.uniform_(-1, 1)
    config, vocab_size = from_transformers_config(theirs.config.to_dict())
    assert config == shape
    ours = Mamba2LM(config, vocab_size)
    ours.load_state_dict(from_transformers(theirs.state_dict()))
    tied = ours.lm_head.weight is ours.backbone.embedding.weight
    assert tied == shape.tie_embeddings
    ids = torch.randint(VOCAB, (2, 30), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), theirs(ids, use_cache=False).logits,
                                   rtol=1e-5, atol=1e-5)


def test_weights_and_config_survive_the_way_to_transformers_and_back() -> None:
    model = Mamba2LM(CONFIG, VOCAB)
    model.init_weights(0)
    there = to_transformers(model.state_dict())
    assert "backbone.embeddings.weight" in there
    back = from_transformers(there)
    assert back.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert back[name].data_ptr() == tensor.data_ptr()
    config = to_transformers_config(CONFIG, VOCAB).to_dict()
    assert from_transformers_config(config) == (CONFIG, VOCAB)


@pytest.mark.parametrize(("name", "value", "message"), [
    ("hidden_act", "gelu", "hidden_act gelu"), ("residual_in_fp32", False, "residual_in_fp32"),
    ("num_heads", 3, "num_heads 3"), ("num_hidden_layers", 10**9, "model.n_layer 1000000000"),
    ("num_hidden_layers", 1.5, "model.n_layer 1.5"), ("hidden_size", 10**6, "model.d_model"),
    ("vocab_size", 10**10, "vocab_size"), ("vocab_size", 0, "vocab_size 0"),
    ("layer_norm_epsilon", -1e-5, "model.norm_eps"), ("time_step_limit", (2.0, 1.0), "dt_upper"),
    ("time_step_limit", 3, "limits of step sizes 3"),
    ("time_step_limit", [0.0, 10**400], "limits of step sizes"),
    ("use_bias", "yes", "model.proj_bias yes")])
def test_another_model_is_refused_by_name(name: str, value: object, message: str) -> None:
    config = to_transformers_config(CONFIG, VOCAB).to_dict() | {name: value}
    with pytest.raises(ValueError, match=rf"{message}.*: must be "):
        from_transformers_config(config)


def test_mamba_ssm_has_the_same_shape() -> None:
    settings = to_mamba_ssm_config(CONFIG, VOCAB)
    assert settings["ssm_cfg"] == {"layer": "Mamba2", "d_state": 32, "d_conv": 4, "expand": 2,
                                   "headdim": 16, "ngroups": 2}
    assert settings["pad_vocab_size_multiple"] == 1  # no rows that stand for no token
