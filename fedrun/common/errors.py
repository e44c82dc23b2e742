"""Errors that users can act on: a line that names the flag and what it accepts. Needs no torch."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal


class FedrunError(Exception):
    """Raised on purpose, with a message for the user: one line, printed without a traceback."""


class InputError(FedrunError, ValueError):
    """The user has to change something: a flag, a file, a folder. The message names it."""


class Diverged(FedrunError, RuntimeError):
    """Training has left the finite numbers."""


class FolderLost(FedrunError, RuntimeError):
    """The run's folder is no longer this run's: it was removed, renamed, or another run has it."""


Failure = Literal["error", "diverged"]  # kinds of a failed run, in its outcome.json


def require(condition: bool, flag: str, value: object, accepted: str) -> None:
    """Raise the ValueError of a wrong setting: which flag, what it got, what it accepts."""
    if not condition:
        raise InputError(f"{flag} {value}: must be {accepted}")


def is_component(name: str) -> bool:
    """Whether a name stands for one file or folder where it is put, never for a path out of it."""
    return name not in ("", ".", "..") and not {"/", "\0"} & set(name)


def one_line(error: BaseException) -> str:
    """An error's message with its line breaks folded."""
    return " ".join(str(error).split())


@contextmanager
def naming(flag: str, path: object) -> Iterator[None]:
    """Turn the disk's errors inside into a ValueError that names the flag which chose the path."""
    try:
        yield
    except OSError as error:
        said = (explain(error) or "").removeprefix(f"{path}: ")
        raise InputError(f"{flag} {path}: {said}") from error


def explain(error: BaseException) -> str | None:
    """One line for an error that the user or the machine caused; None for a bug of ours, which
    needs its traceback.

    A FedrunError says it itself. Otherwise the error, or one that it was raised from, must come
    from the operating system or from a lack of memory.
    """
    if isinstance(error, FedrunError):
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
