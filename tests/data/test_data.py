"""Corpora and tokens: real text, and every error that a user can make."""

from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pytest

from fedrun.data import corpora
from fedrun.data.corpora import load_corpus
from fedrun.data.pydocs import SHORTEST_REPEAT, read_pydocs
from fedrun.data.text_options import TextOptions
from fedrun.data.tokens import prepare
from tests.support.runs import SHARED_DATA

WIKITEXT = SHARED_DATA / "wikitext-2-heldout"
GPT2 = SHARED_DATA / "gpt2"
needs_shared_data = pytest.mark.skipif(
    not WIKITEXT.is_dir() or not GPT2.is_dir(),
    reason="no real text and tokenizer in ../shared/data",
)
WITHOUT_NETWORK = "--dataset pydocs --tokenizer bpe:8192"


def python(code: str, limit: float = 60, **env: str) -> str:
    """What a fresh Python prints."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=limit,
        env={**os.environ, **env},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def text_file(folder: Path, n_lines: int = 400) -> Path:
    file = folder / "tale.txt"
    lines = [
        f"{n} ships went out to sea, and {n // 2} of them came home.\n" for n in range(n_lines)
    ]
    file.write_text("".join(lines), encoding="utf-8")
    return file


def dataset_folder(folder: Path, **columns: list[object]) -> Path:
    """A folder as datasets.load_dataset reads it, with a train split alone."""
    folder.mkdir()
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


# ---------------------------------------------------------------------------------------------
# pydocs


@pytest.fixture(scope="module")
def pydocs() -> dict[str, str]:
    return read_pydocs(corpora.local_files("pydocs"))


@pytest.fixture(scope="module")
def pydocs_corpus() -> corpora.Corpus:
    return load_corpus("pydocs")


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
    pydocs: dict[str, str], pydocs_corpus: corpora.Corpus
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
    pydocs_corpus: corpora.Corpus,
) -> None:
    printed = python(
        "import sys; from fedrun.data.corpora import load_corpus\n"
        "print(load_corpus('pydocs').fingerprint, 'turtle' in sys.modules, 'cmd' in sys.modules)",
        PYTHONHASHSEED="1",
    )
    assert printed == f"{pydocs_corpus.fingerprint} False False\n"


# ---------------------------------------------------------------------------------------------
# Folders and text files


@needs_shared_data
def test_a_folder_is_read_as_the_hub_would_serve_it() -> None:
    import pyarrow.parquet

    corpus = load_corpus(str(WIKITEXT))
    assert corpus.name == "wikitext-2-heldout"
    assert (len(corpus.train), len(corpus.validation)) == (4358, 3760)
    for split, rows in (("train", corpus.train), ("validation", corpus.validation)):
        table = pyarrow.parquet.read_table(WIKITEXT / f"{split}.parquet")
        assert rows == table["text"].to_pylist()


def test_the_last_twentieth_is_held_out_where_there_is_no_validation_split(tmp_path: Path) -> None:
    said: list[str] = []
    file = text_file(tmp_path)
    corpus = load_corpus(str(tmp_path / "*.txt"))
    lines = file.read_text().splitlines(keepends=True)
    assert (corpus.train, corpus.validation) == (lines[:380], lines[380:])
    prepare(str(file), "bpe:300", 16, tmp_path / "cache", said.append)
    assert "validation is the last twentieth of the train rows" in said[-1]


def test_text_files_follow_each_other_in_the_order_of_their_names(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("second\n" * 20)
    (tmp_path / "a.txt").write_text("first\x0cstill first\n" * 20)
    rows = load_corpus(str(tmp_path / "*.txt"))
    assert rows.train[:20] == ["first\x0cstill first\n"] * 20
    assert rows.validation == ["second\n"] * 2


@pytest.mark.parametrize("column", ["text", "story"])
def test_the_text_column_is_text_or_the_only_strings(tmp_path: Path, column: str) -> None:
    other: list[object] = ["label"] * 20 if column == "text" else list(range(20))
    rows: list[object] = [None, *(f"row {n}" for n in range(1, 20))]
    folder = dataset_folder(tmp_path / "set", other=other, **{column: rows})
    corpus = load_corpus(str(folder))
    assert corpus.train == ["", *rows[1:19]]
    assert corpus.validation == rows[19:]


def test_a_doubtful_text_column_is_an_error_that_names_the_columns(tmp_path: Path) -> None:
    folder = dataset_folder(tmp_path / "set", title=["a", "b"], story=["c", "d"])
    with pytest.raises(ValueError, match=r"--dataset .*set: .* columns are title, story; .*--text"):
        load_corpus(str(folder))
    (folder / "train.jsonl").rename(folder / "test.jsonl")
    with pytest.raises(ValueError, match=r"--dataset .*set: .*no train split, only test"):
        load_corpus(str(folder))


@pytest.mark.parametrize("text", ["", " \n\n", "x"])
def test_an_empty_corpus_names_the_flag(tmp_path: Path, text: str) -> None:
    file = tmp_path / "empty.txt"
    file.write_text(text)
    with pytest.raises(ValueError, match=r"--dataset .*empty.txt: the corpus has no text"):
        prepare(str(file), "bpe:300", 16, tmp_path / "cache", lambda line: None)


@pytest.mark.parametrize("dataset", ["wikitext-3", "./missing", "../a/b", "missing/*.txt"])
def test_an_unknown_dataset_lists_what_there_is(dataset: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--dataset .*wikitext-2, wikitext-103, pydocs"):
        prepare(dataset, "bpe:300", 16, tmp_path, lambda line: None)


def test_a_file_that_is_not_text_names_the_flag(tmp_path: Path) -> None:
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\xff\xfe")
    with pytest.raises(ValueError, match=r"--dataset .*picture.png: not UTF-8 text"):
        load_corpus(str(tmp_path / "picture.png"))


# ---------------------------------------------------------------------------------------------
# Tokens


@needs_shared_data
def test_tokens_are_those_of_the_rows_end_to_end(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    data = prepare(str(WIKITEXT), str(GPT2), 256, tmp_path, lambda line: None)
    tokenizer = AutoTokenizer.from_pretrained(GPT2)
    corpus = load_corpus(str(WIKITEXT))
    for rows, sequences in ((corpus.train, data.train), (corpus.validation, data.validation)):
        ids: list[int] = []
        for row in rows:
            ids += tokenizer(row if row.endswith("\n") else row + "\n")["input_ids"]
        whole = len(ids) // 256
        np.testing.assert_array_equal(sequences, np.reshape(ids[: whole * 256], (whole, 256)))
    assert (data.train.shape, data.validation.shape) == ((1150, 256), (1005, 256))
    assert (data.train.dtype, data.vocab_size) == (np.uint16, 50257)
    assert data.load_tokenizer()("Once upon a time,")["input_ids"] == [7454, 2402, 257, 640, 11]
    assert data.fingerprint["dataset_sha256"] == corpus.fingerprint
    json.dumps(data.fingerprint)


def test_bpe_decodes_to_the_text_it_was_trained_on(tmp_path: Path) -> None:
    corpus = load_corpus(str(text_file(tmp_path)))
    data = prepare(str(tmp_path / "tale.txt"), "bpe:300", 16, tmp_path / "cache", lambda line: None)
    decoded = data.load_tokenizer().decode(data.train.reshape(-1).tolist())
    text = "".join(corpus.train)
    assert len(decoded) > len(text) - 16 * 20
    assert text.startswith(decoded)
    assert data.vocab_size == 300
    assert data.load_tokenizer().eos_token_id == 0


def test_bpe_is_the_same_in_every_process(tmp_path: Path) -> None:
    code = (
        "import hashlib, sys; from pathlib import Path; from fedrun.data.tokens import prepare\n"
        "data = prepare('pydocs', 'bpe:600', 64, Path(sys.argv[1]), lambda line: None)\n"
        "print(data.fingerprint, hashlib.sha256(data.train.tobytes()).hexdigest())"
    )
    printed = {
        python(f"import sys; sys.argv[1:] = [{str(tmp_path / n)!r}]\n{code}",
               PYTHONHASHSEED=n, RAYON_NUM_THREADS=n, TOKENIZERS_PARALLELISM="true")
        for n in ("1", "2")
    }  # fmt: skip
    assert len(printed) == 1
    assert "'vocab_size': 600" in printed.pop()


def test_a_large_vocabulary_takes_int32(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<unk>": 0, **{str(n): n for n in range(1, 70_000)}}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.enable_truncation(5)  # a limit of the model it was made for, not of ours
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path / "words")
    numbers = range(60_000, 69_999)
    (tmp_path / "numbers.txt").write_text("\n".join(" ".join(map(str, numbers)) for _ in range(20)))
    data = prepare(str(tmp_path / "numbers.txt"), str(tmp_path / "words"), 100, tmp_path, print)
    assert (data.train.dtype, data.vocab_size) == (np.int32, 70_000)
    assert data.train[1].tolist() == list(range(60_100, 60_200))


@pytest.mark.parametrize("tokenizer", ["bpe:256", "bpe:many", "bpe:-400", "bpe:", "./missing"])
def test_a_tokenizer_that_cannot_be_names_the_flag(tokenizer: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"--tokenizer {tokenizer}: .*bpe:N with N >= 257"):
        prepare("pydocs", tokenizer, 16, tmp_path, lambda line: None)


def test_a_folder_without_a_tokenizer_names_the_flag(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"--tokenizer .*empty: "):
        prepare(str(text_file(tmp_path)), str(tmp_path / "empty"), 16, tmp_path, lambda line: None)


def test_too_few_validation_tokens_name_both_flags(tmp_path: Path) -> None:
    file = str(text_file(tmp_path, n_lines=200))
    with pytest.raises(ValueError, match=r"--sequence_length 256: the validation .*--dataset .*"
                                         r"has only (\d+) tokens, (\d+) too few .*, or "
                                         r"--val_fraction ([\d.]+)") as caught:
        prepare(file, "bpe:300", 256, tmp_path, lambda line: None)
    found = re.search(r"only (\d+) tokens, (\d+) too few.*fraction ([\d.]+)", str(caught.value))
    assert found
    assert int(found[1]) + int(found[2]) == 256
    data = prepare(file, "bpe:300", 256, tmp_path, lambda line: None,
                   TextOptions(val_fraction=float(found[3])))
    assert len(data.validation) >= 1
    assert len(data.train) >= 1
