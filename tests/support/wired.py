"""Data planes of workers that are threads of one process, each on a machine of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from fedrun.distributed.data_plane import DataPlane, Mask

SECONDS = 60.0


class Board:
    """What the workers show each other."""

    def __init__(self, workers: int) -> None:
        self.shown: list[Any] = [None] * workers
        self.barrier = threading.Barrier(workers, timeout=SECONDS)

    def swap(self, worker: int, mine: Any) -> list[Any]:
        """What all show, in order."""
        self.shown[worker] = mine
        self.barrier.wait()
        found = list(self.shown)
        self.barrier.wait()
        return found


class Wired(DataPlane):
    """One worker's plane; every sum and exchange goes over the board, and its bytes are counted."""

    def __init__(self, board: Board, worker: int) -> None:
        super().__init__()
        self.board, self.worker = board, worker
        self.workers = len(board.shown)
        self.nodes = tuple((w,) for w in range(self.workers))
        self.node_workers = (worker,)
        self.handed_over: list[int] = []
        """Bytes for other workers, of each exchange."""

    def sum_words(self, words: Sequence[int], mask: Mask | None = None) -> list[int]:
        assert mask is None
        return [sum(column) for column in zip(*self.board.swap(self.worker, words), strict=True)]

    def send_sections(self, row: Tensor | None, sections: Sequence[range], senders: Sequence[bool],
                      out: Tensor) -> None:
        assert row is not None
        assert all(senders)
        mine = sections[self.worker]
        self.handed_over.append(row.nbytes - len(mine) * row.itemsize)
        rows = self.board.swap(self.worker, row.clone())
        out.copy_(torch.cat([one[mine.start:mine.stop] for one in rows]))

    def gather_sections(self, whole: Tensor) -> None:
        mine = whole.view(self.workers, -1)[self.worker].clone()
        self.handed_over.append(mine.nbytes * (self.workers - 1))
        whole.copy_(torch.cat(self.board.swap(self.worker, mine)))


def together(calls: Sequence[Callable[[], None]]) -> None:
    """Make all calls at once, a thread each; their errors are raised here."""
    with ThreadPoolExecutor(len(calls)) as threads:
        for done in [threads.submit(call) for call in calls]:
            done.result()
