"""Documents and their topics, on real and on generated text."""

from __future__ import annotations

import errno
import itertools
import json
import os
import shutil
import subprocess
import sys
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedrun.config import Partition
from fedrun.data import cache_entry, tokens, topics
from fedrun.data import documents as documents_module
from fedrun.data.documents import Documents, find_documents
from fedrun.data.partition import client_shards, deal_topics
from fedrun.data.tokens import TokenData, prepare
from fedrun.data.topics import find_topics
from tests.support.texts import GPT2, WIKITEXT, load, needs_shared_data, on_disk

# ---- documents ----------------------------------------------------------------------------------

@given(st.lists(st.integers(1, 30), min_size=1, max_size=30), st.integers(1, 12),
       st.integers(1, 99))
def test_a_sequence_belongs_where_most_of_its_tokens_come_from(lengths: list[int], length: int,
                                                               at_once: int) -> None:
    starts = np.concatenate([[0], np.cumsum(lengths)])
    documents = Documents("a test", starts, np.array([], np.int64), [])
    of_token = np.repeat(np.arange(len(lengths)), lengths)
    n = len(of_token) // length
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents_module, "TOKENS_AT_ONCE", at_once)
        found = documents.of_sequences(n, length).tolist() if n else []
    for sequence, document in enumerate(found):
        there = Counter(of_token[sequence * length:(sequence + 1) * length].tolist())
        assert document == min(d for d in there if there[d] == max(there.values()))


def test_wikitext_articles_begin_at_top_headings() -> None:
    rows = ["", " = One = \n", "", " Text . \n", " = = Section = = \n", "", " x\n", " = y = \n",
            " where y is a formula\n", "", " = Two ( song ) = \n", "", " Text . \n"]
    found = find_documents(on_disk(rows), [])
    assert (found.kind, found.sources) == ("an article", ["One", "Two ( song )"])
    assert found.starts.tolist() == [0, 10, 13]


def test_rows_without_headings_are_documents() -> None:
    found = find_documents(on_disk(["a story\n\nof two parts", "", "another"]), [])
    assert (found.kind, len(found), found.sources) == ("a row", 3, [])


@needs_shared_data
def test_real_wikitext_has_its_articles_and_their_topics(tmp_path: Path) -> None:
    data = prepare(str(WIKITEXT), str(GPT2), 256, tmp_path)
    documents, tokenizer = data.load_documents(), data.load_tokenizer()
    assert len(documents) == 60  # as many as WikiText's test split is known to have
    assert {"Du Fu", "Kiss You ( One Direction song )"} <= set(documents.sources)
    stream = np.memmap(data.tokenizer_path.parent / "train.bin", data.train.dtype, mode="r")
    assert documents.starts[-1] == len(stream)
    for n, title in enumerate(documents.sources):
        beginning = tokenizer.decode(stream[documents.starts[n]:][:60].tolist())
        assert isinstance(beginning, str)
        assert beginning.strip().startswith(f"= {title} =")
    topic = data.load_topics().of_document
    about = {name: topic[documents.sources.index(name)] for name in documents.sources}
    storms = [t for name, t in about.items() if "hurricane" in name.lower()
              or "typhoon" in name.lower() or "cyclone" in name.lower()]
    songs = [t for name, t in about.items() if "song" in name or "album" in name.lower()]
    assert storms
    assert songs
    assert not set(storms) & set(songs)
    for partition in get_args(Partition):
        shards = client_shards(data, 4, partition, 0.3, 0.4, 0)
        assert sum(map(len, shards)) == 1150


