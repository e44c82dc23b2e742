"""Loads the text of a dataset: from the hub, local files, or the running Python's documentation.

A corpus is two sequences of rows, for training and for validation. A row is a record of a table
(for WikiText a line), a line of a text file, or a whole document of `pydocs`. Each split is read
once, from its files into rows on disk (stored_rows.py). In memory are at one time a row and a batch
of records; all of a .json file that has not one object per line, or of a compressed .parquet or
.arrow file; and with --partition column:NAME 40 bytes a row.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import sysconfig
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedrun.common.errors import InputError, require
from fedrun.data.discovery import (
    SPLIT_OF,
    discover,
    files_below,
    folder_of,
    matching_files,
)
from fedrun.data.documents import Documents
from fedrun.data.hub import CACHE_DIR, HUB_ID, hub_tables
from fedrun.data.hub_stream import stream_tables
from fedrun.data.limited_rows import LimitedRows
from fedrun.data.pydocs import (
    PYDOCS_HELD_OUT,
    pydocs_documents,
    read_pydocs,
    split_by_hash,
    stdlib_files,
)
from fedrun.data.reading import Reading, read_records
from fedrun.data.reading_pool import read_shards
from fedrun.data.stored_rows import RowFiles, StoredRows
from fedrun.data.table_files import KINDS, Table, choose_text_columns, open_table
from fedrun.data.text_files import COMPRESSED, TEXT_ENDINGS, printable
from fedrun.data.text_options import TextOptions, require_dataset
from fedrun.data.validation import Rows, divided, has_text

ALIASES = {
    "wikitext-2": "Salesforce/wikitext:wikitext-2-raw-v1",
    "wikitext-103": "Salesforce/wikitext:wikitext-103-raw-v1",
}
VALIDATION_PART = 20  # with --max_tokens N a validation split is read up to N/20
ACCEPTED = (
    f"{', '.join(ALIASES)}, pydocs, a hub id (owner/name or owner/name:config), a folder "
    "(or FOLDER:CONFIG), a file, or a pattern ('path/*.txt')"
)


@dataclass(frozen=True)
class Corpus:
    """The rows of one dataset."""

    name: str
    train: StoredRows
    validation: StoredRows
    validation_from: str
    """Where the validation rows come from, for reports; part of the fingerprint."""
    documents: Documents
    """The documents of the train rows."""
    read: str = ""
    """One line about the files that were read or left out; empty without local files."""

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of all rows in order, train before validation."""
        digest = hashlib.sha256()
        for rows in (self.train, self.validation):
            digest.update(b"%d rows\n" % len(rows))
            for content, cuts in rows.contents():
                # Without a line of Python per row: one process does this for all of the text.
                sizes, which = np.unique(np.diff(cuts), return_inverse=True)
                heads = [b"%d bytes\n" % size for size in sizes.tolist()]
                row_texts = map(content.__getitem__, map(slice, *(
                    part.tolist() for part in (cuts[:-1], cuts[1:]))))
                digest.update(b"".join(itertools.chain.from_iterable(
                    zip(map(heads.__getitem__, which.tolist()), row_texts, strict=True))))
        return digest.hexdigest()


