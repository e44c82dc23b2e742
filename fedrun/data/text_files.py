"""Files as text: compressed or not, in an archive or not, in whatever encoding they are.

    .gz .bz2 .xz .zst   compressed; what is in them is told by the name before that ending
    .zip                an archive, read as a folder
    a byte-order mark   says what the encoding is (UTF-8, -16, -32), and is no text itself
"""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import lzma
import os
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import IO, Any, cast

from fedrun.common.errors import InputError

COMPRESSED = {".gz", ".bz2", ".xz", ".zst"}
BYTE_ORDER_MARKS = [  # UTF-32 first: its little-endian mark begins with that of UTF-16
    (codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"),
    (codecs.BOM_UTF8, "utf-8-sig"),
]  # fmt: skip
TEXT_ENDINGS = {".txt", ".text", ".md", ".rst", ".tex", ".html", ".py"}
HEAD = 8192  # bytes that tell text from anything else
BLOCK = 1 << 20
UNREADABLE = (OSError, EOFError, lzma.LZMAError, zlib.error, zipfile.BadZipFile)


@dataclass(frozen=True)
class DataFile:
    """A file to read, or one inside an archive."""

    path: Path
    name: PurePath
    """As it is called below the folder that was given."""
    member: str | None = None
    """Its name in the archive at `path`."""

    @property
    def plain_name(self) -> PurePath:
        """`name` without the ending of a compressed file."""
        return self.name.with_suffix("") if self.name.suffix.lower() in COMPRESSED else self.name

    @property
    def suffix(self) -> str:
        """The ending that says what is in it, in lower case: .jsonl of a.JSONL.gz."""
        return self.plain_name.suffix.lower()

    def __str__(self) -> str:
        return printable(self.path if self.member is None else self.path / self.member)


def printable(path: PurePath | str) -> str:
    """A path for a message: what is no text in it, or would not stay in its line, is replaced."""
    text = os.fsencode(path).decode("utf-8", "replace")
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


@contextmanager
def open_bytes(file: DataFile) -> Iterator[IO[bytes]]:
    """What the file holds, uncompressed.

    Raises:
        ValueError: it cannot be read or is damaged; here or while it is read, with its name.
    """
    try:
        with _open(file) as stream:
            yield stream
    except UNREADABLE as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise InputError(f"{file}: cannot be read: {reason}") from error


@contextmanager
def _open(file: DataFile) -> Iterator[IO[bytes]]:
    ending = file.name.suffix.lower()
    if file.member is not None:
        with zipfile.ZipFile(file.path) as archive:
            try:
                inner = archive.open(file.member)
            except RuntimeError as error:  # a password, or a method that is not known
                raise zipfile.BadZipFile(str(error)) from error
            with inner, _uncompressed(inner, ending) as stream:
                yield stream
    else:
        with file.path.open("rb") as outer, _uncompressed(outer, ending) as stream:
            yield stream


def _uncompressed(stream: IO[bytes], ending: str) -> IO[bytes]:
    if ending == ".gz":
        return cast(IO[bytes], gzip.open(stream))
    if ending == ".bz2":
        return cast(IO[bytes], bz2.open(stream))
    if ending == ".xz":
        return cast(IO[bytes], lzma.open(stream))
    if ending == ".zst":
        import pyarrow

        return io.BufferedReader(pyarrow.CompressedInputStream(stream, "zstd"), BLOCK)
    return stream


@contextmanager
def open_text(file: DataFile, encoding: str | None) -> Iterator[IO[str]]:
    """What the file holds as text without a byte-order mark; every end of a line is a newline.

    Raises:
        ValueError: as `open_bytes`, or a byte that is no text in this encoding, with its place.
    """
    with open_bytes(file) as stream:
        buffered = io.BufferedReader(cast(Any, stream), BLOCK)
        head = buffered.peek(HEAD)[:HEAD]
        used = _encoding(head, encoding)
        if used == "utf-8-sig" and head.count(0) > len(head) // 5:
            raise InputError(f"{file}: not UTF-8 text (byte 0x00 at position {head.index(0)}, and "
                             "many more: UTF-16 without its mark?); --encoding utf-16-le or "
                             "utf-16-be reads the files so")
        try:
            yield io.TextIOWrapper(buffered, encoding=used)
        except UnicodeError as error:
            raise InputError(f"{file}: {_not_text(file, used, error)}") from error


def is_text(file: DataFile, encoding: str | None) -> bool:
    """Whether the file begins like text; wrong bytes in what does are found when it is read."""
    if file.suffix in TEXT_ENDINGS:
        return True  # whatever is wrong with it, it is not left out
    with open_bytes(file) as stream:
        head = stream.read(HEAD)
    marked = any(head.startswith(mark) for mark, name in BYTE_ORDER_MARKS if name != "utf-8-sig")
    decoder = codecs.getincrementaldecoder(_encoding(head, encoding))
    try:
        text, whole = decoder("strict").decode(head), True
    except UnicodeError:
        if marked:
            return False  # the two bytes of such a mark were chance
        text, whole = decoder("ignore").decode(head), False
    stray = len(text) // 100 if whole and encoding is None else 0  # as in logs of crashed machines
    return text.count("\0") <= stray and not head.startswith(b"%PDF-")


def _encoding(head: bytes, encoding: str | None) -> str:
    """That of the byte-order mark, else the one asked for, else UTF-8."""
    for mark, name in BYTE_ORDER_MARKS:
        if head.startswith(mark):
            return name
    asked = encoding or "utf-8"
    return "utf-8-sig" if codecs.lookup(asked).name == "utf-8" else asked


def _not_text(file: DataFile, encoding: str, error: UnicodeError) -> str:
    """What is wrong with a file's bytes, where, and what to do."""
    name = {"utf-8-sig": "UTF-8"}.get(encoding, encoding)
    advice = ("--encoding latin-1 (or what it is) reads all files so; or convert it, or leave it "
              "out by a pattern")
    decoder = codecs.getincrementaldecoder(encoding)()
    read = lines = 0  # bytes that came before the block, and line ends in them
    with _open(file) as stream:
        while True:
            block = stream.read(BLOCK)
            pending = len(decoder.getstate()[0])
            try:
                decoder.decode(block, final=not block)
            except UnicodeDecodeError as wrong:
                line = lines + block[:max(0, wrong.start - pending)].count(b"\n") + 1
                where = f"position {read - pending + wrong.start}"
                if not encoding.startswith(("utf-16", "utf-32")):
                    where += f", line {line}"
                return (f"not {name} text (byte 0x{wrong.object[wrong.start]:02x} at {where}); "
                        f"{advice}")
            if not block:
                return f"not {name} text ({error}); {advice}"
            read, lines = read + len(block), lines + block.count(b"\n")
