"""An entry of the token cache: a folder with a manifest, entry.json, of its files' checksums.

Small files are compared with their SHA-256 whenever an entry is read. The files of token ids are
too large for that: one process per machine compares them at every start. That they matched is not
recorded, since files can be damaged later, and the cache may be read-only.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from fedrun.common import locks
from fedrun.common.errors import InputError, explain
from fedrun.common.files import DamagedFile, on_disk, read_json, write_json
from fedrun.common.log import log
from fedrun.common.terminal import visible
from fedrun.data import corpora
from fedrun.data.given import NAME, GivenData, Source
from fedrun.data.text_options import TextOptions
from fedrun.data.tokenizer import (
    ACCEPTED,
    HUB_NAME,
    bpe_size,
    ids_size,
    tokenizer_name,
)

MANIFEST = "entry.json"
LAYOUT = 3  # raise it when the same text would give different files; old entries are then ignored
STALE_DAYS = 14.0  # in which nobody has gone on with an entry that a start has left unfinished
LOCK_SECONDS = 3600.0  # how long to wait for another process that prepares the same tokens
TOKEN_FILES = ("train.bin", "validation.bin")


def entry_name(dataset: Source, tokenizer: str, options: TextOptions = TextOptions()) -> str:  # noqa: B008
    """The name of the entry's folder, which depends on everything that decides the tokens.

    Raises:
        InputError: there is no such tokenizer, or no such dataset.
    """
    if isinstance(dataset, str) and NAME.fullmatch(dataset):
        raise InputError(f"--dataset {dataset}: was given to fedrun.train, and is in no file; give "
                         "it there again, or as data= to evaluate, or name another dataset")
    size = ids_size(tokenizer) if isinstance(dataset, GivenData) and dataset.ids else None
    size = bpe_size(tokenizer) if size is None else size
    path = Path(tokenizer).expanduser()
    tokenizer_files: list[Path] = []
    if size is None and path.is_file():
        tokenizer_files = [path]
    elif size is None and path.is_dir():
        tokenizer_files = sorted(f for f in path.rglob("*") if f.is_file())
    elif size is None and not HUB_NAME.fullmatch(tokenizer):
        raise InputError(f"--tokenizer {tokenizer}: no such folder or file; give {ACCEPTED}")
    request = [
        LAYOUT,
        importlib.metadata.version("tokenizers"),
        *([dataset, corpora.file_signature(corpora.local_files(dataset))]
          if isinstance(dataset, str) else dataset.key),
        options.key,
        tokenizer,
        corpora.file_signature(tokenizer_files),
    ]
    key = hashlib.sha256(json.dumps(request).encode()).hexdigest()[:16]
    name = corpora.dataset_name(dataset) if isinstance(dataset, str) else "given"
    names = f"{name}-{tokenizer_name(tokenizer)}"
    return f"{re.sub(r'[^A-Za-z0-9.]+', '-', names).strip('-.')[-80:]}-{key}"


def write_manifest(entry: Path, content: dict[str, Any]) -> dict[str, Any]:
    """Write the manifest of a folder whose other files are complete; return it."""
    files = {str(file.relative_to(entry)): {"bytes": file.stat().st_size, "sha256": _sha256(file)}
             for file in sorted(entry.rglob("*")) if file.is_file()}
    body = content | {"files": files}
    write_json(entry / MANIFEST, body | {"sha256": _manifest_checksum(body)})
    return body


def read_manifest(entry: Path, check_tokens: bool) -> dict[str, Any] | None:
    """The manifest of an entry, after comparing the entry's files with it; None if it has none.

    Of the files of token ids only the size is compared, unless `check_tokens`.

    Raises:
        DamagedFile: a file differs from what was written; the message has its path.
    """
    try:
        body = read_json(entry / MANIFEST, dict)
    except OSError:
        return None
    if body.pop("sha256", None) != _manifest_checksum(body):
        raise DamagedFile(f"{entry / MANIFEST} is damaged: it does not match its own checksum")
    for name, held in body["files"].items():
        file = entry / name
        try:
            size = file.stat().st_size
            if not file.is_file() or size != held["bytes"]:
                raise DamagedFile(f"{file} is damaged: it has {size} bytes instead of "
                                  f"{held['bytes']}")
            if (check_tokens or name not in TOKEN_FILES) and _sha256(file) != held["sha256"]:
                raise DamagedFile(f"{file} is damaged: it does not match its checksum in "
                                  f"{MANIFEST}")
        except OSError as error:
            raise DamagedFile(f"{file} cannot be read: {error.strerror}") from None
    return body


def content_digest(body: dict[str, Any]) -> str:
    """16 hex digits of a SHA-256 over the token ids, for comparing machines."""
    sums = [body["dtype"], *(body["files"][name]["sha256"] for name in TOKEN_FILES)]
    return hashlib.sha256(json.dumps(sums).encode()).hexdigest()[:16]


@contextmanager
def naming_cache_dir(entry: Path, damage: str = "") -> Iterator[None]:
    """Turn the disk's errors about the cache into an InputError that names --cache_dir.

    damage: why the entry is being rebuilt, for the message.
    """
    try:
        yield
    except (ConnectionError, TimeoutError):
        raise
    except OSError as error:
        cache_dir = entry.parents[1]
        elsewhere = error.filename is not None and not str(error.filename).startswith(
            str(cache_dir))
        if error.errno is None or elsewhere:
            raise
        reason = f"{damage}, and cannot be replaced: " if damage else ""
        raise InputError(f"--cache_dir {cache_dir}: {reason}{explain(on_disk(error, entry))}; "
                         "use a --cache_dir that can be written") from error


@contextmanager
def lock_entry(entry: Path, what: str) -> Iterator[None]:
    """Hold the lock of `entry`, which one process of the machine can have at a time.

    what: what is prepared under it, for messages.

    Raises:
        TimeoutError: another process has held it for an hour, in which it has written nothing.
    """
    def tell(holder: str) -> None:
        log(visible(f"waiting for {holder}, which prepares {what}"))

    lock, waits = None, 0
    while lock is None:
        written = _last_written(entry)
        try:
            lock = locks.acquire(Path(f"{entry}.lock"), LOCK_SECONDS, tell)
        except locks.Busy as holder:
            waits += 1
            if _last_written(entry) == written:
                raise TimeoutError(
                    f"waited {LOCK_SECONDS * waits:.0f} s for {holder}, which prepares {what}; end "
                    "it if it hangs, or use another --cache_dir"
                ) from None
    try:
        with suppress(OSError):  # another user's lock file
            lock.write()
        yield
    finally:
        lock.release()


def remove_stale(entry: Path) -> None:
    """Remove what starts that were killed have left beside `entry`, a line for each: entries under
    other names that are not finished, that nobody holds the lock of, and that nothing was written
    to for STALE_DAYS. Their text may have changed since, and nobody would ask for them again."""
    for folder in sorted(entry.parent.glob("*.partial")):
        other = folder.with_suffix("")
        with suppress(OSError, locks.Busy):  # another user's, or in use
            if other == entry or not _is_stale(other):
                continue
            lock = locks.acquire(Path(f"{other}.lock"), 0, _left_to_it)
            try:
                if _is_stale(other):  # nobody has gone on with it before we had the lock
                    shutil.rmtree(folder)
                    log(visible(f"removed {folder}, which a start that was ended has left; nothing "
                                f"was written there for {STALE_DAYS:.0f} days"))
            finally:
                lock.release()


def _left_to_it(owner: str) -> None:
    """Not to be waited for, also where that is how one finds out whether the owner still runs."""
    raise locks.Busy(owner)


def _is_stale(entry: Path) -> bool:
    written = _last_written(entry)
    return 0 < written < (time.time() - STALE_DAYS * 24 * 3600) * 1e9


def _last_written(entry: Path) -> int:
    """When a file or folder in the entry that is being made was last written; 0 if there is none.
    """
    times = [0]
    with suppress(OSError):  # it may be finished at any moment
        for file in Path(f"{entry}.partial").rglob("*"):
            times.append(file.stat().st_mtime_ns)
    return max(times)


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _manifest_checksum(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
