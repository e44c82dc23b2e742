"""How a dataset's text is read, as far as the user says so. Needs no library."""

from __future__ import annotations

import codecs
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from fedrun.common.errors import InputError, require

HELD_OUT = Fraction(1, 20)  # of the train rows, where a dataset has no validation split
COLUMN = "column:"  # begins a --partition whose sources are the values of a column


@dataclass(frozen=True)
class Reading:
    """The choices that decide which text a dataset's name stands for; part of the cache's key."""

    text_column: str | None = None
    """The column that holds the text, or several, joined by commas; None: the obvious one."""
    encoding: str | None = None
    """Of files without a byte-order mark; None: UTF-8."""
    val_fraction: float | None = None
    """Share of the train rows to validate on, instead of any validation split."""
    validation_split: str | None = None
    """The split to validate on; None: the validation split, where there is one."""
    partition: str = ""
    """by_source or column:NAME, where a share of every source is held out; else empty."""
    hold_out: bool = True
    """Whether a dataset without a validation split lends one from its train rows; else all of its
    text is validation text."""

    def __post_init__(self) -> None:
        require(self.text_column is None or all(self.columns), "--text_column", self.text_column,
                "a column's name, or several, such as title,body")
        require(self.encoding is None or _is_encoding(self.encoding), "--encoding", self.encoding,
                "an encoding known to Python, such as utf-8, latin-1, cp1252 or utf-16")
        require(self.val_fraction is None or 0 < self.val_fraction < 1, "--val_fraction",
                self.val_fraction, "in (0, 1)")
        require(self.validation_split is None or bool(self.validation_split.strip()),
                "--validation_split", self.validation_split, "the name of a split, such as test")
        require(self.validation_split is None or self.val_fraction is None, "--val_fraction",
                self.val_fraction, "none with --validation_split, which chooses what to validate on")

    @property
    def columns(self) -> list[str]:
        """The columns of `text_column`, one by one; empty where none is named."""
        return [] if self.text_column is None else [
            name.strip() for name in self.text_column.split(",")]

    @property
    def source_column(self) -> str | None:
        """The column whose values are the sources."""
        return self.partition.removeprefix(COLUMN) if self.partition.startswith(COLUMN) else None

    @property
    def held_out(self) -> Fraction:
        """Share of the train rows that is held out where there is no validation split."""
        return HELD_OUT if self.val_fraction is None else Fraction(str(self.val_fraction))


def reading_of(settings: Mapping[str, Any]) -> Reading:
    """The part of a run's settings that says how its text is read.

    Raises:
        ValueError: a value that cannot work, with the flag's name.
    """
    def text(name: str) -> str | None:
        value = settings.get(name)
        return value if isinstance(value, str) else None

    fraction = settings.get("val_fraction")
    partition = text("partition") or ""
    return Reading(text("text_column"), text("encoding"),
                   fraction if isinstance(fraction, float) else None, text("validation_split"),
                   partition if partition == "by_source" or partition.startswith(COLUMN) else "")


def require_dataset(dataset: str) -> None:
    """Refuse an empty --dataset, as an unset shell variable leaves it: it is not this folder."""
    if not dataset.strip():
        raise InputError("--dataset is empty (an unset variable?): give a dataset's name, a file "
                         "or a folder; '.' is the current one")


def _is_encoding(name: str) -> bool:
    try:
        codecs.lookup(name)
        "".encode(name)  # refuses codecs from text to text, or from bytes to bytes
    except (LookupError, ValueError):
        return False
    return True
