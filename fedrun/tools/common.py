"""Shared by the commands that load a model."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fedrun.common.errors import InputError
from fedrun.data.hub import CACHE_DIR
from fedrun.flags import Parser

if TYPE_CHECKING:
    from fedrun.model.pretrained import Pretrained


def model_parser(command: str, text: str) -> argparse.ArgumentParser:
    """A parser whose first positional argument is the model."""
    parser = Parser(prog=f"fedrun {command}", description=text, allow_abbrev=False)
    parser.add_argument("model", metavar="RUN",
                        help="a run's folder or its name in results/, an exported folder, or a "
                             "model on the hub")
    parser.add_argument("--client", type=int, metavar="K",
                        help="of a run with --personal: client K's own model, of the newest "
                             "checkpoint")
    return parser


def model_of(name: str, client: int | None, cache_dir: Path = CACHE_DIR) -> Pretrained:
    """The model that a parser of `model_parser` was asked for; InputError if there is none."""
    from fedrun.library.own_models import of_client
    from fedrun.model.pretrained import find_pretrained
    return of_client(find_pretrained(name, "RUN", cache_dir), client)


def parse(parser: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.Namespace:
    """Like parse_args, but the model may be given anywhere among the flags."""
    return parser.parse_intermixed_args(argv)


def either(placed: str | None, flag: str, value: str | None) -> str | None:
    """What was given without its flag, after the model, or by the flag; InputError if both were."""
    if placed is not None and value is not None:
        raise InputError(f"{flag} {value}: was given without the flag too, as {placed!r}")
    return placed if value is None else value
