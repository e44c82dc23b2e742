"""What the commands that load a model have in common."""

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
    """A parser whose first argument is the model."""
    parser = Parser(prog=f"fedrun {command}", description=text, allow_abbrev=False)
    parser.add_argument("model", metavar="RUN",
                        help="a run's folder or its name under results/, an exported folder, or a "
                             "model of the hub")
    return parser


def parse(parser: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.Namespace:
    """As parse_args, but the model may stand anywhere among the flags."""
    return parser.parse_intermixed_args(argv)


def need_tokenizer(found: Pretrained, given: str | None = None) -> Path:
    """The folder of the model's tokenizer, or the tokenizer.json that was given; ValueError where
    there is none."""
    from pathlib import Path

    folder = Path(given).expanduser() if given else found.tokenizer
    if folder is not None and folder.is_file():
        return folder
    if folder is None or not (folder / "tokenizer.json").is_file():
        raise InputError(f"--tokenizer {given}: accepted is a folder with tokenizer.json, or that "
                         f"file; {found.folder} has none" if given else
                         f"{found.folder}: it has no tokenizer.json; give --tokenizer FOLDER")
    return folder
