"""Datasets that tests write, and the real ones that may lie beside the repository."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from fedrun.data.corpora import Corpus, load_corpus
from fedrun.data.documents import Documents
from fedrun.data.stored_rows import FILES, RowFiles, StoredRows
from fedrun.data.text_options import TextOptions
from tests.support.runs import ROOT

SHARED_DATA = ROOT.parent / "shared" / "data"
WIKITEXT = SHARED_DATA / "wikitext-2-heldout"
GPT2 = SHARED_DATA / "gpt2"
needs_shared_data = pytest.mark.skipif(
    not WIKITEXT.is_dir() or not GPT2.is_dir(),
    reason="no real text and tokenizer in ../shared/data",
)


def text_file(folder: Path, n_lines: int = 400) -> Path:
    """A text file of lines that differ."""
    file = folder / "tale.txt"
    file.write_text("".join(
        f"{n} ships went out to sea, and {n // 2} of them came home.\n" for n in range(n_lines)),
        encoding="utf-8")
    return file


def dataset_folder(folder: Path, **columns: list[object]) -> Path:
    """A folder as datasets.load_dataset reads it, with only a train split."""
    folder.mkdir()
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def lines(tag: str, n: int = 40) -> list[str]:
    return [f"{tag} says sentence {number}." for number in range(n)]


def write(folder: Path, *names: str) -> Path:
    """Files of 40 lines, or of 40 records, each of which names its file."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        text = "".join(f"{json.dumps({'text': line})}\n" if ".json" in name else f"{line}\n"
                       for line in lines(name))
        path.write_text(text, encoding="utf-8")
    return folder


def files_in(rows: list[str]) -> list[str]:
    """The names of the files that rows of `write` come from, in order."""
    return list(dict.fromkeys(row.partition(" says")[0] for row in rows if row.strip()))


def records(path: Path, n: int = 60, users: int = 3) -> Path:
    """A JSON Lines file with the columns title, body, n and user."""
    path.write_text("".join(json.dumps({"title": f"Title {i}", "body": f"Body {i}", "n": i,
                                        "user": f"user {i % users}"}) + "\n" for i in range(n)))
    return path


@dataclass(frozen=True)
class Loaded:
    """A corpus in memory; the fields are those of `Corpus`."""

    name: str
    train: list[str]
    validation: list[str]
    validation_from: str
    documents: Documents
    read: str
    fingerprint: str


def in_memory(corpus: Corpus) -> Loaded:
    return Loaded(corpus.name, list(corpus.train), list(corpus.validation), corpus.validation_from,
                  corpus.documents, corpus.read, corpus.fingerprint)


def on_disk(texts: Sequence[str]) -> StoredRows:
    """Rows as a corpus has them."""
    with tempfile.TemporaryDirectory() as folder:  # open files stay until nobody has them
        return RowFiles(Path(folder)).extend(texts)


def load(path: Path | str, **reading: Any) -> Loaded:
    folder = Path(tempfile.mkdtemp())
    try:
        return in_memory(load_corpus(str(path), RowFiles(folder), TextOptions(**reading)))
    finally:
        for name in FILES:  # tests break what else could empty a folder
            (folder / name).unlink()
        folder.rmdir()


def entries(cache_dir: Path) -> list[Path]:
    """The folders in the token cache."""
    return [path for path in (cache_dir / "tokens").iterdir() if path.is_dir()]


def entry_files(cache: Path) -> dict[str, str]:
    """SHA-256 of the files of the one entry in a cache that is otherwise empty."""
    (entry,) = [path for path in (cache / "tokens").iterdir() if path.is_dir()]
    return {str(file.relative_to(entry)): hashlib.sha256(file.read_bytes()).hexdigest()
            for file in sorted(entry.rglob("*")) if file.is_file()}
