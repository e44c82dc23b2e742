"""`fedrun generate RUN --prompt ...`: continues a text with a run's model."""

from __future__ import annotations

from collections.abc import Sequence

from fedrun.common.errors import InputError
from fedrun.common.log import WARNING, log
from fedrun.common.terminal import argument_text, say_text
from fedrun.tools.common import model_parser, need_tokenizer, parse


def main(argv: Sequence[str]) -> int:
    """Print the prompt and its continuation."""
    parser = model_parser("generate", "Continue a text with a run's model.")
    parser.add_argument("--prompt", default="Once upon a time,", metavar="TEXT",
                        help="the text to continue (default: %(default)s)")
    parser.add_argument("--max_new_tokens", type=int, default=100, metavar="N",
                        help="number of tokens to add (default: 100)")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="X",
                        help="0: always the most likely token; above 0: tokens are drawn from "
                             "softmax(logits / X), the more varied the larger X (default: 0)")
    parser.add_argument("--top_k", type=int, default=0, metavar="N",
                        help="draw only from the N most likely tokens; 0: from all (default: 0)")
    parser.add_argument("--seed", type=int, default=0, metavar="N",
                        help="random seed for drawing tokens (default: 0)")
    parser.add_argument("--tokenizer", metavar="FOLDER",
                        help="a tokenizer's folder or tokenizer.json, for a model without one")
    args = parse(parser, argv)
    args.prompt = argument_text(args.prompt, "--prompt")
    for flag, value, low in (("max_new_tokens", args.max_new_tokens, 1), ("top_k", args.top_k, 0),
                             ("temperature", args.temperature, 0), ("seed", args.seed, 0)):
        if not value >= low:
            raise InputError(f"--{flag} {value}: must be >= {low}")
    for flag, value in (("top_k", args.top_k), ("seed", args.seed)):
        if value and not args.temperature:
            log(f"--{flag} {value} has no effect with --temperature 0, which draws no tokens at "
                "random", WARNING)

    import torch

    from fedrun.data.tokenizer import encode, read_tokenizer
    from fedrun.model.generate import generate
    from fedrun.model.pretrained import find_pretrained

    found = find_pretrained(args.model, "RUN")
    path = need_tokenizer(found, args.tokenizer)
    tokenizer = read_tokenizer(path if path.is_file() else path / "tokenizer.json", "--tokenizer")
    prompt = encode(tokenizer, [args.prompt], "--prompt")[0].ids
    if not prompt:
        raise InputError("--prompt: must have at least one token")
    if max(prompt) >= found.vocab_size:
        raise InputError(f"--tokenizer {args.tokenizer}: not the tokenizer of {args.model}, whose "
                         f"vocabulary has {found.vocab_size} tokens")
    model = found.build()
    try:
        if not all(torch.isfinite(p).all() for p in model.parameters()):
            raise FloatingPointError("its parameters are not finite")
        new = generate(model, torch.tensor([prompt]), args.max_new_tokens, args.temperature,
                       args.top_k, torch.Generator().manual_seed(args.seed))
    except FloatingPointError as error:
        raise InputError(f"RUN {args.model}: {error}: the model has diverged and cannot "
                         "generate text") from None
    say_text(args.prompt + str(tokenizer.decode(new[0].tolist())))
    return 0
