"""Shards of one data set, in files of every kind that is read in pieces or as a whole."""

from __future__ import annotations

import gzip
import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

N_ROWS, SHARDS = 400, 3
TEXTS = [f"{n} ships — {n // 2} of them {'漢' * (n % 5)} came\u2028home.\n" * (n % 7 > 0)
         for n in range(N_ROWS)]


def records(n: int) -> dict[str, list[Any]]:
    rows = range(n, N_ROWS, SHARDS)
    return {"text": [TEXTS[row] for row in rows], "who": [f"w{row % 11}" for row in rows]}


def json_lines(n: int) -> bytes:
    held = records(n)
    return "".join(json.dumps({"text": text, "who": who}) + "\n" for text, who in
                   zip(held["text"], held["who"], strict=True)).encode()


def table(n: int, kind: str) -> bytes:
    buffer, held = io.BytesIO(), pyarrow.table(records(n))
    if kind == "arrow":
        with pyarrow.ipc.new_stream(buffer, held.schema) as stream:
            stream.write_table(held)
    else:
        pyarrow.parquet.write_table(held, buffer, row_group_size=17)
    return buffer.getvalue()


def csv(n: int) -> bytes:
    import pandas

    return str(pandas.DataFrame(records(n)).to_csv(index=False)).encode()


def archive(n: int) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for part in range(2):
            file.writestr(f"{part}.jsonl", json_lines(n))
    return buffer.getvalue()


def text(n: int) -> bytes:
    return "".join(records(n)["text"]).encode()


KINDS: dict[str, Callable[[int], bytes]] = {
    "txt": text, "jsonl": json_lines, "jsonl.gz": lambda n: gzip.compress(json_lines(n)),
    "json": lambda n: json.dumps(records(n)).encode(), "csv": csv, "zip": archive,
    "parquet": lambda n: table(n, "parquet"), "arrow": lambda n: table(n, "arrow")}


def shards_of(kind: str, folder: Path) -> Path:
    for n in range(SHARDS):
        path = folder / f"part{n}" / f"some.{kind}"
        path.parent.mkdir(parents=True)
        path.write_bytes(KINDS[kind](n))
    return folder
