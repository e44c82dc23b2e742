"""How much text a planned run has, without tokenising any, and how many tokens its model knows."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fedrun.common.errors import InputError
from fedrun.config import RunConfig
from fedrun.data.cache_entry import entry_name, read_manifest
from fedrun.data.tokenizer import bpe_size, ids_size, read_tokenizer
from fedrun.data.tokens import prepare
from fedrun.experiment import shards_of

KNOWN = {"gpt2": 50257, "EleutherAI/gpt-neox-20b": 50277}
"""Tokens of tokenizers on the hub."""


@dataclass(frozen=True)
class Text:
    """What is known of a run's text."""

    vocab_size: int
    shards: list[int] | None
    """Sequences of each client; None if the text is not tokenised yet."""
    validation: int | None
    """Sequences of the validation split."""


def text_of(config: RunConfig, vocab_size: int | None) -> Text:
    """From the cache, if the text is there. vocab_size: the value of --vocab_size.

    InputError if the vocabulary is not known, or there is no such text.
    """
    cache = config.cache_dir.expanduser()
    entry = cache / "tokens" / entry_name(config.dataset, config.tokenizer, config.text_options)
    if read_manifest(entry, check_tokens=False) is None:
        return Text(vocab_size or vocabulary(config.tokenizer), None, None)
    data = prepare(config.dataset, config.tokenizer, config.sequence_length, cache,
                   options=config.text_options, check=False)
    return Text(vocab_size or data.vocab_size, shards_of(config, data).sizes, len(data.validation))


def vocabulary(tokenizer: str) -> int:
    """Tokens of a tokenizer, by its name or its file. InputError if that does not tell."""
    size = bpe_size(tokenizer) or ids_size(tokenizer) or KNOWN.get(tokenizer)
    path = Path(tokenizer).expanduser()
    file = path / "tokenizer.json" if path.is_dir() else path
    if size is None and file.is_file():
        size = max(read_tokenizer(file, "--tokenizer").get_vocab(True).values(), default=0) + 1
    if size is None:
        raise InputError(f"--tokenizer {tokenizer}: its size is not known before the text is "
                         "tokenised; must come with --vocab_size N")
    return size
