"""Where the text comes from: the hub, local files, or the documentation of the running Python.

A corpus is two lists of rows. A row is what the source calls one: a row of the dataset (for
WikiText a line), a line of a text file, a whole document for `pydocs`.
"""

from __future__ import annotations

import functools
import glob
import hashlib
import re
import sys
import sysconfig
import tempfile
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from fedrun.data.documents import Documents, TextFile, find_documents
from fedrun.data.pydocs import (
    PYDOCS_HELD_OUT,
    pydocs_documents,
    read_pydocs,
    split_by_hash,
    stdlib_files,
)
from fedrun.errors import one_line

ALIASES = {
    "wikitext-2": "Salesforce/wikitext:wikitext-2-raw-v1",
    "wikitext-103": "Salesforce/wikitext:wikitext-103-raw-v1",
}
ACCEPTED = (
    f"{', '.join(ALIASES)}, pydocs, a hub id (owner/name or owner/name:config), a folder that "
    "datasets.load_dataset reads, or UTF-8 text files ('path/*.txt')"
)
HUB_ID = re.compile(r"(?P<name>\w[\w.-]*/\w[\w.-]*)(:(?P<config>[\w.-]+))?")
HUB_SECONDS = 5.0  # how long the hub may take to answer before it counts as out of reach


@dataclass(frozen=True)
class Corpus:
    """The rows of one dataset, and where its validation split comes from."""

    name: str
    train: list[str]
    validation: list[str]
    validation_from: str
    documents: Documents
    """Of the train rows."""

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of all rows in their order, split by split."""
        digest = hashlib.sha256()
        for rows in (self.train, self.validation):
            digest.update(b"%d rows\n" % len(rows))
            for row in rows:
                text = row.encode()
                digest.update(b"%d bytes\n" % len(text))
                digest.update(text)
        return digest.hexdigest()


def load_corpus(dataset: str) -> Corpus:
    """Read all text of `dataset` (the value of `--dataset`).

    A source without a validation split has the last twentieth of its train rows held out.

    Raises:
        ValueError: an unknown dataset, no text in it, or no column that is clearly the text.
        ConnectionError: the hub cannot be reached and the dataset is not in its local cache.
    """
    name = dataset_name(dataset)
    if dataset == "pydocs":
        ours, held = split_by_hash(read_pydocs(local_files(dataset)))
        train, validation = list(ours.values()), list(held.values())
        documents = pydocs_documents(list(ours))
        validation_from = f"whole documents, {PYDOCS_HELD_OUT:.0%} of the text"
    else:
        splits = _read_splits(dataset)
        train, files = splits["train"]
        validation = splits["validation"].rows if "validation" in splits else []
        validation_from = "the split of that name"
        if "validation" not in splits:
            held_out = -(-len(train) // 20)
            train, validation = train[:-held_out], train[-held_out:]
            validation_from = "the last twentieth of the train rows"
        documents = find_documents(train, files)
    for split, rows in (("train", train), ("validation", validation)):
        if not any(row.strip() for row in rows):
            raise ValueError(f"--dataset {dataset}: the corpus has no text in its {split} split")
    return Corpus(name, train, validation, validation_from, documents)


def dataset_name(dataset: str) -> str:
    """`dataset` as reports call it: a folder by its last part, anything else as it was given."""
    folder = _folder(dataset)
    return folder.name if folder else dataset


def local_files(dataset: str) -> list[Path]:
    """All local files that `dataset` is read from, sorted; none for what comes from the hub.

    Raises:
        ValueError: `dataset` is nothing that can be read, or a pattern without files.
    """
    if dataset == "pydocs":
        return sorted(stdlib_files(Path(sysconfig.get_path("stdlib"))))
    if dataset in ALIASES:
        return []
    if folder := _folder(dataset):
        return sorted(file for file in folder.rglob("*") if file.is_file())
    path = Path(dataset).expanduser()
    if path.is_file():
        return [path]
    files = sorted(Path(match) for match in glob.glob(str(path), recursive=True))
    files = [file for file in files if file.is_file()]
    if not files and not HUB_ID.fullmatch(dataset):
        raise ValueError(f"--dataset {dataset}: no such file, folder or name; give {ACCEPTED}")
    return files


def _folder(dataset: str) -> Path | None:
    path = Path(dataset).expanduser().resolve()
    return path if dataset not in ALIASES and path.is_dir() else None


def file_signature(files: Iterable[Path]) -> list[list[object]]:
    """Path, size, modification and change time of every file: what a write to it changes.

    The change time tells a file that was replaced with its old size and modification time.
    """
    stats = [(file, file.stat()) for file in files]
    return [[str(f.resolve()), s.st_size, s.st_mtime_ns, s.st_ctime_ns] for f, s in stats]


# ---------------------------------------------------------------------------------------------
# Text files, folders and the hub


class Split(NamedTuple):
    """The rows of a split, and the text files whose lines they are, if they are."""

    rows: list[str]
    files: list[TextFile]


def _read_splits(dataset: str) -> dict[str, Split]:
    files = local_files(dataset)
    if not files or _folder(dataset):
        return _load_dataset(dataset)
    train = Split([], [])
    try:
        for file in files:
            # Not str.splitlines: it also cuts at form feeds and other characters inside a line.
            lines = list(file.open(encoding="utf-8"))
            train.files.append(TextFile(file.absolute(), len(lines)))
            train.rows.extend(lines)
    except UnicodeDecodeError as error:
        raise ValueError(f"--dataset {dataset}: not UTF-8 text ({error})") from error
    return {"train": train}


def _load_dataset(dataset: str) -> dict[str, Split]:
    """The splits that `datasets.load_dataset` finds in a folder or on the hub."""
    import datasets

    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    folder = _folder(dataset)
    try:
        if folder:
            # The library's own cache would miss a file that kept its modification time; ours
            # does not, so a folder is read afresh whenever it is read at all.
            with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
                splits = _text_rows(datasets.load_dataset(str(folder), cache_dir=scratch))
                builder = datasets.load_dataset_builder(str(folder), cache_dir=scratch)
                if builder.name == "text":
                    splits["train"].files.extend(_text_files(builder, len(splits["train"].rows)))
                return splits
        hub_id = HUB_ID.fullmatch(ALIASES.get(dataset, dataset))
        assert hub_id is not None, "local_files() has refused it"
        with nullcontext() if hub_answers() else _answer_from_caches():
            return _text_rows(datasets.load_dataset(hub_id["name"], hub_id["config"]))
    except Exception as error:  # the library raises many kinds for what a user got wrong
        refused = isinstance(error, datasets.exceptions.DatasetsError)
        if folder or (hub_answers() and (refused or not isinstance(error, OSError))):
            raise ValueError(f"--dataset {dataset}: {one_line(error)}") from error
        raise hub_out_of_reach("--dataset", dataset, error) from error


def _text_files(builder: Any, n_rows: int) -> list[TextFile]:
    """The files whose lines the train rows are; compressed ones count as one file together."""
    files = [Path(file) for file in builder.config.data_files["train"]]
    if any(file.suffix != ".txt" for file in files):
        return [TextFile(files[0], n_rows)]
    found = [TextFile(file, sum(1 for _ in file.open(encoding="utf-8"))) for file in files]
    assert sum(file.lines for file in found) == n_rows
    return found


def _text_rows(splits: Any) -> dict[str, Split]:
    if "train" not in splits:
        raise ValueError(f"there is no train split, only {', '.join(splits)}")
    features = splits["train"].features
    strings = [name for name, kind in features.items() if _is_string(kind)]
    if "text" not in strings and len(strings) != 1:
        raise ValueError(
            "the text must be in a column named text or in the only column of strings; "
            f"the columns are {', '.join(features)}"
        )
    column = "text" if "text" in strings else strings[0]
    wanted = [split for split in ("train", "validation") if split in splits]
    return {split: Split([row or "" for row in splits[split][column][:]], [])
            for split in wanted}


def _is_string(feature: Any) -> bool:
    return getattr(feature, "dtype", None) in ("string", "large_string", "string_view")


# ---------------------------------------------------------------------------------------------
# The hub's reach


@functools.cache
def hub_answers() -> bool:
    """Whether the hub answers within `HUB_SECONDS`, asked once per process.

    Its client libraries retry for up to a minute before they give up, hence a question first.
    """
    import http.client
    import ssl
    import urllib.error
    import urllib.request

    from huggingface_hub import constants

    answers: list[bool] = []

    def ask() -> None:
        request = urllib.request.Request(constants.ENDPOINT, method="HEAD")
        try:
            urllib.request.urlopen(request, timeout=HUB_SECONDS).close()
            answers.append(True)
        except urllib.error.HTTPError as error:
            answers.append(error.code < 500)  # proxies answer 5xx for hosts they cannot reach
        except urllib.error.URLError as error:
            # A certificate unknown to Python may be known to the libraries, which bring others.
            answers.append(isinstance(error.reason, ssl.SSLError))
        except (OSError, ValueError, http.client.HTTPException):
            answers.append(False)

    if constants.HF_HUB_OFFLINE:
        return False
    # In a thread, because looking up the host's name knows no timeout.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(HUB_SECONDS)
    return answers == [True]


def hub_out_of_reach(flag: str, asked: str, error: Exception) -> ConnectionError:
    """The error for `flag asked` where neither the hub nor its cache on this machine has it."""
    from huggingface_hub import constants

    # Without an answer, only what the cache objects to is worth telling: its configs, say.
    told = hub_answers() or isinstance(error, ValueError)
    reason = one_line(error) if told else "no answer"
    return ConnectionError(
        f"{flag} {asked}: no such folder, not in the hub's cache on this machine, and not to be "
        f"had from the hub ({constants.ENDPOINT}: {reason}); to run without a network: "
        "--dataset pydocs --tokenizer bpe:8192"
    )


@contextmanager
def _answer_from_caches() -> Iterator[None]:
    """As if HF_HUB_OFFLINE were set, which the libraries read only when they are imported."""
    import datasets.config
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before
