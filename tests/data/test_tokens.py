"""From text to token ids: what the tokenizers make of it, and every error a user can make."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from fedrun.data.text_options import TextOptions
from fedrun.data.tokens import prepare
from fedrun.flags import resolve
from tests.support.runs import fresh_python
from tests.support.texts import GPT2, WIKITEXT, load, needs_shared_data, text_file


@needs_shared_data
def test_tokens_are_those_of_the_rows_end_to_end(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    data = prepare(str(WIKITEXT), str(GPT2), 256, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(GPT2)
    corpus = load(WIKITEXT)
    for rows, sequences in ((corpus.train, data.train), (corpus.validation, data.validation)):
        ids: list[int] = []
        for row in rows:
            ids += tokenizer(row if row.endswith("\n") else row + "\n")["input_ids"]
        whole = len(ids) // 256
        np.testing.assert_array_equal(sequences, np.reshape(ids[: whole * 256], (whole, 256)))
    assert (data.train.shape, data.validation.shape) == ((1150, 256), (1005, 256))
    assert (data.train.dtype, data.vocab_size) == (np.dtype(np.uint16), 50257)
    assert data.load_tokenizer()("Once upon a time,")["input_ids"] == [7454, 2402, 257, 640, 11]
    assert data.fingerprint["dataset_sha256"] == corpus.fingerprint
    json.dumps(data.fingerprint)


@pytest.mark.parametrize("tokenizer", ["bpe:300", pytest.param(str(GPT2), marks=needs_shared_data)])
def test_without_a_row_separator_rows_are_tokenised_as_they_are(tmp_path: Path, tokenizer: str
                                                                ) -> None:
    rows = ["", " = Kea = \n", "", " The kea is a parrot . \n", "", "without an end"] * 9
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    with_newlines, as_they_are = (
        prepare(str(file), tokenizer, 8, tmp_path, resolve("fed_avg", flags).text_options)
        for flags in ({}, {"row_separator": "none"}))
    for data, ends in ((with_newlines, "\n"), (as_they_are, "")):
        corpus = load(file)
        ids = [i for row in corpus.train
               for i in data.tokenizer.encode(row if row.endswith("\n") else row + ends).ids]
        assert len(ids) == data.fingerprint["train_tokens"]
        assert data.train.reshape(-1).tolist() == ids[:data.train.size]
        assert data.load_documents().starts[-1] == len(ids)
    assert as_they_are.fingerprint["train_tokens"] < with_newlines.fingerprint["train_tokens"]


def test_bpe_decodes_to_the_text_it_was_trained_on(tmp_path: Path) -> None:
    corpus = load(text_file(tmp_path))
    data = prepare(str(tmp_path / "tale.txt"), "bpe:300", 16, tmp_path / "cache")
    decoded = data.load_tokenizer().decode(data.train.reshape(-1).tolist())
    text = "".join(corpus.train)
    assert len(decoded) > len(text) - 16 * 20
    assert isinstance(decoded, str)
    assert text.startswith(decoded)
    assert data.vocab_size == 300
    assert data.load_tokenizer().eos_token_id == 0


@pytest.mark.slow
def test_bpe_is_the_same_in_every_process(tmp_path: Path) -> None:
    code = (
        "import hashlib, sys; from pathlib import Path; from fedrun.data.tokens import prepare\n"
        "data = prepare('pydocs', 'bpe:600', 64, Path(sys.argv[1]))\n"
        "print(data.fingerprint, hashlib.sha256(data.train.tobytes()).hexdigest())"
    )
    printed = {
        fresh_python(code, str(tmp_path / n), env={
            "PYTHONHASHSEED": n, "RAYON_NUM_THREADS": n, "TOKENIZERS_PARALLELISM": "true"})
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
    data = prepare(str(tmp_path / "numbers.txt"), str(tmp_path / "words"), 100, tmp_path)
    assert (data.train.dtype, data.vocab_size) == (np.dtype(np.int32), 70_000)
    assert data.train[1].tolist() == list(range(60_100, 60_200))


@pytest.mark.parametrize("tokenizer", ["bpe:256", "bpe:many", "bpe:-400", "bpe:", "./missing"])
def test_a_tokenizer_that_cannot_be_names_the_flag(tokenizer: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"--tokenizer {tokenizer}: .*bpe:N with N >= 257"):
        prepare("pydocs", tokenizer, 16, tmp_path)


def test_a_folder_without_a_tokenizer_names_the_flag(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"--tokenizer .*empty: "):
        prepare(str(text_file(tmp_path)), str(tmp_path / "empty"), 16, tmp_path)


def test_too_few_validation_tokens_name_both_flags(tmp_path: Path) -> None:
    file = str(text_file(tmp_path, n_lines=200))
    with pytest.raises(ValueError, match=r"--sequence_length 256: the validation .*--dataset .*"
                                         r"has only (\d+) tokens, (\d+) too few .*, or "
                                         r"--val_fraction ([\d.]+)") as caught:
        prepare(file, "bpe:300", 256, tmp_path)
    found = re.search(r"only (\d+) tokens, (\d+) too few.*fraction ([\d.]+)", str(caught.value))
    assert found
    assert int(found[1]) + int(found[2]) == 256
    data = prepare(file, "bpe:300", 256, tmp_path,
                   TextOptions(val_fraction=float(found[3])))
    assert len(data.validation) >= 1
    assert len(data.train) >= 1
