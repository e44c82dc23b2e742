"""How files become rows, in this process or, if they are large, in several (reading_pool.py)."""

from __future__ import annotations

import functools
import itertools
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from fedrun.data.documents import TextFile
from fedrun.data.stored_rows import RowFiles
from fedrun.data.table_files import Table, file_values, table_rows
from fedrun.data.text_files import DataFile, open_text
from fedrun.data.validation import Rows


@dataclass(frozen=True)
class Reading:
    """What the rows of files are."""

    encoding: str | None
    """Of those without a byte-order mark; None: UTF-8."""
    columns: tuple[str, ...] = ()
    """With the text, in tables; empty: the rows are the lines of texts."""
    source_column: str | None = None
    stripped: bool = False
    """Whether line ends are left out, as `datasets` does in a folder."""

    def read(self, shards: Iterable[DataFile], files: RowFiles) -> Rows:
        """Read shards, one after the other, into files.

        Raises:
            InputError: a shard cannot be read.
        """
        if self.columns:
            return read_records(map(self._table, shards), self.columns, self.source_column, files)
        first, read = len(files), list[TextFile]()
        for shard in shards:  # those behind the limit are named too, for the folder of all
            lines = len(files.extend(self._lines(shard))) if files.wants_more else 0
            read.append(text_file(shard, lines))
        return Rows(files.since(first), read)

    def look(self, shard: DataFile) -> None:
        """Read a shard and keep nothing, for its errors."""
        for _ in table_rows(self._table(shard), self.columns, self.source_column) \
                if self.columns else self._lines(shard):
            pass

    def _table(self, shard: DataFile) -> Table:
        return Table(str(shard), {}, functools.partial(file_values, shard, self.encoding))

    def _lines(self, shard: DataFile) -> Iterator[str]:
        """Not str.splitlines, which also splits at form feeds and other characters."""
        with open_text(shard, self.encoding) as stream:
            yield from (line.rstrip("\n") for line in stream) if self.stripped else stream


def text_file(shard: DataFile, lines: int) -> TextFile:
    """A text whose lines are rows."""
    return TextFile((shard.path / (shard.member or "")).absolute(), lines)


def read_records(tables: Iterable[Table], columns: Sequence[str], source_column: str | None,
                 files: RowFiles) -> Rows:
    """The text of every record and, with a source column, its source."""
    first, source, numbers = len(files), array("i"), dict[str, int]()
    for text, name in itertools.chain.from_iterable(
            table_rows(table, columns, source_column) for table in tables):
        files.append(text)
        if source_column:
            source.append(numbers.setdefault(name, len(numbers)))
        if not files.wants_more:
            break
    return Rows(files.since(first), [], np.array(source) if source_column else None,
                list(numbers), source_column or "")
