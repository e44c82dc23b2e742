"""Text to token ids, once per machine, kept as memory-mapped files.

    cache_dir/tokens/<corpus>-<tokenizer>-<key>/
        tokenizer/          tokenizer.json, tokenizer_config.json
        train.bin           token ids of the whole split, uint16 or int32 in this machine's order
        validation.bin
        documents.npz       where the documents of the train split begin, and their sources
        topics-<key>.npz    the documents' topics, made when they are first asked for
        entry.json          what the entry holds, with checksums (cache_entry.py); written last, but for
                            topics, which carry their own

The key is a digest of what was asked for: names, and for local files their sizes and times, so
that a warm start reads no text and a changed file is never served stale. What came from the hub
is kept under its name until the entry is deleted. The sequence length is no part of the key: it
only decides how a stream of tokens is cut. An entry that is damaged is named and made again.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import importlib.metadata
import math
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fedrun.common.errors import InputError
from fedrun.common.files import DamagedFile
from fedrun.common.terminal import visible
from fedrun.data import corpora
from fedrun.data.cache_entry import (
    content_digest,
    entry_name,
    lock_entry,
    naming_cache_dir,
    read_manifest,
    write_manifest,
)
from fedrun.data.documents import Documents
from fedrun.data.text_options import TextOptions
from fedrun.data.tokenizer import (
    load_without_custom_code,
    save_tokenizer,
    tokenizer_name,
    write_ids,
)
from fedrun.data.topics import Topics, find_topics

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

TOPICS_LAYOUT = 2  # raise it when the same documents would get other topics


@dataclass(frozen=True)
class TokenData:
    """The token sequences of a corpus.

    `train` and `validation` are read-only memory maps, (n_sequences, sequence_length), uint16 or
    int32 by vocabulary size. `fingerprint` is JSON-able and equal on two machines exactly where
    text, tokenizer, cut and tokenizer library are.
    """

    train: np.ndarray
    validation: np.ndarray
    vocab_size: int
    fingerprint: dict[str, Any]
    tokenizer_path: Path
    content: str = field(default="", kw_only=True)
    """Digest of the token ids as they were written."""
    tokenizer_json: bytes = field(default=b"", kw_only=True)
    """The tokenizer, kept in memory: the cache may be deleted under a run."""

    def reopen(self) -> TokenData:
        """The same, mapped from the files that lie in the cache now: an entry that was made again
        took the place of the one before.

        Raises ValueError where its text is another.
        """
        entry = self.tokenizer_path.parent
        body = read_manifest(entry, large=False)
        if body is None or not body["fingerprint"].items() <= self.fingerprint.items():
            raise InputError(f"--dataset {self.fingerprint['dataset']}: it is no longer the text "
                             f"that {entry} was made from; start again")
        length = self.fingerprint["sequence_length"]
        return replace(self, train=_sequences(entry, body, "train", length),
                       validation=_sequences(entry, body, "validation", length),
                       content=content_digest(body))

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer without transformers, whose import takes longer than what it is for."""
        from tokenizers import Tokenizer

        return Tokenizer.from_buffer(self.tokenizer_json)

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """The fast tokenizer that made the tokens, from the cache."""
        return load_without_custom_code(self.tokenizer_path)

    def load_documents(self) -> Documents:
        """The documents of the train split, by tokens (the part that is cut off included)."""
        return Documents.load(self.tokenizer_path.parent / "documents.npz")

    def load_topics(self) -> Topics:
        """Their topics, found now or by an earlier or concurrent process; kept in the cache, unless
        it may only be read.

        Raises:
            ValueError: the cache has no room.
            TimeoutError: another process has been at it for an hour.
        """
        entry = self.tokenizer_path.parent
        version = importlib.metadata.version("scikit-learn")
        file = entry / f"topics-{TOPICS_LAYOUT}-{version}.npz"
        held = _read_topics(file)
        if held is None:
            with naming_cache_dir(entry):
                try:
                    with lock_entry(entry, "the topics of its documents", _to_stderr):
                        held = _read_topics(file, say=lambda line: None)
                        if held is None:
                            partial = entry / "topics.partial.npz"
                            self._find_topics().save(partial)
                            partial.rename(file)
                            held = Topics.load(file)
                except OSError as error:
                    if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
                        raise
                    held = self._find_topics()
        return held

    def _find_topics(self) -> Topics:
        started = time.perf_counter()
        stream = np.memmap(self.tokenizer_path.parent / "train.bin", self.train.dtype, mode="r")
        starts = self.load_documents().starts
        found = find_topics(stream, starts, self.vocab_size)
        _to_stderr(f"found topics among {len(starts) - 1:,} documents in "
                   f"{time.perf_counter() - started:.1f} s")
        return found


