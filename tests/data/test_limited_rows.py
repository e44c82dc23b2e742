"""--max_tokens and --stream: the first rows with so many tokens, and little is read behind them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from tokenizers import Tokenizer

from fedrun.common.errors import InputError
from fedrun.data import corpora, hub, limited_rows, partial_entry, tokenising_pool
from fedrun.data.limited_rows import LimitedRows
from fedrun.data.partial_entry import PartialEntry
from fedrun.data.stored_rows import RowFiles
from fedrun.data.text_options import TextOptions
from fedrun.data.tokenising_process import Encoder
from fedrun.data.tokens import TokenData, prepare
from fedrun.data.validation import Rows
from fedrun.flags import resolve
from tests.support.disk import no_space
from tests.support.runs import fresh_python
from tests.support.texts import load, text_file

BINARIES = ("train.bin", "validation.bin", "documents.npz")
ROWS = [f"{n} ships — {n * 7919 % 1000} of them {'漢' * (n % 5)} came home." + "\n" * (n % 3 == 0)
        if n % 11 else "" for n in range(700)]
HOME = [f"w{n % 7}" for n in range(700)]
MOST = 5000


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tokenizer")
    return str(prepare(str(text_file(folder)), "bpe:300", 16, folder).tokenizer_path)


def write_rows(path: Path, rows: list[str]) -> Path:
    path.parent.mkdir(exist_ok=True)
    values = {"text": rows, "who": HOME[:len(rows)]}
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.table(values), path)
    elif path.suffix == ".txt":
        path.write_text("".join(f"{row.rstrip()}\n" for row in rows))
    else:
        path.write_text("".join(json.dumps(dict(zip(values, row, strict=True))) + "\n"
                                for row in zip(*values.values(), strict=True)))
    return path


def first_rows(rows: list[str], tokenizer: str, most: int) -> list[str]:
    """The first rows with `most` tokens, counted one after the other."""
    loaded, count = Tokenizer.from_file(f"{tokenizer}/tokenizer.json"), 0
    for n, row in enumerate(rows):
        if count >= most:
            return rows[:n]
        count += len(loaded.encode(row if row.endswith("\n") else f"{row}\n",
                                   add_special_tokens=False).ids)
    return rows


def digests(data: TokenData) -> list[str]:
    return [hashlib.sha256((data.tokenizer_path.parent / name).read_bytes()).hexdigest()
            for name in BINARIES]


def in_small_blocks(monkeypatch: pytest.MonkeyPatch, smallest: int, largest: int, processes: int
                    ) -> None:
    monkeypatch.setattr(limited_rows, "SMALLEST_BLOCK", smallest)
    monkeypatch.setattr(tokenising_pool, "BLOCK_BYTES", largest)
    monkeypatch.setattr(tokenising_pool, "processes_for", lambda size: processes)


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
    with pytest.raises(InputError, match="not those that an interrupted start has read; start aga"):
        files(recorded[-1]).read(reading([ROWS[0], "another", *ROWS[2:]]), 300)


# ---- streams ------------------------------------------------------------------------------------

@pytest.fixture
def shards(tmp_path: Path) -> Path:
    for n in range(3):
        write_rows(tmp_path / "hub" / f"train-{n}.parquet", [f"{n}: {row}" for row in ROWS])
    return tmp_path / "hub"


@pytest.fixture
def asked(shards: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """A hub that answers and has one dataset; what it is asked for."""
    real, calls = datasets.load_dataset, list[dict[str, Any]]()

    def load_dataset(*names: Any, **how: Any) -> Any:
        calls.append({"names": names, **how})
        return real("parquet", data_files={"train": str(shards / "*.parquet")}, **how)

    monkeypatch.setattr(hub, "hub_answers", lambda: True)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls


def test_a_stream_is_the_same_text(asked: list[dict[str, Any]], shards: Path, tokenizer: str,
                                   tmp_path: Path) -> None:
    options = TextOptions(max_tokens=3 * MOST, text_column="text")
    local = prepare(str(shards), tokenizer, 16, tmp_path / "local", options)
    assert not asked
    streamed, copied = (
        prepare("owner/name:part", tokenizer, 16, tmp_path / "cache",
                TextOptions(max_tokens=3 * MOST, text_column="text", stream=stream))
        for stream in (True, False))
    assert digests(streamed) == digests(copied) == digests(local)
    assert [call["names"] for call in asked] == [("owner/name", "part")] * 2
    assert [call.get("streaming", False) for call in asked] == [True, False]
    everything = prepare("owner/name", tokenizer, 16, tmp_path / "cache",
                         TextOptions(text_column="text", stream=True))
    assert everything.fingerprint["dataset_sha256"] == prepare(
        str(shards), tokenizer, 16, tmp_path, TextOptions(text_column="text")
    ).fingerprint["dataset_sha256"]


@pytest.fixture
def endless(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A hub with a dataset that never ends; the number of its last record that was read."""
    read = [0]

    def records() -> Iterator[dict[str, object]]:
        while True:
            read[0] += 1
            yield {"text": f"{read[0]} ships went out, and {read[0] // 2} came home.", "n": read[0]}

    stream = datasets.IterableDataset.from_generator(records)
    assert stream.features is None
    monkeypatch.setattr(hub, "hub_answers", lambda: True)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: {"train": stream})
    return read


