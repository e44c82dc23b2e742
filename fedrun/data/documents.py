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
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

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

    def in_tokens(self, row_tokens: np.ndarray) -> Documents:
        """The same documents in tokens instead of rows. row_tokens: tokens in each row."""
        assert self.starts[-1] == len(row_tokens)
        before = np.concatenate([[0], np.cumsum(row_tokens)])
        return Documents(self.kind, before[self.starts], self.source, self.sources)

    def of_sequences(self, n_sequences: int, sequence_length: int) -> np.ndarray:
        """The document that most tokens of each sequence come from (of several, the first).

        Returns:
            int64, (n_sequences,)
        """
        cuts = np.arange(n_sequences + 1) * sequence_length
        assert cuts[-1] <= self.starts[-1]
        # The pieces between all beginnings, of documents and of sequences.
        begins = np.union1d(self.starts[self.starts < cuts[-1]], cuts[:-1])
        lengths = np.diff(begins, append=cuts[-1])
        sequence = begins // sequence_length
        document = np.searchsorted(self.starts, begins, side="right") - 1
        longest_first = np.lexsort((document, -lengths, sequence))
        first = np.searchsorted(sequence[longest_first], np.arange(n_sequences))
        found: np.ndarray = document[longest_first][first]
        return found


class TextFile(NamedTuple):
    """A text file whose lines are rows."""

    path: Path
    lines: int


def find_documents(rows: Sequence[str], files: Sequence[TextFile]) -> Documents:
    """Find the documents in `rows`, by the first rule that applies (see the top of this file).

    files: those whose lines the rows are, in order; empty if rows are not lines of files. They may
        have more lines than there are rows; the excess is ignored.
    """
    if headings := _top_headings(rows):
        titles = [rows[n].strip(" =\n") for n in headings]
        # Each article is a source of its own: several may have the same title, `<unk>`.
        return Documents("an article", np.array([0, *headings[1:], len(rows)], dtype=np.int64),
                         np.arange(len(headings)), titles)
    firsts = np.cumsum([0, *(file.lines for file in files)])
    owned = [(file, first) for file, first in zip(files, firsts[:-1].tolist(), strict=True)
             if file.lines and first < len(rows)]
    if len(owned) > 1:
        return named_documents("a file", [first for _, first in owned], len(rows),
                               _folders([file.path for file, _ in owned]))
    if files:
        blank = [not row.strip() for row in rows]
        starts = [n for n in range(1, len(rows)) if blank[n - 1] and not blank[n]]
        return named_documents("a paragraph", [0, *starts], len(rows), [])
    return named_documents("a row", range(len(rows)), len(rows), [])


def named_documents(kind: str, starts: Iterable[int], end: int, source_names: Sequence[str]
                    ) -> Documents:
    """Documents from their first rows and the names of their sources, if they have any."""
    numbers: dict[str, int] = {}
    source = [numbers.setdefault(name, len(numbers)) for name in source_names]
    return Documents(kind, np.array([*starts, end], dtype=np.int64),
                     np.array(source, dtype=np.int64), list(numbers))


def _top_headings(rows: Sequence[str]) -> list[int]:
    """The rows that are top headings of WikiText; empty if the text does not begin with one."""
    def blank(n: int) -> bool:
        return not 0 <= n < len(rows) or not rows[n].strip()

    first = next((n for n in range(len(rows)) if not blank(n)), 0)
    # A formula on a line of its own may look like a heading, but has no blank rows around it.
    found = [n for n, row in enumerate(rows) if row.startswith((" = ", "= "))
             and TOP_HEADING.fullmatch(row.strip()) and blank(n - 1) and blank(n + 1)]
    return found if found and found[0] == first else []


def _folders(files: Sequence[Path]) -> list[str]:
    """Each file's first folder below the common one ('.' if it has none); [] if all have '.'."""
    common = os.path.commonpath([file.parent for file in files])
    below = [file.parent.relative_to(common).parts for file in files]
    return [parts[0] if parts else "." for parts in below] if any(below) else []
