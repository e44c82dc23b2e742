"""Which of the train rows are validated on, where a dataset has no validation split."""

from __future__ import annotations

from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np

from fedrun.data.documents import Documents, TextFile, find_documents, named_documents

BREAKS = ("\n\n", "\n", ". ", " ")  # where a text is best cut, best first
LARGEST_CUT_SHIFT = 0.5  # of what is held out: how far from its place a cut may be for the sake of a break


@dataclass
class Rows:
    """The rows of a split."""

    rows: list[str] = field(default_factory=list)
    files: list[TextFile] = field(default_factory=list)
    """Those whose lines the rows are, in order; empty where rows are records."""
    sources: list[str] | None = None
    """Of each row the value of the column that tells its source, where one is asked for."""
    source_column: str = ""

    def documents(self) -> Documents:
        """The documents among the rows; with a source column all rows of a source are one."""
        if self.sources is None:
            return find_documents(self.rows, self.files)
        starts = [n for n in range(len(self.rows))
                  if n == 0 or self.sources[n] != self.sources[n - 1]]
        return named_documents(f"all of a {self.source_column}", starts, len(self.rows),
                               [self.sources[n] for n in starts])

    def by_source(self) -> Rows:
        """The same rows, those of a source together, sources in the order of their first rows."""
        sources = self.sources or []
        number: dict[str, int] = {}
        for source in sources:
            number.setdefault(source, len(number))
        order = sorted(range(len(sources)), key=lambda n: number[sources[n]])
        return Rows([self.rows[n] for n in order], [], [sources[n] for n in order],
                    self.source_column)


def has_text(rows: list[str]) -> bool:
    """Whether there is anything but white space."""
    return any(row.strip() for row in rows)


def hold_out(train: Rows, share: Fraction, of_sources: bool
             ) -> tuple[list[str], list[str], Documents, str]:
    """Train rows, validation rows, the documents of the train rows, and in words what is held out.

    The last rows of all, or with `of_sources` of each source, so that no client loses its text.
    Where that leaves one side without text, as much of the text's end, cut at a row's end where
    that is near enough, else at a paragraph's, a line's or a word's.
    """
    told = "twentieth" if share == Fraction(1, 20) else f"{float(share):.3g}"
    documents = train.documents() if of_sources else None
    if documents is not None and documents.sources:
        kept = _rows_to_keep(documents, share)
        rows = [row for row, keep in zip(train.rows, kept, strict=True) if keep]
        held = [row for row, keep in zip(train.rows, kept, strict=True) if not keep]
        if has_text(rows) and has_text(held):
            return rows, held, _with_rows_removed(documents, kept), \
                f"the last {told} of every source's train rows"
    n_held = -(-len(train.rows) * share.numerator // share.denominator)
    rows, held = train.rows[:len(train.rows) - n_held], train.rows[len(train.rows) - n_held:]
    words = f"the last {told} of the train rows"
    if not (has_text(rows) and has_text(held)) and has_text(train.rows):
        rows, held = _split_text(train.rows, float(share))
        words = f"the last {told} of the text"
    shorter = Rows(rows, train.files, train.sources, train.source_column)
    return rows, held, shorter.documents(), words


def _rows_to_keep(documents: Documents, share: Fraction) -> np.ndarray:
    """Whether each row stays in the train split; bool, (n_rows,).

    A source of few rows holds out none or one, so that all together hold out their share.
    """
    kept = np.ones(documents.starts[-1], dtype=bool)
    owed = Fraction(0)
    order = np.argsort(documents.source, kind="stable")
    for of_source in np.split(order, np.flatnonzero(np.diff(documents.source[order])) + 1):
        rows = np.concatenate([np.arange(documents.starts[d], documents.starts[d + 1])
                               for d in of_source])
        owed += len(rows) * share
        n_held = min(int(owed), len(rows) - 1)
        owed = min(owed - n_held, Fraction(1))
        kept[rows[len(rows) - n_held:]] = False
    return kept


def _with_rows_removed(documents: Documents, kept: np.ndarray) -> Documents:
    """Documents of the rows that are kept; those without any are left out."""
    before = np.concatenate([[0], np.cumsum(kept)])
    starts = before[documents.starts]
    there = np.diff(starts) > 0
    return Documents(documents.kind, np.array([*starts[:-1][there], starts[-1]], dtype=np.int64),
                     documents.source[there], documents.sources)


def _split_text(rows: list[str], share: float) -> tuple[list[str], list[str]]:
    """Rows before and after a cut that leaves about `share` of the characters behind it."""
    sizes = [len(row.strip()) for row in rows]
    total = sum(sizes)
    behind, number = 0, len(rows)
    while behind < share * total:
        number -= 1
        behind += sizes[number]
    if behind <= (1 + LARGEST_CUT_SHIFT) * share * total and has_text(rows[:number]):
        return rows[:number], rows[number:]
    row = rows[number]
    at = len(row.rstrip()) - max(1, round(share * total) - (behind - sizes[number]))
    reach = round(LARGEST_CUT_SHIFT * share * total)
    for mark in BREAKS:
        nearest = [cut for cut in (row.rfind(mark, max(0, at - reach), at) + len(mark),
                                   row.find(mark, at, at + reach) + len(mark))
                   if cut >= len(mark) and row[:cut].strip() and row[cut:].strip()]
        if nearest:
            at = min(nearest, key=lambda cut: abs(cut - at))
            break
    return [*rows[:number], row[:at]], [row[at:], *rows[number + 1:]]
