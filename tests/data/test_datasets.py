"""Which files of a dataset are read, from which splits, and what their rows are."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import zipfile
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from fedrun.data import entry, tokens
from fedrun.data.corpora import Corpus, load_corpus
from fedrun.data.reading import Reading
from fedrun.flags import resolve

# ---- making datasets ----------------------------------------------------------------------------

def lines(tag: str, n: int = 40) -> list[str]:
    return [f"{tag} says sentence {number}." for number in range(n)]


def write(folder: Path, *names: str) -> Path:
    """Text files, each with 40 lines that tell their file; tables of 40 records."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        text = "".join(f"{json.dumps({'text': line})}\n" if ".json" in name else f"{line}\n"
                       for line in lines(name))
        path.write_text(text, encoding="utf-8")
    return folder


def files_in(rows: list[str]) -> list[str]:
    """The names of the files that rows of `write` come from, in order."""
    return list(dict.fromkeys(row.partition(" says")[0] for row in rows if row.strip()))


def load(path: Path | str, **reading: object) -> Corpus:
    return load_corpus(str(path), Reading(**reading))  # type: ignore[arg-type]


# ---- which files --------------------------------------------------------------------------------

def test_no_file_is_taken_for_a_split_by_a_part_of_its_name(tmp_path: Path) -> None:
    names = ["garden.txt", "harbour.txt", "paris.txt", "test_results.txt", "train_journey.txt",
             "winter.txt"]
    corpus = load(write(tmp_path / "diary", *names))
    assert files_in(corpus.train + corpus.validation) == names
    assert len(corpus.train) + len(corpus.validation) == 240
    assert "train: 6 files (6 .txt)" in corpus.read
    assert "read as train rows, since whole names make splits: test_results.txt" in corpus.read
    pattern = load(tmp_path / "diary" / "*.txt")
    assert [row.rstrip("\n") for row in pattern.train] == corpus.train
    assert [row.rstrip("\n") for row in pattern.validation] == corpus.validation


@pytest.mark.parametrize(("names", "train", "validation"), [
    (["train.txt", "validation.txt"], ["train.txt"], ["validation.txt"]),
    (["train/a.txt", "train/b/c.txt", "dev/a.txt", "unseen/a.txt"],
     ["train/a.txt", "train/b/c.txt"], ["dev/a.txt"]),
    (["dev/x.txt", "paris.txt"], ["paris.txt"], ["dev/x.txt"]),
    (["train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl", "val-00000-of-00001.jsonl",
      "random-00000-of-00001.jsonl"],
     ["train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl"], ["val-00000-of-00001.jsonl"]),
    (["data/random-00000-of-00001.jsonl", "data/train-00000-of-00001.jsonl"],
     ["data/train-00000-of-00001.jsonl"], ["data/train-00000-of-00001.jsonl"]),
    (["wiki.test.txt", "wiki.train.txt", "wiki.valid.txt"], ["wiki.train.txt"],
     ["wiki.valid.txt"]),
    (["train.txt", "notes.txt"], ["notes.txt", "train.txt"], ["train.txt"]),
    (["test.py", "train.py"], ["test.py", "train.py"], ["train.py"]),
])
def test_splits_are_named_by_whole_names(tmp_path: Path, names: list[str], train: list[str],
                                         validation: list[str]) -> None:
    corpus = load(write(tmp_path / "set", *names))
    assert files_in(corpus.train) == train
    assert files_in(corpus.validation) == validation
    unread = set(names) - set(train) - set(validation)
    assert all(name in corpus.read.partition("not read")[2] for name in unread)


@pytest.mark.parametrize("name", ["a.md", "a.TXT", "a.py", "a.rst", "LICENSE"])
def test_text_is_read_whatever_its_name_ends_in(tmp_path: Path, name: str) -> None:
    folder = write(tmp_path / "texts [v2]", name, f"deep/{name}")
    corpus = load(folder)
    assert files_in(corpus.train) == [name, f"deep/{name}"]
    assert files_in(load(folder / name).train) == [name]
    assert files_in(load(f"{folder}/*").train) == [name]
    assert len(load(folder / name).train) == 38


