"""The shape of a model. Imports no torch, so that `--help` and a wrong flag answer at once."""

from __future__ import annotations

import dataclasses
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from fedrun.common.errors import InputError, one_line, require

NORM_EPS = 1e-5  # fixed in mamba_ssm's norms
# Far above any real model: a mistyped number is refused before it takes all the memory.
LARGEST = {"n_layer": 4096, "d_model": 2**17, "d_state": 2**14, "headdim": 2**14, "expand": 64,
           "ngroups": 2**14, "d_conv": 256, "pad_vocab_multiple": 2**20}
LARGEST_VOCABULARY = 2**27
LARGEST_NUMBER = 2**31  # in a config of transformers
OF_THE_TOKENIZER = ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")


@dataclass(frozen=True)
class ModelShape(ABC):
    """The shape of a model but for its vocabulary: what the section `model:` describes."""

    tracks_parameters: ClassVar[bool] = False
    """Whether its models name tracked parameters and those of mixers."""

    def rows(self, vocab_size: int) -> int:
        """Rows of the embedding."""
        return vocab_size

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """The shape as run folders record it; `recorded_shape` reads it."""


@dataclass(frozen=True)
class ModelConfig(ModelShape):
    """The shape of a Mamba-2 model; the letters are those of Dao & Gu (2024)."""

    tracks_parameters: ClassVar[bool] = True

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

    @property
    def projected(self) -> int:
        """What a block's in_proj makes of a token: the longest side of its matrices."""
        inner = self.expand * self.d_model
        return 2 * inner + 2 * self.ngroups * self.d_state + inner // self.headdim

    def parameters(self, rows: int) -> int:
        """Number of parameters of a model whose embedding has `rows` rows."""
        inner = self.expand * self.d_model
        heads = inner // self.headdim
        conv = inner + 2 * self.ngroups * self.d_state
        block = (self.d_model * self.projected + inner * self.d_model  # in_proj, out_proj
                 + (self.projected + self.d_model) * self.proj_bias + conv * (self.d_conv
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


@dataclass(frozen=True)
class TransformersShape(ModelShape):
    """A causal language model of transformers: its `model_type` and fields of the library's config.

    Only the library can tell whether there is such a type and such a field: see
    `transformers_config.py`. Dropout rates that are left out are 0.
    """

    settings: Mapping[str, Any] = dataclasses.field(hash=False)

    def __post_init__(self) -> None:
        given = self.settings
        require(isinstance(given, Mapping) and all(isinstance(name, str) for name in given),
                "model.transformers", given, "a mapping with a model_type")
        kind = given.get("model_type")
        require(isinstance(kind, str), "model.transformers.model_type", kind,
                "the name that transformers has for the architecture, such as gpt2")
        for name, value in _numbers(given):
            most = LARGEST["n_layer"] if "layer" in name and type(value) is int else LARGEST_NUMBER
            require(abs(value) <= most, f"model.transformers.{name}", value, f"at most {most}")
        try:
            json.dumps(given)
        except (TypeError, ValueError, RecursionError) as error:
            raise InputError(f"model.transformers: {one_line(error)}") from None

    @classmethod
    def of_file(cls, section: Any) -> TransformersShape:
        """The shape that a config file gives. Raises InputError for what belongs to the tokenizer
        and for dropout."""
        shape = cls(_with_numbers(section))
        for name in OF_THE_TOKENIZER:
            if name in shape.settings:
                raise InputError(f"model.transformers.{name}: must be left out: it is the "
                                 "tokenizer's")
        shape.require_no_dropout("model.transformers.")
        return shape

    def require_no_dropout(self, where: str) -> None:
        """Raise InputError if a dropout rate is not 0. where: before its name in the message."""
        for name, rate in _numbers(self.settings):
            require("drop" not in name or rate == 0, where + name, rate,
                    "0: training has no dropout")

    @property
    def model_type(self) -> str:
        return str(self.settings["model_type"])

    def to_dict(self) -> dict[str, Any]:
        return {"transformers": dict(self.settings)}


def recorded_shape(section: Mapping[str, Any]) -> ModelShape:
    """The shape that a run's config.json records. Raises InputError or TypeError if it is none."""
    return TransformersShape(section["transformers"]) if "transformers" in section \
        else ModelConfig(**section)


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _numbers(value: Any, name: str = "") -> Iterator[tuple[str, int | float]]:
    """Every number in nested JSON-like values, with the name of the innermost mapping's key."""
    if _number(value):
        yield name, value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _numbers(inner, str(key))
    elif isinstance(value, list):
        for inner in value:
            yield from _numbers(inner, name)


def _with_numbers(value: Any) -> Any:
    """Nested values with texts such as 1e-5, which YAML takes for no number, as numbers."""
    if isinstance(value, dict):
        return {key: _with_numbers(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_with_numbers(inner) for inner in value]
    if isinstance(value, str) and re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", value):
        return float(value)
    return value
