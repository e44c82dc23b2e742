"""A control plane between threads of this process, each of which is a rank."""

from __future__ import annotations

import json
import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import Tensor

from fedrun.distributed.control_plane import ControlPlane
from fedrun.distributed.handshake import Membership

T = TypeVar("T")
SECONDS = 20.0  # that ranks wait for each other


class Room:
    """Where the ranks of a run meet."""

    def __init__(self, membership: Membership) -> None:
        self.membership = membership
        self.barrier = threading.Barrier(len(membership.sites), timeout=SECONDS)
        self.said: dict[int, str] = {}
        self.vectors: queue.Queue[Tensor] = queue.Queue()
        self.sent: list[str] = []
        """All messages, as JSON."""

    def run(self, of_rank: Callable[[FakeControl], T]) -> list[T | BaseException]:
        """What the function returns, or raises, on each rank."""
        def one(rank: int) -> T | BaseException:
            try:
                return of_rank(FakeControl(self, rank))
            except BaseException as error:
                return error

        ranks = range(len(self.membership.sites))
        with ThreadPoolExecutor(len(ranks)) as threads:
            return list(threads.map(one, ranks))

    def exchange(self, rank: int, message: str) -> dict[int, str]:
        """What all ranks have said at once."""
        self.said[rank] = message
        self.barrier.wait()
        everything = dict(self.said)
        self.barrier.wait()
        return everything


class FakeControl(ControlPlane):
    """One rank's part."""

    def __init__(self, room: Room, rank: int) -> None:
        super().__init__()
        self.room, self.rank, self.membership = room, rank, room.membership
        self.world_size, self.first_worker = len(room.membership.sites), 1

    def share(self, message: Any = None) -> Any:
        if self.rank == 0:
            self.room.sent.append(json.dumps(message))
        return json.loads(self.room.exchange(
            self.rank, json.dumps(message) if self.rank == 0 else "null")[0])

    def gather(self, message: Any) -> list[Any] | None:
        said = self.room.exchange(self.rank, json.dumps(message))
        if self.rank:
            self.room.sent.append(json.dumps(message))
            return None
        return [json.loads(said[rank]) for rank in sorted(said)]

    def share_vector(self, vector: Tensor | None, size: int, dtype: torch.dtype) -> Tensor:
        if self.rank == 0:
            assert vector is not None
            for _ in range(1, self.world_size):
                self.room.vectors.put(vector.clone())
        self.room.barrier.wait()
        found = vector if self.rank == 0 else self.room.vectors.get(timeout=SECONDS)
        assert found is not None
        assert (found.shape, found.dtype) == ((size,), dtype)
        self.room.barrier.wait()
        return found

    def copy_to_server(self, vector: Tensor) -> None:
        self.room.vectors.put(vector.clone())

    def receive_copy(self, size: int, dtype: torch.dtype, sender: int | None = None) -> Tensor:
        found = self.room.vectors.get(timeout=SECONDS)
        assert (found.shape, found.dtype) == ((size,), dtype)
        return found


def only(errors: Sequence[object], kind: type[BaseException]) -> str:
    """The message that all ranks have raised, of this kind."""
    assert all(type(error) is kind for error in errors), errors
    message, = {str(error) for error in errors}
    return message
