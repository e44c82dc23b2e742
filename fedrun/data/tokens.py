"""Tokenise a corpus once per machine; keep the token ids as memory-mapped files.

    cache_dir/tokens/<corpus>-<tokenizer>-<key>/
        tokenizer/          tokenizer.json, tokenizer_config.json
        train.bin           token ids of the whole split, uint16 or int32 in native byte order
        validation.bin
        documents.npz       where the documents of the train split begin, and their sources
        topics-<key>.npz    the documents' topics, computed when they are first needed
        entry.json          manifest with checksums (cache_entry.py), written last; it does not list
                            the topics, which carry a checksum of their own
    cache_dir/tokens/<...>.partial/     while it is made, with a copy of the text (partial_entry.py)
                                        what a killed start has left is removed after two weeks

The key is a digest of the request: names, and for local files their sizes and times. A warm start
therefore reads no text, and a changed file never gets stale tokens. What came from the hub stays
cached under its name until the entry is deleted. The sequence length is not part of the key, since
it only decides how the stream of tokens is cut. A damaged entry is reported and rebuilt.
"""

from __future__ import annotations

import errno
import functools
import importlib.metadata
import math
import os
import time
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fedrun.common.errors import InputError
from fedrun.common.files import DamagedFile
from fedrun.common.log import WARNING, log
from fedrun.common.terminal import visible
from fedrun.data.building import build_entry
from fedrun.data.cache_entry import (
    content_digest,
    entry_name,
    lock_entry,
    naming_cache_dir,
    read_manifest,
    remove_stale,
)
from fedrun.data.documents import Documents
from fedrun.data.given import GivenData, Source
from fedrun.data.text_options import TextOptions
from fedrun.data.tokenizer import bpe_size, load_without_custom_code
from fedrun.data.topics import Topics, find_topics
from fedrun.data.validation import ALL_OF_THE_TEXT

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

TOPICS_LAYOUT = 3  # raise it when the same documents would get different topics


@dataclass(frozen=True)
class TokenData:
    """The token sequences of a corpus.

    `train` and `validation` are read-only memory maps, (n_sequences, sequence_length), uint16 or
    int32 depending on the vocabulary size. `fingerprint` is JSON-able; it is equal on two machines
    if and only if text, tokenizer, sequence length and version of the tokenizer library are.
    """

    train: np.ndarray
    validation: np.ndarray
    vocab_size: int
    fingerprint: dict[str, Any]
    tokenizer_path: Path
    content: str = field(default="", kw_only=True)
    """Digest of the token ids, computed when they were written."""
    tokenizer_json: bytes = field(default=b"", kw_only=True)
    """tokenizer.json, kept in memory because the cache may be deleted during a run."""

    def reopen(self) -> TokenData:
        """Map the cached files again, in case the entry has been rebuilt since.

        Raises:
            InputError: the entry is gone or holds another text.
        """
        entry = self.tokenizer_path.parent
        body = read_manifest(entry, check_tokens=False)
        if body is None or not body["fingerprint"].items() <= self.fingerprint.items():
            raise InputError(f"--dataset {self.fingerprint['dataset']}: {entry} is gone "
                             "or holds another text now; start again")
        length = self.fingerprint["sequence_length"]
        return replace(self, train=_sequences(entry, body, "train", length),
                       validation=_sequences(entry, body, "validation", length),
                       content=content_digest(body))

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer, loaded without transformers, which takes longer to import than to use."""
        from tokenizers import Tokenizer

        return Tokenizer.from_buffer(self.tokenizer_json)

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer as a fast tokenizer of transformers, from the cache."""
        return load_without_custom_code(self.tokenizer_path)

    def load_documents(self) -> Documents:
        """The documents of the train split, in tokens, including the remainder that is cut off."""
        return Documents.load(self.tokenizer_path.parent / "documents.npz")

    def load_topics(self) -> Topics:
        """The topics of the train split's documents.

        They are computed once and cached; if the cache is read-only, in each process.

        Raises:
            InputError: the cache cannot be written, for another reason than being read-only.
            TimeoutError: another process has been computing them for an hour.
        """
        entry = self.tokenizer_path.parent
        version = importlib.metadata.version("scikit-learn")
        file = entry / f"topics-{TOPICS_LAYOUT}-{version}.npz"
        try:
            return Topics.load(file)
        except FileNotFoundError:
            pass
        except DamagedFile as error:
            log(f"{error}; computing the topics again", WARNING)
        with naming_cache_dir(entry):
            try:
                with lock_entry(entry, "the topics of its documents"):
                    with suppress(FileNotFoundError, DamagedFile):
                        return Topics.load(file)  # another process has computed them
                    partial = entry / "topics.partial.npz"
                    self._find_topics().save(partial)
                    partial.rename(file)
                    return Topics.load(file)
            except OSError as error:
                if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
                    raise
                return self._find_topics()

    def _find_topics(self) -> Topics:
        started = time.perf_counter()
        stream = np.memmap(self.tokenizer_path.parent / "train.bin", self.train.dtype, mode="r")
        starts = self.load_documents().starts
        found = find_topics(stream, starts, self.vocab_size)
        log(f"found topics among {len(starts) - 1:,} documents in "
            f"{time.perf_counter() - started:.1f} s")
        return found


