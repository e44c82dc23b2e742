"""Tokenises the rows of a split block by block, in several processes if the text is large.

The processes (tokenising_process.py) read the rows themselves; their token ids come back and are
appended in the order of the blocks (tokenising_pool.py). In memory are two blocks of ids a process,
the text of one, and what the tokenizer makes of a quarter of a megabyte, or of one row if it is
longer.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fedrun.common.log import log
from fedrun.data import tokenising_pool
from fedrun.data.partial_entry import PartialEntry, sync_file
from fedrun.data.stored_rows import StoredRows
from fedrun.data.tokenising_pool import Encodes, TokenisingPool
from fedrun.data.tokenising_process import Encoded, Encoder

if TYPE_CHECKING:
    from tokenizers import Tokenizer

LINE_SECONDS = 20.0  # between lines about the progress; the first comes after half of it


def write_ids(path: Path, rows: StoredRows, starts: np.ndarray, encoder: Encodes,
              tokenizer: Tokenizer, partial: PartialEntry) -> np.ndarray:
    """Write the token ids of all rows to a file, concatenated; or what is missing of them there.

    Args:
        path: of the file, in `partial.entry`.
        starts: the rows where documents begin, and the end; int64, (n + 1,).
        tokenizer: the encoder's, already loaded.
    Returns:
        the same in tokens
    Raises:
        InputError: the tokenizer has no token for a word.
        HelperEnded: a process that tokenises was killed.
        OSError: the disk is full. What has been recorded stays for the next start.
    """
    split, dtype = path.stem, encoder.dtype
    positions_file = partial.folder / f"{split}.starts"
    said = partial.done(split) or {"rows": 0, "tokens": 0}
    done, tokens = int(said["rows"]), int(said["tokens"])
    positions = np.empty_like(starts)
    begun = synced = int(np.searchsorted(starts[:-1], done))
    if begun:
        positions[:begun] = np.fromfile(positions_file, np.int64, begun)
        os.truncate(positions_file, 8 * begun)
    else:
        positions_file.write_bytes(b"")

    def sync() -> None:
        nonlocal synced
        with positions_file.open("ab") as file:
            file.write(positions[synced:begun].tobytes())
        synced = begun
        sync_file(positions_file)
        sync_file(path)

    meter = _Meter(split, len(rows), done, tokens)
    with path.open("r+b" if done else "wb") as file, \
            contextlib.closing(_encoded(rows[done:], encoder, tokenizer)) as blocks:
        file.truncate(tokens * dtype.itemsize)
        file.seek(0, os.SEEK_END)
        for ids, counts in blocks:
            file.write(ids.data)
            file.flush()
            before = tokens + np.append(0, np.cumsum(counts))
            last = int(np.searchsorted(starts[:-1], done + len(counts)))
            positions[begun:last] = before[starts[begun:last] - done]
            done, tokens, begun = done + len(counts), int(before[-1]), last
            partial.mark(split, {"rows": done, "tokens": tokens},
                         {f"{partial.entry.name}/{path.name}": tokens * dtype.itemsize,
                          positions_file.name: 8 * begun}, sync)
            meter.report(done, tokens)
    positions[-1] = tokens
    return positions


@dataclass
class _Meter:
    """Logs how far the tokenising of a split is, if it takes long."""

    split: str
    n_rows: int
    rows_before: int
    tokens_before: int

    def __post_init__(self) -> None:
        self._began = time.monotonic()
        self._next = self._began + LINE_SECONDS / 2

    def report(self, rows: int, tokens: int) -> None:
        now = time.monotonic()
        if now < self._next or rows == self.n_rows:
            return
        self._next = now + LINE_SECONDS
        passed = now - self._began
        left = passed * (self.n_rows - rows) / (rows - self.rows_before)
        log(f"tokenised {rows / self.n_rows:.0%} of the {self.split} split: {tokens:,} tokens, "
            f"{(tokens - self.tokens_before) / passed:,.0f} tokens/s, about {_duration(left)} left")


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if minutes < 2:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def _encoded(rows: StoredRows, encoder: Encodes, tokenizer: Tokenizer
             ) -> Generator[Encoded, None, None]:
    """The token ids of each block of the rows, in order."""
    processes = tokenising_pool.processes_for(rows.about_bytes) if isinstance(
        encoder, Encoder) else 1
    with TokenisingPool(rows.files, encoder, tokenizer, processes) as pool:
        for spans in rows.blocks(tokenising_pool.BLOCK_BYTES):
            pool.ask(spans)
            if len(pool) >= pool.most:
                yield pool.take()
        while len(pool):
            yield pool.take()
