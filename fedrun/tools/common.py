"""Shared by the commands that load a model."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from fedrun.common.errors import InputError
from fedrun.flags import Parser

if TYPE_CHECKING:
    from pathlib import Path

    from fedrun.model.pretrained import Pretrained


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


def need_tokenizer(found: Pretrained, given: str | None = None) -> Path:
    """The folder of the model's tokenizer, or the tokenizer.json that was given.

    Raises ValueError if there is none.
    """
    from pathlib import Path

    folder = Path(given).expanduser() if given else found.tokenizer
    if folder is not None and folder.is_file():
        return folder
    if folder is None or not (folder / "tokenizer.json").is_file():
        raise InputError(f"--tokenizer {given}: must be a folder with a tokenizer.json, or that "
                         "file" if given else
                         f"{found.folder}: has no tokenizer.json; give --tokenizer FOLDER")
    return folder
