"""Configs of transformers for shapes that files give, which nobody has to trust.

Only architectures that the installed library itself has are built: no code of a folder is run.
"""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from fedrun.common.errors import InputError, one_line
from fedrun.model.config import OF_THE_TOKENIZER, TransformersShape
from fedrun.model.convert import whole_rows

if TYPE_CHECKING:
    from transformers import PretrainedConfig

ATTENTION = "eager"
"""Plain matrix products and a softmax: every architecture has it, and it gives the same bits."""
# Fields of a folder's config that describe no shape, or would load something else than its weights.
_NO_SHAPE = frozenset({
    "architectures", "attn_implementation", "auto_map", "chunk_size_feed_forward", "dtype",
    "experts_implementation", "finetuning_task", "fusion_config", "id2label", "is_encoder_decoder",
    "label2id", "name_or_path", "num_labels", "output_attentions", "output_hidden_states",
    "problem_type", "pruned_heads", "return_dict", "task_specific_params", "torch_dtype",
    "torchscript", "transformers_version", "transformers_weights", "use_cache"})
_OLDER = frozenset({"rope_theta", "rope_scaling", "partial_rotary_factor"})
"""Fields that the library still accepts beside `rope_parameters`."""


def shape_of_folder(config: Mapping[str, Any]) -> tuple[TransformersShape, int]:
    """The shape that a folder's config.json describes, and the rows of its embedding.

    Raises InputError for weights that are stored in another form than a number each.
    """
    if config.get("quantization_config"):
        raise InputError("quantization_config: must be absent: quantised weights cannot be trained")
    shape = TransformersShape({name: value for name, value in config.items()
                               if name not in {*_NO_SHAPE, *OF_THE_TOKENIZER,
                                               "quantization_config"}
                               and not name.startswith("_")})
    # Not every file says it: a class may have a default.
    rows = config.get("vocab_size", getattr(library_config(shape), "vocab_size", None))
    return shape, whole_rows(rows)


def library_config(shape: TransformersShape, rows: int | None = None) -> PretrainedConfig:
    """The library's config for a shape, with `rows` of the embedding.

    Dropout rates that the shape does not give are 0, and special tokens are none. Raises InputError
    for a type that the library does not have, or that is no causal language model, for a field that
    it does not know, and for values that it refuses.
    """
    from transformers import CONFIG_MAPPING
    kind = shape.model_type
    known = list(CONFIG_MAPPING.keys())
    if kind not in known:
        near = difflib.get_close_matches(kind, known, n=1)
        raise InputError(f"model.transformers.model_type {kind}: transformers has no such "
                         "architecture" + (f", did you mean {near[0]}?" if near else ""))
    cls = CONFIG_MAPPING[kind]
    model_class(cls, kind)
    fields = _fields(cls)
    # Special tokens do not fit where the embedding is looked at with a few rows.
    given = {name: value for name, value in shape.settings.items()
             if name not in ("model_type", *OF_THE_TOKENIZER)}
    unset: dict[str, Any] = {name: 0.0 for name, default in fields.items()
                             if "drop" in name and type(default) in (int, float)}
    unset |= {name: None for name in OF_THE_TOKENIZER if name in fields}
    if rows is None:
        unset.pop("vocab_size", None)
    else:
        unset["vocab_size"] = rows
    try:
        return cls(**{**unset, **given})
    except Exception as error:  # the library and its checks raise many kinds
        raise InputError(f"model.transformers: {kind} refuses these fields: "
                         f"{one_line(error)}") from error


def require_known_fields(shape: TransformersShape) -> None:
    """Raise InputError for a field that the config of this type does not have."""
    from transformers import CONFIG_MAPPING
    cls = CONFIG_MAPPING[shape.model_type]
    known = {*_fields(cls), *cls.attribute_map, "tie_word_embeddings", "model_type", *_OLDER}
    for name in shape.settings:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise InputError(f"model.transformers.{name}: {shape.model_type} has no such field"
                             + (f", did you mean {near[0]}?" if near else ""))


def model_class(config_class: Any, kind: str) -> Any:
    """The library's class of the causal language model with a config of this class.

    Raises InputError if the library has no such model of this type.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING
    if config_class not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise InputError(f"model.transformers.model_type {kind}: must be a causal language model; "
                         "transformers has none of this type")
    found = MODEL_FOR_CAUSAL_LM_MAPPING[config_class]
    return found[0] if isinstance(found, tuple | list) else found


def max_positions(config: PretrainedConfig) -> int | None:
    """The longest sequence that the model was made for; None if there is no limit."""
    found = getattr(config, "max_position_embeddings", None)
    return found if isinstance(found, int) and found > 0 else None


def _fields(cls: Any) -> dict[str, Any]:
    """The fields of a config's class with their defaults: the arguments of its constructor, and in
    newer versions of the library, whose configs are dataclasses, the dataclass's fields."""
    import dataclasses
    import inspect
    found = {p.name: p.default for p in inspect.signature(cls.__init__).parameters.values()
             if p.kind is p.POSITIONAL_OR_KEYWORD or p.kind is p.KEYWORD_ONLY}
    if dataclasses.is_dataclass(cls):
        found |= {f.name: f.default for f in dataclasses.fields(cls)}
    found.pop("self", None)
    return found


@contextmanager
def quietly() -> Iterator[None]:
    """Without the library's messages and progress bars: what matters is raised."""
    from transformers.utils import logging as messages
    logging: Any = messages  # without types
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
