"""An entry of the token cache: a folder whose entry.json has size and SHA-256 of every other file.

Small files are compared with their checksums whenever an entry is read. The token ids are too large
for that: one process a machine compares them at every start. Nothing records that they were, since
files are damaged after they were checked too, and a cache may be read-only.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from fedrun.common import locks
from fedrun.common.errors import InputError, explain
from fedrun.common.files import DamagedFile, on_disk, read_json, write_json
from fedrun.data import corpora
from fedrun.data.reading import Reading
from fedrun.data.tokenizer import ACCEPTED, HUB_NAME, bpe_size, tokenizer_name

MANIFEST = "entry.json"
LAYOUT = 3  # raise it when the same text would become other files: old entries are then ignored
LOCK_SECONDS = 3600.0  # how long to wait for another process that prepares the same tokens
LARGE = ("train.bin", "validation.bin")


def entry_name(dataset: str, tokenizer: str, reading: Reading = Reading()) -> str:  # noqa: B008
    """A folder name that changes with everything that decides the tokens."""
    size = bpe_size(tokenizer)
    path = Path(tokenizer).expanduser()
    tokenizer_files: list[Path] = []
    if size is None and path.is_file():
        tokenizer_files = [path]
    elif size is None and path.is_dir():
        tokenizer_files = sorted(f for f in path.rglob("*") if f.is_file())
    elif size is None and not HUB_NAME.fullmatch(tokenizer):
        raise InputError(f"--tokenizer {tokenizer}: no such folder or file; give {ACCEPTED}")
    asked = [
        LAYOUT,
        importlib.metadata.version("tokenizers"),
        dataset,
        corpora.file_signature(corpora.local_files(dataset)),
        dataclasses.astuple(reading),
        tokenizer,
        corpora.file_signature(tokenizer_files),
    ]
    key = hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:16]
    names = f"{corpora.dataset_name(dataset)}-{tokenizer_name(tokenizer)}"
    return f"{re.sub(r'[^A-Za-z0-9.]+', '-', names).strip('-.')[-80:]}-{key}"


def seal(entry: Path, content: dict[str, Any]) -> dict[str, Any]:
    """Write the manifest of a folder that is complete otherwise; what `read_manifest` returns."""
    files = {str(file.relative_to(entry)): {"bytes": file.stat().st_size, "sha256": _sha256(file)}
             for file in sorted(entry.rglob("*")) if file.is_file()}
    body = content | {"files": files}
    write_json(entry / MANIFEST, body | {"sha256": _body_sum(body)})
    return body


def read_manifest(entry: Path, large: bool) -> dict[str, Any] | None:
    """What an entry holds, None where there is none; of token ids the size is compared, and with
    `large` the checksum.

    Raises DamagedFile, with path and reason, where a file is not what was written.
    """
    try:
        body = read_json(entry / MANIFEST, dict)
    except OSError:
        return None
    if body.pop("sha256", None) != _body_sum(body):
        raise DamagedFile(f"{entry / MANIFEST} is damaged: it does not match its own checksum")
    for name, held in body["files"].items():
        file = entry / name
        try:
            size = file.stat().st_size
            if not file.is_file() or size != held["bytes"]:
                raise DamagedFile(f"{file} is damaged: it has {size} bytes instead of "
                                  f"{held['bytes']}")
            if (large or name not in LARGE) and _sha256(file) != held["sha256"]:
                raise DamagedFile(f"{file} is damaged: it does not match its checksum in "
                                  f"{MANIFEST}")
        except OSError as error:
            raise DamagedFile(f"{file} cannot be read: {error.strerror}") from None
    return body


def content_sum(body: dict[str, Any]) -> str:
    """A digest of the token ids themselves, to compare machines by (hex)."""
    told = [body["dtype"], *(body["files"][name]["sha256"] for name in LARGE)]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]


@contextmanager
def naming_cache_dir(entry: Path, damage: str = "") -> Iterator[None]:
    """Errors of the disk as errors of --cache_dir."""
    try:
        yield
    except (ConnectionError, TimeoutError):
        raise
    except OSError as error:
        cache_dir = entry.parents[1]
        theirs = error.filename is not None and not str(error.filename).startswith(str(cache_dir))
        if error.errno is None or theirs:
            raise
        told = f"{damage}, and cannot be replaced: " if damage else ""
        raise InputError(f"--cache_dir {cache_dir}: {told}{explain(on_disk(error, entry))}; give a "
                         "--cache_dir that can be written") from error


@contextmanager
def only_one(entry: Path, what: str, say: Callable[[str], None]) -> Iterator[None]:
    """Hold the lock of `entry`; one process of the machine at a time gets past this.

    TimeoutError where another process has held it for an hour.
    """
    try:
        lock = locks.acquire(
            Path(f"{entry}.lock"), LOCK_SECONDS,
            lambda holder: say(f"waiting for {holder}, which prepares {what}"))
    except locks.Busy as holder:
        raise TimeoutError(
            f"waited {LOCK_SECONDS:.0f} s for {holder}, which prepares {what}; end "
            "it if it hangs, or give another --cache_dir"
        ) from None
    try:
        with suppress(OSError):  # the lock's file of another user
            lock.write()
        yield
    except OSError:
        shutil.rmtree(f"{entry}.partial", ignore_errors=True)  # and make room
        raise
    finally:
        lock.release()


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _body_sum(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
