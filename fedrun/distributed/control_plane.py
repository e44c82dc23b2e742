"""The control plane: small messages between the server and all ranks.

Only this module and data_plane.py call collectives. Messages are JSON, never pickle; every wait
has a timeout, and its error names the ranks that did not answer.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import Store

from fedrun.common.errors import FedrunError
from fedrun.common.log import ERROR, log
from fedrun.common.pinned import PinnedMemory
from fedrun.distributed.handshake import Membership
from fedrun.distributed.stopping import HEARTBEAT_THREAD, end_process

_FAILED = "failed"  # store key that holds the reason of the first rank that failed
SECONDS_FOR_STORE = 5.0
HEAD_BYTES = 4096  # size of a message's first part; most messages fit and need no second part
_LENGTH_BYTES = 8


class UnresponsiveRanks(FedrunError, RuntimeError):
    """Ranks did not answer in time: dead, stuck or cut off from the network."""


class ControlPlane:
    """Messages from the server to all ranks, and from all ranks to the server.

    Without a group it is the control plane of a single process, where nothing is sent.
    """

    def __init__(self, group: dist.ProcessGroup | None = None, heartbeat: Heartbeat | None = None,
                 timeout: timedelta = timedelta(), first_worker: int = 0) -> None:
        self.group = group
        self.heartbeat = heartbeat
        self.timeout = timeout
        self.first_worker = first_worker
        self.rank = dist.get_rank(group) if group else 0
        self.world_size = dist.get_world_size(group) if group else 1
        self.membership: Membership | None = None
        """The sites of all ranks, if they have several owners."""
        self.public: Callable[[BaseException], str] = _type_and_line
        """What of an exception may leave this process."""
        self._pinned = PinnedMemory()
        self._copy: Tensor | None = None
        self._copy_sent: dist.Work | None = None

    def meet(self) -> None:
        """All ranks, first: connect those that speak to each other, while what goes wrong is still
        the start's: each with the server, and some to pass on what the server shares."""
        byte = torch.zeros(1, dtype=torch.uint8)
        if self.rank:
            dist.send(byte, 0, group=self.group)
        else:
            self._receive({rank: _empty(1) for rank in range(1, self.world_size)})
        dist.broadcast(byte, 0, group=self.group)

    def share(self, message: Any = None) -> Any:
        """All ranks: return the server's message. The argument of other ranks is ignored."""
        if self.group is None:
            return message
        head, rest = _encode(message) if self.rank == 0 else (_empty(HEAD_BYTES), None)
        with self._naming(0):
            dist.broadcast(head, 0, group=self.group)
            rest = _buffer_for_rest(head) if rest is None else rest
            if rest.numel():
                dist.broadcast(rest, 0, group=self.group)
        return _decode(head, rest)

    def gather(self, message: Any) -> list[Any] | None:
        """All ranks: return the messages of all ranks, in rank order, on the server; None on the
        other ranks."""
        if self.group is None:
            return [message]
        if self.rank:
            with self._naming(0):
                for part in filter(Tensor.numel, _encode(message)):
                    dist.send(part, 0, group=self.group)
            return None
        heads = {rank: _empty(HEAD_BYTES) for rank in range(1, self.world_size)}
        self._receive(heads)
        rests = {rank: _buffer_for_rest(head) for rank, head in heads.items()}
        self._receive({rank: rest for rank, rest in rests.items() if rest.numel()})
        return [message, *(_decode(heads[rank], rests[rank]) for rank in heads)]

    def _receive(self, buffers: dict[int, Tensor]) -> None:
        """Server: fill one buffer from each rank; raise UnresponsiveRanks if any does not send."""
        deadline = time.monotonic() + self.timeout.total_seconds()
        works, failures = dict[int, dist.Work](), dict[int, str]()
        for rank, buffer in buffers.items():
            try:
                works[rank] = cast(dist.Work, dist.irecv(buffer, rank, group=self.group))
            except RuntimeError as error:  # its connection is gone
                failures[rank] = str(error).splitlines()[0]
        for rank, work in works.items():
            left = max(deadline - time.monotonic(), 0.001)
            try:
                work.wait(timedelta(seconds=left))
            except RuntimeError as error:
                failures[rank] = str(error).splitlines()[0]
        if failures:
            raise self._unresponsive(failures)

    def share_vector(self, vector: Tensor | None, size: int, dtype: torch.dtype) -> Tensor:
        """All ranks: return the server's vector, (size,) on the CPU. The argument of other ranks is
        ignored."""
        if self.rank == 0:
            assert vector is not None
            vector = vector.contiguous()
            assert (vector.numel(), vector.dtype) == (size, dtype)
        else:
            vector = torch.empty(size, dtype=dtype)
        if self.group is not None and size:
            with self._naming(0):
                dist.broadcast(vector, 0, group=self.group)
        return vector

    def copy_to_server(self, vector: Tensor) -> None:
        """A worker, usually the first: start sending a copy of a vector to the server.

        The copy is sent from a buffer of its own, so the caller may change the vector at once.
        Waits until the previous copy has been sent.
        """
        self.wait_for_copy()
        if self._copy is None or (self._copy.shape, self._copy.dtype) != (vector.shape,
                                                                          vector.dtype):
            self._copy = self._pinned.empty_like(vector) if vector.is_cuda else (
                torch.empty_like(vector))
        self._copy.copy_(vector)
        if self.rank:
            self._copy_sent = dist.isend(self._copy, 0, group=self.group, tag=1)

    def receive_copy(self, size: int, dtype: torch.dtype, sender: int | None = None) -> Tensor:
        """Server: return the vector that a worker sends, by default the first, (size,) on the CPU.
        The caller owns it."""
        sender = self.first_worker if sender is None else sender
        if sender == 0:
            assert self._copy is not None
            return self._copy.clone()
        vector = torch.empty(size, dtype=dtype)
        with self._naming(sender):
            cast(dist.Work, dist.irecv(vector, sender, group=self.group, tag=1)).wait(self.timeout)
        return vector

    def wait_for_copy(self) -> None:
        """First worker: wait until the copy that was started last has been sent."""
        if self._copy_sent is not None:
            with self._naming(0):
                self._copy_sent.wait()
            self._copy_sent = None

    def fail(self, error: BaseException) -> None:
        """A failing rank: report the reason to the others. They see it between local steps, or
        when a collective times out. Only the first failure is recorded; later ones are its
        consequences."""
        if isinstance(error, FedrunError) and error.on_all_ranks:
            return  # each prints it at once, without a wait for a store that may be gone
        if self.heartbeat and not isinstance(error, UnresponsiveRanks):
            self.heartbeat.report_failure(f"rank {self.rank} failed with {self.public(error)}")

    def peer_failed(self) -> bool:
        """Whether any rank had failed at the last heartbeat; costs nothing."""
        return self.heartbeat is not None and self.heartbeat.peer_failed

    def lost_peers(self) -> list[int]:
        """Ranks whose heartbeat has stopped. Takes a few seconds; may be called in any thread."""
        return self.heartbeat.unresponsive() if self.heartbeat else []

    def left_alone(self, why: str = "", lost: Sequence[int] = ()) -> UnresponsiveRanks:
        """A worker: the error for a collective of the workers that will not end. lost: ranks
        without a heartbeat."""
        reason = self.heartbeat.reason if self.heartbeat else ""
        gone = f"no heartbeat from {self._named(lost)}" if lost else ""
        left = f"rank {self.rank} waits for a sum over the workers that will not end"
        return UnresponsiveRanks("; ".join(filter(None, (reason, gone, left)))
                                 + (why and f": {why}"))

    def compiling(self, begins: bool) -> None:
        """While GPU kernels may be compiled, a rank may be silent for longer before it counts as
        lost."""
        if self.heartbeat:
            self.heartbeat.silent_beats = Heartbeat.WHILE_COMPILING if begins else Heartbeat.LOST

    def close(self) -> None:
        """Call after the last message of a run that has succeeded."""
        if self.heartbeat:
            self.heartbeat.stop()

    @contextmanager
    def _naming(self, rank: int) -> Iterator[None]:
        """Turn an error of torch.distributed into one that names the rank that did not answer."""
        try:
            yield
        except RuntimeError as error:
            raise self._unresponsive({rank: str(error).splitlines()[0]}) from error

    def _unresponsive(self, failures: dict[int, str]) -> UnresponsiveRanks:
        """The error for ranks that did not answer. Those without a heartbeat come first: the
        others may only be waiting for them."""
        lost = self.lost_peers()
        dead = f"no heartbeat from {self._named(lost)}, " if lost else ""
        reason = self.heartbeat.reason if self.heartbeat else ""
        return UnresponsiveRanks(
            f"{reason and f'{reason}; '}{dead}no answer from {self._named(failures)} to rank "
            f"{self.rank} (dead, stuck, or slower than --timeout "
            f"{self.timeout.total_seconds():g} s): {next(iter(failures.values()))}")

    def _named(self, ranks: Iterable[int]) -> str:
        """Ranks as text, each with its site if the run has several owners: "rank 2 (south), 3"."""
        sites = self.membership.sites if self.membership else ()
        return "rank " + ", ".join(f"{rank} ({sites[rank] or 'the server'})" if sites else f"{rank}"
                                   for rank in ranks)


