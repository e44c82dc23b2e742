"""Corpora: real text, and every error that a user can make in naming one."""

from __future__ import annotations

import statistics
from pathlib import Path
from pydoc_data.topics import topics

import pytest

from fedrun.data import corpora
from fedrun.data.pydocs import SHORTEST_REPEAT, read_pydocs
from fedrun.data.tokens import prepare
from tests.support.runs import fresh_python
from tests.support.texts import (
    WIKITEXT,
    Loaded,
    dataset_folder,
    load,
    needs_shared_data,
    text_file,
)

# ---- pydocs -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pydocs() -> dict[str, str]:
    return read_pydocs(corpora.local_files("pydocs"))


@pytest.fixture(scope="module")
def pydocs_corpus() -> Loaded:
    return load("pydocs")


def test_pydocs_holds_topics_and_docstrings(pydocs: dict[str, str]) -> None:
    assert statistics.__doc__ is not None
    assert pydocs["module:statistics"].startswith(
        "statistics\n\n" + statistics.__doc__.strip()[:200]
    )
    assert "statistics.median\n\nReturn the median" in pydocs["module:statistics"]
    assert pydocs["topic:assert"] == topics["assert"].strip()
    assert 1.5e6 < sum(len(text.encode()) for text in pydocs.values()) < 3e6
    assert list(pydocs) == sorted(pydocs)


def test_pydocs_holds_out_topics_and_modules_and_nothing_that_train_says(
    pydocs: dict[str, str], pydocs_corpus: Loaded
) -> None:
    corpus = pydocs_corpus
    held_out = set(corpus.validation)
    assert sorted(corpus.train + corpus.validation) == sorted(pydocs.values())
    for kind in ("topic:", "module:"):
        texts = {text for name, text in pydocs.items() if name.startswith(kind)}
        share = sum(map(len, texts & held_out)) / sum(map(len, texts))
        assert 0.05 < share < 0.1, kind
        assert len(texts & held_out) >= 10

    def long_paragraphs(rows: list[str]) -> set[str]:
        paragraphs = (" ".join(p.split()) for row in rows for p in row.split("\n\n"))
        return {p for p in paragraphs if len(p) >= SHORTEST_REPEAT}

    assert not long_paragraphs(corpus.train) & long_paragraphs(corpus.validation)


def test_pydocs_is_the_same_in_another_process_and_imports_nothing_it_reads(
    tmp_path: Path, pydocs_corpus: Loaded,
) -> None:
    printed = fresh_python(
        "import sys; from pathlib import Path; from fedrun.data.corpora import load_corpus\n"
        "from fedrun.data.stored_rows import RowFiles\n"
        f"corpus = load_corpus('pydocs', RowFiles(Path({str(tmp_path)!r})))\n"
        "print(corpus.fingerprint, 'turtle' in sys.modules, 'cmd' in sys.modules)",
        env={"PYTHONHASHSEED": "1"},
    )
    assert printed == f"{pydocs_corpus.fingerprint} False False\n"


# ---- folders and text files ---------------------------------------------------------------------


@needs_shared_data
def test_a_folder_is_read_as_the_hub_would_serve_it() -> None:
    import pyarrow.parquet

    corpus = load(WIKITEXT)
    assert corpus.name == "wikitext-2-heldout"
    assert (len(corpus.train), len(corpus.validation)) == (4358, 3760)
    for split, rows in (("train", corpus.train), ("validation", corpus.validation)):
        table = pyarrow.parquet.read_table(WIKITEXT / f"{split}.parquet")
        assert rows == table["text"].to_pylist()


def test_the_last_twentieth_is_held_out_where_there_is_no_validation_split(
        tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "fedrun")
    file = text_file(tmp_path)
    corpus = load(tmp_path / "*.txt")
    lines = file.read_text().splitlines(keepends=True)
    assert (corpus.train, corpus.validation) == (lines[:380], lines[380:])
    prepare(str(file), "bpe:300", 16, tmp_path / "cache")
    assert "validation is the last twentieth of the train rows" in caplog.messages[-1]


def test_text_files_follow_each_other_in_the_order_of_their_names(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("second\n" * 20)
    (tmp_path / "a.txt").write_text("first\x0cstill first\n" * 20)
    rows = load(tmp_path / "*.txt")
    assert rows.train[:20] == ["first\x0cstill first\n"] * 20
    assert rows.validation == ["second\n"] * 2


@pytest.mark.parametrize("column", ["text", "story"])
def test_the_text_column_is_text_or_the_only_strings(tmp_path: Path, column: str) -> None:
    other: list[object] = ["label"] * 20 if column == "text" else list(range(20))
    rows: list[object] = [None, *(f"row {n}" for n in range(1, 20))]
    folder = dataset_folder(tmp_path / "set", other=other, **{column: rows})
    corpus = load(folder)
    assert corpus.train == ["", *rows[1:19]]
    assert corpus.validation == rows[19:]


def test_a_doubtful_text_column_is_an_error_that_names_the_columns(tmp_path: Path) -> None:
    folder = dataset_folder(tmp_path / "set", title=["a", "b"], story=["c", "d"])
    with pytest.raises(ValueError, match=r"--dataset .*set: .* columns are title, story; .*--text"):
        load(folder)
    (folder / "train.jsonl").rename(folder / "test.jsonl")
    with pytest.raises(ValueError, match=r"--dataset .*set: .*no train split, only test"):
        load(folder)


@pytest.mark.parametrize("text", ["", " \n\n", "x"])
def test_an_empty_corpus_names_the_flag(tmp_path: Path, text: str) -> None:
    file = tmp_path / "empty.txt"
    file.write_text(text)
    with pytest.raises(ValueError, match=r"--dataset .*empty.txt: the corpus has no text"):
        prepare(str(file), "bpe:300", 16, tmp_path / "cache")


@pytest.mark.parametrize("dataset", ["wikitext-3", "./missing", "../a/b", "missing/*.txt"])
def test_an_unknown_dataset_lists_what_there_is(dataset: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--dataset .*wikitext-2, wikitext-103, pydocs"):
        prepare(dataset, "bpe:300", 16, tmp_path)


def test_a_file_that_is_not_text_names_the_flag(tmp_path: Path) -> None:
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\xff\xfe")
    with pytest.raises(ValueError, match=r"--dataset .*picture.png: not UTF-8 text"):
        load(tmp_path / "picture.png")
