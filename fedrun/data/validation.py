"""Holds out train rows for validation when a dataset has no validation split."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np

from fedrun.data.documents import Documents, TextFile, find_documents, named_documents
from fedrun.data.text_options import TextOptions

ALL_OF_THE_TEXT = "all of the text"  # `validation_from` when nothing is held out
BREAKS = ("\n\n", "\n", ". ", " ")  # where to cut a text, best first
LARGEST_CUT_SHIFT = 0.5  # to reach a break, as a share of the text that is held out


@dataclass
class Rows:
    """The rows of a split."""

    rows: list[str] = field(default_factory=list)
    files: list[TextFile] = field(default_factory=list)
    """The text files whose lines the rows are, in order; empty if rows are records."""
    sources: list[str] | None = None
    """For --partition column:NAME, the value of that column in each row."""
    source_column: str = ""

    def documents(self) -> Documents:
        """The documents among the rows; with a source column, one document per source."""
        if self.sources is None:
            return find_documents(self.rows, self.files)
        starts = [n for n in range(len(self.rows))
                  if n == 0 or self.sources[n] != self.sources[n - 1]]
        return named_documents(f"all of a {self.source_column}", starts, len(self.rows),
                               [self.sources[n] for n in starts])

    def by_source(self) -> Rows:
        """The same rows grouped by source, sources in the order of their first rows."""
        sources = self.sources or []
        number: dict[str, int] = {}
        for source in sources:
            number.setdefault(source, len(number))
        order = sorted(range(len(sources)), key=lambda n: number[sources[n]])
        return Rows([self.rows[n] for n in order], [], [sources[n] for n in order],
                    self.source_column)


def has_text(rows: list[str]) -> bool:
    """Whether any row has more than white space."""
    return any(row.strip() for row in rows)


def in_words(share: Fraction) -> str:
    """The share that is held out, for a description: the last twentieth."""
    return "twentieth" if share == Fraction(1, 20) else f"{float(share):.3g}"


def divided(text: Rows, options: TextOptions) -> tuple[list[str], list[str], Documents, str]:
    """What `hold_out` holds out of a text without a validation split; where the options say that
    nothing is, all of it for both."""
    if options.hold_out:
        return hold_out(text, options.held_out, bool(options.partition))
    return text.rows, text.rows, text.documents(), ALL_OF_THE_TEXT


def hold_out(train: Rows, share: Fraction, of_sources: bool
             ) -> tuple[list[str], list[str], Documents, str]:
    """Hold out `share` of the train rows for validation.

    The last rows are held out; with `of_sources` the last rows of each source, so that every source
    keeps some text to train on. If one of the two splits would have no text, the end of the text
    is held out instead: cut between rows if that is close enough, or else at the end of a
    paragraph, a line, a sentence or a word.

    Returns:
        train rows, validation rows, the documents of the train rows, and a description of what is
        held out
    """
    documents = train.documents() if of_sources else None
    if documents is not None and documents.sources:
        kept = _rows_to_keep(documents, share)
        rows = [row for row, keep in zip(train.rows, kept, strict=True) if keep]
        held = [row for row, keep in zip(train.rows, kept, strict=True) if not keep]
        if has_text(rows) and has_text(held):
            return rows, held, _with_rows_removed(documents, kept), \
                f"the last {in_words(share)} of every source's train rows"
    n_held = -(-len(train.rows) * share.numerator // share.denominator)
    rows, held = train.rows[:len(train.rows) - n_held], train.rows[len(train.rows) - n_held:]
    description = f"the last {in_words(share)} of the train rows"
    if not (has_text(rows) and has_text(held)) and has_text(train.rows):
        rows, held = _split_text(train.rows, float(share))
        description = f"the last {in_words(share)} of the text"
    shortened = Rows(rows, train.files, train.sources, train.source_column)
    return rows, held, shortened.documents(), description


def hold_out_of_clients(clients: Sequence[Rows], share: Fraction
                        ) -> tuple[list[tuple[list[str], list[str]]], str]:
    """Hold out `share` of the clients' text for validation, the end of each one's.

    Whole rows, counted as by `held_of_each`, so that a client of few rows may hold out none; the
    end of a client's only row. Where no client has rows enough, the end of each one's text.

    Args:
        clients: each with some text.
    Returns:
        train and validation rows of each client, and a description of what is held out
    """
    with_text = [[n for n, row in enumerate(each.rows) if row.strip()] for each in clients]
    several = [len(numbers) for numbers in with_text if len(numbers) > 1]
    held = iter(held_of_each(several, share))
    counts = [next(held) if len(numbers) > 1 else None for numbers in with_text]
    if not any(counts):
        counts = [None] * len(clients)
    parts = []
    for each, numbers, count in zip(clients, with_text, counts, strict=True):
        at = numbers[-count] if count else len(each.rows)
        parts.append(_split_text(each.rows, float(share)) if count is None else
                     (each.rows[:at], each.rows[at:]))
    return parts, of_clients_in_words(share, "text", all(count != 0 for count in counts))


def of_clients_in_words(share: Fraction, what: str, every: bool) -> str:
    """The description of a share that is held out of clients. every: of every one of them."""
    return f"the last {in_words(share)} of " + (
        f"every client's {what}" if every else f"the clients' {what} (none of very small clients)")


def _rows_to_keep(documents: Documents, share: Fraction) -> np.ndarray:
    """Whether each row stays in the train split; bool, (n_rows,)."""
    kept = np.ones(documents.starts[-1], dtype=bool)
    order = np.argsort(documents.source, kind="stable")
    of_sources = [np.concatenate([np.arange(documents.starts[d], documents.starts[d + 1])
                                  for d in of_source]) for of_source in np.split(
                  order, np.flatnonzero(np.diff(documents.source[order])) + 1)]
    held = held_of_each([len(rows) for rows in of_sources], share)
    for rows, n_held in zip(of_sources, held, strict=True):
        kept[rows[len(rows) - n_held:]] = False
    return kept


def held_of_each(sizes: Sequence[int], share: Fraction) -> list[int]:
    """How many rows of each source to hold out, so that every source keeps at least one.

    Fractions of a row are carried over to the next source, so that small sources hold out no row or
    one and all together hold out their share.
    """
    held, carry = [], Fraction(0)
    for size in sizes:
        carry += size * share
        held.append(max(0, min(int(carry), size - 1)))
        carry = min(carry - held[-1], Fraction(1))
    return held


def _with_rows_removed(documents: Documents, kept: np.ndarray) -> Documents:
    """The documents of the rows that are kept, without those that have no such row."""
    before = np.concatenate([[0], np.cumsum(kept)])
    starts = before[documents.starts]
    has_rows = np.diff(starts) > 0
    return Documents(documents.kind, np.array([*starts[:-1][has_rows], starts[-1]], dtype=np.int64),
                     documents.source[has_rows], documents.sources)


def _split_text(rows: list[str], share: float) -> tuple[list[str], list[str]]:
    """Cut the text so that about `share` of its characters are in the second part."""
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
