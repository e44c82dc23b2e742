"""Errors that users can act on: one line that names the flag and what it accepts. Does not import
torch."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal


class FedrunError(Exception):
    """Raised on purpose; its message is one line for the user, printed without a traceback."""


class InputError(FedrunError, ValueError):
    """The user must change something: a flag, a file or a folder. The message names it."""


class Diverged(FedrunError, RuntimeError):
    """The loss or the parameters are no longer finite."""


class FolderLost(FedrunError, RuntimeError):
    """The run's folder was removed or renamed, or another run has taken it."""


Failure = Literal["error", "diverged"]  # why a run failed, in its outcome.json


def require(condition: bool, flag: str, value: object, accepted: str) -> None:
    """Raise the InputError of a wrong setting unless the condition holds.

    accepted: completes "--flag VALUE: must be ...".
    """
    if not condition:
        raise InputError(f"{flag} {value}: must be {accepted}")


def is_component(name: str) -> bool:
    """Whether a name is that of a file or folder, and not a path that leads elsewhere."""
    return name not in ("", ".", "..") and not {"/", "\0"} & set(name)


def one_line(error: BaseException) -> str:
    """An error's message on one line."""
    return " ".join(str(error).split())


@contextmanager
def naming(flag: str, path: object) -> Iterator[None]:
    """Turn an OSError in the block into an InputError that names the flag which chose the path."""
    try:
        yield
    except OSError as error:
        reason = (explain(error) or "").removeprefix(f"{path}: ")
        raise InputError(f"{flag} {path}: {reason}") from error


def explain(error: BaseException) -> str | None:
    """One line for an error that the user or the machine caused; None for a bug, which needs its
    traceback.

    For a FedrunError, its message. Any other error, or one that it was raised from, must come from
    the operating system or from a lack of memory.
    """
    if isinstance(error, FedrunError):
        return one_line(error)
    cause: BaseException | None = error
    while cause is not None:
        if line := _explain_system_error(cause):
            return line
        cause = cause.__cause__
    return None


def _explain_system_error(error: BaseException) -> str | None:
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
        return ("~ cannot be expanded, since this user has no home directory: set HOME, or give "
                "--cache_dir and other paths without ~")
    if re.search(r"\(os error \d+\)", text):  # a library in Rust, which raises no OSError
        return text
    return None
