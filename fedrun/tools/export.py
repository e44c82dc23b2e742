"""`fedrun export RUN --to hf|mamba_ssm OUT`: writes a run's model for other libraries.

    hf         AutoModelForCausalLM.from_pretrained(OUT), AutoTokenizer.from_pretrained(OUT)
    mamba_ssm  MambaLMHeadModel.from_pretrained(OUT)

Both also hold the tokenizer and a model card. `--init_from OUT` trains either of them further.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fedrun.common.errors import naming
from fedrun.common.terminal import say
from fedrun.library.exporting import LOADS, export
from fedrun.tools.common import model_of, model_parser, parse


def main(argv: Sequence[str]) -> int:
    """Write the folder OUT, which must be empty if it exists."""
    parser = model_parser("export", "Write a run's model in the format of another library.")
    parser.add_argument("out", metavar="OUT", type=Path, help="the folder to write")
    parser.add_argument("--to", choices=tuple(LOADS), default="hf",
                        help="hf for transformers, mamba_ssm for the original library "
                             "(default: hf)")
    args = parse(parser, argv)

    found = model_of(args.model, args.client)
    with naming("OUT", args.out):
        export(found, args.to, args.out)
    say(f"wrote {args.out}; load it with\n\n{LOADS[args.to].format(folder=args.out)}")
    return 0
