"""Data given from Python, kept as the tokens of text from files are."""

from __future__ import annotations

import json
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch

from fedrun.common.errors import InputError
from fedrun.data.corpora import Corpus
from fedrun.data.given import GivenData, given_data
from fedrun.data.given_parts import Ids, given_part
from fedrun.data.partition import Shards, client_shards
from fedrun.data.stored_rows import RowFiles
from fedrun.data.text_options import TextOptions
from fedrun.data.tokens import TokenData, prepare, verify
from fedrun.data.validation import held_of_each
from tests.support.texts import Loaded, in_memory, lines, records

LENGTH = 8


def given(parts: Sequence[Any], validation: Any = None, by_client: bool = True,
          length: int = LENGTH, **reading: Any) -> GivenData:
    found = [given_part(part, f"clients[{n}]" if by_client else "data")
             for n, part in enumerate(parts)]
    held = None if validation is None else given_part(validation, "validation")
    return given_data(found, held, by_client, length, TextOptions(**reading))


def owned(data: TokenData, n_clients: int) -> list[list[int]]:
    return [data.train[shard].reshape(-1).tolist()
            for shard in client_shards(data, n_clients, "given", 1.0, 0.0, 0)]


def test_each_clients_ids_are_cut_by_themselves(tmp_path: Path, caplog: pytest.LogCaptureFixture
                                                ) -> None:
    caplog.set_level("INFO", "fedrun")
    clients: list[Any] = [np.arange(8 * 5 + 3), list(range(50, 58)), torch.arange(100, 117),
                          np.arange(200, 216, dtype=np.uint8).reshape(2, 8),
                          [[1, 2, 3], np.array([4, 5]), range(6, 12)]]
    data = prepare(given(clients, np.arange(20)), "ids:300", LENGTH, tmp_path)
    assert owned(data, 5) == [[*range(40)], [*range(50, 58)], [*range(100, 116)],
                              [*range(200, 216)], [*range(1, 9)]]
    assert data.validation.reshape(-1).tolist() == list(range(16))
    assert (data.train.dtype, data.vocab_size) == (np.dtype(np.uint16), 300)
    assert isinstance(data.train, np.memmap)
    assert "read from 5 clients: 95 tokens; 7 fill no whole sequence of their client" in caplog.text
    for tokenizer in (data.tokenizer, data.load_tokenizer()):
        assert tokenizer.decode([7, 0, 299]) == " 7 0 299"
    assert data.tokenizer.encode(" 12 7\n0").ids == [12, 7, 0]
    deal: dict[str, Any] = {"alpha": 1.0, "size_skew": 0.0, "seed": 0, "holdout": 0.0}
    with pytest.raises(InputError, match=r"given: client 1 would train on 1 sequences, fewer than "
                                         r"a batch of 2; use --batch_size <= 1 or leave the"):
        Shards.deal(data, num_clients=5, partition="given", batch_size=2, **deal)


