"""Rows on disk, and the documents among them, are what a list of texts is."""

from __future__ import annotations

import random
import sys
import tempfile
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedrun.data import documents, stored_rows, table_files
from fedrun.data.documents import TextFile, find_documents
from fedrun.data.stored_rows import RowFiles, StoredRows, joined
from tests.support.texts import load, on_disk

ROWS = st.lists(st.text(alphabet="aé漢\n \N{GRINNING FACE}", max_size=9), max_size=30)


@settings(max_examples=50, deadline=None)
@given(ROWS, st.integers(0, 30), st.integers(0, 30), st.integers(1, 40), st.randoms(),
       st.integers(1, 50))
def test_rows_on_disk_are_what_a_list_is(texts: list[str], start: int, stop: int, size: int,
                                         order: random.Random, at_once: int) -> None:
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        for name in ("WRITE_BYTES", "READ_BYTES", "READ_ROWS"):
            patch.setattr(stored_rows, name, at_once)
        files = RowFiles(Path(folder))
        rows = files.extend(texts)
        assert (list(rows), len(rows)) == (texts, len(texts))
        assert list(rows[start:stop]) == texts[start:stop]
        shuffled = list(range(len(texts)))
        order.shuffle(shuffled)
        mixed = rows.taken(np.array([[n, n + 1] for n in shuffled], dtype=np.int64).reshape(-1, 2))
        expected = [texts[n] for n in shuffled]
        assert [mixed[n] for n in range(len(mixed))] == expected
        assert list(mixed[start:stop]) == expected[start:stop]
        both = joined([mixed[:start], files.extend(["more"]), mixed[stop:]])
        expected = [*expected[:start], "more", *expected[stop:]]
        assert list(both) == expected
        blocks = [list(StoredRows(files, spans)) for spans in both.blocks(size)]
        assert [row for block in blocks for row in block] == expected
        for block in blocks[:-1]:
            sizes = [len(row.encode()) for row in block]
            assert sum(sizes) >= size > sum(sizes[:-1])
        files.sync()
        again = RowFiles(Path(folder), whole=True)
        assert list(StoredRows(again, both.spans)) == expected
        assert (len(again), again.size) == (len(files), files.size)


@pytest.mark.parametrize("n_rows", [8, 9, 33, 70])
def test_of_very_many_documents_neighbours_count_as_one(n_rows: int,
                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    rows = on_disk(["x", ""] * n_rows)
    lone = [TextFile(Path("a.txt"), len(rows))]
    of_rows, of_lines = find_documents(rows, []), find_documents(rows, lone)
    assert (len(of_rows), len(of_lines)) == (2 * n_rows, n_rows)
    monkeypatch.setattr(documents, "MOST_DOCUMENTS", 8)
    for whole, found in ((of_rows, find_documents(rows, [])),
                         (of_lines, find_documents(rows, lone))):
        together = whole.starts.tolist().index(found.starts[1])
        assert 4 < len(found) <= 8
        assert bin(together).count("1") == 1
        assert found.starts.tolist() == [*whole.starts[:-1:together].tolist(), len(rows)]


@given(st.lists(st.text(st.sampled_from("".join(map(chr, range(0x3001))).translate({10: None})
                                        + "é漢\n \t"), max_size=4), max_size=30),
       st.integers(1, 50), st.integers(1, 9))
def test_paragraphs_begin_behind_rows_without_text(texts: list[str], at_once: int, most: int
                                                   ) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stored_rows, "READ_BYTES", at_once)
        patch.setattr(documents, "MOST_DOCUMENTS", most)
        found = find_documents(on_disk(texts), [TextFile(Path("a.txt"), len(texts))])
    begins = [0, *(n for n in range(1, len(texts)) if texts[n].strip()
                   and not texts[n - 1].strip())]
    step = next(2**n for n in range(9) if len(begins[::2**n]) <= most)
    assert found.starts.tolist() == [*begins[::step], len(texts)]


def test_white_space_begins_with_the_bytes_that_are_said() -> None:
    begins = {chr(code).encode()[0] for code in range(sys.maxunicode + 1) if chr(code).isspace()}
    assert begins <= set(np.flatnonzero(documents.SPACE_BEGINS).tolist())


def test_long_records_are_read_a_few_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch
                                               ) -> None:
    texts = [f"{n} " * (n % 40) for n in range(200)]
    table = pyarrow.table({"text": texts, "n": list(range(200))})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pyarrow.ipc.new_stream(tmp_path / "a.arrow", table.schema) as stream:
        stream.write_table(table)
    taken = list[tuple[int, int]]()  # records at once, and their mean size
    real = table_files.records_at_once

    def watched(size: int, count: int) -> int:
        taken.append((min(count, real(size, count)), size // count))
        return taken[-1][0]

    monkeypatch.setattr(table_files, "BYTES_AT_ONCE", 500)
    monkeypatch.setattr(table_files, "records_at_once", watched)
    for name in ("a.parquet", "a.arrow"):
        corpus = load(tmp_path / name)
        assert corpus.train + corpus.validation == texts
        assert 0 < taken[0][0] < 20
        assert all(number * size <= 500 or number == 1 for number, size in taken)
        taken.clear()
    assert (real(0, 700), real(10**9, 1), real(500, 200)) == (10_000, 1, 200)
