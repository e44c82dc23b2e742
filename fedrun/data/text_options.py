"""The flags that decide which text is read from a dataset. Needs no library."""

from __future__ import annotations

import codecs
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal

from fedrun.common.errors import InputError, require

HELD_OUT = Fraction(1, 20)  # default share of the train rows, without a validation split
GIVEN = "given"  # the --partition of data that fedrun.train was given client by client
COLUMN = "column:"  # prefix of a --partition whose sources are the values of a column


@dataclass(frozen=True)
class TextOptions:
    """Which text to read from a dataset, and what to validate on; part of the cache's key."""

    text_column: str | None = None
    """The column with the text, or several separated by commas; None: the only obvious one."""
    encoding: str | None = None
    """Encoding of files without a byte-order mark; None: UTF-8."""
    val_fraction: float | None = None
    """Share of the train rows to validate on, even if there is a validation split."""
    validation_split: str | None = None
    """The split to validate on; None: the validation split, if there is one."""
    partition: str = ""
    """by_source or column:NAME, for which a share of every source is held out; else empty."""
    row_separator: Literal["newline", "none"] = "newline"
    """Whether a row that does not end with a newline gets one before it is tokenised."""
    max_tokens: int | None = None
    """Read the first rows of the train split until they have so many tokens, and of a validation
    split until they have a twentieth of it; None: all."""
    stream: bool = False
    """Whether a dataset of the hub is read without a copy of it on this machine."""
    hold_out: bool = True
    """Whether a dataset without a validation split has one held out of its train rows; otherwise
    all of its text is validation text."""

    def __post_init__(self) -> None:
        require(self.text_column is None or all(self.columns), "--text_column", self.text_column,
                "a column's name, or several, such as title,body")
        require(self.encoding is None or _is_encoding(self.encoding), "--encoding", self.encoding,
                "an encoding known to Python, such as utf-8, latin-1, cp1252 or utf-16")
        require(self.val_fraction is None or 0 < self.val_fraction < 1, "--val_fraction",
                self.val_fraction, "in (0, 1)")
        require(self.validation_split is None or bool(self.validation_split.strip()),
                "--validation_split", self.validation_split, "the name of a split, such as test")
        require(self.max_tokens is None or 1 <= self.max_tokens < 2**62, "--max_tokens",
                self.max_tokens, "an integer >= 1, or none for all")
        require(self.validation_split is None or self.val_fraction is None, "--val_fraction",
                self.val_fraction, "none with --validation_split, which names the text")

    @property
    def columns(self) -> list[str]:
        """The names in `text_column`; empty if it is None."""
        return [] if self.text_column is None else [
            name.strip() for name in self.text_column.split(",")]

    @property
    def key(self) -> list[Any]:
        """All options for the cache's key. What was added later is left out where it is the
        default, so that text that was tokenised before there was a choice is found."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        separator, *added = (values.pop(name) for name in (
            "row_separator", "max_tokens", "stream"))
        return [*values.values(), *([] if separator == "newline" else [separator]),
                *([added] if added != [None, False] else [])]

    @property
    def source_column(self) -> str | None:
        """The column whose values are the sources."""
        return self.partition.removeprefix(COLUMN) if self.partition.startswith(COLUMN) else None

    @property
    def held_out(self) -> Fraction:
        """Share of the train rows to hold out if there is no validation split."""
        return HELD_OUT if self.val_fraction is None else Fraction(str(self.val_fraction))


def text_options_of(settings: Mapping[str, Any]) -> TextOptions:
    """The text options among a run's settings.

    Raises:
        InputError: a value that cannot work; the message names the flag.
    """
    def text(name: str) -> str | None:
        value = settings.get(name)
        return value if isinstance(value, str) else None

    fraction, most = settings.get("val_fraction"), settings.get("max_tokens")
    partition = text("partition") or ""
    return TextOptions(text("text_column"), text("encoding"),
                   fraction if isinstance(fraction, float) else None, text("validation_split"),
                   partition if partition == "by_source" or partition.startswith(COLUMN) else "",
                   "none" if text("row_separator") == "none" else "newline",
                   most if isinstance(most, int) else None, settings.get("stream") is True)


def require_dataset(dataset: str) -> None:
    """InputError for an empty --dataset, probably an unset shell variable, not this folder."""
    if not dataset.strip():
        raise InputError("--dataset is empty (an unset variable?); must be the name of a dataset, "
                         "a file or a folder ('.' is the current one)")


def _is_encoding(name: str) -> bool:
    try:
        codecs.lookup(name)
        "".encode(name)  # raises for codecs from text to text or from bytes to bytes
    except (LookupError, ValueError):
        return False
    return True
