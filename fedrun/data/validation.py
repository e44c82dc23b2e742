"""Holds out train rows for validation when a dataset has no validation split."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np

from fedrun.data.documents import Documents, TextFile, find_documents, named_documents
from fedrun.data.stored_rows import StoredRows, joined
from fedrun.data.text_options import TextOptions

ALL_OF_THE_TEXT = "all of the text"  # `validation_from` when nothing is held out
BREAKS = ("\n\n", "\n", ". ", " ")  # where to cut a text, best first
LARGEST_CUT_SHIFT = 0.5  # to reach a break, as a share of the text that is held out


@dataclass
class Rows:
    """The rows of a split."""

    rows: StoredRows
    files: list[TextFile] = field(default_factory=list)
    """The text files whose lines the rows are, in order; empty if rows are records."""
    source: np.ndarray | None = None
    """For --partition column:NAME, the number in `sources` of each row's value in that column,
    int32, (n_rows,): numbers in the order in which the values first occur."""
    sources: list[str] = field(default_factory=list)
    source_column: str = ""

    def documents(self) -> Documents:
        """The documents among the rows; with a source column, one document per source."""
        if self.source is None:
            return find_documents(self.rows, self.files)
        source = self.source[:len(self.rows)]
        starts = np.flatnonzero(np.append(True, source[1:] != source[:-1])) if len(source) else \
            np.empty(0, dtype=np.int64)
        return named_documents(f"all of a {self.source_column}", starts, len(self.rows),
                               [self.sources[n] for n in source[starts].tolist()])

    def by_source(self) -> Rows:
        """The same rows grouped by source, sources in the order of their first rows."""
        if self.source is None or not len(self.source):
            return self
        order = np.argsort(self.source, kind="stable")
        breaks = np.flatnonzero(np.diff(order) != 1) + 1
        begins, ends = np.append(0, breaks), np.append(breaks, len(order))
        spans = np.stack([order[begins], order[ends - 1] + 1], axis=1)
        return Rows(self.rows.taken(spans), [], self.source[order], self.sources,
                    self.source_column)


def has_text(rows: Iterable[str]) -> bool:
    """Whether any row has more than white space."""
    return any(row.strip() for row in rows)


def in_words(share: Fraction) -> str:
    """The share that is held out, for a description: the last twentieth."""
    return "twentieth" if share == Fraction(1, 20) else f"{float(share):.3g}"


def divided(text: Rows, options: TextOptions
            ) -> tuple[StoredRows, StoredRows, Documents, str]:
    """What `hold_out` holds out of a text without a validation split; where the options say that
    nothing is, all of it for both."""
    if options.hold_out:
        return hold_out(text, options.held_out, bool(options.partition))
    return text.rows, text.rows, text.documents(), ALL_OF_THE_TEXT


def hold_out(train: Rows, share: Fraction, of_sources: bool
             ) -> tuple[StoredRows, StoredRows, Documents, str]:
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
        begins, ends = documents.starts[:-1], documents.starts[1:]
        rows = train.rows.taken(np.stack([begins, begins + kept], axis=1))
        held = train.rows.taken(np.stack([begins + kept, ends], axis=1))
        if has_text(rows) and has_text(held):
            return rows, held, _with_rows_removed(documents, kept), \
                f"the last {in_words(share)} of every source's train rows"
    n_held = -(-len(train.rows) * share.numerator // share.denominator)
    rows, held = train.rows[:len(train.rows) - n_held], train.rows[len(train.rows) - n_held:]
    description = f"the last {in_words(share)} of the train rows"
    if not (has_text(rows) and has_text(held)) and has_text(train.rows):
        rows, held = _split_text(train.rows, float(share))
        description = f"the last {in_words(share)} of the text"
    shortened = Rows(rows, train.files, train.source, train.sources, train.source_column)
    return rows, held, shortened.documents(), description


def hold_out_of_clients(clients: Sequence[Rows], share: Fraction
                        ) -> tuple[list[tuple[StoredRows, StoredRows]], str]:
    """Hold out `share` of the clients' text for validation, the end of each one's.

    Whole rows, counted as by `held_of_each`, so that a client of few rows may hold out none; the
    end of a client's only row. Where no client has rows enough, the end of each one's text.

    Args:
        clients: each with some text.
    Returns:
        train and validation rows of each client, and a description of what is held out
    """
    with_text = [np.flatnonzero(np.fromiter((bool(row.strip()) for row in each.rows), bool))
                 for each in clients]
    several = [len(numbers) for numbers in with_text if len(numbers) > 1]
    held = iter(held_of_each(several, share))
    counts = [next(held) if len(numbers) > 1 else None for numbers in with_text]
    if not any(counts):
        counts = [None] * len(clients)
    parts = []
    for each, numbers, count in zip(clients, with_text, counts, strict=True):
        at = int(numbers[-count]) if count else len(each.rows)
        parts.append(_split_text(each.rows, float(share)) if count is None else
                     (each.rows[:at], each.rows[at:]))
    return parts, of_clients_in_words(share, "text", all(count != 0 for count in counts))


def of_clients_in_words(share: Fraction, what: str, every: bool) -> str:
    """The description of a share that is held out of clients. every: of every one of them."""
    return f"the last {in_words(share)} of " + (
        f"every client's {what}" if every else f"the clients' {what} (none of very small clients)")


def _rows_to_keep(documents: Documents, share: Fraction) -> np.ndarray:
    """How many of each document's rows, its first ones, stay in the train split; int64,
    (n_documents,)."""
    order = np.argsort(documents.source, kind="stable")  # by source, and then as they follow
    sizes = np.diff(documents.starts)[order]
    firsts = np.append(0, np.flatnonzero(np.diff(documents.source[order])) + 1)
    of_sources = np.add.reduceat(sizes, firsts)
    held = np.array(held_of_each(of_sources.tolist(), share))
    source = np.repeat(np.arange(len(firsts)), np.diff(np.append(firsts, len(order))))
    # Of a source's rows, those before the held ones less those before the document.
    room = (np.cumsum(of_sources) - held)[source] - (np.cumsum(sizes) - sizes)
    kept = np.empty_like(sizes)
    kept[order] = np.clip(room, 0, sizes)
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
    """The documents of the rows that are kept, without those that have no such row. kept: how many
    of each document's."""
    ends = np.cumsum(kept)
    has_rows = kept > 0
    return Documents(documents.kind, np.append((ends - kept)[has_rows], ends[-1:]),
                     documents.source[has_rows], documents.sources)


def _split_text(rows: StoredRows, share: float) -> tuple[StoredRows, StoredRows]:
    """Cut the text so that about `share` of its characters are in the second part."""
    sizes = np.fromiter((len(row.strip()) for row in rows), np.int64, len(rows))
    total = int(sizes.sum())
    behind, number = 0, len(rows)
    while behind < share * total:
        number -= 1
        behind += int(sizes[number])
    if behind <= (1 + LARGEST_CUT_SHIFT) * share * total and has_text(rows[:number]):
        return rows[:number], rows[number:]
    row = rows[number]
    at = len(row.rstrip()) - max(1, round(share * total) - (behind - int(sizes[number])))
    reach = round(LARGEST_CUT_SHIFT * share * total)
    for mark in BREAKS:
        nearest = [cut for cut in (row.rfind(mark, max(0, at - reach), at) + len(mark),
                                   row.find(mark, at, at + reach) + len(mark))
                   if cut >= len(mark) and row[:cut].strip() and row[cut:].strip()]
        if nearest:
            at = min(nearest, key=lambda cut: abs(cut - at))
            break
    cut = rows.files.extend([row[:at], row[at:]])
    return joined([rows[:number], cut[:1]]), joined([cut[1:], rows[number + 1:]])
