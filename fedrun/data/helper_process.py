"""A process that does a part of the work on a text, and how it is asked to over pipes.

    asked       whatever the process reads from its standard input
    answers     bytes of the whole answer, or -1, -2 and the bytes of what follows: int64; then the
                answer, the line of an InputError, or the errno of an OSError and its words

It ends when nobody can ask any more, also if the process that asks is killed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import suppress
from types import TracebackType
from typing import IO, Generic, Self, TypeVar

import numpy as np

from fedrun.common.errors import FedrunError, InputError, explain
from fedrun.common.limits import shortage

REFUSED, FAILED = -1, -2  # in place of an answer's size: an InputError, an OSError
SECONDS_TO_END = 10.0
PROGRAM = ("import json, sys; sys.path[:] = json.loads(sys.argv[1])\n"  # this process's packages
           "from fedrun.data.{module} import main; main(*sys.argv[2:])")
Parts = Sequence[bytes | memoryview]
Asked = TypeVar("Asked")
Answer = TypeVar("Answer")


class HelperEnded(FedrunError, RuntimeError):
    """A process that reads or tokenises text cannot be started, was killed, or does not answer."""

    code = "memory"  # by far the most frequent reason
    may_pass = True


class HelperProcess(ABC, Generic[Asked, Answer]):
    """A process that answers. Ends with the block of a `with` statement."""

    does: str
    """What it does, and this: what the next start does with what is done, for messages."""
    continues: str

    def __init__(self, module: str, *given: str) -> None:
        """module: in this package, whose `main` is called with what is given. HelperEnded if the
        process cannot be started."""
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", PROGRAM.format(module=module), json.dumps(sys.path),
                 *given], stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True,
                env=os.environ | {"TOKENIZERS_PARALLELISM": "false"})
        except OSError as error:  # which would be taken for one of the text or of the cache
            raise HelperEnded(
                f"a process that {self.does} cannot be started: {shortage(error) or explain(error)}"
                f"; on one core none is needed (taskset -c 0 fedrun ...); {self.continues}"
                ) from None

    @abstractmethod
    def ask(self, asked: Asked) -> Answer:
        """Have it do something, and wait until it has. Raises what `answered` does."""

    def answered(self, asked: bytes) -> bytes:
        """What the process answers.

        Raises:
            InputError: and OSError, without a file's name: what it raised.
            HelperEnded: it was killed.
        """
        pipe, answers = self._process.stdin, self._process.stdout
        assert pipe is not None
        assert answers is not None
        try:
            pipe.write(asked)
            pipe.flush()
            kind, = np.frombuffer(_exactly(answers, 8), np.int64).tolist()
            size = kind if kind >= 0 else int(np.frombuffer(_exactly(answers, 8), np.int64)[0])
            content = _exactly(answers, size)
        except (EOFError, OSError, ValueError):
            code = self._process.poll()
            raise HelperEnded(f"a process that {self.does} has ended" + (
                f" with code {code}" if code is not None else "") + "; if the machine is short of "
                f"memory, fewer cores need less (taskset -c 0 fedrun ...); {self.continues}"
                ) from None
        if kind == REFUSED:
            raise InputError(content.decode())
        if kind == FAILED:
            number, _, words = content.decode().partition(" ")
            raise OSError(int(number), words)
        return content

    def end(self) -> None:
        """End the process now."""
        self._process.kill()

    def __enter__(self) -> Self:
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


def answer_with(work: Callable[[], Parts]) -> bool:
    """In the process: answer with the parts that `work` returns, one after the other, or with what
    it raises. Returns whether anybody reads answers."""
    try:
        parts = work()
        head = [sum(memoryview(part).nbytes for part in parts)]
    except InputError as error:
        parts = [str(error).encode(errors="replace")]
        head = [REFUSED, len(parts[0])]
    except OSError as error:
        if error.errno is None:
            raise
        parts = [f"{error.errno} {error.strerror}".encode()]
        head = [FAILED, len(parts[0])]
    try:
        for part in (np.array(head, np.int64).tobytes(), *parts):
            sys.stdout.buffer.write(part)
        sys.stdout.buffer.flush()
    except BrokenPipeError:  # nobody does; Python would flush again at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return False
    return True
