"""Reads files of records: their columns, which of them contains the text, and the values.

    .jsonl .ndjson .json   one object per line; an array of objects or strings; or one object of
                           columns
    .csv .tsv              with a header line; values are kept as they are written
    .parquet .arrow        as `datasets` and others write them

A file is read twice: first its beginning, to find the columns, so that only the columns needed are
kept in memory.
"""

from __future__ import annotations

import functools
import io
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
SCHEMA_RECORDS = 1000  # records that are read to find the columns of a file without a schema
RECORDS_AT_ONCE = 10_000
BYTES_AT_ONCE = 1 << 24  # of records; fewer are taken at once if they are long
NOT_PROSE = re.compile(  # strings that are not text to train on: numbers, truth values, dates
    r"\s*([-+]?(\d[\d_.,]*|\.\d+)([eE][-+]?\d+)?%?|true|false|nan|none|null|inf"
    r"|\d{4}-\d\d-\d\d([T ]\d\d:\d\d(:\d\d([.,]\d+)?)?\s*(Z|[-+]\d\d:?\d\d)?)?)?\s*", re.I)
HEAD_BYTES = 1 << 20  # that have to say whether a file has one JSON object per line
LONE_SURROGATE = re.compile("[\ud800-\udfff]")
Record = dict[str, Any]


class Table(NamedTuple):
    """Records that are read on demand."""

    name: str
    columns: Mapping[str, bool]
    """The columns in order, and whether their values are texts."""
    rows: Callable[[Sequence[str]], Iterable[tuple[Any, ...]]]
    """Given names of columns, yields their values record by record; None for a missing value."""


def open_table(file: DataFile, encoding: str | None) -> Table:
    """The table in a file.

    Raises:
        InputError: the file is damaged; also raised by `rows`. The message has the file's name and,
            for text, the position.
    """
    columns = dict[str, bool]()
    if KINDS[file.suffix] in ("parquet", "arrow"):
        with _arrow(file) as (schema, _):
            columns = {field.name: is_text_type(field.type) for field in schema}
    else:
        for record in itertools.islice(_records(file, encoding), SCHEMA_RECORDS):
            for name, value in record.items():
                columns[name] = columns.get(name, False) or (
                    isinstance(value, str) and not NOT_PROSE.fullmatch(value))
    return Table(str(file), columns, functools.partial(file_values, file, encoding))


def file_values(file: DataFile, encoding: str | None, names: Sequence[str]
                ) -> Iterator[tuple[Any, ...]]:
    """The values of a file's table in some columns; see `Table.rows` and `open_table`."""
    if KINDS[file.suffix] in ("parquet", "arrow"):
        return _arrow_rows(file, names)
    return (tuple(record.get(name) for name in names) for record in _records(file, encoding))


def _records(file: DataFile, encoding: str | None) -> Iterator[Record]:
    return (_json_records if KINDS[file.suffix] == "json" else _csv_records)(file, encoding)


# ---- which column -------------------------------------------------------------------------------

def choose_text_columns(tables: Iterable[Table], text_column: str | None, asked: Sequence[str],
                 source_column: str | None) -> list[str]:
    """The columns that contain the text: those asked for, or else the only obvious one.

    Args:
        text_column: the value of --text_column; None if it was not given.
        asked: the names in it, if it is a list of names.
        source_column: a column that is not text, since it contains the sources.
    Raises:
        InputError: no column or several could be the text, or one asked for does not exist; the
            message lists all columns.
    """
    columns: dict[str, bool] = {}
    for table in tables:
        for name, is_text in table.columns.items():
            columns[name] = columns.get(name, False) or is_text
    if columns and text_column is not None:
        wanted = [text_column] if text_column in columns else list(asked)
        if missing := [name for name in wanted if name not in columns]:
            raise InputError(f"--text_column {text_column}: there is no column {missing[0]}; "
                             f"{_list_columns(columns)}")
        return wanted
    if not columns:
        raise InputError("there are no records")
    texts = [name for name, is_text in columns.items() if is_text and name != source_column]
    if "text" in texts or (not texts and "text" in columns):
        return ["text"]
    if len(texts) != 1:
        raise InputError("without --text_column the text must be in a column named text or in the "
                         f"only column of texts; {_list_columns(columns)}; use --text_column NAME, "
                         "or --text_column title,body to join several by a blank line")
    return texts


def _list_columns(columns: Mapping[str, bool]) -> str:
    names = [name if is_text else f"{name} (not text)" for name, is_text in columns.items()]
    return f"the columns are {', '.join(names) or 'none'}"


def table_rows(table: Table, columns: Sequence[str], source_column: str | None
               ) -> Iterator[tuple[str, str]]:
    """The text of each record, and its value in the source column ('' without one)."""
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
        raise InputError(f"{table.name}: the column {column} has values of type "
                         f"{type(value).__name__}, not text; choose another one")
    text = value if isinstance(value, str) else str(value)
    # JSON may contain lone surrogates, which no encoding can write.
    return text if text.isascii() else LONE_SURROGATE.sub("\N{REPLACEMENT CHARACTER}", text)


# ---- JSON and CSV -------------------------------------------------------------------------------

