"""The initial model of a run: random weights from a seed, or those of another model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, TypeVar

import torch

from fedrun.common.errors import require
from fedrun.model.base import Model
from fedrun.model.config import ModelConfig, ModelShape, TransformersShape
from fedrun.model.mamba2 import Mamba2LM
from fedrun.model.names import personal_names
from fedrun.model.precision import accumulate_in_fp32
from fedrun.model.pretrained import Pretrained

if TYPE_CHECKING:
    from fedrun.model.transformers_lm import TransformersLM

SomeModel = TypeVar("SomeModel", bound="Mamba2LM | TransformersLM")
DTYPES = {"bf16": torch.float32, "fp32": torch.float32, "fp64": torch.float64}
"""Type of the parameters for each --dtype. bf16 means bf16 products on fp32 parameters."""


class ModelSettings(Protocol):
    """The settings that a model is built from. RunConfig has them."""

    @property
    def model(self) -> ModelShape: ...
    @property
    def dtype(self) -> str: ...
    @property
    def seed(self) -> int: ...
    @property
    def checkpoint_activations(self) -> bool: ...
    @property
    def micro_batch(self) -> int | None: ...


def new_model(settings: ModelSettings, vocab_size: int, device: torch.device,
              pretrained: Pretrained | None = None) -> Model:
    """The model of a run at its start, from scratch or with the weights of `pretrained`: the same
    on every rank and every device."""
    if device.type == "cuda":
        accumulate_in_fp32()
    dtype, shape = DTYPES[settings.dtype], settings.model
    if pretrained is not None:
        made = pretrained.build(compute_dtype(settings))
        return _spared(made, settings).to(device=device, dtype=dtype)
    if isinstance(shape, TransformersShape):
        from fedrun.model import transformers_lm
        lm = transformers_lm.build(shape, vocab_size, settings.seed)
        theirs = transformers_lm.TransformersLM(lm, compute_dtype(settings))
        return _spared(theirs, settings).to(device, dtype)
    model = uninitialised_model(settings, vocab_size)
    model.init_weights(settings.seed)
    return model.to(device=device, dtype=dtype)


def uninitialised_model(settings: ModelSettings, vocab_size: int) -> Mamba2LM:
    """A Mamba-2 model of the run's shape, in fp32."""
    shape = settings.model
    assert isinstance(shape, ModelConfig)
    return _spared(Mamba2LM(shape, shape.rows(vocab_size), compute_dtype=compute_dtype(settings)),
                   settings)


def outlined_model(settings: ModelSettings, vocab_size: int) -> Mamba2LM | TransformersLM:
    """The model of a run without memory, on the meta device."""
    dtype, shape = DTYPES[settings.dtype], settings.model
    if isinstance(shape, TransformersShape):
        from fedrun.model import transformers_lm
        theirs = transformers_lm.TransformersLM(
            transformers_lm.outline(shape, vocab_size), compute_dtype(settings),
            transformers_lm.ends_in_its_head(shape))
        return _spared(theirs, settings).to(torch.device("meta"), dtype)
    with torch.device("meta"):
        return uninitialised_model(settings, vocab_size).to(dtype)


def _spared(model: SomeModel, settings: ModelSettings) -> SomeModel:
    """The same model, told how it spares memory."""
    model.micro_batch = settings.micro_batch
    if isinstance(model, Mamba2LM):
        model.recompute = settings.checkpoint_activations
    return model


def compute_dtype(settings: ModelSettings) -> torch.dtype:
    """The type of the run's matrix products, unless its parameters are wider."""
    assert settings.dtype in DTYPES, "`auto` must be resolved before the model is built"
    return torch.bfloat16 if settings.dtype == "bf16" else torch.float32


def longest_sequence(shape: ModelShape) -> int | None:
    """The positions that a model of this shape has; None if there is no limit."""
    if isinstance(shape, TransformersShape):
        from fedrun.model.transformers_config import library_config, max_positions
        return max_positions(library_config(shape))
    return None


def longest_side(shape: ModelShape) -> int:
    """The longest side of the matrices inside the layers (see ParameterNames); 0 without any."""
    if isinstance(shape, TransformersShape):
        from fedrun.model import transformers_lm
        matrices = transformers_lm.matrices_of(transformers_lm.outline(shape, 8))
        return max((max(m.shape) for m in matrices.values()), default=0)
    assert isinstance(shape, ModelConfig)
    return shape.projected


def require_personal(patterns: str | None, shape: ModelShape, vocab_size: int) -> None:
    """Raise InputError for a --personal that does not fit the parameters of this shape."""
    if patterns is None:
        return
    if isinstance(shape, TransformersShape):
        from fedrun.model import transformers_lm
        model: torch.nn.Module = transformers_lm.outline(shape, shape.rows(vocab_size))
    else:
        assert isinstance(shape, ModelConfig)
        with torch.device("meta"):
            model = Mamba2LM(shape, shape.rows(vocab_size))
    personal_names(patterns, [name for name, _ in model.named_parameters()])


def require_positions(shape: ModelShape, sequence_length: int) -> None:
    """Raise InputError if sequences are longer than a model of this shape was made for."""
    most = longest_sequence(shape)
    require(most is None or sequence_length <= most, "--sequence_length", sequence_length,
            f"at most {most}, the positions of the model")


def require_trainable(shape: ModelShape, vocab_size: int, sequence_length: int, given: bool
                      ) -> None:
    """Raise InputError for a model that cannot be trained on such sequences: what only transformers
    knows of its models. given: whether the user wrote the shape's fields."""
    if isinstance(shape, TransformersShape):
        from fedrun.model import transformers_config, transformers_lm
        if given:
            transformers_config.require_known_fields(shape)
        shape.require_no_dropout("")
        require_positions(shape, sequence_length)
        transformers_lm.require_trainable(shape, vocab_size, sequence_length)
