"""Where clients' states rest between their turns.

A state is a dict of named tensors, of which a store asks nothing but that integers stay on the
host. Every client has one from the start; `put` replaces it by another, under any names.

    OnDevice   it stays where training left it: on a CPU, and for a worker's only client
    InMemory   pinned host memory, for the clients of a GPU            --client_store memory
    OnDisk     a file for each client, under clients/ in the run's folder             disk

What moves is moved by one thread, in the order it was asked for: what is brought is what was put
last, and a snapshot of the files holds what had been put before it, whatever is put meanwhile. The
next client's state comes in while the client before it trains; a state on its way out is gone
before the one after comes in, so that there are two at a time (on a GPU: two there).

The GPU's part (streams, events, pinned memory) has not been run on one.
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
from fedrun.common.files import check_claim
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
from fedrun.records.run_files import CLIENTS

T = TypeVar("T")


class ClientStore(ABC):
    """States of the clients of one worker, by client.

    One client has its turn at a time: `take`, then `put`. OSError where a disk fails, at the call
    or at the next one.
    """

    @abstractmethod
    def prefetch(self, client: int) -> None:
        """Begin to bring the state of the client whose turn is next. Not of the present one."""

    @abstractmethod
    def checkout(self, client: int) -> ClientState:
        """The client's state on the device, the caller's until it is put again."""

    @abstractmethod
    def checkin(self, client: int, state: ClientState) -> None:
        """Keep a state, whose tensors the caller gives up."""

    @abstractmethod
    def load(self, checkpoint: Checkpoint) -> None:
        """Replace all states by a checkpoint's; before the first turn."""

    @abstractmethod
    def save(self, saver: CheckpointWriter, folder: Path, step: int, files: Files) -> None:
        """Have `saver` begin a checkpoint of `files` and of all states as they are now."""

    @abstractmethod
    def close(self, patience: float) -> None:
        """After the last turn, of the run or before a failure: its checkpoints are all that a run
        goes on from. Waits so many seconds for what still moves."""


def make_store(config: FederatedConfig, states: Mapping[int, ClientState], device: torch.device
               ) -> ClientStore:
    """The store of a worker on this device, by --client_store; `states`: of all its clients."""
    if len(states) == 1 or (config.client_store == "memory" and device.type == "cpu"):
        return OnDevice(states)
    if config.client_store == "memory":
        return InMemory(states, device, config.timeout)
    return OnDisk(config.run_dir / CLIENTS, states, device, config.timeout)


class OnDevice(ClientStore):
    """States by reference: taking and putting cost nothing."""

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

    def save(self, saver: CheckpointWriter, folder: Path, step: int, files: Files) -> None:
        states = {client_file(client): state for client, state in self._states.items()}
        saver.begin(folder, step, {**files, **states})

    def close(self, patience: float) -> None:
        pass


class _Moving(ClientStore):
    """States that rest elsewhere than on the device; `_read` and `_write` say where.

    timeout: seconds to wait for one of them.
    """

    def __init__(self, device: torch.device, timeout: float) -> None:
        self._device, self._timeout = device, timeout
        self._thread = ThreadPoolExecutor(1, "fedrun-store", initializer=self._begin_thread)
        self._ahead: tuple[int, Future[ClientState]] | None = None
        self._leaving: Future[None] | None = None
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def _begin_thread(self) -> None:
        torch.set_num_threads(1)
        if self._stream is not None:
            torch.cuda.set_device(self._device)
            torch.cuda.set_stream(self._stream)  # beside the stream that trains

    @abstractmethod
    def _read(self, client: int) -> ClientState:
        """On the thread: a state from where it rests, on the host."""

    @abstractmethod
    def _write(self, client: int, state: ClientState) -> None:
        """On the thread: a state from the device to where it rests; its tensors are free then."""

    def prefetch(self, client: int) -> None:
        self._ahead = client, self._thread.submit(self._bring, client)

    def checkout(self, client: int) -> ClientState:
        if self._leaving is not None and self._leaving.done():
            self._leaving.result()  # its error, if it has one
        if self._ahead is None or self._ahead[0] != client:
            self.prefetch(client)
        assert self._ahead is not None
        (_, coming), self._ahead = self._ahead, None
        state = self._wait(coming)
        for tensor in state.values():
            if tensor.is_cuda:  # from the memory of the thread's stream
                tensor.record_stream(torch.cuda.current_stream())
        return state

    def checkin(self, client: int, state: ClientState) -> None:
        assert self._ahead is None or self._ahead[0] != client, "what was brought is outdated"
        self._settle()
        trained = torch.cuda.current_stream().record_event() if self._stream else None
        self._leaving = self._thread.submit(self._send, client, state, trained)

    def close(self, patience: float) -> None:
        wait([self._thread.submit(lambda: None)], patience)  # the last in its order
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _settle(self) -> None:
        """Wait until what was put last is where it rests."""
        if self._leaving is not None:
            self._wait(self._leaving)

    def _wait(self, work: Future[T]) -> T:
        wait([work], self._timeout)
        if not work.done():
            raise TimeoutError(f"--client_store: a client's state was not moved within --timeout "
                               f"{self._timeout:g} s")
        return work.result()

    def _bring(self, client: int) -> ClientState:
        state = {name: tensor.to(self._device, non_blocking=True) if tensor.is_floating_point()
                 else tensor for name, tensor in self._read(client).items()}
        if self._stream is not None:
            self._stream.synchronize()
        return state

    def _send(self, client: int, state: ClientState, trained: torch.cuda.Event | None) -> None:
        if trained is not None:
            trained.synchronize()
        self._write(client, state)


