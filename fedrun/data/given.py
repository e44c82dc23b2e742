"""Data given from Python: texts or token ids, of all clients together or of each one.

It is kept in the token cache as text from files is, under a digest of what was given, so that the
processes of a machine share one copy. Of data that is given client by client each client's tokens
are cut into sequences by themselves.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedrun.common.errors import InputError
from fedrun.data.corpora import Corpus
from fedrun.data.documents import Documents, named_documents
from fedrun.data.given_parts import Ids, Texts, in_chunks
from fedrun.data.reading import read_records
from fedrun.data.stored_rows import RowFiles, joined
from fedrun.data.table_files import Table, choose_text_columns, table_rows
from fedrun.data.text_options import TextOptions
from fedrun.data.validation import (
    ALL_OF_THE_TEXT,
    Rows,
    divided,
    has_text,
    held_of_each,
    hold_out_of_clients,
    in_words,
    of_clients_in_words,
)

GIVEN_AS_VALIDATION = "what was given as validation"
OF_A_CLIENT = "all of a client"  # the kind of documents of data that is given client by client
NAME = re.compile(r"\(given [0-9a-f]{16}\)")  # of --dataset in the settings of such a run


@dataclass(frozen=True, eq=False)
class IdCorpus:
    """Token ids, split as a `Corpus` is. `documents` are those of the train ids, in tokens."""

    name: str
    train: list[np.ndarray]
    validation: list[np.ndarray]
    validation_from: str
    documents: Documents
    fingerprint: str
    read: str


@dataclass(frozen=True, eq=False)
class GivenData:
    """What `fedrun.train` was given; stands where the name of a dataset does."""

    parts: list[Ids | Table]
    """Of each client, or one of all clients together."""
    validation: Ids | Table | None
    by_client: bool
    sequence_length: int
    sha256: str
    """Of everything above but the sequence length, as hexadecimal digits."""

    def __str__(self) -> str:
        return f"(given {self.sha256[:16]})"

    @property
    def ids(self) -> list[Ids]:
        """All that was given, if it is token ids; empty if it is text."""
        return [part for part in (*self.parts, self.validation) if isinstance(part, Ids)]

    @property
    def key(self) -> list[Any]:
        """For the key of the cache's entry: text that all clients share is cut into sequences when
        it is read, everything else when it is written."""
        cut = self.sequence_length if self.by_client or self.ids else None
        return ["clients" if self.by_client else "given", self.sha256, cut]

    def require_below(self, vocab_size: int, whose: str) -> None:
        """InputError if a token id is not in a vocabulary of this size."""
        for ids in self.ids:
            if ids.largest >= vocab_size:
                raise InputError(f"{ids.name}: has the token id {ids.largest}; must be below "
                                 f"{vocab_size}, the vocabulary size {whose}")

    def read(self, files: RowFiles, options: TextOptions) -> Corpus | IdCorpus:
        """The train and validation split. files: where rows of text are put.

        Raises:
            InputError: there is too little of something, or no column that is clearly the text; the
                message names the argument.
        """
        if self.ids:
            return self._split_ids(options)
        texts = [_rows(part, options, files) for part in self.parts if isinstance(part, Table)]
        train = texts[0]
        if self.by_client:
            parts = [(each.rows, each.rows[:0]) for each in texts]
            if self.validation is None:
                parts, validation_from = hold_out_of_clients(texts, options.held_out)
            starts = np.cumsum([0, *(len(rows) for rows, _ in parts)]).tolist()
            rows, held = (joined([part[n] for part in parts]) for n in (0, 1))
            documents = of_clients(starts)
        elif self.validation is not None:
            rows, held, documents = train.rows, train.rows[:0], train.documents()
        else:
            rows, held, documents, validation_from = divided(train, options)
        if isinstance(self.validation, Table):
            held = _rows(self.validation, _without_source(options), files).rows
            validation_from = GIVEN_AS_VALIDATION
        if not has_text(rows) or not has_text(held):
            raise InputError("data: has too little text to hold some of it out; give validation=")
        return Corpus(self._name, rows, held, validation_from, documents)

    @property
    def _name(self) -> str:
        return f"given data of {len(self.parts)} clients" if self.by_client else "given data"

    def _split_ids(self, options: TextOptions) -> IdCorpus:
        length = self.sequence_length
        parts = [part for part in self.parts if isinstance(part, Ids)]
        sizes = [part.size // length for part in parts]
        for part in parts if self.by_client else []:
            require_a_sequence(part.name, part.size, length)
        held = [0] * len(parts)
        if self.validation is None and options.hold_out:
            held = held_of_each(sizes, options.held_out)
            if not any(held) and max(sizes) > 1:
                held[int(np.argmax(sizes))] = 1
        train, validation, starts = [], [], [0]
        for part, size, out in zip(parts, sizes, held, strict=True):
            kept = (size - out) * length if out or self.by_client else part.size
            train += part.between(0, kept)
            validation += part.between(kept, size * length)
            starts.append(starts[-1] + kept)
        validation_from = of_clients_in_words(options.held_out, "sequences", all(held)) \
            if self.by_client else f"the last {in_words(options.held_out)} of the sequences"
        if isinstance(self.validation, Ids):
            validation, validation_from = self.validation.pieces, GIVEN_AS_VALIDATION
        elif not options.hold_out:
            validation, validation_from = train, ALL_OF_THE_TEXT
        documents = of_clients(starts) if self.by_client else _documents(parts[0], starts[1],
                                                                         length)
        whole = sum(size * length for size in sizes)
        return IdCorpus(self._name, train, validation, validation_from, documents, self.sha256,
                        self.describe_cut(sum(part.size for part in parts), whole))

    def describe_cut(self, tokens: int, whole: int) -> str:
        """One line on the tokens that were given and those in whole sequences of a client; empty if
        they are all of one stream."""
        return f"read from {len(self.parts)} clients: {tokens:,} tokens; {tokens - whole:,} fill " \
            "no whole sequence of their client and are left out" if self.by_client else ""


def require_a_sequence(name: str, tokens: int, length: int) -> None:
    """InputError if a client's tokens are too few for one sequence."""
    if tokens < length:
        raise InputError(f"{name}: has {tokens} tokens to train on, {length - tokens} too few for "
                         f"one sequence of {length}; use shorter sequences (--sequence_length), or "
                         "leave the client out")


