"""Checkpoints: what a run needs to resume as if it had never stopped.

    checkpoints/step_000030/global.safetensors    the global model, the server optimizer's state
                            client_0.safetensors  a client's AdamW moments, its position in its data
                            server.json           history, totals, the rest of the server's state
                            manifest.json         the config; size and SHA-256 of every other file

Real sites keep the files of their clients (site_states.py); the manifest then holds their tags.

Files are keyed by client, never by rank, so that a run can resume with any number of processes. The
process that owns a state writes its file. The manifest is written last, and a folder is a valid
checkpoint only if the manifest's checksums are right: what a kill, a full disk or a flipped bit
left behind is reported and skipped.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from fedrun.common.errors import InputError, one_line
from fedrun.common.files import finite, open_regular, read_json, write_atomic, write_json
from fedrun.common.log import WARNING, log
from fedrun.common.old_names import renamed
from fedrun.records import run_files
from fedrun.records.run_files import manifest_checksum, remove_checkpoint

GLOBAL = "global.safetensors"
SERVER = "server.json"
MANIFEST = run_files.MANIFEST
CHECKPOINTS = "checkpoints"
CHECKPOINTS_KEPT = 2
_NAME = re.compile(r"step_(\d{1,18})")
_FILE = re.compile(r"[\w-][\w.-]*")
DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16",
          torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8"}

Files = Mapping[str, Mapping[str, Tensor]]
"""The tensor files of a checkpoint: file name -> tensor name -> tensor."""
Checksums = dict[str, dict[str, Any]]
"""Checksums of files: name -> `bytes` (the size) and `sha256`, computed from the data written, not
re-read from disk."""


def client_file(index: int) -> str:
    return f"client_{index}.safetensors"


def step_name(step: int) -> str:
    """The name of the folder of the checkpoint after global step `step`."""
    return f"step_{step:06d}"


def folder_of(run_dir: Path, step: int) -> Path:
    """The folder of the checkpoint after global step `step`."""
    return run_dir / CHECKPOINTS / step_name(step)


@dataclass(frozen=True)
class Checkpoint:
    """A valid checkpoint."""

    folder: Path
    step: int
    config: dict[str, Any]
    """The settings of the run that decide its results."""
    provenance: dict[str, Any]
    """What else decides the bits of the results: corpus, versions, kernels."""

    @property
    def server(self) -> dict[str, Any]:
        """The server's state: `history`, `clocks`, ..."""
        return read_json(self.folder / SERVER, dict)

    @property
    def sites(self) -> dict[str, list[str]]:
        """What real sites hold of it: the tags of their records, by site. {} in other runs."""
        sites: dict[str, list[str]] = _manifest(self.folder).get("sites", {})
        return sites

    @property
    def checksums(self) -> Checksums:
        """Checksums of its files, as recorded in the manifest."""
        return {str(name): entry for name, entry in _manifest(self.folder)["files"].items()}

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors of one of its files, on the CPU."""
        return read_tensors(self.folder / name)


# ---- writing -------------------------------------------------------------------------------------

def write_tensors(folder: Path, files: Files, durable: bool = True) -> Checksums:
    """Write files of tensors, each whole or not at all; `durable` as in `write_atomic`."""
    checksums = {}
    for name, tensors in files.items():
        pieces = _safetensors_pieces(tensors)
        write_atomic(folder / name, *pieces, durable=durable)
        checksums[name] = _checksum(*pieces)
    return checksums


def _safetensors_pieces(tensors: Mapping[str, Tensor]) -> list[bytes | memoryview]:
    """A safetensors file in pieces: its header, and the memory of the tensors, which must be on the
    CPU. The library's `save` would copy them all, and hundreds of such copies fragment a process's
    memory."""
    ordered = _in_order(tensors)
    encoded = _header(ordered)
    return [len(encoded).to_bytes(8, "little"), encoded, *(
        tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
        for tensor in ordered.values())]


def _in_order(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """As they lie in a file: the widest first."""
    return dict(sorted(tensors.items(), key=lambda item: -item[1].element_size()))


def _header(ordered: Mapping[str, Tensor]) -> bytes:
    header: dict[str, Any] = {}
    end = 0
    for name, tensor in ordered.items():
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape),
                        "data_offsets": [end, end + tensor.nbytes]}
        end += tensor.nbytes
    encoded = json.dumps(header).encode()
    return encoded + b" " * (-len(encoded) % 8)  # the data begin at a multiple of eight bytes


def file_size(tensors: Mapping[str, Tensor]) -> int:
    """Bytes of the file that `write_tensors` makes of these tensors, which need no values."""
    return 8 + len(_header(_in_order(tensors))) + sum(t.nbytes for t in tensors.values())


def read_tensors(path: Path, into: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The tensors of a file, copied into memory on the CPU.

    into: tensors to reuse for the copies, by name, where shape and dtype match.
    """
    def copied(name: str, tensor: Tensor) -> Tensor:
        target = (into or {}).get(name)
        if target is None or (target.shape, target.dtype) != (tensor.shape, tensor.dtype):
            return tensor.clone()
        return target.copy_(tensor)

    return {name: copied(name, tensor) for name, tensor in load_file(path).items()}


def commit(folder: Path, step: int, config: dict[str, Any], provenance: dict[str, Any],
           server: dict[str, Any], checksums: Checksums, owners: Mapping[str, Any] | None = None
           ) -> list[int]:
    """Make a checkpoint of the files that all workers have written, and remove older ones than the
    last CHECKPOINTS_KEPT. Returns the steps that are left.

    server: the server's state. checksums: of the workers' files. owners: what the manifest of a run
    of real sites holds besides: its `run_id`, and `sites` (see `Checkpoint.sites`).
    """
    content = json.dumps(finite(server), allow_nan=False).encode()
    write_atomic(folder / SERVER, content)
    body = {"step": step, "config": config, "made_with": provenance,
            "files": checksums | {SERVER: _checksum(content)}, **(owners or {})}
    write_json(folder / MANIFEST, body | {"sha256": manifest_checksum(body)})
    committed = committed_steps(folder.parent)
    for old in committed[:-CHECKPOINTS_KEPT]:
        remove_checkpoint(folder.parent / step_name(old))
    return committed[-CHECKPOINTS_KEPT:]


