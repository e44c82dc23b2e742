"""Tables and compressed files: which columns are text, and what their rows are."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import zipfile
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from tests.support.texts import files_in, lines, load, records, write


def table_file(path: Path) -> Path:
    """Forty records with the columns text and n, in the format of the file's ending."""
    texts = [f'{line} It is "quoted", and\nbroken.' for line in lines("it")]
    records = [{"text": text, "n": n} for n, text in enumerate(texts)]
    table = pyarrow.table({"text": texts, "n": list(range(40))})
    path.parent.mkdir(exist_ok=True)
    ending = path.suffix
    if ending == ".jsonl":
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    elif ending == ".json":
        path.write_text(json.dumps(records, indent=1))
    elif ending in (".csv", ".tsv"):
        by = "," if ending == ".csv" else "\t"
        quoted = [text.replace('"', '""') for text in texts]
        path.write_text(f"n{by}text\n" + "".join(f'{n}{by}"{text}"\n'
                                                 for n, text in enumerate(quoted)))
    elif ending == ".parquet":
        pyarrow.parquet.write_table(table, path)
    else:
        with pyarrow.ipc.new_stream(path, table.schema) as stream:
            stream.write_table(table)
    return path


@pytest.mark.parametrize("ending", ["jsonl", "json", "csv", "tsv", "parquet", "arrow"])
def test_one_file_means_what_a_folder_with_it_means(tmp_path: Path, ending: str) -> None:
    file = table_file(tmp_path / "set" / f"corpus.{ending}")
    alone, folder = load(file), load(file.parent)
    pattern = load(f"{file.parent}/*.{ending}")
    assert alone.train == [f'{line} It is "quoted", and\nbroken.' for line in lines("it")[:38]]
    assert alone.fingerprint == folder.fingerprint == pattern.fingerprint
    assert alone.documents.kind == folder.documents.kind == "a row"


def zstd(data: bytes) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return bytes(sink.getvalue())


def archive(data: bytes) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as written:
        written.writestr("a.txt", data)
    return content.getvalue()


@pytest.mark.parametrize(("ending", "pack"), [
    ("txt.gz", gzip.compress), ("txt.bz2", bz2.compress), ("txt.xz", lzma.compress),
    ("txt.zst", zstd), ("zip", archive)])
def test_compressed_text_is_text(tmp_path: Path, ending: str,
                                 pack: Callable[[bytes], bytes]) -> None:
    text = "".join(f"{line}\n" for line in lines("it"))
    file = tmp_path / f"a.{ending}"
    file.write_bytes(pack(text.encode()))
    assert load(tmp_path).train == lines("it")[:38]
    assert load(file).train == text.splitlines(keepends=True)[:38]
    file.write_bytes(file.read_bytes()[:60])
    with pytest.raises(ValueError, match=rf"--dataset .*a\.{ending}.*: cannot be read"):
        load(tmp_path)


def test_records_are_read_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("id,text\n" + "1,NA\n2,None\n3,007\n4,plain\n" * 10)
    assert load(tmp_path / "a.csv").train[:4] == ["NA", "None", "007", "plain"]
    (tmp_path / "b.jsonl").write_text(
        '{"text": "half \\ud800", "when": "2020-01-02"}\n{"text": null}\n\n{"n": 1}\n' * 10)
    assert load(tmp_path / "b.jsonl").train[:3] == ["half \N{REPLACEMENT CHARACTER}", "", ""]
    for n, content in enumerate((["a", "b", "c"], {"data": [{"text": t} for t in "abc"]},
                                 {"text": ["a", "b", "c"]})):
        (tmp_path / f"{n}.json").write_text(json.dumps(content, indent=2))
        assert load(tmp_path / f"{n}.json").train == ["a", "b"]


@pytest.mark.parametrize(("name", "content", "message"), [
    ("a.jsonl", '{"text": "a"}\n{"text": "b"}\n{"text"\n', r"line 3: not JSON: "),
    ("a.json", "[1, 2]", "must contain objects with named values"),
    ("a.json", "[" * 100_000, "not JSON: .*recursion"),
    ("a.json", "", "there are no records"),
    ("a.csv", 'id,text\n1,"open\n2,x\n', "not a table: .*EOF inside string"),
    ("a.csv", "text\n" + "a,b,c\n" * 9, "not a table: its lines have more values than the header"),
    ("a.parquet", "PAR1 and no more", "cannot be read: "), ("a.arrow", "no" * 40, "cannot be read"),
])
def test_a_damaged_table_is_named_with_the_place(tmp_path: Path, name: str, content: str,
                                                 message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=rf"^--dataset \S*{name}: {message}"):
        load(tmp_path / name)


# ---- columns ------------------------------------------------------------------------------------

def test_text_columns_are_named_by_a_flag_that_the_error_names(tmp_path: Path) -> None:
    file = records(tmp_path / "a.jsonl")
    with pytest.raises(ValueError, match=r"--dataset .*the columns are title, body, n \(not text\),"
                                         r" user; use --text_column"):
        load(file)
    assert load(file, text_column="body").train[:2] == ["Body 0", "Body 1"]
    assert load(file, text_column="title,body").train[1] == "Title 1\n\nBody 1"
    with pytest.raises(ValueError, match=r"^--text_column tilte: there is no column tilte; the "
                                         r"columns are title"):
        load(file, text_column="tilte")
    with pytest.raises(ValueError, match="--text_column body: the dataset is text"):
        load(write(tmp_path / "texts", "a.txt"), text_column="body")


def test_unusable_tables_do_not_hide_the_text_files_beside_them(tmp_path: Path) -> None:
    folder = write(tmp_path / "set", "a.txt")
    for name in ("one.json", "two.json"):
        (folder / name).write_text(json.dumps({"lr": 0.1, "seed": 3}))
    with pytest.raises(ValueError, match=r"the columns are lr \(not text\), .*; not read: 1 of "
                                         r"text, fewer than of json \(name .*\) \(a\.txt\)"):
        load(folder)


def test_a_file_without_the_column_is_left_out(tmp_path: Path) -> None:
    folder = write(tmp_path / "set", "a.jsonl", "b.jsonl")
    (folder / "meta.json").write_text(json.dumps({"author": "somebody"}))
    corpus = load(folder)
    assert files_in(corpus.train) == ["a.jsonl", "b.jsonl"]
    assert "1 without the column text (meta.json)" in corpus.read


def test_saved_datasets_load_without_what_lies_beside_them(tmp_path: Path) -> None:
    import datasets

    made = datasets.Dataset.from_dict({"text": lines("it"), "n": list(range(40))})
    made.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": made, "validation": made.select(range(9))}).save_to_disk(
        str(tmp_path / "two"))
    (tmp_path / "one" / "cache-0123456789abcdef.arrow").write_bytes(
        next((tmp_path / "one").glob("data-*.arrow")).read_bytes())
    assert load(tmp_path / "one").train == lines("it")[:38]
    two = load(tmp_path / "two")
    assert (two.train, two.validation) == (lines("it"), lines("it")[:9])
