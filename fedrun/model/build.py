"""The initial model of a run: random weights from a seed, or those of another model."""

from __future__ import annotations

from typing import Protocol

import torch

from fedrun.model.config import ModelConfig
from fedrun.model.mamba2 import Mamba2LM
from fedrun.model.precision import accumulate_in_fp32
from fedrun.model.pretrained import Pretrained

DTYPES = {"bf16": torch.float32, "fp32": torch.float32, "fp64": torch.float64}
"""Type of the parameters for each --dtype. bf16 means bf16 products on fp32 parameters."""


class ModelSettings(Protocol):
    """The settings that a model is built from. RunConfig has them."""

    @property
    def model(self) -> ModelConfig: ...
    @property
    def dtype(self) -> str: ...
    @property
    def seed(self) -> int: ...


def new_model(settings: ModelSettings, vocab_size: int, device: torch.device,
              pretrained: Pretrained | None = None) -> Mamba2LM:
    """The model of a run at its start, from scratch or with the weights of `pretrained`: the same
    on every rank and every device."""
    if device.type == "cuda":
        accumulate_in_fp32()
    model = uninitialised_model(settings, vocab_size)
    if pretrained is None:
        model.init_weights(settings.seed)
    else:
        pretrained.load_into(model)
    return model.to(device=device, dtype=DTYPES[settings.dtype])


def uninitialised_model(settings: ModelSettings, vocab_size: int) -> Mamba2LM:
    """A model of the run's shape, in fp32."""
    assert settings.dtype in DTYPES, "`auto` must be resolved before the model is built"
    compute_dtype = torch.bfloat16 if settings.dtype == "bf16" else torch.float32
    shape = settings.model
    return Mamba2LM(shape, shape.rows(vocab_size), compute_dtype=compute_dtype)
