"""A run's model at its start: from scratch by a seed, or with other weights."""

from __future__ import annotations

from typing import Protocol

import torch

from fedrun.model.config import ModelConfig
from fedrun.model.mamba2 import Mamba2LM
from fedrun.model.pretrained import Pretrained

DTYPES = {"bf16": torch.float32, "fp32": torch.float32, "fp64": torch.float64}
"""The type of the parameters, by --dtype."""


class ModelSettings(Protocol):
    """What a model is built from; a run's config has it."""

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
    assert settings.dtype in DTYPES, "resolved before anything is built: it decides the bits"
    products = torch.bfloat16 if settings.dtype == "bf16" else torch.float32
    shape = settings.model
    model = Mamba2LM(shape, shape.rows(vocab_size), compute_dtype=products)
    if pretrained is None:
        model.init_weights(settings.seed)
    else:
        pretrained.load_into(model)
    return model.to(device=device, dtype=DTYPES[settings.dtype])
