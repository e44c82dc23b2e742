"""`fedrun plot perplexities|deltas|federated-deltas`: figures from run folders alone.

    fedrun plot perplexities --data_dir results/ --config pure_ssm_1_layer
    fedrun plot federated-deltas --entity client_0 --layer all

PNG and SVG, no display needed; nothing here imports torch.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from fedrun.common.errors import InputError, naming
from fedrun.common.terminal import say
from fedrun.flags import Parser, closest


def main(argv: Sequence[str]) -> int:
    """Make one kind of figures; 0, or 1 where no figure could be made."""
    commands: dict[str, tuple[str, Callable[[str, Sequence[str]], int]]] = {
        "perplexities": ("perplexity against tokens, steps, rounds, seconds or bytes",
                         _perplexities),
        "deltas": ("how in_proj changed in central runs: heatmaps and singular values", _deltas),
        "federated-deltas": ("the same for the global model or a client of federated runs",
                             _federated_deltas)}
    if not argv or argv[0] in ("-h", "--help"):
        told = "\n".join(f"  {name:<17} {text}" for name, (text, _) in commands.items())
        print(f"usage: fedrun plot KIND [--flag value ...]\n\n{told}\n\n"
              "`fedrun plot KIND --help` explains the flags of a kind.")
        return 0
    kind = argv[0].replace("_", "-")
    if kind not in commands:
        raise InputError(f"unknown kind of plot {argv[0]!r}{closest(kind, commands)}; known are "
                         f"{', '.join(commands)}")
    text, command = commands[kind]
    return command(text, argv[1:])


def _parser(kind: str, text: str) -> argparse.ArgumentParser:
    parser = Parser(prog=f"fedrun plot {kind}", description=text, allow_abbrev=False)
    parser.add_argument("--data_dir", type=Path, default=Path("results"),
                        help="folder with run folders (default: results/)")
    parser.add_argument("--out_dir", "--output_dir", type=Path, metavar="FOLDER",
                        default=Path("results/plots") / kind.replace("-", "_"),
                        help="folder for the figures (default: %(default)s)")
    parser.add_argument("--config", metavar="NAME",
                        help="only runs of this config (default: all that are found)")
    return parser


def _perplexities(text: str, argv: Sequence[str]) -> int:
    parser = _parser("perplexities", text)
    from fedrun.plots.runs import AXES, find_runs
    parser.add_argument("--x", choices=AXES, default="tokens",
                        help="what lies on the x-axis (default: tokens, which compares runs at "
                             "equal work)")
    args = parser.parse_args(argv)
    from fedrun.plots import perplexity
    found = find_runs(args.data_dir)
    say(str(found))
    made, left_out = perplexity.figures(found.runs, args.x, args.config)
    for line in left_out:
        say(f"left out {line}")
    with naming("--out_dir", args.out_dir):
        perplexity.save_all(made, args.out_dir)
    return 0 if any(not isinstance(result, str) for result in made.values()) else 1


def _deltas(text: str, argv: Sequence[str]) -> int:
    return _delta_figures(_parser("deltas", text), argv, federated=False)


def _federated_deltas(text: str, argv: Sequence[str]) -> int:
    parser = _parser("federated-deltas", text)
    parser.add_argument("--entity", default="server", metavar="server|client_0|...",
                        help="whose model: the global one, or a client's (saved with "
                             "--save_client_deltas) (default: server)")
    return _delta_figures(parser, argv, federated=True)


def _delta_figures(parser: argparse.ArgumentParser, argv: Sequence[str], federated: bool) -> int:
    parser.add_argument("--layer", default="0", metavar="N|all",
                        help="which layer, counted from 0 (default: 0)")
    args = parser.parse_args(argv)
    if args.layer != "all" and not args.layer.isdigit():
        raise InputError(f"--layer {args.layer}: accepted is a whole number from 0, or all")
    from fedrun.plots import deltas, saved
    from fedrun.plots.perplexity import save_all
    layer = None if args.layer == "all" else int(args.layer)
    found = saved.find_entities(args.data_dir, "server" if not federated else args.entity,
                                 federated, args.config)
    say(str(found))
    made = deltas.figures(found, layer)
    with naming("--out_dir", args.out_dir):
        save_all(made, args.out_dir)
    return 0 if any(not isinstance(result, str) for result in made.values()) else 1
