"""The shape of a model; without torch, so that `--help` and a wrong flag answer at once."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from fedrun.errors import require


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a Mamba-2 model, in the letters of Dao & Gu (2024)."""

    n_layer: int = 1
    """Number of Mamba-2 blocks."""
    d_model: int = 512
    """Width of the residual stream."""
    d_state: int = 128
    """Size of the recurrent state of one channel (N)."""
    headdim: int = 64
    """Channels of one head (P); expand * d_model must be a multiple of it."""
    expand: int = 2
    """Inner width of a block as a multiple of d_model."""
    ngroups: int = 1
    """Groups of heads that share B and C (G)."""
    d_conv: int = 4
    """Taps of the causal depthwise convolution."""
    pad_vocab_multiple: int = 1
    """The embedding and head have as many rows as the next multiple of this after the vocabulary;
    rows beyond it stand for no token."""

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            require(value >= 1, f"model.{name} (--config)", value, "a whole number of at least 1")
        inner = self.expand * self.d_model
        require(inner % self.headdim == 0, "model.headdim (--config)", self.headdim,
                f"a divisor of expand * d_model = {inner}")
        heads = inner // self.headdim
        require(heads % self.ngroups == 0, "model.ngroups (--config)", self.ngroups,
                f"a divisor of the number of heads, {heads}")

    def rows(self, vocab_size: int) -> int:
        """Rows of the embedding for a vocabulary of that size."""
        return -(-vocab_size // self.pad_vocab_multiple) * self.pad_vocab_multiple
