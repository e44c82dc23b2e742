"""Errors that users can act on: one line that names the flag and what it accepts. Does not import
torch."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar, Literal

ErrorCode = Literal["", "memory", "disk", "text", "settings", "plan", "few", "masks", "journal",
                    "diverged", "noise", "spent", "bug"]
"""All that leaves a site of an error there, whose own text may name files or quote text."""
ERROR_TEXTS: dict[ErrorCode, str] = {
    "": "",
    "memory": "out of memory, threads or open files",
    "disk": "a file or folder there cannot be read or written",
    "text": "its text cannot be read, or is too little for its clients",
    "settings": "a setting or a package does not work there",
    "plan": "the server's plan is not the one that the settings give",
    "few": "fewer than three sites have a finite update, or than --weiszfeld_steps and two",
    "masks": "the masks or their keys do not match",
    "journal": "its journal refuses the sum (a new run needs another --seed), or cannot be written",
    "diverged": "the loss or the parameters are not finite",
    "noise": "the noise cannot be drawn, or what it costs not be written down",
    "spent": "it would cost more than --max_epsilon",
    "bug": "an unexpected error"}


class FedrunError(Exception):
    """Raised on purpose; its message is one line for the user, printed without a traceback."""

    code: ClassVar[ErrorCode] = "bug"
    """What leaves a site of it."""
    on_all_ranks: ClassVar[bool] = False
    """Whether all ranks raise it alike, so that none has to hear of it from another."""
    may_pass: ClassVar[bool] = False
    """Whether the same start may succeed later, though the user changes nothing."""


class InputError(FedrunError, ValueError):
    """The user must change something: a flag, a file or a folder. The message names it."""

    code: ClassVar[ErrorCode] = "settings"


class Diverged(FedrunError, RuntimeError):
    """The loss or the parameters are no longer finite."""

    code = "diverged"


class FolderLost(FedrunError, RuntimeError):
    """The run's folder was removed or renamed, or another run has taken it."""


Failure = Literal["error", "diverged"]  # why a run failed, in its outcome.json
_TOO_FEW = (errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.EAGAIN)
_SHORTAGE = ("allocate memory", "out of memory", "bad_alloc", "start new thread")


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


def error_code(error: BaseException) -> ErrorCode:
    """What may leave a site of an error there; "bug" for what is neither a FedrunError's nor the
    machine's fault."""
    if isinstance(error, FedrunError) and error.code != "bug":
        return error.code
    cause: BaseException | None = error
    while cause is not None:
        low = one_line(cause).lower()
        number = cause.errno if isinstance(cause, OSError) else None
        if (isinstance(cause, MemoryError) or number in _TOO_FEW
                or any(words in low for words in _SHORTAGE)):
            return "memory"
        if isinstance(cause, OSError) and not isinstance(cause, ConnectionError | TimeoutError):
            return "disk"
        cause = cause.__cause__
    return "bug"


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