def _json_records(file: DataFile, encoding: str | None) -> Iterator[Record]:
    with open_text(file, encoding) as stream:
        lines = ((n, line) for n, line in enumerate(stream, 1) if not line.isspace())
        first = list(itertools.islice(lines, 2))
        opening = _opening(first)
        if file.part or (isinstance(opening, dict) and len(first) == 2):
            for number, line in itertools.chain(first, lines):
                yield _record(_parsed(line, file, number), file)
        elif opening is not None and len(first) == 1:
            yield from _records_of([opening], file)
        elif first:
            rest = "".join(line for _, line in itertools.chain(first, lines))
            yield from _records_of(_values(rest, str(file)), file)


def _opening(first: Sequence[tuple[int, str]]) -> Any:
    """The JSON value in the first line that is not blank; None if there is none."""
    try:
        return json.loads(first[0][1]) if first else None
    except (ValueError, RecursionError):
        return None


def has_json_lines(file: DataFile) -> bool:
    """Whether a file of JSON, in UTF-8, has an object per line, as far as its beginning says."""
    with open_bytes(file) as stream:
        head = io.TextIOWrapper(io.BytesIO(stream.read(HEAD_BYTES)), "utf-8-sig", "replace")
    lines = ((n, line) for n, line in enumerate(head, 1) if not line.isspace())
    first = list(itertools.islice(lines, 2))
    return len(first) == 2 and isinstance(_opening(first), dict)


def _parsed(text: str, file: DataFile, line: int) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file}, line {line}: not JSON: {error}") from None


def _values(text: str, where: str) -> list[Any]:
    """The JSON values in a text, usually one."""
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
    """The records in JSON values: see the top of this file for the forms."""
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
        raise InputError(f"{file}: must contain objects with named values, or a list of strings, "
                         f"not {type(value).__name__}")
    return value


def _csv_records(file: DataFile, encoding: str | None) -> Iterator[Record]:
    import pandas

    with open_text(file, encoding) as stream:
        try:
            # na_filter would turn the texts "NA" and "None" into missing values.
            for part in pandas.read_csv(stream, sep="\t" if file.suffix == ".tsv" else ",",
                                        dtype=str, na_filter=False, chunksize=RECORDS_AT_ONCE):
                if not isinstance(part.index, pandas.RangeIndex):
                    raise InputError("its lines have more values than the header has names")
                names = [str(name) for name in part.columns]
                for values in zip(*(part[name].tolist() for name in part.columns), strict=True):
                    yield dict(zip(names, values, strict=True))
        except UnicodeError:
            raise  # open_text adds the position
        except ValueError as error:
            raise InputError(f"{file}: not a table: {error}") from None


# ---- Parquet and Arrow --------------------------------------------------------------------------

@contextmanager
def _arrow(file: DataFile) -> Iterator[tuple[Any, Callable[[Sequence[str]], Iterable[Any]]]]:
    """The schema of a file, and a function from names of columns to its record batches."""
    import pyarrow
    from pyarrow import ipc, parquet

    to_memory = file.member is not None or file.plain_name != file.name  # cannot be mapped
    with open_bytes(file) as stream:
        try:
            content = pyarrow.BufferReader(stream.read()) if to_memory else \
                pyarrow.memory_map(str(file.path))
            if KINDS[file.suffix] == "parquet":
                table = parquet.ParquetFile(content)
                size = sum(_row_groups(table))
                yield table.schema_arrow, lambda names: table.iter_batches(
                    records_at_once(size, table.metadata.num_rows), columns=list(names),
                    row_groups=range(*file.part or (0, table.num_row_groups)))
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


def _row_groups(table: Any) -> list[int]:
    return [table.metadata.row_group(n).total_byte_size for n in range(table.num_row_groups)]


def row_group_bytes(file: DataFile) -> list[int]:
    """Bytes of each row group of a Parquet file, before compression.

    Raises:
        InputError: the file is damaged.
    """
    import pyarrow
    from pyarrow import parquet

    with open_bytes(file) as stream:
        try:
            return _row_groups(parquet.ParquetFile(stream))
        except pyarrow.ArrowException as error:
            raise InputError(f"{file}: cannot be read: {error}") from None


def _arrow_rows(file: DataFile, names: Sequence[str]) -> Iterator[tuple[Any, ...]]:
    with _arrow(file) as (schema, batches):
        present = [name for name in names if name in schema.names]
        parts = (whole.slice(start, count) for whole in batches(present)
                 for count in [records_at_once(whole.nbytes, whole.num_rows)]
                 for start in range(0, whole.num_rows, count))
        for batch in parts:
            values = {name: batch.column(name).to_pylist() for name in present}
            missing = [None] * batch.num_rows
            yield from zip(*(values.get(name, missing) for name in names), strict=True)


def records_at_once(size: int, count: int) -> int:
    """How many of `count` records, which take `size` bytes, to hold in memory at one time."""
    return max(1, min(RECORDS_AT_ONCE, BYTES_AT_ONCE * count // max(size, 1)))


def is_text_type(kind: Any) -> bool:
    """Whether an Arrow type is a string type."""
    import pyarrow

    if pyarrow.types.is_dictionary(kind):
        kind = kind.value_type
    return str(kind) in ("string", "large_string", "string_view")
