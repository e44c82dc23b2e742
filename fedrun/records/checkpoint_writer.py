"""Writes checkpoints while a run trains on: the workers' part and the server's."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from fedrun.common.errors import ERROR_TEXTS, error_code
from fedrun.common.log import WARNING, log
from fedrun.common.pinned import PinnedMemory
from fedrun.config import RunConfig
from fedrun.records.checkpoint import (
    CHECKPOINTS,
    GLOBAL,
    Checksums,
    Files,
    commit,
    committed_steps,
    folder_of,
    write_tensors,
)
from fedrun.records.run_files import RUN_ID, remove_checkpoint

Seal = Callable[[Path, int, Checksums, Mapping[str, Tensor]], str]
"""`SiteStates.seal`: records at a site what was written, and returns a tag of it."""


class Members(Protocol):
    """Who takes part in a run of real sites (distributed/handshake.py)."""

    @property
    def run(self) -> str:
        """The run's id."""

    @property
    def sites(self) -> tuple[str, ...]:
        """The site of each rank; "" for the server."""


class CheckpointWriter:
    """Writes a worker's files of one checkpoint at a time, while the worker trains on.

    The tensors are copied before the next round begins; a thread writes the copies. From a GPU the
    copies are queued on the stream that trains, which the host does not wait for: what changes the
    tensors next is queued behind them. They go to pinned memory, which is kept for the next
    checkpoint. (Not run on a GPU.)

    At a real site the global state is not written, but its digests are recorded, with those of the
    clients' files; paths and checksums stay there.
    """

    def __init__(self, seal: Seal | None = None) -> None:
        """seal: at a real site."""
        self._seal = seal
        self._pinned = PinnedMemory()
        self._copies: dict[tuple[str, str], Tensor] = {}
        """In pinned memory, by file and name."""
        self._thread = ThreadPoolExecutor(1, "fedrun-saver",
                                          initializer=lambda: torch.set_num_threads(1))
        self._writing: Future[dict[str, Any]] | None = None
        self._written: list[dict[str, Any]] = []

    def begin(self, folder: Path, step: int, files: Files,
              linked: Future[Checksums] | None = None) -> None:
        """Copy the tensors and start to write the copies. On return the tensors may change: those
        on a GPU by what is queued on its current stream.

        linked: the future checksums of files that another thread links into the folder.
        """
        self._wait()
        snapshot = {name: {key: self._copy(name, key, tensor) for key, tensor in tensors.items()}
                    for name, tensors in files.items()}
        devices = {t.device for tensors in files.values() for t in tensors.values() if t.is_cuda}
        copied = [_copied(device) for device in devices]
        write = _write if self._seal is None else partial(_write_at_site, self._seal)
        self._writing = self._thread.submit(write, folder, step, snapshot, linked, copied)

    def _copy(self, file: str, name: str, tensor: Tensor) -> Tensor:
        """A copy on the host; of a tensor on a GPU it is complete when `_copied` says so."""
        if not tensor.is_cuda:
            return torch.empty_like(tensor, device="cpu").copy_(tensor)
        if (file, name) not in self._copies:
            self._copies[file, name] = self._pinned.empty_like(tensor)
        return self._copies[file, name].copy_(tensor, non_blocking=True)

    def written(self, wait: bool = False) -> list[dict[str, Any]]:
        """The results of the writes that have ended since the last call: the `step` of each, and
        the checksums of its `files` or the `error` that prevented them. At a real site a `tag` and
        an error's code.

        wait: wait for the write in progress, if there is one.
        """
        if self._writing is not None and (wait or self._writing.done()):
            self._wait()
        written, self._written = self._written, []
        return written

    def close(self) -> None:
        """End the thread, once what it writes is written; nothing can be begun any more."""
        self._thread.shutdown(wait=False)

    def _wait(self) -> None:
        if self._writing is not None:
            self._written.append(self._writing.result())
            self._writing = None


def _copied(device: torch.device) -> Callable[[], None]:
    """A function that waits, in any thread, for all that is queued on a GPU's current stream by
    now."""
    event = torch.cuda.current_stream(device).record_event()

    def wait() -> None:
        torch.cuda.set_device(device)  # or the thread would open a context on the first GPU
        event.synchronize()
    return wait


def _write(folder: Path, step: int, files: Files, linked: Future[Checksums] | None,
           copied: Iterable[Callable[[], None]]) -> dict[str, Any]:
    """On the thread: write the files once their copies are complete."""
    try:
        return {"step": step, "files": _write_files(folder, files, linked, copied)}
    except OSError as error:
        return {"step": step, "error": f"{error.filename or folder}: {error.strerror}"}


