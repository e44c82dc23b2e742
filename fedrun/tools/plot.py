"""`fedrun plot perplexities|deltas|federated-deltas|bytes`: draws figures from run folders.

    fedrun plot perplexities --data_dir results/ --config pure_ssm_1_layer
    fedrun plot perplexities --data_dir results/methods         # a study, from its histories alone
    fedrun plot federated-deltas --entity client_0 --layer all
    fedrun plot bytes --data_dir results/methods                # of a study's table

As PNG and SVG, without a display. Does not import torch.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from pathlib import Path

from fedrun.common.errors import InputError, naming, require
from fedrun.common.terminal import say
from fedrun.flags import Parser, closest


def main(argv: Sequence[str]) -> int:
    """Draw one kind of figures. The exit code is 1 if no figure could be drawn."""
    commands: dict[str, tuple[str, Callable[[str, Sequence[str]], int]]] = {
        "perplexities": ("perplexity against tokens, steps, rounds, seconds or bytes",
                         _perplexities),
        "deltas": ("changes of in_proj in central runs: heatmaps and singular values", _deltas),
        "federated-deltas": ("the same for the global model or a client of federated runs",
                             _federated_deltas),
        "bytes": ("perplexity against bytes that clients send, of a study's settings", _bytes)}
    if not argv or argv[0] in ("-h", "--help"):
        kinds = "\n".join(f"  {name:<17} {text}" for name, (text, _) in commands.items())
        print(f"usage: fedrun plot KIND [--flag value ...]\n\n{kinds}\n\n"
              "`fedrun plot KIND --help` explains the flags of a kind.")
        return 0
    kind = argv[0].replace("_", "-")
    if kind not in commands:
        raise InputError(f"unknown kind of plot {argv[0]!r}{closest(kind, commands)}; must be "
                         f"{' or '.join(commands)}")
    text, command = commands[kind]
    return command(text, argv[1:])


def _parser(kind: str, text: str) -> argparse.ArgumentParser:
    parser = Parser(prog=f"fedrun plot {kind}", description=text, allow_abbrev=False)
    parser.add_argument("--data_dir", type=Path, default=Path("results"),
                        help="folder with run folders, or of a study (default: results/)")
    parser.add_argument("--out_dir", "--output_dir", type=Path, metavar="FOLDER",
                        default=Path("results/plots") / kind.replace("-", "_"),
                        help="folder to write the figures to (default: %(default)s)")
    parser.add_argument("--config", metavar="NAME",
                        help="only runs with this config (default: all)")
    return parser


def _perplexities(text: str, argv: Sequence[str]) -> int:
    parser = _parser("perplexities", text)
    from fedrun.plots.run_folder import AXES
    parser.add_argument("--x", choices=AXES, default="tokens",
                        help="quantity on the x-axis (default: tokens, which compares runs at "
                             "equal work)")
    parser.add_argument("--from", type=int, metavar="STEP", dest="start",
                        help="start at this local step of a client and fit the y-axis to what "
                             "follows; 0: the whole run (default: the y-axis fits what the "
                             "curves do after a tenth of the run, and an inset shows them "
                             "whole)")
    parser.add_argument("--y_max", type=float, metavar="PERPLEXITY",
                        help="end the y-axis here (default: where the curves do)")
    parser.add_argument("--where", action="append", default=[], metavar="SETTING=VALUE",
                        help="only runs with this value, such as sync=epoch; may be repeated "
                             "(default: all; runs whose settings differ get figures of their own)")
    args = parser.parse_args(argv)
    require(args.start is None or args.start >= 0, "--from", args.start, ">= 0")
    require(args.y_max is None or 1 < args.y_max < math.inf, "--y_max", args.y_max,
            "a finite number > 1")
    from fedrun.plots import perplexity
    from fedrun.plots.pieces import save_all
    from fedrun.plots.protocols import where
    from fedrun.plots.runs import find_runs
    from fedrun.plots.view import View
    found = find_runs(args.data_dir)
    say(str(found))
    drawn, left_out = perplexity.figures(where(found.runs, args.where), args.x, args.config,
                                        View(args.start, args.y_max))
    for line in left_out:
        say(f"left out {line}")
    with naming("--out_dir", args.out_dir):
        save_all(drawn, args.out_dir)
    return 0 if any(not isinstance(result, str) for result in drawn.values()) else 1


def _bytes(text: str, argv: Sequence[str]) -> int:
    parser = Parser(prog="fedrun plot bytes", description=text, allow_abbrev=False)
    parser.add_argument("--data_dir", type=Path, required=True, metavar="FOLDER",
                        help="folder of a study, with its table.json")
    parser.add_argument("--out_dir", "--output_dir", type=Path, metavar="FOLDER",
                        default=Path("results/plots/bytes"),
                        help="folder to write the figure to (default: %(default)s)")
    args = parser.parse_args(argv)
    from fedrun.plots import traffic
    from fedrun.plots.pieces import save_all
    drawn = traffic.figures(args.data_dir)
    with naming("--out_dir", args.out_dir):
        save_all(drawn, args.out_dir)
    return 0 if any(not isinstance(result, str) for result in drawn.values()) else 1


def _deltas(text: str, argv: Sequence[str]) -> int:
    return _delta_figures(_parser("deltas", text), argv, federated=False)


def _federated_deltas(text: str, argv: Sequence[str]) -> int:
    parser = _parser("federated-deltas", text)
    parser.add_argument("--entity", default="server", metavar="server|client_0|...",
                        help="whose model: the server's global one, or a client's, which runs save "
                             "with --save_client_deltas (default: server)")
    return _delta_figures(parser, argv, federated=True)


def _delta_figures(parser: argparse.ArgumentParser, argv: Sequence[str], federated: bool) -> int:
    parser.add_argument("--layer", default="0", metavar="N|all",
                        help="the layer, counted from 0, or all of them (default: 0)")
    args = parser.parse_args(argv)
    if args.layer != "all" and not args.layer.isdigit():
        raise InputError(f"--layer {args.layer}: must be an integer >= 0, or all")
    from fedrun.plots import deltas, saved
    from fedrun.plots.pieces import save_all
    layer = None if args.layer == "all" else int(args.layer)
    found = saved.find_entities(args.data_dir, "server" if not federated else args.entity,
                                 federated, args.config)
    say(str(found))
    drawn = deltas.figures(found, layer)
    with naming("--out_dir", args.out_dir):
        save_all(drawn, args.out_dir)
    return 0 if any(not isinstance(result, str) for result in drawn.values()) else 1
