"""A process that tokenises blocks of rows, and how it is asked to. Needs neither torch nor
transformers, so that it starts in a third of a second.

    asked       number of ranges of rows, then the ranges: int64
    answers     number of tokens and of rows: int64; then the ids, and the tokens of each row,
                int64; or -1 and the length of an error's line, and the line

It ends when nobody can ask any more, also if the other process is killed.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING

import numpy as np

from fedrun.common.errors import FedrunError, InputError
from fedrun.data.stored_rows import RowFiles, StoredRows
from fedrun.data.tokenizer import encode, load_tokenizer, separated

if TYPE_CHECKING:
    from tokenizers import Tokenizer

BATCH_CHARACTERS = 1 << 18  # tokenised at once: 100 bytes a token until it is a number
BATCH_ROWS = 1 << 13
SECONDS_TO_END = 10.0
PROGRAM = ("import json, sys; sys.path[:] = json.loads(sys.argv[1])\n"  # this process's packages
           "from fedrun.data.tokenising_process import main; main(*sys.argv[2:])")


class HelperEnded(FedrunError, RuntimeError):
    """A process that tokenises was killed, or does not answer."""

    code = "memory"  # by far the most frequent reason
    may_pass = True


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

    def encoded(self, tokenizer: Tokenizer, rows: StoredRows) -> tuple[np.ndarray, np.ndarray]:
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


class Helper:
    """A process that tokenises. Ends with the block of a `with` statement."""

    def __init__(self, encoder: Encoder) -> None:
        self._dtype = encoder.dtype
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", PROGRAM, json.dumps(sys.path), str(encoder.rows),
             str(encoder.tokenizer), encoder.dtype.str, encoder.flag, encoder.separator],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True,
            env=os.environ | {"TOKENIZERS_PARALLELISM": "false"})

    def ask(self, spans: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What `Encoder.encoded` makes of these ranges of rows. Raises its errors, and HelperEnded
        if the process was killed."""
        asked, answers = self._process.stdin, self._process.stdout
        assert asked is not None
        assert answers is not None
        try:
            asked.write(np.int64(len(spans)).tobytes() + spans.astype(np.int64).tobytes())
            asked.flush()
            size, n_rows = np.frombuffer(_exactly(answers, 16), np.int64).tolist()
            if size < 0:
                raise InputError(_exactly(answers, n_rows).decode())
            ids = np.frombuffer(_exactly(answers, size * self._dtype.itemsize), self._dtype)
            return ids, np.frombuffer(_exactly(answers, 8 * n_rows), np.int64)
        except (EOFError, OSError, ValueError) as error:
            if isinstance(error, InputError):
                raise
            code = self._process.poll()
            raise HelperEnded("a process that tokenises has ended" + (
                f" with code {code}" if code is not None else "") + "; if the machine is short of "
                "memory, fewer cores need less (taskset -c 0 fedrun ...); the next "
                "start continues where this one ended") from None

    def end(self) -> None:
        """End the process now."""
        self._process.kill()

    def __enter__(self) -> Helper:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.end()
        self._process.wait(SECONDS_TO_END)
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with suppress(OSError):  # what was not asked any more
                pipe.close()


def _exactly(pipe: IO[bytes], size: int) -> bytes:
    content = pipe.read(size)
    if len(content) < size:
        raise EOFError
    return content


def main(rows: str, tokenizer_json: str, dtype: str, flag: str, separator: str) -> None:
    """The process: answer until nobody asks."""
    encoder = Encoder(Path(rows), Path(tokenizer_json), np.dtype(dtype), flag, separator)
    files, tokenizer = RowFiles(encoder.rows, whole=True), load_tokenizer(encoder.tokenizer)
    asked, answers = sys.stdin.buffer, sys.stdout.buffer
    while head := asked.read(8):
        spans = np.frombuffer(asked.read(16 * int(np.frombuffer(head, np.int64)[0])), np.int64)
        try:
            ids, counts = encoder.encoded(tokenizer, StoredRows(files, spans.reshape(-1, 2)))
        except InputError as error:
            line = str(error).encode(errors="replace")
            parts: list[bytes | memoryview] = [np.array([-1, len(line)]).tobytes(), line]
        else:
            parts = [np.array([len(ids), len(counts)]).tobytes(), ids.data, counts.data]
        try:
            for part in parts:
                answers.write(part)
            answers.flush()
        except BrokenPipeError:  # nobody reads any more; Python would flush again at its end
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return
