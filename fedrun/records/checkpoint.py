"""Checkpoints: what a run needs to go on as if it had never stopped.

    checkpoints/step_000030/global.safetensors    the global model, the server optimizer's state
                            client_0.safetensors  a client's AdamW moments, its place in its data
                            server.json           history, clocks, what the server remembers
                            manifest.json         the config; size and SHA-256 of every other file

Files are keyed by client, never by rank, so that a run goes on in a world of any size. Whoever owns
a file writes it; the manifest comes last, and only a folder with a manifest whose sums are right is
a checkpoint: what a kill, a full disk or a flipped bit left behind is named, and passed over.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from fedrun.common.errors import InputError, one_line
from fedrun.common.files import finite, open_regular, read_json, write_atomic, write_json
from fedrun.common.old_names import renamed
from fedrun.config import RunConfig
from fedrun.records import run_files
from fedrun.records.run_files import manifest_sum, remove_checkpoint

GLOBAL = "global.safetensors"
SERVER = "server.json"
MANIFEST = run_files.MANIFEST
KEPT = 2
_NAME = re.compile(r"step_(\d{1,18})")
_FILE = re.compile(r"[\w-][\w.-]*")
_DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16",
           torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8"}

Files = Mapping[str, Mapping[str, Tensor]]
"""What belongs into the files of a checkpoint: tensors by name, by the file's name."""
Sums = dict[str, dict[str, Any]]
"""Size in bytes and SHA-256 of files, by name: as they were written, not as they lie there."""


def client_file(index: int) -> str:
    return f"client_{index}.safetensors"


def folder_of(run_dir: Path, step: int) -> Path:
    """Where the checkpoint after global step `step` lies."""
    return run_dir / "checkpoints" / f"step_{step:06d}"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was found whole."""

    folder: Path
    step: int
    config: dict[str, Any]
    """The settings of the run that decide its results."""
    provenance: dict[str, Any]
    """What else decides the bits: corpus, versions, kernels."""

    @property
    def server(self) -> dict[str, Any]:
        """What the server remembered: `history`, `clocks`, ..."""
        return read_json(self.folder / SERVER, dict)

    @property
    def sums(self) -> Sums:
        """Of its files, as the manifest has them."""
        return {str(name): sums for name, sums in _manifest(self.folder)["files"].items()}

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors of one of its files, on the CPU."""
        return read_tensors(self.folder / name)


# ---- writing -------------------------------------------------------------------------------------

class CheckpointWriter:
    """A worker's files of one checkpoint at a time, written beside its training.

    A snapshot is copied before the next round begins; the disk is left to a thread.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "fedrun-saver",
                                          initializer=lambda: torch.set_num_threads(1))
        self._writing: Future[dict[str, Any]] | None = None
        self._written: list[dict[str, Any]] = []

    def begin(self, folder: Path, step: int, files: Files, linked: Future[Sums] | None = None
              ) -> None:
        """Copy the tensors, and start to write them; they may change at once.

        linked: to come, the sums of files that somebody else puts into the folder.
        """
        self._wait()
        snapshot = {name: {key: torch.empty_like(tensor, device="cpu").copy_(tensor)
                           for key, tensor in tensors.items()}
                    for name, tensors in files.items()}
        self._writing = self._thread.submit(_write, folder, step, snapshot, linked)

    def written(self, wait: bool = False) -> list[dict[str, Any]]:
        """Of each snapshot once, when it is through: its `step`, and the sums of its `files` or the
        `error` that kept them from being written."""
        if wait or (self._writing and self._writing.done()):
            self._wait()
        written, self._written = self._written, []
        return written

    def _wait(self) -> None:
        if self._writing:
            self._written.append(self._writing.result())
            self._writing = None


def _write(folder: Path, step: int, files: Files, linked: Future[Sums] | None) -> dict[str, Any]:
    try:
        theirs = linked.result() if linked else {}
        for name in theirs:
            with (folder / name).open("rb") as file:
                os.fsync(file.fileno())
        return {"step": step, "files": theirs | write_tensors(folder, files)}
    except OSError as error:
        return {"step": step, "error": f"{error.filename or folder}: {error.strerror}"}


def write_tensors(folder: Path, files: Files, durable: bool = True) -> Sums:
    """Write files of tensors, each whole or not at all (`write_atomic`)."""
    sums = {}
    for name, tensors in files.items():
        content = _pieces(tensors)
        write_atomic(folder / name, *content, durable=durable)
        sums[name] = _sum(*content)
    return sums


def _pieces(tensors: Mapping[str, Tensor]) -> list[bytes | memoryview]:
    """A safetensors file of tensors on the CPU: its head, and their own memory. The library's
    `save` makes a copy of them all, and hundreds of those leave holes in a process's memory."""
    head: dict[str, Any] = {}
    content, end = [], 0
    for name, tensor in sorted(tensors.items(), key=lambda item: -item[1].element_size()):
        raw = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
        head[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape),
                      "data_offsets": [end, end + len(raw)]}
        content.append(raw)
        end += len(raw)
    told = json.dumps(head).encode()
    told += b" " * (-len(told) % 8)  # data begin at a multiple of eight
    return [len(told).to_bytes(8, "little"), told, *content]


