"""--max_tokens: the first rows with so many tokens, and little is read behind them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from fedrun.common.errors import InputError
from fedrun.data import corpora, partial_entry
from fedrun.data.limited_rows import LimitedRows
from fedrun.data.partial_entry import PartialEntry
from fedrun.data.stored_rows import RowFiles
from fedrun.data.text_options import TextOptions
from fedrun.data.tokenising_process import Encoder
from fedrun.data.tokens import TokenData, prepare
from fedrun.data.validation import Rows
from fedrun.flags import resolve
from tests.support.disk import no_space
from tests.support.first_rows import (
    MOST,
    ROWS,
    digests,
    first_rows,
    in_small_blocks,
    saved_tokenizer,
    write_rows,
)
from tests.support.runs import fresh_python
from tests.support.texts import load, text_file


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    return saved_tokenizer(tmp_path_factory.mktemp("tokenizer"))


# ---- which rows ---------------------------------------------------------------------------------

@pytest.mark.parametrize(("ending", "smallest", "largest", "processes"), [
    ("jsonl", 1, 1, 1), ("txt", 300, 900, 1), ("jsonl", 300, 900, 2), ("parquet", 300, 900, 1),
    ("txt", 1 << 16, 1 << 22, 1)])
def test_it_is_the_entry_of_the_first_rows(
        ending: str, smallest: int, largest: int, processes: int, tokenizer: str, tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch) -> None:
    whole = write_rows(tmp_path / f"whole.{ending}", ROWS)
    rows = [f"{row.rstrip()}\n" for row in ROWS] if ending == "txt" else ROWS
    part = write_rows(tmp_path / f"part.{ending}", first_rows(rows, tokenizer, MOST))
    expected = prepare(str(part), tokenizer, 16, tmp_path)
    in_small_blocks(monkeypatch, smallest, largest, processes)
    found = prepare(str(whole), tokenizer, 16, tmp_path, TextOptions(max_tokens=MOST))
    assert digests(found) == digests(expected)
    assert found.fingerprint["dataset_sha256"] == expected.fingerprint["dataset_sha256"]
    together = sum(found.fingerprint[f"{split}_tokens"] for split in ("train", "validation"))
    assert MOST <= together < MOST + 40


@pytest.mark.parametrize("options", [
    {"partition": "column:who", "text_column": "text"}, {"val_fraction": 0.3},
    {"row_separator": "none"}, {"hold_out": False}])
def test_rows_are_held_out_of_the_first_ones(options: dict[str, Any], tokenizer: str,
                                             tmp_path: Path, monkeypatch: pytest.MonkeyPatch
                                             ) -> None:
    in_small_blocks(monkeypatch, 300, 900, 1)
    whole = write_rows(tmp_path / "whole.jsonl", ROWS)
    found = prepare(str(whole), tokenizer, 4, tmp_path, TextOptions(max_tokens=MOST, **options))
    n_rows = len(first_rows(ROWS, tokenizer, MOST))
    if options.get("row_separator") == "none":
        loaded = Tokenizer.from_file(f"{tokenizer}/tokenizer.json")
        ends = np.cumsum([len(loaded.encode(row, add_special_tokens=False).ids) for row in ROWS])
        n_rows = 1 + int(np.searchsorted(ends, MOST))
    part = write_rows(tmp_path / "part.jsonl", ROWS[:n_rows])
    assert digests(found) == digests(prepare(str(part), tokenizer, 4, tmp_path,
                                             TextOptions(**options)))


def test_a_validation_split_is_read_up_to_a_twentieth(tokenizer: str, tmp_path: Path) -> None:
    write_rows(tmp_path / "set" / "train.jsonl", ROWS)
    write_rows(tmp_path / "set" / "validation.jsonl", ROWS[::-1])
    write_rows(tmp_path / "part" / "train.jsonl", first_rows(ROWS, tokenizer, MOST))
    write_rows(tmp_path / "part" / "validation.jsonl",
               first_rows(ROWS[::-1], tokenizer, MOST // 20))
    found = prepare(str(tmp_path / "set"), tokenizer, 16, tmp_path, TextOptions(max_tokens=MOST))
    assert digests(found) == digests(prepare(str(tmp_path / "part"), tokenizer, 16, tmp_path))
    assert found.fingerprint["validation_from"] == "the split of that name, at most 250 tokens"


@pytest.mark.parametrize("most", [1, 10**9])
def test_a_row_at_least_and_all_at_most(most: int, tokenizer: str, tmp_path: Path) -> None:
    whole = write_rows(tmp_path / "whole.jsonl", ROWS[1:])
    options = TextOptions(max_tokens=most, hold_out=False)
    found = prepare(str(whole), tokenizer, 4, tmp_path, options)
    part = write_rows(tmp_path / "part.jsonl", ROWS[1:2] if most == 1 else ROWS[1:])
    assert digests(found) == digests(prepare(str(part), tokenizer, 4, tmp_path,
                                             TextOptions(hold_out=False)))


def test_a_text_of_one_row_is_cut_in_two(tokenizer: str, tmp_path: Path) -> None:
    """Its parts are tokenised after all, since ids of the whole row are not those of both."""
    file = write_rows(tmp_path / "one.jsonl", [" ".join(ROWS[:90]), "more text"])
    part = write_rows(tmp_path / "part.jsonl", [" ".join(ROWS[:90])])
    found = prepare(str(file), tokenizer, 8, tmp_path, TextOptions(max_tokens=50))
    assert digests(found) == digests(prepare(str(part), tokenizer, 8, tmp_path))


def test_documents_of_pydocs_and_of_several_files(tokenizer: str, tmp_path: Path,
                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    pages = {f"module:{name}.{n}": f"{name} {n}: " + " ".join(ROWS[n:n + 4]) for n in range(99)
             for name in ("ast", "json")}
    monkeypatch.setattr(corpora, "read_pydocs", lambda _: pages)
    docs = prepare("pydocs", tokenizer, 16, tmp_path, TextOptions(max_tokens=MOST))
    documents, n_tokens = docs.load_documents(), docs.fingerprint["train_tokens"]
    assert 20 < len(documents) == len(documents.source) < 100
    assert MOST <= n_tokens == documents.starts[-1] < MOST + 200
    assert MOST // 20 <= docs.fingerprint["validation_tokens"] < MOST // 20 + 200
    for n in range(4):
        write_rows(tmp_path / "set" / f"{n}.txt", [f"{row}, said {n}" for row in ROWS[1:50]])
    found = prepare(str(tmp_path / "set"), tokenizer, 16, tmp_path, TextOptions(max_tokens=3_000))
    assert found.load_documents().kind == "a file"
    assert 1 < len(found.load_documents()) < 4


@pytest.mark.parametrize("largest", [1000, 1 << 22])
def test_a_tokenizer_is_trained_on_as_many_bytes(largest: int, tmp_path: Path,
                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    whole = write_rows(tmp_path / "whole.jsonl", ROWS)
    ends = np.cumsum([len(row.encode()) for row in ROWS])
    sample = write_rows(tmp_path / "sample.jsonl", ROWS[:1 + int(np.searchsorted(ends, MOST))])
    trained = prepare(str(sample), "bpe:300", 16, tmp_path, TextOptions(hold_out=False))
    in_small_blocks(monkeypatch, 300, largest, 1)
    found = prepare(str(whole), "bpe:300", 16, tmp_path, TextOptions(max_tokens=MOST))
    assert found.tokenizer_json == trained.tokenizer_json
    part = write_rows(tmp_path / "part.jsonl",
                      first_rows(ROWS, str(trained.tokenizer_path), MOST))
    assert digests(found) == digests(prepare(str(part), str(trained.tokenizer_path), 16, tmp_path))


def test_too_few_tokens_for_a_sequence(tokenizer: str, tmp_path: Path) -> None:
    file = write_rows(tmp_path / "whole.jsonl", ROWS)
    with pytest.raises(InputError, match=r"the validation split .* or more than --max_tokens 200$"):
        prepare(str(file), tokenizer, 64, tmp_path, TextOptions(max_tokens=200))


# ---- an interrupted start -----------------------------------------------------------------------

def failing(at: int) -> Callable[..., None]:
    """`PartialEntry.mark` that finds the disk full in its nth call, and records before it."""
    mark, calls = PartialEntry.mark, 0

    def limited(partial: PartialEntry, *said: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == at:
            raise no_space()
        mark(partial, *said)

    return limited


def test_after_an_interruption_anywhere_it_goes_on_to_the_same_bytes(
        tokenizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(partial_entry, "RECORD_SECONDS", 0.0)
    in_small_blocks(monkeypatch, 300, 1000, 1)
    write_rows(tmp_path / "set" / "train.jsonl", ROWS)
    write_rows(tmp_path / "set" / "validation.jsonl", ROWS[::-1])
    blocks, encoded = 0, Encoder.encoded

    def counting(*given: Any) -> Any:
        nonlocal blocks
        blocks += 1
        return encoded(*given)

    monkeypatch.setattr(Encoder, "encoded", counting)

    def made(cache: str) -> TokenData:
        return prepare(str(tmp_path / "set"), tokenizer, 16, tmp_path / cache,
                       TextOptions(max_tokens=MOST))

    expected, every = digests(made("whole")), blocks
    assert every > 8
    ended = 1
    while True:
        blocks, ended = 0, ended + 3
        with monkeypatch.context() as patch:
            patch.setattr(PartialEntry, "mark", failing(ended))
            try:
                made(f"at-{ended}")
                break
            except InputError:
                assert not list(tmp_path.glob(f"at-{ended}/tokens/*/entry.json"))
        found = made(f"at-{ended}")
        assert digests(found) == expected, ended
        assert blocks <= every + 3, "blocks that were recorded are not tokenised again"
        assert not list(tmp_path.glob("at-*/tokens/*.partial"))
    assert ended > every


def test_after_a_kill_it_goes_on(tmp_path: Path) -> None:
    file = str(write_rows(tmp_path / "whole.jsonl", ROWS))
    expected = digests(prepare(file, "bpe:300", 16, tmp_path, TextOptions(max_tokens=MOST)))
    points = ["mark:1", "mark:3", "torn:1", "torn:3", "manifest"]
    fresh_python("import sys; from tests.support.killed_building import main; main(*sys.argv[1:])",
                 file, "bpe:300", str(tmp_path), str(MOST), *points,
                 env={"TOKENIZERS_PARALLELISM": "false"})
    for point in points:
        found = prepare(file, "bpe:300", 16, tmp_path / point, TextOptions(max_tokens=MOST))
        assert digests(found) == expected, point


def test_other_rows_than_before_are_noticed(tmp_path: Path, tokenizer: str) -> None:
    loaded = Tokenizer.from_file(f"{tokenizer}/tokenizer.json")
    recorded: list[Any] = []

    def files(said: Any) -> LimitedRows:
        return LimitedRows(tmp_path, lambda _: (loaded, Encoder(
            tmp_path, Path(tokenizer) / "tokenizer.json", np.dtype(np.uint16), "--tokenizer",
            "newline")), False, said, lambda value, *_: recorded.append(value))

    def reading(rows: list[str]) -> Callable[[RowFiles], Rows]:
        return lambda into: Rows(into.extend(rows))

    assert list(files(None).read(reading(ROWS), 100).rows) == first_rows(ROWS, tokenizer, 100)
    again = files(recorded[-1]).read(reading(ROWS), 200)
    assert list(again.rows) == first_rows(ROWS, tokenizer, 200)
    with pytest.raises(InputError, match="have changed since an interrupted start read them"):
        files(recorded[-1]).read(reading([ROWS[0], "another", *ROWS[2:]]), 300)


def test_a_split_of_empty_rows_has_no_text(tokenizer: str, tmp_path: Path) -> None:
    """Each of them is a token all the same."""
    folder = tmp_path / "text"
    write_rows(folder / "train.txt", ROWS[:50])
    write_rows(folder / "validation.txt", [""] * 50)
    with pytest.raises(InputError, match="no text in its validation split"):
        prepare(str(folder), tokenizer, 16, tmp_path, TextOptions(max_tokens=200))


def test_sources_are_those_of_the_whole_folder(tokenizer: str, tmp_path: Path) -> None:
    """Where the limit leaves one language, its subfolders do not become the sources."""
    for name in ("de/x/1.txt", "de/y/1.txt", "en/x/1.txt"):
        path = tmp_path / "text" / name
        path.parent.mkdir(parents=True)
        write_rows(path, ROWS[:60])
    data = prepare(str(tmp_path / "text"), tokenizer, 16, tmp_path, TextOptions(max_tokens=2500))
    documents = data.load_documents()
    assert (documents.kind, documents.sources) == ("a file", ["de"])
    assert len(documents) == 2


# ---- flags --------------------------------------------------------------------------------------

def test_flags(tmp_path: Path) -> None:
    config = resolve("fed_avg", {"max_tokens": "2e9", "stream": "true"})
    assert config.text_options == TextOptions(max_tokens=2 * 10**9, stream=True)
    keys = [TextOptions(max_tokens=most, stream=stream).key
            for most in (None, 1) for stream in (False, True)]
    assert all(keys.count(key) == 1 for key in keys)
    with pytest.raises(InputError, match=r"^--max_tokens 0: must be an integer >= 1, or none"):
        resolve("fed_avg", {"max_tokens": 0})
    for dataset in ("pydocs", str(text_file(tmp_path)), str(tmp_path)):
        with pytest.raises(InputError, match=r"^--stream true: must be false with --dataset"):
            load(dataset, stream=True)
