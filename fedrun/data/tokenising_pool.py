"""Blocks of rows on their way through the processes that tokenise; they come back in order.

Since each row is tokenised by itself, neither blocks nor processes change an id.
"""

from __future__ import annotations

import contextlib
import os
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as WaitedTooLong
from queue import SimpleQueue
from types import TracebackType
from typing import TYPE_CHECKING, Protocol

import numpy as np

from fedrun.data.stored_rows import RowFiles, StoredRows
from fedrun.data.tokenising_process import Encoder, Helper, HelperEnded

if TYPE_CHECKING:
    from tokenizers import Tokenizer

BLOCK_BYTES = 1 << 22  # of text
BYTES_A_PROCESS = 1 << 23  # less text is tokenised before another process has started
BLOCK_SECONDS = 3600.0  # a process that has not answered for so long does not answer
Encoded = tuple[np.ndarray, np.ndarray]
"""Token ids of a block, and the number of tokens of each of its rows."""


class Encodes(Protocol):
    """What makes token ids of rows: `Encoder`, or what has them already (limited_rows.py)."""

    @property
    def dtype(self) -> np.dtype: ...

    def encoded(self, tokenizer: Tokenizer, rows: StoredRows) -> Encoded: ...


def processes_for(size: int) -> int:
    """How many processes tokenise so many bytes of text; 1: this one does."""
    return max(1, min(len(os.sched_getaffinity(0)), size // BYTES_A_PROCESS))


class TokenisingPool:
    """Processes that tokenise blocks of the rows in some files, to be closed."""

    def __init__(self, files: RowFiles, encoder: Encodes, tokenizer: Tokenizer, processes: int
                 ) -> None:
        """processes: 1: this process tokenises, and each block when it is asked for; only an
        `Encoder` has others. tokenizer: the encoder's, already loaded."""
        self._files, self._encoder, self._tokenizer = files, encoder, tokenizer
        self._asked: deque[np.ndarray | Future[Encoded]] = deque()
        self._stack, self._free = contextlib.ExitStack(), SimpleQueue[Helper]()
        self._threads: ThreadPoolExecutor | None = None
        self.most = 1 if processes == 1 else 2 * processes
        """How many blocks may be asked for before the first is taken."""
        if processes > 1:
            assert isinstance(encoder, Encoder)
            with self._stack:  # if a process does not start, the others end
                helpers = [self._stack.enter_context(Helper(encoder)) for _ in range(processes)]
                self._threads = ThreadPoolExecutor(processes)
                # The helpers end first, and with them what threads wait for.
                self._stack.callback(self._threads.shutdown, cancel_futures=True)
                for helper in helpers:
                    self._stack.callback(helper.end)
                    self._free.put(helper)
                self._stack = self._stack.pop_all()

    def __len__(self) -> int:
        """Blocks that were asked for and not taken."""
        return len(self._asked)

    def ask(self, spans: np.ndarray) -> None:
        """Ask for the ids of a block of rows. spans: as those of `StoredRows`."""
        self._files.flush()
        self._asked.append(spans if self._threads is None else
                           self._threads.submit(self._ask_helper, spans))

    def take(self) -> Encoded:
        """The ids of the block that was asked for first.

        Raises:
            InputError: the tokenizer has no token for a word.
            HelperEnded: a process that tokenises was killed, or does not answer.
        """
        block = self._asked.popleft()
        if isinstance(block, np.ndarray):
            return self._encoder.encoded(self._tokenizer, StoredRows(self._files, block))
        try:
            return block.result(BLOCK_SECONDS)
        except WaitedTooLong:
            raise HelperEnded(
                f"a process that tokenises has not answered for {BLOCK_SECONDS:.0f} s; "
                "start again, and it goes on with what is not done yet") from None

    def _ask_helper(self, spans: np.ndarray) -> Encoded:
        helper = self._free.get()
        try:
            return helper.ask(spans)
        finally:
            self._free.put(helper)

    def __enter__(self) -> TokenisingPool:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """End the processes, and what they are doing."""
        self._stack.close()
