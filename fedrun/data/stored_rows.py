"""Rows of text on disk, so that a corpus of any size takes little memory.

    rows.text   the rows, one after the other, in UTF-8
    rows.starts where each row begins in rows.text, and its end: int64, (n_rows + 1,)

Rows are only ever appended. What is then done with them, taking a part for each split or putting
those of a source together, changes no file: `StoredRows` are a list of ranges of rows.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import overload

import numpy as np

from fedrun.common.log import log

WRITE_BYTES = 1 << 20  # of text that is collected before it is written
READ_BYTES = 1 << 20
READ_ROWS = 1 << 14
LINE_SECONDS = 20.0  # between lines about the progress; the first comes after half of it
FILES = ("rows.text", "rows.starts")


class RowFiles:
    """Both files of a folder, open for reading and, unless they are whole, for appending.

    Any method raises OSError, without a file's name, if the disk is full.
    """

    wants_more = True
    """Whether who reads a split shall append more of its rows; see limited_rows.py."""

    def __init__(self, folder: Path, whole: bool = False, kept: int = 0) -> None:
        """whole: whether to open files that are there, instead of new ones. kept: how many rows of
        files that are there to keep, and append behind them."""
        self.folder = folder
        flags = os.O_RDONLY if whole else os.O_RDWR if kept else \
            os.O_RDWR | os.O_CREAT | os.O_TRUNC
        self._text, self._starts = (os.open(folder / name, flags | os.O_CLOEXEC, 0o666)
                                    for name in FILES)
        self._written, self._bytes, self._pending = 0, 0, list[bytes]()
        self._pending_bytes = 0
        if whole:
            self._written = os.fstat(self._starts).st_size // 8 - 1
            self._bytes = os.fstat(self._text).st_size
        elif kept:
            self.truncate(kept)
        else:
            _write(self._starts, bytes(8))
        self._began = time.monotonic()
        self._next_line = self._began + LINE_SECONDS / 2

    def __del__(self) -> None:
        for handle in (getattr(self, "_text", -1), getattr(self, "_starts", -1)):
            if handle >= 0:
                os.close(handle)

    def __len__(self) -> int:
        return self._written + len(self._pending)

    @property
    def size(self) -> int:
        """Bytes of text."""
        return self._bytes + self._pending_bytes

    def append(self, row: str) -> None:
        content = row.encode()
        self._pending.append(content)
        self._pending_bytes += len(content)
        if self._pending_bytes >= WRITE_BYTES or len(self._pending) >= READ_ROWS:
            self.flush()

    def extend(self, rows: Iterable[str]) -> StoredRows:
        """Append rows; returns them."""
        first = len(self)
        for row in rows:
            self.append(row)
            if not self.wants_more:
                break
        return self.since(first)

    def append_files(self, others: RowFiles) -> None:
        """Append all rows of other files, which are whole."""
        self.flush()
        for at in range(0, others._bytes, READ_BYTES):
            _write(self._text, _read(others._text, min(READ_BYTES, others._bytes - at), at))
        for first in range(0, others._written, READ_BYTES):
            ends = others.starts(first, min(others._written, first + READ_BYTES))[1:]
            _write(self._starts, (self._bytes + ends).tobytes())
        self._written, self._bytes = self._written + others._written, self._bytes + others._bytes
        self._report()

    def since(self, first: int) -> StoredRows:
        """The rows from number `first` on."""
        return StoredRows(self, np.array([[first, len(self)]], dtype=np.int64))

    def truncate(self, n_rows: int) -> None:
        """Keep the first rows alone."""
        self.flush()
        self._bytes = int(self.starts(n_rows, n_rows)[0])
        self._written = n_rows
        for handle, size in ((self._text, self._bytes), (self._starts, 8 * n_rows + 8)):
            os.ftruncate(handle, size)
            os.lseek(handle, size, os.SEEK_SET)

    def file_sizes(self) -> dict[str, int]:
        """Bytes of each file, by its name, when all rows are written."""
        return dict(zip(FILES, (self.size, 8 * len(self) + 8), strict=True))

    def sync(self) -> None:
        """Wait until all rows are on the disk."""
        self.flush()
        for handle in (self._text, self._starts):
            os.fsync(handle)

    def starts(self, first: int, last: int) -> np.ndarray:
        """Where rows first to last - 1 begin in the text, and the end; int64, (n + 1,)."""
        self.flush()
        content = os.pread(self._starts, 8 * (last + 1 - first), 8 * first)
        return np.frombuffer(content, dtype=np.int64)

    def rows(self, first: int, last: int) -> Iterator[str]:
        """Rows first to last - 1."""
        for content, cuts in self.contents(first, last):
            for begin, end in itertools.pairwise(cuts.tolist()):
                yield content[begin:end].decode()

    def contents(self, first: int, last: int) -> Iterator[tuple[bytes, np.ndarray]]:
        """The UTF-8 of rows first to last - 1, about READ_BYTES at a time, and where each row
        begins there, and the end."""
        while first < last:
            starts = self.starts(first, min(last, first + READ_ROWS))
            fit = int(np.searchsorted(starts, starts[0] + READ_BYTES, side="right")) - 1
            starts = starts[:max(fit, 1) + 1]
            yield _read(self._text, int(starts[-1] - starts[0]), int(starts[0])), \
                starts - starts[0]
            first += len(starts) - 1

    def flush(self) -> None:
        """Write all rows to the files, for other processes to read."""
        if not self._pending:
            return
        sizes = np.fromiter(map(len, self._pending), np.int64, len(self._pending))
        _write(self._text, b"".join(self._pending))
        _write(self._starts, (self._bytes + np.cumsum(sizes)).tobytes())
        self._written, self._bytes = len(self), self.size
        self._pending, self._pending_bytes = [], 0
        self._report()

    def _report(self) -> None:
        if (now := time.monotonic()) >= self._next_line:
            self._next_line = now + LINE_SECONDS
            log(f"read {self._bytes / 1e6:,.0f} MB of text, "
                f"{self._bytes / 1e6 / (now - self._began):,.0f} MB/s")


class StoredRows(Sequence[str]):
    """Some of the rows in files, in an order of their own. Iterating reads a megabyte at a time."""

    def __init__(self, files: RowFiles, spans: np.ndarray) -> None:
        """spans: first row and end of each range of rows, int64, (n, 2)."""
        self.files = files
        self.spans = spans[spans[:, 0] < spans[:, 1]]
        self._before = np.append(0, np.cumsum(self.spans[:, 1] - self.spans[:, 0]))

    def __len__(self) -> int:
        return int(self._before[-1])

    @property
    def about_bytes(self) -> int:
        """Bytes of their text, were all rows of the files equally long."""
        return self.files.size * len(self) // max(1, len(self.files))

    def __iter__(self) -> Iterator[str]:
        for first, last in self._ranges():
            yield from self.files.rows(first, last)

    def contents(self) -> Iterator[tuple[bytes, np.ndarray]]:
        """Their UTF-8; see `RowFiles.contents`."""
        for first, last in self._ranges():
            yield from self.files.contents(first, last)

    @overload
    def __getitem__(self, at: int) -> str: ...
    @overload
    def __getitem__(self, at: slice) -> StoredRows: ...
    def __getitem__(self, at: int | slice) -> str | StoredRows:
        if isinstance(at, slice):
            start, stop, step = at.indices(len(self))
            assert step == 1
            return self.taken(np.array([[start, stop]], dtype=np.int64))
        number = range(len(self))[at]
        span = int(np.searchsorted(self._before, number, side="right")) - 1
        first = int(self.spans[span, 0] + number - self._before[span])
        return next(self.files.rows(first, first + 1))

    def taken(self, spans: np.ndarray) -> StoredRows:
        """Ranges of these rows, one after the other; spans as above, of positions here."""
        if len(self.spans) == 1:
            return StoredRows(self.files, spans + self.spans[0, 0])
        parts = [np.empty((0, 2), dtype=np.int64)]
        for start, stop in spans.tolist():
            if start >= stop:
                continue
            low = int(np.searchsorted(self._before, start, side="right")) - 1
            high = int(np.searchsorted(self._before, stop, side="left"))
            part = self.spans[low:high].copy()
            part[0, 0] += start - self._before[low]
            part[-1, 1] -= self._before[high] - stop
            parts.append(part)
        return StoredRows(self.files, np.concatenate(parts))

    def blocks(self, size: int) -> Iterator[np.ndarray]:
        """The rows in blocks of whole rows, of at least `size` bytes of text but for the last one:
        the spans of each."""
        block, held = list[list[int]](), 0
        for first, last in self._ranges():
            while first < last:
                starts = self.files.starts(first, min(last, first + READ_ROWS))
                enough = int(np.searchsorted(starts, starts[0] + size - held))
                end = first + max(1, min(enough, len(starts) - 1))
                block.append([first, end])
                held += int(starts[end - first] - starts[0])
                first = end
                if held >= size:
                    yield np.array(block, dtype=np.int64)
                    block, held = [], 0
        if block:
            yield np.array(block, dtype=np.int64)

    def _ranges(self) -> Iterator[tuple[int, int]]:
        for n in range(0, len(self.spans), READ_ROWS):
            yield from self.spans[n:n + READ_ROWS].tolist()


def joined(parts: Sequence[StoredRows]) -> StoredRows:
    """The rows of several parts, which lie in the same files, one after the other."""
    assert all(part.files is parts[0].files for part in parts)
    return StoredRows(parts[0].files, np.concatenate([part.spans for part in parts]))


def _write(handle: int, content: bytes) -> None:
    view = memoryview(content)
    while len(view):
        view = view[os.write(handle, view):]


def _read(handle: int, size: int, at: int) -> bytes:
    """`size` bytes; the system reads at most 2 GB at a time."""
    content = os.pread(handle, size, at)
    while len(content) < size:
        more = os.pread(handle, size - len(content), at + len(content))
        if not more:
            raise EOFError(f"the text of a row ends {size - len(content)} bytes too early")
        content += more
    return content
