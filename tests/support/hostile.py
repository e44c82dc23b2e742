"""Hostile contents of files, and names that programs may misinterpret."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

# A name that looks like mathematics and markup, and one with characters that a terminal obeys: a
# colour, the clipboard (OSC 52), a bell, right-to-left writing, two C1 codes.
MATHEMATICS = "a$b_$c^{[red]\\frac"  # cannot be parsed as such
ESCAPES = "e\x1b[31m\x1b]52;c;QUJD\x07\u202e\x9b\x85_"
OBEYED = tuple("\x1b\x07\u202e\x9b\x85")
NAMES = (MATHEMATICS, ESCAPES)
SHOWN = (MATHEMATICS, r"e\x1b[31m\x1b]52;c;QUJD\x07\u202e\x9b\x85_")
"""How the names must be printed."""


def obeyed(text: str) -> list[str]:
    """The characters in a text that a terminal would obey."""
    return [character for character in OBEYED if character in text]


def damaged(kind: type = dict) -> dict[str, bytes | str]:
    """Wrong contents, by name, for a file that should hold a `kind` as JSON. A str is the kind of
    thing that stands in the file's place; see `put`."""
    other: Any = {} if kind is list else [1]
    return {
        "empty": b"", "another": json.dumps(other).encode(), "number": b"7", "null": b"null",
        "infinite": b"1e400", "long": b'{"seed": ' + b"9" * 5000 + b"}", "text": b'"text"',
        "deep": b"[" * 100_000, "deep objects": b'{"a":' * 100_000,
        "nested": b"[" * 900 + b"]" * 900, "latin": b'{"method": "\xe9"}', "zeros": bytes(100),
        "torn": b'[{"global_step": 1, "server', "pipe": "pipe", "folder": "folder",
        "loop": "loop", "large": "large"}


WRONG_TYPES: tuple[dict[str, Any], ...] = (
    {"method": ["x"], "seed": {}, "config": 5},
    {"method": "fed_avg", "seed": 1, "config": "tiny", "local_updates": 10**300},
    {"method": "fed_avg", "seed": 1.5, "config": "tiny"},
    {"method": "fed_avg", "seed": None, "config": "tiny"},
    {"method": None, "seed": 0, "config": "tiny"})
"""Contents of config.json."""

ODD_RECORDS: list[Any] = [
    7, [], None, {}, {"global_step": "1", "server_val_ppl": 2.0},
    *({"global_step": step, "server_val_ppl": value, "tokens": value, "seconds": value,
       "train_loss": value, "bytes": value}
      for step in (5, -1, "a", None, 10**400, 1.5, [1], True)
      for value in (1e308, -1, 0, None, "x", [1], 10**400, True))]
"""Records of training_history.json, none with a perplexity that can be drawn."""

ODD_EVENTS = b"\n".join([
    b"7", b"[]", b"null", b'{"event": "round"}', b'{"event": "round", "round": []}',
    b'{"event": [], "round": 1}', b'{"event": "round", "round": 1e400, "clients": 7}',
    b'{"event": "start", "total": "x", "unit": ["[red]"]}',
    b'{"event": "round", "round": 3, "clients": [1, {"client": []}, {"client": 1, "loss": "x",'
    b' "weight": null, "norm": 1e400}], "left_out": [[], 1], "train_ppl": "a", "val_ppl": NaN,'
    b' "tokens": [], "lr": "x", "seconds": {}, "tokens_per_second": "q", "bytes": "\\u001b"}',
    b"[" * 100_000, b'{"torn": ', b"\xff\xfe", b""])


def put(path: Path, content: bytes | str) -> None:
    """Replace `path` by a file with this content, or by what a str names."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content == "pipe":
        os.mkfifo(path)
    elif content == "folder":
        path.mkdir()
    elif content == "loop":
        path.symlink_to(path.name)
    elif content == "large":
        with path.open("wb") as file:
            file.truncate(1 << 33)  # 8 GiB, sparse
