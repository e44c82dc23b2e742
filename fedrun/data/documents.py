"""Documents: the pieces of a text that belong together, and the source that each comes from.

    corpus                document                              source
    pydocs                a module, or a topic of the manual    the top-level module or package;
                                                                all topics are one
    WikiText              an article, from one top heading      the article
                          (` = Title = `) to the next
    several text files    a file                                its first folder below the one
                                                                that contains all files
    one text file         a paragraph: lines between blank      none
                          ones
    any other dataset     a row                                 none
    --partition column:X  all rows with one value of X          the value

Documents follow each other without gaps. A sequence of tokens belongs to the document that most of
its tokens come from, so that a short document may own no sequence.

Of documents without a source, rows and paragraphs, a text of any size has at most MOST_DOCUMENTS:
beyond that 2 neighbours count as one document, or 4, or 8 and so on.
"""

from __future__ import annotations

import os
import re
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fedrun.data.stored_rows import StoredRows

MOST_DOCUMENTS = 2**24  # 128 MB of their beginnings
TOKENS_AT_ONCE = 2**22
SPACE_BEGINS = np.isin(np.arange(256), [*range(0x21), 0xC2, 0xE1, 0xE2, 0xE3])
"""Bytes with which the UTF-8 of a character that is white space may begin."""
TOP_HEADING = re.compile(r"= (?!= ).*(?<! =) =")  # of a stripped row; ` = = Section = = ` is lower