def test_the_current_folder_is_a_dataset_and_nothing_is_none(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(write(tmp_path / "here", "a.txt", "results/run/lock.txt"))
    for name in ("config.json", "events.jsonl"):
        (tmp_path / "here" / "results" / "run" / name).write_text("{}")
    corpus = load(".")
    assert (corpus.name, files_in(corpus.train)) == ("here", ["a.txt"])
    assert "folders of runs or environments (results/run/)" in corpus.read
    for empty in ("", " "):
        with pytest.raises(ValueError, match=r"--dataset is empty .*'\.' is the current one"):
            load(empty)
        with pytest.raises(ValueError, match="--dataset is empty"):
            resolve("fed_avg", {"dataset": empty})


def test_links_are_followed_once_and_never_up(tmp_path: Path) -> None:
    write(tmp_path / "elsewhere", "far.txt")
    folder = write(tmp_path / "set", "near/a.txt")
    os.symlink(tmp_path / "elsewhere", folder / "away")
    os.symlink(tmp_path / "elsewhere", folder / "again")
    os.symlink("../..", folder / "near" / "up")
    os.symlink("nowhere", folder / "broken")
    os.mkfifo(folder / "pipe")
    corpus = load(folder)
    assert files_in(corpus.train) == ["far.txt", "near/a.txt"]
    assert corpus.documents.sources == ["again", "near"]
    assert "pipe" in corpus.read.partition("not read")[2]
    assert "broken" in corpus.read.partition("not read")[2]


def test_what_cannot_be_read_is_left_out_and_said(tmp_path: Path) -> None:
    folder = write(tmp_path / "set", "a.txt", "b.txt", "c.jsonl", "README.md", ".hidden.txt",
                   "__pycache__/d.txt")
    (folder / "photo.png").write_bytes(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR")
    corpus = load(folder)
    assert files_in(corpus.train) == ["a.txt", "b.txt"]
    for told in ("train: 2 files (2 .txt)", "not read: 1 not text (photo.png)",
                 "1 of json, beside more of text (name them to read them) (c.jsonl)",
                 "1 describing the dataset (README.md)"):
        assert told in corpus.read
    assert files_in(load(folder / "c.jsonl").train) == ["c.jsonl"]
    notes = load(write(tmp_path / "notes", "README.md", "other.md"))
    assert files_in(notes.train) == ["README.md", "other.md"]


def test_a_folder_without_text_says_what_was_looked_for_and_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "photo.png").write_bytes(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR")
    for dataset in (tmp_path, tmp_path / "photo.png"):
        with pytest.raises(ValueError, match=r"--dataset .*: nothing there can be read: text "
                                             r".*\.jsonl.* are looked for.*; there is photo.png"):
            load(dataset)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"--dataset .*empty: the folder holds no file"):
        load(tmp_path / "empty")
    with pytest.raises(ValueError, match=r"--dataset .*missing.txt: no such file, folder or name"):
        load("corpus/missing.txt")
    with pytest.raises(ValueError, match=r"--dataset aaa.*: File name too long"):
        load("a" * 5000)


def test_files_that_may_not_be_read_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch
                                              ) -> None:
    folder = write(tmp_path / "set", "a.txt", "deep/b.txt")

    def refuse(path: object, *args: object, **kwargs: object) -> object:
        raise PermissionError(13, "Permission denied", str(path))

    with monkeypatch.context() as locked:
        locked.setattr(Path, "open", refuse)
        with pytest.raises(ValueError, match=rf"--dataset {folder}: {folder}/a\.txt: cannot be "
                                             "read: Permission denied"):
            load(folder)
    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(ValueError, match=rf"--dataset {folder}: .*set: Permission denied"):
        load(folder)


# ---- one file, tables, compressed ---------------------------------------------------------------

