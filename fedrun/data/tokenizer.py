"""Tokenizers: from the hub, from a folder or file, or trained on the corpus.

Code that comes with a tokenizer is never run, even if the tokenizer's files ask for it.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from fedrun.common.errors import InputError, one_line
from fedrun.common.files import read_regular
from fedrun.data import hub

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer
    from tokenizers.pre_tokenizers import PreTokenizer
    from transformers import PreTrainedTokenizerBase

BPE_SMALLEST = 257  # 256 bytes and the end-of-text token
LARGEST_IDS = 2**24  # most of ids:N, whose tokenizer is a table that takes 100 bytes for each
END_OF_TEXT = "<|endoftext|>"
LONGEST_WORD = 1024  # characters; longer ones are cut, since training time grows with the square
GPT2_WORD = (  # the pattern in the library's ByteLevel
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
)
HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
ACCEPTED = (
    "a hub name (gpt2, owner/name), a folder with a tokenizer, a tokenizer.json, or bpe:N with "
    f"N >= {BPE_SMALLEST}, which trains one on the corpus"
)


def bpe_size(tokenizer: str) -> int | None:
    """N of `bpe:N`, None for any other tokenizer; InputError for an N that does not work."""
    if not tokenizer.startswith("bpe:"):
        return None
    size = tokenizer.removeprefix("bpe:")
    if not size.isascii() or not size.isdigit() or int(size) < BPE_SMALLEST:
        raise InputError(f"--tokenizer {tokenizer}: must be {ACCEPTED}")
    return int(size)


def ids_size(tokenizer: str) -> int | None:
    """N of `ids:N`, which stands for no tokenizer: token ids below N were given from Python. None
    for a tokenizer."""
    size = tokenizer.removeprefix("ids:")
    return int(size) if size != tokenizer and size.isascii() and size.isdigit() else None


def tokenizer_name(tokenizer: str) -> str:
    """The name in reports: the last part of a folder's path, for a tokenizer.json its folder's."""
    path = Path(tokenizer).expanduser()
    if path.is_file():
        return path.resolve().parent.name if path.name == "tokenizer.json" else path.name
    return path.resolve().name if path.is_dir() else tokenizer


def save_tokenizer(name: str, rows: Iterable[str] | None, folder: Path, separator: str,
                   cache_dir: Path) -> None:
    """Train or fetch the tokenizer `name` (the value of --tokenizer) and save it.

    rows: to train it on; None where token ids were given.
    separator: --row_separator, for training. cache_dir: --cache_dir, for what comes from the hub.

    Raises:
        InputError: there is no such tokenizer, or it is not usable.
        ConnectionError: the hub cannot be reached and the tokenizer is not in its local cache.
    """
    size = bpe_size(name)
    if rows is None and (n_ids := ids_size(name)) is not None:
        _save_numbers(n_ids, folder)
    elif size is not None:
        if rows is None:
            raise InputError(f"--tokenizer {name}: is trained on text, and token ids were given; "
                             "name the tokenizer that made them, or leave it out")
        _train_bpe(rows, size, folder, separator)
    else:
        _fetch_tokenizer(name, cache_dir).save_pretrained(folder)
    if not load_tokenizer(folder / "tokenizer.json").get_vocab_size():
        raise InputError(f"--tokenizer {name}: it has no tokens")


def load_tokenizer(file: Path) -> Tokenizer:
    """The tokenizer that `save_tokenizer` has saved, as texts are tokenised: whole."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _train_bpe(rows: Iterable[str], size: int, folder: Path, separator: str) -> None:
    """Train a byte-level BPE with at most `size` tokens and save it (Sennrich et al. 2016; on bytes
    as in GPT-2, Radford et al. 2019). The same rows give the same files.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = _splitter(rows, separator)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=sys.stderr.isatty(),
    )
    bpe.train_from_iterator(separated(rows, separator), trainer)
    folder.mkdir()
    bpe.save(str(folder / "tokenizer.json"))
    _save_config(folder, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT)


def _save_config(folder: Path, **special_tokens: str) -> None:
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **special_tokens,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")


def _save_numbers(size: int, folder: Path) -> None:
    """The tokenizer of token ids that come without one: their numbers, with a space before each, so
    that a continuation can be put behind its prompt."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    numbers = Tokenizer(models.WordLevel({str(n): n for n in range(size)}))
    numbers.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    numbers.decoder = decoders.Replace(Regex("^"), " ")
    folder.mkdir()
    numbers.save(str(folder / "tokenizer.json"))
    _save_config(folder)


