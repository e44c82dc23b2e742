"""The loss and perplexity of a model on any text."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fedrun.common.errors import InputError
from fedrun.common.perplexity import perplexity
from fedrun.data.given import given_data
from fedrun.data.given_parts import given_part
from fedrun.data.hub import CACHE_DIR
from fedrun.data.text_options import GIVEN, TextOptions, text_options_of
from fedrun.data.tokens import TokenData, prepare
from fedrun.data.validation import ALL_OF_THE_TEXT
from fedrun.library.tokenizers import need_tokenizer
from fedrun.model.build import longest_sequence, require_positions
from fedrun.model.precision import accumulate_in_fp32, exact_fp32
from fedrun.training.evaluate import mean_loss, validation_pieces

if TYPE_CHECKING:
    from fedrun.model.pretrained import Pretrained


def evaluate(found: Pretrained, dataset: str | None = None, split: str | None = None, *,
             text_column: str | None = None, encoding: str | None = None,
             sequence_length: int | None = None, dtype: str = "fp32", device: str = "cpu",
             tokenizer: str | None = None, cache_dir: str | Path = CACHE_DIR, data: Any = None
             ) -> dict[str, Any]:
    """Loss in nats per token and perplexity, with the number of tokens and what was read.

    dataset: the text, as for training; None: the run's own, which is what it was trained on, or in
        a run with sites the server's text.
    split: None: what was held out from the run's own text; of any other text, all.
    sequence_length: tokens in a sequence; None: the run's, or 256, or the model's positions if
        these are fewer.
    dtype: of the matrix products, fp32 or bf16.
    tokenizer: a tokenizer's folder or tokenizer.json, for a model without one.
    data: token ids or texts instead of a dataset, as `fedrun.train` takes them.

    Raises:
        InputError: an argument cannot be used, or the tokenizer does not belong to the model.
    """
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {device}: {error}") from None
    length = sequence_length if sequence_length is not None else found.settings.get(
        "sequence_length", min(256, longest_sequence(found.model) or 256))
    if length < 2:
        raise InputError(f"--sequence_length {length}: must be an integer >= 2")
    require_positions(found.model, length)
    if not isinstance(dataset, str | os.PathLike | None):
        raise InputError(f"dataset: is of type {type(dataset).__name__}; must be a name or a path "
                         "(data= takes token ids and texts)")
    if data is not None and (dataset is not None or split is not None):
        raise InputError("data: must be left out with dataset= and split=")
    name, options = _text_to_read(found.settings, dataset if data is None else GIVEN, split,
                                  text_column, encoding)
    source = name if data is None else given_data([given_part(data, "data")], None, False, length,
                                                  options)
    try:
        data = prepare(source, str(need_tokenizer(found, tokenizer)), length, Path(cache_dir),
                       options=options)
    except ValueError as error:
        raise InputError(str(error).replace("--validation_split", "--split")) from error
    if data.vocab_size > found.vocab_size:
        raise InputError(f"--tokenizer {tokenizer}: not the tokenizer of {found.folder}, whose "
                         f"vocabulary has {found.vocab_size} tokens")
    if dtype == "fp32":
        exact_fp32()
    if place.type == "cuda":
        accumulate_in_fp32()
    model = found.build(torch.bfloat16 if dtype == "bf16" else torch.float32).to(
        device=place, dtype=torch.float32)
    whole = data.fingerprint["validation_from"] == ALL_OF_THE_TEXT
    pieces = validation_pieces(model, data.train if split == "train" else data.validation, place)
    if whole:
        pieces += [(len(pieces) + n, loss, count) for n, loss, count in
                   validation_pieces(model, _rest(data, length), place)]
    loss = mean_loss(pieces)
    return {"dataset": name,
            "split": "all" if whole else split or options.validation_split or "validation",
            "loss": loss, "perplexity": perplexity(loss), "tokens": sum(n for *_, n in pieces),
            "sequence_length": length, "dtype": dtype}


def _text_to_read(settings: Mapping[str, Any], dataset: str | None, split: str | None,
                  text_column: str | None, encoding: str | None) -> tuple[str, TextOptions]:
    """The dataset, and how to read it: the run's own as in its training, unless told otherwise."""
    own = settings.get("dataset", "wikitext-2")
    dataset = own if dataset is None else dataset
    options = text_options_of(settings)
    if dataset != own:
        options = TextOptions(row_separator=options.row_separator)
    if text_column is not None or encoding is not None:
        options = dataclasses.replace(options, text_column=text_column or options.text_column,
                                      encoding=encoding or options.encoding)
    if split not in (None, "train", "validation"):
        options = dataclasses.replace(options, validation_split=split, val_fraction=None)
    # Any other text is evaluated in full unless a split is named; of the run's own, only what was
    # held out from its training.
    return dataset, dataclasses.replace(
        options, hold_out=dataset == own or split in ("train", "validation"))


def _rest(data: TokenData, length: int) -> np.ndarray:
    """The tokens after the last whole sequence as a shorter one, (1, n); (0, length) if there are
    fewer than two."""
    stream = np.memmap(data.tokenizer_path.parent / "validation.bin", data.validation.dtype, "r")
    rest = stream[len(data.validation) * length:]
    return rest[None] if len(rest) > 1 else np.empty((0, length), data.validation.dtype)