def read_tensors(path: Path, into: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The tensors of a file, in memory of their own: that of `into`, on the CPU, where they fit."""
    def own(name: str, tensor: Tensor) -> Tensor:
        old = (into or {}).get(name)
        if old is None or (old.shape, old.dtype) != (tensor.shape, tensor.dtype):
            return tensor.clone()
        return old.copy_(tensor)

    return {name: own(name, tensor) for name, tensor in load_file(path).items()}


def commit(folder: Path, step: int, config: dict[str, Any], provenance: dict[str, Any],
           server: dict[str, Any], sums: Sums) -> None:
    """Make a checkpoint of the files that all workers have written, and drop the oldest."""
    content = json.dumps(finite(server), allow_nan=False).encode()
    write_atomic(folder / SERVER, content)
    body = {"step": step, "config": config, "made_with": provenance,
            "files": sums | {SERVER: _sum(content)}}
    write_json(folder / MANIFEST, body | {"sha256": manifest_sum(body)})
    whole = [old for old in _folders(folder.parent) if (old / MANIFEST).exists()]
    for old in whole[:-KEPT]:
        remove_checkpoint(old)


def _sum(*content: bytes | memoryview) -> dict[str, Any]:
    digest = hashlib.sha256()
    for piece in content:
        digest.update(piece)
    return {"bytes": sum(map(len, content)), "sha256": digest.hexdigest()}


class CheckpointCoordinator:
    """The server's part: when a checkpoint is due, and which of them all workers have written."""

    def __init__(self, config: RunConfig, provenance: dict[str, Any], workers: int,
                 say: Callable[[str], None], before: Callable[[], None]) -> None:
        """before: called before a checkpoint is made one, to write what the steps until then have
        left to be written, which a run that goes on from there does not make again."""
        self.config, self.provenance, self.workers, self.say = config, provenance, workers, say
        self.before = before
        self._begun: dict[int, dict[str, Any]] = {}  # step -> what the server remembered then
        self._answers: dict[int, list[dict[str, Any]]] = {}
        self._overdue = False

    def due(self, number: int, last: bool) -> bool:
        """Whether round `number` is to be saved: not while workers still write an earlier one, but
        the last one always, which a longer run begins from."""
        every = self.config.checkpoint_freq
        if last:
            return every is not None
        self._overdue |= every is not None and number % every == 0
        if self._begun or not self._overdue:
            return False
        self._overdue = False
        return True

    def begin(self, step: int, server: dict[str, Any]) -> None:
        """The workers have begun to write; `server` is what the server has to keep."""
        self._begun[step], self._answers[step] = server, []

    def collect(self, reports: Iterable[Sequence[dict[str, Any]]]) -> Iterator[Callable[[], None]]:
        """From what each worker has written (`CheckpointWriter.written`): what is left to write of
        each checkpoint that they have all written. One that somebody could not write is told, and
        removed."""
        for report in reports:
            for written in report:
                self._answers[written["step"]].append(written)
        for step in [s for s, answers in self._answers.items() if len(answers) == self.workers]:
            server, answers = self._begun.pop(step), self._answers.pop(step)
            folder = folder_of(self.config.run_dir, step)
            errors = [a["error"] for a in answers if "error" in a]
            if errors:
                self._give_up(folder, errors[0])
                continue
            sums = {name: s for a in answers for name, s in a["files"].items()}
            yield partial(self._commit, folder, step, server, sums)

    def _commit(self, folder: Path, step: int, server: dict[str, Any], sums: Sums) -> None:
        try:
            self.before()
            commit(folder, step, self.config.results_dict(), self.provenance, server, sums)
        except OSError as error:
            self._give_up(folder, f"{error.filename}: {error.strerror}")

    def _give_up(self, folder: Path, error: str) -> None:
        self.say(f"fedrun: warning: checkpoint {folder} could not be written ({error}); the run "
                 "goes on, the one before it is kept")
        remove_checkpoint(folder)


# ---- reading -------------------------------------------------------------------------------------

def latest_valid(run_dir: Path, say: Callable[[str], None]) -> Checkpoint | None:
    """The newest checkpoint of a run that is whole; those that are not are told by name.

    None where there is none yet. ValueError where there are some and none is whole: to begin anew
    would be to throw away what may still be mended.
    """
    folders = _folders(run_dir / "checkpoints")
    for folder in reversed(folders):
        try:
            return read(folder)
        except ValueError as error:
            say(str(error))
    if any((folder / MANIFEST).exists() for folder in folders):
        raise InputError(f"--resume: none of the checkpoints in {run_dir / 'checkpoints'} is whole;"
                         " --overwrite begins anew")
    return None


def read(folder: Path) -> Checkpoint:
    """The checkpoint in a folder, after comparing every file with its checksum. ValueError, with
    what is wrong, where it is not whole; an error of the disk's is left to be one."""
    try:
        manifest = _manifest(folder)
        for name, sums in manifest["files"].items():
            if not _FILE.fullmatch(name):
                raise InputError(f"its manifest names a file {name!r}")
            with open_regular(folder / name) as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
                size = file.tell()
            if size != sums["bytes"]:
                raise InputError(f"{name} has {size} bytes instead of {sums['bytes']}")
            if digest != sums["sha256"]:
                raise InputError(f"{name} is damaged: its checksum is not the manifest's")
        found = open_unverified(folder)
        if not isinstance(found.server.get("history", []), list):
            raise InputError(f"{SERVER} has no list of records")
        return found
    except (FileNotFoundError, NotADirectoryError) as error:
        missing = Path(error.filename).name
        raise InputError(f"checkpoint {folder} is not whole: {missing} is missing") from None
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"checkpoint {folder} is not whole: {one_line(error)}") from None


