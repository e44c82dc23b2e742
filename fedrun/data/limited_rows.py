"""Rows that are tokenised while they are read, until a split has as many tokens as are wanted.

    rows.ids        token ids of the rows, one after the other
    rows.id_starts  where those of each row begin, and the end: int64, (n_rows + 1,)

lie beside the files of stored_rows.py. The row with which a split has its tokens is its last one;
what was read behind it, less than a block, is removed from the files.

What an interrupted start has recorded is kept (partial_entry.py). The next start reads all rows
again. It compares those that are in the files, and tokenises only what comes after them.

A tokenizer that is trained on the text is trained on the first rows, as many as have a byte for
each token that is wanted: it has to be there before tokens can be counted.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING

import numpy as np

from fedrun.common.errors import InputError
from fedrun.common.log import log
from fedrun.data import tokenising_pool
from fedrun.data.stored_rows import FILES, RowFiles, StoredRows
from fedrun.data.tokenising_pool import TokenisingPool
from fedrun.data.tokenising_process import Encoded, Encoder
from fedrun.data.validation import Rows

if TYPE_CHECKING:
    from tokenizers import Tokenizer

IDS, ID_STARTS = "rows.ids", "rows.id_starts"
SMALLEST_BLOCK = 1 << 16  # bytes of text; near the last row less is tokenised at once than before
BYTES_A_TOKEN = 4  # for the number of processes
LINE_SECONDS = 20.0  # between lines about the progress; the first comes after half of it
Made = tuple["Tokenizer", Encoder]
"""A tokenizer, and how other processes use it."""
Record = Callable[[Mapping[str, int], Mapping[str, int], Callable[[], None]], None]
"""Records how far the rows are: what `LimitedRows` needs to go on there, the sizes of its files,
and a function that waits until they are on the disk."""


class RowsChanged(InputError):
    """The first rows have changed since an interrupted start read them."""


class LimitedRows(RowFiles):
    """RowFiles that take the rows of a split until these have enough tokens."""

    def __init__(self, folder: Path, make: Callable[[StoredRows | None], Made], trained: bool,
                 recorded: Mapping[str, int] | None, record: Record) -> None:
        """
        Args:
            make: makes the tokenizer; of these rows, if it is `trained` on text.
            recorded: what an earlier process has given to `record`, for the files in `folder`.
        """
        done = recorded or {"rows": 0, "tokens": 0, "id_bytes": 0}
        self._counted, self._tokens, self._behind = done["rows"], done["tokens"], 0
        super().__init__(folder, kept=self._counted)
        self._behind = self._counted  # rows of the earlier start that are not read again yet
        self._earlier: Iterator[str] = self.rows(0, self._counted) if self._counted else iter(())
        self._ids = _open(folder / IDS, done["id_bytes"])
        self._id_starts = _open(folder / ID_STARTS, 8 * self._counted + 8 * bool(self._counted))
        if not self._counted:
            _append(self._id_starts, bytes(8))
        self._make, self._record = make, record
        self._made = make(None) if self._counted or not trained else None
        self._pool: TokenisingPool | None = None
        self._next_line = time.monotonic() + LINE_SECONDS / 2
        self._most = 0  # tokens that are wanted of the split that is being read

    # ---- a split ---------------------------------------------------------------------------------

    def read(self, reader: Callable[[RowFiles], Rows], most: int) -> Rows:
        """What `reader` reads into these files, up to the row with which it has `most` tokens.

        Raises:
            InputError: the tokenizer has no token for a word, or the first rows have changed since
                an interrupted start read them; and what `reader` raises.
            HelperEnded: a process that tokenises was killed.
        """
        self._begin(most)
        try:
            text = reader(self)
            if not self._behind:
                self._tokenise(last=True)
        finally:
            self._end()
        if not self._behind:
            self.truncate(self._counted)
        kept = len(self) - self._first
        return dataclasses.replace(text, rows=text.rows[:kept], source=None if text.source is None
                                   else text.source[:kept])

    def _begin(self, most: int) -> None:
        self._first, self._most = len(self), most
        starts = np.memmap(self._id_starts.name, np.int64, "r")
        self._tokens_before = int(starts[self._first])
        # How many rows there are when an earlier start has found enough tokens in this split.
        self._full_at = self._first + 1 + int(np.searchsorted(
            starts[self._first + 1:self._counted + 1], self._tokens_before + most))
        # What follows is of this process alone.
        self._bytes_before, self._bytes_counted, self._tokens_made = self.size, 0, 0
        self._asked, self._asked_bytes = self._counted, self.size
        self._next_at = self.size + (self._block_bytes() if self._made else most)

    def _end(self) -> None:
        self._most, self.wants_more = 0, True
        if self._pool is not None:
            self._pool.close()
            self._pool = None

    def append(self, row: str) -> None:
        if self._behind:
            if row != next(self._earlier):
                raise RowsChanged("its rows have changed since an interrupted start read them; "
                                  "start again to read everything anew")
            self._behind -= 1
            self.wants_more = len(self) < self._full_at
            self._after_comparing()
            return
        super().append(row)
        if self._most and self.size >= self._next_at:
            self._tokenise(last=False)

    def _after_comparing(self) -> None:
        if not self._behind:
            self._earlier = iter(())  # it holds the files
        elif (now := time.monotonic()) >= self._next_line:
            self._next_line = now + LINE_SECONDS
            os.utime(self._ids.name)  # other ranks wait as long as files change
            log(f"compared {len(self):,} of the {self._counted:,} rows of an interrupted start")

    # ---- its tokens ------------------------------------------------------------------------------

    def _tokenise(self, last: bool) -> None:
        """Tokenise the rows that wait. last: there are no more; else as many blocks are on their
        way afterwards as surely do not have all tokens that are wanted."""
        if len(self) > self._asked and not self._enough():
            pool = self._pool = self._pool or self._start(last)
            for spans in self.since(self._asked).blocks(self._block_bytes()):
                pool.ask(spans)
                self._asked = int(spans[-1, 1])
                self._asked_bytes = self._begin_of(self._asked)
                while len(pool) and (len(pool) >= pool.most or self._expected() >= self._most):
                    self._take(pool)
                if self._enough():
                    return
            self._next_at = self._asked_bytes + self._block_bytes()
        while last and not self._enough() and self._pool is not None and len(self._pool):
            self._take(self._pool)

    def _start(self, last: bool) -> TokenisingPool:
        if self._made is None:
            text = self.since(self._first)
            self._made = self._make(StoredRows(self, next(text.blocks(self._most))))
        size = self._most * BYTES_A_TOKEN
        if last:
            size = min(size, self.size - self._bytes_before)
        tokenizer, encoder = self._made
        return TokenisingPool(self, encoder, tokenizer, tokenising_pool.processes_for(size))

    def _take(self, pool: TokenisingPool) -> None:
        """Write the ids of a block, as far as they are wanted."""
        ids, counts = pool.take()
        ends = self._tokens + np.cumsum(counts)
        enough = int(np.searchsorted(ends, self._tokens_before + self._most))
        ends = ends[:enough + 1].astype(np.int64, copy=False)
        _append(self._ids, ids[:ends[-1] - self._tokens].data)
        _append(self._id_starts, ends.data)
        self._tokens_made += int(ends[-1]) - self._tokens
        self._counted, self._tokens = self._counted + len(ends), int(ends[-1])
        self.wants_more = not self._enough()
        text = self._begin_of(self._counted)
        self._bytes_counted = text - self._bytes_before
        self._record(
            {"rows": self._counted, "tokens": self._tokens, "id_bytes": self._ids.tell()},
            dict(zip(FILES, (text, 8 * self._counted + 8), strict=True)) | self._id_sizes(),
            self.sync)
        if (now := time.monotonic()) >= self._next_line:
            self._next_line = now + LINE_SECONDS
            log(f"tokenised {self._tokens - self._tokens_before:,} of the {self._most:,} tokens "
                "that are wanted")

    def _enough(self) -> bool:
        return self._tokens - self._tokens_before >= self._most

    def _begin_of(self, row: int) -> int:
        return int(self.starts(row, row)[0])

    def _rate(self) -> float:
        """Tokens a byte; 1, about the most there can be, until something is tokenised."""
        known = self._tokens_made and self._bytes_counted  # empty rows may have tokens
        return self._tokens_made / self._bytes_counted if known else 1.0

    def _expected(self) -> float:
        """Tokens of the split when all blocks that were asked for have come."""
        on_their_way = self._asked_bytes - self._bytes_before - self._bytes_counted
        return self._tokens - self._tokens_before + on_their_way * self._rate()

    def _block_bytes(self) -> int:
        missing = self._most - (self._tokens - self._tokens_before)
        return min(tokenising_pool.BLOCK_BYTES, max(SMALLEST_BLOCK, int(missing / self._rate())))

    # ---- files -----------------------------------------------------------------------------------

    def __len__(self) -> int:
        return super().__len__() - self._behind

    def _id_sizes(self) -> dict[str, int]:
        return {IDS: self._ids.tell(), ID_STARTS: self._id_starts.tell()}

    def file_sizes(self) -> dict[str, int]:
        return super().file_sizes() | self._id_sizes()

    def sync(self) -> None:
        super().sync()
        for file in (self._ids, self._id_starts):
            os.fsync(file.fileno())


class MadeIds:
    """The ids that `LimitedRows` have left in a folder, in place of an Encoder."""

    def __init__(self, folder: Path, encoder: Encoder) -> None:
        """encoder: of rows that came later, when a row was cut in two."""
        self.dtype, self._encoder = encoder.dtype, encoder
        self._starts = np.memmap(folder / ID_STARTS, np.int64, "r")
        self._ids = np.memmap(folder / IDS, encoder.dtype, "r") if self._starts[-1] else \
            np.empty(0, encoder.dtype)

    def encoded(self, tokenizer: Tokenizer, rows: StoredRows) -> Encoded:
        """As `Encoder.encoded`."""
        parts, counts = [np.empty(0, self.dtype)], [np.empty(0, np.int64)]
        for first, last in rows.spans.tolist():
            known = min(last, max(first, len(self._starts) - 1))
            starts = self._starts[first:known + 1] if first < known else np.zeros(1, np.int64)
            parts.append(self._ids[starts[0]:starts[-1]])
            counts.append(np.diff(starts))
            if known < last:
                more = self._encoder.encoded(tokenizer, StoredRows(
                    rows.files, np.array([[known, last]], dtype=np.int64)))
                parts.append(more[0])
                counts.append(more[1])
        return np.concatenate(parts), np.concatenate(counts)


def _open(path: Path, size: int) -> IO[bytes]:
    """A file that is opened for appending behind its first `size` bytes; new if that is 0."""
    file = path.open("r+b" if size else "w+b")
    file.truncate(size)
    file.seek(size)
    return file


def _append(file: IO[bytes], content: bytes | memoryview) -> None:
    file.write(content)
    file.flush()
