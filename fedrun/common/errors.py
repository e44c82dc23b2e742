"""Errors that users can act on: a line that names the flag and what it accepts. Needs no torch."""

from __future__ import annotations

import dis
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Literal

Failure = Literal["error", "diverged"]  # kinds of a failed run, in its outcome.json


def require(condition: bool, flag: str, value: object, accepted: str) -> None:
    """Raise the ValueError of a wrong setting: which flag, what it got, what it accepts."""
    if not condition:
        raise ValueError(f"{flag} {value}: accepted is {accepted}")


def is_component(name: str) -> bool:
    """Whether a name stands for one file or folder where it is put, never for a path out of it."""
    return name not in ("", ".", "..") and not {"/", "\0"} & set(name)


def one_line(error: BaseException) -> str:
    """An error's message with its line breaks folded."""
    return " ".join(str(error).split())


class Diverged(RuntimeError):
    """Training has left the finite numbers."""


class FolderLost(RuntimeError):
    """The run's folder is no longer this run's: it was removed, renamed, or another run has it."""


@contextmanager
def naming(flag: str, path: object) -> Iterator[None]:
    """Turn the disk's errors inside into a ValueError that names the flag which chose the path."""
    try:
        yield
    except OSError as error:
        said = (explain(error) or "").removeprefix(f"{path}: ")
        raise ValueError(f"{flag} {path}: {said}") from error


def explain(error: BaseException) -> str | None:
    """The one line for an error that the user or the machine has caused; None for a fault of ours,
    which only its traceback explains.

    What this package raises on purpose is worded for users. Of other errors, and of those that they
    were raised from, the operating system's count, and those for want of memory.
    """
    if _raised_on_purpose(error) and not isinstance(error, OSError):
        return one_line(error)
    cause: BaseException | None = error
    while cause is not None:
        if said := _of_the_machine(cause):
            return said
        cause = cause.__cause__
    return None


def _of_the_machine(error: BaseException) -> str | None:
    text = one_line(error)
    if isinstance(error, OSError):
        if error.strerror is None:
            return text
        return f"{os.fsdecode(error.filename)}: {error.strerror}" if isinstance(
            error.filename, str | bytes) else error.strerror
    if (isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
            or "can't allocate memory" in text):
        return f"not enough memory: {text}" if text else "not enough memory"
    if text.startswith("Could not determine home directory"):
        return ("this user has no home directory, which ~ stands for: set HOME, or give "
                "--cache_dir and other paths without ~")
    if re.search(r"\(os error \d+\)", text):  # of a library in Rust, which knows no OSError
        return text
    return None


def _raised_on_purpose(error: BaseException) -> bool:
    """Whether a `raise` in this package has raised it, and not something called from there."""
    if isinstance(error, AssertionError) or error.__traceback__ is None:
        return False
    last: TracebackType = error.__traceback__
    while last.tb_next is not None:
        last = last.tb_next
    code = last.tb_frame.f_code
    ours = code.co_filename.startswith(os.path.dirname(os.path.dirname(__file__)) + os.sep)
    return ours and dis.opname[code.co_code[last.tb_lasti]] == "RAISE_VARARGS"
