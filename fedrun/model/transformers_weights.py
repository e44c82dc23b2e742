"""Weights of transformers models, from the folder of a run or of the library."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedrun.common.errors import InputError, one_line
from fedrun.model.config import TransformersShape
from fedrun.model.transformers_config import ATTENTION, library_config, model_class, quietly
from fedrun.model.transformers_lm import build


def of_run(shape: TransformersShape, rows: int, weights: Mapping[str, Tensor], folder: Path) -> Any:
    """The library's model with weights by its own names. Raises InputError if they do not fit."""
    lm = build(shape, rows, seed=0)
    expected = {name: p.shape for name, p in lm.named_parameters()}
    found = {name: tensor.shape for name, tensor in weights.items()}
    if wrong := _first(name for name in {**expected, **found}
                       if expected.get(name) != found.get(name)):
        raise InputError(f"{folder}: weights and config.json do not belong together: {wrong}")
    with torch.no_grad():
        for name, parameter in lm.named_parameters():
            parameter.copy_(weights[name])
    return lm


def of_folder(shape: TransformersShape, rows: int, folder: Path) -> Any:
    """The library's model as `save_pretrained` left it, read by the library: from safetensors alone
    and without running code of the folder.

    Raises InputError if the weights cannot be read, do not fit config.json, or come with a buffer
    that config.json does not determine: a run would not keep it.
    """
    config = library_config(shape, rows)
    architecture = model_class(type(config), shape.model_type)
    with torch.random.fork_rng(devices=[]), quietly():
        try:
            lm, report = architecture.from_pretrained(
                str(folder), config=config, attn_implementation=ATTENTION,
                torch_dtype=torch.float32, local_files_only=True, use_safetensors=True,
                trust_remote_code=False, output_loading_info=True)
        except Exception as error:  # the library raises many kinds
            raise InputError(f"{folder}: cannot read the weights: {one_line(error)}") from error
    wrong = [str(name) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")
             for name in report[kind]]
    if wrong:
        raise InputError(f"{folder}: weights and config.json do not belong together: "
                         f"{_first(wrong)}")
    fresh = dict(build(shape, rows, seed=0).named_buffers())
    for name, buffer in lm.named_buffers():
        if name not in fresh or not torch.equal(fresh[name], buffer):
            raise InputError(f"{folder}: {name} is no parameter, and its values are not those that "
                             "config.json gives: a run keeps parameters alone")
    return lm.float()


def _first(names: Any) -> str:
    """The first of the names in order, and how many there are; empty if there is none."""
    ordered = sorted(names)
    more = f" and {len(ordered) - 1} more" if len(ordered) > 1 else ""
    return f"{ordered[0]}{more}" if ordered else ""
