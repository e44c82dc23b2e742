"""`fedrun generate RUN "Some text"`: continues a text with a run's model."""

from __future__ import annotations

from collections.abc import Sequence

from fedrun.common.terminal import argument_text, say_text
from fedrun.tools.common import either, model_of, model_parser, parse

PROMPT = "Once upon a time,"


def main(argv: Sequence[str]) -> int:
    """Print the prompt and its continuation."""
    parser = model_parser("generate", "Continue a text with a run's model.")
    parser.add_argument("text", nargs="?", metavar="TEXT",
                        help=f"the text to continue (default: {PROMPT})")
    parser.add_argument("--prompt", metavar="TEXT", help="the same by a flag")
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
    prompt = either(args.text, "--prompt", args.prompt)
    prompt = argument_text(PROMPT if prompt is None else prompt, "--prompt")
    from fedrun.library.generation import continue_text
    say_text(continue_text(model_of(args.model, args.client), prompt, args.max_new_tokens,
                           args.temperature, args.top_k, args.seed, args.tokenizer))
    return 0
