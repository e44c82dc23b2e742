"""Weights and configurations on their way to other libraries and back."""

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
VOCAB = 61


def test_a_transformers_model_becomes_ours() -> None:
    theirs = transformers.Mamba2ForCausalLM(to_transformers_config(CONFIG, VOCAB)).eval()
    config, vocab_size = from_transformers_config(theirs.config)
    ours = Mamba2LM(config, vocab_size)
    ours.load_state_dict(from_transformers(theirs.state_dict()))
    assert ours.lm_head.weight is ours.backbone.embedding.weight
    ids = torch.randint(VOCAB, (2, 30), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), theirs(ids, use_cache=False).logits,
                                   rtol=1e-5, atol=1e-5)


def test_there_and_back() -> None:
    model = Mamba2LM(CONFIG, VOCAB)
    model.init_weights(0)
    there = to_transformers(model.state_dict())
    assert "backbone.embeddings.weight" in there
    back = from_transformers(there)
    assert back.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert back[name].data_ptr() == tensor.data_ptr()
    assert from_transformers_config(to_transformers_config(CONFIG, VOCAB)) == (CONFIG, VOCAB)


@pytest.mark.parametrize(("name", "value"), [
    ("tie_word_embeddings", False), ("use_bias", True), ("hidden_act", "gelu"),
    ("layer_norm_epsilon", 1e-6), ("time_step_limit", (0.0, 1.0))])
def test_another_model_is_refused_by_name(name: str, value: object) -> None:
    config = to_transformers_config(CONFIG, VOCAB)
    setattr(config, name, value)
    with pytest.raises(ValueError, match=f"^{name} .*: accepted is "):
        from_transformers_config(config)


def test_mamba_ssm_has_the_same_shape() -> None:
    settings = to_mamba_ssm_config(CONFIG, VOCAB)
    assert settings["ssm_cfg"] == {"layer": "Mamba2", "d_state": 32, "d_conv": 4, "expand": 2,
                                   "headdim": 16, "ngroups": 2}
    assert settings["pad_vocab_size_multiple"] == 1  # no rows that stand for no token
