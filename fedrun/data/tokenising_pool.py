"""Blocks of rows on their way through the processes that tokenise; they come back in order.

Since each row is tokenised by itself, neither blocks nor processes change an id.
"""

from __future__ import annotations

import os
from collections import deque
from types import TracebackType
from typing import TYPE_CHECKING, Protocol

import numpy as np

from fedrun.data.helper_pool import HelperPool
from fedrun.data.stored_rows import RowFiles, StoredRows
from fedrun.data.tokenising_process import Encoded, Encoder, Helper

if TYPE_CHECKING:
    from tokenizers import Tokenizer

BLOCK_BYTES = 1 << 22  # of text
BYTES_A_PROCESS = 1 << 23  # less text is tokenised before another process has started


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
        """processes: 1: this process tokenises, and each block when it is taken; only an
        `Encoder` has others. tokenizer: the encoder's, already loaded."""
        self._files, self._encoder, self._tokenizer = files, encoder, tokenizer
        self._own = deque[np.ndarray]()  # blocks for this process
        self._helpers: HelperPool[np.ndarray, Encoded] | None = None
        if processes > 1:
            assert isinstance(encoder, Encoder)
            self._helpers = HelperPool(lambda: Helper(encoder), processes)
        self.most = self._helpers.most if self._helpers else 1
        """How many blocks may be asked for before the first is taken."""

    def __len__(self) -> int:
        """Blocks that were asked for and not taken."""
        return len(self._own if self._helpers is None else self._helpers)

    def ask(self, spans: np.ndarray) -> None:
        """Ask for the ids of a block of rows. spans: as those of `StoredRows`."""
        self._files.flush()
        (self._own.append if self._helpers is None else self._helpers.ask)(spans)

    def take(self) -> Encoded:
        """The ids of the block that was asked for first.

        Raises:
            InputError: the tokenizer has no token for a word.
            HelperEnded: a process that tokenises was killed, or does not answer.
        """
        if self._helpers is not None:
            return self._helpers.take()
        return self._encoder.encoded(self._tokenizer, StoredRows(self._files, self._own.popleft()))

    def __enter__(self) -> TokenisingPool:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """End the processes, and what they are doing."""
        if self._helpers is not None:
            self._helpers.close()
