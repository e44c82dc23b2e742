"""Rows that are held out for validation: from which rows, sources and splits."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from fedrun.flags import resolve
from tests.support.texts import files_in, lines, load, records, write


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
    with pytest.raises(ValueError, match="--partition column:user: the dataset is text"):
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
    with pytest.raises(ValueError, match=r"--validation_split dve: must be one of .* other "
                                         r"than train; it has train, validation, test"):
        load(folder, validation_split="dve")
    with pytest.raises(ValueError, match=r"--val_fraction 1\.5: must be"):
        resolve("fed_avg", {"val_fraction": 1.5})


def test_documents_without_a_row_are_left_out() -> None:
    from fedrun.data.documents import Documents
    from fedrun.data.validation import _with_rows_removed

    documents = Documents("a test", np.array([0, 2, 3, 5]), np.array([0, 1, 0]), ["x", "y"])
    left = _with_rows_removed(documents, np.array([1, 0, 2]))
    assert (left.starts.tolist(), left.source.tolist()) == ([0, 1, 3], [0, 0])
