"""A process that tokenises blocks of rows, and how it is asked to. Needs neither torch nor
transformers, so that it starts in a third of a second.

    asked       number of ranges of rows, then the ranges: int64
    answers     (helper_process.py) number of tokens: int64; then the ids, and the tokens of each
                row, int64
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fedrun.data.helper_process import HelperProcess, Parts, answer_with
from fedrun.data.stored_rows import RowFiles, StoredRows
from fedrun.data.tokenizer import encode, load_tokenizer, separated

if TYPE_CHECKING:
    from tokenizers import Tokenizer

BATCH_CHARACTERS = 1 << 18  # tokenised at once: 100 bytes a token until it is a number
BATCH_ROWS = 1 << 13
Encoded = tuple[np.ndarray, np.ndarray]
"""Token ids of a block, and the number of tokens of each of its rows."""


@dataclass(frozen=True)
class Encoder:
    """How the rows in a folder become token ids."""

    rows: Path
    """The folder of RowFiles."""
    tokenizer: Path
    """tokenizer.json"""
    dtype: np.dtype
    flag: str
    """--tokenizer and its value, for messages."""
    separator: str
    """The value of --row_separator."""

    def encoded(self, tokenizer: Tokenizer, rows: StoredRows) -> Encoded:
        """The token ids of rows, concatenated, and the number of tokens of each row.

        Raises:
            InputError: the tokenizer has no token for a word.
        """
        parts, counts = [np.empty(0, self.dtype)], [np.empty(0, np.int64)]
        for batch in _batches(separated(rows, self.separator)):
            ids = [each.ids for each in encode(tokenizer, batch, self.flag)]
            sizes = np.fromiter(map(len, ids), np.int64, len(ids))
            parts.append(np.fromiter(itertools.chain.from_iterable(ids), self.dtype,
                                     int(sizes.sum())))
            counts.append(sizes)
        return np.concatenate(parts), np.concatenate(counts)


def _batches(texts: Iterator[str]) -> Iterator[list[str]]:
    batch, size = list[str](), 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= BATCH_CHARACTERS or len(batch) >= BATCH_ROWS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


class Helper(HelperProcess[np.ndarray, Encoded]):
    """A process that tokenises."""

    does, continues = "tokenises", "the next start continues where this one ended"

    def __init__(self, encoder: Encoder) -> None:
        super().__init__("tokenising_process", str(encoder.rows), str(encoder.tokenizer),
                         encoder.dtype.str, encoder.flag, encoder.separator)
        self._dtype = encoder.dtype

    def ask(self, asked: np.ndarray) -> Encoded:
        """What `Encoder.encoded` makes of these ranges of rows."""
        content = self.answered(np.int64(len(asked)).tobytes() + asked.astype(np.int64).tobytes())
        n_tokens = int(np.frombuffer(content, np.int64, 1)[0])
        return np.frombuffer(content, self._dtype, n_tokens, 8), np.frombuffer(
            content, np.int64, offset=8 + n_tokens * self._dtype.itemsize)


def main(rows: str, tokenizer_json: str, dtype: str, flag: str, separator: str) -> None:
    """The process: answer until nobody asks."""
    encoder = Encoder(Path(rows), Path(tokenizer_json), np.dtype(dtype), flag, separator)
    files, tokenizer = RowFiles(encoder.rows, whole=True), load_tokenizer(encoder.tokenizer)
    asked = sys.stdin.buffer
    while head := asked.read(8):
        spans = np.frombuffer(asked.read(16 * int(np.frombuffer(head, np.int64)[0])), np.int64)

        def encoded(spans: np.ndarray = spans) -> Parts:
            ids, counts = encoder.encoded(tokenizer, StoredRows(files, spans.reshape(-1, 2)))
            return np.int64(len(ids)).tobytes(), ids.data, counts.data

        if not answer_with(encoded):
            return
