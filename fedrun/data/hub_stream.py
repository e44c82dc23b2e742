"""Datasets of the hub that are read as a stream: in their order, with no copy on this machine."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedrun.common.errors import InputError, one_line
from fedrun.data import hub
from fedrun.data.table_files import Table, is_text_type

RECORDS_AT_ONCE = 100  # they may be long
HEAD = 100  # records that are read to find the columns of a dataset that does not describe them


def stream_tables(dataset: str, hub_id: str, cache_dir: Path) -> dict[str, Table]:
    """The splits of a dataset, whose records are downloaded while they are read.

    The arguments and errors are those of `hub_tables`, but that a cache is of no use; the tables'
    rows raise them as well, when the hub no longer answers or a file cannot be read.
    """
    splits = hub.load_from_hub(dataset, hub_id, cache_dir, streaming=True)
    return {split: _table(dataset, f"{dataset}, split {split}", rows)
            for split, rows in splits.items()}


def _table(dataset: str, name: str, rows: Any) -> Table:
    if rows.features is not None:
        columns = {field.name: is_text_type(field.type) for field in rows.features.arrow_schema}
    else:
        columns = {}
        for record in itertools.islice(_guarded(dataset, rows), HEAD):
            for key, value in record.items():
                columns[key] = columns.get(key, False) or isinstance(value, str)
    return Table(name, columns, lambda names: _rows(dataset, rows, names, columns))


def _rows(dataset: str, rows: Any, names: Sequence[str], columns: Mapping[str, bool]
          ) -> Iterator[tuple[Any, ...]]:
    present = [name for name in dict.fromkeys(names) if name in columns]
    if not present:
        return
    batches = rows.select_columns(present).iter(RECORDS_AT_ONCE)
    for values in _guarded(dataset, batches):
        missing = [None] * len(values[present[0]])
        yield from zip(*(values.get(name, missing) for name in names), strict=True)


def _guarded(dataset: str, stream: Any) -> Iterator[dict[str, Any]]:
    """What a stream yields; the library's errors in words for the user."""
    from datasets.exceptions import DatasetsError

    try:
        yield from stream
    except (ValueError, DatasetsError) as error:  # what is there is no such file
        raise InputError(f"{dataset}: cannot be read: {one_line(error)}") from error
    except Exception as error:  # the libraries raise many types
        raise hub.HubUnreachable(f"--dataset {dataset}: the stream broke off ({one_line(error)}); "
                                 "start again") from error
