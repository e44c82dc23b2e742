"""Stores that keep clients' states between their turns.

A state is a dict of named tensors; integers stay on the host. Every client has one from the start,
and `checkin` replaces it by another, under any names.

    OnDevice   where training left it: on a CPU, and for the only client of a worker
    InMemory   pinned host memory, for the clients of a GPU            --client_store memory
    OnDisk     a file for each client, under clients/ of `Folders`                    disk
    Counted    nowhere, for clients that would keep none (counted_store.py)

One thread performs all transfers in FIFO order: a fetch sees the latest `checkin`, and a snapshot
sees exactly the ones before it. The next client's state is fetched while the client before it
trains. A state is stored before the next but one is fetched, so two states exist at a time (on a
GPU: two in its memory). The host waits until a state's memory is not used any more before it frees
it. `record_stream` would do without that wait, but keep the memory until the training that was
queued meanwhile is over: a third state.

The GPU part (streams, events, pinned memory) has not been run on a GPU.
"""

from __future__ import annotations

import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from fedrun.common.errors import FolderLost
from fedrun.common.files import check_claim, make_folder
from fedrun.common.pinned import PinnedMemory
from fedrun.config import FederatedConfig
from fedrun.federation.client import ClientState
from fedrun.records.checkpoint import (
    Checkpoint,
    Checksums,
    Files,
    client_file,
    read_tensors,
    write_tensors,
)
from fedrun.records.checkpoint_writer import CheckpointWriter
from fedrun.records.folders import Folders

T = TypeVar("T")


class ClientStore(ABC):
    """States of the clients of one worker, by client.

    One client has its turn at a time: `checkout`, then `checkin`. OSError if a disk fails, raised
    by that call or the next one.
    """

    def begin(self, number: int) -> None:  # noqa: B027
        """Before the first turn of round `number`."""

    @abstractmethod
    def prefetch(self, client: int) -> None:
        """Start to fetch the state of the client whose turn is next (not of the current one)."""

    @abstractmethod
    def checkout(self, client: int) -> ClientState:
        """The client's state on the device; the caller owns it until `checkin`."""

    @abstractmethod
    def checkin(self, client: int, state: ClientState) -> None:
        """Store a state; the caller must not use its tensors any more."""

    @abstractmethod
    def load(self, checkpoint: Checkpoint) -> None:
        """Replace all states by those of a checkpoint; before the first turn."""

    @abstractmethod
    def save(self, writer: CheckpointWriter, folder: Path, step: int, files: Files) -> None:
        """Have `writer` start a checkpoint of `files` and of all states as they are now."""

    @abstractmethod
    def close(self, timeout: float) -> None:
        """After the last turn or a failure; a run resumes from its checkpoints alone. Waits for
        transfers under way for at most `timeout` seconds."""


def make_store(config: FederatedConfig, folders: Folders, states: Mapping[int, ClientState],
               device: torch.device) -> ClientStore:
    """The store of a worker on this device, by --client_store. `states`: of all its clients."""
    kind = kind_of_store(config, len(states), device.type == "cuda")
    if kind is OnDevice:
        return OnDevice(states)
    if kind is InMemory:
        return InMemory(states, device, config.timeout)
    return OnDisk(folders.clients, states, device, config.timeout)


def kind_of_store(config: FederatedConfig, clients: int, gpu: bool) -> type[ClientStore]:
    """Where a worker keeps the states of this many clients."""
    if clients == 1 or (config.client_store == "memory" and not gpu):
        return OnDevice
    return InMemory if config.client_store == "memory" else OnDisk


class OnDevice(ClientStore):
    """States by reference: nothing is moved."""

    def __init__(self, states: Mapping[int, ClientState]) -> None:
        self._states = dict(states)

    def prefetch(self, client: int) -> None:
        pass

    def checkout(self, client: int) -> ClientState:
        return self._states[client]

    def checkin(self, client: int, state: ClientState) -> None:
        self._states[client] = state

    def load(self, checkpoint: Checkpoint) -> None:
        for client in self._states:
            self._states[client] = checkpoint.tensors(client_file(client))

    def save(self, writer: CheckpointWriter, folder: Path, step: int, files: Files) -> None:
        states = {client_file(client): state for client, state in self._states.items()}
        writer.begin(folder, step, {**files, **states})

    def close(self, timeout: float) -> None:
        pass