@pytest.mark.slow
def test_pydocs_documents_are_modules_and_sources_packages(pydocs_tokens: TokenData) -> None:
    documents, tokenizer = pydocs_tokens.load_documents(), pydocs_tokens.load_tokenizer()
    corpus = load("pydocs")
    assert len(documents) == len(corpus.train)
    assert {"topics", "asyncio", "email", "argparse"} <= set(documents.sources)
    stream = np.memmap(pydocs_tokens.tokenizer_path.parent / "train.bin",
                       pydocs_tokens.train.dtype, mode="r")
    for n in (0, 7, len(documents) // 2, len(documents) - 1):
        text = tokenizer.decode(stream[documents.starts[n]:documents.starts[n + 1]].tolist())
        assert text == corpus.train[n] + "\n"
    assert pydocs_tokens.fingerprint["train_documents"] == len(documents)
    (number,) = [n for n, text in enumerate(corpus.train) if text.startswith("asyncio.events\n")]
    assert documents.sources[documents.source[number]] == "asyncio"


def write_files(folder: Path) -> None:
    for name in ("news/a.txt", "news/deep/b.txt", "sport/c.txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"The file {name}\n\nhas lines.\n" * 30)


@pytest.mark.parametrize("form", ["pattern", "folder"])
def test_text_files_are_documents_and_their_top_folders_sources(tmp_path: Path, form: str) -> None:
    write_files(tmp_path / "texts")
    corpus = load(tmp_path / "texts" / "**" / "*.txt" if form == "pattern"
                  else tmp_path / "texts")
    assert corpus.documents.kind == "a file"
    assert corpus.documents.sources == ["news", "sport"]
    assert corpus.documents.source.tolist() == [0, 0, 1]
    for number, start in enumerate(corpus.documents.starts[:-1]):
        assert corpus.train[start].strip() == (
            f"The file {['news/a.txt', 'news/deep/b.txt', 'sport/c.txt'][number]}")
    assert corpus.documents.starts[-1] == len(corpus.train)


def test_files_that_lie_together_have_no_sources_and_a_lone_one_has_paragraphs(tmp_path: Path
                                                                               ) -> None:
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text("one\ntwo\n\n\nthree\n\n" * 10)
    together = load(tmp_path / "*.txt").documents
    assert (together.kind, len(together), together.sources) == ("a file", 2, [])
    alone = load(tmp_path / "a.txt").documents
    assert (alone.kind, alone.starts[:4].tolist()) == ("a paragraph", [0, 4, 6, 10])


def test_a_cache_of_another_layout_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    now = cache_entry.entry_name("pydocs", "bpe:400")
    monkeypatch.setattr(cache_entry, "LAYOUT", 1)
    assert cache_entry.entry_name("pydocs", "bpe:400") != now


# ---- topics -------------------------------------------------------------------------------------

def planted(n_documents: int = 120, n_topics: int = 4) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Documents of which half the tokens occur in their topic only: stream, starts, topics."""
    random = np.random.default_rng(5)
    topic = random.choice(n_topics, size=n_documents, p=[0.4, 0.3, 0.2, 0.1])
    lengths = random.integers(60, 120, size=n_documents)
    parts = [np.where(random.random(length) < 0.5, 100 + 30 * t + random.integers(30, size=length),
                      random.integers(100, size=length))
             for t, length in zip(topic, lengths, strict=True)]
    return np.concatenate(parts), np.concatenate([[0], np.cumsum(lengths)]), topic


def test_planted_topics_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    stream, starts, topic = planted()
    monkeypatch.setattr(topics, "TOPICS", 4)
    found = find_topics(stream, starts, 220)
    assert len(set(zip(topic.tolist(), found.of_document.tolist(), strict=True))) == 4
    sizes = np.bincount(found.of_document, weights=np.diff(starts))
    assert (np.diff(sizes) <= 0).all()
    for number in range(4):
        (own,) = set(topic[found.of_document == number].tolist())
        assert set((found.typical[number, :10] - 100) // 30) == {own}
    again = find_topics(stream, starts, 220)
    np.testing.assert_array_equal(found.of_document, again.of_document)
    # In small portions, and found on some of the documents: the others are assigned to them.
    monkeypatch.setattr(topics, "TOKENS_AT_ONCE", 500)
    np.testing.assert_array_equal(find_topics(stream, starts, 220).of_document, found.of_document)
    monkeypatch.setattr(topics, "DOCUMENTS_AT_ONCE", 3)
    np.testing.assert_array_equal(find_topics(stream, starts, 220).of_document, found.of_document)
    monkeypatch.setattr(topics, "FITTED_ON", 40)
    np.testing.assert_array_equal(find_topics(stream, starts, 220).of_document, found.of_document)


def test_long_documents_are_counted_in_pieces_and_few_of_them_fitted_on(
        monkeypatch: pytest.MonkeyPatch) -> None:
    stream, starts, _ = planted()
    naive = np.array([np.bincount(stream[begin:end], minlength=220)
                      for begin, end in itertools.pairwise(starts)])
    monkeypatch.setattr(topics, "TOKENS_AT_ONCE", 7)
    for chosen in (None, np.array([0, 1, 5, 119])):
        blocks = list(topics._counts(stream, starts, 220, chosen))
        assert [span.start for span, _ in blocks] == list(range(len(blocks)))
        np.testing.assert_array_equal(np.concatenate([part.toarray() for _, part in blocks]),
                                      naive if chosen is None else naive[chosen])
    every = topics._to_fit_on(starts, 220)
    assert every.tolist() == list(range(120))
    monkeypatch.setattr(topics, "MOST_ENTRIES", 1000)
    fewer = topics._to_fit_on(starts, 220)
    lengths = np.minimum(np.diff(starts), 220)
    assert 1000 - 120 < lengths[fewer].sum() <= 1000
    assert 7 < len(set(fewer.tolist())) == len(fewer)


def test_memory_for_topics_is_that_of_a_block_and_a_little_for_each_document(
        monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 8,000 documents and of 80,000, of three tokens each, with topics fitted on as many."""
    monkeypatch.setattr(topics, "FITTED_ON", 300)
    monkeypatch.setattr(topics, "DOCUMENTS_AT_ONCE", 1024)
    monkeypatch.setattr(documents_module, "TOKENS_AT_ONCE", 4096)
    find_topics(*planted()[:2], 220)  # imports what it needs
    peaks = []
    for n_documents in (8_000, 80_000):
        starts = np.arange(n_documents + 1) * 3
        stream = np.random.default_rng(1).integers(300, size=starts[-1]).astype(np.uint16)
        tracemalloc.start()
        found = find_topics(stream, starts, 300)
        owner = Documents("a row", starts, np.empty(0, np.int64), []).of_sequences(
            3 * n_documents // 4, 4)
        deal_topics(found.of_document[owner], owner, np.full(4, len(owner) // 4), 1.0,
                    np.random.default_rng(0))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] - peaks[0] < 64 * 72_000


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@pytest.mark.parametrize("n_documents", [1, 2, 11, 30])
def test_few_or_equal_documents_have_fewer_topics(n_documents: int) -> None:
    stream, starts = np.tile(np.arange(20), n_documents), np.arange(n_documents + 1) * 20
    assert find_topics(stream, starts, 30).of_document.tolist() == [0] * n_documents


def test_topics_are_found_once_and_alike_whatever_the_threads(
        tmp_path: Path, pydocs_tokens: TokenData, caplog: pytest.LogCaptureFixture,
        monkeypatch: pytest.MonkeyPatch) -> None:
    entry = pydocs_tokens.tokenizer_path.parent
    shutil.copytree(entry, tmp_path / "tokens" / entry.name,  # tokens, without their topics
                    ignore=shutil.ignore_patterns("topics*"))
    code = ("from pathlib import Path; from fedrun.common.log import print_log\n"
            "from fedrun.data.tokens import prepare\nprint_log(to_stderr=True)\n"
            f"data = prepare('pydocs', 'bpe:4096', 64, Path({str(tmp_path)!r}))\n"
            "print(data.load_topics().of_document.tolist())")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60,
                          env={"PATH": "", "OMP_NUM_THREADS": "2", "OPENBLAS_NUM_THREADS": "2"})
    assert "found topics among" in done.stderr
    assert "tokenising" not in done.stderr
    assert json.loads(done.stdout) == pydocs_tokens.load_topics().of_document.tolist()
    caplog.set_level("INFO", "fedrun")
    caplog.clear()
    monkeypatch.setattr(tokens, "find_topics", None)
    assert pydocs_tokens.load_topics().of_document.max() == topics.TOPICS - 1
    assert not caplog.messages


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@pytest.mark.parametrize(("documents", "topics_there"), [
    ([[0, 0, 1], [0, 0], [0, 1, 0], [0, 0], [0, 0]], 2),  # one token that tells them apart
    ([[0, 0], [0]], 1),  # none at all
])
def test_documents_that_hardly_differ(documents: list[list[int]], topics_there: int) -> None:
    starts = np.cumsum([0, *map(len, documents)])
    found = find_topics(np.concatenate(documents), starts, 3)
    assert len(set(found.of_document.tolist())) == topics_there
    assert len(found.typical) == topics_there
    if topics_there == 2:
        assert found.of_document.tolist() == [0, 1, 0, 1, 1]


def test_topics_are_found_beside_a_cache_that_may_only_be_read(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read_only(path: Path, *_: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
    write_files(tmp_path / "texts")
    data = prepare(str(tmp_path / "texts"), "bpe:300", 16, tmp_path)
    with monkeypatch.context() as mounted:
        mounted.setattr("fedrun.common.locks.acquire", read_only)
        found = data.load_topics()
        assert not list(data.tokenizer_path.parent.glob("topics*"))
    assert found.of_document.tolist() == data.load_topics().of_document.tolist()
    assert list(data.tokenizer_path.parent.glob("topics*"))


def test_topics_that_cannot_be_written_name_the_flag(tmp_path: Path) -> None:
    write_files(tmp_path / "texts")
    data = prepare(str(tmp_path / "texts"), "bpe:300", 16, tmp_path)
    entry = data.tokenizer_path.parent
    Path(f"{entry}.lock").unlink(missing_ok=True)
    Path(f"{entry}.lock").mkdir()
    with pytest.raises(ValueError, match=f"--cache_dir {tmp_path}: "):
        data.load_topics()
