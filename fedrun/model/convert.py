"""Weights and shapes to and from `transformers.Mamba2ForCausalLM` and `mamba_ssm`.

Both name the parameters as we do, with one exception: transformers calls the embedding
`backbone.embeddings`. A tied head appears in a state dict a second time, as `lm_head.weight`.
What the mathematics of our model has no place for is refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from fedrun.common.errors import InputError
from fedrun.model.config import LARGEST_VOCABULARY, NORM_EPS, ModelConfig
from fedrun.model.mamba2 import CHUNK_SIZE

if TYPE_CHECKING:
    from transformers import Mamba2Config

UNLIMITED = 1e30  # a step size that none reaches
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
        conv_kernel=config.d_conv, chunk_size=CHUNK_SIZE, layer_norm_epsilon=config.norm_eps,
        use_bias=config.proj_bias, use_conv_bias=config.conv_bias,
        time_step_limit=(config.dt_lower, math.inf if config.dt_upper is None
                         else config.dt_upper),
        tie_word_embeddings=config.tie_embeddings, pad_token_id=None, bos_token_id=None,
        eos_token_id=None)


def from_transformers_config(config: Mapping[str, Any]) -> tuple[ModelConfig, int]:
    """Our configuration and the vocabulary's size, of a config.json; what it does not mention is as
    in the library. ValueError where the model is another one.

    The library's own class is not given the values of a file that may be anybody's: it makes a list
    of as many layers as the file says.
    """
    from transformers import Mamba2Config

    usual = Mamba2Config()

    def value(name: str) -> Any:
        return config.get(name, getattr(usual, name))

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
            raise InputError(f"{name} {value(name)}: accepted is {accepted}")
    return model, whole_rows(value("vocab_size"))


def dt_limits(pair: Any) -> tuple[float, float | None]:
    """Limits of step sizes as both libraries write them, (0.0, inf) for none, as ours."""
    try:
        lower, upper = pair
        # Infinity is null where JSON is read strictly, and an object in newer files.
        if upper is None or upper == {"__float__": "Infinity"} or float(upper) >= UNLIMITED:
            return float(lower), None
        return float(lower), float(upper)
    except (TypeError, ValueError, OverflowError):
        raise InputError(f"limits of step sizes {pair}: accepted are two numbers") from None


def whole_rows(vocab_size: Any, multiple: Any = 1) -> int:
    """Rows of the embedding, the next multiple after the vocabulary; ValueError where either is no
    number of rows."""
    for name, value in (("vocab_size", vocab_size), ("pad_vocab_size_multiple", multiple)):
        if type(value) is not int or not 1 <= value <= LARGEST_VOCABULARY:
            raise InputError(f"{name} {value}: accepted is a whole number from 1 to "
                             f"{LARGEST_VOCABULARY}")
    return int(-(-vocab_size // multiple) * multiple)


def to_mamba_ssm_config(config: ModelConfig, vocab_size: int) -> dict[str, Any]:
    """Arguments of mamba_ssm's MambaConfig for the model whose state dict is ours as it is.

    ValueError where the library has no such model.
    """
    if config.norm_eps != NORM_EPS:
        raise InputError(f"--to mamba_ssm: norms with an epsilon of {config.norm_eps:g} cannot be "
                         f"expressed there, where it is {NORM_EPS:g}; accepted is hf")
    upper = UNLIMITED if config.dt_upper is None else config.dt_upper  # JSON has no infinity
    unusual = ({"bias": True} if config.proj_bias else {}) | (
        {} if config.conv_bias else {"conv_bias": False}) | (
        {"dt_limit": [config.dt_lower, upper]} if config.limits_dt else {})
    return {"d_model": config.d_model, "n_layer": config.n_layer, "vocab_size": vocab_size,
            "ssm_cfg": {"layer": "Mamba2", "d_state": config.d_state, "d_conv": config.d_conv,
                        "expand": config.expand, "headdim": config.headdim,
                        "ngroups": config.ngroups} | unusual,
            "rms_norm": True, "residual_in_fp32": True, "fused_add_norm": False,
            "pad_vocab_size_multiple": 1, "tie_embeddings": config.tie_embeddings}