def _splitter(rows: Iterable[str], separator: str) -> PreTokenizer:
    """GPT-2's pre-tokenizer: splits text into words and works on bytes.

    Words longer than LONGEST_WORD (lines of DNA, for example) are cut, since training time grows
    with the square of a word's length; other words are not affected. A text without such words
    gets the library's plain pre-tokenizer.
    """
    from tokenizers import Regex
    from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split

    plain: PreTokenizer = ByteLevel(add_prefix_space=False)
    may_have_long_words = re.compile(rf"\S{{{LONGEST_WORD}}}|\s{{{LONGEST_WORD}}}")
    candidates = (row for row in separated(rows, separator)
                  if len(row) > LONGEST_WORD and may_have_long_words.search(row))
    spans = (span for row in candidates for _, span in plain.pre_tokenize_str(row))
    if all(end - begin <= LONGEST_WORD for begin, end in spans):
        return plain
    cut: PreTokenizer = Sequence([
        Split(Regex(GPT2_WORD), "isolated"),
        Split(Regex(rf"[\s\S]{{{LONGEST_WORD}}}"), "isolated"),
        ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    return cut


def _fetch_tokenizer(tokenizer: str, cache_dir: Path) -> PreTrainedTokenizerBase:
    """A tokenizer from a local folder or file, from the hub, or from the hub's cache."""
    from huggingface_hub.errors import RepositoryNotFoundError

    path = Path(tokenizer).expanduser()
    local = path.is_dir()
    if path.is_file():
        from transformers import PreTrainedTokenizerFast

        read_tokenizer(path, "--tokenizer")
        from_file: PreTrainedTokenizerBase = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
            tokenizer_file=str(path)
        )
        return from_file
    try:
        loaded = load_without_custom_code(path) if local else hub.from_hub(
            cache_dir, lambda folders: load_without_custom_code(
                tokenizer, local_files_only=not hub.hub_answers(), cache_dir=folders.hub))
    except CustomCodeError as error:
        raise InputError(f"--tokenizer {tokenizer}: {error}") from None
    except Exception as error:  # the library raises many types for user errors
        refused = isinstance(error.__cause__, RepositoryNotFoundError)
        if local or (hub.hub_answers() and (refused or not isinstance(error, OSError))):
            raise InputError(f"--tokenizer {tokenizer}: {one_line(error)}") from error
        raise hub.hub_unreachable("--tokenizer", tokenizer, error) from None
    if not loaded.is_fast:
        raise InputError(f"--tokenizer {tokenizer}: it has no fast version (tokenizer.json)")
    return loaded


class CustomCodeError(InputError):
    """A tokenizer that can be loaded only by code of its own."""


def load_without_custom_code(name: str | Path, local_files_only: bool = True,
                             cache_dir: Path | None = None) -> PreTrainedTokenizerBase:
    """AutoTokenizer.from_pretrained, but it never runs code from the tokenizer's files and never
    asks on the terminal whether to.

    cache_dir: the folder of the hub's files; None: the library's own.

    Raises:
        CustomCodeError: the tokenizer cannot be loaded without its code.
        Exception: whatever else the library raises.
    """
    from transformers import AutoTokenizer

    try:
        loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            str(name), local_files_only=local_files_only, trust_remote_code=False,
            cache_dir=cache_dir
        )
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise CustomCodeError(
            "its files name Python code to load it with (auto_map), and such code is never run; "
            "use its tokenizer.json alone, or another tokenizer"
        ) from None
    return loaded


def read_tokenizer(file: Path, flag: str) -> Tokenizer:
    """Load a tokenizer.json without transformers; InputError, naming `flag`, if it is not one."""
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_buffer(read_regular(file))
    except Exception as error:  # the library raises nothing more precise
        raise InputError(f"{flag} {file}: not a tokenizer.json: {one_line(error)}") from None


def encode(tokenizer: Tokenizer, texts: list[str], flag: str) -> list[Encoding]:
    """Encode texts without special tokens.

    Raises:
        InputError: the tokenizer has no token for a word, which the message names beside `flag`.
    """
    try:
        return tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    except Exception as error:  # the library raises nothing more precise
        raise InputError(
            f"{flag}: it cannot encode {_unknown(tokenizer, texts)!r} ({one_line(error)}); use a "
            "tokenizer with an unknown token, or a byte-level one"
        ) from None


def _unknown(tokenizer: Tokenizer, texts: list[str]) -> str:
    """The first word or text that cannot be encoded, shortened for a message."""
    for text in texts:
        normalised = tokenizer.normalizer.normalize_str(text) if tokenizer.normalizer else text
        split = tokenizer.pre_tokenizer
        words = [w for w, _ in split.pre_tokenize_str(normalised)] if split else [normalised]
        for word in words:
            try:
                tokenizer.model.tokenize(word)
            except Exception:
                return word[:40]
    return texts[0][:40]


def separated(rows: Iterable[str], separator: str) -> Iterator[str]:
    """The rows in the form in which they are tokenised: each ends with a newline (newline), or as
    they are (none)."""
    return (row if separator == "none" or row.endswith("\n") else row + "\n" for row in rows)
