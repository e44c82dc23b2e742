"""Files of records: which columns they have, which of them is the text, and their values.

    .jsonl .ndjson .json   objects, one a line; or an array of objects or texts; or one object of
                           columns
    .csv .tsv              with a line of names; every value as it is written
    .parquet .arrow        as `datasets` and others write them

A file is read twice, first its beginning, for the columns, so that no more of it is held than what
is asked for.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from fedrun.common.errors import InputError
from fedrun.data.text_files import DataFile, open_bytes, open_text

KINDS = {".jsonl": "json", ".ndjson": "json", ".json": "json", ".csv": "csv", ".tsv": "csv",
         ".parquet": "parquet", ".arrow": "arrow"}  # fmt: skip
SCHEMA_RECORDS = 1000  # records of a file without a schema, to tell its columns
RECORDS_AT_ONCE = 10_000
NOT_PROSE = re.compile(  # numbers, truth values, dates: strings that are no text to train on
    r"\s*([-+]?(\d[\d_.,]*|\.\d+)([eE][-+]?\d+)?%?|true|false|nan|none|null|inf"
    r"|\d{4}-\d\d-\d\d([T ]\d\d:\d\d(:\d\d([.,]\d+)?)?\s*(Z|[-+]\d\d:?\d\d)?)?)?\s*", re.I)
LONE_SURROGATE = re.compile("[\ud800-\udfff]")
Record = dict[str, Any]


class Table(NamedTuple):
    """Records, read when they are asked for."""

    name: str
    columns: Mapping[str, bool]
    """In their order; whether the values of each are texts."""
    rows: Callable[[Sequence[str]], Iterable[tuple[Any, ...]]]
    """The values of these columns, record by record; None where a record lacks one."""


def open_table(file: DataFile, encoding: str | None) -> Table:
    """The table in a file.

    Raises:
        ValueError: the file is damaged, with its name and, for text, the place; also from `rows`.
    """
    kind = KINDS[file.suffix]
    if kind in ("parquet", "arrow"):
        with _arrow(file) as (schema, _):
            columns = {field.name: is_text_type(field.type) for field in schema}
        return Table(str(file), columns, lambda names: _arrow_rows(file, names))
    read = _json_records if kind == "json" else _csv_records
    head = list(itertools.islice(read(file, encoding), SCHEMA_RECORDS))
    columns = {}
    for record in head:
        for name, value in record.items():
            columns[name] = columns.get(name, False) or (
                isinstance(value, str) and not NOT_PROSE.fullmatch(value))
    return Table(str(file), columns, lambda names: (
        tuple(record.get(name) for name in names) for record in read(file, encoding)))


# ---- which column -------------------------------------------------------------------------------

def choose_text_columns(tables: Iterable[Table], text_column: str | None, asked: Sequence[str],
                 source_column: str | None) -> list[str]:
    """The columns whose values are the text: those asked for, or the obvious one, which the column
    that tells the sources is not.

    Raises:
        ValueError: there is none or more than one, or not the one asked for; with all columns.
    """
    columns: dict[str, bool] = {}
    for table in tables:
        for name, is_text in table.columns.items():
            columns[name] = columns.get(name, False) or is_text
    if columns and text_column is not None:
        wanted = [text_column] if text_column in columns else list(asked)
        if missing := [name for name in wanted if name not in columns]:
            raise InputError(f"--text_column {text_column}: there is no column {missing[0]}; "
                             f"{_told(columns)}")
        return wanted
    if not columns:
        raise InputError("there are no records")
    texts = [name for name, is_text in columns.items() if is_text and name != source_column]
    if "text" in texts or (not texts and "text" in columns):
        return ["text"]
    if len(texts) != 1:
        raise InputError("the text is looked for in the column text, or in the only column of "
                         f"texts; {_told(columns)}; name it with --text_column NAME, or several, "
                         "joined by a blank line, with --text_column title,body")
    return texts


def _told(columns: Mapping[str, bool]) -> str:
    names = [name if is_text else f"{name} (no texts)" for name, is_text in columns.items()]
    return f"the columns are {', '.join(names) or 'none'}"


def table_rows(table: Table, columns: Sequence[str], source_column: str | None
               ) -> Iterator[tuple[str, str]]:
    """The text of each record, and the value of the source column ('' without one)."""
    names = [*columns, *([source_column] if source_column else [])]
    for values in table.rows(names):
        parts = [_text(value, name, table) for value, name in zip(values, columns, strict=False)]
        source = values[-1] if source_column else None
        yield "\n\n".join(part for part in parts if part), \
            "" if source is None else _text(source, names[-1], table)


def _text(value: Any, column: str, table: Table) -> str:
    if value is None:
        return ""
    if isinstance(value, list | dict | bytes):
        raise InputError(f"{table.name}: the column {column} holds {type(value).__name__} values, "
                         "no texts; name another one")
    text = value if isinstance(value, str) else str(value)
    # JSON may hold halves of characters, which no encoding can write.
    return LONE_SURROGATE.sub("\N{REPLACEMENT CHARACTER}", text)


# ---- JSON and CSV -------------------------------------------------------------------------------

def _json_records(file: DataFile, encoding: str | None) -> Iterator[Record]:
    with open_text(file, encoding) as stream:
        lines = ((n, line) for n, line in enumerate(stream, 1) if not line.isspace())
        first = list(itertools.islice(lines, 2))
        try:
            opening = json.loads(first[0][1]) if first else None
        except (ValueError, RecursionError):
            opening = None
        if isinstance(opening, dict) and len(first) == 2:
            for number, line in itertools.chain(first, lines):
                yield _record(_parsed(line, f"{file}, line {number}"), file)
        elif opening is not None and len(first) == 1:
            yield from _records_of([opening], file)
        elif first:
            rest = "".join(line for _, line in itertools.chain(first, lines))
            yield from _records_of(_values(rest, str(file)), file)


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not JSON: {error}") from None


def _values(text: str, where: str) -> list[Any]:
    """The JSON values of a text, one after the other; mostly it is one."""
    decoder, found = json.JSONDecoder(), []
    at = len(text) - len(text.lstrip())
    while at < len(text):
        try:
            value, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{where}: not JSON: {error}") from None
        found.append(value)
        while at < len(text) and text[at].isspace():
            at += 1
    return found


def _records_of(values: list[Any], file: DataFile) -> Iterator[Record]:
    value = values[0] if len(values) == 1 else values
    if isinstance(value, dict):
        columns = list(value.values())
        lists = [column for column in columns if isinstance(column, list)]
        if len(lists) == len(columns) > 0 and len({len(column) for column in lists}) == 1:
            if len(lists) == 1 and all(isinstance(item, dict) for item in lists[0]):
                value = lists[0]  # {"data": [...]}
            else:
                value = [dict(zip(value, row, strict=True))
                         for row in zip(*lists, strict=True)]
    for item in value if isinstance(value, list) else [value]:
        yield {"text": item} if isinstance(item, str) else _record(item, file)


def _record(value: Any, file: DataFile) -> Record:
    if not isinstance(value, dict):
        raise InputError(f"{file}: objects with named values are expected, or a list of texts; "
                         f"there is a {type(value).__name__}")
    return value


def _csv_records(file: DataFile, encoding: str | None) -> Iterator[Record]:
    import pandas

    with open_text(file, encoding) as stream:
        try:
            # Without na_filter a text of "NA" or "None" stays what it is.
            for part in pandas.read_csv(stream, sep="\t" if file.suffix == ".tsv" else ",",
                                        dtype=str, na_filter=False, chunksize=RECORDS_AT_ONCE):
                if not isinstance(part.index, pandas.RangeIndex):
                    raise InputError("its lines have more values than the first has names")
                names = [str(name) for name in part.columns]
                for values in zip(*(part[name].tolist() for name in part.columns), strict=True):
                    yield dict(zip(names, values, strict=True))
        except UnicodeError:
            raise  # open_text says where
        except ValueError as error:
            raise InputError(f"{file}: not a table: {error}") from None


# ---- Parquet and Arrow --------------------------------------------------------------------------

@contextmanager
def _arrow(file: DataFile) -> Iterator[tuple[Any, Callable[[Sequence[str]], Iterable[Any]]]]:
    """The schema of a file, and what gives its record batches with some of the columns."""
    import pyarrow
    from pyarrow import ipc, parquet

    whole = file.member is not None or file.plain_name != file.name
    with open_bytes(file) as stream:
        try:
            content = pyarrow.BufferReader(stream.read()) if whole else \
                pyarrow.memory_map(str(file.path))
            if KINDS[file.suffix] == "parquet":
                table = parquet.ParquetFile(content)
                yield table.schema_arrow, lambda names: table.iter_batches(
                    RECORDS_AT_ONCE, columns=list(names))
                return
            try:
                batches = ipc.open_stream(content)
            except pyarrow.ArrowInvalid:
                content.seek(0)
                found = ipc.open_file(content)
                yield found.schema, lambda _: map(found.get_batch, range(found.num_record_batches))
                return
            yield batches.schema, lambda _: batches
        except pyarrow.ArrowException as error:
            raise InputError(f"{file}: cannot be read: {' '.join(str(error).split())}") from None


def _arrow_rows(file: DataFile, names: Sequence[str]) -> Iterator[tuple[Any, ...]]:
    with _arrow(file) as (schema, batches):
        there = [name for name in names if name in schema.names]
        for batch in batches(there):
            values = {name: batch.column(name).to_pylist() for name in there}
            nothing = [None] * batch.num_rows
            yield from zip(*(values.get(name, nothing) for name in names), strict=True)


def is_text_type(kind: Any) -> bool:
    """Whether a type of Arrow's is a string's."""
    import pyarrow

    if pyarrow.types.is_dictionary(kind):
        kind = kind.value_type
    return str(kind) in ("string", "large_string", "string_view")
