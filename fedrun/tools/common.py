"""Shared by the commands that load a model."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from fedrun.common.errors import InputError
from fedrun.flags import Parser


def model_parser(command: str, text: str) -> argparse.ArgumentParser:
    """A parser whose first positional argument is the model."""
    parser = Parser(prog=f"fedrun {command}", description=text, allow_abbrev=False)
    parser.add_argument("model", metavar="RUN",
                        help="a run's folder or its name in results/, an exported folder, or a "
                             "model on the hub")
    return parser


def parse(parser: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.Namespace:
    """Like parse_args, but the model may be given anywhere among the flags."""
    return parser.parse_intermixed_args(argv)


def either(placed: str | None, flag: str, value: str | None) -> str | None:
    """What was given without its flag, after the model, or by the flag; InputError if both were."""
    if placed is not None and value is not None:
        raise InputError(f"{flag} {value}: was given without the flag too, as {placed!r}")
    return placed if value is None else value