def open_unverified(folder: Path) -> Checkpoint:
    """The checkpoint in a folder that rank 0 has read and compared."""
    manifest = _manifest(folder)
    return Checkpoint(folder, _step(folder), renamed(manifest["config"]), manifest["made_with"])


def _manifest(folder: Path) -> dict[str, Any]:
    """A manifest whose own checksum is right; ValueError where it is anything else."""
    manifest = read_json(folder / MANIFEST, dict)
    if manifest.get("sha256") != manifest_sum(manifest) or manifest.get("step") != _step(folder):
        raise InputError("its manifest is damaged")
    if not all(isinstance(manifest.get(name), dict) for name in ("config", "made_with", "files")):
        raise InputError("its manifest lacks settings or files")
    return manifest


def latest_step(run_dir: Path) -> int | None:
    """The step of the newest checkpoint that has a manifest, unread; None where there is none."""
    return max((_step(f) for f in _folders(run_dir / "checkpoints") if (f / MANIFEST).exists()),
               default=None)


def delete_after(run_dir: Path, step: int) -> None:
    """Remove what lies there of checkpoints after a step, which a resumed run makes again."""
    for folder in _folders(run_dir / "checkpoints"):
        if _step(folder) > step:
            with suppress(OSError):
                remove_checkpoint(folder)
            in_the_way = folder / MANIFEST if folder.is_dir() else folder
            if os.path.lexists(in_the_way):  # of the next one, and nothing that a run writes
                folder.rename(folder.with_name(f"{folder.name}.damaged-{time.time_ns()}"))


def _folders(parent: Path) -> list[Path]:
    """The folders of checkpoints, whole or not, oldest first."""
    return sorted((path for path in parent.glob("step_*") if _NAME.fullmatch(path.name)), key=_step)


def _step(folder: Path) -> int:
    name = _NAME.fullmatch(folder.name)
    return int(name[1]) if name else -1
