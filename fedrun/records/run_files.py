"""Which files a run writes into its folder. Only these are ever removed, and a folder is recognised
as a run's by them.

Users keep notes, figures and whole projects beside their results, so a file's location is not
enough to remove it, and a `config.json` is not enough to call its folder a run's. Whoever adds a
file to run folders adds its name here.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from fedrun.common.files import DamagedFile, check_claim, read_json
from fedrun.common.old_names import renamed

MARK = "fedrun"
"""Key of config.json that only runs have: the version of fedrun that started the run."""
RUN_ID = "run_id"
"""Key of config.json and of manifests in runs of real sites: what they call the run."""
LOCK = "lock"
OUTCOME = "outcome.json"
CLIENTS = "clients"
BEST = "best"
PRIVACY = "privacy.md"
MANIFEST = "manifest.json"  # a folder without one is not a checkpoint

_ENTITY = r"((server|client_\d+)/)?"
_CHECKPOINT = r"(\.checkpoints-\d+-\d+|checkpoints)/step_\d+"
_CHECKPOINT_FILE = r"((global|client_\d+)\.safetensors|(server|manifest|site_\d+)\.json)"
_FILES = re.compile("|".join((
    rf"config\.json|environment\.json|training_history\.json|events\.jsonl|{OUTCOME}",
    rf"({BEST}/)?model\.safetensors|{BEST}/config\.json|tracker\.json|failed\.txt|{PRIVACY}",
    rf"{LOCK}|{LOCK}\.held|\.?STOP",
    rf"{_ENTITY}(params|deltas)/step_\d+\.npz",
    rf"{_CHECKPOINT}/{_CHECKPOINT_FILE}",
    rf"{CLIENTS}/client_\d+\.safetensors",
    rf"({BEST}/)?tokenizer/([^/]+\.(json|model|jinja|spm|bpe|tiktoken)|(vocab|merges)[^/]*\.txt)",
    rf"({BEST}/)?tokenizer/additional_chat_templates/[^/]+\.jinja",
    r"tensorboard/events\.out\.tfevents\.[^/]+")))
_FOLDERS = re.compile("|".join((
    r"server|client_\d+", rf"{_ENTITY}(params|deltas)", CLIENTS,
    rf"\.checkpoints-\d+-\d+|checkpoints|{_CHECKPOINT}",
    rf"{BEST}|({BEST}/)?tokenizer(/additional_chat_templates)?|tensorboard")))
_PARTIAL = re.compile(r"((?:.*/)?)\.(.+)\.\w{8}", re.ASCII)  # as files.write_atomic names them

# The first versions wrote no MARK: their config.json has at least these keys, and one of these
# files is beside it.
_OLD_KEYS = frozenset({
    "method", "config", "model", "n_epochs", "rounds", "lr", "batch_size", "sequence_length",
    "seed", "val_freq", "dataset", "tokenizer", "data_dir", "run_name", "device", "dtype",
    "threads", "timeout"})
_OLD_FILES = (OUTCOME, "training_history.json", "events.jsonl")


def recorded_settings(run_dir: Path) -> dict[str, Any] | None:
    """The settings of the run in a folder, from its config.json or, if that is damaged or missing,
    from its newest checkpoint; None if it holds no run."""
    with suppress(OSError, DamagedFile):
        config = read_json(run_dir / "config.json", dict)
        if MARK in config or (config.keys() >= _OLD_KEYS
                              and any((run_dir / name).is_file() for name in _OLD_FILES)):
            return renamed(config)
    return _settings_in_checkpoint(run_dir)


def _settings_in_checkpoint(run_dir: Path) -> dict[str, Any] | None:
    manifests = (run_dir / "checkpoints").glob(f"step_*/{MANIFEST}")
    for path in sorted(manifests, key=lambda path: path.parent.name, reverse=True):
        with suppress(OSError, DamagedFile):
            manifest = read_json(path, dict)
            config = manifest.get("config")
            if manifest.get("sha256") == manifest_checksum(manifest) and isinstance(config, dict):
                return {name: manifest[name] for name in (RUN_ID,) if name in manifest
                        } | renamed(config)
    return None


def manifest_checksum(manifest: dict[str, Any]) -> str:
    """The checksum of a checkpoint's manifest itself, stored under its key `sha256`."""
    body = json.dumps({k: v for k, v in manifest.items() if k != "sha256"}, sort_keys=True)
    return hashlib.sha256(body.encode()).hexdigest()


def holds_only_a_start(run_dir: Path) -> bool:
    """Whether a folder holds at most what a start leaves that ended before it wrote config.json: a
    lock, an outcome, half-written files."""
    first = {LOCK, f"{LOCK}.held", OUTCOME, "STOP", ".STOP"}
    return all(name in first or (is_partial(name) and _is_ours(name)) for name, _ in _walk(run_dir))


def foreign(run_dir: Path) -> Path | None:
    """A file or folder that no run writes; None if there is none. Empty folders count.

    Raises OSError if a folder cannot be read.
    """
    return next((run_dir / name for name, is_folder in _walk(run_dir)
                 if not _is_ours(name, is_folder)), None)


def remove(run_dir: Path, chosen: Callable[[str], bool]) -> None:
    """Remove the run's files whose path relative to the folder is `chosen`, and the run's folders
    that are then empty. Everything else stays."""
    check_claim(run_dir)
    for name, is_folder in _walk(run_dir):
        if not _is_ours(name, is_folder):
            continue
        path = run_dir / name
        if is_folder and not path.is_symlink():
            with suppress(OSError):  # it is not empty
                path.rmdir()
        elif chosen(name):
            path.unlink(missing_ok=True)


def remove_checkpoint(folder: Path) -> None:
    """Remove a checkpoint's files, the manifest, or a site's records, first: what a kill leaves is
    then no checkpoint."""
    check_claim(folder)
    with suppress(FileNotFoundError):
        for path in sorted(folder.iterdir(), key=lambda p: (p.name != MANIFEST,
                                                            p.suffix != ".json")):
            partial = _PARTIAL.fullmatch(path.name)
            if re.fullmatch(_CHECKPOINT_FILE, partial[2] if partial else path.name):
                path.unlink(missing_ok=True)
    with suppress(OSError):  # it is gone, or not empty
        folder.rmdir()


def is_partial(name: str) -> bool:
    """Whether a name is that of a half-written file of `write_atomic`."""
    return bool(_PARTIAL.fullmatch(name))


def _is_ours(name: str, is_folder: bool = False) -> bool:
    if is_folder:
        return bool(_FOLDERS.fullmatch(name))
    partial = _PARTIAL.fullmatch(name)
    return bool(_FILES.fullmatch(name) or (partial and _FILES.fullmatch(partial[1] + partial[2])))


def _walk(run_dir: Path) -> Iterator[tuple[str, bool]]:
    """The content of a folder as (relative path, whether it is a folder), what is in a subfolder
    before the subfolder. Symbolic links to folders count as folders and are not followed."""
    def fail(error: OSError) -> None:
        raise error

    for top, folders, files in os.walk(run_dir, topdown=False, onerror=fail):
        place = Path(top).relative_to(run_dir)
        for name in files:
            yield (place / name).as_posix(), False
        for name in folders:
            yield (place / name).as_posix(), True
