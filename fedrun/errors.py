"""Errors that users can act on: a line that names the flag and what it accepts. Needs no torch."""

from __future__ import annotations

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
