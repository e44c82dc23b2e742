"""The control plane: small messages through the server.

Besides data_plane.py the only file that calls collectives. Messages are JSON, never pickle; every
wait has a timeout, and where a rank is missing the error names it.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import Store

from fedrun.common.errors import FedrunError
from fedrun.distributed.stopping import HEARTBEAT

_FAILED = "failed"  # store key under which the first rank that fails says why
SECONDS_FOR_STORE = 5.0
HEAD = 4096  # bytes that a message takes at least; most fit, and need no second one for the rest
_LENGTH = 8


class UnresponsiveRanks(FedrunError, RuntimeError):
    """Ranks that did not answer: dead, stuck or cut off."""


class ControlPlane:
    """The control plane: the server's words to all, and everybody's to the server.

    Without a group it is the plane of one process, where nothing travels.
    """

    def __init__(self, group: dist.ProcessGroup | None = None, beats: Heartbeat | None = None,
                 timeout: timedelta = timedelta(), first_worker: int = 0) -> None:
        self.group = group
        self.beats = beats
        self.timeout = timeout
        self.first_worker = first_worker
        self.rank = dist.get_rank(group) if group else 0
        self.world_size = dist.get_world_size(group) if group else 1
        self._copy: Tensor | None = None
        self._copy_sent: dist.Work | None = None

    def share(self, message: Any = None) -> Any:
        """All ranks: the server's message, on every rank. The others' argument is ignored."""
        if self.group is None:
            return message
        head, rest = _encode(message) if self.rank == 0 else (_empty(HEAD), None)
        with self._naming(0):
            dist.broadcast(head, 0, group=self.group)
            rest = _rest_of(head) if rest is None else rest
            if rest.numel():
                dist.broadcast(rest, 0, group=self.group)
        return _decode(head, rest)

    def gather(self, message: Any) -> list[Any] | None:
        """All ranks: everybody's message in the order of ranks on the server, None elsewhere."""
        if self.group is None:
            return [message]
        if self.rank:
            with self._naming(0):
                for part in filter(Tensor.numel, _encode(message)):
                    dist.send(part, 0, group=self.group)
            return None
        heads = {rank: _empty(HEAD) for rank in range(1, self.world_size)}
        self._receive(heads)
        rests = {rank: _rest_of(head) for rank, head in heads.items()}
        self._receive({rank: rest for rank, rest in rests.items() if rest.numel()})
        return [message, *(_decode(heads[rank], rests[rank]) for rank in heads)]

    def _receive(self, buffers: dict[int, Tensor]) -> None:
        """Server: fill one buffer from each rank, or say which ranks are missing."""
        deadline = time.monotonic() + self.timeout.total_seconds()
        works = {rank: cast(dist.Work, dist.irecv(buffer, rank, group=self.group))
                 for rank, buffer in buffers.items()}
        lost = {}
        for rank, work in works.items():
            left = max(deadline - time.monotonic(), 0.001)
            try:
                work.wait(timedelta(seconds=left))
            except RuntimeError as error:
                lost[rank] = str(error).splitlines()[0]
        if lost:
            raise self._lost(lost)

    def copy_to_server(self, vector: Tensor) -> None:
        """First worker: start sending a copy of a vector to the server, from a buffer of its own.

        The vector may change at once; the copy before must be through before this one starts.
        """
        self.wait_for_copy()
        if self._copy is None:
            self._copy = torch.empty_like(vector, device="cpu", pin_memory=vector.is_cuda)
        self._copy.copy_(vector)
        if self.rank:
            self._copy_sent = dist.isend(self._copy, 0, group=self.group, tag=1)

    def receive_copy(self, size: int, dtype: torch.dtype) -> Tensor:
        """Server: the vector that the first worker sends, (size,) on the CPU, the caller's own."""
        if self.first_worker == 0:
            assert self._copy is not None
            return self._copy.clone()
        vector = torch.empty(size, dtype=dtype)
        with self._naming(self.first_worker):
            dist.recv(vector, self.first_worker, group=self.group, tag=1)
        return vector

    def wait_for_copy(self) -> None:
        if self._copy_sent is not None:
            with self._naming(0):
                self._copy_sent.wait()
            self._copy_sent = None

    def fail(self, error: BaseException) -> None:
        """A failing rank: let the others know why, between two of their local steps or where they
        wait for it in vain. Only the first one's reason is kept; the others' follow from it."""
        if self.beats and not isinstance(error, UnresponsiveRanks):
            self.beats.tell(f"rank {self.rank} failed with {type(error).__name__}: "
                            f"{str(error).partition(chr(10))[0]}")

    def peer_failed(self) -> bool:
        """Whether some rank has failed, as of the last beat; costs nothing."""
        return self.beats is not None and self.beats.peer_failed

    def lost_peers(self) -> list[int]:
        """Ranks that show no sign of life; takes some seconds. From any thread."""
        return self.beats.unresponsive() if self.beats else []

    def close(self) -> None:
        """After the last message of a run that has succeeded."""
        if self.beats:
            self.beats.stop()

    @contextmanager
    def _naming(self, peer: int) -> Iterator[None]:
        """Turn torch.distributed's errors into one that names the rank that did not answer."""
        try:
            yield
        except RuntimeError as error:
            raise self._lost({peer: str(error).splitlines()[0]}) from error

    def _lost(self, unanswered: dict[int, str]) -> UnresponsiveRanks:
        """The error for ranks that did not answer, naming first those that show no life."""
        names = ", ".join(map(str, unanswered))
        dead = self.lost_peers()
        life = f"no sign of life from rank {', '.join(map(str, dead))}, " if dead else ""
        why = f"{self.beats.reason}; " if self.beats and self.beats.reason else ""
        return UnresponsiveRanks(f"{why}{life}no word from rank {names} to rank {self.rank} (dead, stuck, "
                         f"or slower than --timeout {self.timeout.total_seconds():g} s): "
                         f"{next(iter(unanswered.values()))}")