def table_file(path: Path) -> Path:
    """Forty records with the columns text and n, in the format that the name says."""
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
def test_compressed_text_is_text(tmp_path: Path, ending: str, pack: object) -> None:
    text = "".join(f"{line}\n" for line in lines("it"))
    file = tmp_path / f"a.{ending}"
    file.write_bytes(pack(text.encode()))  # type: ignore[operator]
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


@pytest.mark.parametrize(("name", "content", "said"), [
    ("a.jsonl", '{"text": "a"}\n{"text": "b"}\n{"text"\n', r"line 3: not JSON: "),
    ("a.json", "[1, 2]", "objects with named values are expected"),
    ("a.json", "[" * 100_000, "not JSON: .*recursion"),
    ("a.json", "", "there are no records"),
    ("a.csv", 'id,text\n1,"open\n2,x\n', "not a table: .*EOF inside string"),
    ("a.csv", "text\n" + "a,b,c\n" * 9, "not a table: its lines have more values than the first"),
    ("a.parquet", "PAR1 and no more", "cannot be read: "), ("a.arrow", "no" * 40, "cannot be read"),
])
def test_a_damaged_table_is_named_with_the_place(tmp_path: Path, name: str, content: str, said: str
                                                 ) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=rf"^--dataset \S*{name}: {said}"):
        load(tmp_path / name)


# ---- columns ------------------------------------------------------------------------------------

def records(path: Path, n: int = 60, users: int = 3) -> Path:
    path.write_text("".join(json.dumps({"title": f"Title {i}", "body": f"Body {i}", "n": i,
                                        "user": f"user {i % users}"}) + "\n" for i in range(n)))
    return path


def test_text_columns_are_named_by_a_flag_that_the_error_names(tmp_path: Path) -> None:
    file = records(tmp_path / "a.jsonl")
    with pytest.raises(ValueError, match=r"--dataset .*the columns are title, body, n \(no texts\),"
                                         r" user; name it with --text_column"):
        load(file)
    assert load(file, text_column="body").train[:2] == ["Body 0", "Body 1"]
    assert load(file, text_column="title,body").train[1] == "Title 1\n\nBody 1"
    with pytest.raises(ValueError, match=r"^--text_column tilte: there is no column tilte; the "
                                         r"columns are title"):
        load(file, text_column="tilte")
    with pytest.raises(ValueError, match="--text_column body: these are text files"):
        load(write(tmp_path / "texts", "a.txt"), text_column="body")


def test_tables_that_do_not_do_are_no_reason_to_hide_the_text_beside_them(tmp_path: Path) -> None:
    folder = write(tmp_path / "set", "a.txt")
    for name in ("one.json", "two.json"):
        (folder / name).write_text(json.dumps({"lr": 0.1, "seed": 3}))
    with pytest.raises(ValueError, match=r"the columns are lr \(no texts\), .*; not read: 1 of "
                                         r"text, beside more of json \(name .*\) \(a\.txt\)"):
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


