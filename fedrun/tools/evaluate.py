"""`fedrun evaluate RUN held_out.txt --split validation`: computes a model's perplexity."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from fedrun.common.files import finite
from fedrun.common.log import print_log
from fedrun.data.hub import CACHE_DIR
from fedrun.tools.common import either, model_of, model_parser, parse


def main(argv: Sequence[str]) -> int:
    """Print loss and perplexity as one JSON object."""
    parser = model_parser("evaluate", "Print the loss (in nats per token) and the perplexity of a "
                          "run's model on any text, as one JSON object.")
    parser.add_argument("text", nargs="?", metavar="TEXT",
                        help="the text, as --dataset for training: a file, a folder, a data set "
                             "(default: what the run was trained on, or with sites "
                             "the server's text)")
    parser.add_argument("--dataset", metavar="TEXT", help="the same by a flag")
    parser.add_argument("--split", metavar="NAME",
                        help="train, validation, test or another split (default: validation; all "
                             "of the text if --dataset has no such split)")
    parser.add_argument("--text_column", metavar="NAME", help="the column that holds the text")
    parser.add_argument("--encoding", metavar="NAME",
                        help="encoding of text files (default: UTF-8, or as a byte-order mark "
                             "says)")
    parser.add_argument("--sequence_length", type=int, metavar="N",
                        help="tokens in a sequence (default: the run's, or 256, or as many as "
                             "the model has positions)")
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

    from fedrun.library.evaluation import evaluate

    given = vars(args)
    name, client = given.pop("model"), given.pop("client")
    given["dataset"] = either(given.pop("text"), "--dataset", given["dataset"])
    print_log(to_stderr=True)
    result = {"model": name} | ({} if client is None else {"client": client}) | evaluate(
        model_of(name, client, args.cache_dir), **given)
    print(json.dumps(finite(result), indent=1, allow_nan=False))
    return 0