def load_corpus(dataset: str, files: RowFiles, options: TextOptions = TextOptions(),  # noqa: B008
                cache_dir: Path = CACHE_DIR) -> Corpus:
    """Read all text of `dataset` (the value of `--dataset`).

    files: where the rows are put; LimitedRows with `options.max_tokens`. cache_dir: the value of
        --cache_dir, for what comes from the hub.

    If there is no validation split, the last twentieth of the train rows, of those that are read,
    is held out; see validation.py for exceptions.

    Raises:
        InputError: an unknown dataset, a file that cannot be read, no text, or no column that is
            clearly the text.
        ConnectionError: the hub cannot be reached and the dataset is not in its local cache.
    """
    local = dataset == "pydocs" or bool(local_files(dataset))
    require(not (local and options.stream), "--stream", "true", f"false with --dataset "
            f"{printable(dataset)}, which is read where it lies; only data sets of the hub stream")
    if dataset == "pydocs":
        return _pydocs(files, options)
    name = dataset_name(dataset)
    try:
        splits, read = (_local_splits(dataset, options) if local
                        else _hub_splits(dataset, options, cache_dir))
        wanted = _validation_split(list(splits), options)
        # An evaluation may ask for the only split of a dataset that has no train split.
        train = _limited(files, splits["train" if "train" in splits else str(wanted)], options)
        if options.source_column:
            train = train.by_source()
        if wanted is not None:
            held = _limited(files, splits[wanted], options, VALIDATION_PART)
            validation, documents = held.rows, train.documents()
            rows, validation_from = train.rows, "the split of that name"
            if options.validation_split:
                validation_from = f"the split {wanted}"
            if options.max_tokens is not None:
                validation_from += f", at most {_most(options, VALIDATION_PART):,} tokens"
        else:
            rows, validation, documents, validation_from = divided(train, options)
    except ValueError as error:
        message = str(error)
        if not message.startswith("--"):
            for end in (": ", ", "):  # if the dataset is one file, do not name it twice
                message = message.removeprefix(f"{printable(dataset)}{end}")
            message = f"--dataset {printable(dataset)}: {message}"
        raise InputError(message) from error
    for split, text in (("train", rows), ("validation", validation)):
        if not has_text(text):
            raise InputError(f"--dataset {printable(dataset)}: the corpus has no text in its "
                             f"{split} split")
    if options.max_tokens is not None:
        read = f"{read or f'read from {name}'}; the first rows, until they have " \
               f"{options.max_tokens:,} tokens"
    return Corpus(name, rows, validation, validation_from, documents, read)


def _limited(files: RowFiles, reader: Callable[[RowFiles], Rows], options: TextOptions,
             part: int = 1) -> Rows:
    """The rows of a split. With --max_tokens only the first ones: until they have that many tokens,
    or the n-th part of them."""
    if not isinstance(files, LimitedRows):
        return reader(files)
    return files.read(reader, _most(options, part))


