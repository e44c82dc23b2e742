"""An entry of the token cache while it is made; after a kill, from the last whole block on.

    <entry>.partial/
        entry/          the files of the entry so far
        rows/           the text (stored_rows.py), which parts of it are the splits, its documents
        train.starts    in tokens, where those documents of the train split begin that are tokenised
        progress.json   what of all this is whole; the rest is written again

The files are flushed to the disk before progress.json is written, which is done every few seconds:
what is made in less time leaves nothing to go on with.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fedrun.common.files import DamagedFile, read_json, write_json
from fedrun.data.cache_entry import MANIFEST
from fedrun.data.corpora import Corpus
from fedrun.data.documents import Documents
from fedrun.data.stored_rows import RowFiles, StoredRows

FORMAT = 1  # raise it when another version could not go on with what is there
RECORD_SECONDS = 2.0
PROGRESS, ROWS, ENTRY = "progress.json", "rows", "entry"


class PartialEntry:
    """The folder of an entry that is being made, and what is done of it."""

    def __init__(self, folder: Path) -> None:
        """Find what an earlier process has left, or begin from scratch if it is of no use."""
        self.folder, self.entry = folder, folder / ENTRY
        self._stages: dict[str, dict[str, Any]] = {}
        self._unsynced: dict[str, Callable[[], None]] = {}
        self._recorded_at = time.monotonic()
        try:
            held = read_json(folder / PROGRESS, dict)
            if held.get("format") == FORMAT and all(
                    (folder / name).stat().st_size >= size
                    for stage in held["stages"].values() for name, size in stage["files"].items()):
                self._stages = held["stages"]
        except (OSError, DamagedFile, KeyError, TypeError, AttributeError):
            pass  # not there, or not ours
        self.recorded = set(self._stages)
        """The stages with which a later process could go on."""
        for leftover in self.entry.glob(f"*{MANIFEST}*"):  # is made last, of all that is there
            leftover.unlink()
        if not self._stages:
            shutil.rmtree(folder, ignore_errors=True)
            for made in (folder, self.entry, folder / ROWS):
                made.mkdir()

    def done(self, stage: str) -> dict[str, Any] | None:
        """What `mark` was last given for a stage; None if it was not reached."""
        found = self._stages.get(stage)
        return None if found is None else found["value"]

    def mark(self, stage: str, value: Mapping[str, Any], files: Mapping[str, int],
             sync: Callable[[], None]) -> None:
        """Say how far a stage is. It is recorded every RECORD_SECONDS, with all other stages.

        files: names in `folder`, with their sizes in bytes now. sync: waits until they are on the
        disk. OSError if the disk is full.
        """
        self._stages[stage] = {"value": dict(value), "files": dict(files)}
        self._unsynced[stage] = sync
        if time.monotonic() - self._recorded_at < RECORD_SECONDS:
            return
        for each in self._unsynced.values():
            each()
        write_json(self.folder / PROGRESS, {"format": FORMAT, "stages": self._stages})
        self._unsynced.clear()
        self._recorded_at, self.recorded = time.monotonic(), set(self._stages)

    def mark_files(self, stage: str, files: Sequence[Path]) -> None:
        """Say that files in `folder` are whole."""
        def sync() -> None:
            for file in files:
                sync_file(file)

        self.mark(stage, {}, {str(file.relative_to(self.folder)): file.stat().st_size
                              for file in files}, sync)

    # ---- the text --------------------------------------------------------------------------------

    def mark_corpus(self, corpus: Corpus, files: RowFiles) -> None:
        """Say that the text has been read."""
        train, validation = corpus.train.spans, corpus.validation.spans

        def sync() -> None:
            files.sync()
            np.savez(self.folder / ROWS / "splits.npz", train=train, validation=validation)
            corpus.documents.save(self.folder / ROWS / "documents.npz")
            for name in ("splits.npz", "documents.npz"):
                sync_file(self.folder / ROWS / name)

        self.mark("text", {"name": corpus.name, "validation_from": corpus.validation_from,
                           "read": corpus.read, "held_out": corpus.validation is not corpus.train},
                  {f"{ROWS}/{name}": size for name, size in files.file_sizes().items()}, sync)

    def corpus(self) -> Corpus | None:
        """The text that an earlier process has read; None if there is none."""
        said = self.done("text")
        if said is None:
            return None
        files = RowFiles(self.folder / ROWS, whole=True)
        with np.load(self.folder / ROWS / "splits.npz") as held:
            train, validation = (StoredRows(files, held[name]) for name in ("train", "validation"))
        return Corpus(said["name"], train, validation if said["held_out"] else train,
                      said["validation_from"], Documents.load(
                          self.folder / ROWS / "documents.npz"), said["read"])


def sync_file(path: Path) -> None:
    """Wait until a file is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