class Heartbeat:
    """Every rank counts up a number in the store, so that the others can tell who is alive: ranks
    that wait for a lost one are as unresponsive on the wire as the lost one itself.

    The store's calls know no timeout, and whoever hosts it may be stopped or cut off: this thread
    alone touches it, the others look at what it has found.
    """

    SECONDS = 0.5

    def __init__(self, store: Store, rank: int, world_size: int) -> None:
        self.store, self.rank, self.world_size = store, rank, world_size
        self.peer_failed = False
        self.reason = ""
        """Why it has, of the first."""
        self._own_reason = ""
        self._told = threading.Event()
        self._counts: dict[int, int] = {}
        self._lookers = 0  # threads that want the others' counts
        self._lock = threading.Lock()
        self._rounds = 0  # of counts
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name=HEARTBEAT, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            while not self._stopped.wait(self.SECONDS):
                self._beat()
        except RuntimeError:  # the store is gone: either the run is at its end, or its launcher is
            if not self._stopped.wait(6 * self.SECONDS):
                print(f"fedrun: rank {self.rank}: the launcher is gone: ends at once",
                      file=sys.stderr, flush=True)
                os._exit(1)

    def _beat(self) -> None:
        self.store.add(f"beats/{self.rank}", 1)
        if self._own_reason:
            self.store.compare_set(_FAILED, "", self._own_reason)
            self._told.set()
        self.peer_failed = self.store.check([_FAILED])
        if self.peer_failed and not self.reason:
            self.reason = self.store.get(_FAILED).decode()
        if self._lookers:
            self._counts = {r: self.store.add(f"beats/{r}", 0) for r in range(self.world_size)}
            self._rounds += 1

    def tell(self, reason: str) -> None:
        """Say why this rank fails, and wait until it is said."""
        self._own_reason = reason
        self._told.wait(SECONDS_FOR_STORE)

    def unresponsive(self) -> list[int]:
        """Ranks whose count stands still for a few beats; takes as long. None where the store does
        not answer, or where this rank is at its end."""
        with self._lock:
            self._lookers += 1
        before, rounds = self._look()
        after, more_rounds = self._look()
        with self._lock:
            self._lookers -= 1
        if rounds == 0 or more_rounds == rounds:
            return []
        return [rank for rank, count in before.items() if after[rank] == count]

    def _look(self) -> tuple[dict[int, int], int]:
        self._stopped.wait(6 * self.SECONDS)
        return ({}, 0) if self._stopped.is_set() else (self._counts, self._rounds)

    def stop(self) -> None:
        """Before the process ends: a thread inside the store would abort the interpreter's end.
        One that the store does not let go is left to `__main__`, which ends without it."""
        self._stopped.set()
        self._thread.join(SECONDS_FOR_STORE)


def _encode(message: Any) -> tuple[Tensor, Tensor]:
    """A message's head, HEAD bytes that begin with its length, and what does not fit there."""
    text = json.dumps(message).encode()
    whole = len(text).to_bytes(_LENGTH) + text
    whole += bytes(max(0, HEAD - len(whole)))
    head, rest = torch.frombuffer(bytearray(whole), dtype=torch.uint8).tensor_split([HEAD])
    return head, rest


def _rest_of(head: Tensor) -> Tensor:
    """Room for what does not fit there."""
    length = int.from_bytes(head[:_LENGTH].numpy().tobytes())
    return _empty(max(0, _LENGTH + length - HEAD))


def _decode(head: Tensor, rest: Tensor) -> Any:
    whole = head.numpy().tobytes() + rest.numpy().tobytes()
    length = int.from_bytes(whole[:_LENGTH])
    return json.loads(whole[_LENGTH:_LENGTH + length])


def _empty(size: int) -> Tensor:
    return torch.empty(size, dtype=torch.uint8)