class InMemory(_Moving):
    """States in the host's memory, on a GPU's machine in pinned memory, which it reads by itself.

    states: every client's at the start.
    """

    def __init__(self, states: Mapping[int, ClientState], device: torch.device, timeout: float) -> None:
        super().__init__(device, timeout)
        self._states: dict[int, dict[str, Tensor]] = {client: {} for client in states}
        for client, state in states.items():
            self._copy(client, state)

    def _read(self, client: int) -> ClientState:
        return self._states[client]

    def _write(self, client: int, state: ClientState) -> None:
        self._copy(client, state)
        if self._stream is not None:
            self._stream.synchronize()

    def _copy(self, client: int, state: ClientState) -> None:
        """Into the memory that the client's last state had."""
        last = self._states[client]
        now = {name: last[name] if name in last else torch.empty_like(
            tensor, device="cpu", pin_memory=self._stream is not None)
            for name, tensor in state.items()}
        for name, tensor in state.items():
            now[name].copy_(tensor, non_blocking=True)
        self._states[client] = now

    def load(self, checkpoint: Checkpoint) -> None:
        for client in self._states:
            self._copy(client, checkpoint.tensors(client_file(client)))

    def save(self, saver: CheckpointWriter, folder: Path, step: int, files: Files) -> None:
        self._settle()
        states = {client_file(client): state for client, state in self._states.items()}
        saver.begin(folder, step, {**files, **states})


class OnDisk(_Moving):
    """States in files, `folder`/client_7.safetensors, each of them a new file whenever it is put.

    A checkpoint takes a file as it is, by a hard link: nothing is read or copied for it. Where the
    file system has no hard links, or an earlier checkpoint has this file already (no two share one,
    lest a flipped bit damage both), the thread copies.

    states: every client's at the start. Files of these clients that lie there are replaced.
    """

    def __init__(self, folder: Path, states: Mapping[int, ClientState], device: torch.device,
                 timeout: float) -> None:
        super().__init__(device, timeout)
        self._folder = folder
        self._sums: Checksums = {}
        self._spare: ClientState = {}
        """Tensors of a state that was written, for the next one that is read: memory that is given
        back and asked for again hundreds of times in a round grows by the holes between."""
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
        """Turn the disk's error into one that says whose files these are."""
        try:
            yield
        except OSError as error:
            raise OSError(error.errno, f"--client_store disk: a client's state cannot be {done} "
                          f"({error.strerror}); memory is the other one that is accepted",
                          str(self._folder)) from error

    def load(self, checkpoint: Checkpoint) -> None:
        sums = checkpoint.checksums
        self._sums = {name: sums[name] for name in self._sums}
        with self._naming("written"):
            for name in self._sums:
                _link(checkpoint.folder / name, self._folder / name)

    def save(self, saver: CheckpointWriter, folder: Path, step: int, files: Files) -> None:
        linked = self._thread.submit(self._link_all, folder, self._leaving)
        saver.begin(folder, step, files, linked)

    def _link_all(self, folder: Path, put_last: Future[None] | None) -> Checksums:
        """On the thread, when all that was put before is written: the files as they are."""
        if put_last is not None:
            put_last.result()  # its error, if it has one
        check_claim(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name in self._sums:
            _link(self._folder / name, folder / name)
        return dict(self._sums)

    def close(self, patience: float) -> None:
        super().close(patience)
        try:
            check_claim(self._folder)
        except FolderLost:  # these are another run's
            return
        for name in self._sums:
            (self._folder / name).unlink(missing_ok=True)
        with suppress(OSError):  # other workers' files
            self._folder.rmdir()


def _link(file: Path, name: Path) -> None:
    """A second name for a file, instead of what was there. A copy where that cannot be, or where it
    has two already: one of them is a checkpoint's, and no two checkpoints are to share a file."""
    check_claim(name)
    name.unlink(missing_ok=True)
    with suppress(OSError):
        if file.stat().st_nlink == 1:
            os.link(file, name)
            return
    shutil.copyfile(file, name)