def _to_stderr(line: str) -> None:
    print(visible(line), file=sys.stderr, flush=True)


def _visibly(say: Callable[[str], None]) -> Callable[[str], None]:
    """What is said names folders, files and columns of others."""
    return lambda line: say(visible(line))


def _read_topics(file: Path, say: Callable[[str], None] = _to_stderr) -> Topics | None:
    """The topics in a file; None where there is none, or it is damaged, which is said."""
    try:
        return Topics.load(file)
    except FileNotFoundError:
        return None
    except DamagedFile as error:
        say(f"{error}; the topics are found again")
        return None


def prepare(
    dataset: str,
    tokenizer: str,
    sequence_length: int,
    cache_dir: Path,
    say: Callable[[str], None] = print,
    options: TextOptions = TextOptions(),  # noqa: B008
    check: bool = True,
) -> TokenData:
    """Token sequences of `dataset`, tokenised now or by an earlier or concurrent process.

    Every split is tokenised row by row, without special tokens, each row ending in a newline;
    concatenated, and cut into sequences of `sequence_length` tokens that do not overlap. The
    remainder is dropped. Any number of processes of a machine may call this at once; without
    `check` token ids are not compared with their checksums, which `verify` does. `options` says
    which text the dataset's name stands for, as far as the user has a say in it.

    Raises:
        ValueError: a flag's value that cannot work: unknown, no text, too few tokens.
        ConnectionError: the hub is needed and cannot be reached.
        TimeoutError: another process has been preparing the same tokens for an hour.
    """
    assert sequence_length > 0
    say = _visibly(say)
    entry = cache_dir.expanduser() / "tokens" / entry_name(dataset, tokenizer, options)
    meta = _load_or_build(entry, dataset, tokenizer, options, say, check)
    if meta["read"]:
        say(meta["read"])
    for split in ("train", "validation"):
        _require_tokens(meta, split, sequence_length, dataset)
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
    say(
        f"{fingerprint['dataset']} with {fingerprint['tokenizer']} (vocabulary of "
        f"{vocab_size:,}): {len(train):,} train and {len(validation):,} validation sequences of "
        f"{sequence_length} tokens; validation is {fingerprint['validation_from']}"
    )
    return TokenData(
        train, validation, vocab_size, fingerprint, entry / "tokenizer",
        content=content_digest(meta),
        tokenizer_json=(entry / "tokenizer" / "tokenizer.json").read_bytes(),
    )


def verify(dataset: str, tokenizer: str, cache_dir: Path, say: Callable[[str], None],
           options: TextOptions = TextOptions()) -> None:  # noqa: B008
    """Compare every cached file of a corpus with its checksum (about 1 GB/s); what is damaged is
    named and made again. Raises what `prepare` does; maps of the files before keep the damage."""
    entry = cache_dir.expanduser() / "tokens" / entry_name(dataset, tokenizer, options)
    _load_or_build(entry, dataset, tokenizer, options, say, check=True)


def _require_tokens(
    meta: dict[str, Any], split: str, sequence_length: int, dataset: str
) -> None:
    tokens = meta["fingerprint"][f"{split}_tokens"]
    if tokens < sequence_length:
        there = sum(meta["fingerprint"][f"{each}_tokens"] for each in ("train", "validation"))
        share = math.ceil(200 * sequence_length / max(there, 1)) / 100
        other = f", or --val_fraction {share:g}" * (split == "validation" and share <= 0.5)
        raise InputError(
            f"--sequence_length {sequence_length}: the {split} split of --dataset {dataset} has "
            f"only {tokens} tokens, {sequence_length - tokens} too few for one sequence; take "
            f"shorter sequences or a larger dataset{other}"
        )