def test_a_share_of_every_client_is_held_out(tmp_path: Path) -> None:
    streams = [np.full(8 * size + 1, n) for n, size in enumerate((100, 20, 10, 10, 1))]
    data = prepare(given(streams), "ids:300", LENGTH, tmp_path)
    assert [len(ids) // 8 for ids in owned(data, 5)] == [95, 19, 10, 9, 1]
    assert np.bincount(data.validation[:, 0]).tolist() == [5, 1, 0, 1]
    assert data.fingerprint["validation_from"] == (
        "the last twentieth of the clients' sequences (none of very small clients)")
    data = prepare(given(streams[:2]), "ids:300", LENGTH, tmp_path)
    assert data.fingerprint["validation_from"] == "the last twentieth of every client's sequences"
    few = prepare(given([np.arange(16), np.arange(24)]), "ids:300", LENGTH, tmp_path)
    assert [len(ids) // 8 for ids in owned(few, 2)] == [2, 2], "a sequence at least is held out"
    texts = [lines(tag, 40) for tag in ("a", "b")] + [["one text. " * 400]]
    data = prepare(given(texts, length=16), "bpe:300", 16, tmp_path)
    held = data.tokenizer.decode(data.validation.reshape(-1).tolist())
    assert all(f"{tag} says sentence 39" in held for tag in ("a", "b"))
    assert "one text." in held


def test_clients_of_few_texts_hold_out_no_more_than_the_share(tmp_path: Path) -> None:
    def split(sizes: Sequence[int], **reading: Any) -> Loaded:
        corpus = given([lines(f"client {n}", size) for n, size in enumerate(sizes)], **reading
                       ).read(RowFiles(tmp_path), TextOptions(**reading))
        assert isinstance(corpus, Corpus)
        return in_memory(corpus)

    sizes = [2 + n % 2 for n in range(60)]
    corpus = split(sizes)
    assert len(corpus.validation) == sum(sizes) // 20
    assert sorted(corpus.train + corpus.validation) == sorted(
        row for n, size in enumerate(sizes) for row in lines(f"client {n}", size))
    assert len({row.partition(" says")[0] for row in corpus.train}) == 60
    assert corpus.validation_from == (
        "the last twentieth of the clients' text (none of very small clients)")
    corpus = split([3, 3, 3])  # too few of all: the end of each one's text
    assert [row.partition(" says")[0] for row in corpus.train] == [
        f"client {n}" for n in range(3) for _ in range(3)]
    assert corpus.validation_from == "the last twentieth of every client's text"
    assert all(0 < len(held) / len("".join(lines("client 0", 3))) < 0.1
               for held in corpus.validation)
    assert len(split([60, 40], val_fraction=0.1).validation) == 10


def test_held_of_each() -> None:
    assert held_of_each([10, 10, 1, 0, 30], Fraction(1, 10)) == [1, 1, 0, 0, 3]
    assert held_of_each([1, 1, 1], Fraction(9, 10)) == [0, 0, 0]


def test_texts_of_clients_share_no_sequence(tmp_path: Path, caplog: pytest.LogCaptureFixture
                                            ) -> None:
    caplog.set_level("INFO", "fedrun")
    dogs = datasets.Dataset.from_dict({"text": lines("dog", 20), "n": [1] * 20})
    data = prepare(given([lines("cat", 30), dogs], lines("cow", 9)), "bpe:300", LENGTH, tmp_path)
    whole = [data.tokenizer.encode("".join(f"{line}\n" for line in part)).ids
             for part in (lines("cat", 30), lines("dog", 20))]
    assert owned(data, 2) == [ids[:len(ids) // LENGTH * LENGTH] for ids in whole]
    left = sum(len(ids) % LENGTH for ids in whole)
    assert f"read from 2 clients: {sum(map(len, whole)):,} tokens; {left} fill no" in caplog.text
    assert "cow says" in data.tokenizer.decode(data.validation[0].tolist())


def test_texts_for_all_are_those_of_a_file(tmp_path: Path) -> None:
    file = records(tmp_path / "rows.jsonl")
    table = datasets.Dataset.from_list([json.loads(line) for line in file.read_text().splitlines()])
    options: dict[str, Any] = {"text_column": "title,body", "partition": "column:user"}
    ours, theirs = (prepare(source, "bpe:300", LENGTH, tmp_path, TextOptions(**options))
                    for source in (given([table], by_client=False, **options), str(file)))
    np.testing.assert_array_equal(ours.train, theirs.train)
    np.testing.assert_array_equal(ours.validation, theirs.validation)
    assert ours.load_documents().sources == ["user 0", "user 1", "user 2"]
    for name, value in theirs.fingerprint.items():
        assert name == "dataset" or ours.fingerprint[name] == value
    texts = [f"{row['title']}\n\n{row['body']}" for row in table]
    plain = prepare(given([texts], by_client=False), "bpe:300", LENGTH, tmp_path)
    columns = TextOptions(text_column="title,body")
    np.testing.assert_array_equal(
        plain.train, prepare(str(file), "bpe:300", LENGTH, tmp_path, columns).train)
    longer = prepare(given([texts], by_client=False, length=16), "bpe:300", 16, tmp_path)
    assert longer.tokenizer_path == plain.tokenizer_path, "text is tokenised once for all lengths"


def test_ids_for_all(tmp_path: Path) -> None:
    stream = np.random.default_rng(0).integers(70_000, size=40 * LENGTH + 5)
    data = prepare(given([stream], by_client=False), "ids:70000", LENGTH, tmp_path)
    assert data.train.dtype == np.int32
    assert data.train.reshape(-1).tolist() == stream[:38 * LENGTH].tolist()
    assert data.validation.reshape(-1).tolist() == stream[38 * LENGTH:40 * LENGTH].tolist()
    for partition in ("contiguous", "shuffled", "documents"):
        shards = client_shards(data, 4, partition, 1.0, 0.0, 0)
        assert sorted(np.concatenate(shards).tolist()) == list(range(38))
    with pytest.raises(InputError, match="has no sources"):
        client_shards(data, 4, "by_source", 1.0, 0.0, 0)
    with pytest.raises(InputError, match="given: is the partition of data that was given"):
        client_shards(data, 4, "given", 1.0, 0.0, 0)
    documents = [stream[:30], stream[30:100], stream[100:]]
    data = prepare(given([documents], stream, by_client=False), "ids:70000", LENGTH, tmp_path)
    assert data.load_documents().starts.tolist() == [0, 30, 100, len(stream)]


def test_arrays_are_not_copied_and_their_type_does_not_matter(tmp_path: Path) -> None:
    array = np.random.default_rng(0).integers(200, size=(12, LENGTH), dtype=np.uint8)
    mapped = np.memmap(tmp_path / "ids.bin", np.uint16, "w+", shape=array.size)
    mapped[:] = array.reshape(-1)
    for value in (array, mapped):
        part = given_part(value, "data")
        assert isinstance(part, Ids)
        assert np.shares_memory(part.pieces[0], value)
    same: list[Any] = [array, mapped, array.tolist(), torch.from_numpy(array).long(),
                       array.reshape(-1).tolist()]
    digests = [given([value], by_client=False).sha256 for value in same]
    assert len(set(digests)) == 2, "a list of lists is one of documents"
    assert digests[2] != digests[0]
    others = [given([array]), given([array[:6], array[6:]]), given([array], array),
              given([array[::-1]], by_client=False)]
    assert len({digests[0], digests[2], *(other.sha256 for other in others)}) == 6


def test_columns_and_series() -> None:
    import pandas
    table = datasets.Dataset.from_dict({"text": ["a", "b"], "input_ids": [[1, 2], [3]]})
    ids = given_part(table["input_ids"], "data")
    assert isinstance(ids, Ids)
    assert [piece.tolist() for piece in ids.pieces] == [[1, 2], [3]]
    for texts in (table["text"], pandas.Series(["a", "b"]), np.array(["a", "b"]), ("a", "b")):
        assert not isinstance(part := given_part(texts, "data"), Ids)
        assert list(part.rows(["text"])) == [("a",), ("b",)]
    stream = given_part(pandas.Series([1, 2, 3]), "data")
    assert isinstance(stream, Ids)
    assert stream.size == 3


def test_damage_is_repaired_from_what_was_given(tmp_path: Path, caplog: pytest.LogCaptureFixture
                                                ) -> None:
    source = given([np.arange(80), np.arange(40)])
    data = prepare(source, "ids:80", LENGTH, tmp_path)
    expected = data.train.copy()
    file = data.tokenizer_path.parent / "train.bin"
    file.write_bytes(file.read_bytes()[:-2] + b"\1\1")
    verify(source, "ids:80", tmp_path)
    assert "rebuilding it" in caplog.text
    np.testing.assert_array_equal(data.reopen().train, expected)


@pytest.mark.parametrize(("value", "message"), [
    ("pydocs", "data: is one string; must be token ids .* goes into dataset="),
    ({"a": [1]}, "data: is of type dict; must be token ids"),
    (iter([1, 2]), "data: is of type list_iterator; must be"),
    (7, "data: is of type int; must be"),
    (b"bytes", "data: is of type bytes; must be"),
    ([], "data: is empty"),
    (np.zeros(0), "data: is empty"),
    ([[], []], "data: is empty"),
    (np.zeros(9), "data: has values of type float64; token ids must be integers"),
    ([1, 2.5], "data: has values of type float64"),
    ([True, False], "data: has values of type bool"),
    ([1, "a"], "data: has values of type <U"),
    (["a", 1], r"data\[1\]: is of type int; must be a text, as data\[0\] is"),
    ([["a"], ["b"]], r"data\[0\]: has values of type <U1"),
    ([None, "a"], r"data\[0\]: is of type NoneType"),
    ([[1, 2], [3, [4]]], r"data\[1\]: cannot be read as an array"),
    (np.zeros((2, 2, 2), int), "data: has 3 dimensions; token ids must be a stream"),
    ([1, -1], "data: has the token id -1; must be >= 0"),
    ([1, 2**31], "data: has the token id 2147483648; must be below"),
    ([1, 2**70], "data: "),
    (datasets.DatasetDict(train=datasets.Dataset.from_dict({"text": ["a"]})),
     r"data: is a DatasetDict; give its splits: data=it\['train'\]")])
def test_what_is_neither_texts_nor_ids_is_named(value: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        given_part(value, "data")


def test_what_does_not_belong_together_is_named(tmp_path: Path) -> None:
    ids, texts = np.arange(90), lines("it")
    for make, message in (
            (lambda: given([ids, texts]), r"clients\[0\]: has token ids, but clients\[1\] texts"),
            (lambda: given([texts], ids), r"validation: has token ids, but clients\[0\] texts"),
            (lambda: given([ids.reshape(9, 10)]),
             r"--sequence_length 8: must be 10, the length of the rows of clients\[0\]"),
            (lambda: given([datasets.Dataset.from_dict({"n": [1, 2]})]),
             r"clients\[0\]: without --text_column the text must .* the columns are n \(not text"),
            (lambda: given([texts, datasets.Dataset.from_dict({"title": texts})],
                           text_column="body"), r"clients\[1\]: --text_column body: there is no "
             "column body; the columns are title"),
            (lambda: given([texts], partition="column:user", by_client=False),
             "--partition column:user: data has no column user; the columns are text"),
            (lambda: given([[" ", ""]]), r"clients\[0\]: has no text")):
        with pytest.raises(InputError, match=message):
            make()
    for source, tokenizer, message in (
            (given([ids, ids[:5]]), "ids:90", r"clients\[1\]: has 5 tokens to train on, 3 too few"),
            (given([texts, ["a"]], texts), "bpe:300", r"clients\[1\]: has \d tokens to train on"),
            (given([ids], by_client=False), "ids:60",
             "data: has the token id 89; must be below 60, .* of --tokenizer ids:60"),
            (given([ids[:7]], by_client=False), "ids:90",
             "the train split of the data that was given has only 7 tokens"),
            (given([ids], ids[:7]), "ids:90",
             "the validation split of .* only 7 tokens, .* or give more in validation="),
            (given([ids]), "bpe:300", "--tokenizer bpe:300: is trained on text, and token ids"),
            (given([texts]), "ids:300", "--tokenizer ids:300: no such folder"),
            ("pydocs", "ids:300", "--tokenizer ids:300: no such folder")):
        with pytest.raises(InputError, match=message):
            prepare(source, tokenizer, LENGTH, tmp_path)
    assert not list((tmp_path / "tokens").glob("*.partial"))  # what an error has left
    with pytest.raises(InputError, match=r"--dataset \(given .*\): was given to fedrun.train, and "
                                         "is in no file"):
        prepare(str(given([ids])), "ids:90", LENGTH, tmp_path)
