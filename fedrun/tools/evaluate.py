"""`fedrun evaluate RUN --dataset ... --split validation`: computes a model's perplexity."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fedrun.common.errors import InputError
from fedrun.common.files import finite
from fedrun.common.log import print_log
from fedrun.common.perplexity import perplexity
from fedrun.data.hub import CACHE_DIR
from fedrun.data.text_options import TextOptions, text_options_of
from fedrun.tools.common import model_parser, need_tokenizer, parse

if TYPE_CHECKING:
    from fedrun.data.tokens import TokenData


def main(argv: Sequence[str]) -> int:
    """Print loss and perplexity as one JSON object."""
    parser = model_parser("evaluate", "Print the loss (in nats per token) and the perplexity of a "
                          "run's model on any text, as one JSON object.")
    parser.add_argument("--dataset", metavar="TEXT",
                        help="the text, as for training (default: what the run was trained on)")
    parser.add_argument("--split", metavar="NAME",
                        help="train, validation, test or another split (default: validation; all "
                             "of the text if --dataset has no such split)")
    parser.add_argument("--text_column", metavar="NAME", help="the column that holds the text")
    parser.add_argument("--encoding", metavar="NAME",
                        help="encoding of text files (default: UTF-8, or as a byte-order mark "
                             "says)")
    parser.add_argument("--sequence_length", type=int, metavar="N",
                        help="tokens in a sequence (default: the run's, or 256)")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32",
                        help="type of matrix products (default: fp32)")
    parser.add_argument("--device", default="cpu", metavar="cpu|cuda|cuda:1",
                        help="where to compute (default: cpu)")
    parser.add_argument("--tokenizer", metavar="FOLDER",
                        help="a tokenizer's folder or tokenizer.json, for a model without one")
    parser.add_argument("--cache_dir", type=Path, default=CACHE_DIR, metavar="FOLDER",
                        help="folder for tokenised text and for what comes from the hub (default: "
                             "%(default)s)")
    args = parse(parser, argv)

    import torch

    from fedrun.data.corpora import ALL_OF_THE_TEXT
    from fedrun.data.tokens import prepare
    from fedrun.model.precision import exact_fp32
    from fedrun.model.pretrained import find_pretrained
    from fedrun.training.evaluate import mean_loss, validation_pieces

    try:
        device = torch.device(args.device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {args.device}: {error}") from None
    found = find_pretrained(args.model, "RUN", args.cache_dir)
    length = found.settings.get("sequence_length", 256) if args.sequence_length is None \
        else args.sequence_length
    if length < 2:
        raise InputError(f"--sequence_length {length}: must be an integer >= 2")
    dataset, options = _text_to_read(args, found.settings)
    print_log(to_stderr=True)
    try:
        data = prepare(dataset, str(need_tokenizer(found, args.tokenizer)), length, args.cache_dir,
                       options=options)
    except ValueError as error:
        raise InputError(str(error).replace("--validation_split", "--split")) from error
    if data.vocab_size > found.vocab_size:
        raise InputError(f"--tokenizer {args.tokenizer}: not the tokenizer of {args.model}, whose "
                         f"vocabulary has {found.vocab_size} tokens")
    if args.dtype == "fp32":
        exact_fp32()
    model = found.build(torch.bfloat16 if args.dtype == "bf16" else torch.float32).to(device)
    whole = data.fingerprint["validation_from"] == ALL_OF_THE_TEXT
    pieces = validation_pieces(model, data.train if args.split == "train" else data.validation,
                               device)
    if whole:
        pieces += [(len(pieces) + n, loss, count) for n, loss, count in
                   validation_pieces(model, _rest(data, length), device)]
    loss = mean_loss(pieces)
    split = "all" if whole else args.split or options.validation_split or "validation"
    result = {"model": args.model, "dataset": dataset, "split": split, "loss": loss,
              "perplexity": perplexity(loss), "tokens": sum(n for *_, n in pieces),
              "sequence_length": length, "dtype": args.dtype}
    print(json.dumps(finite(result), indent=1, allow_nan=False))
    return 0


def _text_to_read(args: argparse.Namespace, settings: Mapping[str, Any]
                  ) -> tuple[str, TextOptions]:
    """The dataset, and how to read it: the run's own as in its training, unless flags differ."""
    own = settings.get("dataset", "wikitext-2")
    dataset = own if args.dataset is None else args.dataset
    options = text_options_of(settings)
    if dataset != own:
        options = TextOptions(row_separator=options.row_separator)
    if args.text_column is not None or args.encoding is not None:
        options = dataclasses.replace(options, text_column=args.text_column or options.text_column,
                                      encoding=args.encoding or options.encoding)
    if args.split not in (None, "train", "validation"):
        options = dataclasses.replace(options, validation_split=args.split, val_fraction=None)
    # Any other text is evaluated in full unless a split is named; of the run's own, only what was
    # held out from its training.
    return dataset, dataclasses.replace(
        options, hold_out=dataset == own or args.split in ("train", "validation"))


def _rest(data: TokenData, length: int) -> np.ndarray:
    """The tokens after the last whole sequence as a shorter one, (1, n); (0, length) if there are
    fewer than two."""
    stream = np.memmap(data.tokenizer_path.parent / "validation.bin", data.validation.dtype, "r")
    rest = stream[len(data.validation) * length:]
    return rest[None] if len(rest) > 1 else np.empty((0, length), data.validation.dtype)
