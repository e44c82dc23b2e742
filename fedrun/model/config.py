"""The shape of a model. Imports no torch, so that `--help` and a wrong flag answer at once."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from fedrun.common.errors import require

NORM_EPS = 1e-5  # fixed in mamba_ssm's norms
# Far above any real model: a mistyped number is refused before it takes all the memory.
LARGEST = {"n_layer": 4096, "d_model": 2**17, "d_state": 2**14, "headdim": 2**14, "expand": 64,
           "ngroups": 2**14, "d_conv": 256, "pad_vocab_multiple": 2**20}
LARGEST_VOCABULARY = 2**27


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a Mamba-2 model; the letters are those of Dao & Gu (2024)."""

    n_layer: int = 1
    """Number of Mamba-2 blocks."""
    d_model: int = 512
    """Width of the residual stream."""
    d_state: int = 128
    """Size of the recurrent state of one channel (N)."""
    headdim: int = 64
    """Channels per head (P); expand * d_model must be a multiple of it."""
    expand: int = 2
    """Inner width of a block as a multiple of d_model."""
    ngroups: int = 1
    """Groups of heads that share B and C (G)."""
    d_conv: int = 4
    """Taps of the causal depthwise convolution."""
    pad_vocab_multiple: int = 1
    """The rows of the embedding and head are the vocabulary size rounded up to a multiple of this;
    the rows added stand for no token."""
    tie_embeddings: bool = True
    """Whether the head shares the embedding's weight."""
    proj_bias: bool = False
    """Whether a block's input and output projections have a bias."""
    conv_bias: bool = True
    """Whether the convolution has a bias."""
    norm_eps: float = NORM_EPS
    """Added to the mean square in every norm."""
    dt_lower: float = 0.0
    """Lower limit of step sizes."""
    dt_upper: float | None = None
    """Upper limit of step sizes; none: no limit."""

    def __post_init__(self) -> None:
        for name, limit in LARGEST.items():
            value = getattr(self, name)
            require(type(value) is int and 1 <= value <= limit, f"model.{name}", value,
                    f"an integer in [1, {limit}]")
        for name in ("tie_embeddings", "proj_bias", "conv_bias"):
            value = getattr(self, name)
            require(type(value) is bool, f"model.{name}", value, "true or false")
        require(_number(self.norm_eps) and 0 < self.norm_eps <= 1, "model.norm_eps", self.norm_eps,
                "in (0, 1]")
        require(_number(self.dt_lower) and 0 <= self.dt_lower < 1e30, "model.dt_lower",
                self.dt_lower, "in [0, 1e30)")
        require(self.dt_upper is None or (_number(self.dt_upper)
                                          and self.dt_lower < self.dt_upper < 1e30),
                "model.dt_upper", self.dt_upper, "> model.dt_lower and < 1e30, or none")
        inner = self.expand * self.d_model
        require(inner % self.headdim == 0, "model.headdim", self.headdim,
                f"a divisor of expand * d_model = {inner}")
        heads = inner // self.headdim
        require(heads % self.ngroups == 0, "model.ngroups", self.ngroups,
                f"a divisor of the number of heads, {heads}")

    @property
    def limits_dt(self) -> bool:
        """Whether step sizes have a lower or an upper limit."""
        return self.dt_lower > 0 or self.dt_upper is not None

    def rows(self, vocab_size: int) -> int:
        """Rows of the embedding, padding included."""
        return -(-vocab_size // self.pad_vocab_multiple) * self.pad_vocab_multiple

    def parameters(self, rows: int) -> int:
        """Number of parameters of a model whose embedding has `rows` rows."""
        inner = self.expand * self.d_model
        heads = inner // self.headdim
        conv = inner + 2 * self.ngroups * self.d_state
        projected = inner + conv + heads
        block = (self.d_model * projected + inner * self.d_model  # in_proj, out_proj
                 + (projected + self.d_model) * self.proj_bias + conv * (self.d_conv
                                                                        + self.conv_bias)
                 + 3 * heads + inner + self.d_model)  # dt_bias, A_log, D; two norms
        return (2 - self.tie_embeddings) * rows * self.d_model + self.n_layer * block + self.d_model

    def to_dict(self) -> dict[str, Any]:
        """The shape as run folders record it.

        Settings that were added later are left out where they have their default, so that a model
        is recorded as it was before these settings existed.
        """
        later = ("tie_embeddings", "proj_bias", "conv_bias", "norm_eps", "dt_lower", "dt_upper")
        defaults = {f.name: f.default for f in dataclasses.fields(self) if f.name in later}
        return {name: value for name, value in dataclasses.asdict(self).items()
                if name not in defaults or value != defaults[name]}


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