def prepare(
    dataset: Source,
    tokenizer: str,
    sequence_length: int,
    cache_dir: Path,
    options: TextOptions = TextOptions(),  # noqa: B008
    check: bool = True,
) -> TokenData:
    """Token sequences of `dataset`, from the cache, which is filled first if necessary.

    Each split is tokenised row by row, without special tokens and with a newline at the end of each
    row (--row_separator none: as it is). The tokens are concatenated and cut into sequences of
    `sequence_length` tokens that do not overlap; the remainder is dropped. Any number of processes
    of a machine may call this at once.

    Args:
        dataset: the value of --dataset, or data that was given in its place
        options: the flags that decide which text is read.
        check: whether to compare the token ids with their checksums. Without it they are trusted
            until `verify` has compared them.
    Raises:
        InputError: a flag has a value that does not work: unknown, no text, too few tokens.
        ConnectionError: the hub is needed and cannot be reached.
        TimeoutError: another process has been preparing the same tokens for an hour.
    """
    assert sequence_length > 0
    entry = cache_dir.expanduser() / "tokens" / entry_name(dataset, tokenizer, options)
    meta = _load_or_build(entry, dataset, tokenizer, options, check)
    if meta["read"]:
        log(visible(meta["read"]))
    for split in ("train", "validation"):
        _require_tokens(meta, split, sequence_length, dataset, options)
    train, validation = (
        _sequences(entry, meta, split, sequence_length)
        for split in ("train", "validation")
    )
    fingerprint = meta["fingerprint"] | {
        "sequence_length": sequence_length,
        "train_sequences": len(train),
        "validation_sequences": len(validation),
    }
    vocab_size = meta["fingerprint"]["vocab_size"]
    fewer = "; the text has no more merges" * (vocab_size < (bpe_size(tokenizer) or 0))
    held_out = fingerprint["validation_from"]
    counted = f"{len(train):,} sequences of {sequence_length} tokens" if (
        held_out == ALL_OF_THE_TEXT) else (
        f"{len(train):,} train and {len(validation):,} validation sequences of {sequence_length} "
        f"tokens; validation is {held_out}")
    log(visible(f"{fingerprint['dataset']} with {fingerprint['tokenizer']} (vocabulary of "
                f"{vocab_size:,}{fewer}): {counted}"))
    return TokenData(
        train, validation, vocab_size, fingerprint, entry / "tokenizer",
        content=content_digest(meta),
        tokenizer_json=(entry / "tokenizer" / "tokenizer.json").read_bytes(),
    )


def verify(dataset: Source, tokenizer: str, cache_dir: Path,
           options: TextOptions = TextOptions()) -> None:  # noqa: B008
    """Compare all cached files of a corpus with their checksums (about 1 GB/s).

    A damaged entry is reported and rebuilt. Files that were mapped before keep the damage: call
    `TokenData.reopen`. Raises the errors of `prepare`.
    """
    entry = cache_dir.expanduser() / "tokens" / entry_name(dataset, tokenizer, options)
    _load_or_build(entry, dataset, tokenizer, options, check=True)


def _require_tokens(
    meta: dict[str, Any], split: str, sequence_length: int, dataset: Source, options: TextOptions
) -> None:
    tokens = meta["fingerprint"][f"{split}_tokens"]
    if tokens < sequence_length:
        there = sum(meta["fingerprint"][f"{each}_tokens"] for each in ("train", "validation"))
        share = math.ceil(200 * sequence_length / max(there, 1)) / 100
        other = f", or --val_fraction {share:g}" * (split == "validation" and share <= 0.5)
        if options.max_tokens is not None:
            other += f", or more than --max_tokens {options.max_tokens}"
        argument = f"--dataset {dataset}"
        if isinstance(dataset, GivenData):
            argument = "the data that was given"
            other += ", or give more in validation=" * (split == "validation")
        raise InputError(
            f"--sequence_length {sequence_length}: the {split} split of {argument} has only "
            f"{tokens} tokens, {sequence_length - tokens} too few for one sequence; use shorter "
            f"sequences or a larger dataset{other}"
        )


def _sequences(
    entry: Path, meta: dict[str, Any], split: str, sequence_length: int
) -> np.ndarray:
    tokens = meta["fingerprint"][f"{split}_tokens"]
    shape = (tokens // sequence_length, sequence_length)
    path = entry / f"{split}.bin"
    with path.open("rb") as file:
        # Reading past the end of a mapped file kills the process, so check the size once more, on
        # the very file that is mapped.
        if os.fstat(file.fileno()).st_size != meta["files"][path.name]["bytes"]:
            raise DamagedFile(f"{path} changed while it was being opened; start again")
        return np.memmap(file, meta["dtype"], mode="r", shape=shape)


# ---- cache entries ------------------------------------------------------------------------------

def _load_or_build(entry: Path, dataset: Source, tokenizer: str, options: TextOptions, check: bool
                   ) -> dict[str, Any]:
    """The manifest of `entry`, which is built first if it is missing or damaged."""
    damage = ""
    try:
        if (meta := read_manifest(entry, check)) is not None:
            return meta
    except DamagedFile as error:
        damage = str(error)
    with naming_cache_dir(entry, damage):
        entry.parent.mkdir(parents=True, exist_ok=True)
        with lock_entry(entry, f"{dataset} with {tokenizer}"):
            with suppress(DamagedFile):
                if (meta := read_manifest(entry, check)) is not None:
                    return meta  # another process has built it
            if damage:  # reported by the process that repairs it, not by every rank
                log(visible(f"{damage}; rebuilding it"), WARNING)
            remove_stale(entry)
            return build_entry(entry, dataset, tokenizer, options)
