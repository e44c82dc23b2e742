"""Reads large files in several processes, in pieces: the bytes between two line ends of a text or
of a file of JSON lines, some row groups of a Parquet file, or else a whole file.

Each piece becomes files of rows of its own (reading_process.py), which this process appends to
those of the split in the order of the pieces. So neither pieces nor processes change a row; at most
2 pieces a process lie beside the rows on the disk, and in memory there is what reading a piece
takes, a few megabytes for all but those that are read as a whole.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from fedrun.common.errors import InputError
from fedrun.common.limits import machine_memory
from fedrun.data import helper_pool
from fedrun.data.documents import TextFile
from fedrun.data.helper_pool import HelperPool
from fedrun.data.limited_rows import LimitedRows
from fedrun.data.reading import Reading, text_file
from fedrun.data.reading_process import SOURCE, Piece, PieceRead, Reader
from fedrun.data.stored_rows import RowFiles
from fedrun.data.table_files import KINDS, has_json_lines, row_group_bytes
from fedrun.data.text_files import DataFile, is_cut_at_lines
from fedrun.data.validation import Rows

PIECE_BYTES = 1 << 23
BYTES_A_PROCESS = 1 << 23  # less is read before another process has started
COMPRESSED_TO = 4  # bytes of text for each of a compressed file, about
MEMORY_OF_WHOLE = 8  # bytes, at the most, of each byte of a file that is read as a whole
LINE_END_BYTES = 1 << 16  # looked through at once


def processes_for(size: int) -> int:
    """How many processes read files of this size together; with 1, no other is started."""
    return max(1, min(len(os.sched_getaffinity(0)), size // BYTES_A_PROCESS))


def read_shards(shards: Sequence[DataFile], reading: Reading, files: RowFiles) -> Rows:
    """What `reading.read` does, in several processes if the shards are large.

    With --max_tokens this process reads, no further than is wanted.

    Raises:
        InputError: a shard cannot be read; the line is that of `reading.read`.
        HelperEnded: a process that reads was killed, or does not answer.
        OSError: the disk is full.
    """
    if isinstance(files, LimitedRows):
        return reading.read(shards, files)
    try:
        processes = processes_for(sum({shard.path: _about_bytes(shard) for shard in shards
                                       }.values()))
        pieces = list(cut(shards, reading)) if processes > 1 else []
    except (OSError, InputError):  # reading has the words for what is wrong
        return reading.read(shards, files)
    # Some kinds of files take several times their size in memory where they are read as a whole.
    whole = max((_about_bytes(shard) for piece in pieces for shard in piece if shard.part is None),
                default=0)
    if whole > PIECE_BYTES:
        processes = min(processes, machine_memory() // (MEMORY_OF_WHOLE * whole))
    if len(pieces) < 2 or processes < 2:
        return reading.read(shards, files)
    folder = Path(tempfile.mkdtemp(prefix="pieces-", dir=files.folder))
    try:
        with contextlib.closing(HelperPool(lambda: Reader(reading), min(processes, len(pieces)),
                                           lambda: _is_written(folder))) as pool:
            return _appended([Piece(each, folder / str(n)) for n, each in enumerate(pieces)],
                             reading, files, pool)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _appended(pieces: Sequence[Piece], reading: Reading, files: RowFiles,
              pool: HelperPool[Piece, PieceRead]) -> Rows:
    """Read pieces and append them to files in their order."""
    first, texts = len(files), list[TextFile]()
    source, numbers = [np.empty(0, np.int32)], dict[str, int]()
    waiting = iter(pieces)
    for piece in pieces:
        for more in itertools.islice(waiting, pool.most - len(pool)):
            more.folder.mkdir()
            pool.ask(more)
        try:
            read = pool.take()
        except InputError:
            # Lines and positions in the message count from the beginning of the file.
            for shard in piece.shards:
                reading.look(dataclasses.replace(shard, part=None))
            raise
        files.append_files(RowFiles(piece.folder, whole=True))
        if reading.source_column:
            new = [numbers.setdefault(name, len(numbers)) for name in read.sources]
            source.append(np.array(new, np.int32)[np.fromfile(piece.folder / SOURCE, np.int32)])
        shutil.rmtree(piece.folder)
        for shard, lines in zip(piece.shards, read.lines, strict=not reading.columns):
            before = 0 if shard.begins else texts.pop().lines
            texts.append(text_file(shard, before + lines))
    return Rows(files.since(first), texts, np.concatenate(source) if reading.source_column else
                None, list(numbers), reading.source_column or "")


def _is_written(folder: Path) -> bool:
    """Whether a piece has grown while none was finished: a large file that is read as a whole."""
    latest = max((file.stat().st_mtime for file in folder.rglob("*")), default=0.0)
    return time.time() - latest < helper_pool.ANSWER_SECONDS


# ---- pieces -------------------------------------------------------------------------------------

def cut(shards: Iterable[DataFile], reading: Reading) -> Iterator[list[DataFile]]:
    """Shards in pieces of about PIECE_BYTES: a part of one, or as many as fit.

    Raises:
        InputError: one cannot be read.
        OSError: the same.
    """
    small, held = list[DataFile](), 0
    for shard in shards:
        # Of what is in an archive the size is not known.
        size = PIECE_BYTES if shard.member else _about_bytes(shard)
        cuts = _cuts(shard, reading, size) if size > PIECE_BYTES else []
        if small and (held + size > PIECE_BYTES or len(cuts) > 2):
            yield small
            small, held = [], 0
        if len(cuts) > 2:
            for part in itertools.pairwise(cuts):
                yield [dataclasses.replace(shard, part=part)]
        else:
            small.append(shard)
            held += size
    if small:
        yield small


def _about_bytes(shard: DataFile) -> int:
    """Bytes of a file, decompressed; of an archive as it is."""
    compressed = shard.member is None and shard.plain_name != shard.name
    return shard.path.stat().st_size * (COMPRESSED_TO if compressed else 1)


def _cuts(shard: DataFile, reading: Reading, size: int) -> list[int]:
    """Where the parts of a large file begin, and its end; empty if it cannot be cut."""
    kind = KINDS[shard.suffix] if reading.columns else "text"
    if shard.plain_name != shard.name:
        return []
    if kind == "parquet":
        return _row_groups(row_group_bytes(shard))
    lines = (kind == "text" or (kind == "json" and has_json_lines(shard))) and is_cut_at_lines(
        shard, reading.encoding)
    return _line_ends(shard.path, size) if lines else []


def _row_groups(sizes: list[int]) -> list[int]:
    """The first row group of each piece, and the number of all."""
    cuts, held = [0], 0
    for number, size in enumerate(sizes):
        if held and held + size > PIECE_BYTES:
            cuts.append(number)
            held = 0
        held += size
    return [*cuts, len(sizes)]


def _line_ends(path: Path, size: int) -> list[int]:
    """Where pieces begin in a file of lines, and its end: each behind the first line end after
    PIECE_BYTES."""
    cuts = [0]
    with path.open("rb", buffering=0) as file:
        at = PIECE_BYTES
        while at < size:
            file.seek(at)
            block = file.read(min(LINE_END_BYTES, size - at))
            found = block.find(b"\n")
            if not block:  # it has become shorter
                break
            if found < 0:
                at += len(block)
                continue
            if (cut := at + found + 1) < size:
                cuts.append(cut)
            at = cut + PIECE_BYTES
    return [*cuts, size]