class Heartbeat:
    """Each rank increments its counter in the store, so that the others can see who is alive.
    Collectives cannot show that: a rank that waits for a lost one is as silent as the lost one.

    Calls to the store have no timeout, and the process that hosts it may be stopped or cut off.
    Therefore only this thread calls the store; other threads read what it found.
    """

    SECONDS = 0.5
    LOST = 6  # a rank that misses as many beats counts as lost
    WHILE_COMPILING = 20  # compilers hold Python's lock for seconds, and with it the heartbeat

    def __init__(self, store: Store, rank: int, world_size: int) -> None:
        self.store, self.rank, self.world_size = store, rank, world_size
        self.silent_beats = self.LOST
        self.peer_failed = False
        self.reason = ""
        """Why the first rank that failed did so."""
        self._own_reason = ""
        self._reported = threading.Event()
        self._counts: dict[int, int] = {}
        self._readers = 0  # threads that want the counters of all ranks
        self._lock = threading.Lock()
        self._reads = 0  # how often the counters of all ranks were read
        self._stopped = threading.Event()
        self._ended = threading.Event()  # stopped, or without a store
        self._thread = threading.Thread(target=self._run, name=HEARTBEAT_THREAD, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            while not self._stopped.wait(self.SECONDS):
                self._beat()
        except RuntimeError:
            # No store: rank 0 or its launcher has ended, and the run with it. The main thread says
            # why, unless it does not come to ask.
            self._ended.set()
            self._reported.set()
            if not self._stopped.wait(6 * self.SECONDS):
                log(f"rank {self.rank}: {self.reason or 'rank 0 or its launcher has ended'}: "
                    "exiting", ERROR)
                end_process(1)

    def _beat(self) -> None:
        self.store.add(f"beats/{self.rank}", 1)
        if self._own_reason:
            self.store.compare_set(_FAILED, "", self._own_reason)
            self._reported.set()
        failed = self.store.check([_FAILED])
        if failed and not self.reason:
            self.reason = self.store.get(_FAILED).decode()
        self.peer_failed = failed  # last: who sees it may read the reason
        if self._readers:
            self._counts = {r: self.store.add(f"beats/{r}", 0) for r in range(self.world_size)}
            self._reads += 1

    def report_failure(self, reason: str) -> None:
        """Write into the store why this rank fails, and wait until that is done."""
        self._own_reason = reason
        self._reported.wait(SECONDS_FOR_STORE)

    def unresponsive(self) -> list[int]:
        """Ranks whose counter does not change for `silent_beats` beats (takes twice as long). Empty
        if the store does not answer, at once if it is gone or this rank has stopped its
        heartbeat."""
        with self._lock:
            self._readers += 1
        before, reads = self._read()
        after, more_reads = self._read()
        with self._lock:
            self._readers -= 1
        if reads == 0 or more_reads == reads:
            return []
        return [rank for rank, count in before.items() if after[rank] == count]

    def _read(self) -> tuple[dict[int, int], int]:
        self._ended.wait(self.silent_beats * self.SECONDS)
        return ({}, 0) if self._ended.is_set() else (self._counts, self._reads)

    def stop(self) -> None:
        """Call before the process ends: a thread inside the store would abort Python's shutdown.
        If the store does not return, the thread is left to `__main__`, which ends the process
        without that shutdown."""
        self._stopped.set()
        self._ended.set()
        self._thread.join(SECONDS_FOR_STORE)


def _type_and_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


def _encode(message: Any) -> tuple[Tensor, Tensor]:
    """The two parts of a message: HEAD_BYTES bytes that start with its length, and the rest."""
    text = json.dumps(message).encode()
    whole = len(text).to_bytes(_LENGTH_BYTES) + text
    whole += bytes(max(0, HEAD_BYTES - len(whole)))
    head, rest = torch.frombuffer(bytearray(whole), dtype=torch.uint8).tensor_split([HEAD_BYTES])
    return head, rest


def _buffer_for_rest(head: Tensor) -> Tensor:
    """An uninitialised buffer of the size of a message's second part."""
    length = int.from_bytes(head[:_LENGTH_BYTES].numpy().tobytes())
    return _empty(max(0, _LENGTH_BYTES + length - HEAD_BYTES))


def _decode(head: Tensor, rest: Tensor) -> Any:
    whole = head.numpy().tobytes() + rest.numpy().tobytes()
    length = int.from_bytes(whole[:_LENGTH_BYTES])
    return json.loads(whole[_LENGTH_BYTES:_LENGTH_BYTES + length])


def _empty(size: int) -> Tensor:
    return torch.empty(size, dtype=torch.uint8)