def _most(options: TextOptions, part: int) -> int:
    assert options.max_tokens is not None
    return -(-options.max_tokens // part)


def dataset_name(dataset: str) -> str:
    """The name of `dataset` in reports: the last part of a folder's path, or else `dataset`."""
    located = folder_of(dataset) if dataset not in ALIASES else None
    if located is None:
        return printable(dataset)
    folder, configuration = located
    return printable(folder.name) + (f":{configuration}" if configuration else "")


def local_files(dataset: str) -> list[Path]:
    """All local files that `dataset` may be read from, sorted; empty for a dataset of the hub.

    Raises:
        InputError: there is no such dataset, or a folder or pattern has no files.
    """
    require_dataset(dataset)
    if dataset == "pydocs":
        return sorted(stdlib_files(Path(sysconfig.get_path("stdlib"))))
    if dataset in ALIASES:
        return []
    try:
        if located := folder_of(dataset):
            files = files_below(located[0])
            if not files:
                raise InputError(f"--dataset {printable(dataset)}: the folder has no files")
            return files
        files = matching_files(dataset)
    except OSError as error:
        raise InputError(f"--dataset {printable(dataset)}: {printable(error.filename or '')}: "
                         f"{error.strerror}") from error
    is_path = Path(dataset).suffix.lower() in {*KINDS, *TEXT_ENDINGS, *COMPRESSED, ".zip"}
    if not files and (is_path or not HUB_ID.fullmatch(dataset)):
        raise InputError(f"--dataset {printable(dataset)}: no such file, folder or name; "
                         f"must be {ACCEPTED}")
    return files


def file_signature(files: Iterable[Path]) -> list[list[object]]:
    """Path, size, modification time and change time of every file, to detect changes.

    The change time detects a file that was replaced by one with its size and modification time.

    Raises:
        InputError: a file is gone.
    """
    try:
        stats = [(file, file.stat()) for file in files]
    except OSError as error:
        raise InputError(f"{printable(error.filename)}: {error.strerror}") from error
    return [[str(f.resolve()), s.st_size, s.st_mtime_ns, s.st_ctime_ns] for f, s in stats]


# ---- the splits of a dataset --------------------------------------------------------------------

Splits = dict[str, Callable[[RowFiles], Rows]]
"""For each split, a function that reads its rows into files."""


def _validation_split(available: list[str], options: TextOptions) -> str | None:
    """The split to validate on; None if there is none, or train rows are to be held out instead."""
    if options.validation_split is not None:
        asked = options.validation_split
        wanted = SPLIT_OF.get(asked.lower(), asked)
        for split in (asked, wanted):
            if split in available and split != "train":
                return split
        raise InputError(f"--validation_split {asked}: must be one of the dataset's splits other "
                         f"than train; it has {', '.join(available)}")
    return "validation" if "validation" in available and options.val_fraction is None else None


def _require_train(splits: Iterable[str], validation: str | None, options: TextOptions) -> None:
    if "train" not in splits and (validation is None or options.hold_out):
        raise InputError(f"there is no train split, only {', '.join(splits)}; to train on "
                         "files whatever their names, give one file or a pattern")


def _hub_splits(dataset: str, options: TextOptions, cache_dir: Path) -> tuple[Splits, str]:
    tables = (stream_tables if options.stream else hub_tables)(
        dataset, ALIASES.get(dataset, dataset), cache_dir)
    wanted = _validation_split(list(tables), options)
    _require_train(tables, wanted, options)
    used = [tables[split] for split in ("train", wanted) if split in tables]
    columns = _choose_columns(used, options)
    return {split: functools.partial(read_records, [table], columns, options.source_column)
            for split, table in tables.items()}, ""


def _local_splits(dataset: str, options: TextOptions) -> tuple[Splits, str]:
    found = discover(dataset, options.encoding, bool(options.columns or options.source_column),
                     options.validation_split)
    wanted = _validation_split(list(found.splits), options)
    _require_train(found.splits, wanted, options)
    used = [split for split in ("train", wanted) if split in found.splits]
    splits: Splits = dict.fromkeys(found.splits, lambda files: Rows(files.extend([])))
    if next(iter(found.splits.values()))[0].suffix in KINDS:
        tables = {split: [(file, open_table(file, options.encoding))
                          for file in found.splits[split]] for split in used}
        try:
            columns = _choose_columns((table for part in tables.values() for _, table in part),
                                      options)
        except ValueError as error:
            raise InputError(f"{error}{found.describe_other_kinds()}") from error
        for split, part in tables.items():
            lacking = [file for file, table in part if not set(columns) & set(table.columns)]
            found.leave_out(f"without the column {columns[0]}",
                            (file.name.as_posix() for file in lacking))
            found.splits[split] = [file for file, _ in part if file not in lacking]
            splits[split] = functools.partial(
                read_shards, found.splits[split],
                Reading(options.encoding, tuple(columns), options.source_column))
    else:
        _require_no_columns(options)
        for split in used:
            splits[split] = functools.partial(
                read_shards, found.splits[split], Reading(options.encoding, stripped=found.folder))
    return splits, f"read from {dataset_name(dataset)}: {found.summary(used)}"


def _require_no_columns(options: TextOptions) -> None:
    for flag, value in (("--text_column", options.text_column),
                        ("--partition", options.source_column and options.partition)):
        if value:
            raise InputError(f"{flag} {value}: the dataset is text, which has no columns")


def _choose_columns(tables: Iterable[Table], options: TextOptions) -> list[str]:
    """The columns that contain the text, looked for in all tables (`choose_text_columns`)."""
    tables = list(tables)
    known = {name: None for table in tables for name in table.columns}
    if options.source_column and options.source_column not in known:
        raise InputError(f"--partition {options.partition}: there is no column "
                         f"{options.source_column}; the columns are {', '.join(known)}")
    return choose_text_columns(tables, options.text_column, options.columns, options.source_column)


def _pydocs(files: RowFiles, options: TextOptions) -> Corpus:
    if options.source_column or options.text_column:
        _require_no_columns(options)
    if options.validation_split not in (None, "validation"):
        raise InputError(f"--validation_split {options.validation_split}: must be validation: "
                         "pydocs has no other splits")
    share = PYDOCS_HELD_OUT if options.val_fraction is None else options.val_fraction
    train, held = split_by_hash(read_pydocs(local_files("pydocs")), share)

    def read(texts: dict[str, str], files: RowFiles) -> Rows:
        return Rows(files.extend(texts.values()))

    rows, validation = (_limited(files, functools.partial(read, texts), options, part).rows
                        for texts, part in ((train, 1), (held, VALIDATION_PART)))
    return Corpus("pydocs", rows, validation, f"whole documents, {share:.0%} of the text",
                  pydocs_documents(list(train)[:len(rows)]))