@dataclass(frozen=True)
class Documents:
    """The documents in a stream of rows or of tokens."""

    kind: str
    """What a document is here: 'an article'."""
    starts: np.ndarray
    """int64, (n + 1,): the position where each begins, ascending from 0, and the stream's end."""
    source: np.ndarray
    """int64, (n,): index of each document's source in `sources`; (0,) without sources."""
    sources: list[str]

    def __len__(self) -> int:
        return len(self.starts) - 1

    def save(self, path: Path) -> None:
        np.savez(path, kind=self.kind, starts=self.starts, source=self.source,
                 sources=np.array(self.sources, dtype=np.str_))

    @classmethod
    def load(cls, path: Path) -> Documents:
        with np.load(path) as held:
            return cls(str(held["kind"]), held["starts"], held["source"], held["sources"].tolist())

    def of_sequences(self, n_sequences: int, sequence_length: int) -> np.ndarray:
        """The document that most tokens of each sequence come from (of several, the first).

        Returns:
            int64, (n_sequences,)
        """
        assert n_sequences * sequence_length <= self.starts[-1]
        at_once = max(1, TOKENS_AT_ONCE // sequence_length)
        found = np.empty(n_sequences, dtype=np.int64)
        for first in range(0, n_sequences, at_once):
            last = min(first + at_once, n_sequences)
            found[first:last] = self._of_some(first, last, sequence_length)
        return found

    def _of_some(self, first: int, last: int, sequence_length: int) -> np.ndarray:
        """`of_sequences` for numbers first to last - 1."""
        cuts = np.arange(first, last + 1) * sequence_length
        low, high = np.searchsorted(self.starts, (cuts[0], cuts[-1]))
        # The pieces between all beginnings, of documents and of sequences.
        begins = np.union1d(self.starts[low:high], cuts[:-1])
        lengths = np.diff(begins, append=cuts[-1])
        sequence = begins // sequence_length
        document = np.searchsorted(self.starts, begins, side="right") - 1
        longest_first = np.lexsort((document, -lengths, sequence))
        at = np.searchsorted(sequence[longest_first], np.arange(first, last))
        found: np.ndarray = document[longest_first][at]
        return found


class TextFile(NamedTuple):
    """A text file whose lines are rows."""

    path: Path
    lines: int


def find_documents(rows: StoredRows, files: Sequence[TextFile]) -> Documents:
    """Find the documents in `rows`, by the first rule that applies (see the top of this file).

    files: those whose lines the rows are, in order; empty if rows are not lines of files. They may
        have more lines than there are rows; the excess is ignored.
    """
    n_rows = len(rows)
    starts, titles = _top_headings(rows)
    if titles:
        # Each article is a source of its own: several may have the same title, `<unk>`.
        starts[0] = 0
        return Documents("an article", np.append(starts, n_rows), np.arange(len(titles)), titles)
    firsts = np.cumsum([0, *(file.lines for file in files)])
    owned = [(file, first) for file, first in zip(files, firsts[:-1].tolist(), strict=True)
             if file.lines and first < n_rows]
    if len(owned) > 1:
        return named_documents("a file", [first for _, first in owned], n_rows,
                               _folders([file.path for file, _ in owned],
                                        os.path.commonpath([file.path.parent for file in files])))
    if files:
        return named_documents("a paragraph", _paragraphs(rows), n_rows, [])
    step = 1
    while n_rows > step * MOST_DOCUMENTS:
        step *= 2
    return named_documents("a row", np.arange(0, n_rows, step), n_rows, [])


def named_documents(kind: str, starts: Iterable[int] | np.ndarray, end: int,
                    source_names: Sequence[str]) -> Documents:
    """Documents from their first rows and the names of their sources, if they have any."""
    numbers: dict[str, int] = {}
    source = [numbers.setdefault(name, len(numbers)) for name in source_names]
    begins = starts if isinstance(starts, np.ndarray) else np.fromiter(starts, np.int64)
    return Documents(kind, np.append(begins, end).astype(np.int64, copy=False),
                     np.array(source, dtype=np.int64), list(numbers))


def _paragraphs(rows: StoredRows) -> np.ndarray:
    """The first row, and those with text behind one without; at most MOST_DOCUMENTS of them."""
    kept, held, step, number, first, after_blank = [np.zeros(1, np.int64)], 1, 1, 0, 0, False
    for content, cuts in rows.contents():
        blank = _blank(content, cuts)
        begins = np.flatnonzero(~blank & np.append(after_blank, blank[:-1]))
        numbers = np.arange(number + 1, number + 1 + len(begins))
        kept.append(first + begins[numbers % step == 0])
        held += len(kept[-1])
        while held > MOST_DOCUMENTS:
            kept, step = [np.concatenate(kept)[::2]], 2 * step
            held = len(kept[0])
        number, first, after_blank = number + len(begins), first + len(blank), bool(blank[-1])
    return np.concatenate(kept)


def _blank(content: bytes, cuts: np.ndarray) -> np.ndarray:
    """Which rows are white space alone; bool, (n,). Arguments as from `RowFiles.contents`."""
    sizes = np.diff(cuts)
    blank: np.ndarray = sizes == 0
    filled = np.flatnonzero(sizes)
    heads = np.frombuffer(content, np.uint8)[cuts[filled]]
    for row in filled[SPACE_BEGINS[heads]].tolist():
        blank[row] = not content[cuts[row]:cuts[row + 1]].decode().strip()
    return blank


def _top_headings(rows: Iterable[str]) -> tuple[np.ndarray, list[str]]:
    """The rows that are top headings of WikiText, int64, and their titles; none if the text does
    not begin with one."""
    found, titles, begins = array("q"), list[str](), -1
    heading, before, n = "", True, -1  # the last row if it may be a heading, and if it is blank
    for n, row in enumerate(rows):
        blank = not row.strip()
        # A formula on a line of its own may look like a heading, but has no blank rows around it.
        if heading and blank:
            found.append(n - 1)
            titles.append(heading.strip(" =\n"))
        heading = row if before and row.startswith((" = ", "= ")) and TOP_HEADING.fullmatch(
            row.strip()) else ""
        if begins < 0 and not blank:
            begins = n
            if not heading:
                break
        before = blank
    if heading:  # nothing follows
        found.append(n)
        titles.append(heading.strip(" =\n"))
    if not found or found[0] != begins:
        return np.empty(0, dtype=np.int64), []
    return np.array(found, dtype=np.int64), titles


def _folders(files: Sequence[Path], common: str) -> list[str]:
    """Each file's first folder below the common one ('.' if it has none); [] if all have '.'."""
    below = [file.parent.relative_to(common).parts for file in files]
    return [parts[0] if parts else "." for parts in below] if any(below) else []