def committed_steps(parent: Path) -> list[int]:
    """The steps that have a manifest, valid or not, in order."""
    return [step_of(folder) for folder in step_folders(parent) if (folder / MANIFEST).exists()]


def digests_of(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """SHA-256 of each tensor (on the CPU) with its name, type and shape, by name."""
    return {name: _checksum(*_safetensors_pieces({name: tensor}))["sha256"]
            for name, tensor in tensors.items()}


def _checksum(*content: bytes | memoryview) -> dict[str, Any]:
    digest = hashlib.sha256()
    for piece in content:
        digest.update(piece)
    return {"bytes": sum(map(len, content)), "sha256": digest.hexdigest()}


# ---- reading -------------------------------------------------------------------------------------

def latest_valid(run_dir: Path) -> Checkpoint | None:
    """The newest valid checkpoint of a run; None if it has none yet. Each invalid one that is
    skipped gets a warning.

    Raises InputError if there are checkpoints and all are invalid: starting over would discard what
    may still be repaired.
    """
    return next(valid_checkpoints(run_dir), None)


def valid_checkpoints(run_dir: Path) -> Iterator[Checkpoint]:
    """Yield the valid checkpoints of a run, the newest first. Warnings and errors are those of
    `latest_valid`."""
    found = None
    for folder in reversed(step_folders(run_dir / CHECKPOINTS)):
        try:
            found = read(folder)
        except ValueError as error:
            log(str(error), WARNING)
            continue
        yield found
    if found is None and committed_steps(run_dir / CHECKPOINTS):
        raise InputError(f"--resume: all checkpoints in {run_dir / CHECKPOINTS} are invalid; "
                         "--overwrite starts over")


def read(folder: Path) -> Checkpoint:
    """The checkpoint in a folder, after comparing every file with its checksum.

    Raises:
        InputError: it is invalid; the message says why.
        OSError: the disk fails.
    """
    try:
        manifest = _manifest(folder)
        verify_files(folder, manifest["files"])
        found = open_unverified(folder)
        if not isinstance(found.server.get("history", []), list):
            raise InputError(f"{SERVER} has no list of records")
        return found
    except (FileNotFoundError, NotADirectoryError) as error:
        missing = Path(error.filename).name
        raise InputError(f"checkpoint {folder} is invalid: {missing} is missing") from None
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"checkpoint {folder} is invalid: {one_line(error)}") from None


def verify_files(folder: Path, files: Checksums) -> None:
    """Compare files with the checksums of their manifest. InputError for the first that differs,
    OSError if one is missing or the disk fails."""
    for name, expected in files.items():
        if not _FILE.fullmatch(name):
            raise InputError(f"its manifest names a file {name!r}")
        with open_regular(folder / name) as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            size = file.tell()
        if size != expected["bytes"]:
            raise InputError(f"{name} has {size} bytes instead of {expected['bytes']}")
        if digest != expected["sha256"]:
            raise InputError(f"{name} is damaged: its checksum differs from the manifest's")


def open_unverified(folder: Path) -> Checkpoint:
    """The checkpoint in a folder whose files rank 0 has verified by `read`."""
    manifest = _manifest(folder)
    return Checkpoint(folder, step_of(folder), renamed(manifest["config"]), manifest["made_with"])


def _manifest(folder: Path) -> dict[str, Any]:
    """The manifest in a folder; InputError if its own checksum is wrong or it lacks entries."""
    manifest = read_json(folder / MANIFEST, dict)
    if manifest.get("sha256") != manifest_checksum(manifest) or (
            manifest.get("step") != step_of(folder)):
        raise InputError("its manifest is damaged")
    if not all(isinstance(manifest.get(name), dict) for name in ("config", "made_with", "files")):
        raise InputError("its manifest lacks settings or files")
    sites = manifest.get("sites", {})
    if not isinstance(sites, dict) or not all(isinstance(tags, list) and all(
            isinstance(tag, str) for tag in tags) for tags in sites.values()):
        raise InputError("its manifest has no tags of sites")
    return manifest


def latest_step(run_dir: Path) -> int | None:
    """The step of the newest checkpoint, which is not verified; None if there is none."""
    return max(committed_steps(run_dir / CHECKPOINTS), default=None)


def delete_after(run_dir: Path, step: int) -> None:
    """Remove the checkpoints after a step, which the resumed run writes again."""
    for folder in step_folders(run_dir / CHECKPOINTS):
        if step_of(folder) > step:
            discard(folder)


def discard(folder: Path) -> None:
    """Remove a checkpoint, and rename what remains if that is not a run's files but in the way of
    the next one."""
    with suppress(OSError):
        remove_checkpoint(folder)
    remains = list(folder.glob("*.json")) + list(folder.glob("*.safetensors"))
    if remains or (os.path.lexists(folder) and not folder.is_dir()):
        folder.rename(folder.with_name(f"{folder.name}.damaged-{time.time_ns()}"))


def step_folders(parent: Path) -> list[Path]:
    """The folders of checkpoints, valid or not, oldest first."""
    return sorted((path for path in parent.glob("step_*") if _NAME.fullmatch(path.name)),
                  key=step_of)


def step_of(folder: Path) -> int:
    name = _NAME.fullmatch(folder.name)
    return int(name[1]) if name else -1
