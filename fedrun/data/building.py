"""Writes an entry of the token cache: reads text, makes a tokenizer, tokenises."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import os
import platform
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fedrun.common.log import log
from fedrun.common.terminal import visible
from fedrun.data import corpora
from fedrun.data.cache_entry import write_manifest
from fedrun.data.corpora import Corpus
from fedrun.data.documents import Documents
from fedrun.data.given import GivenData, IdCorpus, Source, of_clients, require_a_sequence
from fedrun.data.given_parts import in_chunks
from fedrun.data.helper_process import HelperEnded
from fedrun.data.limited_rows import LimitedRows, MadeIds, RowsChanged
from fedrun.data.partial_entry import ROWS, PartialEntry
from fedrun.data.stored_rows import RowFiles
from fedrun.data.text_options import TextOptions
from fedrun.data.tokenising import write_ids
from fedrun.data.tokenising_pool import Encodes
from fedrun.data.tokenising_process import Encoder
from fedrun.data.tokenizer import bpe_size, load_tokenizer, save_tokenizer, tokenizer_name

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SPLITS = ("train", "validation")
COUNTED = "counted"  # the stage of LimitedRows


def build_entry(entry: Path, dataset: Source, tokenizer: str, options: TextOptions
                ) -> dict[str, Any]:
    """Write the files into a folder beside `entry`, then rename it. Call with the entry locked.

    What a killed process has left there is made use of (partial_entry.py). It also stays if the
    user interrupts, and if the disk is full, if token ids have been recorded by then: the text
    alone is sooner read again than room is made for it.

    Returns:
        the manifest
    """
    partial = PartialEntry(Path(f"{entry}.partial"))
    try:
        meta = _build(entry, partial, dataset, tokenizer, options)
    except BaseException as error:
        if isinstance(error, OSError):
            kept = bool({"train", COUNTED} & partial.recorded)
        else:
            kept = bool(partial.recorded) and isinstance(
                error, MemoryError | HelperEnded | KeyboardInterrupt | SystemExit)
            # Of a stream that broke off, which may look like text that cannot be read.
            kept |= COUNTED in partial.recorded and not any(
                isinstance(one, RowsChanged) for one in (error, error.__cause__))
        if not kept:
            shutil.rmtree(partial.folder, ignore_errors=True)
        raise
    shutil.rmtree(partial.folder, ignore_errors=True)
    return meta


def _build(entry: Path, partial: PartialEntry, dataset: Source, tokenizer: str,
           options: TextOptions) -> dict[str, Any]:
    started = time.perf_counter()
    cache_dir, work = entry.parents[1], partial.entry
    make = functools.partial(_tokenizer, partial, tokenizer, options, cache_dir)
    corpus = partial.corpus() or _read(partial, dataset, options, cache_dir, make,
                                       bpe_size(tokenizer) is not None)
    damaged = Path(f"{entry}.damaged")
    shutil.rmtree(damaged, ignore_errors=True)
    log(visible(f"tokenising {corpus.name} with {tokenizer}, once on this machine"
                if isinstance(corpus, Corpus) else f"writing {corpus.name} into {entry.parent}"))
    if said := partial.done("train"):
        log(f"an interrupted start has left {said['tokens']:,} tokens: going on behind them")
    loaded, encoder = make(corpus.train if isinstance(corpus, Corpus) else None)
    vocab_size, dtype = _vocab_size(loaded), encoder.dtype
    if isinstance(corpus, IdCorpus):
        assert isinstance(dataset, GivenData)
        dataset.require_below(vocab_size, f"of --tokenizer {tokenizer}")
        for split, arrays in (("train", corpus.train), ("validation", corpus.validation)):
            with (work / f"{split}.bin").open("wb") as file:
                for array in arrays:
                    file.writelines(in_chunks(array, dtype))
        documents = corpus.documents
    else:
        documents = _tokenise(corpus, encoder if options.max_tokens is None else
                              MadeIds(partial.folder / ROWS, encoder), loaded, partial)
        if isinstance(dataset, GivenData) and dataset.by_client:
            uncut, documents = documents.starts[-1], _cut_clients(
                work / "train.bin", dtype, documents, dataset)
            corpus = replace(corpus, read=dataset.describe_cut(uncut, documents.starts[-1]))
    documents.save(work / "documents.npz")
    # The library's threads do not survive a fork, and it warns at every fork after it has used
    # them. From here on only single samples are tokenised, which needs no threads.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    tokens = {split: (work / f"{split}.bin").stat().st_size // dtype.itemsize for split in SPLITS}
    tokenizer_json = (work / "tokenizer" / "tokenizer.json").read_bytes()
    fingerprint: dict[str, Any] = {
        "dataset": corpus.name,
        # Rows alone do not say whose they are.
        "dataset_sha256": dataset.sha256 if isinstance(dataset, GivenData) and dataset.by_client
        else corpus.fingerprint,
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
    meta = write_manifest(
        work, {"dtype": dtype.str, "fingerprint": fingerprint, "read": corpus.read})
    if entry.exists():  # other processes may be reading its undamaged files
        entry.rename(damaged)
    work.rename(entry)
    shutil.rmtree(damaged, ignore_errors=True)
    made = tokens["train"] + tokens["validation"] * (corpus.validation is not corpus.train)
    log(f"{'tokenised' if isinstance(corpus, Corpus) else 'wrote'} {made:,} tokens "
        f"in {time.perf_counter() - started:.1f} s")
    return meta


def _tokenizer(partial: PartialEntry, tokenizer: str, options: TextOptions, cache_dir: Path,
               rows: Sequence[str] | None) -> tuple[Tokenizer, Encoder]:
    """The tokenizer of the entry, which is saved there first if it is not. rows: to train it on."""
    folder = partial.entry / "tokenizer"
    if partial.done("tokenizer") is None:
        shutil.rmtree(folder, ignore_errors=True)
        save_tokenizer(tokenizer, rows, folder, options.row_separator, cache_dir)
        partial.mark_files("tokenizer", sorted(folder.iterdir()))
    loaded = load_tokenizer(folder / "tokenizer.json")
    dtype = np.dtype(np.uint16 if _vocab_size(loaded) <= 2**16 else np.int32)
    return loaded, Encoder(partial.folder / ROWS, folder / "tokenizer.json", dtype,
                           f"--tokenizer {tokenizer}", options.row_separator)


def _vocab_size(tokenizer: Tokenizer) -> int:
    return max(tokenizer.get_vocab().values()) + 1


def _read(partial: PartialEntry, dataset: Source, options: TextOptions, cache_dir: Path,
          make: Callable[[Sequence[str] | None], tuple[Tokenizer, Encoder]], trained: bool
          ) -> Corpus | IdCorpus:
    """Read the text. make: `_tokenizer` for rows, which it is trained on if it is `trained`."""
    folder = partial.folder / ROWS
    files = RowFiles(folder) if options.max_tokens is None else LimitedRows(
        folder, make, trained, partial.done(COUNTED), functools.partial(_count, partial))
    corpus = dataset.read(files, options) if isinstance(dataset, GivenData) else \
        corpora.load_corpus(dataset, files, options, cache_dir)
    if isinstance(corpus, Corpus):
        partial.mark_corpus(corpus, files)
    return corpus


def _count(partial: PartialEntry, value: Mapping[str, int], sizes: Mapping[str, int],
           sync: Callable[[], None]) -> None:
    """Record how far rows have been read and tokenised, with --max_tokens."""
    partial.mark(COUNTED, value, {f"{ROWS}/{name}": size for name, size in sizes.items()}, sync)


def _tokenise(corpus: Corpus, encoder: Encodes, tokenizer: Tokenizer, partial: PartialEntry
              ) -> Documents:
    """Write the token ids of both splits; returns the documents in tokens."""
    work = partial.entry
    starts = write_ids(work / "train.bin", corpus.train, corpus.documents.starts, encoder,
                       tokenizer, partial)
    if corpus.validation is corpus.train:  # nothing is held out
        shutil.copyfile(work / "train.bin", work / "validation.bin")
    else:
        write_ids(work / "validation.bin", corpus.validation,
                  np.array([len(corpus.validation)]), encoder, tokenizer, partial)
    return replace(corpus.documents, starts=starts)


def _cut_clients(file: Path, dtype: np.dtype, documents: Documents, given: GivenData) -> Documents:
    """Remove what is left of each client's tokens after its last whole sequence, so that no
    sequence has tokens of two. Returns the clients' documents in the tokens that stay."""
    length, starts = given.sequence_length, [0]
    stream = np.memmap(file, dtype, mode="r") if documents.starts[-1] else np.empty(0, dtype)
    with file.with_suffix(".cut").open("wb") as out:
        for part, begin, end in zip(given.parts, documents.starts[:-1].tolist(),
                                    documents.starts[1:].tolist(), strict=True):
            require_a_sequence(part.name, end - begin, length)
            starts.append(starts[-1] + (end - begin) // length * length)
            out.writelines(in_chunks(stream[begin:begin + starts[-1] - starts[-2]], dtype))
    file.with_suffix(".cut").rename(file)
    return of_clients(starts)