def test_configurations_are_named_after_the_folder(tmp_path: Path) -> None:
    folder = write(tmp_path / "set", "en/a.jsonl", "fr/one.jsonl", "fr/two.jsonl")
    assert files_in(load(f"{folder}:en").train) == ["en/a.jsonl"]
    with pytest.raises(ValueError, match=r"no configuration de: .* the folders there are en, fr"):
        load(f"{folder}:de")
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: english\n  data_files: en/*.jsonl\n- config_name: french\n"
        "  data_files:\n  - split: train\n    path: fr/one.jsonl\n  - split: test\n"
        "    path: [fr/two.jsonl]\n---\n# A dataset\n")
    assert files_in(load(f"{folder}:english").train) == ["en/a.jsonl"]
    french = load(f"{folder}:french", validation_split="test")
    assert (files_in(french.train), files_in(french.validation)) == (
        ["fr/one.jsonl"], ["fr/two.jsonl"])
    assert french.name == "set:french"
    with pytest.raises(ValueError, match=r"several configurations \(english, french\)"):
        load(folder)
    with pytest.raises(ValueError, match="no configuration de; there are english, french"):
        load(f"{folder}:de")
    (folder / "README.md").write_text("---\nconfigs:\n- data_dir: fr\n---\n")
    assert files_in(load(folder).train) == ["fr/one.jsonl", "fr/two.jsonl"]
    (folder / "README.md").write_text("---\nconfigs:\n- data_dir: ../..\n---\n")
    with pytest.raises(ValueError, match=r"the data_dir \.\./\.\. of default is not in the folder"):
        load(folder)
    (folder / "README.md").write_text("---\nconfigs: [\n---\n")
    with pytest.raises(ValueError, match=r"README\.md: its head cannot be read"):
        load(folder)
    (folder / "README.md").write_bytes(b"---\nNotes: of \xe9: all\n---\n")
    assert len(files_in(load(folder).train)) == 3


def test_how_text_is_read_is_part_of_the_caches_key_and_said_at_every_start(tmp_path: Path) -> None:
    choices: list[dict[str, object]] = [
        {}, {"text_column": "text"}, {"encoding": "latin-1"}, {"val_fraction": 0.1},
        {"validation_split": "test"}, {"partition": "column:user"}, {"hold_out": False}]
    names = {entry.entry_name("pydocs", "bpe:400", Reading(**choice))  # type: ignore[arg-type]
             for choice in choices}
    assert len(names) == len(choices)
    folder = write(tmp_path / "set", "a.txt", "b.txt", "c.json")
    for _ in ("cold", "warm"):
        said: list[str] = []
        tokens.prepare(str(folder), "bpe:300", 16, tmp_path, said.append)
        assert said[-2].startswith("read from set: train: 2 files (2 .txt); not read: 1 of json")


# ---- encodings ----------------------------------------------------------------------------------

def test_other_encodings_are_named_with_file_place_and_way_out(tmp_path: Path) -> None:
    folder = write(tmp_path / "set", "a.txt")
    (folder / "b.txt").write_bytes(("x\n" * 9 + "café\n").encode("latin-1"))
    for dataset in (folder, folder / "b.txt", folder / "*.txt"):
        with pytest.raises(ValueError, match=r"b\.txt: not UTF-8 text \(byte 0xe9 at position 21, "
                                             r"line 10\); --encoding latin-1"):
            load(dataset)
    assert load(folder, encoding="latin-1").validation[-1] == "café"
    (folder / "b.txt").write_bytes(b"x\n" * (1 << 20) + b"caf\xe9")
    with pytest.raises(ValueError, match=r"byte 0xe9 at position 2097155, line 1048577"):
        load(folder)
    (folder / "b.txt").write_bytes("and here\n".encode("utf-16-le") * 9)
    with pytest.raises(ValueError, match=r"b.txt: not UTF-8 .*--encoding utf-16-le"):
        load(folder)
    with pytest.raises(ValueError, match="--encoding latin-one: must be an encoding known"):
        resolve("fed_avg", {"encoding": "latin-one"})


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16-le", "utf-16-be", "utf-32-le"])
def test_a_byte_order_mark_tells_the_encoding_and_is_no_text(tmp_path: Path, encoding: str) -> None:
    text = "".join(f"{line} café\n" for line in lines("it"))
    (tmp_path / "a.txt").write_bytes(("\ufeff" + text).encode(encoding))
    assert load(tmp_path / "a.txt").train == text.splitlines(keepends=True)[:38]
    (tmp_path / "a.csv").write_bytes(("\ufefftext\n" + text).encode(encoding))
    assert load(tmp_path / "a.csv").train == text.splitlines()[:38]


# ---- what is held out ---------------------------------------------------------------------------

@pytest.mark.parametrize(("text", "cut"), [
    ("word " * 2000, "word "), ("ACGT" * 1000, "ACGT"), ("A paragraph.\n\n" * 200, "graph.\n\n")])
def test_a_text_of_one_row_lends_its_end(tmp_path: Path, text: str, cut: str) -> None:
    (tmp_path / "a.json").write_text(json.dumps([text]))
    corpus = load(tmp_path / "a.json")
    assert (len(corpus.train), len(corpus.validation)) == (1, 1)
    assert corpus.train[0] + corpus.validation[0] == text
    assert corpus.train[0].endswith(cut)
    assert 0.02 < len(corpus.validation[0]) / len(text) < 0.08
    assert corpus.validation_from == "the last twentieth of the text"


def test_blank_lines_at_the_end_are_no_validation_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("".join(f"{line}\n" for line in lines("it")) + "\n" * 40)
    corpus = load(tmp_path / "a.txt")
    assert [row.strip() for row in corpus.validation if row.strip()] == lines("it")[-2:]
    assert corpus.documents.starts[-1] == len(corpus.train)


def test_by_source_holds_out_of_every_source(tmp_path: Path) -> None:
    folder = write(tmp_path / "set", "a/1.txt", "a/2.txt", "b/1.txt")
    (folder / "c").mkdir()
    (folder / "c" / "1.txt").write_text("c/1.txt says little.\nc/1.txt says no more.\n")
    plain, fair = load(folder), load(folder, partition="by_source")
    assert plain.documents.sources == ["a", "b"]
    assert fair.documents.sources == ["a", "b", "c"]
    assert fair.documents.source.tolist() == [0, 0, 1, 2]
    assert files_in(fair.train) == ["a/1.txt", "a/2.txt", "b/1.txt", "c/1.txt"]
    assert fair.validation == [*lines("a/2.txt")[-4:], *lines("b/1.txt")[-2:]]
    assert fair.documents.starts.tolist() == [0, 40, 76, 114, 116]
    assert fair.validation_from == "the last twentieth of every source's train rows"
    assert sorted(fair.train + fair.validation) == sorted(plain.train + plain.validation)


def test_a_column_tells_the_sources(tmp_path: Path) -> None:
    file = records(tmp_path / "a.jsonl")
    corpus = load(file, partition="column:user", text_column="body")
    assert corpus.documents.sources == ["user 0", "user 1", "user 2"]
    assert corpus.documents.starts.tolist() == [0, 19, 38, 57]
    assert corpus.train[:3] == ["Body 0", "Body 3", "Body 6"]
    assert corpus.validation == ["Body 57", "Body 58", "Body 59"]
    with pytest.raises(ValueError, match=r"^--partition column:author: there is no column author; "
                                         r"the columns are title"):
        load(file, partition="column:author", text_column="body")
    with pytest.raises(ValueError, match="--partition column:user: these are text files"):
        load(write(tmp_path / "texts", "a.txt"), partition="column:user")


def test_flags_say_what_is_validated_on(tmp_path: Path) -> None:
    folder = write(tmp_path / "set", "train.txt", "test.txt")
    corpus = load(folder)
    assert (len(corpus.train), corpus.validation) == (38, lines("train.txt")[38:])
    assert "1 in the split test (test.txt)" in corpus.read
    corpus = load(folder, validation_split="test")
    assert (corpus.train, corpus.validation) == (lines("train.txt"), lines("test.txt"))
    write(folder, "validation.txt", "unseen/a.txt")
    assert load(folder, validation_split="unseen").validation == lines("unseen/a.txt")
    assert load(folder, val_fraction=0.25).validation == lines("train.txt")[30:]
    assert load(folder).validation == lines("validation.txt")
    assert load(folder / "train.txt", hold_out=False).validation == \
        [f"{line}\n" for line in lines("train.txt")]
    with pytest.raises(ValueError, match="--validation_split dve: there is no such split beside "
                                         "train; there is train, validation, test"):
        load(folder, validation_split="dve")
    with pytest.raises(ValueError, match=r"--val_fraction 1\.5: must be in \(0, 1\)"):
        resolve("fed_avg", {"val_fraction": 1.5})


def test_documents_without_a_row_are_left_out() -> None:
    from fedrun.data.documents import Documents
    from fedrun.data.holdout import _restricted

    documents = Documents("a test", np.array([0, 2, 3, 5]), np.array([0, 1, 0]), ["x", "y"])
    left = _restricted(documents, np.array([True, False, False, True, True]))
    assert (left.starts.tolist(), left.source.tolist()) == ([0, 1, 3], [0, 0])
