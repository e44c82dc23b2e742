"""Tokenizers: by name from the hub, from a folder, or trained on the corpus."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from fedrun.data import corpora
from fedrun.errors import one_line

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

BPE_SMALLEST = 257  # 256 bytes and the end-of-text token
END_OF_TEXT = "<|endoftext|>"
HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
ACCEPTED = (
    "a hub name (gpt2, owner/name), a folder with a tokenizer, or bpe:N with "
    f"N >= {BPE_SMALLEST}, which trains one on the corpus"
)


def bpe_size(tokenizer: str) -> int | None:
    """N of `bpe:N`, None for any other tokenizer; ValueError where N does not work."""
    if not tokenizer.startswith("bpe:"):
        return None
    size = tokenizer.removeprefix("bpe:")
    if not size.isascii() or not size.isdigit() or int(size) < BPE_SMALLEST:
        raise ValueError(f"--tokenizer {tokenizer}: give {ACCEPTED}")
    return int(size)


def save_tokenizer(tokenizer: str, corpus: corpora.Corpus, folder: Path) -> Tokenizer:
    """Put the tokenizer that `--tokenizer` names into `folder`, and load it from there."""
    from tokenizers import Tokenizer

    size = bpe_size(tokenizer)
    if size is not None:
        _train_bpe(corpus.train, size, folder)
    else:
        _fetch_tokenizer(tokenizer).save_pretrained(folder)
    tokeniser = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokeniser.no_truncation()
    tokeniser.no_padding()
    return tokeniser


def _train_bpe(rows: list[str], size: int, folder: Path) -> None:
    """A byte-level BPE of at most `size` tokens, trained on `rows` (Sennrich et al. 2016;
    over bytes as in GPT-2, Radford et al. 2019). The same rows give the same bytes.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(with_newlines(rows), trainer)
    folder.mkdir()
    bpe.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")


def _fetch_tokenizer(tokenizer: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a local folder, of the hub, or of the hub's cache."""
    from huggingface_hub.errors import RepositoryNotFoundError
    from transformers import AutoTokenizer

    folder = Path(tokenizer).expanduser()
    local = folder.is_dir()
    try:
        loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            str(folder) if local else tokenizer,
            local_files_only=local or not corpora.hub_answers(),
        )
    except Exception as error:  # the library raises many kinds for what a user got wrong
        refused = isinstance(error.__cause__, RepositoryNotFoundError)
        if local or (corpora.hub_answers() and (refused or not isinstance(error, OSError))):
            raise ValueError(f"--tokenizer {tokenizer}: {one_line(error)}") from error
        raise corpora.hub_out_of_reach("--tokenizer", tokenizer, error) from error
    if not loaded.is_fast:
        raise ValueError(f"--tokenizer {tokenizer}: has no fast form (tokenizer.json)")
    return loaded


def with_newlines(rows: Iterable[str]) -> Iterator[str]:
    """Rows as they are tokenised: each ends in a newline."""
    return (row if row.endswith("\n") else row + "\n" for row in rows)