class _Moving(ClientStore):
    """States that are stored off the device; subclasses define `_read` and `_write`.

    timeout: seconds to wait for one transfer.
    """

    def __init__(self, device: torch.device, timeout: float) -> None:
        self._device, self._timeout = device, timeout
        self._thread = ThreadPoolExecutor(1, "fedrun-store", initializer=self._begin_thread)
        self._fetched: tuple[int, Future[ClientState]] | None = None
        self._storing: Future[None] | None = None
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def _begin_thread(self) -> None:
        torch.set_num_threads(1)
        if self._stream is not None:
            torch.cuda.set_device(self._device)
            torch.cuda.set_stream(self._stream)  # not the stream that trains

    @abstractmethod
    def _read(self, client: int) -> ClientState:
        """On the thread: read a stored state, on the host."""

    @abstractmethod
    def _write(self, client: int, state: ClientState) -> None:
        """On the thread: store a state; its tensors may be reused afterwards."""

    def prefetch(self, client: int) -> None:
        self._fetched = client, self._thread.submit(self._fetch, client)

    def checkout(self, client: int) -> ClientState:
        if self._storing is not None and self._storing.done():
            self._storing.result()  # raises its error, if there was one
        if self._fetched is None or self._fetched[0] != client:
            self.prefetch(client)
        assert self._fetched is not None
        (_, fetching), self._fetched = self._fetched, None
        return self._wait(fetching)

    def checkin(self, client: int, state: ClientState) -> None:
        assert self._fetched is None or self._fetched[0] != client, "what was fetched is outdated"
        self._settle()
        trained = (None if self._stream is None
                   else torch.cuda.current_stream().record_event())
        self._storing = self._thread.submit(self._store, client, state, trained)

    def close(self, timeout: float) -> None:
        wait([self._thread.submit(lambda: None)], timeout)  # after all others
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _settle(self) -> None:
        """Wait until the last state is stored."""
        if self._storing is not None:
            self._wait(self._storing)

    def _wait(self, work: Future[T]) -> T:
        wait([work], self._timeout)
        if not work.done():
            raise TimeoutError(f"--client_store: a client's state was not moved within --timeout "
                               f"{self._timeout:g} s")
        return work.result()

    def _fetch(self, client: int) -> ClientState:
        state = {name: tensor.to(self._device, non_blocking=True) if tensor.is_floating_point()
                 else tensor for name, tensor in self._read(client).items()}
        if self._stream is not None:
            self._stream.synchronize()
        return state

    def _store(self, client: int, state: ClientState, trained: torch.cuda.Event | None) -> None:
        if trained is not None:
            trained.synchronize()  # also before the state is freed, at the end of this call
        self._write(client, state)


class InMemory(_Moving):
    """States in the host's memory: pinned, if there is a GPU, which can then read it directly.

    states: of every client at the start.
    """

    def __init__(self, states: Mapping[int, ClientState], device: torch.device, timeout: float
                 ) -> None:
        super().__init__(device, timeout)
        self._pinned = PinnedMemory() if self._stream is not None else None
        self._memory: dict[int, dict[str, Tensor]] = {client: {} for client in states}
        """A client's own memory by the names of the tensors that it has had so far."""
        self._states: dict[int, ClientState] = {}
        for client, state in states.items():
            self._copy(client, state)
        if self._stream is not None:  # the first fetch is on another stream
            torch.cuda.current_stream(device).synchronize()

    def _read(self, client: int) -> ClientState:
        return self._states[client]

    def _write(self, client: int, state: ClientState) -> None:
        self._copy(client, state)
        if self._stream is not None:
            self._stream.synchronize()

    def _copy(self, client: int, state: ClientState) -> None:
        """Copy a state into the client's memory, which grows by tensors with new names."""
        memory = self._memory[client]
        for name, tensor in state.items():
            if name not in memory:
                memory[name] = self._empty_like(tensor)
            memory[name].copy_(tensor, non_blocking=True)
        self._states[client] = {name: memory[name] for name in state}

    def _empty_like(self, tensor: Tensor) -> Tensor:
        if self._pinned is not None and tensor.is_floating_point():  # it moves to the GPU
            return self._pinned.empty_like(tensor)
        return torch.empty_like(tensor, device="cpu")

    def load(self, checkpoint: Checkpoint) -> None:
        for client in self._states:
            self._copy(client, checkpoint.tensors(client_file(client)))

    def save(self, writer: CheckpointWriter, folder: Path, step: int, files: Files) -> None:
        self._settle()
        states = {client_file(client): state for client, state in self._states.items()}
        writer.begin(folder, step, {**files, **states})


