"""Rows in files of every kind, and the first of them that have so many tokens."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from tokenizers import Tokenizer

from fedrun.data import limited_rows, tokenising_pool
from fedrun.data.tokens import TokenData, prepare
from tests.support.texts import text_file

BINARIES = ("train.bin", "validation.bin", "documents.npz")
ROWS = [f"{n} ships — {n * 7919 % 1000} of them {'漢' * (n % 5)} came home." + "\n" * (n % 3 == 0)
        if n % 11 else "" for n in range(700)]
HOME = [f"w{n % 7}" for n in range(700)]
MOST = 5000


def saved_tokenizer(folder: Path) -> str:
    return str(prepare(str(text_file(folder)), "bpe:300", 16, folder).tokenizer_path)


def write_rows(path: Path, rows: list[str]) -> Path:
    path.parent.mkdir(exist_ok=True)
    values = {"text": rows, "who": HOME[:len(rows)]}
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.table(values), path)
    elif path.suffix == ".txt":
        path.write_text("".join(f"{row.rstrip()}\n" for row in rows))
    else:
        path.write_text("".join(json.dumps(dict(zip(values, row, strict=True))) + "\n"
                                for row in zip(*values.values(), strict=True)))
    return path


def first_rows(rows: list[str], tokenizer: str, most: int) -> list[str]:
    """The first rows with `most` tokens, counted one after the other."""
    loaded, count = Tokenizer.from_file(f"{tokenizer}/tokenizer.json"), 0
    for n, row in enumerate(rows):
        if count >= most:
            return rows[:n]
        count += len(loaded.encode(row if row.endswith("\n") else f"{row}\n",
                                   add_special_tokens=False).ids)
    return rows


def digests(data: TokenData) -> list[str]:
    return [hashlib.sha256((data.tokenizer_path.parent / name).read_bytes()).hexdigest()
            for name in BINARIES]


def in_small_blocks(monkeypatch: pytest.MonkeyPatch, smallest: int, largest: int, processes: int
                    ) -> None:
    monkeypatch.setattr(limited_rows, "SMALLEST_BLOCK", smallest)
    monkeypatch.setattr(tokenising_pool, "BLOCK_BYTES", largest)
    monkeypatch.setattr(tokenising_pool, "processes_for", lambda size: processes)
