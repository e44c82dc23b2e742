"""A process that reads pieces of files, and how it is asked to. Needs neither torch nor
transformers, so that it starts in a third of a second.

    asked       one line of JSON: a folder for the rows, and the files of the piece
    answers     (helper_process.py) JSON: the names of the sources, and the lines of each text

The rows lie in the folder then (stored_rows.py), and in source.npy the sources' numbers.
"""

from __future__ import annotations

import json
import select
import sys
from collections.abc import Sequence
from pathlib import Path, PurePath
from typing import NamedTuple

import numpy as np

from fedrun.common.files import write_atomic
from fedrun.data.helper_process import HelperProcess, Parts, answer_with
from fedrun.data.reading import Reading
from fedrun.data.stored_rows import RowFiles
from fedrun.data.text_files import DataFile

SOURCE = "source"  # of a piece: int32


class Piece(NamedTuple):
    """A piece of work."""

    shards: list[DataFile]
    """Files, or one part of one."""
    folder: Path
    """A new one, for the rows."""


class PieceRead(NamedTuple):
    """What is known of its rows."""

    sources: list[str]
    """Names, by the numbers in SOURCE."""
    lines: list[int]
    """Of each shard; empty if rows are records."""


class Reader(HelperProcess[Piece, PieceRead]):
    """A process that reads."""

    does, continues = "reads text", "the next start reads it from the beginning"

    def __init__(self, reading: Reading) -> None:
        super().__init__("reading_process", json.dumps(
            [reading.encoding, reading.columns, reading.source_column, reading.stripped]))

    def ask(self, asked: Piece) -> PieceRead:
        """Have a piece read into its folder."""
        shards = [(str(shard.path), str(shard.name), shard.member, shard.part)
                  for shard in asked.shards]
        answer = self.answered(json.dumps([str(asked.folder), shards]).encode() + b"\n")
        return PieceRead(*json.loads(answer))


class _PieceFiles(RowFiles):
    """Rows of a piece, which are wanted as long as somebody may ask."""

    def flush(self) -> None:
        super().flush()
        # Nothing is asked before the answer, so that there is only the end to be read.
        if select.select([sys.stdin], [], [], 0)[0]:
            raise SystemExit


def main(how: str) -> None:
    """The process: answer until nobody asks."""
    encoding, columns, source_column, stripped = json.loads(how)
    reading = Reading(encoding, tuple(columns), source_column, stripped)
    for line in sys.stdin.buffer:
        asked = json.loads(line)
        folder = Path(asked[0])
        shards = [DataFile(Path(path), PurePath(name), member, tuple(part) if part else None)
                  for path, name, member, part in asked[1]]

        def read(folder: Path = folder, shards: Sequence[DataFile] = shards) -> Parts:
            files = _PieceFiles(folder)
            rows = reading.read(shards, files)
            files.flush()
            if rows.source is not None:
                numbers = rows.source.astype(np.int32)
                write_atomic(folder / SOURCE, numbers.tobytes(), durable=False)
            return [json.dumps([rows.sources, [text.lines for text in rows.files]]).encode()]

        if not answer_with(read):
            return
