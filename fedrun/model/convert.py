"""Weights and shapes to and from `transformers.Mamba2ForCausalLM` and `mamba_ssm`.

Both name the parameters as we do, with one exception: transformers calls the embedding
`backbone.embeddings`. A tied head appears in a state dict a second time, as `lm_head.weight`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from fedrun.model.config import ModelConfig
from fedrun.model.mamba2 import CHUNK_SIZE
from fedrun.model.norm import EPS

if TYPE_CHECKING:
    from transformers import Mamba2Config

OURS, TRANSFORMERS = "backbone.embedding.weight", "backbone.embeddings.weight"


def to_transformers(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our state dict (or mamba_ssm's) under the names of transformers; tensors are shared."""
    return {TRANSFORMERS if name == OURS else name: t for name, t in state_dict.items()}


def from_transformers(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of a transformers model under our names; tensors are shared."""
    return {OURS if name == TRANSFORMERS else name: t for name, t in state_dict.items()}


def to_transformers_config(config: ModelConfig, vocab_size: int) -> Mamba2Config:
    """The configuration of the transformers model that computes what ours does."""
    from transformers import Mamba2Config

    return Mamba2Config(
        vocab_size=vocab_size, hidden_size=config.d_model, state_size=config.d_state,
        num_hidden_layers=config.n_layer, head_dim=config.headdim, expand=config.expand,
        num_heads=config.expand * config.d_model // config.headdim, n_groups=config.ngroups,
        conv_kernel=config.d_conv, chunk_size=CHUNK_SIZE, layer_norm_epsilon=EPS,
        tie_word_embeddings=True, pad_token_id=None, bos_token_id=None, eos_token_id=None)


def from_transformers_config(config: Mamba2Config) -> tuple[ModelConfig, int]:
    """Our configuration and the vocabulary's size; ValueError where the model is another one."""
    required = {"tie_word_embeddings": True, "use_bias": False, "use_conv_bias": True,
                "hidden_act": "silu", "layer_norm_epsilon": EPS, "residual_in_fp32": True,
                "time_step_limit": (0.0, float("inf"))}
    for name, value in required.items():
        found = getattr(config, name)
        found = tuple(found) if isinstance(found, list) else found
        if found != value:
            raise ValueError(f"{name} {found}: accepted is {value}")
    return ModelConfig(n_layer=config.num_hidden_layers, d_model=config.hidden_size,
                       d_state=config.state_size, headdim=config.head_dim, expand=config.expand,
                       ngroups=config.n_groups, d_conv=config.conv_kernel), config.vocab_size


def to_mamba_ssm_config(config: ModelConfig, vocab_size: int) -> dict[str, Any]:
    """Arguments of mamba_ssm's MambaConfig for the model whose state dict is ours as it is."""
    return {"d_model": config.d_model, "n_layer": config.n_layer, "vocab_size": vocab_size,
            "ssm_cfg": {"layer": "Mamba2", "d_state": config.d_state, "d_conv": config.d_conv,
                        "expand": config.expand, "headdim": config.headdim,
                        "ngroups": config.ngroups},
            "rms_norm": True, "residual_in_fp32": True, "fused_add_norm": False,
            "pad_vocab_size_multiple": 1, "tie_embeddings": True}