def _write_at_site(seal: Seal, folder: Path, step: int, files: Files,
                   linked: Future[Checksums] | None, copied: Iterable[Callable[[], None]]
                   ) -> dict[str, Any]:
    """The same at a real site."""
    state = files.get(GLOBAL, {})
    own = {name: tensors for name, tensors in files.items() if name != GLOBAL}
    try:
        return {"step": step, "tag": seal(folder, step, _write_files(folder, own, linked, copied),
                                          state)}
    except OSError as error:
        log(f"checkpoint {folder} could not be written ({error.filename or folder}: "
            f"{error.strerror}); training continues, and the previous checkpoint is kept", WARNING)
        return {"step": step, "error": error_code(error)}


def _write_files(folder: Path, files: Files, linked: Future[Checksums] | None,
                 copied: Iterable[Callable[[], None]]) -> Checksums:
    for wait in copied:
        wait()
    checksums = {} if linked is None else linked.result()
    for name in checksums:
        with (folder / name).open("rb") as file:
            os.fsync(file.fileno())
    return checksums | write_tensors(folder, files)


class CheckpointCoordinator:
    """The server's part: decides when a checkpoint is due, and commits those that all workers have
    written."""

    def __init__(self, config: RunConfig, provenance: dict[str, Any], workers: int,
                 before_commit: Callable[[], None], members: Members | None = None) -> None:
        """before_commit: called before a checkpoint is committed, to write the records of earlier
        steps that are still in memory: a run that resumes there does not repeat those steps.
        members: of a run of real sites."""
        self.config, self.provenance, self.workers = config, provenance, workers
        self.before_commit, self._members = before_commit, members
        # Checkpoints that workers are writing, by step: the server's state, and the global state if
        # that comes here; the workers' results, each with its site.
        self._server_states: dict[int, tuple[dict[str, Any], Mapping[str, Tensor]]] = {}
        self._results: dict[int, list[dict[str, Any]]] = {}
        self._overdue = False
        self._steps = set(committed_steps(config.run_dir / CHECKPOINTS) if members else ())

    @property
    def kept(self) -> list[int]:
        """The steps that real sites have to keep: those on the server's disk, and those that may
        still get there. Empty in other runs."""
        return sorted(self._steps)

    def due(self, number: int, last: bool) -> bool:
        """Whether to save a checkpoint after round `number`. Not while workers still write an
        earlier one, but always after the last round, which a longer run resumes from."""
        every = self.config.checkpoint_freq
        if last:
            return every is not None
        self._overdue |= every is not None and number % every == 0
        if self._server_states or not self._overdue:
            return False
        self._overdue = False
        return True

    def begin(self, step: int, server: dict[str, Any], state: Mapping[str, Tensor]) -> None:
        """The workers have begun to write a checkpoint; `server` is the server's state for it, and
        `state` the global one of a run of real sites, which do not write it."""
        self._server_states[step], self._results[step] = (server, state), []
        if self._members is not None:
            self._steps.add(step)

    def collect(self, written: Iterable[Sequence[dict[str, Any]]]) -> Iterator[Callable[[], None]]:
        """For each checkpoint that all workers have written, yield a function that commits it. One
        that a worker could not write is removed, with a warning.

        written: what `CheckpointWriter.written` returned on each rank or, without real sites, on
        each worker.
        """
        for rank, results in enumerate(written):
            site = self._members.sites[rank] if self._members else ""
            for result in results:
                self._results[result["step"]].append(result | {"site": site})
        for step in [s for s, results in self._results.items() if len(results) == self.workers]:
            kept, results = self._server_states.pop(step), self._results.pop(step)
            if errors := [_reason(result) for result in results if "error" in result]:
                self._give_up(step, errors[0])
                continue
            yield partial(self._commit, step, *kept, results)

    def _commit(self, step: int, server: dict[str, Any], state: Mapping[str, Tensor],
                results: Sequence[dict[str, Any]]) -> None:
        """On the recorder's thread."""
        folder, owners = folder_of(self.config.run_dir, step), dict[str, Any]()
        try:
            self.before_commit()
            if self._members is None:
                checksums = {name: entry for result in results
                             for name, entry in result["files"].items()}
            else:
                checksums = write_tensors(folder, {GLOBAL: state})
                owners = {RUN_ID: self._members.run, "sites": {
                    site: sorted(result["tag"] for result in results if result["site"] == site)
                    for site in dict.fromkeys(filter(None, self._members.sites))}}
            left = commit(folder, step, self.config.results_dict(), self.provenance, server,
                          checksums, owners)
        except OSError as error:
            self._give_up(step, f"{error.filename}: {error.strerror}")
            return
        # Those that are begun meanwhile are later ones.
        self._steps -= {old for old in self.kept if old <= step and old not in left}

    def _give_up(self, step: int, error: str) -> None:
        folder = folder_of(self.config.run_dir, step)
        log(f"checkpoint {folder} could not be written ({error}); training continues, and the "
            "previous checkpoint is kept", WARNING)
        remove_checkpoint(folder)
        self._steps.discard(step)


def _reason(result: dict[str, Any]) -> str:
    """Why a worker could not write its part of a checkpoint."""
    code, site = result["error"], result["site"]
    return f"{site}: {ERROR_TEXTS.get(code, ERROR_TEXTS['bug'])}" if site else str(code)
