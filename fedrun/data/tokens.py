"""Text to token ids, once per machine, kept as memory-mapped files.

    cache_dir/tokens/<corpus>-<tokenizer>-<key>/
        tokenizer/          tokenizer.json, tokenizer_config.json
        train.bin           token ids of the whole split, uint16 or int32 in this machine's order
        validation.bin
        documents.npz       where the documents of the train split begin, and their sources
        topics-<key>.npz    the documents' topics, made when they are first asked for
        entry.json          what the entry holds; written last, but for topics

The key is a digest of what was asked for: names, and for local files their sizes and times, so
that a warm start reads no text and a changed file is never served stale. What came from the hub
is kept under its name until the entry is deleted. The sequence length is no part of the key: it
only decides how a stream of tokens is cut.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import itertools
import json
import os
import platform
import re
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fedrun.data import corpora
from fedrun.data.documents import Documents
from fedrun.data.tokenizer import ACCEPTED, HUB_NAME, bpe_size, save_tokenizer, with_newlines
from fedrun.data.topics import Topics, find_topics
from fedrun.terminal import visible

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

LAYOUT = 2  # raise it when the same text would become other files: old entries are then ignored
TOPICS_LAYOUT = 1  # raise it when the same documents would get other topics
LOCK_SECONDS = 3600.0  # how long to wait for another process that prepares the same tokens
ROWS_AT_ONCE = 1000


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

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """The fast tokenizer that made the tokens, from the cache."""
        from transformers import AutoTokenizer

        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(self.tokenizer_path)
        return tokenizer

    def load_documents(self) -> Documents:
        """The documents of the train split, by tokens (the part that is cut off included)."""
        return Documents.load(self.tokenizer_path.parent / "documents.npz")

    def load_topics(self) -> Topics:
        """Their topics, found now or by an earlier or concurrent process.

        Raises:
            ValueError: the cache cannot be written.
            TimeoutError: another process has been at it for an hour.
        """
        entry = self.tokenizer_path.parent
        version = importlib.metadata.version("scikit-learn")
        file = entry / f"topics-{TOPICS_LAYOUT}-{version}.npz"
        if not file.exists():
            try:
                with _only_one(entry, "the topics of its documents", _to_stderr):
                    if not file.exists():
                        self._write_topics(file)
            except TimeoutError:
                raise
            except OSError as error:
                raise ValueError(f"--cache_dir {entry.parents[1]}: {error}") from error
        return Topics.load(file)

    def _write_topics(self, file: Path) -> None:
        started = time.perf_counter()
        stream = np.memmap(file.parent / "train.bin", self.train.dtype, mode="r")
        starts = self.load_documents().starts
        partial = file.parent / "topics.partial.npz"
        find_topics(stream, starts, self.vocab_size).save(partial)
        partial.rename(file)
        _to_stderr(f"found topics among {len(starts) - 1:,} documents, once on this machine, in "
                   f"{time.perf_counter() - started:.1f} s")


def _to_stderr(line: str) -> None:
    print(visible(line), file=sys.stderr, flush=True)


def _visibly(say: Callable[[str], None]) -> Callable[[str], None]:
    """What is said names folders, files and columns of others."""
    return lambda line: say(visible(line))


def prepare(
    dataset: str,
    tokenizer: str,
    sequence_length: int,
    cache_dir: Path,
    say: Callable[[str], None] = print,
) -> TokenData:
    """Token sequences of `dataset`, tokenised now or by an earlier or concurrent process.

    Every split is tokenised row by row, without special tokens, each row ending in a newline;
    concatenated, and cut into sequences of `sequence_length` tokens that do not overlap. The
    remainder is dropped. Any number of processes of a machine may call this at once.

    Raises:
        ValueError: a flag's value that cannot work: unknown, no text, too few tokens.
        ConnectionError: the hub is needed and cannot be reached.
        TimeoutError: another process has been preparing the same tokens for an hour.
    """
    assert sequence_length > 0
    say = _visibly(say)
    entry = cache_dir.expanduser() / "tokens" / _entry_name(dataset, tokenizer)
    meta = _read_entry(entry)
    if meta is None:
        try:
            entry.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"--cache_dir {cache_dir}: {error}") from error
        with _only_one(entry, f"{dataset} with {tokenizer}", say):
            meta = _read_entry(entry) or _build(entry, dataset, tokenizer, say)
    train, validation = (
        _sequences(entry, meta, split, sequence_length, dataset)
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
    return TokenData(train, validation, vocab_size, fingerprint, entry / "tokenizer")


def _sequences(
    entry: Path, meta: dict[str, Any], split: str, sequence_length: int, dataset: str
) -> np.ndarray:
    tokens = meta["fingerprint"][f"{split}_tokens"]
    n_sequences = tokens // sequence_length
    if n_sequences == 0:
        raise ValueError(
            f"--sequence_length {sequence_length}: the {split} split of --dataset {dataset} has "
            f"only {tokens} tokens; take shorter sequences or a larger dataset"
        )
    shape = (n_sequences, sequence_length)
    return np.memmap(entry / f"{split}.bin", meta["dtype"], mode="r", shape=shape)


# ---------------------------------------------------------------------------------------------
# Cache entries


def _entry_name(dataset: str, tokenizer: str) -> str:
    """A folder name that changes with everything that decides the tokens."""
    size = bpe_size(tokenizer)
    folder = Path(tokenizer).expanduser()
    tokenizer_files = sorted(f for f in folder.rglob("*") if f.is_file()) if size is None else []
    if size is None and not folder.is_dir() and not HUB_NAME.fullmatch(tokenizer):
        raise ValueError(f"--tokenizer {tokenizer}: no such folder; give {ACCEPTED}")
    asked = [
        LAYOUT,
        importlib.metadata.version("tokenizers"),
        dataset,
        corpora.file_signature(corpora.local_files(dataset)),
        tokenizer,
        corpora.file_signature(tokenizer_files),
    ]
    key = hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:16]
    names = f"{corpora.dataset_name(dataset)}-{_tokenizer_name(tokenizer)}"
    return f"{re.sub(r'[^A-Za-z0-9.]+', '-', names).strip('-.')[-80:]}-{key}"


def _tokenizer_name(tokenizer: str) -> str:
    folder = Path(tokenizer).expanduser()
    return folder.resolve().name if folder.is_dir() else tokenizer


def _read_entry(entry: Path) -> dict[str, Any] | None:
    """What `entry` holds, or None where it is absent or torn."""
    try:
        meta: dict[str, Any] = json.loads((entry / "entry.json").read_text(encoding="utf-8"))
        sizes = {name: (entry / name).stat().st_size for name in meta["bytes"]}
    except (OSError, ValueError, KeyError):
        return None
    return meta if sizes == meta["bytes"] else None


@contextmanager
def _only_one(entry: Path, what: str, say: Callable[[str], None]) -> Iterator[None]:
    """Hold the lock of `entry`; one process of the machine at a time gets past this."""
    from filelock import FileLock, Timeout

    lock, holder = FileLock(f"{entry}.lock"), Path(f"{entry}.holder")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        say(f"waiting for {_holder(holder)}, which prepares {what}")
        try:
            lock.acquire(timeout=LOCK_SECONDS, poll_interval=0.2)
        except Timeout:
            raise TimeoutError(
                f"waited {LOCK_SECONDS:.0f} s for {_holder(holder)}, which prepares {what}; end "
                "it if it hangs, or give another --cache_dir"
            ) from None
    try:
        holder.write_text(f"process {os.getpid()} on {socket.gethostname()}", encoding="utf-8")
        yield
    finally:
        holder.unlink(missing_ok=True)
        lock.release()


def _holder(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8") or "another process"
    except OSError:  # it has the lock, and has not written its name yet
        return "another process"


def _build(entry: Path, dataset: str, tokenizer: str, say: Callable[[str], None]) -> dict[str, Any]:
    """Write `entry` beside its place, then move it there whole. Under its lock."""
    started = time.perf_counter()
    corpus = corpora.load_corpus(dataset)
    work = Path(f"{entry}.partial")
    for leftover in (work, entry):
        shutil.rmtree(leftover, ignore_errors=True)
    work.mkdir()
    say(f"tokenising {corpus.name} with {tokenizer}, once on this machine")
    tokeniser = save_tokenizer(tokenizer, corpus, work / "tokenizer")
    vocab_size = max(tokeniser.get_vocab().values()) + 1
    dtype = np.dtype(np.uint16 if vocab_size <= 2**16 else np.int32)
    rows = {"train": corpus.train, "validation": corpus.validation}
    row_tokens = {
        split: _write_tokens(work / f"{split}.bin", rows[split], tokeniser, dtype) for split in rows
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
        "tokenizer": _tokenizer_name(tokenizer),
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
    written = ("tokenizer/tokenizer.json", "train.bin", "validation.bin", "documents.npz")
    meta = {
        "dtype": dtype.str,
        "bytes": {name: (work / name).stat().st_size for name in written},
        "fingerprint": fingerprint,
    }
    (work / "entry.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")
    work.rename(entry)
    say(f"tokenised {sum(tokens.values()):,} tokens in {time.perf_counter() - started:.1f} s")
    return meta


def _write_tokens(
    path: Path, rows: list[str], tokeniser: Tokenizer, dtype: np.dtype
) -> np.ndarray:
    """Write the ids of all rows to a new file, end to end; how many each row has, int64 (rows,)."""
    from tqdm import tqdm

    counts: list[int] = []
    with path.open("wb") as file, tqdm(total=len(rows), unit=" rows", disable=None) as bar:
        texts = with_newlines(rows)
        while batch := list(itertools.islice(texts, ROWS_AT_ONCE)):
            encodings = tokeniser.encode_batch_fast(batch, add_special_tokens=False)
            ids = np.fromiter(itertools.chain.from_iterable(e.ids for e in encodings), dtype)
            file.write(ids.tobytes())
            counts += [len(e.ids) for e in encodings]
            bar.update(len(batch))
    return np.array(counts, dtype=np.int64)
