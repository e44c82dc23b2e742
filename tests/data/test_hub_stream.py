"""--stream: a data set of the hub, read in its order without a copy of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest

from fedrun.common.errors import InputError
from fedrun.data import hub, limited_rows, partial_entry
from fedrun.data.text_options import TextOptions
from fedrun.data.tokenising_process import Encoder
from fedrun.data.tokens import prepare
from tests.support.first_rows import (
    MOST,
    ROWS,
    digests,
    in_small_blocks,
    saved_tokenizer,
    write_rows,
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    return saved_tokenizer(tmp_path_factory.mktemp("tokenizer"))


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
