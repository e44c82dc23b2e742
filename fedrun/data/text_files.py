"""Reads text files: plain, compressed or in an archive, in any encoding.

    .gz .bz2 .xz .zst   decompressed; the kind of content follows from the name without this ending
    .zip                an archive, read like a folder
    a byte-order mark   decides the encoding (UTF-8, -16 or -32) and is not part of the text
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
BYTE_ORDER_MARKS = [  # UTF-32 first: its little-endian mark begins with UTF-16's
    (codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"),
    (codecs.BOM_UTF8, "utf-8-sig"),
]  # fmt: skip
TEXT_ENDINGS = {".txt", ".text", ".md", ".rst", ".tex", ".html", ".py"}
HEAD = 8192  # bytes that are inspected to recognise text
BLOCK = 1 << 20
UNREADABLE = (OSError, EOFError, lzma.LZMAError, zlib.error, zipfile.BadZipFile)


@dataclass(frozen=True)
class DataFile:
    """A file to read, or one inside an archive."""

    path: Path
    name: PurePath
    """Its path relative to the folder that was given."""
    member: str | None = None
    """Its name in the archive at `path`; None if `path` is the file itself."""
    part: tuple[int, int] | None = None
    """The first and the end of the bytes that are read, from one line's beginning to another's, of
    UTF-8 text; of the row groups of a Parquet file; None: all."""

    @property
    def plain_name(self) -> PurePath:
        """`name` without the ending of a compressed file."""
        return self.name.with_suffix("") if self.name.suffix.lower() in COMPRESSED else self.name

    @property
    def suffix(self) -> str:
        """The ending that decides how it is read, in lower case: .jsonl for a.JSONL.gz."""
        return self.plain_name.suffix.lower()

    @property
    def begins(self) -> bool:
        """Whether what is read begins where the file does."""
        return self.part is None or self.part[0] == 0

    def __str__(self) -> str:
        return printable(self.path if self.member is None else self.path / self.member)


def printable(path: PurePath | str) -> str:
    """A path for a message, with replacement characters for what is not printable UTF-8."""
    text = os.fsencode(path).decode("utf-8", "replace")
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


@contextmanager
def open_bytes(file: DataFile) -> Iterator[IO[bytes]]:
    """Open a file, decompressed.

    Raises:
        InputError: it cannot be read or is damaged, noticed here or later while reading; the
            message has its name.
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
            except RuntimeError as error:  # encrypted, or an unknown compression method
                raise zipfile.BadZipFile(str(error)) from error
            with inner, _uncompressed(inner, ending) as stream:
                yield stream
    else:
        with file.path.open("rb") as outer, _uncompressed(outer, ending) as stream:
            yield stream


class _Part(io.RawIOBase):
    """Bytes `begin` to `end` - 1 of a file."""

    def __init__(self, file: IO[bytes], begin: int, end: int) -> None:
        self._file, self._left = file, end - begin
        file.seek(begin)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        content = self._file.read(min(len(buffer), self._left))
        buffer[:len(content)] = content
        self._left -= len(content)
        return len(content)


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
    """Open a file as text, without a byte-order mark and with newlines at all line ends.

    encoding: of a file without a byte-order mark; None: UTF-8.

    Raises:
        InputError: the errors of `open_bytes`, or bytes that are not text in this encoding; the
            message has their position.
    """
    with open_bytes(file) as stream:
        buffered = io.BufferedReader(cast(Any, stream if file.part is None else
                                          _Part(stream, *file.part)), BLOCK)
        head = buffered.peek(HEAD)[:HEAD] if file.begins else b""
        used = _encoding(head, encoding) if file.begins else "utf-8"
        if used == "utf-8-sig" and head.count(0) > len(head) // 5:
            raise InputError(f"{file}: not UTF-8 text (byte 0x00 at position {head.index(0)}, and "
                             "many more: UTF-16 without its mark?); try --encoding utf-16-le "
                             "or utf-16-be")
        try:
            yield io.TextIOWrapper(buffered, encoding=used)
        except UnicodeError as error:
            raise InputError(f"{file}: {_not_text(file, used, error)}") from error


def is_cut_at_lines(file: DataFile, encoding: str | None) -> bool:
    """Whether a file that is text may be read in parts: UTF-8, in which a line end is one byte that
    is part of no other character."""
    with open_bytes(file) as stream:
        return _encoding(stream.read(HEAD), encoding) == "utf-8-sig"


def is_text(file: DataFile, encoding: str | None) -> bool:
    """Whether the file begins like text; later wrong bytes are an error when it is read."""
    if file.suffix in TEXT_ENDINGS:
        return True  # a damaged one is an error, not skipped
    with open_bytes(file) as stream:
        head = stream.read(HEAD)
    marked = any(head.startswith(mark) for mark, name in BYTE_ORDER_MARKS if name != "utf-8-sig")
    decoder = codecs.getincrementaldecoder(_encoding(head, encoding))
    try:
        text, whole = decoder("strict").decode(head), True
    except UnicodeError:
        if marked:
            return False  # the bytes of the mark were a coincidence
        text, whole = decoder("ignore").decode(head), False
    # Logs of crashed machines have a few NUL bytes.
    allowed_nuls = len(text) // 100 if whole and encoding is None else 0
    return text.count("\0") <= allowed_nuls and not head.startswith(b"%PDF-")


def _encoding(head: bytes, encoding: str | None) -> str:
    """The encoding of the byte-order mark, or else the one asked for, or else UTF-8."""
    for mark, name in BYTE_ORDER_MARKS:
        if head.startswith(mark):
            return name
    asked = encoding or "utf-8"
    return "utf-8-sig" if codecs.lookup(asked).name == "utf-8" else asked


def _not_text(file: DataFile, encoding: str, error: UnicodeError) -> str:
    """For a message: which byte of the file is wrong, its position, and what to do."""
    name = {"utf-8-sig": "UTF-8"}.get(encoding, encoding)
    advice = ("try --encoding latin-1 (or another encoding, for all files), convert the file, or "
              "exclude it with a pattern")
    decoder = codecs.getincrementaldecoder(encoding)()
    read = lines = 0  # bytes before the current block, and line ends in them
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