Source = str | GivenData
"""The name of a dataset, or what was given in its place."""


def of_clients(starts: Sequence[int]) -> Documents:
    """Documents that are the data of one client each. starts: where each begins, and the end."""
    return named_documents(OF_A_CLIENT, starts[:-1], starts[-1],
                           [f"client {n}" for n in range(len(starts) - 1)])


def _documents(ids: Ids, end: int, length: int) -> Documents:
    """The documents among the first `end` tokens: those that were given, or else the sequences."""
    if len(ids.pieces) == 1:
        return Documents("a sequence", np.append(np.arange(0, end // length) * length, end),
                         np.empty(0, dtype=np.int64), [])
    starts = np.cumsum([0, *map(len, ids.pieces[:-1])]).tolist()
    return named_documents("an array", [start for start in starts if start < end], end, [])


# ---- the digest ----------------------------------------------------------------------------------

def given_data(parts: list[Ids | Table], validation: Ids | Table | None, by_client: bool,
               sequence_length: int, options: TextOptions) -> GivenData:
    """What was given, after a check that it is of one kind, with its digest.

    Raises:
        InputError: texts beside token ids, rows of another length than `sequence_length`, or the
            errors of choosing a column.
    """
    everything = [*parts, *([] if validation is None else [validation])]
    kinds = {isinstance(part, Ids): part for part in reversed(everything)}
    if len(kinds) > 1:
        raise InputError(f"{kinds[True].name}: has token ids, but {kinds[False].name} texts; must "
                         "be of one kind")
    digest = hashlib.sha256(json.dumps(["clients" if by_client else "data", len(parts),
                                        validation is not None]).encode())
    for part in everything:
        digest.update(b"part\n")
        if isinstance(part, Table):
            reading = _without_source(options) if part is validation else options
            for row in _texts_and_sources(part, reading):
                digest.update(json.dumps(row).encode() + b"\n")
            continue
        if part.width not in (None, sequence_length):
            raise InputError(f"--sequence_length {sequence_length}: must be {part.width}, the "
                             f"length of the rows of {part.name}; or give it as one stream (1-D), "
                             "which is cut")
        for array in part.pieces:
            digest.update(b"%d ids\n" % len(array))
            for some in in_chunks(array, np.dtype("<i4")):
                digest.update(some)
    return GivenData(parts, validation, by_client, sequence_length, digest.hexdigest())


def _without_source(options: TextOptions) -> TextOptions:
    """The same for validation text, which needs no sources."""
    return dataclasses.replace(options, partition="")


def _rows(table: Table, options: TextOptions, files: RowFiles) -> Rows:
    rows = read_records([table], _columns(table, options), options.source_column, files)
    if not has_text(rows.rows):
        raise InputError(f"{table.name}: has no text")
    return rows.by_source()


def _texts_and_sources(table: Table, options: TextOptions) -> Iterator[tuple[str, str | None]]:
    """What `_rows` would read, in its order, and the sources; None without sources. With sources
    all of a table is held in memory. InputError as there."""
    records = table_rows(table, _columns(table, options), options.source_column)
    if options.source_column:
        of_source: dict[str, list[tuple[str, str]]] = {}
        for record in records:
            of_source.setdefault(record[1], []).append(record)
        records = itertools.chain.from_iterable(of_source.values())
    any_text = False
    for text, source in records:
        any_text = any_text or bool(text.strip())
        yield text, source if options.source_column else None
    if not any_text:
        raise InputError(f"{table.name}: has no text")


def _columns(table: Table, options: TextOptions) -> list[str]:
    if options.source_column and options.source_column not in table.columns:
        raise InputError(f"--partition {options.partition}: {table.name} has no column "
                         f"{options.source_column}; the columns are {', '.join(table.columns)}")
    if isinstance(table, Texts):
        return ["text"]
    try:
        return choose_text_columns([table], options.text_column, options.columns,
                                   options.source_column)
    except ValueError as error:
        raise InputError(f"{table.name}: {error}") from None
