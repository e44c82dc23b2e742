"""Text that others wrote, on a terminal: names of folders, what a damaged file holds, a model's own
words. A terminal obeys some characters (move the cursor, write the clipboard, set the title) and
shows others in an order of their own, so whatever did not come from this program is printed through
`say` or `visible`. Needs nothing but the standard library.
"""

from __future__ import annotations

import io
import os
import re
import stat
import sys
import unicodedata
from typing import TextIO

from fedrun.common.errors import InputError

# Controls (C0, delete, C1), separators of lines, marks that turn the direction of writing, and
# halves of surrogate pairs, which no encoding takes.
_OBEYED = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069"
                     "\ud800-\udfff]")


def visible(text: str, keep: str = "") -> str:
    r"""`text` with every character that a terminal would obey written as its code: `\x1b`.

    keep: such characters to leave as they are ("\n\t" for text of several lines). Bytes of a file's
    name that the locale could not read are UTF-8 where they can be, else written as `\xff`.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        text = _reread(text)
    return _OBEYED.sub(lambda found: found[0] if found[0] in keep else
                       found[0].encode("unicode_escape").decode(), text)


def _reread(text: str) -> str:
    try:
        return text.encode(errors="surrogateescape").decode(errors="backslashreplace")
    except UnicodeEncodeError:  # surrogates that stand for no byte, as JSON can hold
        return text


def argument_text(given: str, flag: str) -> str:
    """A text from the command line, which is UTF-8 whatever the locale is; ValueError where it is
    not."""
    try:
        return given.encode(errors="surrogateescape").decode()
    except UnicodeError:
        raise InputError(f"{flag}: the text is not UTF-8") from None


def shortened(text: str, longest: int) -> str:
    """`text`, with its middle left out where it is wider than `longest` columns; a Chinese,
    Japanese or Korean character takes two."""
    half = (longest - 1) // 2
    start, end = _fitting(text, half), _fitting(text[::-1], half)[::-1]
    return text if len(_fitting(text, longest)) == len(text) else f"{start}…{end}"


def _fitting(text: str, columns: int) -> str:
    """As much of the beginning as fits."""
    for place, character in enumerate(text):
        columns -= 2 if unicodedata.east_asian_width(character) in "WF" else 1
        if columns < 0:
            return text[:place]
    return text


def say(text: str, file: TextIO | None = None) -> None:
    """Print lines that hold text of others; to standard output unless `file` says otherwise."""
    print(visible(text, keep="\n\t"), file=file, flush=True)


def say_text(text: str) -> None:
    """Print a text that is the result itself: as it is into a file, else as `say`."""
    if _is_file(sys.stdout):
        print(text, flush=True)
    else:
        say(text)


def make_printable() -> None:
    """Let standard output and error take every character, whatever the locale is: UTF-8 where they
    are files; a terminal or pipe that cannot show a character gets a question mark."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            if _is_file(stream):
                stream.reconfigure(encoding="utf-8", errors="backslashreplace")
            else:
                stream.reconfigure(errors="replace")


def _is_file(stream: TextIO) -> bool:
    try:
        return stat.S_ISREG(os.fstat(stream.fileno()).st_mode)
    except (AttributeError, OSError, ValueError):  # none, or not the system's
        return False
