"""Converts weights and shapes to and from `transformers.Mamba2ForCausalLM` and `mamba_ssm`.

Both libraries use our parameter names, with one exception: transformers calls the embedding
`backbone.embeddings`. In a state dict a tied head appears a second time, as `lm_head.weight`.
A setting that our model cannot represent is refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from fedrun.common.errors import InputError
from fedrun.model.config import LARGEST_VOCABULARY, NORM_EPS, ModelConfig
from fedrun.model.mixer import CHUNK_SIZE
from fedrun.model.names import EMBEDDING

if TYPE_CHECKING:
    from transformers import Mamba2Config

UNLIMITED = 1e30  # no step size comes near it
TRANSFORMERS_EMBEDDING = "backbone.embeddings.weight"


def to_transformers(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our state dict (or mamba_ssm's) with the names of transformers; the tensors are shared."""
    return {TRANSFORMERS_EMBEDDING if name == EMBEDDING else name: tensor
            for name, tensor in state_dict.items()}


def from_transformers(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of a transformers model with our names; the tensors are shared."""
    return {EMBEDDING if name == TRANSFORMERS_EMBEDDING else name: tensor
            for name, tensor in state_dict.items()}


def to_transformers_config(config: ModelConfig, vocab_size: int) -> Mamba2Config:
    """The configuration of the transformers model that computes the same as ours."""
    from transformers import Mamba2Config

    return Mamba2Config(
        vocab_size=vocab_size, hidden_size=config.d_model, state_size=config.d_state,
        num_hidden_layers=config.n_layer, head_dim=config.headdim, expand=config.expand,
        num_heads=config.expand * config.d_model // config.headdim, n_groups=config.ngroups,
        conv_kernel=config.d_conv, chunk_size=CHUNK_SIZE, layer_norm_epsilon=config.norm_eps,
        use_bias=config.proj_bias, use_conv_bias=config.conv_bias,
        time_step_limit=(config.dt_lower, math.inf if config.dt_upper is None
                         else config.dt_upper),
        tie_word_embeddings=config.tie_embeddings, pad_token_id=None, bos_token_id=None,
        eos_token_id=None)


def from_transformers_config(config: Mapping[str, Any]) -> tuple[ModelConfig, int]:
    """Our configuration and the vocabulary size for a config.json of transformers.

    Settings that the file lacks have the library's defaults. Raises InputError if our model cannot
    represent it. The file is untrusted, so its values are not passed to the library's own class,
    which would build a list with as many layers as the file asks for.
    """
    from transformers import Mamba2Config

    defaults = Mamba2Config()

    def value(name: str) -> Any:
        return config.get(name, getattr(defaults, name))

    lower, upper = dt_limits(value("time_step_limit"))
    model = ModelConfig(n_layer=value("num_hidden_layers"), d_model=value("hidden_size"),
                        d_state=value("state_size"), headdim=value("head_dim"),
                        expand=value("expand"), ngroups=value("n_groups"),
                        d_conv=value("conv_kernel"), tie_embeddings=value("tie_word_embeddings"),
                        proj_bias=value("use_bias"), conv_bias=value("use_conv_bias"),
                        norm_eps=value("layer_norm_epsilon"), dt_lower=lower, dt_upper=upper)
    required = {"hidden_act": "silu", "residual_in_fp32": True,
                "num_heads": model.expand * model.d_model // model.headdim}
    for name, accepted in required.items():
        if value(name) != accepted:
            raise InputError(f"{name} {value(name)}: must be {accepted}")
    return model, whole_rows(value("vocab_size"))


def dt_limits(pair: Any) -> tuple[float, float | None]:
    """Our lower and upper limit of step sizes; both libraries write (0.0, inf) for no limits.

    Raises InputError if `pair` is not two numbers.
    """
    try:
        lower, upper = pair
        # Strict JSON has no infinity: it is null there, and an object in newer files.
        if upper is None or upper == {"__float__": "Infinity"} or float(upper) >= UNLIMITED:
            return float(lower), None
        return float(lower), float(upper)
    except (TypeError, ValueError, OverflowError):
        raise InputError(f"limits of step sizes {pair}: must be two numbers") from None


def whole_rows(vocab_size: Any, multiple: Any = 1) -> int:
    """Rows of the embedding: vocab_size rounded up to a multiple of `multiple`.

    Raises InputError if either is not an integer from 1 to LARGEST_VOCABULARY.
    """
    for name, value in (("vocab_size", vocab_size), ("pad_vocab_size_multiple", multiple)):
        if type(value) is not int or not 1 <= value <= LARGEST_VOCABULARY:
            raise InputError(f"{name} {value}: must be a whole number from 1 to "
                             f"{LARGEST_VOCABULARY}")
    return int(-(-vocab_size // multiple) * multiple)


def to_mamba_ssm_config(config: ModelConfig, vocab_size: int) -> dict[str, Any]:
    """Arguments of mamba_ssm's MambaConfig for a model that takes our state dict unchanged.

    Raises InputError if mamba_ssm cannot represent the model.
    """
    if config.norm_eps != NORM_EPS:
        raise InputError(f"--to mamba_ssm: must be hf for a model whose norms have an epsilon of "
                         f"{config.norm_eps:g}; mamba_ssm has {NORM_EPS:g} built in")
    upper = UNLIMITED if config.dt_upper is None else config.dt_upper  # JSON has no infinity
    non_default = ({"bias": True} if config.proj_bias else {}) | (
        {} if config.conv_bias else {"conv_bias": False}) | (
        {"dt_limit": [config.dt_lower, upper]} if config.limits_dt else {})
    return {"d_model": config.d_model, "n_layer": config.n_layer, "vocab_size": vocab_size,
            "ssm_cfg": {"layer": "Mamba2", "d_state": config.d_state, "d_conv": config.d_conv,
                        "expand": config.expand, "headdim": config.headdim,
                        "ngroups": config.ngroups} | non_default,
            "rms_norm": True, "residual_in_fp32": True, "fused_add_norm": False,
            "pad_vocab_size_multiple": 1, "tie_embeddings": config.tie_embeddings}