def test_no_more_is_read_than_is_needed(endless: list[int], tokenizer: str, tmp_path: Path) -> None:
    data = prepare("owner/name", tokenizer, 16, tmp_path,
                   TextOptions(max_tokens=100_000, stream=True))
    rows = len(data.load_documents()) * 20 / 19
    assert rows > 3_000
    assert endless[0] - rows < limited_rows.SMALLEST_BLOCK / 40 + 400, "a block, and the head"
    assert not list(tmp_path.glob("tokens/*.partial"))


@pytest.mark.parametrize(("broken", "kind", "message"), [
    (ConnectionResetError("reset by peer"), hub.HubUnreachable,
     r"--dataset owner/name: the stream broke off \(reset by peer\); start again"),
    (ValueError("I/O operation on closed file"), InputError,
     "--dataset owner/name: cannot be read: I/O operation on closed file")])
def test_what_a_broken_stream_has_left_is_gone_on_with(
        asked: list[dict[str, Any]], tokenizer: str, tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch, broken: Exception, kind: type[Exception], message: str
        ) -> None:
    monkeypatch.setattr(partial_entry, "RECORD_SECONDS", 0.0)
    in_small_blocks(monkeypatch, 300, 2000, 1)
    options = TextOptions(max_tokens=2 * MOST, text_column="text", stream=True)
    expected = digests(prepare("owner/name", tokenizer, 16, tmp_path / "whole", options))
    encoded, blocks, batches = Encoder.encoded, 0, datasets.IterableDataset.iter

    def counting(*given: Any) -> Any:
        nonlocal blocks
        blocks += 1
        return encoded(*given)

    def breaking(self: Any, *size: int) -> Iterator[Any]:
        for n, batch in enumerate(batches(self, *size)):
            if n == 3:
                raise broken
            yield batch

    monkeypatch.setattr(Encoder, "encoded", counting)
    with monkeypatch.context() as patch:
        patch.setattr(datasets.IterableDataset, "iter", breaking)
        with pytest.raises(kind, match=message):
            prepare("owner/name", tokenizer, 16, tmp_path, options)
    before, blocks = blocks, 0
    assert before > 3
    assert digests(prepare("owner/name", tokenizer, 16, tmp_path, options)) == expected
    again = blocks
    blocks = 0
    prepare("owner/name", tokenizer, 16, tmp_path / "another", options)
    assert again <= blocks - before + 1


def test_without_a_network_there_is_no_stream(monkeypatch: pytest.MonkeyPatch, tmp_path: Path
                                              ) -> None:
    monkeypatch.setattr(hub, "hub_answers", lambda: False)
    with pytest.raises(hub.HubUnreachable, match=r"^--dataset owner/name: .*cannot be reached"):
        prepare("owner/name", "bpe:300", 16, tmp_path, TextOptions(stream=True))


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
