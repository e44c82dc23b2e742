"""`fedrun evaluate RUN --dataset ... --split validation`: a model's perplexity on any text."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from fedrun.files import finite
from fedrun.tools.common import model_parser, need_tokenizer, parse


def main(argv: Sequence[str]) -> int:
    """Print loss and perplexity as one JSON object."""
    parser = model_parser("evaluate", "Loss and perplexity of a run's model, as one JSON object.")
    parser.add_argument("--dataset", metavar="TEXT",
                        help="as for training (default: what the run was trained on)")
    parser.add_argument("--split", choices=("train", "validation"), default="validation",
                        help="(default: validation)")
    parser.add_argument("--sequence_length", type=int, metavar="N",
                        help="tokens in a sequence (default: the run's, or 256)")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32",
                        help="type of the matrix products (default: fp32)")
    parser.add_argument("--device", default="cpu", metavar="cpu|cuda|cuda:1",
                        help="where to compute (default: cpu)")
    parser.add_argument("--tokenizer", metavar="FOLDER",
                        help="a tokenizer's folder, where the model came without one")
    parser.add_argument("--cache_dir", type=Path, default=Path("~/.cache/fedrun"), metavar="FOLDER",
                        help="tokenised text (default: %(default)s)")
    args = parse(parser, argv)

    import torch

    from fedrun.data.tokens import prepare
    from fedrun.evaluate import mean_loss, perplexity, validation_pieces
    from fedrun.pretrained import find_pretrained

    try:
        device = torch.device(args.device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {args.device}: {error}") from None
    found = find_pretrained(args.model, "RUN")
    length = found.settings.get("sequence_length", 256) if args.sequence_length is None \
        else args.sequence_length
    if length < 2:
        raise ValueError(f"--sequence_length {length}: accepted is a whole number of at least 2")
    dataset = args.dataset or found.settings.get("dataset", "wikitext-2")
    data = prepare(dataset, str(need_tokenizer(found, args.tokenizer)), length, args.cache_dir,
                   say=lambda line: print(line, file=sys.stderr, flush=True))
    if data.vocab_size > found.vocab_size:
        raise ValueError(f"--tokenizer {args.tokenizer}: not the tokenizer of {args.model}, which "
                         f"knows {found.vocab_size} tokens")
    model = found.build(torch.bfloat16 if args.dtype == "bf16" else torch.float32).to(device)
    pieces = validation_pieces(model, getattr(data, args.split), device)
    loss = mean_loss(pieces)
    told = {"model": args.model, "dataset": dataset, "split": args.split, "loss": loss,
            "perplexity": perplexity(loss), "tokens": sum(n for *_, n in pieces),
            "sequence_length": length, "dtype": args.dtype}
    print(json.dumps(finite(told), indent=1, allow_nan=False))
    return 0