class OnDisk(_Moving):
    """States in files, `folder`/client_7.safetensors; every `checkin` writes a new file.

    A checkpoint hard-links the file, so nothing is read or copied for it. The thread copies instead
    if the file system has no hard links, or if an earlier checkpoint links this file already (no
    two share one, so that a flipped bit cannot damage both).

    states: of every client at the start; files of these clients in the folder are replaced.
    """

    def __init__(self, folder: Path, states: Mapping[int, ClientState], device: torch.device,
                 timeout: float) -> None:
        super().__init__(device, timeout)
        self._folder = folder
        self._sums: Checksums = {}
        self._spare: ClientState = {}
        """Tensors of the last stored state, reused for the next one that is read: freeing and
        allocating hundreds of times in a round would fragment the memory."""
        for client, state in states.items():
            self._write(client, state)

    def _read(self, client: int) -> ClientState:
        spare, self._spare = self._spare, {}
        with self._naming("read"):
            return read_tensors(self._folder / client_file(client), spare)

    def _write(self, client: int, state: ClientState) -> None:
        here = {name: tensor.cpu() for name, tensor in state.items()}
        with self._naming("written"):
            self._sums |= write_tensors(self._folder, {client_file(client): here}, durable=False)
        self._spare = here

    @contextmanager
    def _naming(self, done: str) -> Iterator[None]:
        """Turn a disk error into one that names the flag and the folder."""
        try:
            yield
        except OSError as error:
            check_claim(self._folder)  # if the run has lost its folder, that is the reason
            raise OSError(error.errno, f"--client_store disk: a client's state cannot be {done} "
                          f"({error.strerror or error}); --client_store memory needs no disk",
                          str(self._folder)) from error

    def load(self, checkpoint: Checkpoint) -> None:
        sums = checkpoint.checksums
        self._sums = {name: sums[name] for name in self._sums}
        with self._naming("written"):
            for name in self._sums:
                _link(checkpoint.folder / name, self._folder / name)

    def save(self, writer: CheckpointWriter, folder: Path, step: int, files: Files) -> None:
        linked = self._thread.submit(self._link_all, folder, self._storing)
        writer.begin(folder, step, files, linked)

    def _link_all(self, folder: Path, last_write: Future[None] | None) -> Checksums:
        """On the thread, after every earlier write: link the files as they are."""
        if last_write is not None:
            last_write.result()  # raises its error, if there was one
        make_folder(folder)
        for name in self._sums:
            _link(self._folder / name, folder / name)
        return dict(self._sums)

    def close(self, timeout: float) -> None:
        super().close(timeout)
        try:
            check_claim(self._folder)
        except FolderLost:  # the files belong to another run
            return
        for name in self._sums:
            (self._folder / name).unlink(missing_ok=True)
        with suppress(OSError):  # it still holds other workers' files
            self._folder.rmdir()


def _link(file: Path, name: Path) -> None:
    """Hard-link `file` as `name`, replacing what was there. Copies it instead if that is impossible
    or if it has two names already: one is a checkpoint's, and checkpoints must not share files."""
    check_claim(name)
    name.unlink(missing_ok=True)
    with suppress(OSError):
        if file.stat().st_nlink == 1:
            os.link(file, name)
            return
    shutil.copyfile(file, name)
