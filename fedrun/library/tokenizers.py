"""The tokenizer of a model that was found on disk."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from fedrun.common.errors import InputError

if TYPE_CHECKING:
    from fedrun.model.pretrained import Pretrained


def need_tokenizer(found: Pretrained, given: str | None = None) -> Path:
    """The folder of the model's tokenizer, or the tokenizer.json that was given.

    Raises InputError if there is none.
    """
    folder = Path(given).expanduser() if given else found.tokenizer
    if folder is not None and folder.is_file():
        return folder
    if folder is None or not (folder / "tokenizer.json").is_file():
        raise InputError(f"--tokenizer {given}: must be a folder with a tokenizer.json, or that "
                         "file" if given else
                         f"{found.folder}: has no tokenizer.json; give --tokenizer FOLDER")
    return folder
