"""Which files a run writes into its folder: only these are ever removed, and they tell a run's
folder from any other.

Users keep notes, figures and whole projects beside their results, so neither a file's place nor a
`config.json` is enough. Whoever adds a file to run folders adds its name here.
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
"""Key of config.json that only runs have: the version that began the run."""
LOCK = "lock"
OUTCOME = "outcome.json"
CLIENTS = "clients"
BEST = "best"
MANIFEST = "manifest.json"  # of a checkpoint, which is none without it

_ENTITY = r"((server|client_\d+)/)?"
_CHECKPOINT = r"(\.checkpoints-\d+-\d+|checkpoints)/step_\d+"
_CHECKPOINT_FILE = r"((global|client_\d+)\.safetensors|server\.json|manifest\.json)"
_FILES = re.compile("|".join((
    rf"config\.json|environment\.json|training_history\.json|events\.jsonl|{OUTCOME}",
    rf"({BEST}/)?model\.safetensors|{BEST}/config\.json|tracker\.json|failed\.txt",
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

# What config.json has had since the first version, which wrote no mark; and files beside it.
_OLD_KEYS = frozenset({
    "method", "config", "model", "n_epochs", "rounds", "lr", "batch_size", "sequence_length",
    "seed", "val_freq", "dataset", "tokenizer", "data_dir", "run_name", "device", "dtype",
    "threads", "timeout"})
_BESIDE = (OUTCOME, "training_history.json", "events.jsonl")


def settings(run_dir: Path) -> dict[str, Any] | None:
    """The settings of the run that a folder holds, by its config.json or, where that is damaged or
    gone, by its newest checkpoint; None where it holds no run."""
    with suppress(OSError, DamagedFile):
        held = read_json(run_dir / "config.json", dict)
        if MARK in held or (held.keys() >= _OLD_KEYS
                            and any((run_dir / name).is_file() for name in _BESIDE)):
            return renamed(held)
    return _settings_in_checkpoint(run_dir)


def _settings_in_checkpoint(run_dir: Path) -> dict[str, Any] | None:
    manifests = (run_dir / "checkpoints").glob(f"step_*/{MANIFEST}")
    for path in sorted(manifests, key=lambda path: path.parent.name, reverse=True):
        with suppress(OSError, DamagedFile):
            manifest = read_json(path, dict)
            config = manifest.get("config")
            if manifest.get("sha256") == manifest_sum(manifest) and isinstance(config, dict):
                return renamed(config)
    return None


def manifest_sum(manifest: dict[str, Any]) -> str:
    """The checksum of a checkpoint's manifest itself, which its key `sha256` holds."""
    told = json.dumps({k: v for k, v in manifest.items() if k != "sha256"}, sort_keys=True)
    return hashlib.sha256(told.encode()).hexdigest()


def just_begun(run_dir: Path) -> bool:
    """Whether a folder holds no more than a start leaves that ended before config.json was there:
    nothing, a lock, an outcome, half-written files."""
    begun = {LOCK, f"{LOCK}.held", OUTCOME, "STOP", ".STOP"}
    return all(name in begun or (is_partial(name) and _is_ours(name)) for name, _ in _walk(run_dir))


def foreign(run_dir: Path) -> Path | None:
    """A file or folder that no run writes; None where there is none. Folders count, empty ones too.

    Raises OSError where a folder cannot be read.
    """
    return next((run_dir / name for name, is_folder in _walk(run_dir)
                 if not _is_ours(name, is_folder)), None)


def remove(run_dir: Path, chosen: Callable[[str], bool]) -> None:
    """Remove the run's files that are chosen by their paths relative to the folder, and its
    folders that are empty then. Everything else stays."""
    check_claim(run_dir)
    for name, is_folder in _walk(run_dir):
        if not _is_ours(name, is_folder):
            continue
        path = run_dir / name
        if is_folder and not path.is_symlink():
            with suppress(OSError):  # something is left in it
                path.rmdir()
        elif chosen(name):
            path.unlink(missing_ok=True)


def remove_checkpoint(folder: Path) -> None:
    """Remove a checkpoint's files, its manifest first, so that what a kill leaves is none."""
    check_claim(folder)
    with suppress(FileNotFoundError):
        (folder / MANIFEST).unlink(missing_ok=True)
        for path in list(folder.iterdir()):
            partial = _PARTIAL.fullmatch(path.name)
            if re.fullmatch(_CHECKPOINT_FILE, partial[2] if partial else path.name):
                path.unlink(missing_ok=True)
    with suppress(OSError):  # it is gone, or something else is left in it
        folder.rmdir()


def is_partial(name: str) -> bool:
    """Whether a name is one that `write_atomic` gives a file that is not whole yet."""
    return bool(_PARTIAL.fullmatch(name))


def _is_ours(name: str, is_folder: bool = False) -> bool:
    if is_folder:
        return bool(_FOLDERS.fullmatch(name))
    partial = _PARTIAL.fullmatch(name)
    return bool(_FILES.fullmatch(name) or (partial and _FILES.fullmatch(partial[1] + partial[2])))


def _walk(run_dir: Path) -> Iterator[tuple[str, bool]]:
    """What lies in a folder, as (path relative to it, whether it is a folder), contents before
    their folder. Symbolic links to folders are folders that are not looked into."""
    def fail(error: OSError) -> None:
        raise error

    for top, folders, files in os.walk(run_dir, topdown=False, onerror=fail):
        place = Path(top).relative_to(run_dir)
        for name in files:
            yield (place / name).as_posix(), False
        for name in folders:
            yield (place / name).as_posix(), True
