"""Writes checkpoints while a run trains on: the workers' part and the server's."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedrun.common.log import WARNING, log
from fedrun.common.pinned import PinnedMemory
from fedrun.config import RunConfig
from fedrun.records.checkpoint import Checksums, Files, commit, folder_of, write_tensors
from fedrun.records.run_files import remove_checkpoint


class CheckpointWriter:
    """Writes a worker's files of one checkpoint at a time, while the worker trains on.

    The tensors are copied before the next round begins; a thread writes the copies. From a GPU the
    copies are queued on the stream that trains, which the host does not wait for: what changes the
    tensors next is queued behind them. They go to pinned memory, which is kept for the next
    checkpoint. (Not run on a GPU.)
    """

    def __init__(self) -> None:
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
        self._writing = self._thread.submit(_write, folder, step, snapshot, linked, copied)

    def _copy(self, file: str, name: str, tensor: Tensor) -> Tensor:
        """A copy on the host; of a tensor on a GPU it is complete when `_copied` says so."""
        if not tensor.is_cuda:
            return torch.empty_like(tensor, device="cpu").copy_(tensor)
        if (file, name) not in self._copies:
            self._copies[file, name] = self._pinned.empty_like(tensor)
        return self._copies[file, name].copy_(tensor, non_blocking=True)

    def written(self, wait: bool = False) -> list[dict[str, Any]]:
        """The results of the writes that have ended since the last call: the `step` of each, and
        the checksums of its `files` or the `error` that prevented them.

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
    for wait in copied:
        wait()
    try:
        checksums = {} if linked is None else linked.result()
        for name in checksums:
            with (folder / name).open("rb") as file:
                os.fsync(file.fileno())
        return {"step": step, "files": checksums | write_tensors(folder, files)}
    except OSError as error:
        return {"step": step, "error": f"{error.filename or folder}: {error.strerror}"}


class CheckpointCoordinator:
    """The server's part: decides when a checkpoint is due, and commits those that all workers have
    written."""

    def __init__(self, config: RunConfig, provenance: dict[str, Any], workers: int,
                 before_commit: Callable[[], None]) -> None:
        """before_commit: called before a checkpoint is committed, to write the records of earlier
        steps that are still in memory: a run that resumes there does not repeat those steps."""
        self.config, self.provenance, self.workers = config, provenance, workers
        self.before_commit = before_commit
        # Checkpoints that workers are writing, by step: the server's state, the workers' results.
        self._server_states: dict[int, dict[str, Any]] = {}
        self._results: dict[int, list[dict[str, Any]]] = {}
        self._overdue = False

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

    def begin(self, step: int, server: dict[str, Any]) -> None:
        """The workers have begun to write a checkpoint; `server` is the server's state for it."""
        self._server_states[step], self._results[step] = server, []

    def collect(self, written: Iterable[Sequence[dict[str, Any]]]) -> Iterator[Callable[[], None]]:
        """For each checkpoint that all workers have written, yield a function that commits it. One
        that a worker could not write is removed, with a warning.

        written: what `CheckpointWriter.written` returned on each worker.
        """
        for results in written:
            for result in results:
                self._results[result["step"]].append(result)
        for step in [s for s, results in self._results.items() if len(results) == self.workers]:
            server, results = self._server_states.pop(step), self._results.pop(step)
            folder = folder_of(self.config.run_dir, step)
            errors = [result["error"] for result in results if "error" in result]
            if errors:
                self._give_up(folder, errors[0])
                continue
            checksums = {name: entry for result in results
                         for name, entry in result["files"].items()}
            yield partial(self._commit, folder, step, server, checksums)

    def _commit(self, folder: Path, step: int, server: dict[str, Any], checksums: Checksums
                ) -> None:
        try:
            self.before_commit()
            commit(folder, step, self.config.results_dict(), self.provenance, server, checksums)
        except OSError as error:
            self._give_up(folder, f"{error.filename}: {error.strerror}")

    def _give_up(self, folder: Path, error: str) -> None:
        log(f"checkpoint {folder} could not be written ({error}); training continues, and the "
            "previous checkpoint is kept", WARNING)
        remove_checkpoint(folder)