def _sequences(
    entry: Path, meta: dict[str, Any], split: str, sequence_length: int
) -> np.ndarray:
    tokens = meta["fingerprint"][f"{split}_tokens"]
    shape = (tokens // sequence_length, sequence_length)
    path = entry / f"{split}.bin"
    with path.open("rb") as file:
        # Reading beyond the end of a mapped file kills the process, so its size is looked at once
        # more, of the very file that is mapped.
        if os.fstat(file.fileno()).st_size != meta["files"][path.name]["bytes"]:
            raise DamagedFile(f"{path} has changed while it was opened; start again")
        return np.memmap(file, meta["dtype"], mode="r", shape=shape)


# ---------------------------------------------------------------------------------------------
# Cache entries


def _load_or_build(
    entry: Path, dataset: str, tokenizer: str, options: TextOptions, say: Callable[[str], None],
    check: bool,
) -> dict[str, Any]:
    """What `entry` holds, made now where it is absent or damaged."""
    damage = ""
    try:
        if (meta := read_manifest(entry, check)) is not None:
            return meta
    except DamagedFile as error:
        damage = str(error)
        say(f"{damage}; it is made again")
    with naming_cache_dir(entry, damage):
        entry.parent.mkdir(parents=True, exist_ok=True)
        with lock_entry(entry, f"{dataset} with {tokenizer}", say):
            with suppress(DamagedFile):
                if (meta := read_manifest(entry, check)) is not None:
                    return meta  # another process has made it
            return _build(entry, dataset, tokenizer, say, options)


def _build(entry: Path, dataset: str, tokenizer: str, say: Callable[[str], None], options: TextOptions
           ) -> dict[str, Any]:
    """Write `entry` beside its place, then move it there whole. Under its lock."""
    started = time.perf_counter()
    corpus = corpora.load_corpus(dataset, options)
    work, damaged = Path(f"{entry}.partial"), Path(f"{entry}.damaged")
    for leftover in (work, damaged):
        shutil.rmtree(leftover, ignore_errors=True)
    work.mkdir()
    say(f"tokenising {corpus.name} with {tokenizer}, once on this machine")
    tokeniser = save_tokenizer(tokenizer, corpus, work / "tokenizer")
    vocab_size = max(tokeniser.get_vocab().values()) + 1
    dtype = np.dtype(np.uint16 if vocab_size <= 2**16 else np.int32)
    rows = {"train": corpus.train, "validation": corpus.validation}
    row_tokens = {
        split: write_ids(
            work / f"{split}.bin", rows[split], tokeniser, dtype, f"--tokenizer {tokenizer}"
        )
        for split in rows
    }
    tokens = {split: int(row_tokens[split].sum()) for split in rows}
    documents = corpus.documents.in_tokens(row_tokens["train"])
    documents.save(work / "documents.npz")
    # The library's threads do not survive a fork, and every fork after their use makes it warn.
    # What is left to do, single samples, needs none.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    tokenizer_json = (work / "tokenizer" / "tokenizer.json").read_bytes()
    fingerprint: dict[str, Any] = {
        "dataset": corpus.name,
        "dataset_sha256": corpus.fingerprint,
        "validation_from": corpus.validation_from,
        "tokenizer": tokenizer_name(tokenizer),
        "tokenizer_sha256": hashlib.sha256(tokenizer_json).hexdigest(),
        "tokenizers_version": importlib.metadata.version("tokenizers"),
        "vocab_size": vocab_size,
        "train_tokens": tokens["train"],
        "validation_tokens": tokens["validation"],
        "train_documents": len(documents),
        "document": documents.kind,
    }
    if dataset == "pydocs":
        fingerprint["python_version"] = platform.python_version()
    meta = write_manifest(work, {"dtype": dtype.str, "fingerprint": fingerprint, "read": corpus.read})
    if entry.exists():  # other processes may read of it what is not damaged
        entry.rename(damaged)
    work.rename(entry)
    shutil.rmtree(damaged, ignore_errors=True)
    say(f"tokenised {sum(tokens.values()):,} tokens in {time.perf_counter() - started:.1f} s")
    return meta
